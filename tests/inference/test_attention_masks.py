"""Masks and biases that are added to the scores of attention, against the numpy twin and torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

import explorer
from explorer.inference.attention_masks import Mask, can_be_added, causal
from explorer.inference.kernels import attention
from tests.inference.graphs import operators_in_torch, relative_error
from tests.inference.test_kernels import ISAS, run_by
from tests.inference.test_partners import needs_code

TOLERANCE = 2e-5
HEADS, WIDTH = 3, 24


class Attention(nn.Module):
    """Attention of three heads."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def heads(self, x: Tensor) -> tuple[Tensor, ...]:
        n, t, _ = x.shape
        return self.qkv(x).view(n, t, 3, HEADS, -1).permute(2, 0, 3, 1, 4).unbind(0)

    def joined(self, mixed: Tensor) -> Tensor:
        return self.out(mixed.transpose(1, 2).flatten(2))

    def attend(self, x: Tensor, **how: Any) -> Tensor:
        return self.joined(functional.scaled_dot_product_attention(*self.heads(x), **how))


class Given(Attention):
    """With the mask that is passed."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.attend(x, attn_mask=mask)


class Products(Attention):
    """The same, as two products and a softmax."""

    def __init__(self, *, mask_first: bool = False) -> None:
        super().__init__()
        self.mask_first = mask_first

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        scores = q @ k.mT * 0.4
        scores = mask + scores if self.mask_first else scores + mask
        weights = scores.softmax(-1, dtype=torch.float32).to(x.dtype)
        return self.joined(weights @ v)


class Masked(Attention):
    """With masks that the network makes."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "causal":
            return self.attend(x, is_causal=True)
        # A token counts where its first feature is positive; of each sample the first counts.
        counts = (x[..., 0] > 0).logical_or(torch.arange(x.shape[1]) == 0)
        if self.kind == "causal and padding":
            earlier = torch.arange(x.shape[1])
            return self.attend(x, attn_mask=counts[:, None, None] & (earlier[:, None] >= earlier))
        return self.attend(x, attn_mask=counts[:, None, None])


class Biased(Attention):
    """With a bias for each head and pair of positions, as Swin and BEiT have it: it is learnt, and looked up by distance."""

    distance: Tensor

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(2 * tokens - 1, HEADS))
        positions = torch.arange(tokens)
        self.register_buffer("distance", positions[:, None] - positions + tokens - 1)

    def forward(self, x: Tensor) -> Tensor:
        bias = self.table[self.distance].permute(2, 0, 1)
        return self.attend(x, attn_mask=bias)


def networks_answer_alike(
    network: nn.Module, *inputs: Tensor, threads: int = 1
) -> explorer.inference.SparseModule:
    engine = explorer.compile(network.eval(), inputs, threads=threads)
    with torch.no_grad():
        wanted = network(*inputs)
        for _ in range(2):
            found = engine(*inputs)
            assert torch.equal(found.isnan(), wanted.isnan())
            assert relative_error(found.nan_to_num(), wanted.nan_to_num()) < TOLERANCE
    return engine


SHAPES = {
    "keys": "1K",
    "queries and keys": "QK",
    "a query for all": "1QK",
    "heads": "HQK",
    "keys of each sample": "N11K",
    "of each sample": "N1QK",
    "everything": "NHQK",
    "queries alone": "11Q1",
}


@needs_code
@given(
    samples=st.integers(1, 3),
    tokens=st.sampled_from([1, 2, 5, 16, 21, 33, 130]),
    shape=st.sampled_from(list(SHAPES.values())),
    boolean=st.booleans(),
    spelled_out=st.booleans(),
    threads=st.sampled_from([1, 2]),
)
@example(2, 33, "NHQK", True, False, 2)
@example(3, 5, "N11K", False, True, 1)
@settings(max_examples=28, deadline=None)
def test_a_mask_of_any_shape_is_added(
    samples: int, tokens: int, shape: str, boolean: bool, spelled_out: bool, threads: int
) -> None:
    torch.manual_seed(0)
    sizes = {"N": samples, "H": HEADS, "Q": tokens, "K": tokens, "1": 1}
    mask: Tensor = torch.randn([sizes[axis] for axis in shape])
    if boolean:
        # Some queries attend to nothing.
        mask = mask > 0
    if spelled_out and boolean:
        mask = torch.where(mask, 0.0, -float("inf"))
    network = Products(mask_first=samples == 2) if spelled_out else Given()
    engine = networks_answer_alike(network, torch.randn(samples, tokens, WIDTH), mask, threads=threads)
    in_torch = set(operators_in_torch(engine))
    assert in_torch <= {"where", "expand"}
    assert in_torch >= ({"where"} if mask.dtype == torch.bool else set())


@needs_code
@pytest.mark.parametrize("kind", ["causal", "padding", "causal and padding"])
@pytest.mark.parametrize("tokens", [1, 7, 64])
def test_masks_that_networks_make(kind: str, tokens: int) -> None:
    torch.manual_seed(0)
    network, x = Masked(kind), torch.randn(3, tokens, WIDTH)
    engine = networks_answer_alike(network, x)
    assert not any("attention" in name for name in engine.fallbacks)
    if kind == "causal":
        assert engine.fallbacks == ()
    with torch.no_grad():
        for n in (2, 1):
            assert relative_error(engine(x[:n]), network(x[:n])) < TOLERANCE


