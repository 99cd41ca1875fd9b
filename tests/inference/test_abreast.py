"""Late layers that take several images side by side: the answers are those of one image after the other, whatever is in the place beside an image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import explorer
from explorer.inference import choosing, compilation, execution, native
from explorer.inference import plan as plan_module
from explorer.inference.abreast import find
from explorer.inference.execution import Execution
from explorer.inference.graph import Graph
from explorer.inference.module import SparseModule
from explorer.inference.orders import ALONE, ALONE_BY_BANDS, BANDS, LAYERS
from tests.inference.graphs import relative_error
from tests.inference.test_kernels import ISAS, compute_in
from tests.inference.test_networks import pruned
from tests.inference.test_shared_memory import fill_with_nan, take_all_for_unclean


class Stages(nn.Module):
    """Two strided bottleneck blocks as in a ResNet and one more, a mean over the image, a classifier; the first layer has a stride, and reads the caller's memory, or none."""

    def __init__(self, stride: int = 2, channels: int = 24, narrow: int = 20, kernel: int = 3) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, channels, 3, stride, 1)
        self.early, self.entry, self.late = (
            Block(channels, narrow, 2),
            Block(channels, narrow, 2),
            Block(channels, narrow, 1, kernel),
        )
        self.classify = nn.Linear(channels, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.late(self.entry(self.early(torch.relu(self.first(x)))))
        return self.classify(x.mean((2, 3)))


class Block(nn.Module):
    def __init__(self, channels: int, narrow: int, stride: int, kernel: int = 3) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, narrow, 1)
        self.spread = nn.Conv2d(narrow, narrow, kernel, stride, kernel // 2)
        self.expand = nn.Conv2d(narrow, channels, 1)
        self.short = nn.Conv2d(channels, channels, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.spread(torch.relu(self.reduce(x))))
        return torch.relu(self.expand(y) + self.short(x))


@pytest.fixture(autouse=True)
def turn_by_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches that hold but one image for each thread."""
    monkeypatch.setattr(execution, "_CACHED_BYTES", 1)


def widest() -> int:
    """Columns of an image of which two, with a gap each, fill a vector."""
    return max(native.current_isa().lanes // 2 - 1, 1)


def images(n: int, columns: int, rows: int | None = None, stride: int = 2, seed: int = 0) -> torch.Tensor:
    """Images whose last planes have so many columns and rows."""
    generator = torch.Generator().manual_seed(seed)
    size = (4 * stride * n_ for n_ in (columns if rows is None else rows, columns))
    return torch.randn(n, 3, *size, generator=generator)


def beside(engine: SparseModule) -> int:
    """How many images its late layers take side by side."""
    abreast = engine._network.plan.abreast
    return abreast.images if abreast else 1


@given(
    columns=st.integers(1, 7),
    rows=st.integers(1, 9),
    stride=st.sampled_from([1, 2]),
    kernel=st.sampled_from([1, 3, 5]),
    narrow=st.sampled_from([7, 16, 33]),
    groups=st.integers(1, 3),
    threads=st.integers(1, 3),
    sparsity=st.sampled_from([0.85, 0.97]),
    seed=st.integers(0, 3),
)
@settings(max_examples=28, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_batch_is_answered_as_by_torch(
    columns: int, rows: int, stride: int, kernel: int, narrow: int, groups: int, threads: int, sparsity: float, seed: int
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    network = pruned(Stages(stride, 24, narrow, kernel), sparsity)
    lanes = native.current_isa().lanes
    n = groups * threads * max(lanes // 2, 1)
    x = images(n, columns, rows, stride, seed)
    engine = explorer.compile(network, x, threads=threads)
    with torch.no_grad():
        wanted = network(x)
    for count in {n, 1, 2, max(n - 1, 1), max(n // 2, 1)}:
        assert relative_error(engine(x[:count]), wanted[:count]) < 1e-5
    # What lies elsewhere, and what does not lie as it should.
    assert relative_error(engine(x.flip(0)), wanted.flip(0)) < 1e-5
    strided = x.transpose(2, 3).contiguous().transpose(2, 3)
    assert relative_error(engine(strided), wanted) < 1e-5


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_every_instruction_set_puts_images_side_by_side(
    isa: str, precision: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute_in(isa, precision, monkeypatch)
    torch.manual_seed(0)
    network, x = pruned(Stages(), 0.9), images(16, 1, 3)
    engine = explorer.compile(network, x, precision=precision)
    lanes = engine._network.isa.lanes
    assert beside(engine) == lanes // 2
    assert relative_error(engine(x), network(x)) < (1e-5 if precision == "fp32" else 2e-2)


@pytest.mark.parametrize("order", [LAYERS, BANDS, ALONE, ALONE_BY_BANDS])
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("narrow", [7, 20])
def test_in_every_order(
    order: str, threads: int, narrow: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("EXPLORER_CACHE", str(tmp_path))  # no division is known
    taken = []

    def this_one(network: Execution, *_: Any) -> None:
        assert network.steps is not None
        taken.append(order in network.steps.chains)
        network.use_order(network.steps, order if taken[-1] else LAYERS)

    def apart(graph: Graph, inputs: tuple[Any, ...], threads: int, mode: Any, isa: Any) -> SparseModule:
        return SparseModule(graph, inputs, threads, mode, isa)

    monkeypatch.setattr(compilation, "_divided", apart)
    monkeypatch.setattr(plan_module, "l2_bytes", lambda: 1)
    monkeypatch.setattr(choosing, "_find_order", this_one)
    torch.manual_seed(0)
    network, x = pruned(Stages(narrow=narrow), 0.9), images(24, widest())
    engine = explorer.compile(network, x, threads=threads)
    assert beside(engine) > 1
    assert taken[-1] or (threads == 1 and order in (ALONE, ALONE_BY_BANDS))
    for n in (24, 1, 3, 24, 7, 23, *[24] * 10):
        assert relative_error(engine(x[:n]), network(x[:n])) < 1e-5
    # What the layers took is told for each of them, in whatever order they ran.
    rows = {row.name: row for row in engine.profile(x)}
    assert all(
        rows[name].ms > 0 for name in ("first", "early.spread", "entry.spread", "late.spread", "classify")
    )


@pytest.mark.parametrize("threads", [1, 2])
def test_whatever_lay_in_its_memory(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    take_all_for_unclean(monkeypatch)
    torch.manual_seed(0)
    network, x = pruned(Stages(), 0.9), images(8, widest())
    engine = explorer.compile(network, x, threads=threads)
    assert beside(engine) > 1
    for n in (8, 1, 3, 8):
        assert fill_with_nan(engine) > 0
        assert relative_error(engine(x[:n]), network(x[:n])) < 1e-5


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_an_image_does_not_feel_its_neighbour(bad: float) -> None:
    torch.manual_seed(0)
    network, x = pruned(Stages(), 0.9), images(8, widest())
    engine = explorer.compile(network, x)
    assert beside(engine) > 1
    with torch.no_grad():
        wanted = network(x)
    for spoiled in range(8):
        y = x.clone()
        y[spoiled] = bad
        found = engine(y)
        others = [i for i in range(8) if i != spoiled]
        assert relative_error(found[others], wanted[others]) < 1e-5
    assert relative_error(engine(x), wanted) < 1e-5
    # Of fewer images, what an earlier call left beside them counts for nothing.
    engine(torch.full_like(x, bad))
    assert relative_error(engine(x[:1]), wanted[:1]) < 1e-5


def test_new_weights_also_with_fewer_zeros() -> None:
    torch.manual_seed(0)
    x = images(8, widest())
    networks = [pruned(Stages(), sparsity) for sparsity in (0.9, 0.5, 0.0, 0.95)]
    engine = explorer.compile(networks[0], x, threads=2)
    assert beside(engine) > 1
    for network in networks:
        for choose in (True, False):
            engine.update_weights(network, choose=choose)
            assert relative_error(engine(x), network(x)) < 1e-5
            assert relative_error(engine(x[:3]), network(x[:3])) < 1e-5


def test_a_profile_counts_each_layer_once_for_each_image() -> None:
    torch.manual_seed(0)
    network, columns = pruned(Stages(), 0.9), widest()
    x = images(8, columns)
    engine = explorer.compile(network, x)
    rows = {row.name: row for row in engine.profile(x) if row.kind == "conv"}
    pixels = {"first": 16, "early.spread": 4, "entry.spread": 1, "late.spread": 1, "late.expand": 1}
    weights = dict(network.named_parameters())
    for name, more in pixels.items():
        assert rows[name].macs == 8 * more * columns**2 * weights[f"{name}.weight"].numel(), name
    assert len([row for row in engine.profile(x) if row.name == "late.expand"]) == 1


class Gated(Stages):
    """A value of each channel, of each image, multiplies the last planes."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.late(self.entry(self.early(torch.relu(self.first(x)))))
        return self.classify((x * torch.sigmoid(x.mean((2, 3), keepdim=True))).mean((2, 3)))


class Features(Stages):
    """The last planes come out, too."""

    def forward(self, x: torch.Tensor) -> Any:
        x = self.late(self.entry(self.early(torch.relu(self.first(x)))))
        return x, self.classify(x.mean((2, 3)))


class Pooled(Stages):
    """What looks at columns stands between the last layers."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.entry(self.early(torch.relu(self.first(x))))
        x = nn.functional.max_pool2d(x, 3, 1, 1)
        return self.classify(self.late(x).mean((2, 3)))


@pytest.mark.parametrize("kind", [Gated, Features, Pooled])
def test_what_is_not_the_same_for_images_side_by_side_stays_alone(kind: type[Stages]) -> None:
    torch.manual_seed(0)
    network, x = pruned(kind(), 0.9), images(8, widest())
    engine = explorer.compile(network, x)
    assert beside(engine) == 1
    with torch.no_grad():
        found, wanted = engine(x), network(x)
    for a, b in zip(found, wanted, strict=True):
        assert relative_error(a, b) < 1e-5


def test_where_nothing_is_gained_images_stay_alone() -> None:
    torch.manual_seed(0)
    lanes = native.current_isa().lanes
    for columns, n, sparsity in ((lanes, 8, 0.9), (widest(), 7, 0.9), (widest(), 8, 0.5)):
        network, x = pruned(Stages(), sparsity), images(n, columns)
        engine = explorer.compile(network, x)
        assert beside(engine) == 1, (columns, n, sparsity)
        assert relative_error(engine(x), network(x)) < 1e-5


def test_the_order_of_turns() -> None:
    torch.manual_seed(0)
    engine = explorer.compile(pruned(Stages(), 0.9), images(8, widest()))
    plan, graph = engine._network.plan, engine._network.graph
    assert plan.abreast is not None
    assert find(graph, engine._network.isa.lanes) == plan.abreast
    # Of what the turns leave, there are more images than of anything else: it shares memory with nothing.
    starts = [home.start for home in plan.places.values()]
    assert plan.abreast.entries
    assert all(starts.count(plan.places[entry].start) == 1 for entry in plan.abreast.entries)
    steps = [(graph.operations[plan.native[step]], turn) for step, turn in plan.order(graph)]
    # Everything that a step reads of its turn, or of all, has been written.
    written: set[tuple[str, int]] = set()
    every = range(plan.abreast.images)
    for operation, turn in steps:
        mine = every if turn is None else (turn,)
        for name in operation.inputs:
            if name not in graph.inputs and not (turn is None and operation.output not in plan.abreast.late):
                assert {(name, t) for t in mine} <= written, (operation.output, name)
        written |= {(operation.output, t) for t in mine}
    assert {output for output, _ in written} == {graph.operations[i].output for i in plan.native}
