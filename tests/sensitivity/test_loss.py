"""The scan against a naive one that prunes a fresh copy and runs the whole network for every cell."""

from __future__ import annotations

import copy
import math
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from explorer.errors import DataError, DistributionError, ModelError
from explorer.sensitivity import SensitivityPoint, SensitivityTable, measure_joint, measure_loss
from explorer.sensitivity import scan as scan_module
from tests.sensitivity.networks import with_a_dead_layer

LEVELS = (0.5, 0.9, 0.98)


class Block(nn.Module):
    """Everything that could fool a shortened pass: in-place activations, an in-place sum, an unassigned in-place call."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, groups=2)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x))
        self.relu(y)
        y = self.bn2(self.conv2(y))
        y += x
        return self.relu(y)


class ResidualNet(nn.Module):
    def __init__(self, width: int = 8, classes: int = 5) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, width, 3, padding=1)
        self.bn = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.blocks = nn.Sequential(Block(width), Block(width))
        self.side = nn.Conv2d(width, width, 1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn(self.stem(x)))
        x = torch.cat([self.blocks(x), functional.relu_(self.side(x))], dim=2)
        return self.fc(self.pool(x).flatten(1))


def a_network(seed: int = 0, width: int = 8) -> ResidualNet:
    torch.manual_seed(seed)
    net = ResidualNet(width).eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.3, 2)
    with torch.no_grad():
        net.fc.weight.mul_(8)
    return net


def some_data(n: int = 60, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 2, 8, 8, generator=generator), torch.randint(0, 5, (n,), generator=generator)


def scan(net: nn.Module, data, **options) -> dict[tuple[str, float, str, bool], SensitivityPoint]:
    points = list(measure_loss(net, data, levels=LEVELS, **options))
    cells = {(p.layer, p.sparsity, p.kind, p.refreshed): p for p in points}
    assert len(cells) == len(points), "no cell is measured twice"
    return cells


def pruned_copy(net: nn.Module, layer: str, level: float) -> nn.Module:
    other = copy.deepcopy(net)
    weight = other.get_submodule(layer).weight
    flat = weight.detach().abs().reshape(-1).numpy()
    zeros = min(flat.size - 1, int(np.ceil(level * flat.size - 1e-9)))
    with torch.no_grad():
        weight.view(-1)[torch.from_numpy(np.argsort(flat, kind="stable")[:zeros].copy())] = 0
    return other


def naive(dense: nn.Module, pruned: nn.Module, x: Tensor, y: Tensor) -> dict[str, float]:
    with torch.no_grad():
        p, q = dense(x).double().softmax(1), pruned(x).double()
    return {
        "kl": float(functional.kl_div(q.log_softmax(1), p, reduction="batchmean")),
        "loss": float(functional.cross_entropy(q, y)),
        "accuracy": float((q.argmax(1) == y).double().mean()),
    }


@pytest.mark.parametrize("memory_limit", [1 << 30, 0, 60_000])
def test_every_cell_equals_the_naive_scan(memory_limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan_module, "MEMORY_LIMIT", memory_limit)
    monkeypatch.setattr(scan_module, "BATCH_SIZE", 20)
    net, (x, y) = a_network(), some_data()
    points = measure_loss(net, (x, y), levels=LEVELS, n_images=60, refresh_batchnorm=False)
    cells = {(p.layer, p.sparsity, p.kind, p.refreshed): p for p in points}
    names = ["stem", "blocks.0.conv1", "blocks.0.conv2", "blocks.1.conv1", "blocks.1.conv2", "side", "fc"]
    assert list(dict.fromkeys(key[0] for key in cells)) == names
    for name in names:
        for level in (0.0, *LEVELS):
            expected = naive(net, pruned_copy(net, name, level), x, y)
            for kind, value in expected.items():
                assert cells[name, level, kind, False].value == pytest.approx(value, abs=1e-5), (
                    name,
                    level,
                    kind,
                )
    assert max(p.value for p in cells.values() if p.kind == "kl") > 0.01, "the test would be blind"


def test_shortened_passes_really_skip_work(monkeypatch: pytest.MonkeyPatch) -> None:
    class Counted(nn.Conv2d):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            Counted.calls += 1
            return super().forward(x)

    torch.manual_seed(0)
    net = nn.Sequential(
        Counted(2, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 5)
    )
    list(measure_loss(net, some_data(), levels=(0.5,), layers=["2", "4"]))
    few = Counted.calls
    Counted.calls = 0
    list(measure_loss(net, some_data(), levels=(0.5, 0.6, 0.7, 0.8, 0.9), layers=["2", "4"]))
    assert Counted.calls == few, "more levels of later layers never run the first layer again"


def test_refreshed_cells_equal_a_batchnorm_reset_on_the_calibration_images(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    net, (x, y) = a_network(), some_data(60)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    measured, calibration = order[:30], order[30:]
    cells = scan(net, (x, y), n_images=30)
    after = {
        "stem": ["bn", "blocks.0.bn1", "blocks.0.bn2", "blocks.1.bn1", "blocks.1.bn2"],
        "blocks.0.conv2": ["blocks.0.bn2", "blocks.1.bn1", "blocks.1.bn2"],
        "blocks.1.conv1": ["blocks.1.bn1", "blocks.1.bn2"],
        "fc": [],
    }
    for name, norms in after.items():
        for level in LEVELS:
            # The memory format of the scan: behind a channel that died, a refresh divides rounding errors by nearly nothing.
            other = pruned_copy(net, name, level).to(memory_format=torch.channels_last)
            for norm in norms:
                module = other.get_submodule(norm)
                module.momentum = 1.0  # of one batch: its own statistics
                module.train()
            with torch.no_grad():
                other(x[calibration])
            other.eval()
            for kind, value in naive(net, other, x[measured], y[measured]).items():
                assert cells[name, level, kind, True].value == pytest.approx(value, abs=1e-5), (
                    name,
                    level,
                    kind,
                )
    assert cells["stem", 0.9, "kl", True].value != cells["stem", 0.9, "kl", False].value


def test_refreshing_repairs_a_mere_shift_of_scale() -> None:
    # Ten equal input channels with nearly equal weights: pruning 90 % leaves the signal as it was, at a tenth of its scale.
    net = nn.Sequential(
        nn.Conv2d(10, 4, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(256, 5)
    )
    torch.manual_seed(0)
    x, y = torch.randn(400, 1, 8, 8).expand(-1, 10, -1, -1).contiguous(), torch.randint(0, 5, (400,))
    with torch.no_grad():
        net[0].weight.copy_(
            torch.tensor([1.0, -1, 1, -1])[:, None, None, None] * torch.linspace(1, 1.1, 10)[:, None, None]
        )
        net[4].weight.mul_(10)
        net[1].momentum = 1.0
        net.train()(x)
        net.eval()
    cells = scan(net, (x, y), n_images=100)
    assert cells["0", 0.9, "kl", False].value > 0.1
    assert cells["0", 0.9, "kl", True].value < 0.01 * cells["0", 0.9, "kl", False].value


def test_refreshed_curves_start_from_the_dense_network_on_their_own_images(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By hand: the first two fifths of the drawn images, statistics of 125 others in one batch."""
    monkeypatch.setattr(scan_module, "BATCH_SIZE", 20)
    monkeypatch.setattr(scan_module, "_MIN_REFRESHED", 10)
    net, (x, y) = a_network(), some_data(260)
    order = torch.randperm(260, generator=torch.Generator().manual_seed(0))
    used, spare = order[:40], order[100:225]
    level = LEVELS[1]
    points = {
        (p.layer, p.sparsity, p.kind): p
        for p in measure_loss(net, (x, y), levels=(level,), n_images=100)
        if p.refreshed
    }

    def loss(network: nn.Module) -> float:
        with torch.no_grad():
            return float(functional.cross_entropy(network(x[used]), y[used]))

    assert points["side", 0.0, "loss"].value == pytest.approx(loss(net), rel=1e-5)
    pruned = copy.deepcopy(net)
    weight = pruned.blocks[0].conv2.weight
    with torch.no_grad():
        n_removed = math.ceil(level * weight.numel())
        weight.view(-1)[weight.abs().flatten().argsort()[:n_removed]] = 0.0
    for name, module in pruned.named_modules():
        # Those that run before the pruned layer see what they saw in training.
        if isinstance(module, nn.BatchNorm2d) and name not in ("bn", "blocks.0.bn1"):
            module.train()
            module.momentum = 1.0
    with torch.no_grad():
        pruned(x[spare])
    expected = loss(pruned.eval())
    assert expected != pytest.approx(points["side", 0.0, "loss"].value, rel=0.01)
    assert points["blocks.0.conv2", level, "loss"].value == pytest.approx(expected, rel=1e-4)


