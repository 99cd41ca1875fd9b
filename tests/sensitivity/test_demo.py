"""The bundled network on real images tells the story that its curves are for."""

from __future__ import annotations

import pytest

import explorer
from explorer.distribution import Target, solve, uniform
from explorer.sensitivity import SensitivityTable, measure_loss


@pytest.fixture(scope="module")
def table() -> SensitivityTable:
    model, data = explorer.load_model("demo:fashion-resnet"), explorer.load_data("demo:fashion")
    points = measure_loss(model.module, data, layers=model.layers, levels=(0.5, 0.9, 0.98), n_images=125)
    return SensitivityTable.from_points(points)


def test_dense_accuracy_is_that_of_a_trained_network(table: SensitivityTable) -> None:
    assert 0.85 < table.baseline("accuracy") < 1.0


def test_half_of_any_layer_but_the_first_can_go_at_once(table: SensitivityTable) -> None:
    drop = table.baseline("accuracy") - table.values("accuracy")[:, table.levels("accuracy").index(0.5)]
    assert drop[1:].max() < 0.05


def test_the_stem_minds_most_and_a_shortcut_least(table: SensitivityTable) -> None:
    kl = dict(zip(table.layers, table.values("kl")[:, table.levels("kl").index(0.9)], strict=True))
    assert max(kl, key=kl.get) == "stem.conv"
    assert "shortcut" in min(kl, key=kl.get)


def test_refreshed_statistics_undo_most_of_the_damage_in_inner_layers(table: SensitivityTable) -> None:
    at = table.levels("kl").index(0.98)
    as_is, refreshed = table.values("kl")[:, at], table.values("kl", refreshed=True)[:, at]
    inner = [
        i for i, layer in enumerate(table.layers) if layer.startswith("block") and "shortcut" not in layer
    ]
    assert (refreshed[inner] < 0.5 * as_is[inner]).all()
    assert refreshed[-1] == as_is[-1], "no BatchNorm runs after the last layer"


def test_at_equal_sparsity_the_solved_distribution_harms_less_than_a_uniform_one(
    table: SensitivityTable,
) -> None:
    layers = explorer.load_model("demo:fashion-resnet").layers
    even = uniform(layers, 0.9)
    solved = solve(layers, table, Target(sparsity=even.sparsity(layers)), score="kl", max_sparsity=0.98)
    harm = {
        name: sum(table.value(n, s, "kl") for n, s in d.items())
        for name, d in (("even", even), ("solved", solved))
    }
    assert harm["solved"] < 0.8 * harm["even"]
