"""A classifier with zeros takes as many images at once as a vector has lanes: the same numbers as torch's, for any number of images, inputs and outputs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import explorer
from explorer.inference import conv_steps
from explorer.inference.kernels.linear_images import LinearImagesKernel
from tests.inference.graphs import relative_error
from tests.inference.test_kernels import ISAS, compute_in
from tests.inference.test_networks import pruned
from tests.inference.test_partners import needs_code

pytestmark = needs_code


@given(
    inputs=st.integers(1, 70),
    outputs=st.integers(1, 70),
    images=st.integers(1, 40),
    threads=st.integers(1, 3),
    sparsity=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    capped=st.booleans(),
    seed=st.integers(0, 3),
)
@settings(max_examples=45, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_layer_equals_torch(
    inputs: int, outputs: int, images: int, threads: int, sparsity: float, capped: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    layer = nn.Linear(inputs, outputs)
    with torch.no_grad():
        layer.weight[torch.rand(outputs, inputs) < sparsity] = 0
    network = nn.Sequential(layer, nn.ReLU6()) if capped else layer
    x = 3 * torch.randn(images, inputs)
    engine = explorer.compile(network, x, sparse="sparse", threads=threads)
    for n in {images, 1, max(images - 1, 1), (images + 1) // 2}:
        torch.testing.assert_close(engine(x[:n]), network(x[:n]).detach(), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compute_in(isa, "fp32", monkeypatch)
    taken = []

    class Noted(LinearImagesKernel):
        def scratch_bytes(self, n_in: int, isa: object) -> int:
            taken.append(n_in)
            return super().scratch_bytes(n_in, isa)  # type: ignore[arg-type]

    monkeypatch.setattr(conv_steps.linear_images, "LinearImagesKernel", Noted)
    torch.manual_seed(0)
    network = pruned(
        nn.Sequential(nn.Conv2d(3, 40, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(40, 37)), 0.8
    )
    x = torch.randn(16, 3, 5, 5)
    engine = explorer.compile(network, x, sparse="sparse")
    assert 40 in taken
    for n in (16, 3):
        assert relative_error(engine(x[:n]), network(x[:n])) < 1e-5


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_an_image_does_not_feel_its_neighbours(bad: float) -> None:
    torch.manual_seed(0)
    layer = pruned(nn.Sequential(nn.Linear(50, 20)), 0.8)
    with torch.no_grad():
        layer[0].weight[:, 7] = 0  # what nobody reads
    x = torch.randn(16, 50)
    engine = explorer.compile(layer, x, sparse="sparse")
    wanted = layer(x).detach()
    x[:, 7] = bad
    assert relative_error(engine(x), wanted) < 1e-5
    x[5] = bad
    found = engine(x)
    assert not torch.isfinite(found[5]).all()
    others = [i for i in range(16) if i != 5]
    assert relative_error(found[others], wanted[others]) < 1e-5


def test_inputs_that_no_cache_would_hold_are_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conv_steps, "l2_bytes", lambda: 4096)
    torch.manual_seed(0)
    layer, x = pruned(nn.Sequential(nn.Linear(300, 20)), 0.8), torch.randn(16, 300)
    engine = explorer.compile(layer, x, sparse="sparse")
    assert engine._network._runner is not None
    assert engine._network._runner.scratch_bytes < LinearImagesKernel().scratch_bytes(
        300, engine._network.isa.single
    )
    assert relative_error(engine(x), layer(x)) < 1e-5
