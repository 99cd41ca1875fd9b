"""A study of a network that cannot be trained here: published losses beside latencies of this machine."""

from __future__ import annotations

import pytest

import explorer
from explorer.errors import DataError, InfeasibleTarget, ModelError
from explorer.sensitivity import CellCounter, published


@pytest.mark.parametrize(
    ("name", "here", "there"),
    [
        ("resnet50-imagenet", "layer2.0.shortcut.0", "layer2.0.downsample.0"),
        ("resnet18-imagenet", "layer4.1.conv2", "layer4.1.conv2"),
        ("mobilenet-imagenet", "blocks.12.1.0", "model.13.3"),
    ],
)
def test_every_layer_has_the_published_losses_of_its_namesake(name: str, here: str, there: str) -> None:
    study, table = explorer.Study.replay(name), published(name)
    assert study.table is not None
    assert study.table.layers == tuple(layer.name for layer in study.layers)
    assert len(study.layers) == len(table.layers)
    for layer in study.layers:
        assert study.table.has(layer.name, "loss")
        assert study.table.has(layer.name, "accuracy")
    for level in table.levels("loss"):
        assert study.table.value(here, level, "loss") == table.value(there, level, "loss")
    assert study.provenance is not None
    assert "Distiller" in study.provenance or "distiller" in study.provenance


def test_the_shapes_are_those_of_the_published_network() -> None:
    """Parameters of ResNet-50's 54 layers: 25,502,912 of torchvision's 25,557,032, the rest being batch norms and one bias."""
    study = explorer.Study.replay()
    assert sum(layer.n_params for layer in study.layers) == 25_502_912


def test_a_replay_is_measured_solved_and_predicted() -> None:
    study = explorer.Study.replay("mobilenet-imagenet")
    seen = list(study.sensitivity_points(levels=[0.5, 0.9]))
    times = [point for point in seen if point.kind == "latency_ms"]
    published_cells = {(point.layer, point.sparsity) for point in seen if point.kind == "loss"}
    assert len(times) + len(published_cells) == study.n_sensitivity_cells(levels=[0.5, 0.9])
    assert sum(map(CellCounter().add, seen)) == len(times) + len(published_cells)
    assert study.table is not None
    assert {"loss", "accuracy", "latency_ms"} <= set(study.table.kinds)
    assert study.table.metadata["network"] == "MobileNetV1, ImageNet"
    assert "n_images" not in study.table.metadata
    solved = study.solve(sparsity=0.6)
    predicted, dense = study.predict(solved), study.predict(study.uniform(0.0))
    assert predicted.sparsity == pytest.approx(0.6, abs=0.01)
    assert predicted.loss is not None
    assert dense.loss == pytest.approx(published("mobilenet-imagenet").baseline("loss"))
    assert predicted.loss > dense.loss
    # What was published ends at a sparsity of 0.9, and so do the levels that are offered.
    assert max(solved.values()) <= 0.9
    with pytest.raises(InfeasibleTarget):
        study.solve(sparsity=0.95)
    faster = study.solve(speedup=1.2, check=False)
    assert study.predict(faster).speedup >= 1.2


def test_a_replay_cannot_be_pruned_and_says_so() -> None:
    study = explorer.Study.replay("resnet18-imagenet")
    with pytest.raises(DataError, match="no data"):
        study.prune(study.uniform(0.5))


def test_there_is_no_other_replay() -> None:
    with pytest.raises(ModelError, match="resnet50-imagenet"):
        explorer.Study.replay("alexnet-imagenet")
