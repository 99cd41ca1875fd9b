"""Which batches smaller than the one that a network was compiled for it answers as its module would.

torch.export writes the sizes of the example into the graph: a forward that reads the batch's size would go on with that of the example. And what torch
computes was traced for a full batch: zeros are added to a smaller one, which changes nothing where each sample is computed from itself alone. Both are
found out by trying, when the first smaller batch comes.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from explorer.errors import EngineError
from explorer.inference.capture import are_close, run_aside
from explorer.inference.execution import Execution
from explorer.inference.graph import Ref

_ASKED = 3
"""Samples for which the module is asked at most: one, two and some are what forward may tell apart."""

_TOLERANCE = {"fp32": 1e-3, "fp16": 0.1}
"""Of the largest number of an answer. Rounding alone stays below a tenth of it."""


class FewSamples:
    """What is known of a network's smaller batches.

    Parameters
    ----------
    example : tuple
        The inputs of a batch.
    images : int
        Samples of that batch; all where a network does not take its samples in turns.
    network : Execution

    Attributes
    ----------
    takes : list of bool
        For each number of samples, from 0 on, whether it is known to be answered rightly.
    """

    def __init__(self, example: tuple[Any, ...], images: int, network: Execution) -> None:
        self._example, self._images, self._network = example, images, network
        self._full = network.batch_size
        self.takes = [images == self._full for images in range(self._full + 1)]
        self._answers: list[tuple[tuple[Any, ...], Any]] = []
        self._is_known, self._mixes_samples = False, False

    def ask(self, module: nn.Module) -> None:
        """Have `module` answer for one sample, for two and for three, to be compared with when a small batch comes."""
        arguments = self._network.captured.arguments
        self._answers = []
        for images in range(1, min(_ASKED + 1, self._images + 1, self._full)):
            some = tuple(value[:images] if self._has_batch(value) else value for value in self._varied())
            try:
                answer = run_aside(module, some if arguments is None else arguments.rebuilt(some))
            except Exception:  # noqa: BLE001 - whatever it cannot do with few images
                answer = None
            self._answers.append((some, answer))

    def learn(self) -> None:
        """Find out which batches are taken, unless it is known."""
        if self._is_known or self._full == 1:
            return
        if not self._network.plan.is_dynamic and not self._is_separable():
            self._mixes_samples = True
        else:
            asked = self._answered_alike()
            # What the module was not asked for it is taken to answer as the largest batch that it was asked for.
            asked += asked[-1:] * (self._full - 1 - len(asked))
            self.takes[1 : self._full] = asked
        self._answers, self._is_known = [], True

    def check(self, images: int) -> None:
        """Raise an EngineError for a batch that would not be answered rightly, as far as `learn` has found out."""
        if self.takes[images]:
            return
        if self._mixes_samples:
            raise EngineError(
                f"A batch of {images} was passed to a network that was compiled for {self._full} and in which one sample's "
                "output depends on the others'. Compile it again with an example input of that size."
            )
        raise EngineError(
            f"A batch of {images} was passed to a network that was compiled for {self._full}, and that does something else with a batch of "
            "another size (its forward may use x.shape[0], or reshape by a fixed number). Compile it again with an example input of that size."
        )

    def _answered_alike(self) -> list[bool]:
        """Of each batch that the module answered, from one sample on: whether the network gives the same answer. True for all when it was not asked."""
        if not self._answers:
            return [True] * (self._full - 1)
        alike = []
        for images, (some, answer) in enumerate(self._answers, 1):
            found = None
            with contextlib.suppress(RuntimeError), torch.no_grad():
                found = self._network.run(some, images)
            tolerance = _TOLERANCE[self._network.isa.precision]
            alike.append(found is not None and answer is not None and are_close(found, answer, tolerance))
        return alike

    def _has_batch(self, value: Any) -> bool:
        """Whether the first axis of a value of the example, or of the answer to it, counts its samples."""
        return isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == self._images

    def _varied(self) -> tuple[Any, ...]:
        """The example; noise in the place of a tensor that is the same everywhere, which would hide what depends on what."""
        noise = torch.Generator().manual_seed(0)

        def varied(value: Any) -> Any:
            if not self._has_batch(value) or not value.is_floating_point() or not _is_uniform(value):
                return value
            return torch.randn(value.shape, generator=noise, dtype=value.dtype)

        return tuple(varied(value) for value in self._example)

    def _is_separable(self) -> bool:
        """Whether the first sample's outputs stay the same when all other samples change: then zeros in their place are harmless."""
        graph, run = self._network.graph, self._network.run
        if any(isinstance(o, Ref) and o.name not in graph.shapes for o in graph.outputs):
            return False  # a number, or a tensor whose size follows from values: those of all samples
        noise = torch.Generator().manual_seed(1)

        def with_other_samples(value: Any, turn: int) -> Any:
            if not self._has_batch(value):
                return value
            if value.is_floating_point():
                other = torch.randn(value.shape, generator=noise)
            elif not _is_uniform(value):
                other = value.flip(0)
            else:
                other = value.logical_not() if value.dtype is torch.bool else value + turn
            return torch.cat([value[:1], other[1:].to(value.dtype)])

        with torch.no_grad():
            before = run(self._example, self._full)
            after = None
            # Of numbers that are all the same the next may be too large, and then the one before too small.
            for turn in (1, -1):
                with contextlib.suppress(IndexError, RuntimeError):
                    changed = tuple(with_other_samples(value, turn) for value in self._example)
                    after = run(changed, self._full)
                    break
        if after is None:
            return False
        for one, other in zip(pytree.tree_leaves(before), pytree.tree_leaves(after), strict=True):
            if not isinstance(one, Tensor):
                continue
            if not self._has_batch(one):
                return False
            if not torch.allclose(one[:1], other[:1], rtol=1e-5, atol=1e-6, equal_nan=True):
                return False
        return True


def _is_uniform(value: Tensor) -> bool:
    """Whether all numbers of a tensor are the same one."""
    return value.numel() > 0 and bool((value == value.flatten()[:1]).all())
