"""VGG-11 for ImageNet: plain, large convolutions and huge linear layers, the case where pruning saves most.

Simonyan and Zisserman 2015, "Very Deep Convolutional Networks for Large-Scale Image Recognition", arXiv:1409.1556, table 1,
configuration A, without batch norm. The features are pooled to 7 x 7, so that other image sizes than 224 work.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

__all__ = ["VGG", "vgg11"]


class VGG(nn.Module):
    """Stages of 3 x 3 convolutions with ReLU, each ended by a 2 x 2 max pool, and three linear layers.

    Parameters
    ----------
    stages : tuple of tuple of int
        Output channels of the convolutions of each stage.
    num_classes : int
    in_channels : int
    """

    def __init__(
        self, stages: tuple[tuple[int, ...], ...], num_classes: int = 1000, in_channels: int = 3
    ) -> None:
        super().__init__()
        features: list[nn.Module] = []
        channels = in_channels
        for stage in stages:
            for width in stage:
                features += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
                channels = width
            features.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*features)
        self.fc1 = nn.Linear(channels * 49, 4096)
        self.fc2 = nn.Linear(4096, 4096)
        self.fc3 = nn.Linear(4096, num_classes)
        self.dropout = nn.Dropout(0.5)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``(N, in_channels, H, W) float32`` to logits ``(N, num_classes)``."""
        x = functional.adaptive_avg_pool2d(self.features(x), 7).flatten(1)
        x = self.dropout(functional.relu(self.fc1(x)))
        x = self.dropout(functional.relu(self.fc2(x)))
        return self.fc3(x)


def vgg11(num_classes: int = 1000, in_channels: int = 3) -> VGG:
    """Build VGG-11: 132,863,336 parameters with 1,000 classes; 7.6 G multiply-adds at 224 x 224."""
    return VGG(((64,), (128,), (256, 256), (512, 512), (512, 512)), num_classes, in_channels)
