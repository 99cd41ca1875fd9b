"""Cheap random changes of image batches, so that a few thousand images train like more.

Everything is drawn from the generator that the caller passes: a seed fixes a run.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor

__all__ = ["flip_and_shift"]


def flip_and_shift(images: Tensor, generator: Generator, *, shift: int = 1) -> Tensor:
    """Flip each image left-right with probability 1/2 and move it by up to `shift` pixels in both directions.

    Pixels that move in from outside repeat the border, which is the background for centred pictures.

    Parameters
    ----------
    images : Tensor, (N, C, H, W)
    generator : torch.Generator
        A CPU generator; its state advances by three draws of N.
    shift : int
        Largest move in pixels, 0 or more.

    Returns
    -------
    Tensor, (N, C, H, W)
        A new tensor of the same dtype and memory format.

    Examples
    --------
    >>> images = torch.arange(8.0).reshape(1, 1, 2, 4)
    >>> flip_and_shift(images, torch.Generator().manual_seed(0)).shape
    torch.Size([1, 1, 2, 4])
    """
    n, _, height, width = images.shape
    flipped = torch.randint(0, 2, (n, 1), generator=generator, dtype=torch.bool)
    down = torch.randint(-shift, shift + 1, (n, 1), generator=generator)
    right = torch.randint(-shift, shift + 1, (n, 1), generator=generator)
    rows = (torch.arange(height) + down).clamp_(0, height - 1)
    columns = (torch.arange(width) + right).clamp_(0, width - 1)
    columns = torch.where(flipped, width - 1 - columns, columns)
    # One gather for flip and shift: indices (N, 1, 1, 1), (N, 1, H, 1), (N, 1, 1, W) broadcast against the channels.
    batch = torch.arange(n).view(n, 1, 1, 1)
    channel = torch.arange(images.shape[1]).view(1, -1, 1, 1)
    moved = images[batch, channel, rows.view(n, 1, height, 1), columns.view(n, 1, 1, width)]
    if images.is_contiguous(memory_format=torch.channels_last):
        moved = moved.contiguous(memory_format=torch.channels_last)
    return moved
