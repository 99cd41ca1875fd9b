"""The second-order estimate against what can be computed by hand, and against gradients that torch.func takes image by image."""

from __future__ import annotations

import copy
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional

from explorer.errors import ModelError
from explorer.masks import magnitude_mask
from explorer.models import PrunableLayer, prunable_layers
from explorer.sensitivity import SensitivityPoint, SensitivityTable, measure_loss
from explorer.sensitivity.second_order import N_IMAGES, measure_fisher

LEVELS = (0.0, 0.3, 0.5, 0.9)


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 16, 4)
    ).eval()


def images(n: int = 40) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 2, 4, 4, generator=generator), torch.randint(4, (n,), generator=generator)


def table(
    module: nn.Module, x: Tensor, y: Tensor | None, layers: tuple[PrunableLayer, ...]
) -> SensitivityTable:
    return SensitivityTable.from_points(measure_fisher(module, x, y, layers, LEVELS))


def test_softmax_regression_by_hand() -> None:
    """The gradient of an image's loss is (p - y) x'."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(32, 4))
    x, y = images()
    got = table(net, x, y, prunable_layers(net, x[:1]))
    w = net[1].weight.detach().double().numpy()
    flat = x.flatten(1).double().numpy()
    logits = flat @ w.T + net[1].bias.detach().double().numpy()
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    g = (p - np.eye(4)[y.numpy()])[:, :, None] * flat[:, None, :]
    for level in LEVELS:
        removed = ~magnitude_mask(net[1].weight.detach(), level).numpy()
        each = (g**2 * w**2 / 2 * removed).sum((1, 2))
        point = got.point("1", level, "fisher")
        assert point is not None
        assert point.value == pytest.approx(each.mean(), rel=1e-4, abs=1e-12)
        assert point.std_error == pytest.approx(each.std(ddof=1) / len(each) ** 0.5, rel=1e-4, abs=1e-12)
        assert point.n_removed == removed.sum()


def test_a_convolutional_network_as_torch_func_sees_it() -> None:
    net, (x, y) = small(), images()
    layers = prunable_layers(net, x[:1])
    got = table(net, x, y, layers)
    parameters = {name: value.detach() for name, value in net.named_parameters()}
    buffers = dict(net.named_buffers())

    def loss(parameters: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        return functional.cross_entropy(
            functional_call(net, (parameters, buffers), (image[None],)), label[None]
        )

    gradients = vmap(grad(loss), (None, 0, 0))(parameters, x, y)
    for layer in layers:
        weight = parameters[f"{layer.name}.weight"]
        cost = (gradients[f"{layer.name}.weight"].double() ** 2).mean(0) * weight.double() ** 2 / 2
        for level in LEVELS:
            wanted = float(cost[~magnitude_mask(weight, level)].sum())
            assert got.value(layer.name, level, "fisher") == pytest.approx(wanted, rel=1e-4, abs=1e-12)


def test_without_labels_they_are_drawn_from_the_networks_answers() -> None:
    """Against the exact expectation over answers; the draw of 128 images is within a fifth of it."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(32, 4))
    x, _ = images(N_IMAGES)
    layers = prunable_layers(net, x[:1])
    got = table(net, x, None, layers)
    assert got == table(net, x, None, layers)
    w, flat = net[1].weight.detach().double(), x.flatten(1).double()
    p = functional.softmax(net(x).detach().double(), 1)
    # Of one weight: the variance of its answer times the square of its pixel.
    exact = ((p * (1 - p))[:, :, None] * (flat**2)[:, None, :]).mean(0) * w**2 / 2
    wanted = float(exact[~magnitude_mask(net[1].weight.detach(), 0.9)].sum())
    assert got.value("1", 0.9, "fisher") == pytest.approx(wanted, rel=0.2)


