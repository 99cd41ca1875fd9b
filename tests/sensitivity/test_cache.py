"""A scan goes on where it was stopped, and what another network, other data or a broken file holds is never taken."""

from __future__ import annotations

import copy
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from explorer.sensitivity import SensitivityPoint, measure_loss
from explorer.sensitivity import cache as cache_module
from explorer.sensitivity import loss as loss_module
from explorer.sensitivity import scan as scan_module
from explorer.sensitivity.cache import CellCache

LEVELS = (0.5, 0.9)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measured_anew: None) -> Path:
    monkeypatch.setenv("EXPLORER_CACHE", str(tmp_path))
    monkeypatch.setattr(loss_module, "cache_folder", cache_module.cache_folder)
    return tmp_path / "sensitivity"


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.bn(self.conv(x))).mean((2, 3)))


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return Net().eval()


def data(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(80, 2, 6, 6, generator=generator), torch.randint(4, (80,), generator=generator)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float, bool]]:
    """The cells that were really measured."""
    cells: list[tuple[str, float, bool]] = []
    real = scan_module.Scan.measure

    def counting(self: object, layer: object, level: float, *, refreshed: bool) -> object:
        cells.append((layer, level, refreshed))
        return real(self, layer, level, refreshed=refreshed)

    monkeypatch.setattr(scan_module.Scan, "measure", counting)
    return cells


def scan(module: nn.Module, some: tuple[Tensor, Tensor | None], **options: object) -> list[SensitivityPoint]:
    return list(measure_loss(module, some, levels=LEVELS, n_images=64, resume=True, **options))


def latest(points: list[SensitivityPoint]) -> dict[tuple[str, float, str, bool], SensitivityPoint]:
    return {(p.layer, p.sparsity, p.kind, p.refreshed): p for p in points}


def test_a_second_scan_measures_nothing_and_gives_the_same(measured: list[tuple[str, float, bool]]) -> None:
    first = scan(net(), data())
    n = len(measured)
    assert n == 2 * len(LEVELS) * 2
    assert latest(scan(net(), data())) == latest(first)
    assert len(measured) == n
    plain = list(measure_loss(net(), data(), levels=LEVELS, n_images=64))
    assert latest(plain) == latest(first)


def test_a_stopped_scan_goes_on_where_it_was(measured: list[tuple[str, float, bool]]) -> None:
    stop = threading.Event()
    given = set()
    for point in measure_loss(net(), data(), levels=LEVELS, n_images=64, resume=True, stop=stop):
        if point.sparsity > 0:
            given.add((point.layer, point.sparsity, point.refreshed))
        if len(given) == 3:
            stop.set()
    assert len(given) == 3
    every = {
        (layer, level, refreshed)
        for layer in ("conv", "fc")
        for level in LEVELS
        for refreshed in (False, True)
    }
    measured.clear()
    whole = scan(net(), data())
    assert set(measured) == every - given
    assert latest(whole) == latest(list(measure_loss(net(), data(), levels=LEVELS, n_images=64)))


def test_another_process_takes_it_over(measured: list[tuple[str, float, bool]]) -> None:
    code = (
        "from tests.sensitivity.test_cache import *\n"
        "list(measure_loss(net(), data(), levels=LEVELS, n_images=64, resume=True))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    scan(net(), data())
    assert measured == []


def test_finer_levels_take_the_coarse_ones_over(measured: list[tuple[str, float, bool]]) -> None:
    scan(net(), data())
    measured.clear()
    list(measure_loss(net(), data(), levels=(*LEVELS, 0.7), n_images=64, resume=True))
    assert {level for _, level, _ in measured} == {0.7}


def changed_weight() -> tuple[nn.Module, tuple[Tensor, Tensor | None]]:
    module = net()
    with torch.no_grad():
        module.fc.weight[0, 0] += 1e-6
    return module, data()


def changed_statistics() -> tuple[nn.Module, tuple[Tensor, Tensor | None]]:
    module = net()
    module.bn.running_mean[0] += 1e-6
    return module, data()


def changed_code() -> tuple[nn.Module, tuple[Tensor, Tensor | None]]:
    class Other(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(functional.relu(x))

    Other.__name__, Other.__qualname__ = Net.__name__, Net.__qualname__
    module = Other()
    module.load_state_dict(net().state_dict())
    return module.eval(), data()


def changed_image() -> tuple[nn.Module, tuple[Tensor, Tensor | None]]:
    x, y = data()
    x[7] += 1e-3
    return net(), (x, y)


def changed_label() -> tuple[nn.Module, tuple[Tensor, Tensor | None]]:
    x, y = data()
    return net(), (x, (y + 1) % 4)


def no_labels() -> tuple[nn.Module, tuple[Tensor, Tensor | None]]:
    return net(), (data()[0], None)


@pytest.mark.parametrize(
    "other", [changed_weight, changed_statistics, changed_code, changed_image, changed_label, no_labels]
)
def test_whatever_the_numbers_depend_on_makes_another_scan(
    other, measured: list[tuple[str, float, bool]]
) -> None:
    scan(net(), data())
    measured.clear()
    scan(*other())
    assert len(measured) == 8


def test_a_criterion_of_ones_own_is_never_taken_from_disk(
    measured: list[tuple[str, float, bool]], folder: Path
) -> None:
    for _ in range(2):
        measured.clear()
        scan(net(), data(), criterion=functional.cross_entropy)
        assert len(measured) == 6, "and two that were begun in the first picture"
    assert not folder.exists()


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: text.replace('"kl"', '"speed"'),
        lambda text: text.replace('"value": ', '"value": "x", "other": '),
        lambda text: "\x00" * 100 + text.replace("[", "{"),
        lambda _: "",
    ],
)
def test_a_damaged_file_costs_time_and_nothing_else(
    damage, folder: Path, measured: list[tuple[str, float, bool]]
) -> None:
    right = latest(scan(net(), data()))
    [path] = folder.glob("*.jsonl")
    path.write_text(damage(path.read_text(encoding="utf-8")), encoding="utf-8")
    measured.clear()
    assert latest(scan(net(), data())) == right
    assert measured
    measured.clear()
    assert latest(scan(net(), data())) == right
    assert measured == []


def test_a_folder_that_cannot_be_written_costs_time_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "sensitivity").write_text("a file", encoding="utf-8")
    assert latest(scan(net(), data())) == latest(
        list(measure_loss(net(), data(), levels=LEVELS, n_images=64))
    )


def test_switched_off_nothing_is_kept(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setenv("EXPLORER_CACHE", "off")
    scan(net(), data())
    assert not folder.exists()


def test_the_folder_is_held_small(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scan(net(0), data())
    [old] = folder.glob("*.jsonl")
    monkeypatch.setattr(cache_module, "LIMIT_BYTES", old.stat().st_size)
    scan(net(1), data())
    assert not old.exists()
    assert len(list(folder.glob("*.jsonl"))) == 1


def test_the_module_is_not_touched() -> None:
    module = net()
    before = copy.deepcopy(module.state_dict())
    scan(module, data())
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())


def test_a_cell_is_kept_whole(folder: Path) -> None:
    cells = CellCache("key", folder)
    points = tuple(
        SensitivityPoint("a", 0.5, kind, 1.0, std_error=0.1, n_removed=2) for kind in ("kl", "loss")
    )
    cells.put(points)
    assert CellCache("key", folder).get("a", 0.5, refreshed=False) == points
    assert CellCache("other", folder).get("a", 0.5, refreshed=False) is None
