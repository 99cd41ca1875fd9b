"""Tensors that lie in the same memory one after the other: nothing that one leaves there may be taken for the zeros around another."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import explorer
from explorer.inference import native
from explorer.inference.kernels import zero_gaps
from explorer.inference.layout import Planes
from explorer.inference.memory import address
from explorer.inference.module import SparseModule
from explorer.inference.plan import Plan
from explorer.inference.steps import zeroing_arguments
from tests.inference.graphs import relative_error
from tests.inference.test_architectures_native import ARCHITECTURES, build, example
from tests.inference.test_kernels import ISAS, compute_in
from tests.inference.test_networks import pruned
from tests.inference.test_partners import needs_code


def memory_of(layout: Planes, start: int) -> Any:
    """All that a tensor occupies, as an array."""
    size = layout.element_bytes * layout.elements
    return np.frombuffer((ctypes.c_char * size).from_address(start), f"f{layout.element_bytes}")


def fill_with_nan(engine: SparseModule) -> int:
    """Overwrite all memory in which tensors of any shape lie; how many they are."""
    plan = engine._network.plan
    shared = plan._may_share(engine._network.graph)
    kept = {home.start for place, home in plan.places.items() if place not in shared}
    shared = {place for place in shared if plan.places[place].start not in kept}
    for home in (plan.places[place] for place in shared):
        assert isinstance(home.layout, Planes)
        memory_of(home.layout, home.start)[:] = np.nan
    return len(shared)


def take_all_for_unclean(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever needs zeros around it has them made, also where the tensor before it would leave them."""

    def every(plan: Plan, graph: Any, _: Any) -> frozenset[str]:
        return frozenset(plan._may_share(graph) - plan._gaps_do_not_matter(graph))

    monkeypatch.setattr(Plan, "_find_unclean", every)


# ---- zeroing