def test_module_is_left_as_found_bit_for_bit() -> None:
    net = a_network().train()
    net.blocks[0].bn1.eval()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    modes = [m.training for m in net.modules()]
    hooks = [
        (len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in m.__dict__) for m in net.modules()
    ]
    grads = [p.requires_grad for p in net.parameters()]
    generator = measure_loss(net, some_data(), levels=LEVELS)
    for count, _ in enumerate(generator):
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
        if count == 40:
            generator.close()
    assert count == 40

    def broken(_outputs: Tensor, _labels: Tensor) -> Tensor:
        broken.calls += 1
        if broken.calls > 3:
            raise ZeroDivisionError
        return torch.tensor(1.0)

    broken.calls = 0
    with pytest.raises(ZeroDivisionError):
        list(measure_loss(net, some_data(), levels=LEVELS, criterion=broken))
    assert torch.is_grad_enabled()
    after = net.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert [m.training for m in net.modules()] == modes
    assert [
        (len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in m.__dict__) for m in net.modules()
    ] == hooks
    assert [p.requires_grad for p in net.parameters()] == grads


def test_cells_do_not_depend_on_what_was_measured_before() -> None:
    net, data = a_network(), some_data()
    together = scan(net, data)
    for name in ("blocks.0.conv1", "fc"):
        alone = {
            (p.layer, p.sparsity, p.kind, p.refreshed): p
            for p in measure_loss(net, data, layers=[name], levels=(0.9,))
        }
        for key, point in alone.items():
            assert together[key].value == pytest.approx(point.value, abs=1e-12)


