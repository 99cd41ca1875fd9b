"""Layer norm and attention on tokens, against their numpy twins and torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

import explorer
from explorer.inference.kernels import attention, layer_norm
from tests.inference.graphs import relative_error
from tests.inference.test_kernels import ISAS, run_by
from tests.inference.test_networks import pruned

TOLERANCE = 2e-5


@given(
    samples=st.integers(1, 3),
    tokens=st.integers(1, 70),
    features=st.integers(1, 40),
    offset=st.sampled_from([0.0, 1000.0]),
    affine=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_layer_norm_equals_its_numpy_twin(
    samples: int, tokens: int, features: int, offset: float, affine: bool
) -> None:
    torch.manual_seed(0)
    norm = nn.LayerNorm(features, eps=1e-5, elementwise_affine=affine)
    if affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    x = torch.randn(samples, tokens, features) + offset
    engine = explorer.compile(norm, x)
    assert engine.fallbacks == ()
    weight, bias = (
        (norm.weight.detach().numpy(), norm.bias.detach().numpy())
        if affine
        else (np.ones(features, np.float32), np.zeros(features, np.float32))
    )
    wanted = torch.from_numpy(layer_norm.reference(x.numpy(), weight, bias, 1e-5))
    # float32 inputs around 1000 carry an error of 6e-5 each, whoever subtracts their mean.
    assert relative_error(engine(x), wanted) < (TOLERANCE if offset == 0 else 1e-3)


class Separate(nn.Module):
    """Queries, keys and values from layers of their own, heads by unflatten, as in BERT."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
        return self.out(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)) + x


