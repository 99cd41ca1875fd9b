"""Fashion-MNIST: 70,000 grey 28 x 28 pictures of clothes in ten classes, found where the user has them or downloaded on request.

Xiao, Rasul and Vollgraf 2017, "Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning Algorithms",
arXiv:1708.07747; MIT licence, Zalando SE. The files are in the IDX format of MNIST, mostly gzipped. Files are recognised by a
hash of their *content*, because Debian packs the same bytes anew.
"""

from __future__ import annotations

import gzip
import hashlib
import http.client
import os
import urllib.request
import zlib
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from explorer.errors import DataError

__all__ = ["CLASSES", "MEAN", "STD", "find_folder", "normalise", "read_idx", "read_split"]

CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
# Mean and standard deviation of all pixels of the 60,000 training images, scaled to [0, 1].
MEAN = 0.2860
STD = 0.3530

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
DOWNLOAD_URL = "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/"

Part = Literal["train", "test"]
_FILES: dict[Part, tuple[str, str]] = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
# SHA-256 of the IDX content, unpacked.
SHA256 = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
_IDX_DTYPES: dict[int, np.dtype[np.generic]] = {
    0x08: np.dtype("u1"),
    0x09: np.dtype("i1"),
    0x0B: np.dtype(">i2"),
    0x0C: np.dtype(">i4"),
    0x0D: np.dtype(">f4"),
    0x0E: np.dtype(">f8"),
}


def _content(path: Path) -> bytes:
    """Bytes of a file, unpacked when it is gzipped (told by its first bytes, not by its name)."""
    raw = path.read_bytes()
    if raw[:2] != b"\x1f\x8b":
        return raw
    try:
        return gzip.decompress(raw)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} is a damaged gzip file ({error}); remove it and fetch it again.") from error