def test_points_come_coarse_first_and_refreshed_last() -> None:
    points = [p for p in measure_loss(a_network(), some_data(), levels=LEVELS) if p.kind == "kl"]
    as_is = [p.sparsity for p in points if not p.refreshed]
    assert as_is == [0.0] * 7 + [0.9] * 7 + [0.5] * 7 + [0.98] * 7
    assert [p.refreshed for p in points] == sorted(p.refreshed for p in points)
    assert sum(p.refreshed for p in points) == 28


def test_the_first_picture_comes_from_one_batch_and_is_then_refined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan_module, "BATCH_SIZE", 20)
    net, (x, y) = a_network(), some_data(60)
    points = [
        p
        for p in measure_loss(net, (x, y), levels=LEVELS, n_images=60, refresh_batchnorm=False)
        if p.kind == "kl"
    ]
    assert [p.sparsity for p in points[:35]] == ([0.0] * 7 + [0.9] * 7) * 2 + [0.5] * 7
    first = torch.randperm(60, generator=torch.Generator().manual_seed(0))[:20]
    for early, late in zip(points[7:14], points[21:28], strict=True):
        pruned = pruned_copy(net, early.layer, 0.9)
        assert early.layer == late.layer
        assert early.value == pytest.approx(naive(net, pruned, x[first], y[first])["kl"], abs=1e-5)
        assert late.value == pytest.approx(naive(net, pruned, x, y)["kl"], abs=1e-5)
    assert sum(p.std_error for p in points[7:14]) > sum(p.std_error for p in points[21:28])


def test_baseline_is_the_dense_network() -> None:
    net, (x, y) = a_network(), some_data(40)
    cells = scan(net, (x, y), n_images=40)
    dense = naive(net, net, x, y)
    for name in ("stem", "fc"):
        assert cells[name, 0.0, "kl", False].value == 0.0
        assert cells[name, 0.0, "loss", False].value == pytest.approx(dense["loss"], abs=1e-6)
        assert cells[name, 0.0, "accuracy", True].value == dense["accuracy"]


