"""Times from disk: measured once, in units of now, and never those of another network or machine."""

from __future__ import annotations

import copy
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

from explorer.sensitivity import LATENCY_PASSES, SensitivityPoint, measure_latency
from explorer.sensitivity import latency as latency_module
from explorer.sensitivity.latency import _Clock, _Rounds
from explorer.sensitivity.times import TimesFile

LEVELS = (0.5, 0.9)
X = torch.zeros(1, 3, 12, 12)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measured_anew: None) -> Path:
    monkeypatch.setattr(latency_module, "cache_folder", lambda: tmp_path)
    return tmp_path


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each pass of a level that was really timed."""
    passes: list[int] = []
    real = _Rounds.add

    def counted(self: _Rounds, *args: object) -> None:
        passes.append(1)
        real(self, *args)

    monkeypatch.setattr(_Rounds, "add", counted)
    return passes


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(1600, 10)).eval()


def measure(
    module: nn.Module, levels: tuple[float, ...] = LEVELS, **options: object
) -> list[SensitivityPoint]:
    return list(measure_latency(module, X, levels=levels, threads=1, repeats=12, resume=True, **options))


def latest(points: list[SensitivityPoint]) -> dict[tuple[str, float], float]:
    return {(p.layer, p.sparsity): p.value for p in points}


def test_a_second_measurement_times_the_dense_network_alone(timed: list[int], same_machine: None) -> None:
    first = measure(net())
    assert len(timed) == 3 * LATENCY_PASSES
    second = measure(net())
    assert len(timed) == 3 * LATENCY_PASSES
    assert [(p.layer, p.sparsity, p.n_removed) for p in second] == [
        (p.layer, p.sparsity, p.n_removed) for p in first
    ]
    ratios = {
        second / first for first, second in zip(latest(first).values(), latest(second).values(), strict=True)
    }
    assert max(ratios) / min(ratios) == pytest.approx(1.0), "one factor for all"


def test_times_come_in_units_of_now(timed: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    first = measure(net())
    unit = latest(first)
    # Half as fast as when the times were measured, as far as the dense network tells.
    stored = next(iter(latency_module.cache_folder().glob("*.times.json"))).read_text()
    dense_ms = float(stored.split('"dense_ms": ')[1].split(",")[0])
    monkeypatch.setattr(
        _Clock, "now", lambda self, _: setattr(self, "first_ms", 1.9 * dense_ms) or 1.9 * dense_ms
    )
    slower = latest(measure(net()))
    assert slower == {key: pytest.approx(1.9 * ms) for key, ms in unit.items()}
    n = len(timed)
    monkeypatch.setattr(
        _Clock, "now", lambda self, _: setattr(self, "first_ms", 9 * dense_ms) or 9 * dense_ms
    )
    measure(net())
    assert len(timed) == 2 * n, "that is another machine"


def test_a_stopped_measurement_goes_on_where_it_was(timed: list[int], same_machine: None) -> None:
    stop = threading.Event()
    for point in measure_latency(net(), X, levels=LEVELS, threads=1, repeats=12, resume=True, stop=stop):
        if point.sparsity == 0.9:
            stop.set()
    assert len(timed) == 2
    timed.clear()
    assert {level for _, level in latest(measure(net()))} == {0.0, *LEVELS}
    assert len(timed) == 3 * LATENCY_PASSES - 2


def test_more_levels_take_over_what_is_there(timed: list[int], same_machine: None) -> None:
    measure(net())
    timed.clear()
    measure(net(), (0.5, 0.7, 0.9))
    assert len(timed) == LATENCY_PASSES


def test_other_networks_and_settings_are_measured_anew(timed: list[int]) -> None:
    measure(net())
    changed = copy.deepcopy(net())
    with torch.no_grad():
        changed[0].weight[0, 0, 0, 0] += 1
    timed.clear()
    measure(changed)
    assert len(timed) == 3 * LATENCY_PASSES
    list(measure_latency(net(), torch.zeros(2, 3, 12, 12), levels=LEVELS, threads=1, repeats=12, resume=True))
    list(measure_latency(net(), X, levels=LEVELS, threads=2, repeats=12, resume=True))
    list(measure_latency(net(), X, levels=LEVELS, threads=1, repeats=12))
    assert len(timed) == 4 * 3 * LATENCY_PASSES


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: text.replace('"format": 1', '"format": 99'),
        lambda text: text.replace('"dense_ms": ', '"dense_ms": -'),
        lambda text: text.replace('" whole": [', '" whole": [NaN, '),
        lambda text: text.replace('" whole": [', '" whole": [0.1, '),
        lambda _: "[]",
    ],
)
def test_a_damaged_file_costs_time_and_nothing_else(damage, timed: list[int], folder: Path) -> None:
    measure(net())
    [path] = folder.glob("*.times.json")
    path.write_text(damage(path.read_text()))
    timed.clear()
    assert {level for _, level in latest(measure(net()))} == {0.0, *LEVELS}
    assert len(timed) == 3 * LATENCY_PASSES


def test_what_is_put_is_scaled_to_one_moment(tmp_path: Path) -> None:
    file = TimesFile("k", tmp_path)
    file.put({0.5: {"a": [1.0, 2.0]}}, dense_ms=10.0)
    file.put({0.9: {"a": [3.0, 3.0]}}, dense_ms=15.0)
    assert TimesFile("k", tmp_path).rounds(15.0) == {0.5: {"a": [1.5, 3.0]}, 0.9: {"a": [3.0, 3.0]}}


def test_without_a_folder_nothing_is_kept() -> None:
    file = TimesFile("k", None)
    file.put({0.5: {"a": [1.0]}}, dense_ms=10.0)
    assert file.rounds(10.0) == {}
