"""Pixels that become tokens, and tokens that become pixels: against numpy, and in networks against torch."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import explorer
from explorer.inference import native
from explorer.inference.kernels import rearrange
from explorer.inference.memory import address
from tests.inference.graphs import relative_error
from tests.inference.test_kernels import ISAS, compute_in, runnable
from tests.inference.test_partners import needs_code

Move = Callable[[Tensor], Tensor]

TO_TOKENS: dict[str, Move] = {
    "permuted": lambda x: x.permute(0, 2, 3, 1),
    "permuted, columns first": lambda x: x.permute(0, 3, 2, 1),
    "flattened, transposed": lambda x: x.flatten(2).transpose(1, 2),
    "reshaped, permuted": lambda x: x.reshape(len(x), x.shape[1], -1).permute(0, 2, 1),
    "permuted, reshaped": lambda x: x.permute(0, 2, 3, 1).reshape(len(x), -1, x.shape[1]),
    "tokens first": lambda x: x.flatten(2).permute(2, 0, 1),
    "samples last": lambda x: x.permute(2, 3, 0, 1).contiguous(),
}


class There(nn.Module):
    """A convolution whose pixels become tokens, in one way or another."""

    def __init__(self, channels: int, move: Move) -> None:
        super().__init__()
        self.conv, self.norm, self.move = nn.Conv2d(2, channels, 1), nn.LayerNorm(channels), move
        self.linear = nn.Linear(channels, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(self.move(self.conv(x))))


class AndBack(There):
    """The block of ConvNeXt: what lies between the two permutations works on tokens."""

    def __init__(self, channels: int, move: Move) -> None:
        super().__init__(channels, move)
        self.back, self.last = nn.Linear(5, channels), nn.Conv2d(channels, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        tokens = self.back(self.linear(self.norm(self.move(x))))
        n, c, h, w = x.shape
        pixels = tokens.reshape(n, h, w, c).permute(0, 3, 1, 2)
        return self.last(x + 0.5 * pixels)


class Patches(nn.Module):
    """A vision transformer's tokens: patches, constant tokens before and behind them, positions."""

    def __init__(self, tokens: int, before: int, behind: int, positions: str, channels: int = 24) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, channels, 2, 2), nn.LayerNorm(channels)
        self.linear = nn.Linear(channels, 5)
        self.first = nn.Parameter(torch.randn(1, before, channels)) if before else None
        self.last = nn.Parameter(torch.randn(1, behind, channels)) if behind else None
        shape = {"tokens": (1, tokens, channels), "all": (tokens + before + behind, channels), "no": None}[
            positions
        ]
        self.positions = None if shape is None else nn.Parameter(torch.randn(*shape))

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x).flatten(2).transpose(1, 2)
        if self.positions is not None and self.positions.dim() == 3:
            y = y + self.positions
        parts = [
            None if self.first is None else self.first.expand(len(x), -1, -1),
            y,
            None if self.last is None else self.last.expand(len(x), -1, -1),
        ]
        present = [part for part in parts if part is not None]
        y = torch.cat(present, 1) if len(present) > 1 else y
        if self.positions is not None and self.positions.dim() == 2:
            y = self.positions + y
        return self.linear(self.norm(y))


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def check(
    engine: explorer.inference.SparseModule, network: nn.Module, x: Tensor, tolerance: float = 1e-5
) -> None:
    with torch.no_grad():
        for n in (len(x), 1):
            assert relative_error(engine(x[:n]), network(x[:n])) < tolerance


