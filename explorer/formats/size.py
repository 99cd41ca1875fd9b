"""How many bytes a network's weights take, dense and with zeros left out.

The packed size is that of a bit per element which says whether it is there, and the elements that are: what a file needs at least
without entropy coding. A tensor for which this does not pay counts as dense.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


def dense_bytes(module: nn.Module) -> int:
    """Return the bytes of all parameters and buffers, tied ones counted once."""
    return sum(tensor.numel() * tensor.element_size() for tensor in _tensors(module))


def packed_bytes(module: nn.Module, zeros: Mapping[str, int] | None = None) -> int:
    """Return the bytes of all parameters and buffers when zeros of parameters are left out, tied ones counted once.

    Parameters
    ----------
    module : nn.Module
    zeros : mapping of str to int, optional
        Zeros of a layer's weight by the layer's dotted name, taken in place of counting them: how large the network will be, or is
        while somebody else trains it.

    Examples
    --------
    >>> layer = nn.Linear(16, 8, bias=False)
    >>> packed_bytes(layer, {"": 96})
    144
    >>> with torch.no_grad():
    ...     _ = layer.weight[:6].zero_()
    >>> dense_bytes(layer), packed_bytes(layer)
    (512, 144)
    """
    total = 0
    known = {id(module.get_submodule(name).weight): count for name, count in (zeros or {}).items()}
    for tensor in _tensors(module):
        dense = tensor.numel() * tensor.element_size()
        n_zeros = known.get(id(tensor))
        nonzero = int(torch.count_nonzero(tensor)) if n_zeros is None else tensor.numel() - n_zeros
        packed = nonzero * tensor.element_size() + -(-tensor.numel() // 8)
        total += min(dense, packed) if isinstance(tensor, nn.Parameter) else dense
    return total


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]
