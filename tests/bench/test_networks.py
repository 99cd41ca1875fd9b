"""What the benchmark prunes is what the published comparisons prune."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import nn

from explorer.bench.networks import DEMO, NETWORKS, example_batch, load_network
from explorer.models import LoadedModel, prunable_layers


@pytest.mark.parametrize(
    # prunable layers, and those that are pruned
    ("name", "all_layers", "pruned"),
    [("resnet50", 54, 53), ("mobilenet_v1", 28, 13), ("mobilenet_v2", 53, 34)],
)
def test_the_layers_that_are_pruned(name: str, all_layers: int, pruned: int) -> None:
    network = NETWORKS[name]
    layers = prunable_layers(network.build().eval(), torch.zeros(1, 3, 64, 64))
    chosen = network.pruned(layers)
    assert (len(layers), len(chosen)) == (all_layers, pruned)
    if name == "mobilenet_v1":
        # Table 2 of the paper: 74.59 % of the parameters are in 1 x 1 convolutions.
        share = sum(layer.n_params for layer in chosen) / sum(layer.n_params for layer in layers)
        assert share == pytest.approx(0.7459, abs=0.005)


def test_all_of_an_encoder_is_pruned_and_all_but_the_ends_of_the_demo() -> None:
    layers = prunable_layers(
        nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)), torch.zeros(1, 4)
    )
    assert NETWORKS["bert"].pruned(layers) == layers
    assert [layer.name for layer in DEMO.pruned(layers)] == ["1"]


def test_a_name_loads_the_same_network_and_input_each_time() -> None:
    (one, network), (two, _) = load_network("mobilenet_v2"), load_network("mobilenet_v2")
    assert network is NETWORKS["mobilenet_v2"]
    assert one.example_input.shape == (1, 3, 224, 224)
    assert torch.equal(one.example_input, two.example_input)
    assert torch.equal(one.module.stem[0].weight, two.module.stem[0].weight)
    demo, rule = load_network("demo:fashion-resnet")
    assert rule is DEMO
    assert demo.name == "fashion-resnet"


def with_example(example: torch.Tensor) -> LoadedModel:
    return LoadedModel("any", nn.Identity(), example, ())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_samples_of_a_batch_differ_and_are_alike_in_size(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    example = (torch.randn(2, 3, 32, 32) * 5 + 20).to(dtype)
    batch = example_batch(with_example(example), 4)
    assert batch.shape == (4, 3, 32, 32)
    assert batch.dtype == dtype
    assert torch.equal(batch[0], example[0])
    assert all(float((one - two).abs().mean()) > 3 for one, two in combinations(batch, 2))
    for sample in batch:
        assert float(sample.mean()) == pytest.approx(20, abs=0.5)
        assert float(sample.std()) == pytest.approx(5, abs=0.5)
    assert torch.equal(batch, example_batch(with_example(example), 4))
    assert torch.equal(example_batch(with_example(example), 1), example[:1])


def test_an_example_of_zeros_has_other_samples_beside_it() -> None:
    batch = example_batch(with_example(torch.zeros(1, 8)), 3)
    assert torch.equal(batch[0], torch.zeros(8))
    assert not torch.equal(batch[1], batch[2])
    assert bool((batch[1:] != 0).all())


def test_token_ids_stay_those_of_the_example() -> None:
    example = torch.tensor([[101, 7592, 2088, 999, 17, 102]])
    batch = example_batch(with_example(example), 5)
    assert batch.dtype == torch.int64
    assert torch.equal(batch[0], example[0])
    assert all(sorted(sample.tolist()) == sorted(example[0].tolist()) for sample in batch)
    assert len({tuple(sample.tolist()) for sample in batch}) > 3