def test_standard_errors_are_those_of_a_mean_over_images() -> None:
    net, (x, y) = a_network(), some_data(50)
    cells = scan(net, (x, y), n_images=50, refresh_batchnorm=False)
    with torch.no_grad():
        losses = functional.cross_entropy(
            pruned_copy(net, "side", 0.9)(x).double(), y, reduction="none"
        ).numpy()
    expected = losses.std(ddof=1) / np.sqrt(50)
    assert cells["side", 0.9, "loss", False].std_error == pytest.approx(expected, rel=1e-4)
    assert all(
        p.std_error is not None and p.std_error >= 0 for p in cells.values() if p.kind in ("kl", "accuracy")
    )


def test_removed_energy_is_the_removed_share_of_squared_weights() -> None:
    net = a_network()
    cells = scan(net, some_data(), refresh_batchnorm=False)
    weight = np.sort(net.blocks[0].conv1.weight.detach().double().numpy().reshape(-1) ** 2)
    zeros = int(np.ceil(0.9 * weight.size - 1e-9))
    point = cells["blocks.0.conv1", 0.9, "removed_energy", False]
    assert point.value == pytest.approx(weight[:zeros].sum() / weight.sum(), rel=1e-6)
    assert point.n_removed == zeros


def test_a_layer_that_is_already_sparser_is_reported_as_a_no_op() -> None:
    net = pruned_copy(a_network(), "side", 0.95)
    cells = scan(net, some_data(), refresh_batchnorm=False)
    assert cells["side", 0.5, "kl", False] == SensitivityPoint(
        "side", 0.5, "kl", 0.0, False, 0.0, 0, 0.0, 0.0
    )
    assert cells["side", 0.98, "kl", False].n_removed > 0
    assert SensitivityTable.from_points(cells.values()).no_ops() == (("side", 0.9), ("side", 0.5))


def test_tied_weights_are_pruned_in_every_place_of_use() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(6, 6)
            self.middle = nn.Linear(6, 6)
            self.b = nn.Linear(6, 6)
            self.b.weight = self.a.weight
            self.out = nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.b(self.middle(self.a(x).relu()).relu()).relu())

    torch.manual_seed(0)
    net = Tied().eval()
    x, y = torch.randn(40, 6), torch.randint(0, 5, (40,))
    cells = scan(net, (x, y), n_images=40)
    for layer in ("a", "middle", "out"):
        assert cells[layer, 0.9, "kl", False].value == pytest.approx(
            naive(net, pruned_copy(net, layer, 0.9), x, y)["kl"], abs=1e-6
        )
    assert not any(key[0] == "b" for key in cells)


def test_a_weight_used_before_its_module_runs_is_still_measured_right() -> None:
    class Early(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(6, 6)
            self.second = nn.Linear(6, 6)
            self.out = nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            ahead = x @ self.out.weight[:, :6].mean(0)[:, None]
            return self.out(self.second(self.first(x + ahead).relu()).relu())

    torch.manual_seed(0)
    net = Early().eval()
    x, y = torch.randn(40, 6), torch.randint(0, 5, (40,))
    cells = scan(net, (x, y), n_images=40)
    for layer in ("first", "second", "out"):
        assert cells[layer, 0.9, "kl", False].value == pytest.approx(
            naive(net, pruned_copy(net, layer, 0.9), x, y)["kl"], abs=1e-6
        )


def test_a_transformer_encoder_is_measured_right() -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
            self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
            self.head = nn.Linear(16, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.encoder(x).mean(1)) * 5

    torch.manual_seed(0)
    net = Encoder().eval()
    x, y = torch.randn(40, 6, 16), torch.randint(0, 5, (40,))
    cells = scan(net, (x, y), n_images=40)
    layers = {key[0] for key in cells}
    assert "head" in layers
    for layer in layers:
        assert cells[layer, 0.9, "kl", False].value == pytest.approx(
            naive(net, pruned_copy(net, layer, 0.9), x, y)["kl"], abs=1e-5
        )


def test_dense_predictions_with_positions_are_averaged_over_them() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 4, 1)).eval()
    x, y = torch.randn(20, 2, 5, 5), torch.randint(0, 4, (20, 5, 5))
    cells = scan(net, (x, y), n_images=20)
    with torch.no_grad():
        p, q = net(x).double().log_softmax(1), pruned_copy(net, "0", 0.9)(x).double().log_softmax(1)
    assert cells["0", 0.9, "kl", False].value == pytest.approx(
        float((p.exp() * (p - q)).sum(1).mean()), abs=1e-6
    )
    assert cells["0", 0.9, "loss", False].value == pytest.approx(float(functional.nll_loss(q, y)), abs=1e-6)


