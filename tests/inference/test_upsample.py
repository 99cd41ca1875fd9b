"""Nearest-neighbour upsampling, against its numpy twin and torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import explorer
from explorer.inference import native
from explorer.inference.kernels import upsample
from tests.inference.graphs import relative_error
from tests.inference.test_kernels import ISAS, compute_in, run_by
from tests.inference.test_partners import needs_code


class Decoder(nn.Module):
    """The way up of a U-Net: upsample, join, convolve."""

    def __init__(self, scale: tuple[int, int]) -> None:
        super().__init__()
        self.scale = scale
        self.down = nn.Conv2d(3, 8, 3, scale, 1)
        self.up = nn.Conv2d(8 + 3, 5, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        deep = self.down(x).relu()
        return self.up(torch.cat([nn.functional.interpolate(deep, size=x.shape[2:]), x], 1))


@needs_code
@given(
    images=st.integers(1, 3),
    channels=st.integers(1, 20),
    size=st.tuples(st.integers(1, 9), st.integers(1, 37)),
    scale=st.tuples(st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 2, 4])),
)
@settings(max_examples=40, deadline=None)
def test_upsampling_equals_its_numpy_twin_and_the_twin_is_torchs(
    images: int, channels: int, size: tuple[int, int], scale: tuple[int, int]
) -> None:
    x = torch.randn(images, channels, *size, generator=torch.Generator().manual_seed(0))
    module = nn.Sequential(nn.Upsample(scale_factor=scale), nn.ReLU6())
    wanted = upsample.reference(x.numpy(), scale).clip(0, 6)
    np.testing.assert_array_equal(wanted, module(x).numpy())
    engine = explorer.compile(module, x)
    for _ in range(2):
        np.testing.assert_array_equal(engine(x).numpy(), wanted)
    # An activation between operators of torch is one of torch too: upsampling alone would be no reason to leave it.
    assert not [name for name in engine.fallbacks if "upsample" in name]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    ("scale", "size"), [((2, 2), (12, 28)), ((4, 4), (16, 64)), ((1, 2), (4, 60)), ((2, 1), (8, 8))]
)
def test_what_lies_around_the_pixels_is_zero_for_the_convolution_that_follows(
    isa: str, scale: tuple[int, int], size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_by(isa, monkeypatch)
    torch.manual_seed(0)
    network, x = Decoder(scale).eval(), torch.randn(2, 3, *size)
    engine = explorer.compile(network, x, threads=2)
    assert engine.fallbacks == ()
    with torch.no_grad():
        for _ in range(2):  # the second time in memory that other values have been in
            assert relative_error(engine(x), network(x)) < 1e-5


def test_float16_is_repeated_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    compute_in(native.current_isa().name, "fp16", monkeypatch)
    torch.manual_seed(0)
    network, x = Decoder((2, 2)).eval(), torch.randn(1, 3, 12, 28)
    engine = explorer.compile(network, x, precision="fp16")
    assert engine.fallbacks == ()
    assert relative_error(engine(x), network(x).detach()) < 5e-3


@pytest.mark.parametrize(
    "options",
    [
        {"scale_factor": 3},
        {"scale_factor": 1.5},
        {"scale_factor": 2.2},
        {"size": (5, 7)},
        {"scale_factor": 32},
        {"scale_factor": 2, "mode": "bilinear"},
    ],
)
def test_other_scales_and_modes_run_through_torch_and_are_right(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Upsample(**options), nn.Conv2d(4, 2, 3)).eval()
    x = torch.randn(1, 3, 8, 9)
    engine = explorer.compile(network, x)
    assert len(engine.fallbacks) == 1
    assert relative_error(engine(x), network(x).detach()) < 1e-5


@pytest.mark.parametrize("exact", ["nearest", "nearest-exact"])
def test_both_nearest_modes_are_one_for_whole_scales(exact: str) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Upsample(scale_factor=2, mode=exact)).eval()
    x = torch.randn(1, 3, 8, 9)
    engine = explorer.compile(network, x)
    assert engine.fallbacks == ()
    assert relative_error(engine(x), network(x).detach()) < 1e-5