def test_the_module_is_left_as_it_was() -> None:
    net, (x, y) = small().train(), images()
    net[0].weight.requires_grad_(False)
    before = copy.deepcopy(net.state_dict())
    list(measure_fisher(net, x, y, prunable_layers(net, x[:1]), LEVELS))
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert net.training
    assert not net[0].weight.requires_grad
    assert net[4].weight.requires_grad
    assert net[4].weight.grad is None


def test_a_layer_that_was_pruned_before_removes_nothing() -> None:
    net, (x, y) = small(), images()
    with torch.no_grad():
        net[4].weight.mul_(magnitude_mask(net[4].weight, 0.6))
    got = table(net, x, y, prunable_layers(net, x[:1]))
    assert ("4", 0.5) in got.no_ops()
    assert got.value("4", 0.5, "fisher") == 0.0
    assert got.value("4", 0.9, "fisher") > 0.0


def test_a_weight_without_influence_has_no_estimate() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.idle = nn.Linear(32, 4), nn.Linear(32, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x.flatten(1)) + 0 * self.idle(x.flatten(1)).detach()

    net, (x, y) = Idle(), images()
    with pytest.raises(ModelError, match="'idle'"):
        list(measure_fisher(net, x, y, prunable_layers(net, x[:1]), LEVELS))


def test_a_stop_gives_no_points() -> None:
    net, (x, y) = small(), images()
    stop = threading.Event()
    stop.set()
    assert list(measure_fisher(net, x, y, prunable_layers(net, x[:1]), LEVELS, stop=stop)) == []


def test_a_scan_gives_it_beside_the_other_kinds_when_it_is_asked_to() -> None:
    net, data = small(), images(64)
    plain = {point.kind for point in measure_loss(net, data, levels=(0.5,), n_images=64)}
    more = list(
        measure_loss(
            net,
            data,
            levels=(0.5,),
            n_images=64,
            kinds=("kl", "loss", "accuracy", "removed_energy", "fisher"),
        )
    )
    assert {point.kind for point in more} == plain | {"fisher"}
    found = {(p.layer, p.sparsity) for p in more if p.kind == "fisher"}
    assert found == {(layer, level) for layer in ("0", "4") for level in (0.0, 0.5)}


def test_alone_it_needs_no_pass_with_pruned_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    net, data = small(), images(64)
    both = measure_loss(net, data, levels=(0.5,), n_images=64, kinds=("kl", "fisher", "removed_energy"))
    expected = {(p.layer, p.sparsity, p.kind): p.value for p in both if p.kind != "kl"}

    def never(*_: object, **__: object) -> None:
        raise AssertionError("a pass with pruned weights")

    monkeypatch.setattr("explorer.sensitivity.scan.Scan.prepare", never)
    alone = measure_loss(net, data, levels=(0.5,), n_images=64, kinds=("fisher", "removed_energy"))
    assert {(p.layer, p.sparsity, p.kind): p.value for p in alone} == pytest.approx(expected)


@pytest.mark.usefixtures("measured_anew")
def test_it_is_kept_on_disk_like_the_other_kinds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("explorer.sensitivity.loss.cache_folder", lambda: tmp_path)
    net, data = small(), images(64)

    def scan(levels: tuple[float, ...], kinds: tuple[str, ...]) -> list[SensitivityPoint]:
        points = measure_loss(net, data, levels=levels, n_images=64, kinds=kinds, resume=True)
        return [point for point in points if point.kind == "fisher"]

    first = scan((0.5, 0.9), ("fisher",))
    calls = 0
    real = measure_fisher

    def counted(*args: object, **options: object) -> object:
        nonlocal calls
        calls += 1
        return real(*args, **options)

    monkeypatch.setattr("explorer.sensitivity.loss.measure_fisher", counted)
    assert scan((0.5, 0.9), ("fisher",)) == first
    assert scan((0.5, 0.9), ("kl", "fisher")) == first
    assert calls == 0
    assert len(scan((0.5, 0.8), ("fisher",))) == len(first)
    assert calls == 1
