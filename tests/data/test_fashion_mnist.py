from __future__ import annotations

import gzip
import hashlib
import io
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from explorer.data import fashion_mnist, load_data
from explorer.data.fashion_mnist import find_folder, read_idx, read_split
from explorer.errors import DataError

FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
needs_full_data = pytest.mark.skipif(
    not fashion_mnist.DEBIAN_FOLDER.is_dir(),
    reason="the full Fashion-MNIST is not installed (apt install dataset-fashion-mnist)",
)


def idx(array: np.ndarray, code: int = 8) -> bytes:
    header = bytes([0, 0, code, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    return header + array.astype(array.dtype.newbyteorder(">")).tobytes()


def small_files() -> dict[str, bytes]:
    random = np.random.default_rng(0)
    contents = {}
    for stem in FILES:
        n = 40 if stem.startswith("train") else 20
        array = (
            random.integers(0, 256, (n, 28, 28), dtype=np.uint8)
            if "images" in stem
            else np.arange(n, dtype=np.uint8) % 10
        )
        contents[stem] = idx(array)
    return contents


@pytest.mark.parametrize(
    ("array", "code"),
    [
        (np.arange(24, dtype=np.uint8).reshape(2, 3, 4), 0x08),
        (np.array([-3, 0, 300], dtype=np.int16), 0x0B),
        (np.array([[1.5, -2.0]], dtype=np.float32), 0x0D),
    ],
)
@pytest.mark.parametrize("packed", [True, False])
def test_idx_files_are_read_back_packed_or_not(array, code, packed, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(gzip.compress(idx(array, code)) if packed else idx(array, code))
    read = read_idx(path)
    assert read.dtype == array.dtype
    np.testing.assert_array_equal(read, array)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not an IDX file"),
        (b"PNG and more", "not an IDX file"),
        (b"\x00\x00\x08\x03\x00\x00", "ends within its IDX header"),
        (idx(np.zeros((2, 3), np.uint8))[:-1], "has 17 bytes where its IDX header"),
        (idx(np.zeros((2, 3), np.uint8)) + b"x", "has 19 bytes where its IDX header"),
        (gzip.compress(idx(np.zeros((2, 3), np.uint8)), mtime=0)[:-9], "damaged gzip"),
    ],
)
def test_damaged_files_are_refused_with_the_reason(content, message, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_idx(path)


def test_a_missing_file_is_refused_by_name(tmp_path):
    with pytest.raises(DataError, match=r"there is no file .*nowhere"):
        read_idx(tmp_path / "nowhere")


@pytest.mark.parametrize("sub_folder", ["", "fashion-mnist", "FashionMNIST/raw"])
def test_a_folder_that_the_user_names_is_searched(sub_folder, tmp_path):
    folder = tmp_path / sub_folder
    folder.mkdir(parents=True, exist_ok=True)
    for stem, content in small_files().items():
        (folder / stem).write_bytes(content)
    assert find_folder(tmp_path) == folder
    images, labels = read_split(folder, "test")
    assert images.shape == (20, 28, 28)
    assert labels.tolist() == [*range(10)] * 2


def test_images_and_labels_that_do_not_belong_together_are_refused(tmp_path):
    contents = small_files()
    contents["train-labels-idx1-ubyte"] = idx(np.zeros(39, np.uint8))
    contents["t10k-labels-idx1-ubyte"] = idx(np.full(20, 10, np.uint8))
    for stem, content in contents.items():
        (tmp_path / stem).write_bytes(content)
    with pytest.raises(DataError, match="for 40 images"):
        read_split(tmp_path, "train")
    with pytest.raises(DataError, match=r"one of 0\.\.9"):
        read_split(tmp_path, "test")


def test_data_that_are_nowhere_are_refused_with_three_ways_to_have_them(tmp_path, monkeypatch):
    monkeypatch.setattr(fashion_mnist, "DEBIAN_FOLDER", tmp_path / "no-package")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(DataError) as caught:
        load_data("fashion-mnist")
    for way in ("apt install dataset-fashion-mnist", "root=", "download=True"):
        assert way in str(caught.value)


class Server:
    """Stands for the web: answers from a dictionary, and remembers what was asked."""

    def __init__(self, contents: dict[str, bytes]) -> None:
        self.contents = contents
        self.asked: list[str] = []

    def __call__(self, url: str, timeout: float) -> io.BytesIO:
        self.asked.append(url)
        stem = Path(url).name.removesuffix(".gz")
        if stem not in self.contents:
            raise urllib.error.URLError("no such host")
        return io.BytesIO(gzip.compress(self.contents[stem]))


@pytest.fixture
def empty_machine(tmp_path, monkeypatch):
    """No Debian package, an empty cache, and hashes of the small files."""
    monkeypatch.setattr(fashion_mnist, "DEBIAN_FOLDER", tmp_path / "no-package")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    hashes = {stem: hashlib.sha256(content).hexdigest() for stem, content in small_files().items()}
    monkeypatch.setattr(fashion_mnist, "SHA256", hashes)
    return tmp_path


def test_a_download_is_checked_kept_in_the_cache_and_not_repeated(empty_machine, monkeypatch):
    server = Server(small_files())
    monkeypatch.setattr(urllib.request, "urlopen", server)
    folder = find_folder(download=True)
    assert folder == empty_machine / "cache" / "sparsity-explorer" / "fashion-mnist"
    assert len(server.asked) == 4
    assert all(url.startswith("https://") for url in server.asked)
    assert read_split(folder, "train")[1].shape == (40,)
    assert find_folder(download=True) == folder
    assert len(server.asked) == 4


def test_a_download_with_other_content_is_not_kept(empty_machine, monkeypatch):
    contents = small_files()
    contents["train-images-idx3-ubyte"] = idx(np.zeros((40, 28, 28), np.uint8))
    monkeypatch.setattr(urllib.request, "urlopen", Server(contents))
    with pytest.raises(DataError, match="other content than expected"):
        find_folder(empty_machine / "here", download=True)
    assert list((empty_machine / "here").iterdir()) == []


def test_a_failed_download_says_what_else_can_be_done(empty_machine, monkeypatch):
    monkeypatch.setattr(urllib.request, "urlopen", Server({}))
    with pytest.raises(DataError, match=r"no such host.*root=.*dataset-fashion-mnist"):
        find_folder(empty_machine / "here", download=True)
    assert list((empty_machine / "here").iterdir()) == []


@needs_full_data
def test_the_installed_files_have_the_published_content_and_balance():
    folder = find_folder()
    for stem, expected in fashion_mnist.SHA256.items():
        content = gzip.decompress((folder / f"{stem}.gz").read_bytes())
        assert hashlib.sha256(content).hexdigest() == expected
    images, labels = read_split(folder, "train")
    assert images.shape == (60_000, 28, 28)
    assert np.bincount(labels).tolist() == [6000] * 10
    assert images.mean() / 255 == pytest.approx(fashion_mnist.MEAN, abs=5e-5)
    assert images.std() / 255 == pytest.approx(fashion_mnist.STD, abs=5e-5)
