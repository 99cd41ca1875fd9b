"""The bundled demo network: its weights, where they come from (``fashion-resnet.json``), and the script that made them (``train.py``)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from explorer.errors import ModelError
from explorer.models.architectures.fashion import FashionResNet

__all__ = ["DEMOS", "load_demo"]

# Name to architecture and shape of the example input.
DEMOS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "fashion-resnet": (FashionResNet, (1, 1, 28, 28))
}


def load_demo(name: str) -> tuple[nn.Module, Tensor]:
    """Build a demo network with its trained weights.

    Parameters
    ----------
    name : str
        A key of `DEMOS`.

    Returns
    -------
    module : nn.Module
        In evaluation mode.
    example_input : Tensor
        One input of unit normal noise, always the same.

    Raises
    ------
    ModelError
        When the bundled file is missing or damaged.
    """
    build, shape = DEMOS[name]
    path = Path(__file__).parent / f"{name}.safetensors"
    module = build()
    try:
        module.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ModelError(
            f"the demo weights {path} cannot be used ({error}); install the package again, or make them with "
            "'python -m explorer.models.demo.train'."
        ) from error
    return module.eval(), torch.randn(shape, generator=torch.Generator().manual_seed(0))
