"""Engines in processes of their own: what they are given, what they answer, and how they fail."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

import pytest
import torch
from torch import nn

from explorer.bench import engines, foreign_worker
from explorer.bench.foreign import FOREIGN, ForeignEngine, export, installed_version, parse
from explorer.bench.usage import TOO_MANY, Usage
from explorer.errors import EngineError
from explorer.inference.timing import compare_latency
from explorer.models import LoadedModel, load_model
from tests.bench.synthetic import Clock

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
            exported.with_name("onnxruntime.npy").unlink()  # its output is not that of an earlier call
            torch.testing.assert_close(engine(), NET(x), rtol=1e-4, atol=1e-5)
        assert engine.version
        assert 0 < engine.seconds(1) < engine.seconds(2000)
        start = time.perf_counter()
        assert engine.seconds(1, warm_s=0.2) < 0.1
        assert time.perf_counter() - start > 0.2
        assert engine.usage.cpus is not None
        engine.seconds(2000, warm_s=0.001)
        assert 0 < engine.usage.cpus < 1 + TOO_MANY
        timed = compare_latency({"here": lambda: NET(x), "there": engine}, seconds=0.1, batch_size=2)
    assert 0 < timed["there"].latency_ms < 1000
    with pytest.raises(EngineError, match="onnxruntime ended"):
        engine.seconds(1)


def test_the_cpu_time_of_a_process_is_that_of_the_calls_that_are_timed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock(cpus=2.5)
    monkeypatch.setattr(foreign_worker, "time", clock)
    seconds, cpu_s = foreign_worker.timed(clock.work, 4, 0.02)
    assert clock.calls > 4 + 1
    assert (seconds, cpu_s) == pytest.approx((0.004, 0.01))


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


@pytest.mark.usefixtures("short_turns", "without_onnxruntime")
def test_a_speedup_refers_to_dense_float32_engines_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """A foreign engine that uses zeros is timed and shown, and is not what others are measured against."""

    class Instant:
        isa = "foreign"
        version = "1.0"
        usage = Usage()

        def __init__(self, name: str, *_: object) -> None:
            self.name = name

        def __enter__(self) -> Self:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def __call__(self) -> torch.Tensor:
            return outputs[self.name]

        def seconds(self, calls: int, _warm_s: float) -> float:
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

    def compared() -> engines.Comparison:
        return engines.time_engines(
            model, model.example_input, sparsity=0.5, seconds=0.05, foreign=foreign, torch_compile=False
        )

    timings = {t.contestant: t for t in compared().timings}
    own = [t for name, t in timings.items() if name not in outputs]
    assert max(timings[name].speedup for name in timings.keys() - {*outputs} - engines.NOT_DENSE) == 1.0
    assert timings["deepsparse"].speedup > max(t.speedup for t in own)
    outputs["deepsparse"] = right * 1.1
    found = compared()
    assert "deepsparse" not in {t.contestant for t in found.timings}
    assert any(one.failed and "deepsparse gives another output" in one.reason for one in found.absences)


CONSTANT = torch.arange(1.0, 6.0)


@pytest.fixture
def constant() -> LoadedModel:
    """A network whose output is known to whoever pretends to be an engine."""
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 5)).eval()
    with torch.no_grad():
        net[-1].weight.zero_()
        net[-1].bias.copy_(CONSTANT)
    return load_model(net, torch.randn(2, 8))


BEHAVIOURS = {
    "good": "answer",
    "wrong": "right *= 0; answer",
    "wrong later": "answer if request['do'] != 'run' else (right.fill(0), answer)[1]",
    "dies": "print('out of luck', file=sys.stderr, flush=True); os._exit(3)",
    "dies later": "answer if request['do'] == 'load' or (turns := turns + 1) < 3 else os._exit(3)",
    "hangs": "time.sleep(600)",
    "greedy": "answer | {'cpu_s': 2.5 * answer['seconds']}",
    "raises": "{'error': 'RuntimeError: unknown operator'}",
}


@pytest.fixture
def pretender(tmp_path: Path) -> Callable[[str], str]:
    """Makes a "Python" that behaves in one of these ways whatever it is told to run."""

    def make(behaviour: str) -> str:
        *first, last = BEHAVIOURS[behaviour].split("; ")
        script = tmp_path / f"{behaviour}.py"
        script.write_text(
            f"""
import json, os, sys, time
import numpy as np
turns = 0
right = np.tile(np.arange(1.0, 6.0, dtype=np.float32), (2, 1))
for line in sys.stdin:
    request = json.loads(line)
    seconds = 1e-4 * request.get("calls", 0)
    answer = {{"version": "1.0", "seconds": seconds, "cpu_s": seconds}}
    if request["do"] == "load":
        {"; ".join(first) or "pass"}
    if request["do"] == "output":
        np.save(request["output"], right)
    print(json.dumps({last}), flush=True)
