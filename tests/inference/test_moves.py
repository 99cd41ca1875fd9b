"""Where elements come from, against what torch's operators do to numbers that count them."""

from __future__ import annotations

import operator
from math import prod
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from explorer.inference.graph import Operation, Ref
from explorer.inference.moves import Moved, is_move, move

aten = torch.ops.aten
SIZES = st.sampled_from([1, 2, 2, 3, 4])


def elements(moved: Moved) -> torch.Tensor:
    """Which element of the source each one is."""
    found = torch.tensor([moved.first])
    for size, step in (digit for axis in moved.axes for digit in axis):
        found = (found[:, None] + step * torch.arange(size)).reshape(-1)
    return found.reshape(moved.shape)


@st.composite
def shapes(draw: Any, count: int) -> tuple[int, ...]:
    """Any way to write a number of elements as a product."""
    left, found = count, []
    for _ in range(draw(st.integers(0, 3))):
        found.append(draw(st.sampled_from([n for n in range(1, left + 1) if left % n == 0])))
        left //= found[-1]
    return tuple(draw(st.permutations([*found, left])))


@st.composite
def operators(draw: Any, shape: tuple[int, ...]) -> tuple[Any, tuple[Any, ...], int | None]:
    """An operator, its arguments behind the operand, and which of several results is taken."""
    axis, other = (draw(st.integers(-len(shape), len(shape) - 1)) for _ in range(2))
    size = shape[axis]
    first = draw(st.integers(0, size - 1))
    last = draw(st.integers(first + 1, size))
    step = draw(st.integers(1, 2))
    cuts = (
        (aten.select.int, (axis, first), None),
        (aten.slice.Tensor, (axis, first, last, step), None),
        (aten.narrow.default, (axis, first, last - first), None),
        (aten.unbind.int, (axis,), first),
        (aten.chunk.default, (last, axis), 0),
        (aten.split.Tensor, (last, axis), -1),
        (aten.split_with_sizes.default, ([first, size - first], axis), 1),
        (aten.tensor_split.sections, (last, axis), -1),
    )
    # What loses elements less often, or soon none are left.
    others = (
        (aten.reshape.default, (list(draw(shapes(prod(shape)))),), None),
        (aten.permute.default, (list(draw(st.permutations(range(len(shape))))),), None),
        (aten.flatten.using_ints, (0, len(shape) - 1), None),
        (aten.unflatten.int, (axis, [size, 1] if size % 2 else [2, size // 2]), None),
        (aten.squeeze.dim, (axis,), None),
        (aten.unsqueeze.default, (axis,), None),
        (aten.contiguous.default, (), None),
        (aten.transpose.int, (axis, other), None),
        (aten.movedim.int, (axis, other), None),
        (aten.mT.default if len(shape) > 1 else aten.t.default, (), None),
    )
    chosen: tuple[Any, tuple[Any, ...], int | None] = draw(st.sampled_from((*others, *others[:2] * 4, *cuts)))
    return chosen


@given(data=st.data(), shape=st.lists(SIZES, min_size=2, max_size=5))
@settings(max_examples=150, deadline=None)
def test_elements_come_from_where_torch_takes_them(data: st.DataObject, shape: list[int]) -> None:
    real = torch.arange(prod(shape)).reshape(shape)
    known = Moved.unmoved(tuple(shape))
    for _ in range(data.draw(st.integers(1, 8))):
        if real.dim() == 0:
            break
        target, arguments, index = data.draw(operators(tuple(real.shape)))
        operation = Operation("torch", "y", [], "", target, (Ref("x"), *arguments))
        assert is_move(operation)
        result = target(real, *arguments)
        found = move(operation, known, tuple(result.shape) if index is None else None)
        if index is not None:
            item = Operation("torch", "z", [], "", operator.getitem, (Ref("y"), index))
            assert is_move(item)
            result, found = result[index], move(item, found, tuple(result[index].shape))
        if found is None:
            break  # it need not be known; what is known must be right
        assert isinstance(found, Moved)
        assert found.shape == tuple(result.shape)
        assert torch.equal(elements(found), result)
        real, known = result, found


def test_axes_joined_apart_are_taken_apart_again() -> None:
    """As samples and heads are in torch's own attention: no single step leads from one to the next."""
    apart = Moved.unmoved((3, 5, 4, 2)).permuted((0, 2, 1, 3))
    known = apart.reshaped((12, 5, 2))
    assert known is not None
    assert known.axes[0] == ((3, 40), (4, 2))
    assert known.reshaped((3, 4, 5, 2)) == apart
    assert known.reshaped((2, 6, 5, 2)) is None


@pytest.mark.parametrize("target", [aten.add.Tensor, aten.expand.default, aten.as_strided.default])
def test_what_makes_new_elements_is_no_move(target: Any) -> None:
    assert not is_move(Operation("torch", "y", [], "", target, (Ref("x"),)))
