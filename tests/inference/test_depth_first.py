"""Layers run band by band: whatever lies in the same memory, the answers are those of layer by layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import nn

import explorer
from explorer.inference import choosing
from explorer.inference import plan as plan_module
from explorer.inference.depth_first import Access, Bands, Step, order
from explorer.inference.execution import Execution
from explorer.inference.kernels import depthwise
from explorer.inference.module import SparseModule
from explorer.inference.orders import ALONE, BANDS, LAYERS
from tests.inference.graphs import relative_error, take_order
from tests.inference.test_kernels import ISAS, compute_in
from tests.inference.test_networks import pruned
from tests.inference.test_shared_memory import Narrowing, fill_with_nan, take_all_for_unclean
from tests.inference.test_tiles import Bottlenecks, Separable

PIXELS = 24


@st.composite
def steps(draw: st.DrawFn) -> list[Step]:
    """Steps in a few memories, in each of which tensors lie in one of two ways; bands go from top to bottom and may overlap."""

    def access(bands: int) -> Access:
        low = sorted(draw(st.lists(st.integers(0, PIXELS - 1), min_size=bands, max_size=bands)))
        intervals = [(a, draw(st.integers(a + 1, PIXELS))) for a in low]
        memory, way = draw(st.integers(0, 3)), draw(st.integers(0, 1))
        return Access(memory, (way,), np.array(intervals))

    found = []
    for _ in range(draw(st.integers(1, 5))):
        bands = draw(st.integers(1, 6))
        found.append(Step(tuple(access(bands) for _ in range(draw(st.integers(0, 2)))), access(bands)))
    return found


def run(
    steps: list[Step], bands: list[tuple[int, int]]
) -> tuple[NDArray[np.int64], dict[tuple[int, int], int]]:
    """The memories after these bands, each of which writes a number made from what it read; and that number."""
    places = {0: np.arange(PIXELS), 1: np.random.default_rng(0).permutation(PIXELS)}
    memories, made = np.arange(4 * PIXELS).reshape(4, PIXELS), {}
    for s, band in bands:
        seen = [s, band]
        for read in steps[s].reads:
            low, high = read.intervals[band]
            seen += memories[read.memory, places[read.alike[0]][low:high]].tolist()
        made[s, band] = hash(tuple(seen))
        low, high = steps[s].writes.intervals[band]
        memories[steps[s].writes.memory, places[steps[s].writes.alike[0]][low:high]] = made[s, band]
    return memories, made


@given(steps())
@settings(max_examples=400, deadline=None)
def test_no_band_sees_or_leaves_anything_else_than_layer_by_layer(steps: list[Step]) -> None:
    one_by_one = [(s, band) for s, step in enumerate(steps) for band in range(len(step))]
    found = order(steps)
    assert sorted(found) == one_by_one
    (memory, made), (wanted_memory, wanted_made) = run(steps, found), run(steps, one_by_one)
    assert made == wanted_made
    assert np.array_equal(memory, wanted_memory)


def test_the_last_layer_begins_as_soon_as_it_can() -> None:
    cuts = np.stack([np.arange(0, 40, 10), np.arange(10, 50, 10)], 1)
    halo = cuts + np.array([-1, 1])  # as of a window of three
    a, b, c = (Access(memory, (), cuts) for memory in range(3))
    layers = [Step((), a), Step((Access(0, (), halo),), b), Step((Access(1, (), halo),), c)]
    assert order(layers)[:6] == [(0, 0), (0, 1), (1, 0), (0, 2), (1, 1), (2, 0)]


def test_who_reads_only_zeros_waits_for_the_first_band_with_which_they_are_made() -> None:
    cuts = np.stack([np.arange(0, 40, 10), np.arange(10, 50, 10)], 1)
    a, b = (Access(memory, (), cuts) for memory in range(2))
    layers = [
        Step((), a),
        Step((Access(0, (), cuts - 30),), b),
    ]  # as of a filter of one tap with as much padding
    assert order(layers) == [(0, 0), (1, 0), (1, 1), (1, 2), (1, 3), (0, 1), (0, 2), (0, 3)]


# ---- networks, every layer of which is too large for the cache


@pytest.fixture(autouse=True)
def no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module, "l2_bytes", lambda: 0)
    take_order(monkeypatch, BANDS)


def in_chains(engine: SparseModule) -> int:
    """Steps that run in chains."""
    steps = engine._network.steps
    assert steps is not None
    return sum(chain.last - chain.first for chain in steps.chains[steps.order])


@given(
    rows=st.integers(6, 40),
    columns=st.integers(6, 40),
    channels=st.sampled_from([8, 18, 33]),
    narrow=st.sampled_from([4, 9]),
    images=st.integers(1, 4),
    threads=st.integers(1, 2),
    mode=st.sampled_from(["auto", "dense", "sparse"]),
    pairs=st.booleans(),
)
@settings(
    max_examples=20,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
def test_bottlenecks_of_any_size_equal_torch(
    rows: int, columns: int, channels: int, narrow: int, images: int, threads: int, mode: str, pairs: bool
) -> None:
    torch.manual_seed(rows * columns)
    network = pruned(Bottlenecks(channels, narrow), 0.8, pairs=pairs)
    x = torch.randn(images, 3, rows, columns)
    engine = explorer.compile(network, x, threads=threads, sparse=mode)
    assert (in_chains(engine) > 0) == (images >= threads)
    for n in (images, images, 1):
        assert relative_error(engine(x[:n]), network(x[:n])) < 1e-5


@given(
    rows=st.integers(6, 60),
    columns=st.integers(6, 60),
    size=st.sampled_from([1, 2, 3, 5]),
    padding=st.integers(0, 3),
    images=st.integers(1, 3),
    threads=st.integers(1, 2),
)
@settings(
    max_examples=20,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
def test_filters_of_each_channel_equal_torch(
    rows: int, columns: int, size: int, padding: int, images: int, threads: int
) -> None:
    torch.manual_seed(rows * columns)
    network, x = pruned(Separable(20, size, padding), 0.7), torch.randn(images, 3, rows, columns)
    engine = explorer.compile(network, x, threads=threads)
    for n in {images, 1}:
        assert relative_error(engine(x[:n]), network(x[:n])) < 1e-5


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("groups", [1, 20])
def test_rows_that_read_only_padding_find_zeros_there(
    stride: int, groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_all_for_unclean(monkeypatch)
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 20, 1), nn.ReLU(), nn.Conv2d(20, 20, 1, stride, 3, groups=groups), nn.ReLU(), nn.Conv2d(20, 20, 1)
    ).eval()  # fmt: skip
    x = torch.randn(1, 3, 53, 53)
    engine = explorer.compile(network, x)
    # With AVX-512 a filter of each channel that reads nothing to the right of a pixel has no bands.
    has_bands = groups == 1 or stride > 1 or depthwise.loads_taps(engine._network.isa)
    assert in_chains(engine) > 2 or not has_bands
    assert fill_with_nan(engine)
    assert relative_error(engine(x), network(x)) < 1e-5


class Strided(nn.Module):
    """Windows of all sizes and strides, one behind the other, from an image."""

    def __init__(self, stride: int, size: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 24, size, stride, size // 2)
        self.filter = nn.Conv2d(24, 24, 3, (stride, 1), 1, groups=24)
        self.wide = nn.Conv2d(24, 12, 3, 1, 2, dilation=2)
        self.last = nn.Conv2d(12, 5, (1, size), (1, stride))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.relu6(self.filter(torch.relu(self.stem(x))))
        return self.last(torch.relu(self.wide(x)))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("fp16", 2e-2)])
@pytest.mark.parametrize(("stride", "size"), [(1, 3), (2, 3), (2, 7), (3, 5), (5, 5)])
def test_windows_of_all_sizes_and_strides_equal_torch(
    isa: str, precision: str, tolerance: float, stride: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute_in(isa, precision, monkeypatch)
    torch.manual_seed(0)
    network, x = pruned(Strided(stride, size), 0.7), torch.randn(2, 3, 61, 83)
    engine = explorer.compile(network, x, threads=2, precision=precision)
    assert in_chains(engine) >= 4
    for n in (2, 1):
        assert relative_error(engine(x[:n]), network(x[:n])) < tolerance


class Mixed(nn.Module):
    """Filters of two sizes between 1 x 1 convolutions, on both sides of a maximum: planes alike but for the zeros around them, in the same memory."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, channels, 1)
        self.small, self.large = (
            nn.Sequential(
                *[
                    nn.Conv2d(channels, channels, *shape, groups=groups)
                    for shape, groups in [((size, 1, size // 2), channels), ((1,), 1)] * 2
                ]
            )
            for size in (3, 5)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.large(nn.functional.max_pool2d(self.small(self.first(x)), 3, 1, 1))


@pytest.mark.parametrize("columns", [14, 29])
@pytest.mark.parametrize("rows", [14, 30, 45])
def test_planes_that_share_memory_but_begin_elsewhere_are_not_taken_for_alike(
    rows: int, columns: int
) -> None:
    torch.manual_seed(rows)
    network, x = pruned(Mixed(24), 0.7), torch.randn(1, 3, rows, columns)
    engine = explorer.compile(network, x)
    assert in_chains(engine) >= 6
    found: dict[tuple[Any, ...], set[int]] = {}
    assert engine._network.steps is not None
    for operation in engine._network.graph.operations:
        home = engine._network.plan.places[operation.output]
        none = np.zeros((1, 2), np.int64)
        one = Bands((), (none,) * len(engine._network.plan.operands(operation)), none)
        step = engine._network.plan.native.index(engine._network.graph.operations.index(operation))
        access = engine._network.plan.accesses(engine._network.graph, step, one).writes
        found.setdefault((access.memory, access.alike), set()).add(home.address)
    assert all(len(addresses) == 1 for addresses in found.values())
    assert relative_error(engine(x), network(x)) < 1e-5


def test_weights_are_taken_over_and_layers_are_still_timed_one_by_one() -> None:
    torch.manual_seed(0)
    sparse, dense = pruned(Bottlenecks(32, 16), 0.9), Bottlenecks(32, 16).eval()
    x = torch.randn(1, 3, 96, 96)
    engine = explorer.compile(sparse, x)
    assert in_chains(engine) >= 8
    for network in (dense, sparse):
        engine.update_weights(network)
        assert relative_error(engine(x), network(x)) < 1e-5
    rows = {row.name: row for row in engine.profile(x)}
    for name in ("a", "reduce", "spread", "expand", "reduce2", "spread2", "expand2", "short"):
        assert rows[name].ms > 0, name
    # Nine times the products of the layer before, of the same sparsity and on as many pixels.
    assert rows["spread"].ms > rows["reduce"].ms


@pytest.mark.usefixtures("measured_as_users_have_it")
@pytest.mark.parametrize("faster", [BANDS, LAYERS])
def test_the_faster_order_is_taken_and_remembered(
    faster: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(plan_module, "l2_bytes", lambda: 0)
    monkeypatch.setenv("EXPLORER_CACHE", str(tmp_path))
    asked = []
    measured = choosing._fastest_order

    def answer(*given: Any) -> str:
        assert measured(*given) in (BANDS, LAYERS)
        asked.append(faster)
        return faster

    monkeypatch.setattr(choosing, "_fastest_order", answer)
    torch.manual_seed(0)
    network, other = pruned(Bottlenecks(32, 16), 0.9), pruned(Bottlenecks(32, 16), 0.8)
    x = torch.randn(2, 3, 48, 48)
    first = engine = explorer.compile(network, x)
    for again in (False, True):  # the second time without timing
        engine = explorer.compile(network, x) if again else first
        steps = engine._network.steps
        assert steps is not None
        assert asked == [faster]
        assert steps.order == faster
        # Known to be slower, nothing is cut into bands.
        assert (BANDS in steps.chains) == (faster == BANDS or engine is first)
        chains = steps.chains.get(BANDS, [])
        used = [steps.table[part.first, 1] == part.row[0] for part in chains]
        assert used == [faster == BANDS] * len(chains)
        for n in (2, 1, 2):
            assert relative_error(engine(x[:n]), network(x[:n])) < 1e-5
    engine.update_weights(other, choose=False)
    assert engine._network.steps is not None
    assert engine._network.steps.order == faster
    assert relative_error(engine(x), other(x)) < 1e-5


@pytest.mark.usefixtures("measured_as_users_have_it")
def test_while_other_work_slows_runs_down_more_of_them_say_which_order_is_faster(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(plan_module, "l2_bytes", lambda: 0)
    monkeypatch.setenv("EXPLORER_CACHE", str(tmp_path))
    monkeypatch.setattr(choosing, "_ORDERS_S", 0.0)
    runs = dict.fromkeys((BANDS, LAYERS), 0)

    def seconds(*given: Any) -> float:
        order = given[-1]
        runs[order] += 1
        # Bands are faster. Other work, never twice the same, meets their first four runs.
        disturbance = 10.0 + 7 * runs[order] if order == BANDS and runs[order] <= 4 else 0.0
        return {BANDS: 1.0, LAYERS: 2.0}[order] + disturbance

    monkeypatch.setattr(choosing, "_seconds", seconds)
    torch.manual_seed(0)
    engine = explorer.compile(pruned(Bottlenecks(32, 16), 0.9), torch.randn(2, 3, 48, 48))
    assert runs == dict.fromkeys(runs, 6)  # until the fastest time of bands has come twice
    assert engine._network.steps is not None
    assert engine._network.steps.order == BANDS


def test_what_the_cache_holds_is_computed_layer_by_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    network, x = pruned(Bottlenecks(16, 8), 0.8), torch.randn(1, 3, 32, 31)
    monkeypatch.setattr(plan_module, "l2_bytes", lambda: 1 << 20)
    engine = explorer.compile(network, x)
    assert in_chains(engine) == 0
    assert relative_error(engine(x), network(x)) < 1e-5


@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("size", [(30, 33), (56, 28)])
def test_bands_find_zeros_around_images_whatever_lay_there(
    size: tuple[int, int], images: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_all_for_unclean(monkeypatch)
    torch.manual_seed(0)
    network, x = pruned(Narrowing(), 0.6), torch.randn(images, 3, *size)
    engine = explorer.compile(network, x)
    assert in_chains(engine) > 0
    with torch.no_grad():
        for n in (images, 1):
            fill_with_nan(engine)
            assert relative_error(engine(x[:n]), network(x[:n])) < 1e-5


class Late(nn.Module):
    """A second input that is read after the first has been worked on."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.b(torch.relu(self.a(x)) + y)


def test_no_thread_goes_alone_past_an_input_that_is_not_there_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    offered: list[str] = []

    def alone(network: Execution, *_: Any) -> None:
        assert network.steps is not None
        offered.extend(network.steps.chains)
        network.use_order(network.steps, next((o for o in (ALONE,) if o in network.steps.chains), LAYERS))

    monkeypatch.setattr(choosing, "_find_order", alone)
    torch.manual_seed(0)
    network = Late().eval()
    engine = explorer.compile(network, (torch.randn(4, 3, 9, 9), torch.randn(4, 8, 9, 9)), threads=2)
    assert LAYERS in offered
    for _ in range(3):
        x, y = torch.randn(4, 3, 9, 9), torch.randn(4, 8, 9, 9)
        assert relative_error(engine(x, y), network(x, y)) < 1e-5
