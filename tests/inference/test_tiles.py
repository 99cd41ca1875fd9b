"""Tensors that lie tile by tile between 1 x 1 convolutions: the same answers, whatever shares them, and only where all that touch them know how."""

from __future__ import annotations

import ctypes
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import explorer
from explorer.inference import native
from explorer.inference.layout import Planes
from explorer.inference.module import Mode, SparseModule
from explorer.inference.plan import Choice, Plan
from tests.inference.graphs import relative_error
from tests.inference.test_kernels import ISAS, compute_in
from tests.inference.test_networks import pruned

WIDE = native.Isa("avx512", 16, 32, "", "")


class Bottlenecks(nn.Module):
    """As in ResNet-50: 1 x 1, 3 x 3 and 1 x 1 convolutions beside a shortcut; then the same with a stride; then a mean over the image."""

    def __init__(self, channels: int, narrow: int, outputs: int = 5) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, channels, 1)
        self.reduce, self.spread, self.expand = (
            nn.Conv2d(channels, narrow, 1),
            nn.Conv2d(narrow, narrow, 3, padding=1),
            nn.Conv2d(narrow, channels, 1),
        )
        self.reduce2, self.spread2, self.expand2 = (
            nn.Conv2d(channels, narrow, 1),
            nn.Conv2d(narrow, narrow, 3, 2, 1),
            nn.Conv2d(narrow, channels, 1),
        )
        self.short = nn.Conv2d(channels, channels, 1, 2)
        self.classify = nn.Linear(channels, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.a(x))
        y = torch.relu(self.spread(torch.relu(self.reduce(x))))
        x = torch.relu(self.expand(y) + x)
        y = torch.relu(self.spread2(torch.relu(self.reduce2(x))))
        x = torch.relu(self.expand2(y) + self.short(x))
        return self.classify(x.mean((2, 3)))


def fill_gaps_with_nan(engine: SparseModule) -> int:
    """Overwrite the whole memory of tensors whose gaps nobody may count; how many there are."""
    places = engine._network.plan._gaps_do_not_matter(engine._network.graph)
    for home in (engine._network.plan.places[place] for place in places):
        memory = (ctypes.c_float * home.layout.elements).from_address(home.start)
        np.frombuffer(memory, np.float32)[:] = np.nan
    return len(places)


def in_tiles(engine: SparseModule) -> set[str]:
    """The modules whose result lies in tiles."""
    places = engine._network.plan.places
    return {
        operation.name
        for operation in engine._network.graph.operations
        if isinstance(layout := getattr(places.get(operation.output), "layout", None), Planes) and layout.tile
    }


@given(
    rows=st.integers(6, 33),
    columns=st.integers(6, 33),
    channels=st.sampled_from([8, 18, 33]),
    narrow=st.sampled_from([4, 9, 16]),
    images=st.integers(1, 3),
    threads=st.integers(1, 3),
    pairs=st.booleans(),
    mode=st.sampled_from(["auto", "sparse"]),
)
@settings(max_examples=28, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_bottlenecks_of_any_size_equal_torch(
    rows: int, columns: int, channels: int, narrow: int, images: int, threads: int, pairs: bool, mode: str
) -> None:
    torch.manual_seed(rows * columns)
    network = pruned(Bottlenecks(channels, narrow), 0.8, pairs=pairs)
    x = torch.randn(images, 3, rows, columns)
    engine = explorer.compile(network, x, threads=threads, sparse=mode)
    assert engine.fallbacks == ()
    for _ in range(2):  # a residual must not be added to in its own place
        assert relative_error(engine(x), network(x)) < 1e-5
    assert relative_error(engine(x[:1]), network(x[:1])) < 1e-5


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("fp16", 2e-2)])
def test_what_pointwise_convolutions_read_lies_in_tiles(
    isa: str, precision: str, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute_in(isa, precision, monkeypatch)
    torch.manual_seed(0)
    network, x = pruned(Bottlenecks(16, 8), 0.8), torch.randn(1, 3, 32, 31)
    engine = explorer.compile(network, x, threads=2, precision=precision)
    # 32 rows of 31 pixels and a gap are whole tiles: the input of each 3 x 3 convolution keeps its planes, and so does what is split into phases first.
    assert in_tiles(engine) >= {"a", "expand"}
    assert not in_tiles(engine) & {"reduce", "reduce2"}
    assert relative_error(engine(x), network(x)) < tolerance


class Separable(nn.Module):
    """As in MobileNet: 1 x 1 convolutions, and filters of each channel between them."""

    def __init__(self, channels: int, size: int, padding: int) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(n, channels, 1) for n in (3, channels, channels))
        self.filter = nn.Conv2d(channels, channels, size, 1, padding, groups=channels)
        self.down = nn.Conv2d(channels, channels, 3, 2, 1, groups=channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.filter(torch.relu(self.a(x))))
        return self.c(torch.relu(self.down(nn.functional.relu6(self.b(x)))))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("fp16", 2e-2)])
