"""What is pruned as one: a layer's weights, or the channels that a group of layers shares.

A removed channel is removed for good: its filters and biases in every layer of the group are zero, and so are scale and shift of the normalisations over it, as if it
had never been there (for activations that keep zero).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from explorer.errors import ModelError
from explorer.masks import channel_mask, magnitude_mask
from explorer.models import PrunableLayer, channel_groups

__all__ = ["Unit", "named", "units_of"]


@dataclass(frozen=True, slots=True)
class Unit:
    """One row of a sensitivity table.

    Attributes
    ----------
    name : str
        Of its first layer.
    layers : tuple of str
    norms : tuple of str
        BatchNorms over the channels; empty when single weights are pruned.
    channels : bool
        Whole output channels are removed, not single weights.
    """

    name: str
    layers: tuple[str, ...]
    norms: tuple[str, ...] = ()
    channels: bool = False

    def weights(self, module: nn.Module) -> list[Tensor]:
        """Return the weights of its layers."""
        return [module.get_submodule(name).get_parameter("weight") for name in self.layers]

    def removed(self, module: nn.Module, level: float) -> tuple[float, int]:
        """Return the share of squared weights that pruning to `level` removes, and how many non-zero weights."""
        return self._told(self._removals(module, level))

    @contextmanager
    def pruned(self, module: nn.Module, level: float) -> Iterator[tuple[float, int]]:
        """Prune for a while, in place; gives what `removed` does."""
        removals = self._removals(module, level)
        told = self._told(removals)
        saved = [parameter.detach().clone() for parameter, _ in removals]
        try:
            for parameter, mask in removals:
                parameter.detach().masked_fill_(mask, 0.0)
            yield told
        finally:
            for (parameter, _), before in zip(removals, saved, strict=True):
                parameter.detach().copy_(before)

    def _told(self, removals: Sequence[tuple[Tensor, Tensor]]) -> tuple[float, int]:
        """Return the removed share of the layers' squared weights, and how many non-zero ones, of what `_removals` gave."""
        parts = [(weight.detach(), mask) for weight, mask in removals[: len(self.layers)]]
        total = sum(float(weight.double().square().sum()) for weight, _ in parts)
        gone = [weight.masked_fill(~mask, 0.0) for weight, mask in parts]
        energy = sum(float(each.double().square().sum()) for each in gone)
        return energy / total if total > 0 else 0.0, sum(int(torch.count_nonzero(each)) for each in gone)

    def _removals(self, module: nn.Module, level: float) -> list[tuple[Tensor, Tensor]]:
        """Parameters and what of each becomes zero, the layers' weights first."""
        weights = self.weights(module)
        if not self.channels:
            return [(weight, ~magnitude_mask(weight, level)) for weight in weights]
        gone = ~channel_mask([weight.detach() for weight in weights], level)
        found = [
            (weight, gone.reshape(-1, *[1] * (weight.dim() - 1)).expand_as(weight)) for weight in weights
        ]
        for name in (*self.layers, *self.norms):
            part = module.get_submodule(name)
            scale = [part.get_parameter("weight")] if name in self.norms else []
            bias = getattr(part, "bias", None)
            found += [(vector, gone) for vector in (*scale, *([] if bias is None else [bias]))]
        return found


def units_of(
    module: nn.Module, example_input: Tensor, layers: Sequence[PrunableLayer], *, channels: bool
) -> tuple[Unit, ...]:
    """Return what is pruned as one: each of these layers, or the groups of channels that one of them belongs to.

    Raises
    ------
    ModelError
        If no channel of these layers can be removed.
    """
    if not channels:
        return tuple(Unit(layer.name, (layer.name,)) for layer in layers)
    wanted = {layer.name for layer in layers}
    groups = [group for group in channel_groups(module, example_input) if wanted & {*group.layers}]
    if not groups:
        raise ModelError(
            f"No channels of {', '.join(sorted(wanted))} can be removed: they are outputs of the network, or tied to others in a way that is not understood. "
            "Prune single weights there."
        )
    return tuple(Unit(group.name, group.layers, group.norms, channels=True) for group in groups)


def named(units: Iterable[Unit]) -> dict[str, Unit]:
    """Return the units by the names of their layers."""
    return {layer: unit for unit in units for layer in unit.layers}