def test_an_executor_gives_the_same_points() -> None:
    net, data = a_network(), some_data()
    inline = list(measure_loss(net, data, levels=LEVELS))
    with ThreadPoolExecutor(1) as pool:
        assert list(measure_loss(net, data, levels=LEVELS, executor=pool)) == inline


def test_stop_ends_the_scan_at_once() -> None:
    stop = threading.Event()
    seen = []
    for point in measure_loss(a_network(), some_data(), levels=LEVELS, stop=stop):
        seen.append(point)
        if point.sparsity == 0.9:
            stop.set()
    assert sum(p.kind == "kl" and p.sparsity == 0.9 for p in seen) == 1
    assert list(measure_loss(a_network(), some_data(), levels=LEVELS, stop=stop)) == []


def test_without_labels_there_is_the_divergence_alone() -> None:
    x, _ = some_data()
    assert {p.kind for p in measure_loss(a_network(), (x, None), levels=(0.9,))} == {"kl", "removed_energy"}
    with pytest.raises(DataError, match="labels"):
        measure_loss(a_network(), (x, None), criterion=nn.CrossEntropyLoss())


def test_own_criterion_is_averaged_over_images() -> None:
    net, (x, y) = a_network(), some_data(50)
    points = measure_loss(net, (x, y), levels=LEVELS, n_images=50, criterion=nn.CrossEntropyLoss())
    mine = {(p.layer, p.sparsity, p.kind, p.refreshed): p for p in points}
    default = scan(net, (x, y), n_images=50)
    assert mine.keys() == default.keys()
    for key, point in default.items():
        assert mine[key].value == pytest.approx(point.value, abs=1e-5)


def test_the_error_of_a_criterion_is_that_of_its_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan_module, "CRITERION_BATCH", 6)
    net, (x, y) = a_network(), some_data(60)
    points = measure_loss(net, (x, y), levels=(0.9,), n_images=60, criterion=nn.CrossEntropyLoss())
    found = {(p.layer, p.kind, p.sparsity): p for p in points if not p.refreshed}
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        q = pruned_copy(net, "side", 0.9)(x[order]).double()
    each = functional.cross_entropy(q, y[order], reduction="none").reshape(10, 6).mean(1).numpy()
    point = found["side", "loss", 0.9]
    assert point.std_error == pytest.approx(each.std(ddof=1) / np.sqrt(10), rel=1e-4)
    assert point.low < point.value < point.high


def test_a_loaded_data_set_is_asked_for_its_validation_part() -> None:
    class Loaded:
        def validation_tensors(self, limit: int | None = None) -> tuple[Tensor, Tensor]:
            return some_data()[0][:limit], some_data()[1][:limit]

    net = a_network()
    assert list(measure_loss(net, Loaded(), levels=(0.9,))) == list(
        measure_loss(net, some_data(), levels=(0.9,))
    )


@pytest.mark.parametrize(
    ("criterion", "message"),
    [
        (lambda _o, _y: torch.tensor(float("nan")), "returned nan of the dense model"),
        (nn.CrossEntropyLoss(reduction="none"), "reduction='mean'"),
        (lambda _o, _y: "low", "returned str"),
    ],
)
def test_a_criterion_that_gives_no_finite_scalar_is_refused(criterion, message: str) -> None:
    with pytest.raises(DataError, match=message):
        next(iter(measure_loss(a_network(), some_data(), criterion=criterion)))