@pytest.mark.parametrize("size", [(32, 31), (28, 28), (14, 14), (64, 63)])
def test_what_filters_of_each_channel_write_for_pointwise_convolutions_lies_in_tiles(
    isa: str, precision: str, tolerance: float, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    compute_in(isa, precision, monkeypatch)
    torch.manual_seed(0)
    network, x = pruned(Separable(16, 3, 1), 0.8), torch.randn(2, 3, *size)
    engine = explorer.compile(network, x, threads=1, precision=precision)
    found = {operation.name: operation for operation in engine._network.graph.operations}
    for name in ("filter", "down"):
        layout = engine._network.plan.places[found[name].output].layout
        assert isinstance(layout, Planes)
        wanted = layout.in_tiles(1)
        fits = wanted is not None and not layout.is_compactable and (name == "filter" or wanted.takes_rows)
        assert bool(layout.tile) == fits
    for n in (2, 1):
        assert relative_error(engine(x[:n]), network(x[:n])) < tolerance


@pytest.mark.parametrize("stride", [2, 3, 5])
@pytest.mark.parametrize("isa", ISAS)
def test_the_phase_that_a_pointwise_convolution_reads_lies_in_tiles(
    isa: str, stride: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute_in(isa, "fp32", monkeypatch)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 1, stride), nn.ReLU()).eval()
    in_any = []
    for size in (16 * stride, 31 * stride, 14 * stride, 20 * stride + 1):
        x = torch.randn(2, 3, size, size)
        engine = explorer.compile(network, x, threads=2)
        split = next(operation for operation in engine._network.graph.operations if operation.kind == "split")
        layout = engine._network.plan.places[split.output].layout
        assert isinstance(layout, Planes)
        in_any.append(bool(layout.tile))
        for n in (2, 1):
            assert relative_error(engine(x[:n]), network(x[:n])) < 1e-5
    assert any(in_any)


