"""Values that depend on no input: masks that let everything through are none, and what nobody reads is not run."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import explorer
from explorer.inference.without_inputs import lets_all_through
from tests.inference.graphs import relative_error
from tests.inference.test_partners import needs_code


class Attention(nn.Module):
    """Attention whose mask is made as libraries make it: of positions."""

    def __init__(self, mask: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(24, 24) for _ in range(4))
        self.mask = mask

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, width = x.shape

        def split(y: Tensor) -> Tensor:
            return y.view(n, tokens, 3, width // 3).transpose(1, 2)

        q, k, v = split(self.q(x)), split(self.k(x)), split(self.v(x))
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=self.mask(x))
        return self.out(mixed.transpose(1, 2).reshape(n, tokens, width))


def positions(x: Tensor) -> tuple[Tensor, Tensor]:
    tokens = torch.arange(x.shape[1])
    return tokens[:, None], tokens[None, :]


THROUGH = {
    "positions that are all seen": lambda x: (positions(x)[1] >= 0).expand(len(x), 1, x.shape[1], -1),
    "ones": lambda x: torch.ones(x.shape[1], x.shape[1], dtype=torch.bool),
    "zeros that are added": lambda x: torch.zeros(x.shape[1], x.shape[1]),
}
NOT_THROUGH = {
    "causal": lambda x: positions(x)[0] >= positions(x)[1],
    "a window": lambda x: (positions(x)[0] - positions(x)[1]).abs() < 3,
    "something is added": lambda x: (positions(x)[0] - positions(x)[1]).float(),
    "padding": lambda x: (x.mean(-1) > 0)[:, None, None, :].logical_or(positions(x)[1] == 0),
}


def engine_for(mask: Callable[[Tensor], Tensor]) -> tuple[explorer.inference.SparseModule, nn.Module, Tensor]:
    torch.manual_seed(0)
    network, x = Attention(mask).eval(), torch.randn(3, 7, 24)
    return explorer.compile(network, x), network, x


@needs_code
@pytest.mark.parametrize("name", THROUGH)
def test_a_mask_that_lets_all_through_is_none(name: str) -> None:
    engine, network, x = engine_for(THROUGH[name])
    assert engine.fallbacks == ()
    with torch.no_grad():
        for n in (3, 2, 1):
            assert relative_error(engine(x[:n]), network(x[:n])) < 1e-5


@pytest.mark.parametrize("name", NOT_THROUGH)
def test_any_other_mask_is_applied(name: str) -> None:
    engine, network, x = engine_for(NOT_THROUGH[name])
    assert not [name for name in engine.fallbacks if "attention" in name]
    if name != "padding":  # of which torch makes numbers in each call
        assert engine.fallbacks == ()
    with torch.no_grad():
        assert relative_error(network(x), Attention.forward(engine_for(THROUGH["ones"])[1], x)) > 1e-2
        for n in (3, 2, 1):
            assert relative_error(engine(x[:n]), network(x[:n])) < 1e-5


def test_a_mask_that_may_change_is_applied() -> None:
    """A buffer, or what follows from one: new weights may bring another one."""

    class Buffered(Attention):
        def __init__(self) -> None:
            super().__init__(lambda _: self.seen.logical_or(self.seen))
            self.register_buffer("seen", torch.ones(7, 7, dtype=torch.bool))

    torch.manual_seed(0)
    network, x = Buffered().eval(), torch.randn(2, 7, 24)
    engine = explorer.compile(network, x)
    network.seen = torch.ones(7, 7, dtype=torch.bool).tril()
    engine.update_weights(network)
    with torch.no_grad():
        assert relative_error(engine(x), network(x)) < 1e-5


@pytest.mark.parametrize(
    ("mask", "through"),
    [
        (torch.tensor([True, True]), True),
        (torch.tensor([True, False]), False),
        (torch.tensor([0.0, -0.0]), True),
        (torch.tensor([0.0, float("-inf")]), False),
        (torch.tensor([0.0, float("nan")]), False),
    ],
)
def test_what_lets_all_through(mask: Tensor, through: bool) -> None:
    assert lets_all_through(mask) is through


def test_what_nobody_reads_is_not_run_and_what_changes_something_is() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            torch.arange(x.shape[0]).cumsum(0)
            x.sort(1)
            y = self.a(x)
            y.sin_()
            return y

    torch.manual_seed(0)
    network, x = Idle().eval(), torch.randn(3, 8)
    engine = explorer.compile(network, x)
    assert not [name for name in engine.fallbacks if any(op in name for op in ("arange", "cumsum", "sort"))]
    with torch.no_grad():
        assert relative_error(engine(x), network(x)) < 1e-5
