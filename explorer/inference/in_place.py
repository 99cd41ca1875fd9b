"""Operators that write to their operand: whether somebody else sees what they write, and how to do without.

torch.export keeps them as the module has them. The engine gives their result a name of its own, so that whoever reads the operand afterwards reads the result
(see capture.py); that is wrong only where the same memory has other names.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor

from explorer.inference.graph import base_name

_VIEWS = {
    "view", "reshape", "flatten", "transpose", "permute", "select", "slice", "squeeze", "unsqueeze", "expand", "chunk", "split",
    "contiguous", "unflatten", "as_strided", "detach", "alias", "t", "unbind", "narrow", "split_with_sizes", "tensor_split",
    "swapaxes", "movedim", "view_as", "expand_as", "dropout", "_unsafe_view", "diagonal", "unfold", "to", "type_as",
}  # fmt: skip


def is_in_place(target: Any) -> bool:
    """Whether an operator writes to its first argument."""
    schema = getattr(target, "_schema", None)
    return bool(
        schema
        and schema.arguments
        and schema.arguments[0].alias_info
        and schema.arguments[0].alias_info.is_write
    )


def writes_through_views(graph: torch.fx.Graph) -> bool:
    """Whether an in-place operator changes what somebody reads later under another name than the operator's own result."""
    when = {node: i for i, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        if node.op == "get_attr" and _writes(getattr(graph.owning_module, str(node.target))):
            return True  # in an inner graph: nobody has looked whose memory it is
        if node.op != "call_function" or not is_in_place(node.target):
            continue
        written = node.args[0]
        for name in _sharing_memory(written, node, when) if isinstance(written, torch.fx.Node) else ():
            if name.op != "call_function":
                return True  # an input or a parameter, which the caller keeps
            # Later readers of what is written itself get the operator's result, see `_read`.
            if name is not written and any(when[user] > when[node] for user in name.users):
                return True
    return False


def _writes(inner: Any) -> bool:
    """Whether an inner graph has an in-place operator."""
    nodes = inner.graph.nodes if isinstance(inner, torch.fx.GraphModule) else ()
    return any(
        is_in_place(node.target)
        if node.op == "call_function"
        else node.op == "get_attr" and _writes(getattr(inner, str(node.target)))
        for node in nodes
    )


def _sharing_memory(
    written: torch.fx.Node, writer: torch.fx.Node, when: dict[torch.fx.Node, int]
) -> list[torch.fx.Node]:
    """`written` and all that is, or may be, the same memory when `writer` runs."""
    found, waiting = [written], [written]
    while waiting:
        node = waiting.pop()
        sources = node.args[:1] if _may_share(node) else ()
        readers = [user for user in node.users if _may_share(user) and when[user] < when[writer]]
        for other in (*sources, *readers):
            if isinstance(other, torch.fx.Node) and other not in found:
                found.append(other)
                waiting.append(other)
    return found


def _may_share(node: torch.fx.Node) -> bool:
    """Whether the result may lie in the memory of the first operand."""
    return node.op == "call_function" and (
        node.target is operator.getitem or base_name(node.target) in _VIEWS or is_in_place(node.target)
    )


class OnCopy:
    """An in-place operator that has no other form, applied to a copy."""

    def __init__(self, target: Any) -> None:
        self.target = target

    def __str__(self) -> str:
        return str(self.target)

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.target(x.clone(), *args, **kwargs)
