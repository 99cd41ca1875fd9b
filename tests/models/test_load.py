from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import explorer
from explorer.errors import ModelError
from explorer.models import LoadedModel, demo, load_model

FOLDER = Path(demo.__file__).parent


@pytest.fixture(scope="module")
def demo_model() -> LoadedModel:
    return load_model("demo:fashion-resnet")


def test_the_demo_comes_trained_and_in_evaluation_mode(demo_model):
    assert demo_model.name == "fashion-resnet"
    assert not any(child.training for child in demo_model.module.modules())
    assert demo_model.example_input.shape == (1, 1, 28, 28)
    assert [layer.name for layer in demo_model.layers] == [
        "stem.conv",
        "block1.conv1",
        "block1.conv2",
        "block2.conv1",
        "block2.conv2",
        "block2.shortcut.conv",
        "block3.conv1",
        "block3.conv2",
        "block3.shortcut.conv",
        "fc",
    ]


def test_the_demo_is_as_accurate_on_the_bundled_test_images_as_its_provenance_says(demo_model):
    provenance = json.loads((FOLDER / "fashion-resnet.json").read_text(encoding="utf-8"))
    inputs, labels = explorer.load_data("demo:fashion").test_tensors()
    with torch.no_grad():
        right = sum(
            int((demo_model.module(x).argmax(1) == y).sum())
            for x, y in zip(inputs.split(500), labels.split(500), strict=True)
        )
    # another machine rounds otherwise, which may turn an image or two that lie on the border
    assert right / len(labels) == pytest.approx(provenance["accuracy_test_10000"], abs=0.0003)
    assert provenance["accuracy_test_10000"] >= 0.92
    assert provenance["n_params"] == sum(p.numel() for p in demo_model.module.parameters())


def test_two_demos_share_no_weights(demo_model):
    other = load_model("demo:fashion-resnet")
    with torch.no_grad():
        other.module.fc.weight.zero_()
    assert demo_model.module.fc.weight.any()


def test_a_network_of_the_user_is_taken_as_it_is_and_put_in_evaluation_mode():
    module = nn.Sequential(nn.Linear(3, 4), nn.Dropout(), nn.Linear(4, 2))
    x = torch.randn(5, 3)
    model = load_model(module, x, name="mine")
    assert model.module is module
    assert not module.training
    assert model.name == "mine"
    assert model.example_input.shape == (5, 3)
    assert [layer.macs for layer in model.layers] == [12, 8]
    assert load_model(module, x).name == "Sequential"


def test_a_loaded_model_can_be_loaded_again_with_another_example_input(demo_model):
    again = load_model(demo_model, torch.randn(2, 1, 56, 56))
    assert again.module is demo_model.module
    assert again.name == demo_model.name
    # the maps shrink 28, 14, 7, 4 for the demo's own input, and 56, 28, 14, 7 here; the classifier does not care
    shrunk = [(28, 14)] * 3 + [(14, 7)] * 3 + [(7, 4)] * 3 + [(1, 1)]
    for one, other, (here, there) in zip(again.layers, demo_model.layers, shrunk, strict=True):
        assert one.macs * there**2 == other.macs * here**2


def test_layers_that_never_run_are_listed_and_warned_of():
    module = nn.Sequential(nn.Linear(3, 4))
    module[0].register_module("spare", nn.Linear(2, 2))
    with pytest.warns(UserWarning, match=r"0\.spare"):
        model = load_model(module, torch.randn(1, 3))
    assert model.not_executed == ("0.spare",)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("demo:fashion-resnt", "Did you mean 'demo:fashion-resnet'"),
        ("fashion-resnet", "Did you mean 'demo:fashion-resnet'"),
        ("resnet50", "accepted are 'demo:fashion-resnet', 'timm:...' or 'torchvision:...'"),
        ("weights/model.pt", "build the module in Python and pass it"),
        (42, "cannot load a model from int"),
        (nn.Linear(3, 4), "without example_input"),
    ],
)
def test_a_source_that_cannot_be_loaded_is_refused_with_what_is_accepted(source, message):
    with pytest.raises(ModelError, match=message):
        load_model(source)


@pytest.mark.parametrize("content", [None, b"not safetensors"])
def test_a_missing_or_damaged_demo_file_says_how_to_get_it_back(content, tmp_path, monkeypatch):
    if content is not None:
        (tmp_path / "fashion-resnet.safetensors").write_bytes(content)
    monkeypatch.setattr(demo, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(ModelError, match=r"install the package again, or make them with"):
        load_model("demo:fashion-resnet")
