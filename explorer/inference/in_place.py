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

_DROPOUTS = {"dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout"}
_UNDECLARED_VIEWS = {
    *_DROPOUTS,
    "unsafe_chunk",
    "unsafe_split",
    "unsafe_split_with_sizes",
    "_unsafe_view",
    "type_as",
    "rrelu",
}
"""May return their operand, or a view of it, without saying so in their schema."""


def is_in_place(target: Any) -> bool:
    """Whether an operator writes to its first argument."""
    schema = getattr(target, "_schema", None)
    return bool(
        schema
        and schema.arguments
        and schema.arguments[0].alias_info
        and schema.arguments[0].alias_info.is_write
    )


def has_in_place(graph: torch.fx.Graph) -> bool:
    """Whether any operator of a captured graph writes to its operand."""
    return any(node.op == "call_function" and is_in_place(node.target) for node in graph.nodes)


def without_idle_dropout(graph: torch.fx.Graph) -> None:
    """Let those who read what a dropout leaves as it is read its operand: it is the same tensor, which torch's decompositions forget."""
    for node in list(graph.nodes):
        name = base_name(node.target).removesuffix("_") if node.op == "call_function" else ""
        is_idle = name in _DROPOUTS and len(node.args) > 2 and node.args[2] is False
        # The signature knows outputs by name.
        if is_idle and all(user.op != "output" for user in node.users):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def writes_through_views(graph: torch.fx.Graph) -> bool:
    """Whether an in-place operator changes what somebody reads later under another name than the operator's own result."""
    when = {node: i for i, node in enumerate(graph.nodes)}
    homes = {node: _memories(node) for node in graph.nodes}
    for node in graph.nodes:
        if node.op == "get_attr" and _writes(getattr(graph.owning_module, str(node.target))):
            return True  # in an inner graph: nobody has looked whose memory it is
        if node.op != "call_function" or not is_in_place(node.target):
            continue
        written = node.args[0]
        if not isinstance(written, torch.fx.Node):
            return True  # a list of tensors, of which the result is none
        for name in _sharing_memory(written, node, when, homes):
            if name.op != "call_function":
                return True  # an input or a parameter, which the caller keeps
            # Later readers of what is written itself get the operator's result, see `_read`.
            if name is not written and any(when[user] > when[node] for user in name.users):
                return True
    return False


def _memories(node: torch.fx.Node) -> set[int]:
    """Where the values of a node lay when torch traced them."""
    value = node.meta.get("val")
    parts = value if isinstance(value, list | tuple) else [value]
    return {
        part.untyped_storage()._cdata  # noqa: SLF001 - torch has no public name for it
        for part in parts
        if isinstance(part, Tensor) and part.layout is torch.strided
    }


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
    written: torch.fx.Node,
    writer: torch.fx.Node,
    when: dict[torch.fx.Node, int],
    homes: dict[torch.fx.Node, set[int]],
) -> list[torch.fx.Node]:
    """`written` and all that is, or may be, the same memory when `writer` runs.

    What lay in the same memory while torch traced it does. Elsewhere strides may be others, so that what was a copy there is a view: any operator that
    may return a view counts, too.
    """
    found, waiting = [written], [written]
    while waiting:
        node = waiting.pop()
        sources = node.args[:1] if _may_share(node) else ()
        readers = [user for user in node.users if _may_share(user) and when[user] < when[writer]]
        alike = [other for other in homes if homes[other] & homes[node] and when[other] < when[writer]]
        for other in (*sources, *readers, *alike):
            if isinstance(other, torch.fx.Node) and other not in found:
                found.append(other)
                waiting.append(other)
    return found


def _may_share(node: torch.fx.Node) -> bool:
    """Whether the result may lie in the memory of the first operand."""
    if node.op != "call_function":
        return False
    schema = getattr(node.target, "_schema", None)
    return (
        node.target is operator.getitem
        or (schema is not None and any(result.alias_info is not None for result in schema.returns))
        or base_name(node.target) in _UNDECLARED_VIEWS
    )


class OnCopy:
    """An in-place operator that has no other form, applied to a copy."""

    def __init__(self, target: Any) -> None:
        self.target = target

    def __str__(self) -> str:
        return str(self.target)

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.target(x.clone(), *args, **kwargs)