def test_bad_requests_are_refused_before_any_work() -> None:
    net, (x, y) = a_network(), some_data()
    with pytest.raises(DataError, match="5 validation images"):
        measure_loss(net, (x[:5], y[:5]))
    with pytest.raises(DataError, match="n_images=3"):
        measure_loss(net, (x, y), n_images=3)
    with pytest.raises(DataError, match="one row for each"):
        measure_loss(net, (x, y[:-1]))
    with pytest.raises(DataError, match="integer tensor"):
        measure_loss(net, (x, y.float()))
    with pytest.raises(DistributionError, match=r"\[90\.0\]"):
        measure_loss(net, (x, y), levels=(0.5, 90.0))
    with pytest.raises(DistributionError, match="At least one"):
        measure_loss(net, (x, y), levels=())
    with pytest.raises(ModelError, match=r"Did you mean 'blocks\.1\.conv1'"):
        measure_loss(net, (x, y), layers=["block.1.conv1"])
    with pytest.raises(ModelError, match="Layers are stem"):
        measure_loss(net, (x, y), layers=["zzz"])


def test_labels_out_of_range_are_refused_with_both_ranges() -> None:
    x, y = some_data()
    with pytest.raises(DataError, match=r"from 0 to 9, but the model has 5 outputs"):
        next(iter(measure_loss(a_network(), (x, torch.cat([y[:-1], torch.tensor([9])])))))


@pytest.mark.parametrize("net", [nn.Sequential(nn.Flatten(), nn.Linear(128, 1)), nn.LSTM(8, 8)])
def test_outputs_that_are_no_logits_are_refused(net: nn.Module) -> None:
    x, y = some_data()
    with pytest.raises(ModelError):
        next(iter(measure_loss(net, (x, y))))


def test_other_precision_than_the_data_is_explained() -> None:
    with pytest.raises((DataError, ModelError), match=r"(?i)double|float64"):
        next(iter(measure_loss(a_network().double(), some_data())))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_a_network_in_another_precision_is_refused_with_a_way_out(dtype: torch.dtype) -> None:
    x, y = some_data()
    with pytest.raises(ModelError, match=r"pass model\.float\(\)"):
        measure_loss(a_network().to(dtype), (x.to(dtype), y))


def test_a_network_elsewhere_than_on_the_cpu_is_refused_with_a_way_out() -> None:
    with pytest.raises(ModelError, match=r"on device 'meta'.*pass model\.cpu\(\)"):
        measure_loss(a_network().to("meta"), some_data())


def test_networks_that_take_or_return_several_things_are_told_how_to_be_wrapped() -> None:
    class Several(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 5)

        def forward(self, x: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
            return {"logits": self.fc(x if mask is None else x * mask)}

    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Several()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x, x != 0)["logits"]

    x, y = torch.randn(40, 8), torch.randint(0, 5, (40,))
    for inputs in ({"x": x, "mask": x != 0}, (x, x != 0), [x]):
        with pytest.raises(DataError, match="needs a module around it"):
            measure_loss(Several(), (inputs, y))
    with pytest.raises(ModelError, match="it returned dict"):
        list(measure_loss(Several(), (x, y)))
    assert len(list(measure_loss(One(), (x, y), levels=(0.5,), refresh_batchnorm=False))) == 8


def test_token_numbers_are_inputs_too() -> None:
    net = nn.Sequential(nn.Embedding(20, 6), nn.Flatten(), nn.Linear(30, 4)).eval()
    x, y = torch.randint(0, 20, (40, 5)), torch.randint(0, 4, (40,))
    cells = scan(net, (x, y), n_images=40)
    assert cells["2", 0.9, "kl", False].value == pytest.approx(
        naive(net, pruned_copy(net, "2", 0.9), x, y)["kl"], abs=1e-6
    )


def test_a_weight_without_influence_is_never_called_robust() -> None:
    with pytest.raises(ModelError, match="'dead' have no influence"):
        list(measure_loss(with_a_dead_layer(), some_data()))


