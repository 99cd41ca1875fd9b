"""What a compiled network occupies, by the system's own count."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import explorer
from explorer.inference import larger_kernels, native
from explorer.inference.memory import Memory
from tests.inference.graphs import relative_error
from tests.inference.test_architectures_native import pruned

PAGE = 4096

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads what Linux says about its pages")


def resident(memories: list[Memory]) -> int:
    """Bytes that the system has set aside for these, from its own list of mappings."""
    chunks = [c for memory in memories for m in (memory, memory._code) if m for c in m._chunks]
    bounds = [(chunk.ctypes.data, chunk.ctypes.data + chunk.nbytes) for chunk in chunks]
    total, mine = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if "-" in first and not first.endswith(":"):
            start, end = (int(number, 16) for number in first.split("-"))
            mine = any(start < high and low < end for low, high in bounds)
        elif mine and first == "Rss:":
            total += int(rest[0]) << 10
    return total


def test_what_is_left_of_a_huge_page_is_given_back() -> None:
    memory = Memory()
    first = memory.zeros(3 << 20, np.uint8)
    first[:] = 1
    memory.trim()
    assert resident([memory]) <= (3 << 20) + PAGE
    second = memory.zeros(500_000, np.uint8)
    assert not second.any()
    second[:] = 2
    memory.trim()
    assert (first == 1).all()
    assert (second == 2).all()
    assert resident([memory]) <= (3 << 20) + 500_000 + 2 * PAGE


class Separable(nn.Sequential):
    """The layers of MobileNetV1, a quarter as wide."""

    def __init__(self) -> None:
        layers: list[nn.Module] = [nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU()]
        channels = 8
        for more, stride in [
            (16, 1),
            (32, 2),
            (32, 1),
            (64, 2),
            (64, 1),
            (128, 2),
            *[(128, 1)] * 5,
            (256, 2),
        ]:
            layers += [nn.Conv2d(channels, channels, 3, stride, 1, groups=channels), nn.ReLU()]
            layers += [nn.Conv2d(channels, more, 1), nn.ReLU()]
            channels = more
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 1000))


@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.skipif(native.current_isa().name == "torch", reason="no machine code on this machine")
def test_a_network_occupies_what_its_nonzeros_and_activations_allow(batch: int) -> None:
    torch.manual_seed(0)
    network = pruned(Separable().eval(), 0.9)
    x = torch.randn(batch, 3, 224, 224)
    engine = explorer.compile(network, x)
    with torch.no_grad():
        assert relative_error(engine(x), network(x)) < 1e-4
    gc.collect()
    weights = [module.weight for module in network.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    nonzeros = sum(int(weight.count_nonzero()) for weight in weights)
    steps, activations = engine._network.steps, engine._network.plan.memory
    assert steps is not None
    limit = larger_kernels.LIMIT * (8 * nonzeros + activations.n_bytes)
    occupied = resident([activations, steps.memory])
    assert occupied <= limit + 8 * PAGE
    # Of each image that goes through together, fewer activations than its largest two layers would take with gaps, and the image.
    together = engine._network.plan.images
    assert activations.n_bytes < together * 4 * 2.5 * (8 + 16) * 114 * 128