"""
        )
        python = tmp_path / behaviour
        python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{script}"\n')
        python.chmod(0o755)
        return str(python)

    return make


class Patient(ForeignEngine):
    """On a busy machine one that works may be silent for longer than one that hangs is waited for."""

    def __init__(self, name: str, python: str, model: Path, threads: int, timeout_s: float) -> None:
        super().__init__(name, python, model, threads, timeout_s if name == "deepsparse" else 60.0)


@pytest.mark.skipif(sys.platform == "win32", reason="the pretended Python is a shell script")
@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [
        ("wrong", "deepsparse gives another output than torch: relative difference 1,"),
        (
            "wrong later",
            "after its turns: deepsparse gives another output than torch: relative difference 1,",
        ),
        ("dies", "ended, with status 3: out of luck."),
        ("dies later", "ended, with status 3."),
        ("hangs", "was silent for 1 s, and was ended."),
        ("raises", "RuntimeError: unknown operator"),
    ],
)
@pytest.mark.usefixtures("short_turns", "without_onnxruntime")
def test_an_engine_that_fails_is_named_and_the_others_are_timed(
    behaviour: str,
    reason: str,
    constant: LoadedModel,
    pretender: Callable[[str], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engines, "ForeignEngine", Patient)
    foreign = [("deepsparse", pretender(behaviour)), ("mnn", pretender("good"))]
    found = engines.time_engines(
        constant,
        constant.example_input,
        sparsity=0.5,
        seconds=0.05,
        foreign=foreign,
        torch_compile=False,
        timeout_s=1.0 if behaviour == "hangs" else 60.0,
    )
    failed = [one for one in found.absences if one.failed]
    assert [one.contestant for one in failed] == ["deepsparse"]
    assert reason in failed[0].reason
    timed = {one.contestant for one in found.timings}
    assert {"torch eager", "mnn", engines.SPARSE} <= timed
    assert "deepsparse" not in timed
    assert found.versions["mnn"] == "1.0"


@pytest.mark.skipif(sys.platform == "win32", reason="the pretended Python is a shell script")
@pytest.mark.usefixtures("without_onnxruntime")
def test_cpu_time_is_that_which_an_engine_s_process_tells(
    constant: LoadedModel, pretender: Callable[[str], str]
) -> None:
    found = engines.time_engines(
        constant,
        constant.example_input,
        sparsity=0.5,
        seconds=0.05,
        foreign=[("deepsparse", pretender("greedy")), ("mnn", pretender("good"))],
        torch_compile=False,
    )
    cpus = {one.contestant: one.cpus for one in found.timings}
    assert cpus["deepsparse"] == pytest.approx(2.5)
    assert cpus["mnn"] == pytest.approx(1.0)
    for name in cpus.keys() - {"deepsparse", "mnn"}:  # on one thread of this process
        assert 0 < cpus[name] < 1 + TOO_MANY


def test_the_version_of_an_engine_is_asked_of_its_own_python() -> None:
    import onnxruntime

    assert installed_version("onnxruntime", sys.executable) == onnxruntime.__version__
    with pytest.raises(
        EngineError, match=r"No module named 'deepsparse'.* Name the Python of an environment"
    ):
        installed_version("deepsparse", sys.executable)


def test_an_interpreter_that_cannot_be_started_is_refused(tmp_path: Path) -> None:
    no_program = tmp_path / "python"
    no_program.write_text("not a program")
    with pytest.raises(EngineError, match="which is to run mnn, cannot be started"):
        installed_version("mnn", str(no_program))


@pytest.mark.skipif(
    "EXPLORER_BENCH_MNN" not in os.environ,
    reason="EXPLORER_BENCH_MNN does not name a Python in which MNN is installed",
)
@pytest.mark.parametrize("sparsity", [0.0, 0.9])
def test_mnn_computes_the_pruned_network_and_keeps_few_of_its_weights(
    sparsity: float, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(8, 64, 1), nn.ReLU(), nn.Conv2d(64, 128, 3), nn.ReLU(), nn.Conv2d(128, 8, 1), nn.Flatten()
    )
    model = load_model(net, torch.randn(2, 8, 6, 6))
    pruned = engines.pruned_copy(model, sparsity)
    path = export(pruned, model.example_input, tmp_path)
    with ForeignEngine("mnn", os.environ["EXPLORER_BENCH_MNN"], path, 1) as engine:
        with torch.no_grad():
            torch.testing.assert_close(engine(), pruned(model.example_input), rtol=1e-3, atol=1e-4)
        assert engine.seconds(3) > 0.0
    # It computes sparsely what it has stored sparsely: a tenth of the values, and their places.
    size = path.with_name("model.onnx.mnn").stat().st_size / path.stat().st_size
    assert (size < 0.3) is (sparsity > 0.6)
