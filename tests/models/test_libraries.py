"""Networks of timm and torchvision by name, with a stand-in for either library: neither is needed by the project, nor by its tests."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

from explorer.bench.networks import load_network
from explorer.errors import ModelError
from explorer.models import load_model


class Small(nn.Sequential):
    """A network as timm builds it."""

    def __init__(self, size: int) -> None:
        super().__init__(
            nn.Conv2d(3, 4, 3),
            nn.Conv2d(4, 4, 3, groups=4),
            nn.Conv2d(4, 4, 1),
            nn.Flatten(),
            nn.LazyLinear(2),
        )
        self.pretrained_cfg = {"input_size": (3, size, size)}
        self(torch.zeros(1, 3, size, size))


class Library(ModuleType):
    """What is asked of timm: it notes how it was asked."""

    def __init__(self) -> None:
        super().__init__("timm")
        self.asked: list[tuple[str, bool]] = []

    def list_models(self) -> list[str]:
        return ["small_net", "smaller_net", "broken_net"]

    def create_model(self, name: str, *, pretrained: bool) -> nn.Module:
        self.asked.append((name, pretrained))
        if name == "broken_net":
            raise OSError("no connection")
        return Small(12)


@pytest.fixture
def timm(monkeypatch: pytest.MonkeyPatch) -> Library:
    library = Library()
    monkeypatch.setitem(sys.modules, "timm", library)
    return library


def test_a_network_of_timm_comes_trained_with_an_image_of_its_size(timm: Library) -> None:
    model = load_model("timm:small_net.in1k")
    assert timm.asked == [("small_net.in1k", True)]
    assert model.example_input.shape == (1, 3, 12, 12)
    assert (model.name, model.source) == ("small_net.in1k", "timm:small_net.in1k")
    assert len(model.layers) == 4
    other = load_model("timm:small_net", torch.randn(2, 3, 12, 12), name="mine")
    assert (other.name, other.example_input.shape[0]) == ("mine", 2)


def test_random_weights_are_asked_for_and_are_not_loaded_again_by_name(timm: Library) -> None:
    model = load_model("timm:small_net", pretrained=False)
    assert timm.asked == [("small_net", False)]
    assert model.source is None


def test_the_benchmark_takes_random_weights_and_prunes_what_has_many(timm: Library) -> None:
    model, network = load_network("timm:small_net")
    assert timm.asked == [("small_net", False)]
    assert [layer.name for layer in network.pruned(model.layers)] == ["2", "4"]
    again, _ = load_network("timm:small_net")
    assert torch.equal(model.module[0].weight, again.module[0].weight)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "timm:smal_net",
            {},
            "timm knows no network 'smal_net'.*Did you mean timm:small_net or timm:smaller_net",
        ),
        (
            "timm:broken_net",
            {},
            r"weights of timm:broken_net could not be loaded \(no connection\).*pretrained=False",
        ),
        ("timm:broken_net", {"pretrained": False}, "timm could not build 'broken_net': no connection"),
        ("demo:fashion-resnet", {"pretrained": False}, "pretrained=False is for networks of a library"),
    ],
)
@pytest.mark.usefixtures("timm")
def test_what_cannot_be_had_says_why(name: str, options: dict[str, bool], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load_model(name, **options)


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_a_library_that_is_not_there_says_how_to_get_it(
    library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (library, f"{library}.models"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        ModelError, match=rf"{library} cannot be imported .*pip install 'sparsity-explorer\[models\]'"
    ):
        load_model(f"{library}:resnet50")


@pytest.mark.parametrize("pretrained", [True, False])
def test_a_network_of_torchvision_is_built_with_its_default_weights(
    pretrained: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def get_model(name: str, *, weights: object) -> nn.Module:
        asked.append((name, weights))
        return Small(10)

    default = SimpleNamespace(transforms=lambda: SimpleNamespace(crop_size=[10]))
    models = ModuleType("torchvision.models")
    models.list_models = lambda: ["small"]
    models.get_model, models.get_model_weights = get_model, lambda _: SimpleNamespace(DEFAULT=default)
    monkeypatch.setitem(sys.modules, "torchvision", ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.models", models)
    model = load_model("torchvision:small", pretrained=pretrained)
    assert asked == [("small", default if pretrained else None)]
    assert model.example_input.shape == (1, 3, 10, 10)
    assert model.source == ("torchvision:small" if pretrained else None)