@given(
    rows=st.integers(6, 40),
    columns=st.integers(6, 40),
    size=st.sampled_from([1, 2, 3, 5]),
    padding=st.integers(0, 3),
    images=st.integers(1, 3),
    threads=st.integers(1, 3),
)
@settings(max_examples=22, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_filters_of_each_channel_beside_pointwise_convolutions_equal_torch(
    rows: int, columns: int, size: int, padding: int, images: int, threads: int
) -> None:
    torch.manual_seed(rows * columns)
    network, x = pruned(Separable(20, size, padding), 0.7), torch.randn(images, 3, rows, columns)
    engine = explorer.compile(network, x, threads=threads)
    assert engine.fallbacks == ()
    for n in {images, 1}:
        assert relative_error(engine(x[:n]), network(x[:n])) < 1e-5


class Feedforward(nn.Module):
    """What surrounds the attention of a transformer: normalisation, linear layers, a smooth activation, and sums that no linear layer takes along."""

    def __init__(self, features: int, hidden: int) -> None:
        super().__init__()
        self.before = nn.Linear(features, features)
        self.norm, self.norm2 = nn.LayerNorm(features), nn.LayerNorm(features)
        self.up, self.down = nn.Linear(features, hidden), nn.Linear(hidden, features)
        self.last = nn.Linear(features, features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.before(x))
        y = self.down(nn.functional.gelu(self.up(x))) + x
        z = self.norm2(y)
        return self.last(z + torch.relu(z) * y)


@given(
    tokens=st.integers(1, 300),
    samples=st.integers(1, 3),
    features=st.sampled_from([8, 33]),
    threads=st.integers(2, 3),
)
@settings(max_examples=22, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_tokens_in_any_number_equal_torch(tokens: int, samples: int, features: int, threads: int) -> None:
    torch.manual_seed(tokens)
    network, x = pruned(Feedforward(features, 40), 0.8), torch.randn(samples, tokens, features)
    engine = explorer.compile(network, x, threads=threads)
    assert engine.fallbacks == ()
    for _ in range(2):
        assert relative_error(engine(x), network(x)) < 1e-5


@pytest.mark.parametrize("tokens", [128, 224, 256])
def test_tokens_lie_in_tiles_from_the_first_layer_to_the_last(tokens: int) -> None:
    torch.manual_seed(0)
    network, x = pruned(Feedforward(24, 40), 0.8), torch.randn(1, tokens, 24)
    engine = explorer.compile(network, x, threads=2)
    assert in_tiles(engine) >= {"before", "norm", "up", "down", "norm2"}
    assert "last" not in in_tiles(engine)
    assert relative_error(engine(x), network(x)) < 1e-5


def test_an_engine_with_tiles_takes_dense_weights_over() -> None:
    torch.manual_seed(0)
    sparse, dense = pruned(Bottlenecks(16, 8), 0.9), Bottlenecks(16, 8).eval()
    x = torch.randn(1, 3, 32, 31)
    engine = explorer.compile(sparse, x, threads=2)
    assert in_tiles(engine)
    for network in (dense, sparse):
        engine.update_weights(network)
        assert relative_error(engine(x), network(x)) < 1e-5


@pytest.mark.parametrize("pixels", [4, 7, 8, 14, 16])
def test_dense_kernels_read_and_write_tiles_too(pixels: int) -> None:
    """Channels in the lanes, where the pixels of a tile of theirs lie in one tile; else pixels in the lanes."""
    torch.manual_seed(pixels)
    sparse, dense = pruned(Bottlenecks(48, 40), 0.9), Bottlenecks(48, 40).eval()
    x = torch.randn(1, 3, 2 * pixels, pixels)
    engine = explorer.compile(sparse, x, threads=2)
    engine.update_weights(dense)
    assert relative_error(engine(x), dense(x)) < 1e-5


@pytest.mark.parametrize("pixels", [7, 14, 31])
@pytest.mark.parametrize("turn", [0, 1])
@pytest.mark.parametrize("mode", ["dense", "sparse"])
def test_what_lay_in_the_gaps_of_tiles_is_never_counted(
    pixels: int, turn: int, mode: Mode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors of other sizes used the memory before, and a dense kernel with channels in the lanes writes pixels only."""
    torch.manual_seed(pixels)
    network = pruned(Bottlenecks(48, 40), 0.7)
    x = torch.randn(1, 3, 2 * pixels, 2 * pixels)
    several = Plan.candidates

    def one(*args: Any, **named: Any) -> list[Choice]:
        found = several(*args, **named)
        return [found[turn % len(found)]]

    monkeypatch.setattr(Plan, "candidates", one)
    engine = explorer.compile(network, x, sparse=mode)
    assert fill_gaps_with_nan(engine) >= 2
    assert relative_error(engine(x), network(x)) < 1e-5


@given(
    rows=st.integers(3, 40),
    columns=st.integers(3, 40),
    size=st.sampled_from([3, 5]),
    images=st.integers(1, 2),
    threads=st.integers(1, 2),
    mode=st.sampled_from(["dense", "sparse"]),
    pairs=st.booleans(),
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_what_lay_around_an_image_does_not_matter_to_pointwise_convolutions(
    rows: int, columns: int, size: int, images: int, threads: int, mode: Mode, pairs: bool
) -> None:
    torch.manual_seed(rows * columns)
    network = pruned(Separable(20, size, size // 2), 0.7, pairs=pairs)
    x = torch.randn(images, 3, rows, columns)
    engine = explorer.compile(network, x, threads=threads, sparse=mode)
    assert fill_gaps_with_nan(engine) >= 1
    for n in (images, 1):
        assert relative_error(engine(x[:n]), network(x[:n])) < 1e-5


@pytest.mark.parametrize(
    ("size", "stride", "padding"), [(3, 2, 1), (2, 2, 0), (3, 1, 1), (5, 3, 2), (3, 5, 1)]
)
@pytest.mark.parametrize("isa", ISAS)
def test_what_lay_around_an_image_does_not_matter_to_its_maxima(
    isa: str, size: int, stride: int, padding: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It shares its memory with tensors of any shape."""
    compute_in(isa, "fp32", monkeypatch)
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 12, 3, 2, 1),
        nn.MaxPool2d(size, stride, padding),
        nn.Conv2d(12, 16, 1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 1),
    ).eval()
    x = torch.randn(2, 3, 57, 45)
    engine = explorer.compile(network, x, threads=2)
    assert fill_gaps_with_nan(engine) >= 1
    for n in (2, 1):
        assert relative_error(engine(x[:n]), network(x[:n])) < 1e-5


def test_what_torch_or_the_caller_sees_keeps_its_planes() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 3, 32, 31)

    class Seen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Conv2d(n, 8, 1) for n in (3, 8, 8))

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            y = torch.relu(self.a(x))
            z = self.b(y)
            return torch.cumsum(z, 1), torch.relu(self.c(torch.relu(z))) + y.flip(1)

    seen = pruned(Seen(), 0.8)
    engine = explorer.compile(seen, x, threads=2)
    assert not in_tiles(engine) & {"a", "b"}
    for got, wanted in zip(engine(x), seen(x), strict=True):
        assert relative_error(got, wanted) < 1e-5


