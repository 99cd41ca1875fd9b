"""Zeros around an image that differ from side to side, as networks ported from TensorFlow have them: convolutions pad them themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._pytree import tree_leaves

import explorer
from tests.inference.graphs import relative_error
from tests.inference.test_kernels import ISAS, run_by
from tests.inference.test_operators import Function


@given(
    size=st.tuples(st.integers(1, 20), st.integers(1, 37)),
    kernel=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    dilation=st.integers(1, 2),
    sides=st.tuples(*[st.integers(0, 5)] * 4),
    own=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    kind=st.sampled_from(["dense", "sparse", "grouped", "depthwise"]),
    before=st.booleans(),
)
@settings(max_examples=45, deadline=None)
def test_zeros_that_differ_from_side_to_side_are_the_padding_of_the_convolution(
    size: tuple[int, int], kernel: tuple[int, int], stride: tuple[int, int], dilation: int, sides: tuple[int, int, int, int],
    own: tuple[int, int], kind: str, before: bool,
) -> None:  # fmt: skip
    left, right, top, bottom = sides
    room = (size[0] + top + bottom + 2 * own[0], size[1] + left + right + 2 * own[1])
    assume(all(n > dilation * (k - 1) for n, k in zip(room, kernel, strict=True)))

    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            groups = {"grouped": 2, "depthwise": 4}.get(kind, 1)
            self.first = nn.Conv2d(4, 4, 1) if before else nn.Identity()
            self.conv = nn.Conv2d(4, 8 if groups < 4 else 4, kernel, stride, own, dilation, groups)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(nn.functional.pad(self.first(x), sides)).relu()

    torch.manual_seed(0)
    network, x = Padded().eval(), torch.randn(2, 4, *size)
    if kind == "sparse":
        network.conv.weight.data[torch.rand_like(network.conv.weight) < 0.7] = 0
    engine = explorer.compile(network, x, sparse="sparse" if kind == "sparse" else "auto")
    assert engine.fallbacks == ()
    with torch.no_grad():
        wanted = network(x)
        for _ in range(2):
            assert relative_error(engine(x), wanted, torch.ones_like(wanted)) < 1e-5


class OtherPads(nn.Module):
    """Padding that a convolution cannot do, or that others read as well, and "same" padding of even kernels, which it can."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.conv = kind, nn.Conv2d(3, 4, 3)
        self.even, self.line = nn.Conv2d(3, 4, (4, 2), padding="same"), nn.Conv1d(3, 4, 4, padding="same")

    def forward(self, x: torch.Tensor) -> Any:
        pad = nn.functional.pad
        match self.kind:
            case "cropped":
                return self.conv(pad(x, (-1, 2, 0, 1)))
            case "reflected":
                return self.conv(pad(x, (1, 2, 0, 1), mode="reflect"))
            case "ones":
                return self.conv(pad(x, (1, 2, 0, 1), value=1.0))
            case "channels too":
                return self.conv(pad(x[:, :2], (1, 0, 0, 1, 0, 1)))
            case "returned":
                padded = pad(x, (1, 2, 0, 1))
                return self.conv(padded), padded
            case "read by a pool":
                padded = pad(x, (1, 2, 0, 1))
                return self.conv(padded), nn.functional.max_pool2d(padded, 2)
            case "twice":
                return self.conv(pad(pad(x, (1, 2)), (0, 0, 0, 1)))
            case _:
                return self.even(x), self.line(pad(x[:, :, 0], (2, 0)))


@pytest.mark.parametrize(
    ("kind", "is_native"),
    [
        ("cropped", False), ("reflected", False), ("ones", False), ("channels too", False), ("returned", False),
        ("read by a pool", False), ("twice", True), ("same", True),
    ],
)  # fmt: skip
def test_padding_of_another_kind_runs_through_torch_and_is_right(kind: str, is_native: bool) -> None:
    torch.manual_seed(0)
    network, x = OtherPads(kind).eval(), torch.randn(2, 3, 9, 11)
    engine = explorer.compile(network, x)
    assert not [name for name in engine.fallbacks if "pad" in name or "conv" in name] or not is_native
    with torch.no_grad():
        for got, wanted in zip(tree_leaves(engine(x)), tree_leaves(network(x)), strict=True):
            assert relative_error(got, wanted) < 1e-5


READERS: dict[str, Callable[[torch.Tensor], Any]] = {
    "chunk": lambda y: y.chunk(2, 1),
    "split": lambda y: y.split([1, 3], 1),
    "unbind": lambda y: y.unbind(1),
    "topk": lambda y: tuple(y.topk(2)),
    "maximum and where": lambda y: tuple(y.max(1)),
    "pool and where": lambda y: nn.functional.max_pool2d(y, 2, return_indices=True),
    "deviation and mean": torch.std_mean,
    "minimum and maximum": lambda y: tuple(torch.aminmax(y)),
}


@pytest.mark.parametrize("first", [nn.Identity(), nn.Conv2d(4, 4, 1)])
@pytest.mark.parametrize("reader", READERS)
def test_padding_may_be_read_by_what_returns_several_tensors(reader: str, first: nn.Module) -> None:
    network = Function(lambda m, x: READERS[reader](nn.functional.pad(m.first(x), (1, 0, 0, 2))), first=first)
    x = torch.randn(2, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    engine = explorer.compile(network.eval(), x)
    with torch.no_grad():
        for got, wanted in zip(tree_leaves(engine(x)), tree_leaves(network(x)), strict=True):
            assert relative_error(got, wanted) < 1e-5


def test_padding_may_be_read_by_a_recurrent_layer() -> None:
    network = Function(lambda m, x: m.lstm(nn.functional.pad(x, (0, 2)))[0], lstm=nn.LSTM(10, 4)).eval()
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    assert relative_error(explorer.compile(network, x)(x), network(x)) < 1e-5


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("groups", [1, 4])
def test_every_instruction_set_pads_each_side_alike(
    isa: str, stride: int, groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_by(isa, monkeypatch)
    torch.manual_seed(0)
    for sides in ((0, 1, 0, 1), (2, 0, 1, 0)):
        network = nn.Sequential(
            nn.Conv2d(3, 4, 1), nn.ZeroPad2d(sides), nn.Conv2d(4, 4, 3, stride, groups=groups)
        )
        for size in ((16, 16), (5, 31)):
            x = torch.randn(2, 3, *size)
            engine = explorer.compile(network.eval(), x)
            assert engine.fallbacks == ()
            assert relative_error(engine(x), network(x).detach()) < 1e-5
