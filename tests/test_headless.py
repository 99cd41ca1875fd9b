"""The demo pruned by the command line alone, to a speed-up that is measured."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

import pytest
import torch

import explorer
import explorer.study
from explorer import cli
from explorer.data import load_data
from explorer.formats import read_weights


def speedup_again(folder: Path) -> float:
    """The speed-up of the weights that a run has left, measured once more."""
    study = explorer.Study("demo:fashion-resnet", "demo:fashion")
    module = explorer.load_model("demo:fashion-resnet").module
    module.load_state_dict(read_weights(folder / "model.safetensors"))
    ((pruned, dense),) = study._beside_dense(module, seconds=2.0)
    return dense.latency_ms / pruned.latency_ms


@pytest.mark.slow
def test_the_demo_is_pruned_headless_to_a_measured_speedup(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # For time's sake half an epoch, where the whole run of six is within one point of the dense accuracy, and a fifth of the test images.
    demo = load_data("demo:fashion")
    few = torch.utils.data.TensorDataset(*demo.test_tensors(2000))
    monkeypatch.setattr(explorer.study, "load_data", lambda _: dataclasses.replace(demo, test=few))
    started = time.monotonic()
    options = [
        "--model",
        "demo:fashion-resnet",
        "--data",
        "demo:fashion",
        "--speedup",
        "3",
        "--epochs",
        "0.5",
    ]
    assert cli.main(["prune", *options, "--out", str(tmp_path / "run")]) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["seconds"]["run"] < time.monotonic() - started
    speedups = [result["pruned"]["speedup"]]
    while (
        max(speedups) <= 2.5 and len(speedups) < 5
    ):  # beside other work a turn of the pruned network takes as long as a dense one
        speedups.append(speedup_again(tmp_path / "run"))
    assert max(speedups) > 2.5, speedups
    assert result["pruned"]["accuracy"] > result["dense"]["accuracy"] - 0.04
    assert result["pruned"]["sparsity"] > 0.7
    for layer in result["layers"].values():
        assert 0.0 <= layer["achieved"] - layer["asked"] <= 1.0 / layer["n_params"]
