"""The benchmark is only worth its table if all contestants run the same network, and are held to it."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from explorer.bench import __main__ as command
from explorer.bench import engines, networks
from explorer.errors import EngineError
from explorer.masks import n_zeros
from explorer.models import LoadedModel, architectures, load_model


@pytest.fixture(scope="module")
def small() -> LoadedModel:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 64, 5),
    )
    return load_model(net, torch.randn(1, 3, 8, 8))


def test_the_pruned_copy_is_exactly_as_sparse_as_asked_and_leaves_the_model_alone(small: LoadedModel) -> None:
    before = {name: weight.clone() for name, weight in small.module.state_dict().items()}
    pruned = engines.pruned_copy(small, 0.9)
    zeros = {
        name: int((weight == 0).sum())
        for name, weight in pruned.state_dict().items()
        if name.endswith("weight")
    }
    assert zeros == {"0.weight": 0, "2.weight": n_zeros(8 * 16 * 9, 0.9), "5.weight": 0}
    assert all(torch.equal(weight, before[name]) for name, weight in small.module.state_dict().items())


def test_outputs_of_a_calibrated_network_depend_on_its_first_layer() -> None:
    """Random, then pruned: without calibration a mistake in the first layer would be lost among the last layer's biases."""
    torch.manual_seed(0)
    model = load_model(architectures.mobilenet_v1(), torch.randn(1, 3, 64, 64))

    def change(module: nn.Module) -> float:
        with torch.no_grad():
            right = module(model.example_input)
            module.stem[0].weight[:16] *= 1.5
            return float((module(model.example_input) - right).abs().max() / right.abs().max())

    layers = networks.NETWORKS["mobilenet_v1"].pruned(model.layers)
    plain, calibrated = (engines.pruned_copy(model, 0.9, layers) for _ in range(2))
    engines.calibrate(calibrated, model.example_input)
    assert not any(part.training for part in calibrated.modules())
    assert change(plain) < engines.TOLERANCE < 0.05 < change(calibrated)


def test_every_engine_is_timed_and_the_fastest_dense_one_is_the_measure(small: LoadedModel) -> None:
    timings = list(engines.time_engines(small, small.example_input, sparsities=(0.0, 0.9), seconds=0.2))
    for sparsity in (0.0, 0.9):
        here = {one.contestant: one for one in timings if one.sparsity == sparsity}
        assert {"torch eager", "engine dense", engines.SPARSE} <= here.keys()
        dense = [one for name, one in here.items() if name != engines.SPARSE]
        best = min(one.benchmark.latency_ms for one in dense)
        assert max(one.speedup for one in dense) == 1.0
        assert here[engines.SPARSE].speedup == pytest.approx(best / here[engines.SPARSE].benchmark.latency_ms)


def test_onnxruntime_gives_torch_s_numbers(small: LoadedModel) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    call = engines._onnxruntime(small.module, small.example_input, 1)
    with torch.no_grad():
        torch.testing.assert_close(call(), small.module(small.example_input), rtol=1e-4, atol=1e-5)


def test_an_engine_with_another_output_is_not_timed(
    small: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "dense_contestants", lambda *_: {"liar": lambda: torch.zeros(1, 5)})
    with pytest.raises(EngineError, match="liar gives another output than torch"):
        list(engines.time_engines(small, small.example_input, sparsities=(0.5,), seconds=0.1))


def test_an_engine_that_gives_nan_is_not_timed() -> None:
    with pytest.raises(EngineError, match="relative difference nan"):
        engines._check_output("nan", torch.full((2,), torch.nan), torch.ones(2))


def test_the_command_prints_machine_threads_and_every_row(
    small: LoadedModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    benchmark = SimpleNamespace(latency_ms=2.0, spread_ms=0.25, min_ms=1.5)
    seen = {}

    def timed(_: LoadedModel, example: torch.Tensor, **settings: object) -> list[engines.EngineTiming]:
        seen.update(settings, batch=example.shape[0])
        return [engines.EngineTiming("engine sparse", 0.9, benchmark, 3.0)]

    monkeypatch.setattr(command, "load_network", lambda _: (small, networks.DEMO))
    monkeypatch.setattr(command, "time_engines", timed)
    engine = f"onnxruntime={sys.executable}"
    assert command.main(["--sparsity", "0.9", "--threads", "2", "--batch-size", "4", "--engine", engine]) == 0
    foreign = [("onnxruntime", sys.executable)]
    assert seen == {
        "sparsities": [0.9],
        "threads": 2,
        "batch": 4,
        "foreign": foreign,
        "layers": small.layers[1:-1],
    }
    said = capsys.readouterr().out
    assert torch.__version__ in said
    assert "2 thread(s), batch 4" in said
    row = said.splitlines()[-1].split()
    assert row == ["0.90", "engine", "sparse", "2.000", "0.250", "1.500", "3.00x"]


@pytest.mark.parametrize("arguments", [["--sparsity", "1.0"], ["--threads", "0"], ["--batch-size", "0"]])
def test_the_command_refuses_what_cannot_be_measured(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        command.main(arguments)
    assert "at least 1" in capsys.readouterr().err


def test_the_command_says_which_models_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--model", "demo:nothing"]) == 1
    assert "demo:fashion-resnet" in capsys.readouterr().err
