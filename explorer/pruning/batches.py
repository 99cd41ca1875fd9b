"""An endless, reproducible stream of training batches from tensors in memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Generator, Tensor

Augment = Callable[[Tensor, Generator], Tensor]


class BatchStream:
    """Batches that walk through one shuffled pass after another, all of one size.

    A pass that ends inside a batch is continued by the next one, so every sample is seen equally often and batch norm never meets a
    tiny last batch.

    Parameters
    ----------
    inputs, labels : Tensor
        `(n, ...) float32` and `(n,) int64`, n at least 1.
    batch_size : int
        Samples a batch; at most n are used, so that no sample comes twice in a batch of the first pass.
    augment : callable or None
        Takes a batch of inputs and a generator, returns changed inputs.
    seed : int
        Seed of order and augmentation, which have a generator each: another augmentation leaves the order alone.
    """

    def __init__(
        self, inputs: Tensor, labels: Tensor, batch_size: int, augment: Augment | None, seed: int
    ) -> None:
        self._inputs = inputs
        self._labels = labels
        self.batch_size = min(batch_size, len(inputs))
        self._augment = augment
        self._order = Generator().manual_seed(seed)
        # torch seeds are 64 bits wide; the other half of the range keeps the two streams apart for every seed that a person types.
        self._changes = Generator().manual_seed(seed + 2**62)
        self._waiting = torch.empty(0, dtype=torch.int64)

    def next(self) -> tuple[Tensor, Tensor]:
        """Return the next batch, inputs `(batch_size, ...) float32` and labels `(batch_size,) int64`."""
        while len(self._waiting) < self.batch_size:
            self._waiting = torch.cat(
                [self._waiting, torch.randperm(len(self._inputs), generator=self._order)]
            )
        chosen, self._waiting = self._waiting[: self.batch_size], self._waiting[self.batch_size :]
        inputs = self._inputs[chosen]
        if self._augment is not None:
            inputs = self._augment(inputs, self._changes)
        return inputs, self._labels[chosen]
