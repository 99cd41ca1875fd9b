"""The value that everybody passes around: edits, locks, counts, both ways to a dictionary."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from explorer.distribution import SparsityDistribution, uniform
from explorer.errors import DistributionError, FormatError
from explorer.models import PrunableLayer

LAYERS = tuple(
    PrunableLayer(name, "conv2d", (n, 1, 1, 1), n, 10 * n)
    for name, n in [("stem", 10), ("block.conv1", 200), ("block.conv2", 333), ("fc", 50)]
)
NAMES = [layer.name for layer in LAYERS]
SPARSITIES = st.fixed_dictionaries({name: st.floats(0, 1, exclude_max=True) for name in NAMES})


def test_editing_gives_a_new_one_and_leaves_the_old() -> None:
    first = uniform(LAYERS, 0.8)
    second = first.set("block.conv1", 0.9)
    assert first["block.conv1"] == 0.8
    assert second["block.conv1"] == 0.9
    assert list(second) == NAMES
    assert len(second) == 4
    with pytest.raises(TypeError):
        second["fc"] = 0.5  # type: ignore[index]


def test_uniform_leaves_first_and_last_dense_unless_told() -> None:
    assert dict(uniform(LAYERS, 0.8)) == {"stem": 0.0, "block.conv1": 0.8, "block.conv2": 0.8, "fc": 0.0}
    assert set(uniform(LAYERS, 0.8, dense_first_last=False).values()) == {0.8}


def test_locked_layers_refuse_edits_until_unlocked() -> None:
    dist = uniform(LAYERS, 0.8).lock("stem", "fc")
    assert dist.locked == {"stem", "fc"}
    with pytest.raises(DistributionError, match="Locked: 'fc'"):
        dist.set("fc", 0.5)
    with pytest.raises(DistributionError, match="Locked"):
        dist.replace({"block.conv1": 0.1, "stem": 0.1})
    assert dist.replace({"fc": 0.0, "block.conv1": 0.1})["block.conv1"] == 0.1, "no change is no edit"
    assert dist.unlock("fc").set("fc", 0.5).locked == {"stem"}
    assert dist.unlock().locked == frozenset()


@given(SPARSITIES)
def test_sparsity_is_zeros_over_weights_and_never_short(values: dict[str, float]) -> None:
    dist = SparsityDistribution(values)
    zeros = dist.zeros(LAYERS)
    for layer in LAYERS:
        assert (
            values[layer.name] * layer.n_params - 1e-6
            <= zeros[layer.name] + (values[layer.name] > 0.9) * layer.n_params
        )
        assert zeros[layer.name] < layer.n_params
    assert dist.sparsity(LAYERS) == pytest.approx(sum(zeros.values()) / 593)


@given(SPARSITIES, st.sets(st.sampled_from(NAMES)))
def test_a_dictionary_and_json_give_an_equal_one_back(values: dict[str, float], locked: set[str]) -> None:
    dist = SparsityDistribution(values, locked)
    back = SparsityDistribution.from_dict(json.loads(json.dumps(dist.to_dict())))
    assert back == dist
    assert hash(back) == hash(dist)
    assert list(back) == list(dist)


def test_equality_sees_values_and_locks() -> None:
    dist = uniform(LAYERS, 0.8)
    assert dist == uniform(LAYERS, 0.8)
    assert dist != dist.set("fc", 0.1)
    assert dist != dist.lock("fc")
    assert len({dist, uniform(LAYERS, 0.8), dist.lock("fc")}) == 2


def test_unknown_names_get_a_suggestion() -> None:
    dist = uniform(LAYERS, 0.8)
    with pytest.raises(DistributionError, match=r"Did you mean 'block\.conv"):
        dist.set("block.conv3", 0.1)
    with pytest.raises(DistributionError, match="Layers are stem"):
        dist.lock("zzz")
    with pytest.raises(KeyError):
        dist["zzz"]
    with pytest.raises(DistributionError, match=r"missing layers \['fc'\]"):
        SparsityDistribution(dict.fromkeys(NAMES[:3], 0.1)).sparsity(LAYERS)


@pytest.mark.parametrize("value", [1.0, -0.01, 95, float("nan"), "0.5", None, True])
def test_values_out_of_range_are_refused(value: object) -> None:
    with pytest.raises(DistributionError, match=r"'fc' must be a fraction of zeros in \[0, 1\)"):
        SparsityDistribution({"fc": value})  # type: ignore[dict-item]


@pytest.mark.parametrize(
    "content", [{}, {"sparsity": [0.1]}, {"sparsity": {}, "lock": []}, {"sparsity": {}, "locked": "fc"}]
)
def test_dictionaries_of_another_shape_are_refused(content: dict) -> None:
    with pytest.raises(FormatError, match="A distribution is written as"):
        SparsityDistribution.from_dict(content)
