from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from explorer.errors import RunError
from explorer.pruning.masks import HeldMasks


def small_network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(3, 4))


def weights_of(network: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in network.named_parameters() if parameter.ndim > 1}


def random_masks(weights: dict[str, nn.Parameter], seed: int, density: float) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(weight.shape, generator=generator) < density for name, weight in weights.items()}


@given(st.integers(0, 100), st.floats(0.0, 1.0))
def test_apply_equals_a_plain_multiplication_and_a_second_time_changes_nothing(
    seed: int, density: float
) -> None:
    network = small_network(seed)
    weights = weights_of(network)
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    masks = random_masks(weights, seed, density)
    held = HeldMasks(weights)
    held.replace(masks)
    held.apply()
    once = copy.deepcopy(network.state_dict())
    for name, weight in weights.items():
        assert torch.equal(weight, before[name] * masks[name])
        assert held.zeros[name] == int((~masks[name]).sum())
    held.apply()
    assert all(torch.equal(once[name], value) for name, value in network.state_dict().items())


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_masked_weights_and_their_optimiser_state_stay_zero_and_others_train_as_ever(
    channels_last: bool, kind: str
) -> None:
    network = small_network(0)
    if channels_last:
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    weights = weights_of(network)
    masks = random_masks(weights, 3, 0.4)
    held = HeldMasks(weights)
    held.replace(masks)
    held.apply()
    optimizer: torch.optim.Optimizer = (
        torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-2)
        if kind == "sgd"
        else torch.optim.Adam(network.parameters(), lr=0.1)
    )
    # The oracle: the same steps with gradients that never reach a masked weight.
    twin = copy.deepcopy(network)
    twin_weights = weights_of(twin)
    twin_optimizer = type(optimizer)(twin.parameters(), **optimizer.defaults)
    for step in range(5):
        x = torch.randn(6, 2, 3, 3, generator=torch.Generator().manual_seed(step))
        for module, its_optimizer in ((network, optimizer), (twin, twin_optimizer)):
            its_optimizer.zero_grad()
            module(x).square().sum().backward()
            if module is twin:
                for name, weight in twin_weights.items():
                    assert weight.grad is not None
                    weight.grad.mul_(masks[name])
            its_optimizer.step()
        held.apply(optimizer)
    for name, weight in weights.items():
        assert int(torch.count_nonzero(weight[~masks[name]])) == 0
        for value in optimizer.state[weight].values():
            if isinstance(value, Tensor) and value.shape == weight.shape:
                assert int(torch.count_nonzero(value[~masks[name]])) == 0
        torch.testing.assert_close(weight, twin_weights[name])


def test_a_mask_that_does_not_fit_is_refused() -> None:
    held = HeldMasks(weights_of(small_network(0)))
    with pytest.raises(RunError, match=r"'0\.weight' has shape \(2, 2\), its weight \(3, 2, 3, 3\)"):
        held.replace({"0.weight": torch.ones(2, 2, dtype=torch.bool)})
    with pytest.raises(RunError, match="'5', which is not among"):
        held.replace({"5": torch.ones(2, 2, dtype=torch.bool)})
