from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from explorer.formats import FinalLatency, result_document, write_result
from explorer.pruning import EvalEvent, LatencyEvent, RunResult, RunSettings


@dataclass(frozen=True)
class Timed:
    latency_ms: float
    spread_ms: float = 0.01
    min_ms: float = 0.5
    repeats: int = 50
    threads: int = 1
    batch_size: int = 1
    isa: str = "avx2"


def a_result(**changes: Any) -> RunResult:
    values: dict[str, Any] = {
        "module": nn.Linear(10, 10),
        "masks": {"": torch.ones(10, 10, dtype=torch.bool)},
        "asked": {"a": 0.5, "b": 0.899},
        "locked": (),
        "groups": (),
        "achieved": {"a": (50, 100), "b": (270, 300)},
        "dense_accuracy": 0.92,
        "accuracy": 0.915,
        "measured_on": "test",
        "n_evaluated": 2000,
        "stopped": False,
        "failure": None,
        "step": 40,
        "total_steps": 40,
        "seconds": 12.5,
        "evaluations": (EvalEvent(0, 0.93, 0.2, 0.0), EvalEvent(40, 0.925, 0.21, 0.8)),
        "settings": RunSettings(seed=7),
    }
    return RunResult(**(values | changes))


LATENCY = FinalLatency(Timed(0.5), {"torch eager": Timed(2.0), "engine dense": Timed(1.6)})


def document(result: RunResult, latency: FinalLatency | None = LATENCY) -> dict[str, Any]:
    return result_document(result, latency=latency, dense_bytes=1600, pruned_bytes=400, file_bytes=1700)


def test_the_agreed_keys_hold_the_figures(tmp_path: Path) -> None:
    write_result(document(a_result()), tmp_path / "result.json")
    found = json.loads((tmp_path / "result.json").read_text())
    assert found["dense"]["accuracy"] == 0.92
    assert found["dense"]["latency_ms"] == 1.6
    assert found["dense"]["size_bytes"] == 1600
    assert found["dense"]["baseline"] == "engine dense"
    assert found["dense"]["contestants"]["torch eager"]["latency_ms"] == 2.0
    assert found["pruned"]["accuracy"] == 0.915
    assert found["pruned"]["latency_ms"] == 0.5
    assert found["pruned"]["spread_ms"] == 0.01
    assert found["pruned"]["speedup"] == pytest.approx(3.2)
    assert found["pruned"]["sparsity"] == 320 / 400
    assert found["pruned"]["nnz"] == 80
    assert found["pruned"]["size_bytes"] == 400
    assert found["layers"] == {
        "a": {"asked": 0.5, "achieved": 0.5, "zeros": 50, "n_params": 100},
        "b": {"asked": 0.899, "achieved": 0.9, "zeros": 270, "n_params": 300},
    }
    assert found["stopped"] is False
    assert found["seed"] == 7
    assert found["validation"] == {"dense_accuracy": 0.93, "accuracy": 0.925}
    assert found["accuracy_measured_on"] == {"part": "test", "samples": 2000}
    for key in ("cpu", "cores", "system", "torch", "isa", "threads", "batch_size"):
        assert found["machine"][key]


def test_what_was_not_measured_is_null_and_the_file_stays_plain_json(tmp_path: Path) -> None:
    result = a_result(dense_accuracy=math.nan, accuracy=math.nan, evaluations=(), stopped=True, step=3)
    write_result(document(result, latency=None), tmp_path / "result.json")
    text = (tmp_path / "result.json").read_text()
    assert "NaN" not in text
    found = json.loads(text)
    assert found["dense"]["accuracy"] is None
    assert found["pruned"]["latency_ms"] is None
    assert found["pruned"]["speedup"] is None
    assert found["stopped"] is True
    assert found["steps"] == {"made": 3, "planned": 40}


def test_what_was_measured_during_the_run_is_there_step_by_step() -> None:
    latencies = (LatencyEvent(40, 0.51, 0.015, 1.59, 3.12),)
    during = document(a_result(latencies=latencies))["during"]
    assert during["evaluations"][1] == {"step": 40, "accuracy": 0.925, "loss": 0.21, "sparsity": 0.8}
    assert during["latencies"] == [
        {"step": 40, "latency_ms": 0.51, "spread_ms": 0.015, "dense_ms": 1.59, "speedup": 3.12}
    ]
