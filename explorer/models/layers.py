"""Says what can be pruned in a network: its convolutions and linear layers, in the order in which they run, with size and work.

Layers are found by type and seen at work: one forward pass of the example input, watched by hooks. That gives the true order, the true
output sizes, and the layers that never run. Conventions: a layer is named by its dotted module name (the network itself, when it
is a single layer, by ""); one multiply-add counts 1; biases are neither pruned nor counted. The pass leaves no trace in the module.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from explorer.errors import ModelError

__all__ = ["PrunableLayer", "check_weights", "prunable_layers", "scan"]

_KINDS: tuple[tuple[type[nn.Module], str], ...] = (
    (nn.Conv1d, "conv1d"),
    (nn.Conv2d, "conv2d"),
    (nn.Conv3d, "conv3d"),
    (nn.Linear, "linear"),
)


@dataclass(frozen=True, slots=True)
class PrunableLayer:
    """One weight that can be pruned.

    Attributes
    ----------
    name : str
        Dotted module name; "" when the network itself is the layer.
    kind : {"conv1d", "conv2d", "conv3d", "linear"}
    weight_shape : tuple of int
        ``(out, in / groups, *kernel)`` or ``(out, in)``.
    n_params : int
        Elements of the weight (no bias).
    macs : int
        Multiply-adds for one row of the example input's batch, over all calls of all modules that share the weight.
    dense_ms : float or None
        Time of the layer inside the dense network in milliseconds, once measured.
    share : float or None
        `dense_ms` as a fraction of the dense network's time.
    tied : tuple of str
        Other module names that hold the same weight; pruning one prunes all.
    """

    name: str
    kind: str
    weight_shape: tuple[int, ...]
    n_params: int
    macs: int
    dense_ms: float | None = None
    share: float | None = None
    tied: tuple[str, ...] = ()


@dataclass(slots=True)
class _Weight:
    """What is known of one weight tensor while the network runs."""

    names: list[str]
    kind: str
    shape: tuple[int, ...]
    macs_per_output: int
    outputs: int = 0
    first_call: int | None = None
    first_name: str | None = None


@dataclass(slots=True)
class _Scan:
    """Weights by identity of their tensor, and the count of layer calls so far."""

    weights: dict[int, _Weight] = field(default_factory=dict)
    calls: int = 0

    def seen(self, key: int, name: str, n_outputs: int) -> None:
        weight = self.weights[key]
        weight.outputs += n_outputs
        if weight.first_call is None:
            weight.first_call, weight.first_name = self.calls, name
        self.calls += 1


def _kind_of(module: nn.Module) -> str | None:
    return next((kind for cls, kind in _KINDS if isinstance(module, cls)), None)


def _display(name: str) -> str:
    return repr(name) if name else "the model itself"


def check_weights(module: nn.Module) -> None:
    """Refuse a network that cannot be studied: weights that are NaN or infinite, elsewhere than on the CPU, or not materialised.

    A buffer may be infinite, as masks of attention and open bounds are, if it is not what a normalisation has learnt.

    Parameters
    ----------
    module : nn.Module

    Raises
    ------
    ModelError
    """
    parameters = dict(module.named_parameters())
    learnt = ("running_mean", "running_var")
    for name, tensor in (parameters | dict(module.named_buffers())).items():
        if torch.nn.parameter.is_lazy(tensor):
            raise ModelError(
                f"{name!r} has no shape yet (a lazy module): run the model once on an example input before loading it."
            )
        if tensor.device.type != "cpu":
            raise ModelError(
                f"{name!r} is on device '{tensor.device}'; the model must be on the CPU: pass model.cpu()."
            )
        must_be_finite = name in parameters or name.endswith(learnt)
        bad = int((~torch.isfinite(tensor) if must_be_finite else torch.isnan(tensor)).sum())
        if bad:
            raise ModelError(
                f"{name!r} has {bad} NaN or infinite values of {tensor.numel()}; the training that made it diverged. "
                "Load weights that are finite."
            )


@contextmanager
def _undisturbed(module: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients inside; training flags, random state and attention fast path as before outside.

    The flags are kept per module: people freeze batch norm in networks that train.
    """
    flags = [(child, child.training) for child in module.modules()]
    fastpath = torch.backends.mha.get_fastpath_enabled()
    module.eval()
    torch.backends.mha.set_fastpath_enabled(
        False
    )  # the fused encoder would run its layers without calling them
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
        for child, training in flags:
            child.training = training


def _register(module: nn.Module) -> tuple[_Scan, dict[int, list[str]]]:
    """Group the prunable modules of the network by weight tensor."""
    result = _Scan()
    names_of: dict[int, list[str]] = {}
    for name, child in module.named_modules(remove_duplicate=False):
        names_of.setdefault(id(child), []).append(name)
    for name, child in module.named_modules():
        kind = _kind_of(child)
        if kind is None:
            continue
        weight = child._parameters.get("weight")  # noqa: SLF001 - a parametrised weight shows as an attribute, but not here
        if weight is None:
            raise ModelError(
                f"the weight of {_display(name)} is computed from other tensors (parametrisation, weight norm or similar), so zeros would "
                "not stay. Remove it first, e.g. with torch.nn.utils.parametrize.remove_parametrizations or torch.nn.utils.prune.remove (layer, 'weight')."
            )
        if weight.dtype != torch.float32:
            raise ModelError(
                f"the weight of {_display(name)} is {weight.dtype}; float32 is needed: pass model.float()."
            )
        # (out, in / groups, *kernel): what one output element costs is all but the first.
        entry = result.weights.setdefault(
            id(weight), _Weight([], kind, tuple(weight.shape), math.prod(weight.shape[1:]))
        )
        entry.names.extend(names_of[id(child)])
    return result, names_of


