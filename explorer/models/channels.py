"""Which output channels belong together: what structured pruning must remove at once.

A channel that is taken out of one layer must be taken out of every layer whose outputs are added to it, or scaled by it: the layers of a residual stage share their
channels, and a depthwise convolution has those of its input. One forward pass is watched operation by operation; each tensor carries the group of the channels along one of
its dimensions, and where two tensors meet in a sum or a product their groups become one. Fang, Ma, Song, Mi and Wang, "DepGraph: Towards any structural pruning"
(2023), find the same groups from the gradient graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from explorer.errors import ModelError
from explorer.models.layers import prunable_layers

__all__ = ["ChannelGroup", "channel_groups"]


@dataclass(frozen=True, slots=True)
class ChannelGroup:
    """Layers that share their output channels.

    Attributes
    ----------
    layers : tuple of str
        Dotted names of convolutions and linear layers, in the order in which they run; the first names the group.
    norms : tuple of str
        BatchNorms over these channels.
    n_channels : int
    """

    layers: tuple[str, ...]
    norms: tuple[str, ...]
    n_channels: int

    @property
    def name(self) -> str:
        """Name of its first layer."""
        return self.layers[0]


@dataclass(frozen=True, slots=True)
class _Label:
    """The channels along dimension `dim` of a tensor: groups and how many channels of each, one after the other."""

    dim: int
    segments: tuple[tuple[int, int], ...]

    @property
    def size(self) -> int:
        return sum(count for _, count in self.segments)


_BINARY = {"add", "sub", "mul", "div", "maximum", "minimum", "lerp", "where", "addcmul"}
_NORMS = {
    "native_batch_norm",
    "_native_batch_norm_legit",
    "_native_batch_norm_legit_no_training",
    "cudnn_batch_norm",
    "batch_norm",
}
_RESHAPES = {"view", "_unsafe_view", "reshape", "flatten", "squeeze", "unsqueeze", "expand"}
# One value of the output for each of the input, or for a window of the same channel; `mean` and `sum` lose other dimensions only.
_SAME_CHANNELS = {
    "relu", "relu_", "hardtanh", "hardtanh_", "hardswish", "hardswish_", "silu", "silu_", "gelu", "sigmoid", "sigmoid_", "hardsigmoid", "hardsigmoid_", "tanh",
    "leaky_relu", "leaky_relu_", "elu", "elu_", "prelu", "_prelu_kernel", "softplus", "mish", "clamp", "clamp_min", "clamp_max", "neg", "abs", "dropout", "native_dropout",
    "max_pool2d_with_indices", "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "_adaptive_avg_pool2d", "adaptive_max_pool2d", "mkldnn_max_pool2d",
    "upsample_nearest2d", "upsample_bilinear2d", "constant_pad_nd", "reflection_pad2d", "clone", "contiguous", "detach", "alias", "to", "_to_copy", "copy_", "mean", "sum", "amax",
}  # fmt: skip


class _Watch(TorchDispatchMode):
    """Follows channels through a forward pass."""

    def __init__(self, module: nn.Module, layers: dict[str, str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self._layer_of = {
            id(module.get_submodule(name).get_parameter("weight")): layer for name, layer in layers.items()
        }
        self._norm_of = {
            id(child.weight): name
            for name, child in module.named_modules()
            if isinstance(child, _BatchNorm) and child.weight is not None
        }
        self._labels: dict[int, _Label] = {}
        self._weights: dict[int, int] = {}  # a view of a weight: the weight
        self._alive: list[Tensor] = []  # an object's number is its own only while it lives
        self._parent: list[int] = []
        self.layers: dict[int, list[str]] = {}
        self.norms: dict[int, list[str]] = {}
        self.sizes: dict[int, int] = {}
        self.open: set[int] = set()

    # Groups, joined as they meet

    def root(self, group: int) -> int:
        """Return the group that this one has become."""
        while self._parent[group] != group:
            group = self._parent[group]
        return group

    def _new(self, size: int) -> int:
        group = len(self._parent)
        self._parent.append(group)
        self.sizes[group] = size
        return group

    def _join(self, one: int, other: int) -> None:
        one, other = self.root(one), self.root(other)
        if one != other:
            self._parent[max(one, other)] = min(one, other)

    def close(self, output: Any) -> None:
        """Channels that leave the network must all stay."""
        for tensor in tree_leaves(output):
            self._spoil(self._labels.get(id(tensor)))

    def _spoil(self, label: _Label | None) -> None:
        for group, _ in label.segments if label is not None else ():
            self.open.add(group)

    # Operations

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        result = output[0] if isinstance(output, tuple | list) and output else output
        if isinstance(result, Tensor):
            self._alive.append(result)
            label = self._follow(func.overloadpacket.__name__, args, result)
            if label is not None and label.size == result.shape[label.dim]:
                self._labels[id(result)] = label
        return output

    def _follow(self, name: str, args: Sequence[Any], result: Tensor) -> _Label | None:
        tensors = [arg for arg in tree_leaves(args) if isinstance(arg, Tensor)]
        first = self._labels.get(id(tensors[0])) if tensors else None
        if name in {"t", "transpose", "permute"} and id(tensors[0]) in self._layer_of:
            self._weights[id(result)] = id(tensors[0])
            return None
        if name in {"convolution", "_convolution", "mkldnn_convolution", "conv2d", "conv1d", "conv3d"}:
            return self._convolved(tensors, first, result, args)
        if name in {"addmm", "mm", "linear", "matmul", "bmm"}:
            weight = next((t for t in tensors if id(t) in self._weights or id(t) in self._layer_of), None)
            return self._made(weight, result, result.dim() - 1)
        if name in _NORMS:
            norm = next((self._norm_of[id(t)] for t in tensors if id(t) in self._norm_of), None)
            for group, _ in first.segments if first is not None and norm is not None else ():
                self.norms.setdefault(group, []).append(str(norm))
            if first is not None and len(first.segments) > 1 and norm is not None:
                self._spoil(first)  # a norm over several groups cannot be cut with one
            return first
        if name.rstrip("_") in _BINARY:
            return self._met(tensors, result)
        if name == "cat":
            return self._concatenated(args, result)
        if first is None:
            return None
        if name in {"permute", "transpose"}:
            return self._permuted(name, args, first, result)
        if name in _RESHAPES:
            return self._reshaped(first, tensors[0], result)
        if name in _SAME_CHANNELS:
            keeps = first.dim < result.dim() and result.shape[: first.dim] == tensors[0].shape[: first.dim]
            return first if keeps else None
        return None

    def _made(self, weight: Tensor | None, result: Tensor, dim: int) -> _Label | None:
        layer = None if weight is None else self._layer_of.get(self._weights.get(id(weight), id(weight)))
        if layer is None:
            return None
        known = next((group for group, names in self.layers.items() if layer in names), None)
        group = self._new(result.shape[dim]) if known is None else known
        if known is None:
            self.layers[group] = [layer]
        return _Label(dim, ((group, result.shape[dim]),))

    def _convolved(
        self, tensors: Sequence[Tensor], first: _Label | None, result: Tensor, args: Sequence[Any]
    ) -> _Label | None:
        weight = tensors[1]
        groups = args[-1] if isinstance(args[-1], int) and not isinstance(args[-1], bool) else 1
        groups = tensors[0].shape[1] // weight.shape[1] if weight.shape[1] else groups
        label = self._made(weight, result, 1)
        if groups > 1 and label is not None:
            if (
                weight.shape[1] == 1
                and weight.shape[0] == groups
                and first is not None
                and len(first.segments) == 1
            ):
                self._join(
                    label.segments[0][0], first.segments[0][0]
                )  # depthwise: each channel is made of its own
            else:
                self._spoil(label)  # what stays must still divide into equal groups
                self._spoil(first)
        return label

    def _met(self, tensors: Sequence[Tensor], result: Tensor) -> _Label | None:
        labelled = [(t, self._labels[id(t)]) for t in tensors if id(t) in self._labels]
        if not labelled:
            return None
        tensor, label = labelled[0]
        # Dimensions are counted from the end: the smaller tensor is spread over the larger.
        from_end = tensor.dim() - label.dim
        for other in tensors:
            if other is tensor or other.dim() < from_end or other.shape[other.dim() - from_end] == 1:
                continue
            met = self._labels.get(id(other))
            same = met is not None and other.dim() - met.dim == from_end
            counts = [count for _, count in label.segments]
            if met is None or not same or [count for _, count in met.segments] != counts:
                self._spoil(label)
                self._spoil(met)
                continue
            for (one, _), (two, _) in zip(label.segments, met.segments, strict=True):
                self._join(one, two)
        return _Label(result.dim() - from_end, label.segments)

    def _concatenated(self, args: Sequence[Any], result: Tensor) -> _Label | None:
        parts = list(args[0])
        dim = (args[1] if len(args) > 1 else 0) % result.dim()
        labels = [self._labels.get(id(part)) for part in parts]
        known = [label for label in labels if label is not None]
        if len(known) == len(parts) and all(label.dim == dim for label in known):
            return _Label(dim, tuple(segment for label in known for segment in label.segments))
        if len(known) == len(parts) and all(label.segments == known[0].segments for label in known):
            return known[0]
        for label in known:
            self._spoil(label)
        return None

    @staticmethod
    def _permuted(name: str, args: Sequence[Any], label: _Label, result: Tensor) -> _Label:
        order = list(range(result.dim()))
        if name == "permute":
            order = [dim % result.dim() for dim in args[1]]
        else:
            a, b = args[1] % result.dim(), args[2] % result.dim()
            order[a], order[b] = b, a
        return _Label(order.index(label.dim), label.segments)

    @staticmethod
    def _reshaped(label: _Label, before: Tensor, after: Tensor) -> _Label | None:
        if label.dim < after.dim() and before.shape[: label.dim + 1] == after.shape[: label.dim + 1]:
            return label
        if label.dim == before.dim() - 1 and after.dim() and before.shape[-1] == after.shape[-1]:
            return _Label(after.dim() - 1, label.segments)
        return None


def channel_groups(module: nn.Module, example_input: Tensor) -> tuple[ChannelGroup, ...]:
    """Return the groups of layers whose output channels can be removed, in the order in which they run.

    Left out are channels that must all stay: those of the network's outputs, of grouped convolutions that are not depthwise, and those that meet others in a way that is not
    understood.

    Parameters
    ----------
    module : nn.Module
        Not changed.
    example_input : Tensor, (batch, ...)

    Raises
    ------
    ModelError
        As `prunable_layers`.

    Examples
    --------
    >>> net = nn.Sequential(
    ...     nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10)
    ... )
    >>> channel_groups(net, torch.zeros(1, 3, 8, 8))
    (ChannelGroup(layers=('0',), norms=('1',), n_channels=8),)
    """
    layers = prunable_layers(module, example_input)
    names = {alias: layer.name for layer in layers for alias in (layer.name, *layer.tied)}
    flags = [(child, child.training) for child in module.modules()]
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    module.eval()
    watch = _Watch(module, names)
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad(), watch:
            output = module(example_input)
        watch.close(output)
    except RuntimeError as error:
        raise ModelError(
            f"The channels of this {type(module).__name__} cannot be followed: {error}"
        ) from error
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
        for child, training in flags:
            child.training = training
    found: dict[int, tuple[list[str], list[str]]] = {}
    for group, made in watch.layers.items():
        found.setdefault(watch.root(group), ([], []))[0].extend(made)
    for group, norms in watch.norms.items():
        found.setdefault(watch.root(group), ([], []))[1].extend(norms)
    closed = {watch.root(group) for group in watch.open}
    place = {layer.name: number for number, layer in enumerate(layers)}
    groups = [
        ChannelGroup(
            tuple(sorted(dict.fromkeys(made), key=place.__getitem__)),
            tuple(dict.fromkeys(norms)),
            watch.sizes[group],
        )
        for group, (made, norms) in found.items()
        if made and group not in closed
    ]
    return tuple(sorted(groups, key=lambda group: place[group.name]))
