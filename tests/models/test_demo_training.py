from __future__ import annotations

import gzip
import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from explorer.data.demo import read_demo
from explorer.models.architectures import FashionResNet
from explorer.models.demo import train


@pytest.fixture
def small_fashion(tmp_path):
    """A folder of IDX files as Fashion-MNIST has them, with 2,560 training and 2,000 test images."""
    demo = read_demo()
    order = np.argsort(demo["train_index"] % 10, kind="stable")

    def write(name, array):
        header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(header + array.tobytes(), mtime=0))

    train = order[:2560]
    write("train-images-idx3-ubyte", demo["train_images"][train])
    write("train-labels-idx1-ubyte", demo["train_labels"][train])
    write("t10k-images-idx3-ubyte", demo["test_images"])
    write("t10k-labels-idx1-ubyte", demo["test_labels"])
    return tmp_path


def test_the_training_script_is_reproducible_from_its_seed_and_states_where_the_weights_come_from(
    small_fashion, tmp_path
):
    for out in ("a", "b"):
        train.main(
            [
                "--root",
                str(small_fashion),
                "--out",
                str(tmp_path / out),
                "--epochs",
                "1",
                "--threads",
                "1",
                "--seed",
                "3",
                "--widths",
                "2",
                "4",
                "6",
                "--depth",
                "2",
            ]
        )
    first, second = (tmp_path / out / "fashion-resnet.safetensors" for out in ("a", "b"))
    assert first.read_bytes() == second.read_bytes()
    assert all(bool(torch.isfinite(value).all()) for value in load_file(first).values())
    provenance = json.loads((tmp_path / "a" / "fashion-resnet.json").read_text(encoding="utf-8"))
    assert "--widths 2 4 6 --depth 2" in provenance["command"]
    assert "--seed 3" in provenance["command"]
    FashionResNet((2, 4, 6), depth=2).load_state_dict(load_file(first))
    assert provenance["torch"] == torch.__version__


def test_the_learning_rate_rises_to_its_peak_and_falls_to_nearly_nothing():
    rates = [train.learning_rate_at(step, 200, 0.2, 0.15) for step in range(200)]
    assert rates[29] == rates[30] == max(rates) == 0.2
    assert all(a < b for a, b in pairwise(rates[:30]))
    assert all(a > b for a, b in pairwise(rates[30:]))
    assert rates[-1] < 1e-3 * rates[30]