@needs_code
@pytest.mark.parametrize("threads", [1, 2])
def test_a_learnt_bias_is_prepared_once_and_taken_from_new_weights(threads: int) -> None:
    torch.manual_seed(0)
    network, x = Biased(9), torch.randn(2, 9, WIDTH)
    engine = networks_answer_alike(network, x, threads=threads)
    assert engine.fallbacks == ()
    with torch.no_grad():
        before = network(x)
        network.table.mul_(-2)
        assert relative_error(engine(x), before) < TOLERANCE
        engine.update_weights(network)
        assert relative_error(network(x), before) > 1e-2
        assert relative_error(engine(x), network(x)) < TOLERANCE


@needs_code
def test_one_mask_serves_all_layers() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = Given(), Given()

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.two(self.one(x, mask), mask)

    torch.manual_seed(0)
    mask = torch.rand(2, 1, 1, 12) > 0.3
    engine = networks_answer_alike(Two(), torch.randn(2, 12, WIDTH), mask)
    assert len(engine.fallbacks) == 2  # numbers are made of it once, and spread over the queries once


@needs_code
@pytest.mark.parametrize("lowest", [float("-inf"), float(np.finfo(np.float32).min)])
def test_a_sample_that_is_all_padding_is_what_torch_makes_of_it(lowest: float) -> None:
    torch.manual_seed(0)
    mask = torch.zeros(3, 1, 1, 10)
    mask[1] = lowest
    mask[2, ..., 4:] = lowest
    x = torch.randn(3, 10, WIDTH)
    networks_answer_alike(Given(), x, mask)
    networks_answer_alike(Products(), x, mask)


@needs_code
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("tokens", [7, 33, 64])
@pytest.mark.parametrize("heads_share", [False, True])
def test_every_instruction_set_adds_a_mask_like_the_numpy_twin(
    isa: str, tokens: int, heads_share: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_by(isa, monkeypatch)
    torch.manual_seed(0)
    network, x = Given().eval(), 3 * torch.randn(2, tokens, WIDTH)
    network.out = nn.Identity()  # type: ignore[assignment]
    mask = torch.randn(2, 1 if heads_share else HEADS, tokens, tokens)
    mask[:, :, :, 1::3] = -float("inf")
    mask[0, :, 2] = -float("inf")
    engine = explorer.compile(network, (x, mask))
    assert engine.isa == isa
    assert not any("attention" in name for name in engine.fallbacks)
    q, k, v = (
        part.reshape(2, tokens, HEADS, -1).swapaxes(1, 2)
        for part in np.split(network.qkv(x).detach().numpy(), 3, axis=-1)
    )
    wanted = attention.reference(q, k, v, 8**-0.5, mask.numpy(), none_is_zero=True)
    assert not wanted[0, :, 2].any()
    wanted = wanted.swapaxes(1, 2).reshape(2, tokens, WIDTH)
    assert relative_error(engine(x, mask), torch.from_numpy(wanted)) < TOLERANCE


@needs_code
@pytest.mark.parametrize("kind", ["integers", "wider", "of another size", "scaled afterwards", "subtracted"])
def test_what_is_no_such_mask_is_left_to_torch_and_right(kind: str) -> None:
    class Other(Attention):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            n, t, _ = x.shape
            q, k, v = self.heads(x)
            scores = q @ k.mT
            if kind == "scaled afterwards":
                scores = (scores + mask) / 2
            elif kind == "subtracted":
                scores = torch.add(scores, mask, alpha=-1)
            elif kind == "wider":
                scores = (scores[:1] + mask.expand(n, 1, t, t)).float()
            else:
                scores = scores + mask
            return self.joined(scores.softmax(-1) @ v)

    torch.manual_seed(0)
    mask = torch.randn(5, 5)
    if kind == "integers":
        mask = torch.randint(-3, 3, (5, 5))
    if kind == "of another size":
        mask = torch.randn(5, 1, 1)[:1].expand(1, 1, 1)
    engine = networks_answer_alike(Other(), torch.randn(2, 5, WIDTH), mask)
    if kind != "of another size":
        assert sum("matmul" in name for name in engine.fallbacks) == 2


@pytest.mark.parametrize(
    ("shape", "dtype", "fits"),
    [
        ((2, 3, 4, 5), torch.float32, True),
        ((5,), torch.bool, True),
        ((4, 1), torch.bool, True),
        ((), torch.float32, False),
        ((4, 5), torch.float16, False),
        ((4, 5), torch.int64, False),
        ((5, 4), torch.bool, False),
        ((1, 2, 3, 4, 5), torch.bool, False),
    ],
)
def test_which_masks_can_be_added(shape: tuple[int, ...], dtype: torch.dtype, fits: bool) -> None:
    assert can_be_added(Mask("m", shape, dtype), (2, 3, 4, 5)) is fits


def test_a_causal_mask_is_torchs() -> None:
    torch.manual_seed(0)
    for queries, keys in ((5, 5), (3, 5), (5, 3)):
        q, k, v = torch.randn(1, 1, queries, 4), torch.randn(1, 1, keys, 4), torch.randn(1, 1, keys, 4)
        found = functional.scaled_dot_product_attention(q, k, v, attn_mask=causal(queries, keys).value)
        wanted = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        assert torch.allclose(found, wanted, atol=1e-6)
