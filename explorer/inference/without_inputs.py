"""Values that depend on no input and no weight: positions, and masks that are made of them. Libraries make masks that let everything through."""

from __future__ import annotations

import torch
from torch import Tensor

from explorer.inference.graph import Graph, computed, is_pure


class WithoutInputs:
    """Computes them.

    Parameters
    ----------
    graph : Graph
        As it was captured: sizes are those of the example.
    """

    def __init__(self, graph: Graph) -> None:
        follow = {*graph.parameter_names, *(operation.output for operation in graph.derived)}
        self._constants = {name: value for name, value in graph.constants.items() if name not in follow}
        self._producer = {operation.output: operation for operation in graph.operations}
        self._known: dict[str, Tensor | None] = {}

    def value(self, name: str) -> Tensor | None:
        """The value of this name, or None where it depends on something."""
        if name in self._constants:
            return self._constants[name]
        if name in self._known:
            return self._known[name]
        self._known[name] = None
        operation = self._producer.get(name)
        if operation is not None and operation.kind == "torch" and is_pure(operation):
            parts = {ref: self.value(ref) for ref in operation.references()}
            if all(part is not None for part in parts.values()):
                with torch.no_grad():
                    value = computed(operation, parts)
                self._known[name] = value if isinstance(value, Tensor) else None
        return self._known[name]


def lets_all_through(mask: Tensor) -> bool:
    """Whether attention is the same without this mask: a boolean one that is true everywhere, or one of zeros that would be added."""
    return bool(mask.all()) if mask.dtype == torch.bool else not bool(mask.count_nonzero())