@pytest.mark.parametrize(
    ("vectors", "threads", "tile"), [(14, 1, 7), (56, 1, 7), (56, 2, 7), (200, 1, 8), (4, 2, 4)]
)
def test_tiles_divide_the_plane_and_keep_all_threads_busy(vectors: int, threads: int, tile: int) -> None:
    planes = Planes((1, 3, vectors, 16), 1, 3, vectors, 16, 16, 16 * vectors + 16, 16, 16)
    tiled = planes.in_tiles(threads)
    assert tiled is not None
    assert (tiled.tile, tiled.vectors, tiled.guard) == (tile, vectors, 0)
    assert not tiled.tiles_overlap


def test_planes_that_no_tile_divides_are_left_alone() -> None:
    assert Planes((1, 3, 13, 16), 1, 3, 13, 16, 16, 256, 16, 16).in_tiles(1) is None


def test_pixels_are_found_tile_by_tile() -> None:
    """`element` and `plane` against the definition: tile, channel, vector, lane."""
    tiled = Planes((1, 3, 4, 24), 1, 3, 4, 24, 32, 160, 32, 16).in_tiles(2)
    assert tiled is not None
    assert tiled.tile == 4
    memory = np.arange(tiled.image).reshape(2, 3, 4, 16)
    for channel, row, column in product(range(3), range(4), range(24)):
        pixel = row * 32 + column
        tile, rest = divmod(pixel, 64)
        found = tiled.element(np.array(pixel)) + channel * tiled.plane
        assert found == memory[tile, channel, rest // 16, rest % 16]
    assert tiled.tile_step(4) == 4 * 3 * 64