def scan(module: nn.Module, example_input: Tensor) -> tuple[tuple[PrunableLayer, ...], tuple[str, ...]]:
    """Run the network once and list its prunable layers, and those that the run never reached.

    Parameters
    ----------
    module : nn.Module
    example_input : Tensor, (batch, ...)

    Returns
    -------
    layers : tuple of PrunableLayer
        In the order of their first call.
    not_executed : tuple of str
        Names of convolutions and linear layers that took no part.

    Raises
    ------
    ModelError
        When there is nothing to prune, a weight is unusable, or the forward pass fails.
    """
    if not isinstance(module, nn.Module):
        raise ModelError(f"a torch.nn.Module is needed, and {type(module).__name__} was passed.")
    if not isinstance(example_input, Tensor):
        raise ModelError(
            f"example_input must be a tensor (batch, ...), and {type(example_input).__name__} was passed."
        )
    if example_input.ndim == 0 or example_input.numel() == 0:
        raise ModelError(
            f"example_input has shape {tuple(example_input.shape)}; at least one row (batch, ...) is needed."
        )
    if example_input.device.type != "cpu":
        raise ModelError(f"example_input is on device '{example_input.device}'; pass example_input.cpu().")
    check_weights(module)
    found, names_of = _register(module)
    if not found.weights:
        compiled = (
            " A TorchScript module hides its layers: pass the nn.Module that it was made from."
            if isinstance(module, torch.jit.ScriptModule)
            else ""
        )
        raise ModelError(
            f"{type(module).__name__} has no layer that can be pruned; Conv1d, Conv2d, Conv3d and Linear are looked for.{compiled}"
        )

    def watch(child: nn.Module, _inputs: Any, output: Any) -> None:
        found.seen(id(child.weight), names_of[id(child)][0], output.numel())

    def watch_attention(child: nn.Module, _inputs: Any, output: Any) -> None:
        # nn.MultiheadAttention uses the weight of its out_proj without calling it; its input projection is no layer.
        assert isinstance(child, nn.MultiheadAttention)
        inner = child.out_proj
        found.seen(id(inner.weight), names_of[id(inner)][0], output[0].numel())

    handles = []
    try:
        for child in module.modules():
            if _kind_of(child) is not None:
                handles.append(child.register_forward_hook(watch))
            elif isinstance(child, nn.MultiheadAttention):
                handles.append(child.register_forward_hook(watch_attention))
        with _undisturbed(module):
            module(example_input)
    except Exception as error:
        raise ModelError(
            f"{type(module).__name__} fails on example_input of shape {tuple(example_input.shape)} and type {example_input.dtype}: "
            f"{type(error).__name__}: {error}. Pass an example_input as the model expects it, with the batch first."
        ) from error
    finally:
        for handle in handles:
            handle.remove()

    batch = example_input.shape[0]
    used = [weight for weight in found.weights.values() if weight.first_call is not None]
    unused = tuple(weight.names[0] for weight in found.weights.values() if weight.first_call is None)
    if not used:
        raise ModelError(
            f"{type(module).__name__} ran, but none of its {len(unused)} layers took part "
            f"({', '.join(_display(name) for name in unused[:3])} ...): "
            "the forward pass must call Conv1d, Conv2d, Conv3d or Linear modules."
        )
    layers = []
    for weight in sorted(used, key=lambda weight: weight.first_call or 0):
        name = weight.first_name if weight.first_name is not None else weight.names[0]
        layers.append(
            PrunableLayer(
                name=name,
                kind=weight.kind,
                weight_shape=weight.shape,
                n_params=math.prod(weight.shape),
                macs=weight.outputs * weight.macs_per_output // batch,
                tied=tuple(other for other in weight.names if other != name),
            )
        )
    return tuple(layers), unused


def prunable_layers(module: nn.Module, example_input: Tensor) -> tuple[PrunableLayer, ...]:
    """List the layers of a network that can be pruned, in the order in which they run.

    Parameters
    ----------
    module : nn.Module
        On the CPU, float32. Training flags, hooks, gradients and random state are left as they were.
    example_input : Tensor, (batch, ...)

    Returns
    -------
    tuple of PrunableLayer

    Raises
    ------
    ModelError
        When there is nothing to prune, a weight is NaN, infinite or unusable, or the forward pass fails.

    Warns
    -----
    UserWarning
        Names the layers that the example input never reached; they are not in the result.

    Examples
    --------
    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.Flatten(), nn.Linear(8 * 6 * 6, 10))
    >>> for layer in prunable_layers(net, torch.zeros(1, 3, 8, 8)):
    ...     print(layer.name, layer.kind, layer.weight_shape, layer.n_params, layer.macs)
    0 conv2d (8, 3, 3, 3) 216 7776
    2 linear (10, 288) 2880 2880
    """
    layers, not_executed = scan(module, example_input)
    if not_executed:
        warn_not_executed(not_executed, stacklevel=3)
    return layers


def warn_not_executed(names: tuple[str, ...], *, stacklevel: int) -> None:
    """Say once which layers are left out because the example input never reached them."""
    shown = ", ".join(_display(name) for name in names[:8]) + (" ..." if len(names) > 8 else "")
    warnings.warn(
        f"{len(names)} layer(s) never ran on the example input and are left out: {shown}",
        UserWarning,
        stacklevel=stacklevel,
    )
