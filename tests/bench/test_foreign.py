"""Engines in processes of their own: what they are given, what they answer, and how they fail."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Self

import pytest
import torch
from torch import nn

from explorer.bench import engines
from explorer.bench.foreign import FOREIGN, ForeignEngine, export, parse
from explorer.errors import EngineError
from explorer.inference.timing import compare_latency
from explorer.models import load_model

NET = nn.Sequential(
    nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5)
).eval()


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    return export(NET, torch.randn(2, 3, 6, 6), tmp_path)


def test_an_engine_in_another_process_computes_the_same_network_and_keeps_its_own_time(
    exported: Path,
) -> None:
    import numpy as np

    x = torch.from_numpy(np.load(exported.with_name("input.npy")))
    with ForeignEngine("onnxruntime", sys.executable, exported, 1) as engine:
        with torch.no_grad():
            torch.testing.assert_close(engine(), NET(x), rtol=1e-4, atol=1e-5)
        assert engine.version
        assert 0 < engine.seconds(1) < engine.seconds(2000)
        timed = compare_latency({"here": lambda: NET(x), "there": engine}, seconds=0.1, batch_size=2)
    assert 0 < timed["there"].latency_ms < 1000
    with pytest.raises(EngineError, match="onnxruntime ended"):
        engine.seconds(1)


def test_a_missing_engine_is_named(exported: Path) -> None:
    with pytest.raises(
        EngineError, match="deepsparse failed: ModuleNotFoundError: No module named 'deepsparse'"
    ):
        ForeignEngine("deepsparse", sys.executable, exported, 1)


def test_a_process_that_dies_is_reported(exported: Path) -> None:
    with pytest.raises(EngineError, match="onnxruntime ended, with status 1"):
        ForeignEngine("onnxruntime", "/bin/false", exported, 1)


def test_names_and_interpreters_are_checked() -> None:
    assert parse(f"openvino={sys.executable}") == ("openvino", sys.executable)
    with pytest.raises(EngineError, match=f"one of {', '.join(FOREIGN)}"):
        parse(f"tensorrt={sys.executable}")
    with pytest.raises(EngineError, match="NAME=PYTHON"):
        parse("openvino")
    with pytest.raises(EngineError, match="There is no /nowhere/python"):
        parse("openvino=/nowhere/python")


def test_a_speedup_refers_to_dense_float32_engines_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """A foreign engine that uses zeros is timed and shown, and is not what others are measured against."""

    class Instant:
        isa = "foreign"

        def __init__(self, name: str, *_: object) -> None:
            self.name = name

        def __enter__(self) -> Self:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def __call__(self) -> torch.Tensor:
            return outputs[self.name]

        def seconds(self, calls: int) -> float:
            return 1e-9 * calls

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    model = load_model(net, torch.randn(1, 8))
    pruned = engines.pruned_copy(model, 0.5)
    with torch.no_grad():
        right = pruned(model.example_input)
    outputs = {"deepsparse": right, "openvino": right * 1.1}
    monkeypatch.setattr(engines, "ForeignEngine", Instant)
    monkeypatch.setattr(engines, "export", lambda *_: Path("model.onnx"))
    foreign = [("deepsparse", "python"), ("openvino", "python")]
    timings = {
        t.contestant: t
        for t in engines.time_engines(
            model, model.example_input, sparsities=(0.5,), seconds=0.05, foreign=foreign
        )
    }
    own = [t for name, t in timings.items() if name not in outputs]
    assert max(t.speedup for name, t in timings.items() if name not in (*outputs, engines.SPARSE)) == 1.0
    assert timings["deepsparse"].speedup > max(t.speedup for t in own)
    outputs["deepsparse"] = right * 1.1
    with pytest.raises(EngineError, match="deepsparse gives another output"):
        list(
            engines.time_engines(model, model.example_input, sparsities=(0.5,), seconds=0.05, foreign=foreign)
        )
