"""MobileNetV1 for ImageNet: depthwise and 1 x 1 convolutions in turn; 95 % of its multiply-adds are in the latter.

Howard et al. 2017, "MobileNets: Efficient Convolutional Neural Networks for Mobile Vision Applications", arXiv:1704.04861, table 1,
width multiplier 1.
"""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["MobileNetV1", "mobilenet_v1"]

# Rows of table 1: output channels of the 1 x 1 convolution, stride of the depthwise one before it.
_ROWS = (
    (64, 1),
    (128, 2),
    (128, 1),
    (256, 2),
    (256, 1),
    (512, 2),
    (512, 1),
    (512, 1),
    (512, 1),
    (512, 1),
    (512, 1),
    (1024, 2),
    (1024, 1),
)


def _conv_bn_relu(
    in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
    )


class MobileNetV1(nn.Module):
    """Stem, 13 pairs of depthwise and 1 x 1 convolution, global average pool, linear.

    Parameters
    ----------
    num_classes : int
    in_channels : int
    """

    def __init__(self, num_classes: int = 1000, in_channels: int = 3) -> None:
        super().__init__()
        self.stem = _conv_bn_relu(in_channels, 32, kernel=3, stride=2)
        blocks, channels = [], 32
        for out_channels, stride in _ROWS:
            blocks.append(
                nn.Sequential(
                    _conv_bn_relu(channels, channels, kernel=3, stride=stride, groups=channels),
                    _conv_bn_relu(channels, out_channels, kernel=1),
                )
            )
            channels = out_channels
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``(N, in_channels, H, W) float32`` to logits ``(N, num_classes)``."""
        return self.fc(self.blocks(self.stem(x)).mean((2, 3)))


def mobilenet_v1(num_classes: int = 1000, in_channels: int = 3) -> MobileNetV1:
    """Build MobileNetV1: 4,231,976 parameters with 1,000 classes; 0.57 G multiply-adds at 224 x 224."""
    return MobileNetV1(num_classes, in_channels)
