"""Tables whose offsets have 16 bits: only where all operands of a block are within their reach, and with the same answers as with 32."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

import explorer
from explorer.inference import conv_steps, native, pack, plan
from explorer.inference.kernels import conv_tables
from explorer.inference.larger_kernels import has_programs
from explorer.inference.module import SparseModule
from explorer.inference.pack import PackedConv
from explorer.inference.plan import Choice
from explorer.inference.sparse_rows import SparseWeights
from explorer.inference.step_builder import block_bytes
from tests.inference.graphs import relative_error
from tests.inference.test_networks import pruned

pytestmark = pytest.mark.skipif(
    not has_programs(native.current_isa()), reason="offsets are short only where there are programs"
)


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> list[PackedConv]:
    """What sparse convolutions become."""
    found: list[PackedConv] = []

    def noted(*given: Any, **more: Any) -> PackedConv:
        found.append(pack.conv_sparse(*given, **more))
        return found[-1]

    monkeypatch.setattr(conv_steps, "conv_sparse", noted)
    return found


def compiled(
    form: str, size: int, channels: int, monkeypatch: pytest.MonkeyPatch
) -> tuple[SparseModule, nn.Module, torch.Tensor]:
    """A 3 x 3 layer that reaches its operands in this way."""
    monkeypatch.setattr(plan.Plan, "candidates", lambda *_, **__: [Choice(False, form)])
    torch.manual_seed(0)
    network = pruned(nn.Sequential(nn.Conv2d(channels, 33, 3, padding=1)), 0.9)
    x = torch.randn(2, channels, size, size)
    return explorer.compile(network, x, sparse="sparse"), network, x


@pytest.mark.parametrize(
    ("form", "size", "short"), [("direct", 5, True), ("shift", 5, True), ("shift", 60, True), ("direct", 60, False)]
)  # fmt: skip
def test_they_are_short_where_operands_lie_near_each_other(
    form: str, size: int, short: bool, packed: list[PackedConv], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, network, x = compiled(form, size, 150, monkeypatch)
    assert packed[0].n_blocks > 1 or size == 5
    assert packed[0].short == short
    assert packed[0].tables["offsets"].dtype == (np.uint16 if short else np.int32)
    assert relative_error(engine(x), network(x)) < 1e-5


def reaches(one: PackedConv) -> list[int]:
    """Bytes from the first operand of each block to the last; the table ends with what is read ahead."""
    offsets: NDArray[np.int64] = one.tables["offsets"][: -conv_tables.OFFSETS_AHEAD - 1].astype(np.int64)
    begins = one.blocks[1:, conv_tables.BLOCK.index("offsets")]
    return [int(np.ptp(block)) for block in np.split(offsets, begins)]


@pytest.mark.parametrize("form", ["direct", "shift"])
def test_the_last_element_within_reach(
    form: str, packed: list[PackedConv], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pack, "SHORT", 0)
    compiled(form, 9, 40, monkeypatch)
    furthest = max(reaches(packed[0])) // 4
    for elements, short in ((furthest, False), (furthest + 1, True)):
        monkeypatch.setattr(pack, "SHORT", elements)
        packed.clear()
        engine, network, x = compiled(form, 9, 40, monkeypatch)
        # Operands that no nonzero reads count, too.
        assert not (packed[0].short and not short)
        assert relative_error(engine(x), network(x)) < 1e-5
    monkeypatch.setattr(pack, "SHORT", 2 * furthest)
    packed.clear()
    compiled(form, 9, 40, monkeypatch)
    assert packed[0].short
    assert max(reaches(packed[0])) == furthest


class Narrowing(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, channels // 2, 1), nn.ReLU(), nn.Conv2d(channels // 2, channels // 2, 3, padding=1),
            nn.ReLU(), nn.Conv2d(channels // 2, channels, 1),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.layers(x) + x)


@pytest.mark.parametrize("size", [7, 14, 28, 56])
def test_what_is_counted_on_to_be_short_is(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    short: dict[tuple[int, int], list[bool]] = {}

    def noted(weights: SparseWeights, *given: Any, **more: Any) -> PackedConv:
        packed = pack.conv_sparse(weights, *given, **more)
        short.setdefault(weights.shape, []).append(packed.short)
        return packed

    monkeypatch.setattr(conv_steps, "conv_sparse", noted)
    # How many channels a K block has depends on the cache.
    monkeypatch.setattr("explorer.inference.step_builder.l1_bytes", lambda: 32768)
    monkeypatch.setattr(plan.Plan, "may_be_code", lambda *_: False)
    torch.manual_seed(0)
    network, x = (
        pruned(nn.Sequential(nn.Conv2d(48, 64, 1), Narrowing(64)), 0.9),
        torch.randn(1, 48, size, size),
    )
    engine = explorer.compile(network, x, sparse="sparse")
    inner = engine._network
    counted_on = 0
    for index in inner.choices:
        if inner.plan.has_short_offsets(inner.graph, index, block_bytes()):
            outputs, *inputs = inner.graph.shapes[inner.graph.operations[index].weight or ""]
            assert all(short[outputs, prod(inputs)])
            counted_on += 1
    assert counted_on == (4 if size < 56 else 2)
    assert relative_error(engine(x), network(x)) < 1e-5