# ---- kinds, and single cells


def test_only_the_kinds_that_are_asked_for_are_given() -> None:
    net, data = a_network(), some_data()
    every = scan(net, data, n_images=60)
    for kinds in (("kl",), ("accuracy", "loss"), ("removed_energy",)):
        found = {
            (p.layer, p.sparsity, p.kind, p.refreshed): p
            for p in measure_loss(net, data, levels=LEVELS, n_images=60, kinds=kinds)
        }
        expected = {key: point.value for key, point in every.items() if key[2] in kinds}
        assert {key: point.value for key, point in found.items()} == pytest.approx(expected, abs=1e-12)


def test_kinds_that_cannot_be_given_are_refused_before_any_work() -> None:
    net, (x, y) = a_network(), some_data()
    with pytest.raises(DistributionError, match="got kl, magic"):
        measure_loss(net, (x, y), kinds=("kl", "magic"))
    with pytest.raises(DistributionError, match="got none"):
        measure_loss(net, (x, y), kinds=())
    with pytest.raises(DataError, match="accuracy and loss need labels"):
        measure_loss(net, (x, None), kinds=("accuracy", "loss", "kl"))


def test_single_cells_are_those_of_the_whole_scan() -> None:
    net, data = a_network(), some_data()
    every = scan(net, data, n_images=60)
    cells = [("fc", 0.98), ("stem", 0.5), ("blocks.0.conv1", 0.98), ("stem", 0.5)]
    found = {
        (p.layer, p.sparsity, p.kind, p.refreshed): p
        for p in measure_loss(net, data, cells=cells, n_images=60)
        if p.sparsity > 0
    }
    assert {(layer, level) for layer, level, _, _ in found} == set(cells)
    for key, point in found.items():
        assert point.value == pytest.approx(every[key].value, abs=1e-9)
    with pytest.raises(DistributionError, match="No cell"):
        measure_loss(net, data, cells=[])
    with pytest.raises(ModelError, match="no prunable layer"):
        measure_loss(net, data, cells=[("stern", 0.5)])


# ---- channels


