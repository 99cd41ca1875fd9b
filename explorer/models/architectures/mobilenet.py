"""MobileNetV2 for ImageNet: depthwise and narrow 1 x 1 convolutions, the hard case for a sparse engine.

Sandler, Howard, Zhu, Zhmoginov and Chen 2018, "MobileNetV2: Inverted Residuals and Linear Bottlenecks", arXiv:1801.04381, table 2,
width multiplier 1.
"""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["InvertedResidual", "MobileNetV2", "mobilenet_v2"]

# Rows of table 2: expansion t, output channels c, repeats n, stride s of the first.
_ROWS = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


def _conv_bn_relu6(
    in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(
            in_channels,
            out_channels,
            kernel,
            stride=stride,
            padding=kernel // 2,
            groups=groups,
            bias=False,
        ),
        nn.BatchNorm2d(out_channels),
        nn.ReLU6(),
    )


class InvertedResidual(nn.Module):
    """1 x 1 expansion, 3 x 3 depthwise, 1 x 1 projection without activation; a shortcut where the shape stays."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = in_channels * expansion
        self.expand: nn.Module = (
            nn.Identity() if expansion == 1 else _conv_bn_relu6(in_channels, hidden, kernel=1)
        )
        self.depthwise = _conv_bn_relu6(hidden, hidden, kernel=3, stride=stride, groups=hidden)
        self.project = nn.Sequential(
            nn.Conv2d(hidden, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels)
        )
        self.residual = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, in_channels, H, W)`` to ``(N, out_channels, H / stride, W / stride)``."""
        out = self.project(self.depthwise(self.expand(x)))
        return x + out if self.residual else out


class MobileNetV2(nn.Module):
    """Stem, 17 inverted residual blocks, 1 x 1 convolution to 1,280 channels, global average pool, dropout, linear.

    Parameters
    ----------
    num_classes : int
    in_channels : int
    """

    def __init__(self, num_classes: int = 1000, in_channels: int = 3) -> None:
        super().__init__()
        self.stem = _conv_bn_relu6(in_channels, 32, kernel=3, stride=2)
        blocks, channels = [], 32
        for expansion, out_channels, repeats, first_stride in _ROWS:
            for index in range(repeats):
                stride = first_stride if index == 0 else 1
                blocks.append(InvertedResidual(channels, out_channels, stride, expansion))
                channels = out_channels
        self.blocks = nn.Sequential(*blocks)
        self.head = _conv_bn_relu6(channels, 1280, kernel=1)
        self.dropout = nn.Dropout(0.2)
        self.fc = nn.Linear(1280, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``(N, in_channels, H, W) float32`` to logits ``(N, num_classes)``."""
        x = self.head(self.blocks(self.stem(x)))
        return self.fc(self.dropout(x.mean((2, 3))))


def mobilenet_v2(num_classes: int = 1000, in_channels: int = 3) -> MobileNetV2:
    """Build MobileNetV2: 3,504,872 parameters with 1,000 classes; 0.3 G multiply-adds at 224 x 224."""
    return MobileNetV2(num_classes, in_channels)
