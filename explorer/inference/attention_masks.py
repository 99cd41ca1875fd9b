"""What is added to the scores of attention before the softmax: masks, and biases of positions.

The kernel adds float32 of shape (samples or 1, heads or 1, queries, keys). Boolean masks become such numbers, and what is one number for all queries, or all keys, is
spread over them: by torch in each call, as whatever makes the mask is torch's, too, or once where it does not depend on the inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from explorer.inference.graph import Graph, Operation, Ref, computed

Sizes = tuple[int, int, int, int]
"""Samples, heads, queries and keys."""


@dataclass(frozen=True, slots=True)
class Mask:
    """A mask, or a bias.

    Attributes
    ----------
    name : str
        Of the value.
    shape : tuple of int
        At most four axes, each as long as that of the scores, or 1.
    dtype : torch.dtype
        bool, true where a query may attend to a key, or float32, which is added.
    value : Tensor or None
        The mask itself, where it is the same in each call.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    value: Tensor | None = None


def can_be_added(mask: Mask, sizes: Sizes) -> bool:
    """Whether the kernel can add a mask to scores of these sizes."""
    if mask.dtype not in (torch.bool, torch.float32) or not 0 < len(mask.shape) <= len(sizes):
        return False
    return all(n in (1, whole) for n, whole in zip(mask.shape[::-1], sizes[::-1], strict=False))


def causal(queries: int, keys: int) -> Mask:
    """The mask, (queries, keys), of queries that attend to no later key, as torch's ``is_causal`` has it."""
    value = torch.ones(queries, keys, dtype=torch.bool).tril()
    return Mask("is_causal=True", (queries, keys), torch.bool, value)


def make_readable(mask: Mask, layer: str, sizes: Sizes, graph: Graph) -> tuple[str, list[Operation]]:
    """What makes a mask what the kernel reads.

    Parameters
    ----------
    mask : Mask
    layer : str
        What the new operations count to.
    sizes : tuple of int
        Of the scores.
    graph : Graph
        Gets the shape and type of what is new, and what is the same in each call as a constant.

    Returns
    -------
    str
        The value that is to be read: the same one for all attentions of these sizes with this mask.
    list of Operation
        What makes it, in order, to be run before whatever reads it; none if it was asked for before.
    """
    queries, keys = sizes[2:]
    out = f"{mask.name}.for {queries} x {keys}"
    if out in graph.shapes:
        return out, []
    made, last = [], mask.name
    if mask.dtype == torch.bool:
        last = f"{out}, numbers"
        numbers = torch.ops.aten.where.Scalar
        made.append(Operation("torch", last, [], layer, numbers, (Ref(mask.name), 0.0, -float("inf"))))
        graph.shapes[last], graph.dtypes[last] = mask.shape, torch.float32
    # One sample, or one head, where a mask has no such axis.
    leading = [-1 if len(mask.shape) >= axes else 1 for axes in (4, 3)]
    spread = torch.ops.aten.expand.default
    made.append(Operation("torch", out, [], layer, spread, (Ref(last), [*leading, queries, keys])))
    samples, heads = (1, 1, *mask.shape[:-2])[-2:]
    graph.shapes[out], graph.dtypes[out] = (samples, heads, queries, keys), torch.float32
    if mask.value is None:
        return out, made
    values = {mask.name: mask.value}
    for operation in made:
        values[operation.output] = computed(operation, values)
    graph.constants[out] = values[out].clone()  # the weights it came from may be trained on
    return out, []