class Joint(nn.Module):
    """One layer for all three, rearranged by reshape, permute and unbind, as in vision transformers."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, w = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, self.heads, w // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = functional.scaled_dot_product_attention(q, k, v, scale=0.3)
        return self.out(mixed.transpose(1, 2).reshape(n, t, w))


class Chunks(nn.Module):
    """One layer for all three, cut by chunk, viewed and permuted."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, w = x.shape
        q, k, v = (
            part.view(n, t, self.heads, w // self.heads).permute(0, 2, 1, 3)
            for part in self.qkv(x).chunk(3, dim=-1)
        )
        mixed = functional.scaled_dot_product_attention(q, k, v)
        return mixed.permute(0, 2, 1, 3).contiguous().view(n, t, w)


class FewKeys(nn.Module):
    """Many queries attend to a few keys; values are wider than keys."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, 2 * width)

    def forward(self, x: Tensor) -> Tensor:
        few = self.k.weight.new_ones(()) * x[:, :3]

        def split(y: Tensor) -> Tensor:
            return y.unflatten(2, (self.heads, -1)).transpose(1, 2)

        mixed = functional.scaled_dot_product_attention(
            split(self.q(x)), split(self.k(few)), split(self.v(few))
        )
        return mixed.transpose(1, 2).flatten(2)


def check(network: nn.Module, x: Tensor, threads: int = 1) -> explorer.SparseModule:
    engine = explorer.compile(network.eval(), x, threads=threads)
    with torch.no_grad():
        wanted = network(x)
    for _ in range(2):
        assert relative_error(engine(x), wanted) < TOLERANCE
    return engine


@pytest.mark.parametrize("make", [Separate, Joint, Chunks, FewKeys])
@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize(("tokens", "width", "heads"), [(16, 12, 3), (128, 32, 2), (5, 8, 1), (197, 20, 4)])
@pytest.mark.parametrize("threads", [1, 2])
def test_attention_between_linear_layers_is_native_and_equals_torch(
    make: Callable[[int, int], nn.Module], samples: int, tokens: int, width: int, heads: int, threads: int
) -> None:
    torch.manual_seed(0)
    engine = check(make(width, heads), torch.randn(samples, tokens, width), threads)
    assert not any("attention" in name for name in engine.fallbacks), engine.fallbacks
    if make is not FewKeys:
        assert engine.fallbacks == ()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("tokens", [7, 33, 64])
def test_every_instruction_set_attends_like_the_numpy_twin(
    isa: str, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_by(isa, monkeypatch)
    torch.manual_seed(0)
    network = Chunks(24, 3).eval()
    x = 3 * torch.randn(2, tokens, 24)
    engine = explorer.compile(network, x)
    assert engine.isa == isa
    assert engine.fallbacks == ()
    q, k, v = (
        part.reshape(2, tokens, 3, 8).swapaxes(1, 2)
        for part in np.split(network.qkv(x).detach().numpy(), 3, axis=-1)
    )
    wanted = attention.reference(q, k, v, 8**-0.5).swapaxes(1, 2).reshape(2, tokens, 24)
    assert relative_error(engine(x), torch.from_numpy(wanted)) < TOLERANCE


def test_scores_far_apart_neither_overflow_nor_vanish() -> None:
    network = Chunks(8, 2)
    torch.manual_seed(0)
    check(network, 100 * torch.randn(1, 40, 8))


class Unusual(nn.Module):
    """Attention of a kind that has no native form."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(2, (2, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        if self.kind == "half":
            mixed = functional.scaled_dot_product_attention(q.half(), k.half(), v.half()).float()
        elif self.kind == "interleaved":
            # Heads take turns: element i belongs to head i % 2, so that a head is no range of features.
            q, k, v = (
                layer(x).unflatten(2, (-1, 2)).permute(0, 3, 1, 2) for layer in (self.q, self.k, self.v)
            )
            mixed = functional.scaled_dot_product_attention(q, k, v)
        elif self.kind == "windows":
            # Of three tokens each, as Hiera and other hierarchical transformers attend: an axis more.
            windows = (layer.unflatten(2, (-1, 3)) for layer in (q, k, v))
            mixed = functional.scaled_dot_product_attention(*windows).flatten(2, 3)
        else:
            mixed = functional.scaled_dot_product_attention(q, k, v)
        if self.kind == "heads kept":
            return mixed
        if self.kind == "read twice":
            return mixed.transpose(1, 2).flatten(2) + mixed.sum()
        if self.kind == "heads mixed":
            return mixed.flatten(1).reshape(x.shape)
        return mixed.transpose(1, 2).flatten(2)


@pytest.mark.parametrize(
    "kind", ["half", "interleaved", "windows", "heads kept", "read twice", "heads mixed"]
)
def test_attention_of_another_kind_runs_through_torch_and_is_right(kind: str) -> None:
    torch.manual_seed(0)
    network, x = Unusual(kind).eval(), torch.randn(2, 9, 8)
    engine = explorer.compile(network, x)
    with torch.no_grad():
        assert relative_error(engine(x), network(x)) < (2e-3 if kind == "half" else TOLERANCE)
    assert any("attention" in name for name in engine.fallbacks)


class AnyOrder(nn.Module):
    """Attention over axes in any order: the sizes fit whatever they are, and mean something else."""

    def __init__(self, sizes: tuple[int, int, int, int], orders: Sequence[Sequence[int]], split: str) -> None:
        super().__init__()
        heads, features = sizes[2:]
        self.sizes, self.orders, self.split = sizes, orders, split
        self.qkv = nn.Linear(6, 3 * heads * features)
        self.out = nn.Linear(heads * features, heads * features)

    def forward(self, x: Tensor) -> Tensor:
        n, t, h, f = self.sizes
        apart, parts, back = self.orders
        # How features are divided: three, heads and features of a head, in an order of their own.
        y = self.qkv(x).view(n, t, *([3, h, f][i] for i in apart))
        y = y.permute(0, 1, *(2 + apart.index(i) for i in range(3)))
        y = y.permute(*parts)
        which = parts.index(2)
        if self.split == "unbind":
            q, k, v = y.unbind(which)
        elif self.split == "chunk":
            q, k, v = (part.squeeze(which) for part in y.chunk(3, which))
        else:
            q, k, v = (y.contiguous().select(which, i) for i in range(3))
        mixed = functional.scaled_dot_product_attention(q, k, v)
        if list(back) != [0, 1, 2, 3]:
            mixed = mixed.permute(*back)
        return self.out(mixed.reshape(n, t, h * f))


@given(
    sizes=st.tuples(*[st.sampled_from([1, 2, 4, 4])] * 4),
    apart=st.one_of(st.just([0, 1, 2]), st.permutations(range(3))),
    parts=st.one_of(st.just([2, 0, 3, 1, 4]), st.just([2, 0, 1, 3, 4]), st.permutations(range(5))),
    back=st.one_of(st.just([0, 2, 1, 3]), st.just([0, 1, 2, 3]), st.permutations(range(4))),
    split=st.sampled_from(["unbind", "chunk", "contiguous"]),
)
@example((1, 4, 4, 4), [0, 1, 2], [2, 0, 3, 1, 4], [0, 2, 1, 3], "unbind")
@settings(max_examples=45, deadline=None)
def test_axes_of_equal_sizes_are_not_taken_for_each_other(
    sizes: tuple[int, int, int, int], apart: list[int], parts: list[int], back: list[int], split: str
) -> None:
    torch.manual_seed(0)
    network = AnyOrder(sizes, (apart, parts, back), split)
    engine = check(network, 3 * torch.randn(*sizes[:2], 6))
    if (apart, parts, back) == ([0, 1, 2], [2, 0, 3, 1, 4], [0, 2, 1, 3]):
        assert engine.fallbacks == ()


def test_heads_that_are_not_moved_back_are_not_joined_as_if_they_were() -> None:
    torch.manual_seed(0)
    network = AnyOrder((4, 4, 4, 4), ([0, 1, 2], [2, 0, 3, 1, 4], [0, 1, 2, 3]), "unbind")
    engine = check(network, torch.randn(4, 4, 6))
    assert any("attention" in name for name in engine.fallbacks)


def encoder(*, width: int, heads: int, norm_first: bool, activation: str) -> nn.Module:
    layer = nn.TransformerEncoderLayer(
        width, heads, 2 * width, activation=activation, batch_first=True, norm_first=norm_first
    )
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


@pytest.mark.parametrize("sparsity", [0.0, 0.9])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize(("samples", "tokens", "heads"), [(3, 21, 2), (4, 4, 4), (1, 9, 3)])
def test_torchs_own_encoder_is_native(
    samples: int, tokens: int, heads: int, norm_first: bool, activation: str, sparsity: float
) -> None:
    torch.manual_seed(0)
    network = pruned(
        encoder(width=8 * heads, heads=heads, norm_first=norm_first, activation=activation), sparsity
    )
    x = torch.randn(samples, tokens, 8 * heads)
    engine = check(network, x)
    assert engine.fallbacks == ()
    with torch.no_grad():
        for n in range(1, samples):
            assert relative_error(engine(x[:n]), network(x[:n])) < TOLERANCE


@pytest.mark.parametrize("threads", [1, 2])
def test_torchs_own_encoder_takes_new_weights(threads: int) -> None:
    networks = []
    for seed in range(2):
        torch.manual_seed(seed)
        networks.append(encoder(width=12, heads=3, norm_first=True, activation="gelu").eval())
    x = torch.randn(3, 7, 12)
    engine = check(networks[0], x, threads)
    for network, choose in ((networks[1], True), (networks[0], False)):
        engine.update_weights(network, choose=choose)
        with torch.no_grad():
            for n in (3, 2):
                assert relative_error(engine(x[:n]), network(x[:n])) < TOLERANCE


class Own(nn.Module):
    """torch's own attention, and what may become of it."""

    def __init__(self, sizes: tuple[int, int], kind: str, *, batch_first: bool) -> None:
        super().__init__()
        self.heads, width = sizes[0], sizes[0] * sizes[1]
        self.kind = kind
        self.attention = nn.MultiheadAttention(width, self.heads, batch_first=batch_first)
        self.norm, self.layer = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        turned = x.transpose(0, 1) if self.kind == "turned" else x
        if self.kind == "mask":
            tokens = x.shape[1 if self.attention.batch_first else 0]
            mask = torch.ones(tokens, tokens).tril().log()
            y, _ = self.attention(x, x, x, need_weights=False, attn_mask=mask)
        elif self.kind == "weights":
            y, weights = self.attention(x, x, x)
            y = y + weights.sum()
        else:
            y, _ = self.attention(turned, turned, turned, need_weights=False)
        if self.kind == "turned":
            y = self.layer(y.transpose(0, 1))
        if self.kind == "flat":
            y = self.layer(y.reshape(-1, y.shape[-1])).view(y.shape)
        if self.kind == "transposed":
            return self.layer(y.transpose(0, 1))
        return self.norm(x + y)


@given(
    sizes=st.tuples(*[st.sampled_from([1, 2, 4, 4])] * 4),
    kind=st.sampled_from(["residual", "turned", "flat", "transposed", "mask", "weights"]),
    batch_first=st.booleans(),
)
@example((4, 4, 4, 4), "residual", True)
@example((4, 4, 4, 4), "residual", False)
@example((4, 4, 4, 4), "turned", False)
@example((4, 4, 4, 4), "flat", True)
@settings(max_examples=30, deadline=None)
def test_torchs_own_attention_equals_torch_whatever_its_axes_and_sizes(
    sizes: tuple[int, int, int, int], kind: str, batch_first: bool
) -> None:
    torch.manual_seed(0)
    network = Own(sizes[2:], kind, batch_first=batch_first)
    engine = check(network, torch.randn(*sizes[:2], sizes[2] * sizes[3]))
    if (kind, batch_first) in {("residual", True), ("flat", True)}:
        assert engine.fallbacks == ()
    if (kind, batch_first) == ("turned", False) and 1 not in sizes:
        # Turned before and after: only the layers in between see it.
        assert engine.fallbacks == ()
    if kind == "mask" and batch_first:
        assert not any("attention" in name for name in engine.fallbacks)


class SpelledOut(nn.Module):
    """Attention by two products and a softmax."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.qkv, self.out, self.dropout = nn.Linear(24, 72), nn.Linear(24, 24), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = self.qkv(x).view(n, t, 3, 4, 6).permute(2, 0, 3, 1, 4).unbind(0)
        if self.kind != "keys as they are":
            k = k.mT
        if self.kind == "queries scaled":
            q = q * 0.4
        if self.kind == "both scaled":
            q, k = q * 0.6, k / 1.5
        scores = q @ k
        if self.kind == "scores scaled":
            scores = scores / 2.5 * 0.9
        if self.kind == "mask":
            scores = scores + torch.ones(t, t).tril().log()
        type_ = torch.float32 if self.kind == "in its type" else None
        weights = scores.softmax(2 if self.kind == "over queries" else -1, dtype=type_)
        weights = weights if type_ is None else weights.to(q.dtype)
        mixed = self.dropout(weights) @ v
        y = self.out(mixed.transpose(1, 2).reshape(n, t, 24))
        return y * weights.sum() if self.kind == "weights read" else y


@pytest.mark.parametrize(
    "kind", ["", "queries scaled", "both scaled", "scores scaled", "mask", "in its type"]
)
def test_attention_by_products_and_a_softmax_is_native(kind: str) -> None:
    torch.manual_seed(0)
    assert check(SpelledOut(kind), 2 * torch.randn(3, 6, 24)).fallbacks == ()


@pytest.mark.parametrize("kind", ["keys as they are", "over queries", "weights read"])
def test_products_and_a_softmax_that_are_something_else_run_through_torch(kind: str) -> None:
    torch.manual_seed(0)
    # As many tokens as features of a head: the sizes fit as well.
    engine = check(SpelledOut(kind), 2 * torch.randn(4, 6, 24))
    assert sum("matmul" in name for name in engine.fallbacks) == 2