def read_idx(path: str | Path) -> NDArray[np.generic]:
    """Read one IDX file (the format of MNIST), gzipped or not.

    Parameters
    ----------
    path : str or Path

    Returns
    -------
    ndarray
        Shape and type as the header says; ``(N, 28, 28) uint8`` for images and ``(N,) uint8`` for labels.

    Raises
    ------
    DataError
        When the file is missing, is not IDX, or its length does not agree with its header.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"there is no file {path}; an IDX file, gzipped or not, is expected.")
    raw = _content(path)
    if len(raw) < 4 or raw[:2] != b"\x00\x00" or raw[2] not in _IDX_DTYPES:
        raise DataError(f"{path} is not an IDX file: it starts with {raw[:4].hex(' ') or 'nothing'}.")
    dtype, n_dims = _IDX_DTYPES[raw[2]], raw[3]
    start = 4 + 4 * n_dims
    if len(raw) < start:
        raise DataError(f"{path} ends within its IDX header; fetch the file again.")
    shape = tuple(int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(n_dims))
    expected = start + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if len(raw) != expected:
        raise DataError(
            f"{path} has {len(raw)} bytes where its IDX header {shape} asks for {expected}; fetch the file again."
        )
    values = np.frombuffer(raw, dtype, offset=start).reshape(shape)
    return values.astype(dtype.newbyteorder("="))


def _present(folder: Path, stem: str) -> Path | None:
    for candidate in (folder / f"{stem}.gz", folder / stem):
        if candidate.is_file():
            return candidate
    return None


def _complete(folder: Path) -> bool:
    return all(_present(folder, stem) for stems in _FILES.values() for stem in stems)


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "sparsity-explorer" / "fashion-mnist"


def find_folder(root: str | Path | None = None, *, download: bool = False) -> Path:
    """Find the folder that holds the four files of Fashion-MNIST.

    Looks in `root` when it is given (there, or in its sub-folders ``fashion-mnist``, ``FashionMNIST/raw``), otherwise where Debian
    puts the package and then in this user's cache.

    Parameters
    ----------
    root : str or Path, optional
    download : bool
        When nothing was found, download 31 MB to `root`, or to this user's cache.

    Returns
    -------
    Path

    Raises
    ------
    DataError
        When the files are not there and `download` is false, or the download fails or has the wrong content.
    """
    if root is not None:
        base = Path(root).expanduser()
        places = [base, base / "fashion-mnist", base / "FashionMNIST" / "raw"]
    else:
        places = [DEBIAN_FOLDER, _cache_folder()]
    for place in places:
        if _complete(place):
            return place
    if download:
        return _download(places[0] if root is not None else _cache_folder())
    looked = ", ".join(str(place) for place in places)
    raise DataError(
        f"Fashion-MNIST was not found (looked in {looked}). Three ways to have it: install the Debian package with "
        "'apt install dataset-fashion-mnist'; name the folder that holds the four IDX files with root=...; "
        "or let it be downloaded (31 MB) with download=True. The bundled subset 'demo:fashion' needs none of them."
    )


def _download(folder: Path) -> Path:
    """Fetch the four files, check each one's content, and only then give it its final name."""
    folder.mkdir(parents=True, exist_ok=True)
    for stems in _FILES.values():
        for stem in stems:
            target = folder / f"{stem}.gz"
            if _present(folder, stem):
                continue
            url = f"{DOWNLOAD_URL}{stem}.gz"
            partial = target.with_suffix(".part")
            try:
                with urllib.request.urlopen(url, timeout=60) as answer:  # noqa: S310 - the scheme is fixed above
                    partial.write_bytes(answer.read())
                found = hashlib.sha256(_content(partial)).hexdigest()
            except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
                partial.unlink(missing_ok=True)
                raise DataError(
                    f"downloading {url} failed ({error}). Fetch the four files by hand into a folder and pass root=..., "
                    "or install the Debian package dataset-fashion-mnist."
                ) from error
            except DataError:
                partial.unlink(missing_ok=True)
                raise
            if found != SHA256[stem]:
                partial.unlink(missing_ok=True)
                raise DataError(
                    f"{url} has other content than expected (SHA-256 {found}, expected {SHA256[stem]}); nothing was kept."
                )
            partial.replace(target)
    return folder


def read_split(folder: str | Path, part: Part) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Read the images and labels of one part.

    Parameters
    ----------
    folder : str or Path
        As `find_folder` returns it.
    part : {"train", "test"}

    Returns
    -------
    images : ndarray, (60000 or 10000, 28, 28) uint8
    labels : ndarray, (60000 or 10000,) uint8

    Raises
    ------
    DataError
        When a file is missing or damaged, or images and labels do not belong together.
    """
    folder = Path(folder)
    arrays = []
    for stem in _FILES[part]:
        path = _present(folder, stem)
        if path is None:
            raise DataError(f"there is neither {stem}.gz nor {stem} in {folder}.")
        arrays.append(read_idx(path))
    images, labels = arrays
    if images.dtype != np.uint8 or images.ndim != 3 or images.shape[1:] != (28, 28):
        raise DataError(
            f"the images in {folder} are {images.dtype} {images.shape}; uint8 (N, 28, 28) is expected."
        )
    if labels.shape != images.shape[:1] or (len(labels) and int(labels.max()) >= len(CLASSES)):
        raise DataError(
            f"the labels in {folder} are {labels.dtype} {labels.shape} for {len(images)} images; one of 0..9 an image is expected."
        )
    return images.astype(np.uint8), labels.astype(np.uint8)


def normalise(images: NDArray[np.generic]) -> Tensor:
    """Scale images to mean 0 and deviation 1 over the training images, as `demo:fashion-resnet` was trained on.

    Parameters
    ----------
    images : ndarray, (N, 28, 28) uint8

    Returns
    -------
    Tensor, (N, 1, 28, 28) float32
    """
    return (torch.from_numpy(images).float() / 255.0 - MEAN).div_(STD).unsqueeze(1)
