"""The demo network: a residual CNN small enough to prune in a minute, wide enough that its latency is arithmetic and not call overhead.

It is a ResNet (He et al. 2016, "Deep Residual Learning for Image Recognition", arXiv:1512.03385, option B shortcuts) with one
basic block per stage, for 28 x 28 grey images: 1.2 million parameters and 40 million multiply-adds an image.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

__all__ = ["FashionBlock", "FashionResNet", "FashionStem"]


class FashionStem(nn.Module):
    """3 x 3 convolution of stride 2, batch norm, ReLU: halves the image at once, which is where most of the time is saved."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, in_channels, H, W)`` to ``(N, out_channels, H / 2, W / 2)``."""
        return functional.relu(self.bn(self.conv(x)))


class FashionBlock(nn.Module):
    """Basic residual block: two 3 x 3 convolutions; the shortcut is a 1 x 1 convolution where the shape changes."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential()
            self.shortcut.add_module(
                "conv", nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False)
            )
            self.shortcut.add_module("bn", nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, in_channels, H, W)`` to ``(N, out_channels, H / stride, W / stride)``."""
        out = functional.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return functional.relu(out + self.shortcut(x))


def _stage(in_channels: int, out_channels: int, stride: int, depth: int) -> nn.Module:
    first = FashionBlock(in_channels, out_channels, stride)
    more = [FashionBlock(out_channels, out_channels, 1) for _ in range(depth - 1)]
    return nn.Sequential(first, *more) if more else first


class FashionResNet(nn.Module):
    """Stem, three stages of basic blocks of strides 1, 2, 2, global average pool, one linear layer.

    Parameters
    ----------
    widths : tuple of int
        Channels of the three stages; the stem has as many as the first.
    num_classes : int
    in_channels : int
    depth : int
        Blocks of a stage; one in the demo.
    """

    def __init__(
        self,
        widths: tuple[int, int, int] = (64, 128, 256),
        num_classes: int = 10,
        in_channels: int = 1,
        depth: int = 1,
    ) -> None:
        super().__init__()
        self.stem = FashionStem(in_channels, widths[0])
        self.block1 = _stage(widths[0], widths[0], 1, depth)
        self.block2 = _stage(widths[0], widths[1], 2, depth)
        self.block3 = _stage(widths[1], widths[2], 2, depth)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(widths[2], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``(N, in_channels, H, W) float32`` to logits ``(N, num_classes)``."""
        x = self.block3(self.block2(self.block1(self.stem(x))))
        x = self.pool(x).flatten(1)
        return self.fc(x)
