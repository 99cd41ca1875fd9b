"""Arguments by name, where a network is compiled and where it is called."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import explorer
from explorer.errors import EngineError
from explorer.inference.keywords import Keywords


class Masked(nn.Module):
    """Like an encoder of transformers: most arguments have defaults, and are given by name."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, scale: float = 1.0, shift: Tensor | None = None, **_: Any
    ) -> Tensor:
        x = self.a(x) * scale
        x = x if mask is None else x * mask
        return self.b(x if shift is None else x + shift)


@pytest.fixture
def network() -> Masked:
    torch.manual_seed(0)
    return Masked().eval()


def values() -> dict[str, Tensor]:
    return {"x": torch.randn(4, 8), "mask": torch.rand(4, 8), "shift": torch.randn(4, 8)}


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_a_network_is_compiled_and_called_by_name(network: Masked) -> None:
    given = values()
    fast = explorer.compile(network, (), example_kwargs=given)
    close(fast(**given), network(**given))
    other = values()
    wanted = network(**other)
    close(fast(**dict(reversed(other.items()))), wanted)
    close(fast(other["x"], mask=other["mask"], shift=other["shift"]), wanted)
    close(fast(other["x"], other["mask"], 1.0, other["shift"]), wanted)
    close(fast(**{name: value[:2] for name, value in other.items()}), wanted[:2])


def test_what_was_compiled_without_names_may_be_called_with_them(network: Masked) -> None:
    given = values()
    fast = explorer.compile(network, given["x"])
    close(fast(x=given["x"]), network(given["x"]))
    two = explorer.compile(network, (given["x"], given["mask"]))
    close(two(given["x"], mask=given["mask"]), network(given["x"], given["mask"]))


def test_a_default_that_was_left_out_is_the_one_of_forward(network: Masked) -> None:
    given = values()
    fast = explorer.compile(network, given["x"], example_kwargs={"scale": 2.0})
    close(fast(given["x"], scale=2.0), network(given["x"], scale=2.0))
    with pytest.raises(EngineError, match=r"compiled with 2\.0"):
        fast(x=given["x"])


def test_an_argument_that_is_missing_unknown_or_twice_is_named(network: Masked) -> None:
    given = values()
    fast = explorer.compile(network, given["x"])
    with pytest.raises(EngineError, match="multiple values for argument 'x'"):
        fast(given["x"], x=given["x"])
    with pytest.raises(EngineError, match="missing a required argument: 'x'"):
        fast(mask=given["mask"])
    with pytest.raises(EngineError, match="2 inputs were passed; this network takes 1"):
        fast(x=given["x"], mask=given["mask"])
    with pytest.raises(EngineError, match="'other' by name only"):
        fast(x=given["x"], other=given["x"])


def test_what_is_taken_by_name_only_is_refused_with_a_way_out() -> None:
    class OnlyByName(Masked):
        def forward(self, x: Tensor, *, mask: Tensor) -> Tensor:  # type: ignore[override]
            return self.b(self.a(x) * mask)

    given = values()
    with pytest.raises(EngineError, match=r"'mask' by name only.*Wrap it"):
        explorer.compile(OnlyByName(), given["x"], example_kwargs={"mask": given["mask"]})


def test_a_forward_that_tells_no_names_takes_none(network: Masked) -> None:
    class Nameless:
        __signature__ = "none"

        def __init__(self, forward: Any) -> None:
            self._forward = forward

        def __call__(self, *given: Tensor) -> Tensor:
            answer: Tensor = self._forward(*given)
            return answer

    network.forward = Nameless(network.forward)  # type: ignore[method-assign,assignment]
    names = Keywords(network)
    with pytest.raises(EngineError, match="pass them by position"):
        names.positional((), values())
