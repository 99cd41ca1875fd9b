"""The short way through the engine: what a call does when one input goes through native steps only to one output, and nothing else.

After a network has run, the interpreter's own code and data, and torch's, have left the cache, and each line of Python costs several times what it does in a tight
loop: for a network of 270 microseconds the general way (`SparseModule._run`) added 90. Most of all costs a new tensor (50 microseconds or more; 5 in a tight loop): results are made
several at a time, for the next calls too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from explorer.errors import EngineError
from explorer.inference.memory import address
from explorer.inference.plan import Place

if TYPE_CHECKING:
    # What generates or runs machine code needs llvmlite: imported where it is used, so that a machine without it runs through torch.
    from explorer.inference.steps import Move
    from explorer.inference.threads import Runner


def has_memory(x: Tensor) -> bool:
    """Whether the values of `x` lie somewhere: torch gives shapes to tensors that have none, as of `torch.export` and `torch.func`."""
    try:
        return x.data_ptr() != 0 or x.numel() == 0
    except RuntimeError:
        return False


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
    n_bytes : int
        The same as one piece of memory, which native code copies; 0 when it is none.
    ready : list
        Tensors for the answers of the next turns, and their addresses.
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
    n_bytes: int
    ready: list[tuple[Tensor, int]] = field(default_factory=list)

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
        cell = 0 if place.cell is None else address(place.cell)
        runner.answers(cell, result.data_ptr(), n_bytes)
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
                cell = self.place.cell
                # All that `Place.borrow` asks beside what is known.
                if cell is not None and x.is_contiguous():
                    where = x.data_ptr()
                else:
                    self._bring(x)
                    where = 0 if cell is None else int(cell[0])
                result, to = self.ready.pop() if self.ready else self._results()
                self.runner.answer(self.n_steps, where, to)
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

    def _results(self) -> tuple[Tensor, int]:
        """A tensor for an answer, and its address; others that are made with it are `ready` for the answers after it."""
        # Whatever mode this call is made in, another one may get them.
        with torch.inference_mode(mode=False):
            count = max(1, min(_AT_ONCE, _READY_BYTES // self.n_bytes))
            some = [_empty(self.result_shape) for _ in range(count)]
        if some[0].__class__ is not Tensor:
            raise EngineError(
                f"In a mode of torch's that makes a {some[0].__class__.__name__} there is no memory for an answer. Call the network outside of it."
            )
        first, *others = ((result, result.data_ptr()) for result in some)
        self.ready.extend(others)
        return first

    def _through(self, x: Tensor, last: int) -> None:
        self._bring(x)
        self.runner.run(0, last)

    def _bring(self, x: Tensor) -> None:
        """Let the kernels find `x`: copy it, or tell where it lies."""
        # By this thread alone: torch would wake others for it, which takes longer than copying an image. numpy takes twenty times as long for float16.
        if self.pieces:
            for piece, at in self.pieces:
                piece.copy_(x[at])
        elif not self.place.borrow(x):
            np.copyto(self.input, x.numpy(), casting="same_kind")


def _empty(shape: Sequence[int]) -> Tensor:
    """Whatever a program's defaults are."""
    return torch.empty(shape, dtype=torch.float32, device="cpu")


_AT_ONCE, _READY_BYTES = 32, 1 << 18
"""Results that are made at once, and their memory together."""

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