@needs_code
@given(
    move=st.sampled_from([*TO_TOKENS]),
    back=st.booleans(),
    images=st.integers(1, 3),
    channels=st.integers(1, 21),
    size=st.tuples(st.integers(1, 20), st.integers(1, 37)),
    threads=st.integers(1, 2),
)
@settings(max_examples=40, deadline=None)
def test_pixels_and_tokens_change_places_as_in_torch(
    move: str, back: bool, images: int, channels: int, size: tuple[int, int], threads: int
) -> None:
    torch.manual_seed(0)
    back = back and move in ("permuted", "flattened, transposed", "reshaped, permuted", "permuted, reshaped")
    network = (AndBack if back else There)(channels, TO_TOKENS[move]).eval()
    x = noise(images, 2, *size)
    engine = explorer.compile(network, x, threads=threads)
    if channels > 1 and size[0] > 1 and size[1] > 1:
        assert engine.fallbacks == ()
    if move in ("tokens first", "samples last"):  # the batch is no first axis of the answer: no smaller ones
        with torch.no_grad():
            assert relative_error(engine(x), network(x)) < 1e-5
    else:
        check(engine, network, x)


@needs_code
@given(
    size=st.tuples(st.integers(1, 9), st.integers(1, 20)),
    images=st.integers(1, 3),
    before=st.integers(0, 2),
    behind=st.integers(0, 2),
    positions=st.sampled_from(["no", "tokens", "all"]),
)
@settings(max_examples=30, deadline=None)
def test_tokens_that_come_from_no_pixel_and_positions_come_along(
    size: tuple[int, int], images: int, before: int, behind: int, positions: str
) -> None:
    torch.manual_seed(0)
    network = Patches(size[0] * size[1], before, behind, positions).eval()
    x = noise(images, 3, 2 * size[0], 2 * size[1])
    engine = explorer.compile(network, x)
    if size[0] > 1 and size[1] > 1:
        assert engine.fallbacks == ()
    check(engine, network, x)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.25
    engine.update_weights(network)
    check(engine, network, x)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_on_every_instruction_set(isa: str, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compute_in(isa, precision, monkeypatch)
    torch.manual_seed(0)
    tolerance = 1e-5 if precision == "fp32" else 2e-2
    for network, x in (
        (AndBack(19, TO_TOKENS["permuted"]), noise(2, 2, 7, 30)),
        (Patches(7 * 9, 1, 0, "all"), noise(3, 3, 14, 18)),
    ):
        engine = explorer.compile(network.eval(), x, precision=precision)  # type: ignore[arg-type]
        assert engine.precision == precision
        assert engine.fallbacks == ()
        check(engine, network, x, tolerance)


@needs_code
@pytest.mark.parametrize(
    "change",
    [
        lambda _, y: torch.cat([y.mean(1, keepdim=True), y], 1),  # a token that is no constant
        lambda m, y: torch.cat([m.first.expand(len(y), -1, -1), y], 1) + y.sum(),
        lambda m, y: y + m.first.detach().repeat(len(y), 1, 1),
        lambda _, y: y + torch.arange(len(y)).float().reshape(-1, 1, 1),  # another constant for each sample
        lambda m, y: torch.add(y, m.first[:, :1], alpha=2),
        lambda m, y: y + torch.cat([m.first.expand(3, -1, -1), y], 1)[:, : y.shape[1]],  # read twice
        lambda _, y: y.flip(1),
        lambda _, y: y[:, 1:],
    ],
)
def test_what_is_anything_else_is_left_to_torch(change: Callable[[nn.Module, Tensor], Tensor]) -> None:
    class Other(Patches):
        def forward(self, x: Tensor) -> Tensor:
            return self.linear(self.norm(change(self, self.conv(x).flatten(2).transpose(1, 2))))

    torch.manual_seed(0)
    network, x = Other(12, 1, 0, "no").eval(), noise(3, 3, 6, 8)
    with torch.no_grad():
        assert relative_error(explorer.compile(network, x)(x), network(x)) < 1e-5


@needs_code
@given(
    samples=st.integers(1, 4),
    tokens=st.integers(1, 20),
    features=st.integers(2, 40),
    index=st.integers(-20, 19),
    threads=st.integers(1, 2),
)
@settings(max_examples=30, deadline=None)
def test_one_token_of_each_sample_is_taken(
    samples: int, tokens: int, features: int, index: int, threads: int
) -> None:
    class Pooler(nn.Module):
        """The end of BERT and of a ViT."""

        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = nn.LayerNorm(features), nn.Linear(features, 5)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = self.norm(x)
            return self.linear(x[:, index % tokens]), x[:, -1]

    torch.manual_seed(0)
    network, x = Pooler().eval(), noise(samples, tokens, features)
    engine = explorer.compile(network, x, threads=threads)
    assert engine.fallbacks == ()
    with torch.no_grad():
        for n in (samples, 1):
            for found, wanted in zip(engine(x[:n]), network(x[:n]), strict=True):
                assert relative_error(found, wanted) < 1e-5


def test_the_numpy_twin_is_torchs_permutation() -> None:
    x = noise(2, 3, 4, 5)
    pixels = np.arange(2 * 4 * 5)
    wanted = x.permute(1, 0, 2, 3).reshape(3, -1)
    np.testing.assert_array_equal(rearrange.reference(x.reshape(2, 3, -1).numpy(), pixels), wanted.numpy())
    before = np.concatenate([np.full((2, 1), -1), pixels.reshape(2, -1)], 1).reshape(-1)
    added = noise(21, 3).numpy()
    tokens = torch.cat([torch.zeros(2, 1, 3), x.flatten(2).transpose(1, 2)], 1) + torch.from_numpy(added)
    found = rearrange.reference(x.reshape(2, 3, -1).numpy(), before, added)
    np.testing.assert_array_equal(found, tokens.reshape(-1, 3).T.numpy())


@pytest.mark.parametrize("isa", [isa for isa in ISAS if runnable(isa)])
def test_the_kernel_moves_what_its_twin_moves(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any places at all: half of the vectors are ranges, the others are not."""
    compute_in(isa, "fp32", monkeypatch)
    isa_of = native.current_isa()
    generator, channels, lanes, vectors, tokens = np.random.default_rng(0), 5, isa_of.lanes, 7, 9
    x = generator.standard_normal((1, channels, 300)).astype(np.float32)
    pixels = generator.integers(-1, 300, vectors * lanes)
    for i in range(0, vectors, 2):
        pixels[i * lanes : (i + 1) * lanes] = np.arange(lanes) + 7 * i + 3
    lines = pixels.reshape(vectors, lanes)
    is_range = (lines[:, :1] >= 0) & (lines == lines[:, :1] + np.arange(lanes))
    starts = np.where(is_range.all(1), lines[:, 0], -1).astype(np.int32)
    assert 0 < (starts >= 0).sum() < vectors
    added = generator.standard_normal((tokens, channels)).astype(np.float32)
    count = vectors * lanes // tokens * tokens
    numbers = np.where(np.arange(vectors * lanes) < count, np.arange(vectors * lanes) % tokens, -1)
    # Results are written by whole vectors to whole vectors.
    room = np.zeros(channels * vectors * lanes + 64, np.float32)
    out = room[-address(room) % 64 // 4 :][: channels * vectors * lanes].reshape(channels, -1)
    tables = {
        "x": x,
        "table": pixels.astype(np.int32),
        "starts": starts,
        "added": np.ascontiguousarray(added.T),
        "added_table": numbers.astype(np.int32),
    }
    arguments = rearrange.ARGUMENTS.filled(
        **{name: address(table) for name, table in tables.items()},
        x_plane=x.strides[1],
        out=address(out),
        out_plane=out.strides[0],
        jobs=1,
        channels=channels,
        channels_per_job=channels,
        vectors=vectors,
        added_plane=4 * tokens,
    )
    code = native.machine_code(isa_of, rearrange.RearrangeKernel(adds=True))
    ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p)(code)(address(arguments), 0, 0)
    np.testing.assert_allclose(out[:, :count], rearrange.reference(x, pixels[:count], added), rtol=1e-6)