@needs_code
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 40),
    gap=st.integers(0, 5),
    above=st.integers(0, 2),
    channels=st.integers(1, 4),
    images=st.integers(1, 3),
    more=st.integers(0, 2),
    fills=st.booleans(),
    size=st.sampled_from([2, 4]),
    pieces=st.integers(1, 3),
)
@settings(deadline=None, max_examples=35)
def test_what_lies_around_pixels_is_zeroed_and_nothing_else(
    rows: int,
    columns: int,
    gap: int,
    above: int,
    channels: int,
    images: int,
    more: int,
    fills: bool,
    size: int,
    pieces: int,
) -> None:
    isa = native.current_isa().single
    lanes, pitch = isa.lanes, columns + gap
    guard = max(above * pitch + gap, 1)
    plane = -(-(-(-rows * pitch // lanes) * lanes + guard) // lanes) * lanes
    y = Planes((), images, channels, rows, columns, pitch, plane, guard, lanes, element_bytes=size)
    if more:
        y = Planes(
            (), images, channels, rows, columns, pitch, plane, guard, lanes, element_bytes=size,
            apart=y.before + y.image + (more - 1) * lanes,
        )  # fmt: skip
    memory = np.ones(y.elements, f"f{size}")
    first = address(memory) + size * y.before
    arguments = np.ascontiguousarray(zeroing_arguments(y, first, pieces, fills=fills))
    code = native.machine_code(isa, zero_gaps.ZeroGapsKernel())
    run = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p)(code)
    for job in range(images * pieces):
        run(address(arguments), job, None)
    np.testing.assert_array_equal(memory, zero_gaps.reference(y, fills=fills))


# ---- networks


@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_architecture_is_right_whatever_lay_in_its_memory(
    name: str, images: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_all_for_unclean(monkeypatch)
    network, x = build(name, 0.8), example(ARCHITECTURES[name][1], images)
    engine = explorer.compile(network, x, threads=1 + images // 2)
    assert fill_with_nan(engine) >= 1
    with torch.no_grad():
        for n in (images, 1):
            assert relative_error(engine(x[:n]), network(x[:n])) < 1e-4
            fill_with_nan(engine)


class Narrowing(nn.Module):
    """Convolutions, filters of each channel and pools, with a border or without, whose images become smaller and have gaps of all sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 12, 3, padding=1)
        self.filter = nn.Conv2d(12, 12, 5, padding=2, groups=12)
        self.down = nn.Conv2d(12, 20, 3, 2, 1)
        self.point = nn.Conv2d(20, 24, 1)
        self.filter_down = nn.Conv2d(24, 24, 3, 2, 1, groups=24)
        self.wide = nn.Conv2d(24, 16, (1, 5), padding=(0, 2))
        self.last = nn.Conv2d(16, 8, 3, padding=2, dilation=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.filter(torch.relu(self.first(x))))
        x = nn.functional.avg_pool2d(torch.sigmoid(self.down(x)), 3, 1, 1)
        x = self.filter_down(nn.functional.relu6(self.point(x)))
        x = nn.functional.max_pool2d(self.wide(x), 2, 1)
        return self.last(x + torch.tanh(x)).mean((2, 3))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("fp16", 2e-2)])
@pytest.mark.parametrize("size", [(30, 33), (56, 28)])
@pytest.mark.parametrize("sparse", ["dense", "sparse"])
def test_layers_of_many_kinds_are_right_whatever_lay_in_their_memory(
    isa: str,
    precision: str,
    tolerance: float,
    size: tuple[int, int],
    sparse: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    take_all_for_unclean(monkeypatch)
    compute_in(isa, precision, monkeypatch)
    torch.manual_seed(0)
    network, x = pruned(Narrowing(), 0.6), torch.randn(3, 3, *size)
    engine = explorer.compile(network, x, threads=2, precision=precision, sparse=sparse)
    assert fill_with_nan(engine) >= 6
    with torch.no_grad():
        for n in (3, 1):
            assert relative_error(engine(x[:n]), network(x[:n])) < tolerance
            fill_with_nan(engine)


@given(
    rows=st.integers(9, 40), columns=st.integers(9, 40), images=st.integers(1, 3), threads=st.integers(1, 3)
)
@settings(deadline=None, max_examples=20)
def test_tensors_in_one_memory_are_right_image_for_image(
    rows: int, columns: int, images: int, threads: int
) -> None:
    torch.manual_seed(rows * columns)
    network, x = pruned(Narrowing(), 0.6), torch.randn(images, 3, rows, columns)
    engine = explorer.compile(network, x, threads=threads)
    with torch.no_grad():
        for n in (images, 1, images):  # what the first call left behind is in the way of the second
            assert relative_error(engine(x[:n]), network(x[:n])) < 1e-5


@needs_code
def test_tensors_of_different_shapes_lie_in_the_same_memory() -> None:
    network, x = Narrowing().eval(), torch.randn(1, 3, 56, 56)
    plan = explorer.compile(network, x)._network.plan
    homes = [home for home in plan.places.values() if isinstance(home.layout, Planes)]
    shapes: dict[int, set[Any]] = {}
    for home in homes:
        shapes.setdefault(home.start, set()).add(home.layout.reuse_key)
    assert max(map(len, shapes.values())) >= 3
    largest = max(home.layout.n_bytes for home in homes)
    # No more than two large tensors are alive at a time.
    assert plan.memory.n_bytes < 3.2 * largest


def test_gaps_are_zeroed_where_the_tensor_before_may_have_left_something() -> None:
    network, x = Narrowing().eval(), torch.randn(1, 3, 56, 56)
    engine = explorer.compile(network, x)
    plan, graph = engine._network.plan, engine._network.graph
    harmless = plan._gaps_do_not_matter(graph)
    unclean = plan.unclean
    assert unclean
    assert not unclean & harmless
    # Two images in a row whose zeros lie alike: what the one leaves serves the other, if it has as many channels.
    twice = nn.Sequential(*(nn.Conv2d(8, 8, 3, padding=1) for _ in range(6))).eval()
    assert not explorer.compile(twice, torch.randn(1, 8, 20, 20))._network.plan.unclean
    wider = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.MaxPool2d(3, 1, 1), *twice).eval()
    assert explorer.compile(wider, torch.randn(1, 3, 20, 20))._network.plan.unclean


@needs_code
@pytest.mark.parametrize("size", [(30, 33), (56, 28)])
def test_different_images_of_tensors_in_one_memory_never_meet(size: tuple[int, int]) -> None:
    """Each image may go its way at its own pace: what is written, or zeroed, for one must not be another's."""
    plan = explorer.compile(Narrowing().eval(), torch.randn(3, 3, *size))._network.plan
    tenants: dict[int, list[Planes]] = {}
    for home in plan.places.values():
        if isinstance(home.layout, Planes):
            tenants.setdefault(home.start, []).append(home.layout)

    def pixels(y: Planes, image: int) -> tuple[int, int]:
        first = y.before + image * y.image
        return first, first + y.channels * (y.vectors * y.lanes if y.tile else y.plane)

    assert max(map(len, tenants.values())) >= 3
    for layouts in tenants.values():
        for a in layouts:
            for b in layouts:
                # Where both lie alike, the zeros behind one image are those in front of the next.
                before = 0 if a.reuse_key == b.reuse_key else b.guard
                for image in (0, 1):
                    assert pixels(a, image)[1] <= pixels(b, image + 1)[0] - before
