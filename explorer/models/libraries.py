"""Networks of other libraries by name. The libraries are optional, and imported only when one of their networks is asked for."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from explorer.errors import ModelError

__all__ = ["LIBRARIES", "build"]


def build(library: str, name: str, *, pretrained: bool) -> tuple[nn.Module, Tensor]:
    """Build a network and one random image of the size that it was trained on.

    Parameters
    ----------
    library : str
        One of `LIBRARIES`.
    name : str
        As the library lists it.
    pretrained : bool
        Download its weights, or take them from where the library keeps those that it has downloaded. Otherwise they are random.

    Returns
    -------
    module : nn.Module
    example_input : Tensor, (1, channels, height, width) float32

    Raises
    ------
    ModelError
        When the library cannot be imported, knows no such network, or cannot load its weights.
    """
    return LIBRARIES[library](name, pretrained)


def _timm(name: str, pretrained: bool) -> tuple[nn.Module, Tensor]:
    timm = _imported("timm")
    # A name may be followed by the weights that are meant: resnet50.a1_in1k.
    _check("timm", name, name.partition(".")[0], timm.list_models())
    module = _with_weights("timm", name, pretrained, lambda: timm.create_model(name, pretrained=pretrained))
    about: dict[str, Any] = getattr(module, "pretrained_cfg", {})
    return module, _image(about.get("input_size", _USUAL))


def _torchvision(name: str, pretrained: bool) -> tuple[nn.Module, Tensor]:
    models = _imported("torchvision.models")
    _check("torchvision", name, name, models.list_models())
    weights = models.get_model_weights(name).DEFAULT
    module = _with_weights(
        "torchvision",
        name,
        pretrained,
        lambda: models.get_model(name, weights=weights if pretrained else None),
    )
    size = getattr(weights.transforms(), "crop_size", None) or [_USUAL[-1]]
    return module, _image((3, size[0], size[-1]))


LIBRARIES: dict[str, Callable[[str, bool], tuple[nn.Module, Tensor]]] = {
    "timm": _timm,
    "torchvision": _torchvision,
}

_USUAL = (3, 224, 224)


def _image(size: Iterable[int]) -> Tensor:
    return torch.randn(1, *size, generator=torch.Generator().manual_seed(0))


def _imported(library: str) -> Any:
    try:
        return importlib.import_module(library)
    except Exception as error:  # one that was built for another torch raises what it likes
        package = library.partition(".")[0]
        raise ModelError(
            f"{package} cannot be imported ({error}). Install it for this torch: pip install 'sparsity-explorer[models]'"
        ) from error


def _check(library: str, name: str, architecture: str, known: list[str]) -> None:
    if architecture in known:
        return
    close = difflib.get_close_matches(architecture, known, n=3, cutoff=0.6)
    hint = f" Did you mean {' or '.join(f'{library}:{other}' for other in close)}?" if close else ""
    raise ModelError(f"{library} knows no network {name!r}.{hint}")


def _with_weights(library: str, name: str, pretrained: bool, make: Callable[[], nn.Module]) -> nn.Module:
    try:
        return make()
    except Exception as error:
        if not pretrained:
            raise ModelError(f"{library} could not build {name!r}: {error}") from error
        raise ModelError(
            f"the weights of {library}:{name} could not be loaded ({error}). Without a connection, fetch them on a machine that has one, or pass "
            "pretrained=False for random ones, with which latencies can be measured."
        ) from error
