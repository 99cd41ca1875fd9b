"""Groups of channels: those that are known by construction, and that removing one leaves nothing of it anywhere in the group."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import explorer
from explorer.errors import ModelError
from explorer.models import architectures, channel_groups


def layers_of(module: nn.Module, shape: tuple[int, ...]) -> list[tuple[str, ...]]:
    return [group.layers for group in channel_groups(module.eval(), torch.randn(1, *shape))]


def test_the_layers_of_a_residual_stage_share_their_channels() -> None:
    assert layers_of(architectures.resnet18(), (3, 64, 64)) == [
        ("conv1", "layer1.0.conv2", "layer1.1.conv2"),
        ("layer1.0.conv1",),
        ("layer1.1.conv1",),
        ("layer2.0.conv1",),
        ("layer2.0.conv2", "layer2.0.shortcut.0", "layer2.1.conv2"),
        ("layer2.1.conv1",),
        ("layer3.0.conv1",),
        ("layer3.0.conv2", "layer3.0.shortcut.0", "layer3.1.conv2"),
        ("layer3.1.conv1",),
        ("layer4.0.conv1",),
        ("layer4.0.conv2", "layer4.0.shortcut.0", "layer4.1.conv2"),
        ("layer4.1.conv1",),
    ]


def test_a_depthwise_convolution_has_the_channels_of_its_input() -> None:
    groups = channel_groups(architectures.mobilenet_v2().eval(), torch.randn(1, 3, 64, 64))
    assert groups[0].layers == ("stem.0", "blocks.0.depthwise.0")
    assert len(groups[0].norms) == 2
    projections = [group for group in groups if "blocks.6.project.0" in group.layers]
    assert projections[0].layers == tuple(f"blocks.{i}.project.0" for i in (6, 7, 8, 9))
    assert not any("classifier" in name for group in groups for name in group.layers)


class Gated(nn.Module):
    """Squeeze and excitation: a channel and its gate go together."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.down, self.up = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 1), nn.Conv2d(2, 8, 1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).relu()
        gate = torch.sigmoid(self.up(self.down(x.mean((2, 3), keepdim=True)).relu()))
        return self.fc((x * gate).mean((2, 3)))


class Joined(nn.Module):
    """Branches that are concatenated stay apart; what is added to their concatenation joins both."""

    def __init__(self, *, added: bool) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 6, 1), nn.Conv2d(10, 5, 1)
        self.c = nn.Conv2d(3, 10, 1) if added else None

    def forward(self, x: Tensor) -> Tensor:
        both = torch.cat([self.a(x), self.b(x)], 1).relu()
        return self.out(both if self.c is None else both + self.c(x)).mean((2, 3))


class Tokens(nn.Module):
    """A linear layer over tokens, with a residual sum of the input: those channels come from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow, self.head = nn.Linear(6, 24), nn.Linear(24, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.narrow(torch.nn.functional.gelu(self.wide(x)))
        return self.head(x.mean(1))


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.grouped, self.last = (
            nn.Conv2d(3, 8, 1),
            nn.Conv2d(8, 8, 3, groups=2),
            nn.Conv2d(8, 4, 1),
        )
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.last(self.grouped(self.first(x)).relu()).relu().mean((2, 3)))


@pytest.mark.parametrize(
    ("net", "shape", "expected"),
    [
        (Gated(), (3, 8, 8), [("conv", "up"), ("down",)]),
        (Joined(added=False), (3, 4, 4), [("a",), ("b",)]),
        (Joined(added=True), (3, 4, 4), []),
        (Tokens(), (5, 6), [("wide",)]),
        (Grouped(), (3, 8, 8), [("last",)]),
    ],
)
def test_how_tensors_meet(net: nn.Module, shape: tuple[int, ...], expected: list[tuple[str, ...]]) -> None:
    assert layers_of(net, shape) == expected


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "fashion"])
def test_a_removed_channel_is_gone_wherever_its_group_is_seen(name: str) -> None:
    torch.manual_seed(0)
    if name == "fashion":
        loaded = explorer.load_model("demo:fashion-resnet")
        net, x = copy.deepcopy(loaded.module), torch.randn(2, *loaded.example_input.shape[1:])
    else:
        net, x = getattr(architectures, name)().eval(), torch.randn(2, 3, 64, 64)
    for group in channel_groups(net, x)[:6]:
        other = copy.deepcopy(net)
        with torch.no_grad():
            for part in (*group.layers, *group.norms):
                module = other.get_submodule(part)
                for value in (module.weight, module.bias):
                    if value is not None:
                        value[1] = 0
        seen: list[Tensor] = []
        for part in (*group.norms,):
            other.get_submodule(part).register_forward_hook(
                lambda _module, _args, out, seen=seen: seen.append(out[:, 1])
            )
        with torch.no_grad():
            other(x)
        assert len(seen) == len(group.norms) > 0
        assert all(float(each.abs().max()) == 0.0 for each in seen)


def test_the_module_is_left_as_found() -> None:
    net = architectures.resnet18().train()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    state = torch.random.get_rng_state()
    channel_groups(net, torch.randn(1, 3, 64, 64, generator=torch.Generator()))
    assert all(module.training for module in net.modules())
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    assert torch.equal(state, torch.random.get_rng_state())


def test_a_network_that_fails_says_so() -> None:
    with pytest.raises(ModelError, match="fails on example_input"):
        channel_groups(Gated(), torch.randn(1, 5, 8, 8))