class Stage(nn.Module):
    """A residual stage: stem and both second convolutions share their channels."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(2, width, 3, padding=1), nn.BatchNorm2d(width)
        self.a = nn.ModuleList([nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(4)])
        self.norms = nn.ModuleList([nn.BatchNorm2d(width) for _ in range(4)])
        self.fc = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.stem(x)))
        for i in (0, 2):
            y = torch.relu(self.norms[i](self.a[i](x)))
            x = torch.relu(x + self.norms[i + 1](self.a[i + 1](y)))
        return self.fc(x.mean((2, 3))) * 6


def without_channels(net: Stage, layers: tuple[str, ...], norms: tuple[str, ...], n: int) -> nn.Module:
    """Remove the n weakest channels by hand."""
    strength = np.zeros(12)
    for name in layers:
        squares = (net.get_submodule(name).weight.detach().double() ** 2).reshape(12, -1).sum(1).numpy()
        strength += squares / squares.mean()
    other = copy.deepcopy(net)
    with torch.no_grad():
        for channel in np.argsort(strength, kind="stable")[:n]:
            for name in (*layers, *norms):
                for value in other.get_submodule(name).parameters(recurse=False):
                    value[channel] = 0
    return other


def test_channels_that_layers_share_are_removed_from_all_of_them() -> None:
    torch.manual_seed(0)
    net, (x, y) = Stage().eval(), some_data()
    with torch.no_grad():
        for norm in [net.bn, *net.norms]:
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.normal_(0, 0.3)
    points = list(measure_loss(net, (x, y), levels=(0.5, 0.75), n_images=60, structure="channels"))
    cells = {(p.layer, p.sparsity, p.kind, p.refreshed): p for p in points}
    groups = {
        "stem": (("stem", "a.1", "a.3"), ("bn", "norms.1", "norms.3")),
        "a.0": (("a.0",), ("norms.0",)),
        "a.2": (("a.2",), ("norms.2",)),
    }
    assert {key[0] for key in cells} == {*groups}
    for name, (layers, norms) in groups.items():
        for level, n in ((0.5, 6), (0.75, 9)):
            for kind, value in naive(net, without_channels(net, layers, norms, n), x, y).items():
                assert cells[name, level, kind, False].value == pytest.approx(value, abs=1e-5), (name, level)
        sizes = [net.get_submodule(layer).weight[0].numel() for layer in layers]
        assert cells[name, 0.5, "kl", False].n_removed == 6 * sum(sizes)
    assert cells["stem", 0.5, "kl", False].value > 1e-3
    assert cells["stem", 0.5, "kl", True].value != cells["stem", 0.5, "kl", False].value


def test_a_group_is_meant_by_any_of_its_layers() -> None:
    torch.manual_seed(0)
    net, data = Stage().eval(), some_data()
    points = measure_loss(net, data, levels=(0.5,), n_images=60, structure="channels", layers=["a.3"])
    assert {p.layer for p in points} == {"stem"}
    points = measure_loss(net, data, cells=[("a.1", 0.5)], n_images=60, structure="channels")
    assert {(p.layer, p.sparsity) for p in points} == {("stem", 0.0), ("stem", 0.5)}


def test_channels_that_cannot_be_removed_are_refused() -> None:
    net, data = Stage().eval(), some_data()
    with pytest.raises(ModelError, match="No channels of fc can be removed"):
        measure_loss(net, data, layers=["fc"], structure="channels")
    with pytest.raises(DistributionError, match="'weights' or 'channels'"):
        measure_loss(net, data, structure="blocks")
    with pytest.raises(DistributionError, match="leave 'fisher' out"):
        measure_loss(net, data, structure="channels", kinds=("kl", "fisher"))


# ---- all layers at once


DISTRIBUTION = {"stem": 0.5, "blocks.0.conv1": 0.9, "blocks.1.conv2": 0.98, "side": 0.0, "fc": 0.7}


def jointly_pruned(net: nn.Module) -> nn.Module:
    for name, level in DISTRIBUTION.items():
        net = pruned_copy(net, name, level)
    return net


def test_pruning_all_layers_at_once_equals_doing_it_by_hand() -> None:
    net, (x, y) = a_network(), some_data()
    before = copy.deepcopy(net.state_dict())
    joint = measure_joint(net, (x, y), DISTRIBUTION, n_images=60)
    assert joint is not None
    wanted = naive(net, jointly_pruned(net), x, y)
    for kind, value in wanted.items():
        assert joint.values[kind] == pytest.approx(value, rel=1e-5, abs=1e-7), kind
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    zeros = sum(int((p == 0).sum()) for p in jointly_pruned(net).parameters())
    assert joint.n_removed == zeros - sum(int((p == 0).sum()) for p in net.parameters())


def test_one_layer_alone_gives_what_the_scan_gives() -> None:
    net, data = a_network(), some_data()
    joint = measure_joint(net, data, {"blocks.0.conv1": 0.9}, n_images=60, refresh_batchnorm=True)
    assert joint is not None
    found = scan(net, data, n_images=60)
    for kind in ("kl", "loss", "accuracy"):
        assert joint.values[kind] == found["blocks.0.conv1", 0.9, kind, True].value


def test_nothing_pruned_changes_nothing() -> None:
    joint = measure_joint(a_network(), some_data(), {"stem": 0.0}, n_images=60, refresh_batchnorm=True)
    assert joint is not None
    assert joint.values["kl"] == 0.0
    assert joint.n_removed == 0
    assert measure_joint(a_network(), some_data(), {}, n_images=60) is not None


def test_joint_requests_that_make_no_sense() -> None:
    net, data = a_network(), some_data()
    with pytest.raises(DistributionError, match="fractions of zeros"):
        measure_joint(net, data, {"stem": 90.0}, n_images=60)
    with pytest.raises(ModelError, match="no prunable layer"):
        measure_joint(net, data, {"stern": 0.9}, n_images=60)
    stop = threading.Event()
    stop.set()
    assert measure_joint(net, data, DISTRIBUTION, n_images=60, stop=stop) is None
