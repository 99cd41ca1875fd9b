"""How far the answers of a compiled network are from those of the module that it came from."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from explorer.errors import EngineError


@dataclass(frozen=True, slots=True)
class Deviation:
    """The difference of a compiled network's outputs from the float32 outputs of its module, see `SparseModule.compare`.

    There is none where both are the same infinity, or NaN. Where only one is, the errors are infinite or NaN.

    Attributes
    ----------
    relative_l2 : float
        Euclidean norm of the difference / that of the module's (finite) outputs, over all floating-point outputs. float32 against float32 gives about 1e-6.
        Where all that the module answers is zero: 0 when the network answers the same, else 1.
    largest : float
        The largest absolute difference of any one number, in the units of the outputs.
    agreement : float or None
        Share of the samples for which both name the same class, of outputs of shape (samples, classes); None when there is no such output.
    precision : str
        What the compiled network computes in.
    """

    relative_l2: float
    largest: float
    agreement: float | None
    precision: str


def deviation(outputs: Any, wanted: Any, precision: str) -> Deviation:
    """Compare two results of the same structure.

    Raises
    ------
    EngineError
        When there is no floating-point output to compare.
    """
    pairs = [
        (mine.double(), theirs.double())
        for mine, theirs in zip(pytree.tree_leaves(outputs), pytree.tree_leaves(wanted), strict=True)
        if isinstance(theirs, Tensor) and theirs.is_floating_point() and theirs.numel()
    ]
    if not pairs:
        raise EngineError("The network returns no floating-point tensor; there is nothing to compare.")
    differences = [_difference(mine, theirs) for mine, theirs in pairs]
    norm = sum(float(theirs[theirs.isfinite()].square().sum()) for _, theirs in pairs) ** 0.5
    error = sum(float(d.square().sum()) for d in differences) ** 0.5
    classes = [
        (mine.argmax(1) == theirs.argmax(1)).double()
        for mine, theirs in pairs
        if theirs.dim() == 2 and theirs.shape[1] > 1
    ]
    return Deviation(
        relative_l2=error / norm if norm else float(error > 0),
        largest=float(torch.stack([d.max() for d in differences]).max()),  # Python's max would lose a NaN
        agreement=float(torch.cat(classes).mean()) if classes else None,
        precision=precision,
    )


def _difference(mine: Tensor, theirs: Tensor) -> Tensor:
    alike = (mine == theirs) | (mine.isnan() & theirs.isnan())
    return (mine - theirs).abs().masked_fill(alike, 0.0)


class Source:
    """The module that a network was compiled from, as long as someone else keeps it, and what its weights were then.

    In-place changes and replaced tensors are noticed, changes through ``tensor.data`` are not: torch does not count those.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)
        self._weights = _versions(module)

    def module(self) -> nn.Module:
        """The module.

        Raises
        ------
        EngineError
            When it is gone, or its weights are not those that were compiled.
        """
        module = self._module()
        if module is None:
            raise EngineError(
                "The module that this network was compiled from is gone. Pass one with the same weights: sparse.compare(x, module=net)."
            )
        if _versions(module) != self._weights:
            raise EngineError(
                "The module's weights have changed since they were compiled. Call sparse.update_weights(module) first, or pass a module with the "
                "weights that were compiled: sparse.compare(x, module=net)."
            )
        return module


def _versions(module: nn.Module) -> dict[str, tuple[int, int]]:
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return {
        name: (t.data_ptr(), 0 if t.is_inference() else t._version)  # noqa: SLF001 - torch has no public name for it
        for name, t in tensors
    }
