"""Brings a model in: the bundled demo or a network of another library by name, or any network of the user's with one example input."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from torch import Tensor, nn

from explorer.errors import ModelError
from explorer.models import libraries
from explorer.models.demo import DEMOS, load_demo
from explorer.models.layers import PrunableLayer, scan, warn_not_executed

__all__ = ["LoadedModel", "load_model"]


@dataclass(frozen=True, eq=False)  # tensors have no one answer to ==
class LoadedModel:
    """A network that is ready to be studied.

    Attributes
    ----------
    name : str
    module : nn.Module
        In evaluation mode, float32, on the CPU.
    example_input : Tensor, (batch, ...)
        What latency is measured on and the engine is compiled for.
    layers : tuple of PrunableLayer
        In forward order.
    not_executed : tuple of str
        Convolutions and linear layers that the example input never reached.
    source : str or None
        What loads the model again by name, "demo:fashion-resnet" for instance; None for a network that was passed, or has random weights.
    """

    name: str
    module: nn.Module
    example_input: Tensor
    layers: tuple[PrunableLayer, ...]
    not_executed: tuple[str, ...] = ()
    source: str | None = None


_ACCEPTED = (
    f"accepted are {', '.join(repr(f'demo:{name}') for name in sorted(DEMOS))}, 'timm:...' or 'torchvision:...' where these are installed, or a "
    "torch.nn.Module together with example_input=..., a tensor (batch, ...) as the model takes it"
)


def load_model(
    source: str | nn.Module | LoadedModel,
    example_input: Tensor | None = None,
    *,
    name: str | None = None,
    pretrained: bool = True,
) -> LoadedModel:
    """Load a model and list what can be pruned in it.

    Parameters
    ----------
    source : str, nn.Module or LoadedModel
        "demo:fashion-resnet"; "timm:resnet50" or "torchvision:resnet50", where these libraries are installed; or a network. A network of yours is not
        copied, and is put in evaluation mode.
    example_input : Tensor, (batch, ...), optional
        Needed for a network; where a name is given it replaces the usual single image.
    name : str, optional
        Shown in tables and files; default: the name after the colon, or the class name.
    pretrained : bool
        Whether a network of a library comes with its trained weights, which may have to be downloaded, or with random ones, with which latencies can be
        measured.

    Returns
    -------
    LoadedModel

    Raises
    ------
    ModelError
        When the source is unknown, its library or weights cannot be loaded, there is no example input, or the network cannot be studied (see
        `prunable_layers`).

    Examples
    --------
    >>> model = load_model("demo:fashion-resnet")
    >>> [layer.name for layer in model.layers][:3]
    ['stem.conv', 'block1.conv1', 'block1.conv2']
    """
    of_library = isinstance(source, str) and source.partition(":")[0] in libraries.LIBRARIES
    if not pretrained and not of_library:
        raise ModelError("pretrained=False is for networks of a library, such as 'timm:resnet50'.")
    if isinstance(source, LoadedModel):
        if example_input is None:
            example_input = source.example_input
        module, default_name, again = source.module, source.name, source.source
    elif isinstance(source, str):
        module, usual_input, default_name = _from_name(source, pretrained=pretrained)
        again = source if pretrained else None
        if example_input is None:
            example_input = usual_input
    elif isinstance(source, nn.Module):
        module, default_name, again = source, type(source).__name__, None
    else:
        raise ModelError(f"cannot load a model from {type(source).__name__}; {_ACCEPTED}.")
    if example_input is None:
        raise ModelError(
            f"{type(module).__name__} was passed without example_input: pass a tensor (batch, ...) as the model takes it, "
            "e.g. example_input=torch.randn(1, 3, 224, 224)."
        )
    layers, not_executed = scan(module, example_input)
    if not_executed:
        warn_not_executed(not_executed, stacklevel=3)
    return LoadedModel(
        name or default_name, module.eval(), example_input.detach(), layers, not_executed, again
    )


def _from_name(source: str, *, pretrained: bool) -> tuple[nn.Module, Tensor, str]:
    prefix, colon, demo = source.partition(":")
    if prefix in libraries.LIBRARIES:
        return (*libraries.build(prefix, demo, pretrained=pretrained), demo)
    if colon and prefix == "demo":
        if demo in DEMOS:
            return (*load_demo(demo), demo)
        known = sorted(DEMOS)
    else:
        demo, known = source, sorted(DEMOS) if not colon else []
    close = difflib.get_close_matches(demo, known, n=1, cutoff=0.7)
    hint = f" Did you mean 'demo:{close[0]}'?" if close else ""
    raise ModelError(
        f"cannot load a model from {source!r}; {_ACCEPTED}. For a file or a model of another library, build the module in Python and pass it.{hint}"
    )
