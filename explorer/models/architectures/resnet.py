"""ResNet-18 and ResNet-50 for ImageNet: the networks that everybody compares with.

He, Zhang, Ren and Sun 2016, "Deep Residual Learning for Image Recognition", arXiv:1512.03385, table 1, with projection shortcuts
where the shape changes (option B). In the bottleneck block the stride sits in the 3 x 3 convolution, as in nearly all published
weights ("v1.5", Goyal et al. 2017, arXiv:1706.02677, section 5.1).
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional

__all__ = ["BasicBlock", "Bottleneck", "ResNet", "resnet18", "resnet50"]


def _shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False), nn.BatchNorm2d(out_channels)
    )


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut; ``width`` channels out."""

    expansion = 1

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = _shortcut(in_channels, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, in_channels, H, W)`` to ``(N, width, H / stride, W / stride)``."""
        out = functional.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return functional.relu(out + self.shortcut(x))


class Bottleneck(nn.Module):
    """1 x 1 down, 3 x 3, 1 x 1 up, and a shortcut; ``4 * width`` channels out."""

    expansion = 4

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.shortcut = _shortcut(in_channels, 4 * width, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, in_channels, H, W)`` to ``(N, 4 * width, H / stride, W / stride)``."""
        out = functional.relu(self.bn1(self.conv1(x)))
        out = functional.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return functional.relu(out + self.shortcut(x))


class ResNet(nn.Module):
    """7 x 7 stem, four stages of residual blocks, global average pool, linear.

    Parameters
    ----------
    block : callable
        `BasicBlock` or `Bottleneck`.
    depths : tuple of int
        Blocks in each of the four stages.
    num_classes : int
    in_channels : int
    """

    def __init__(
        self,
        block: type[BasicBlock | Bottleneck],
        depths: tuple[int, int, int, int],
        num_classes: int = 1000,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        channels = 64

        def stage(width: int, depth: int, stride: int) -> nn.Sequential:
            nonlocal channels
            make: Callable[[int, int, int], nn.Module] = block
            blocks = []
            for index in range(depth):
                blocks.append(make(channels, width, stride if index == 0 else 1))
                channels = block.expansion * width
            return nn.Sequential(*blocks)

        self.layer1 = stage(64, depths[0], 1)
        self.layer2 = stage(128, depths[1], 2)
        self.layer3 = stage(256, depths[2], 2)
        self.layer4 = stage(512, depths[3], 2)
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``(N, in_channels, H, W) float32`` to logits ``(N, num_classes)``."""
        x = functional.relu(self.bn1(self.conv1(x)))
        x = functional.max_pool2d(x, 3, stride=2, padding=1)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        x = functional.adaptive_avg_pool2d(x, 1).flatten(1)
        return self.fc(x)


def resnet18(num_classes: int = 1000, in_channels: int = 3) -> ResNet:
    """Build ResNet-18: 11,689,512 parameters with 1,000 classes; 1.8 G multiply-adds at 224 x 224."""
    return ResNet(BasicBlock, (2, 2, 2, 2), num_classes, in_channels)


def resnet50(num_classes: int = 1000, in_channels: int = 3) -> ResNet:
    """Build ResNet-50: 25,557,032 parameters with 1,000 classes; 4.1 G multiply-adds at 224 x 224."""
    return ResNet(Bottleneck, (3, 4, 6, 3), num_classes, in_channels)
