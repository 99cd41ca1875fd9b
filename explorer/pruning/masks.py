"""Hold pruned weights at zero while an optimiser works on them.

Selecting which weights go is `explorer.masks`; this file keeps them away. Invariant: after `apply`, every masked weight and every
entry of the optimiser's state that belongs to one (momentum, averages) is zero, so that a weight which is let back in starts from
nothing instead of from an old velocity.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from explorer.errors import RunError

if TYPE_CHECKING:
    from torch import nn


class HeldMasks:
    """Masks bound to the live weights of a network.

    Parameters
    ----------
    weights : mapping of str to nn.Parameter
        Prunable weights by layer name.
    """

    def __init__(self, weights: Mapping[str, nn.Parameter]) -> None:
        self._weights = dict(weights)
        self._masks = {
            name: torch.ones_like(weight, dtype=torch.bool) for name, weight in self._weights.items()
        }
        self._zeros = dict.fromkeys(self._weights, 0)
        self._parameters: list[Tensor] = []
        self._factors: list[Tensor] = []
        self._names: list[str] = []

    @property
    def masks(self) -> dict[str, Tensor]:
        """The masks by layer name, bool, shaped like the weights, true where a weight is kept."""
        return dict(self._masks)

    @property
    def zeros(self) -> dict[str, int]:
        """Number of masked weights by layer name."""
        return dict(self._zeros)

    def replace(self, masks: Mapping[str, Tensor]) -> None:
        """Hold `masks` (bool, shaped like their weights) from now on; layers that are not named keep theirs.

        Raises
        ------
        RunError
            If a mask has no layer, or another shape than its weight.
        """
        for name, mask in masks.items():
            weight = self._weights.get(name)
            if weight is None:
                raise RunError(
                    f"There is a mask for layer {name!r}, which is not among the pruned layers {list(self._weights)}."
                )
            if mask.shape != weight.shape:
                raise RunError(
                    f"The mask of layer {name!r} has shape {tuple(mask.shape)}, its weight {tuple(weight.shape)}."
                )
            self._masks[name] = mask
            self._zeros[name] = mask.numel() - int(torch.count_nonzero(mask))
        # Layers without a zero cost nothing. The factors take dtype and memory layout of the weights: a multiplication of two
        # equal layouts runs straight through memory.
        pruned = [name for name in self._weights if self._zeros[name]]
        self._parameters = [self._weights[name].detach() for name in pruned]
        self._factors = [
            torch.empty_like(self._weights[name]).detach().copy_(self._masks[name]) for name in pruned
        ]
        self._names = pruned

    def apply(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Set masked weights to zero, and with `optimizer` its state of them as well."""
        if not self._factors:
            return
        torch._foreach_mul_(self._parameters, self._factors)
        if optimizer is None:
            return
        states: list[Tensor] = []
        factors: list[Tensor] = []
        for name, factor in zip(self._names, self._factors, strict=True):
            state: Mapping[str, Any] = optimizer.state.get(self._weights[name], {})
            for value in state.values():
                if isinstance(value, Tensor) and value.shape == factor.shape:
                    states.append(value)
                    factors.append(factor)
        if states:
            torch._foreach_mul_(states, factors)
