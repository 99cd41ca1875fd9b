"""How images lie in memory while a network is trained on a CPU."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

_SAFE_CHANNELS = 16
"""Channels from which on a strided 1 x 1 convolution is trained channels last: those that oneDNN takes at once, 8 with AVX2 and 16 with AVX-512."""


def training_memory_format(module: nn.Module, inputs: Tensor) -> torch.memory_format:
    """The memory format in which a network with 2-D convolutions is trained: channels last, which oneDNN is faster with, where that is safe.

    The gradient of the weight of a strided 1 x 1 convolution with few input channels, channels last, is written beyond the end of a buffer (oneDNN issue 6035,
    open in November 2026): wrong values, and on a CPU with AVX2 a damaged heap, of which the process dies some time later.

    Parameters
    ----------
    module : nn.Module
    inputs : Tensor
        What it is trained on.

    Returns
    -------
    torch.memory_format
        `torch.channels_last`, or `torch.contiguous_format` for a network without 2-D convolutions or images (N, C, H, W), or with one of the dangerous ones.
    """
    layers = list(_convolutions(module))
    dangerous = any(
        _is_strided_pointwise(layer) and layer.in_channels // layer.groups < _SAFE_CHANNELS
        for layer in layers
    )
    return torch.channels_last if inputs.ndim == 4 and layers and not dangerous else torch.contiguous_format


def _convolutions(module: nn.Module) -> Iterator[nn.Conv2d]:
    return (part for part in module.modules() if isinstance(part, nn.Conv2d))


def _is_strided_pointwise(layer: nn.Conv2d) -> bool:
    return tuple(layer.kernel_size) == (1, 1) and tuple(layer.stride) != (1, 1)
