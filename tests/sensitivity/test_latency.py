"""Layer times measured on the real engine: complete, of the right size, falling with sparsity, adding up."""

from __future__ import annotations

import threading
from statistics import median

import pytest
import torch
from torch import Tensor, nn

from explorer.errors import DistributionError, EngineError, ModelError
from explorer.inference import Benchmark, LayerTiming
from explorer.sensitivity import LATENCY_PASSES, SensitivityPoint, SensitivityTable, measure_latency
from explorer.sensitivity.latency import _Clock, _Rounds


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.big = nn.Conv2d(32, 64, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(64)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.big(torch.relu(self.stem(x)))))
        return self.fc(self.pool(x).flatten(1))


@pytest.fixture(scope="module")
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture(scope="module")
def points(net: Net) -> list[SensitivityPoint]:
    return list(measure_latency(net, torch.randn(1, 3, 24, 24), levels=(0.5, 0.9, 0.98), threads=1))


def test_every_layer_and_the_whole_are_timed_at_every_level(points: list[SensitivityPoint]) -> None:
    assert [p.sparsity for p in points if p.layer == ""] == [0.0, 0.9, 0.5, 0.98] * LATENCY_PASSES
    assert {(p.layer, p.sparsity) for p in points} == {
        (layer, s) for layer in ("", "stem", "big", "fc") for s in (0.0, 0.5, 0.9, 0.98)
    }
    assert all(p.kind == "latency_ms" and p.value > 0 for p in points)
    assert all(p.std_error is not None for p in points if p.layer == "")


def test_arithmetic_dominates_and_sparsity_saves_it(points: list[SensitivityPoint]) -> None:
    table = SensitivityTable.from_points(points)
    dense = {layer: table.point(layer, 0.0, "latency_ms").value for layer in table.layers}
    assert max(dense, key=dense.get) == "big"  # 21 times the multiply-adds of the next
    # Generous bounds: other programs may run beside the test.
    assert table.point("big", 0.98, "latency_ms").value < 0.5 * dense["big"]


def test_layers_and_fixed_time_add_up_to_the_network(points: list[SensitivityPoint]) -> None:
    table = SensitivityTable.from_points(points)
    whole = table.baseline("latency_ms")
    layers = sum(table.point(layer, 0.0, "latency_ms").value for layer in table.layers)
    assert table.fixed_latency_ms is not None
    assert layers < 1.5 * whole
    assert layers + table.fixed_latency_ms == pytest.approx(whole, rel=0.5)


def test_removed_weights_are_counted(points: list[SensitivityPoint]) -> None:
    removed = {p.sparsity: p.n_removed for p in points if p.layer == "big"}
    assert removed == {0.0: 0, 0.9: 16589, 0.5: 9216, 0.98: 18064}  # of 18,432


def test_the_module_is_not_touched(net: Net, points: list[SensitivityPoint]) -> None:
    before = {k: v.clone() for k, v in net.state_dict().items()}
    net.train()
    try:
        generator = measure_latency(net, torch.randn(1, 3, 24, 24), levels=(0.9,), layers=["big"], repeats=2)
        assert [next(generator).layer, next(generator).layer, next(generator).layer] == ["big", "", "big"]
        generator.close()
        assert all(module.training for module in net.modules())
    finally:
        net.eval()
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_a_network_that_is_its_one_layer_is_its_own_latency() -> None:
    points = list(measure_latency(nn.Linear(256, 256).eval(), torch.randn(1, 256), levels=(0.9,), repeats=5))
    assert [(p.layer, p.sparsity) for p in points] == [("", 0.0), ("", 0.9)] * LATENCY_PASSES


def test_stop_ends_before_the_next_level(net: Net) -> None:
    stop = threading.Event()
    seen = []
    for point in measure_latency(net, torch.randn(1, 3, 24, 24), levels=(0.5, 0.9), repeats=2, stop=stop):
        seen.append(point.sparsity)
        stop.set()
    assert set(seen) == {0.0}


def test_bad_requests_are_refused_before_any_work(net: Net) -> None:
    x = torch.randn(1, 3, 24, 24)
    with pytest.raises(ModelError, match="Did you mean 'big'"):
        measure_latency(net, x, layers=["bigg"])
    with pytest.raises(DistributionError, match=r"\[0, 1\)"):
        measure_latency(net, x, levels=(2.0,))
    with pytest.raises(EngineError, match="repeats=0"):
        measure_latency(net, x, repeats=0)


class Machine:
    """How many times slower than at its best it is at the moment."""

    slowness = 1.0


class TimedProgram:
    """Takes `ms` on a machine at full speed, half of it in its one layer."""

    def __init__(self, ms: float) -> None:
        self.ms = ms

    def benchmark(self, x: Tensor, repeats: int, *, warn: bool = True) -> Benchmark:
        return Benchmark(self.ms * Machine.slowness, 0.1 * Machine.slowness, 0.0, repeats, 1, 1, "test")

    def profile(self, x: Tensor, repeats: int) -> tuple[LayerTiming, ...]:
        return (LayerTiming("layer", "conv", 0.5 * self.ms * Machine.slowness, "sparse", 0.0, 1, True),)


def test_a_level_that_meets_a_slow_phase_of_the_machine_is_not_taken_for_a_slow_level(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = torch.zeros(1)
    clock = _Clock(TimedProgram(8.0), x)
    assert clock.factor(10) == 1.0
    monkeypatch.setattr(Machine, "slowness", 3.0)
    level = _Rounds()
    level.add(TimedProgram(2.0), x, 10, clock)
    assert level.layers_ms() == {"layer": pytest.approx(1.0)}
    assert level.whole_ms == pytest.approx([2.0] * len(level.whole_ms))
    assert level.spread_ms == pytest.approx([0.1] * len(level.spread_ms))


def test_one_bad_pass_of_three_does_not_move_a_level() -> None:
    x = torch.zeros(1)
    clock = _Clock(TimedProgram(8.0), x)
    level = _Rounds()
    # Slow as other work in the same caches makes it: this program alone, not the dense one that is the clock.
    for ms in (2.0, 3.0, 2.0):
        level.add(TimedProgram(ms), x, 10, clock)
    assert len(level.whole_ms) % LATENCY_PASSES == 0
    assert median(level.whole_ms) == pytest.approx(2.0)
    assert level.layers_ms() == {"layer": pytest.approx(1.0)}
