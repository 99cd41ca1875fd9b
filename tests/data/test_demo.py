from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
import torch

from explorer.data import demo, fashion_mnist, load_data
from explorer.data.demo import PARTS, build, read_demo
from explorer.data.split import demo_split
from explorer.errors import DataError

FOLDER = demo._PATH.parent
needs_full_data = pytest.mark.skipif(
    not fashion_mnist.DEBIAN_FOLDER.is_dir(),
    reason="the full Fashion-MNIST is not installed (apt install dataset-fashion-mnist)",
)


@pytest.fixture(scope="module")
def arrays():
    return read_demo()


def test_the_bundled_arrays_are_those_that_the_provenance_file_names(arrays):
    provenance = json.loads((FOLDER / "fashion.json").read_text(encoding="utf-8"))
    assert {
        name: hashlib.sha256(array.tobytes()).hexdigest() for name, array in arrays.items()
    } == provenance["array_sha256"]
    assert provenance["images"] == {"train": 8000, "validation": 2000, "test": 10000}
    assert (FOLDER / "fashion.npz").stat().st_size < 10e6
    assert "Zalando" in (FOLDER / "LICENSE-fashion-mnist.txt").read_text(encoding="utf-8")


def test_the_bundled_parts_are_balanced_and_do_not_overlap(arrays):
    for part in PARTS:
        labels = arrays[f"{part}_labels"]
        assert np.bincount(labels).tolist() == [len(labels) // 10] * 10
        assert (np.diff(arrays[f"{part}_index"]) > 0).all()
    assert not set(arrays["train_index"]) & set(arrays["validation_index"])


@needs_full_data
def test_the_bundled_images_are_a_part_of_the_full_data(arrays):
    folder = fashion_mnist.find_folder()
    for part in PARTS:
        images, labels = fashion_mnist.read_split(folder, "test" if part == "test" else "train")
        index = arrays[f"{part}_index"]
        np.testing.assert_array_equal(arrays[f"{part}_images"], images[index])
        np.testing.assert_array_equal(arrays[f"{part}_labels"], labels[index])


@needs_full_data
def test_building_the_bundled_file_again_gives_the_same_arrays(arrays, tmp_path):
    again = read_demo(build.build(fashion_mnist.find_folder(), tmp_path))
    assert again.keys() == arrays.keys()
    for name, array in again.items():
        np.testing.assert_array_equal(array, arrays[name])
    assert (tmp_path / "fashion.json").read_text("utf-8") == (FOLDER / "fashion.json").read_text("utf-8")


def test_the_held_out_images_are_in_neither_training_part():
    labels = np.random.default_rng(0).permutation(np.arange(60_000, dtype=np.int64) % 10).astype(np.uint8)
    test_labels = np.arange(10_000, dtype=np.int64).astype(np.uint8) % 10
    split = demo_split(labels, test_labels)
    held_out = set(split.validation.tolist())
    assert len(held_out) == 2000
    assert not held_out & set(split.train.tolist())
    assert not held_out & set(split.dense.tolist())
    assert set(split.train.tolist()) <= set(split.dense.tolist())
    assert len(split.dense) == 58_000
    np.testing.assert_array_equal(demo_split(labels, test_labels).train, split.train)


def test_the_demo_data_are_normalised_images_with_their_names():
    data = load_data("demo:fashion")
    assert data.name == "demo:fashion"
    assert len(data.classes) == 10
    assert data.augment is not None
    for part, n in [("train", 8000), ("validation", 2000), ("test", 10000)]:
        inputs, labels = getattr(data, f"{part}_tensors")()
        assert inputs.shape == (n, 1, 28, 28)
        assert inputs.dtype == torch.float32
        assert labels.dtype == torch.int64
        assert labels.bincount().tolist() == [n // 10] * 10
        assert abs(float(inputs.mean())) < 0.02
        assert abs(float(inputs.std()) - 1) < 0.02


@needs_full_data
def test_the_full_data_hold_the_same_validation_images_as_the_demo():
    full, small = load_data("fashion-mnist"), load_data("demo:fashion")
    assert torch.equal(full.validation_tensors()[0], small.validation_tensors()[0])
    assert len(full.train) == 58_000
    assert full.test_tensors()[0].shape == (10_000, 1, 28, 28)


@pytest.mark.parametrize("damage", ["missing", "truncated", "other"])
def test_a_damaged_demo_file_says_how_to_get_it_back(damage, tmp_path):
    path = tmp_path / "fashion.npz"
    if damage == "truncated":
        path.write_bytes(demo._PATH.read_bytes()[:10_000])
    elif damage == "other":
        np.savez(path, something=np.zeros(3))
    with pytest.raises(DataError, match="install the package again, or make them with"):
        read_demo(path)
