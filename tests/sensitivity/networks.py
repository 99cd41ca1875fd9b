"""Networks that other processes can import: what workers of a pool unpickle."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor, nn


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6)
        self.middle, self.fc = nn.Conv2d(6, 6, 3), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.middle(torch.relu(self.bn(self.conv(x)))))
        return self.fc(x.mean((2, 3))) * 4


class Fragile(Small):
    """Ends the process that runs it, once, unless it is the one that made it; with a marker file it does so once in all."""

    def __init__(self, marker: str = "") -> None:
        super().__init__()
        self.home, self.marker = os.getpid(), marker

    def forward(self, x: Tensor) -> Tensor:
        if os.getpid() != self.home and not (self.marker and Path(self.marker).exists()):
            if self.marker:
                Path(self.marker).touch()
            os._exit(3)
        return super().forward(x)


def small(cls: type[Small] = Small, *args: str) -> Small:
    torch.manual_seed(0)
    net = cls(*args).eval()
    with torch.no_grad():
        net.bn.running_var.uniform_(0.3, 2)
    return net


def images(n: int = 80) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 2, 8, 8, generator=generator), torch.randint(4, (n,), generator=generator)


def with_a_dead_layer() -> nn.Module:
    """A network with a layer that has no influence; of a class that no other process can import."""

    class Dead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.alive, self.dead = nn.Linear(128, 5), nn.Linear(128, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.alive(x.flatten(1)) + 0 * self.dead(x.flatten(1))

    return Dead()
