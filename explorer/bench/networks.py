"""The networks of the benchmark, with random weights, and which of their layers are pruned: those that published comparisons prune."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from explorer.models import LoadedModel, PrunableLayer, architectures, load_model
from explorer.models.libraries import LIBRARIES

__all__ = ["NETWORKS", "BenchNetwork", "example_batch", "load_network"]


def _all_but_first(layers: tuple[PrunableLayer, ...]) -> tuple[PrunableLayer, ...]:
    return layers[1:]


def _all_but_ends(layers: tuple[PrunableLayer, ...]) -> tuple[PrunableLayer, ...]:
    return layers[1:-1]


def _pointwise(layers: tuple[PrunableLayer, ...]) -> tuple[PrunableLayer, ...]:
    """1 x 1 convolutions; depthwise ones have next to no weights."""
    return tuple(
        layer for layer in layers if len(layer.weight_shape) == 4 and layer.weight_shape[2:] == (1, 1)
    )


def _all_but_first_and_depthwise(layers: tuple[PrunableLayer, ...]) -> tuple[PrunableLayer, ...]:
    return tuple(layer for layer in layers[1:] if len(layer.weight_shape) != 4 or layer.weight_shape[1] > 1)


def _all(layers: tuple[PrunableLayer, ...]) -> tuple[PrunableLayer, ...]:
    return layers


@dataclass(frozen=True, slots=True)
class BenchNetwork:
    """One network of the benchmark.

    Attributes
    ----------
    build : callable
        Makes it.
    input_shape : tuple of int
        Of one sample.
    pruned : callable
        Chooses, of all prunable layers, those that are pruned.
    rule : str
        The same in words, for the head of the table.
    """

    build: Callable[[], nn.Module]
    input_shape: tuple[int, ...]
    pruned: Callable[[tuple[PrunableLayer, ...]], tuple[PrunableLayer, ...]]
    rule: str


_IMAGE = (3, 224, 224)
DEMO = BenchNetwork(nn.Identity, (), _all_but_ends, "all layers but the first and the last")
OTHERS = BenchNetwork(
    nn.Identity, (), _all_but_first_and_depthwise, "all layers but the first and depthwise ones"
)
NETWORKS = {
    "resnet18": BenchNetwork(architectures.resnet18, _IMAGE, _all_but_first, "all layers but the first"),
    "resnet50": BenchNetwork(architectures.resnet50, _IMAGE, _all_but_first, "all layers but the first"),
    "mobilenet_v1": BenchNetwork(architectures.mobilenet_v1, _IMAGE, _pointwise, "1 x 1 convolutions"),
    "mobilenet_v2": BenchNetwork(architectures.mobilenet_v2, _IMAGE, _pointwise, "1 x 1 convolutions"),
    "vgg11": BenchNetwork(architectures.vgg11, _IMAGE, _all_but_first, "all layers but the first"),
    "bert": BenchNetwork(architectures.bert_base_encoder, (128, 768), _all, "all linear layers"),
}


def load_network(name: str) -> tuple[LoadedModel, BenchNetwork]:
    """Load one of `NETWORKS` or of a library, with random weights and input from seed 0, or whatever else `explorer.load_model` knows, such as the demo."""
    network = NETWORKS.get(name)
    torch.manual_seed(0)
    if name.partition(":")[0] in LIBRARIES:
        return load_model(name, pretrained=False), OTHERS
    if network is None:
        return load_model(name), DEMO
    return load_model(network.build(), torch.randn(1, *network.input_shape), name=name), network


def example_batch(model: LoadedModel, batch_size: int) -> torch.Tensor:
    """A batch of samples that differ, so that their outputs tell whether an engine has mixed them up: (batch_size, ...), of the example input's type.

    The first is the first of the model's example input. The others are noise with its mean and standard deviation; where it holds whole numbers, such as
    the ids of tokens, its own entries in other orders. They are the same at every call.
    """
    sample = model.example_input[:1]
    n_others = batch_size - 1
    generator = torch.Generator().manual_seed(1)  # not the noise of `calibrate`
    if sample.is_floating_point():
        noise = torch.randn(n_others, *sample.shape[1:], generator=generator, dtype=sample.dtype)
        deviation = float(sample.std(correction=0)) or 1.0
        return torch.cat([sample, noise * deviation + sample.mean()])
    orders = [torch.randperm(sample.numel(), generator=generator) for _ in range(n_others)]
    return torch.cat([sample, *(sample.flatten()[order].reshape(sample.shape) for order in orders)])
