"""The short way through the engine: what a call does when one input goes through native steps only to one output, and nothing else.

After a network has run, the interpreter's own code and data have left the cache, and each line of Python costs several times what it does in a tight
loop: for a network of 270 microseconds the general way (`SparseModule._run`) added 90.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from explorer.inference.plan import Place

if TYPE_CHECKING:
    # What generates or runs machine code needs llvmlite: imported where it is used, so that a machine without it runs through torch.
    from explorer.inference.steps import Move
    from explorer.inference.threads import Runner


@dataclass(frozen=True, slots=True)
class StraightPath:
    """One network's short way.

    Attributes
    ----------
    shape : torch.Size
        Of the input of one turn: the images that go through together.
    place : Place
        Of the input.
    input : ndarray
        The same place, to be copied to when kernels cannot read the caller's.
    pieces : list
        Where that place is float16: its parts, and those of the input, each small enough for torch to copy by this thread alone.
    runner : Runner
    n_steps, head : int
        All steps, and the first of those that come after all turns (see `explorer.inference.plan.Plan`).
    moves : list of Move
        What moves on from one turn to the next.
    output : Tensor
        Where the steps leave the answer; after the head, that of all turns.
    result_shape : torch.Size
        Of the answer of one turn.
    output_address, n_bytes : int
        The same as one piece of memory; 0 bytes when it is none.
    """

    shape: torch.Size
    place: Place
    input: NDArray[Any]
    pieces: list[tuple[Tensor, tuple[int | slice, ...]]]
    runner: Runner
    n_steps: int
    head: int
    moves: list[Move]
    output: Tensor
    result_shape: torch.Size
    output_address: int
    n_bytes: int

    @classmethod
    def of(
        cls,
        view: Tensor,
        place: Place,
        runner: Runner,
        n_steps: int,
        head: int,
        moves: list[Move],
        output: Tensor,
    ) -> StraightPath:
        """From `view` of the input at `place`, and `output`, which after the head holds the images of all turns."""
        pieces = [] if view.dtype == torch.float32 else [(view[at], at) for at in _pieces(view.shape)]
        result = output[: view.shape[0]] if head < n_steps else output
        # One piece of memory is copied without torch, which would have to be fetched into the cache for it.
        is_plain = result.is_contiguous() and result.dtype == torch.float32
        n_bytes = result.numel() * result.element_size() if is_plain else 0
        return cls(
            view.shape,
            place,
            view.numpy(),
            pieces,
            runner,
            n_steps,
            head,
            moves,
            output,
            result.shape,
            result.data_ptr(),
            n_bytes,
        )

    @property
    def has_head(self) -> bool:
        """Whether the last steps take all images at once."""
        return self.head < self.n_steps

    def divides(self, x: Tensor, most: int) -> bool:
        """Whether `x`, of at most so many images, is several times what goes through together, and nothing else."""
        at_once = self.shape[0]
        return (
            x.dim() == len(self.shape)
            and x.shape[1:] == self.shape[1:]
            and at_once < x.shape[0] <= most
            and x.shape[0] % at_once == 0
            and (self.has_head or self.output.shape[:1] == self.shape[:1])
        )

    def run(self, x: Tensor) -> Tensor:
        """The answer to `x`, which is a plain float32 tensor on the CPU that needs no gradient, of this shape or one that `divides` accepts."""
        at_once = self.shape[0]
        if x.shape == self.shape:
            if self.n_bytes:
                result, cell = _empty(self.result_shape), self.place.cell
                if (
                    cell is not None and x.is_contiguous()
                ):  # all that `Place.borrow` asks beside what is known
                    cell[0] = x.data_ptr()
                    self.runner.run(0, self.n_steps)
                else:
                    self._through(x, self.n_steps)
                ctypes.memmove(result.data_ptr(), self.output_address, self.n_bytes)
                return result
            self._through(x, self.n_steps)
            result = self.output[:at_once] if self.has_head else self.output
            return result.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
        if self.has_head:
            if self.place.borrow(x):
                from explorer.inference.steps import Move

                assert self.place.cell is not None
                images = Move(self.place.cell, x.data_ptr(), x.stride(0) * at_once * x.element_size())
                self.runner.run_turns(0, self.head, len(x) // at_once, [*self.moves, images])
            else:
                for turn, some in enumerate(x.split(at_once)):
                    for move in self.moves:
                        move.to(turn)
                    self._through(some, self.head)
                for move in self.moves:
                    move.to(0)
            self.runner.run(self.head, self.n_steps)
            result = self.output[: len(x)]
            return result.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
        result = _empty((len(x), *self.output.shape[1:]))
        for part, some in zip(result.split(at_once), x.split(at_once), strict=True):
            self._through(some, self.n_steps)
            part.copy_(self.output)
        return result

    def _through(self, x: Tensor, last: int) -> None:
        # By this thread alone: torch would wake others for it, which takes longer than copying an image. numpy takes twenty times as long for float16.
        if self.pieces:
            for piece, at in self.pieces:
                piece.copy_(x[at])
        elif not self.place.borrow(x):
            np.copyto(self.input, x.numpy(), casting="same_kind")
        self.runner.run(0, last)


def _empty(shape: Sequence[int]) -> Tensor:
    """Whatever a program's defaults are."""
    return torch.empty(shape, dtype=torch.float32, device="cpu")


_GRAIN = 32_768
"""Elements up to which torch copies without other threads."""


def _pieces(shape: Sequence[int]) -> list[tuple[int | slice, ...]]:
    """Indices of parts of a tensor, none larger than `_GRAIN`, that together are all of it."""
    if prod(shape) <= _GRAIN:
        return [()]
    row = prod(shape[1:])
    if row > _GRAIN:
        return [(i, *rest) for i in range(shape[0]) for rest in _pieces(shape[1:])]
    step = _GRAIN // row
    return [(slice(i, i + step),) for i in range(0, shape[0], step)]
