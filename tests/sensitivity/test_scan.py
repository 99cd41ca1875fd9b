"""Shortened passes: what is kept for them, what could fool them, and what happens when memory is short."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from explorer.models import architectures
from explorer.sensitivity import measure_loss
from explorer.sensitivity import scan as scan_module
from explorer.sensitivity.material import take_material
from explorer.sensitivity.scan import Scan
from tests.sensitivity.networks import images, small


def divergences(net: nn.Module, data: tuple[Tensor, Tensor | None], **options: object) -> dict[tuple, float]:
    points = measure_loss(net, data, levels=(0.5, 0.9), n_images=len(data[0]), **options)
    return {(p.layer, p.sparsity, p.refreshed): p.value for p in points if p.kind == "kl"}


def prepared(net: nn.Module, data: tuple[Tensor, Tensor | None]) -> Scan:
    scan = Scan(take_material(net, data, len(data[0])))
    scan.prepare()
    return scan


def test_a_module_that_remembers_other_images_is_found_out() -> None:
    class Remembers(nn.Module):
        """Adds what another module left in an attribute: a shortened pass would see that of the last batch."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 5)
            self.keeper = nn.Linear(6, 6)
            self.keeper.register_forward_hook(self.keep)

        def keep(self, _module: nn.Module, _args: object, output: Tensor) -> None:
            self.kept = output

        def forward(self, x: Tensor) -> Tensor:
            self.keeper(x)
            return self.c(torch.relu(self.b(torch.relu(self.a(x)))) + self.kept)

    torch.manual_seed(0)
    net, x = Remembers().eval(), torch.randn(300, 6)
    found = divergences(net, (x, None))
    for name in ("a", "b", "c"):
        other = Remembers().eval()
        other.load_state_dict(net.state_dict())
        with torch.no_grad():
            flat = other.get_submodule(name).weight.view(-1)
            flat[flat.abs().argsort(stable=True)[: -(-9 * len(flat) // 10)]] = 0
            p, q = net(x).log_softmax(1), other(x).log_softmax(1)
        assert found[name, 0.9, False] == pytest.approx(
            float(functional.kl_div(q, p, reduction="batchmean", log_target=True)), abs=1e-5
        )


def test_all_layers_of_a_residual_network_run_from_where_they_are() -> None:
    net = architectures.resnet18().eval()
    scan = prepared(net, (torch.randn(16, 3, 64, 64), None))
    starts = [scan._start[name] for name in scan._units]
    assert starts == sorted(starts)
    assert sum(start == 0 for start in starts) <= 1


def test_what_nothing_reads_takes_no_memory() -> None:
    torch.manual_seed(0)
    wide = [part for _ in range(6) for part in (nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())]
    net = nn.Sequential(*wide, nn.Flatten(), nn.Linear(512, 4)).eval()
    scan = prepared(net, (torch.randn(16, 8, 8, 8), None))
    scan.record(range(scan.n_batches))
    one = 16 * 8 * 8 * 8 * 4
    # Of each block but the last the output, and the input of the last layer, which is a view of one.
    assert scan._replay.size(0) == 6 * one


@pytest.mark.parametrize("criterion", [None, nn.CrossEntropyLoss()])
def test_with_little_memory_levels_are_measured_group_by_group(
    monkeypatch: pytest.MonkeyPatch, criterion: nn.Module | None
) -> None:
    monkeypatch.setattr(scan_module, "BATCH_SIZE", 10)
    net, data = small(), images(80)
    scan = prepared(net, data)
    scan.record(range(1))
    limit = 3 * scan._replay.size(0)
    in_full = divergences(net, data, criterion=criterion)
    passes = 0
    first = scan_module.Scan.sample

    def counted(*args: object, **options: object) -> object:
        nonlocal passes
        passes += 1
        return first(*args, **options)

    monkeypatch.setattr(scan_module.Scan, "sample", counted)
    grouped = divergences(net, data, criterion=criterion, memory_limit=limit)
    assert passes == 3 * (1 + 3) + 3 * 3, "the first picture of each layer, the groups of two levels"
    assert grouped.keys() == in_full.keys()
    assert all(grouped[key] == pytest.approx(in_full[key], abs=1e-6) for key in in_full)


def test_groups_tell_more_and_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan_module, "BATCH_SIZE", 10)
    points = measure_loss(
        small(), images(80), levels=(0.9,), n_images=80, memory_limit=1, refresh_batchnorm=False
    )
    errors = [p.std_error for p in points if (p.layer, p.sparsity, p.kind) == ("middle", 0.9, "kl")]
    assert len(errors) == 1 + 7 + 1, "the first picture, each group, all"
    assert errors[-1] == errors[-2]
    assert errors[-1] < errors[1]


def test_batches_are_small_where_outputs_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    net, data = small(), images(80)
    assert prepared(net, data).n_batches == 1
    reference = divergences(net, data)
    monkeypatch.setattr(scan_module, "OUTPUT_LIMIT", 8 * 6 * 6 * 6 * 4)
    scan = prepared(net, data)
    assert scan.n_batches == 10
    assert divergences(net, data) == pytest.approx(reference, abs=1e-6)
