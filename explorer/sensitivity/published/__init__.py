"""Sensitivity tables that others measured and published, for networks that cannot be trained, or even fed, on the user's machine.

From IntelLabs/distiller (https://github.com/IntelLabs/distiller, ``examples/sensitivity-analysis``; Apache License 2.0; Copyright (c) 2018 Intel
Corporation): one tensor at a time is pruned by magnitude to 0, 5, ..., 90 or 95 % and the network evaluated on the whole test set, without any training.
The files are as published, but for their line ends.
"""

from __future__ import annotations

from pathlib import Path

from explorer.errors import FormatError
from explorer.sensitivity.exchange import from_csv
from explorer.sensitivity.table import SensitivityTable

__all__ = ["PUBLISHED", "published"]

PUBLISHED = {
    "alexnet-imagenet": "AlexNet, ImageNet",
    "mobilenet-imagenet": "MobileNetV1, ImageNet",
    "resnet18-imagenet": "ResNet-18, ImageNet",
    "resnet20-cifar": "ResNet-20, CIFAR-10",
    "resnet34-imagenet": "ResNet-34, ImageNet",
    "resnet50-imagenet": "ResNet-50, ImageNet",
}
"""Network and data of each table, by name."""

_SOURCE = "IntelLabs/distiller, examples/sensitivity-analysis (Apache-2.0): one tensor pruned by magnitude at a time, no training"


def published(name: str) -> SensitivityTable:
    """Return a published table of one-shot loss and accuracy; its metadata say where it comes from.

    Convolutions and linear layers have the names that PyTorch's own model library gives them. Weights of batch norms, which ResNet-50's file also holds, are
    left out.

    Parameters
    ----------
    name : str
        One of `PUBLISHED`.

    Raises
    ------
    FormatError
        If there is no such table.

    Examples
    --------
    >>> table = published("resnet50-imagenet")
    >>> len(table.layers), round(table.value("conv1", 0.5, "loss"), 3), table.baseline("accuracy")
    (54, 1.105, 0.7613)
    """
    if name not in PUBLISHED:
        raise FormatError(f"There is no published table {name!r}; there are {', '.join(PUBLISHED)}.")
    table = from_csv(Path(__file__).with_name(f"{name}.csv"))
    kept = [layer for layer in table.layers if not layer.endswith("downsample.1")]
    return SensitivityTable.from_points(
        [point for point in table.points if point.layer in kept],
        layers=kept,
        metadata={"source": _SOURCE, "network": PUBLISHED[name]},
    )
