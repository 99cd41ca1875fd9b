"""How many bytes a network's weights take, dense and with zeros left out.

The packed size is that of a bit per element which says whether it is there, and the elements that are: what a file needs at least
without entropy coding. A tensor for which this does not pay counts as dense.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def dense_bytes(module: nn.Module) -> int:
    """Return the bytes of all parameters and buffers, tied ones counted once."""
    return sum(tensor.numel() * tensor.element_size() for tensor in _tensors(module))


def packed_bytes(module: nn.Module) -> int:
    """Return the bytes of all parameters and buffers when zeros of parameters are left out, tied ones counted once.

    Examples
    --------
    >>> layer = nn.Linear(16, 8, bias=False)
    >>> with torch.no_grad():
    ...     _ = layer.weight[:6].zero_()
    >>> dense_bytes(layer), packed_bytes(layer)
    (512, 144)
    """
    total = 0
    for tensor in _tensors(module):
        dense = tensor.numel() * tensor.element_size()
        packed = int(torch.count_nonzero(tensor)) * tensor.element_size() + -(-tensor.numel() // 8)
        total += min(dense, packed) if isinstance(tensor, nn.Parameter) else dense
    return total


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]
