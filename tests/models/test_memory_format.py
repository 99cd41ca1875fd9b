"""Training lays images out channels last, except where oneDNN's gradients would then be written beyond their buffer."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from explorer.models.memory_format import training_memory_format


@pytest.mark.parametrize(
    ("module", "format_"),
    [
        (nn.Conv2d(4, 6, 1, 2), torch.contiguous_format),
        (nn.Sequential(nn.Conv2d(3, 64, 3), nn.Conv2d(64, 16, 1, (1, 2), groups=8)), torch.contiguous_format),
        (
            nn.Sequential(nn.Conv2d(3, 64, 3, 2), nn.Conv2d(64, 6, 1, 2), nn.Conv2d(6, 4, 1)),
            torch.channels_last,
        ),
        (nn.Sequential(nn.Linear(4, 4), nn.Conv1d(4, 4, 1, 2)), torch.contiguous_format),
    ],
)
def test_strided_pointwise_convolutions_of_few_channels_are_not_trained_channels_last(
    module: nn.Module, format_: torch.memory_format
) -> None:
    n_dims = 4 if any(isinstance(part, nn.Conv2d) for part in module.modules()) else 3
    assert training_memory_format(module, torch.zeros([1] * n_dims)) is format_


GRADIENTS = """
import torch
from torch import nn
from explorer.models.memory_format import training_memory_format

torch.manual_seed(0)
torch.set_num_threads(1)
network = nn.Sequential(nn.Conv2d(4, 6, 1, 2), nn.ReLU(), nn.Conv2d(6, 7, 1, 2))
x, y = torch.randn(16, 4, 14, 14), torch.randn(16, 7, 4, 4)
wanted = nn.Sequential(nn.Conv2d(4, 6, 1, 2), nn.ReLU(), nn.Conv2d(6, 7, 1, 2)).double()
wanted.load_state_dict(network.state_dict())
((wanted(x.double()) - y) ** 2).sum().backward()
form = training_memory_format(network, x)
network.to(memory_format=form)
for _ in range(50):  # a damaged heap takes some time to be found
    network.zero_grad()
    out, others = network(x.contiguous(memory_format=form)), [bytearray(64) for _ in range(50)]
    ((out - y) ** 2).sum().backward()
for mine, true in zip(network.parameters(), wanted.parameters(), strict=True):
    torch.testing.assert_close(mine.grad.double(), true.grad, rtol=1e-4, atol=1e-4)
print("right")
"""


def test_their_gradients_are_right_and_the_process_lives() -> None:
    checked = os.environ | {
        "MALLOC_CHECK_": "3",
        "MALLOC_PERTURB_": "165",
    }  # glibc looks at its heap more closely
    done = subprocess.run(
        [sys.executable, "-c", GRADIENTS],
        env=checked,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout == "right\n", (done.returncode, done.stderr)
