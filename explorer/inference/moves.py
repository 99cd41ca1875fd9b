"""Where each element of a value comes from, after operators that only move elements: views, permutations, copies, ranges and single entries.

Decided by what the operators do. Shapes alone do not tell: of four heads and four tokens nobody knows which axis is which.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from explorer.inference.graph import Operation, base_name, bound_arguments, with_values

_RESHAPES = {
    "view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze", "contiguous", "clone", "alias", "detach",
}  # fmt: skip
"""What leaves the elements in their order: the shape of the result tells all."""

_PERMUTATIONS = {"transpose", "permute", "swapaxes", "movedim", "t", "mT"}

_CUTS = {
    "select", "slice", "narrow", "chunk", "split", "split_with_sizes", "tensor_split", "unbind",
}  # fmt: skip
"""What takes ranges or single entries of one axis, or several at once."""

Factors = tuple[tuple[int, int], ...]
"""An axis as a number with several digits: the size of each and its step, the slowest first."""


@dataclass(frozen=True, slots=True)
class Moved:
    """A value whose elements are elements of another one, the source.

    Several axes that became one may lie apart in the source, as samples and heads do when they are joined: each keeps its own step.

    Attributes
    ----------
    axes : tuple of Factors
        Steps are elements of the source. Digits of size one are left out, and neighbours that are one range are one.
    first : int
        The element of the source that comes first.
    """

    axes: tuple[Factors, ...]
    first: int = 0

    @classmethod
    def unmoved(cls, shape: tuple[int, ...]) -> Moved:
        """The source itself."""
        return cls(tuple(_joined([(n, prod(shape[i + 1 :]))]) for i, n in enumerate(shape)))

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(_size(axis) for axis in self.axes)

    def reshaped(self, shape: tuple[int, ...]) -> Moved | None:
        """In another shape; None where an axis would have to be cut between its digits' multiples."""
        if 0 in shape or prod(shape) != prod(self.shape):
            return None
        left = [*reversed(_joined([digit for axis in self.axes for digit in axis]))]
        axes = []
        for size in shape:
            digits, missing = [], size
            while missing > 1:
                n, step = left.pop()
                if missing % n == 0:
                    digits.append((n, step))
                    missing //= n
                elif n % missing == 0:
                    digits.append((missing, n // missing * step))
                    left.append((n // missing, step))
                    missing = 1
                else:
                    return None
            axes.append(_joined(digits))
        return Moved(tuple(axes), self.first)

    def permuted(self, order: tuple[int, ...]) -> Moved:
        """With its axes in this order."""
        return Moved(tuple(self.axes[i] for i in order), self.first)

    def cut(self, axis: int, first: int, size: int, step: int, *, keep: bool) -> Moved | None:
        """A range of an axis, or one entry, without its axis unless `keep`; None where it is no range of the source."""
        found = _cut(self.axes[axis], first, size, step)
        if found is None:
            return None
        digits, more = found
        middle = [digits] if keep else []
        return Moved((*self.axes[:axis], *middle, *self.axes[axis + 1 :]), self.first + more)


def is_move(operation: Operation) -> bool:
    """Whether an operation only moves elements, of one value, or takes one value out of several."""
    name = base_name(operation.target)
    known = (
        name in _RESHAPES or name in _PERMUTATIONS or name in _CUTS or operation.target is operator.getitem
    )
    return known and operation.kind in ("torch", "slice", "flatten", "same")


Source = Moved | tuple[Moved | None, ...] | None
"""Of one value, or of several that one operator yields; None: not known."""


def move(operation: Operation, before: Source, shape: tuple[int, ...] | None) -> Source:
    """What an operation that `is_move` makes of its operand.

    Parameters
    ----------
    operation : Operation
    before : Moved, or a tuple of them
        The operand's.
    shape : tuple of int or None
        Of the result; None when it is several.
    """
    if operation.target is operator.getitem:
        index = operation.args[1]
        return before[index] if isinstance(before, tuple) else None
    if not isinstance(before, Moved):
        return None
    name = base_name(operation.target)
    if name in _RESHAPES:
        return None if shape is None else before.reshaped(shape)
    if name in _PERMUTATIONS:
        # Of sizes that are all different, the result's tell the order.
        sizes = tuple(range(2, 2 + len(before.axes)))
        return before.permuted(tuple(n - 2 for n in _tried(operation, sizes).shape))
    arguments = bound_arguments(operation.target, operation.args, operation.kwargs)
    axis, whole = arguments["dim"] % len(before.axes), before.shape
    found = _tried(operation, whole)
    entry = prod(whole[axis + 1 :])

    def part(view: torch.Tensor) -> Moved | None:
        keep = view.dim() == len(whole)
        size, step = (view.shape[axis], view.stride(axis) // entry) if keep else (1, 1)
        return before.cut(axis, int(view.storage_offset()) // entry, size, step, keep=keep) if size else None

    return part(found) if isinstance(found, torch.Tensor) else tuple(part(view) for view in found)


def _tried(operation: Operation, shape: tuple[int, ...]) -> Any:
    """What the operator yields for an operand of this shape: views without data."""
    operand = torch.empty(shape, device="meta")
    args, kwargs = (with_values(part, lambda _: operand) for part in (operation.args, operation.kwargs))
    return operation.target(*args, **kwargs)


def _size(digits: Factors) -> int:
    return prod(n for n, _ in digits)


def _joined(digits: list[tuple[int, int]]) -> Factors:
    """Digits without those that never change, and neighbours as one where together they are a range."""
    found: list[tuple[int, int]] = []
    for n, step in digits:
        if n == 1:
            continue
        if found and found[-1][1] == n * step:
            found[-1] = (found[-1][0] * n, step)
        else:
            found.append((n, step))
    return tuple(found)


def _cut(digits: Factors, first: int, size: int, step: int) -> tuple[Factors, int] | None:
    """A range of an axis, and how far behind the axis' first element it begins."""
    if not digits:
        return (), 0
    outer, rest = digits[0][1], digits[1:]
    inner = _size(rest)
    if not rest:
        return _joined([(size, outer * step)]), first * outer
    if first // inner == (first + (size - 1) * step) // inner:
        found = _cut(rest, first % inner, size, step)
        return None if found is None else (found[0], found[1] + first // inner * outer)
    if step == 1 and first % inner == 0 and size % inner == 0:
        return _joined([(size // inner, outer), *rest]), first // inner * outer
    return None
