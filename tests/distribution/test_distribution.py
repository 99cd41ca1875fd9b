"""The value that everybody passes around: edits, locks, counts, both ways to a dictionary."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from explorer.distribution import SparsityDistribution, uniform
from explorer.errors import DistributionError, FormatError, InfeasibleTarget
from explorer.masks import n_zeros
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


# ---- groups


def test_layers_of_a_group_move_together() -> None:
    dist = uniform(LAYERS, 0.8).link("block.conv2", "fc")
    assert dist["fc"] == 0.8, "at the sparsity of the first"
    assert dist.groups == (("block.conv2", "fc"),)
    assert dist.group_of("fc") == ("block.conv2", "fc")
    assert dist.group_of("stem") == ("stem",)
    moved = dist.set("fc", 0.3)
    assert (moved["block.conv2"], moved["fc"]) == (0.3, 0.3)
    assert moved.unlink("fc").set("fc", 0.1)["block.conv2"] == 0.3
    assert moved.unlink().groups == ()
    with pytest.raises(DistributionError, match="Locked: 'fc'"):
        dist.lock("fc").set("block.conv2", 0.5)
    assert dist.link("fc", "stem").groups == (("stem", "fc"),), "a layer leaves its old group"


def test_groups_that_make_no_sense_are_refused() -> None:
    values = dict.fromkeys(NAMES, 0.5)
    with pytest.raises(DistributionError, match="'fc' is in two groups"):
        SparsityDistribution(values, groups=[("fc", "stem"), ("fc", "block.conv1")])
    with pytest.raises(DistributionError, match="these differ"):
        SparsityDistribution({**values, "fc": 0.6}, groups=[("fc", "stem")])
    with pytest.raises(DistributionError, match="No layer 'cf'"):
        SparsityDistribution(values, groups=[("cf", "stem")])
    with pytest.raises(DistributionError, match="at least two"):
        SparsityDistribution(values).link("fc")
    with pytest.raises(DistributionError, match="these differ"):
        SparsityDistribution(values).link("fc", "stem").replace({"fc": 0.1, "stem": 0.2})


# ---- algebra


@given(SPARSITIES, SPARSITIES, st.floats(0, 1))
def test_a_mix_lies_between_in_every_layer_and_leaves_locked_ones(
    one: dict[str, float], other: dict[str, float], share: float
) -> None:
    mixed = SparsityDistribution(one, ["fc"]).mix(SparsityDistribution(other), share)
    for name in NAMES[:3]:
        assert mixed[name] == pytest.approx((1 - share) * one[name] + share * other[name])
    assert mixed["fc"] == one["fc"]


def test_mixing_needs_the_same_layers_and_a_share() -> None:
    dist = uniform(LAYERS, 0.5)
    with pytest.raises(DistributionError, match=r"they differ in \['fc', 'new'\]"):
        dist.mix({"stem": 0, "block.conv1": 0, "block.conv2": 0, "new": 0}, 0.5)
    with pytest.raises(DistributionError, match="share lies between"):
        dist.mix(dist, 1.5)


def test_a_difference_names_what_changed() -> None:
    dist = uniform(LAYERS, 0.5)
    assert dist.diff(dist) == {}
    assert dist.diff(dist.set("fc", 0.25)) == {"fc": (0.0, 0.25)}
    assert dist.diff({"stem": 0.0, "new": 0.5}) == {
        "block.conv1": (0.5, None),
        "block.conv2": (0.5, None),
        "fc": (0.0, None),
        "new": (None, 0.5),
    }


@given(SPARSITIES, st.floats(0, 0.95), st.sets(st.sampled_from(NAMES), max_size=2))
def test_scaling_reaches_the_total_by_one_factor(
    values: dict[str, float], sparsity: float, locked: set[str]
) -> None:
    dist = SparsityDistribution(values, locked)
    try:
        scaled = dist.scale_to(LAYERS, sparsity=sparsity)
    except InfeasibleTarget:
        free = [layer for layer in LAYERS if layer.name not in locked and values[layer.name] > 0]
        held = sum(dist.zeros(LAYERS).values()) - sum(dist.zeros(LAYERS)[layer.name] for layer in free)
        most = held + sum(n_zeros(layer.n_params, 0.99) for layer in free)
        assert most < sparsity * 593 or held > sparsity * 593
        return
    zeros = sum(scaled.zeros(LAYERS).values())
    assert sparsity * 593 - 1e-6 <= zeros <= sparsity * 593 + len(LAYERS) + 1
    assert all(scaled[name] == values[name] for name in locked)
    factors = [
        (1 - scaled[name]) / (1 - values[name])
        for name in NAMES
        if name not in locked and values[name] > 0 and 0 < scaled[name] < 0.99
    ]
    assert not factors or max(factors) == pytest.approx(min(factors), rel=1e-6)


def test_scaling_out_of_reach_names_what_can_be_reached() -> None:
    dist = uniform(LAYERS, 0.5)
    with pytest.raises(
        InfeasibleTarget, match=r"2 layers locked or dense and at most 0\.99 elsewhere it is 0\.8904"
    ):
        dist.scale_to(LAYERS, sparsity=0.95)
    with pytest.raises(InfeasibleTarget, match="less than locked layers have"):
        dist.lock("block.conv2").scale_to(LAYERS, sparsity=0.1)
    with pytest.raises(DistributionError, match="fraction of zeros"):
        dist.scale_to(LAYERS, sparsity=1.0)


# ---- asked and achieved


def test_asked_and_achieved_are_exact_counts() -> None:
    dist = SparsityDistribution({"stem": 0.05, "block.conv1": 0.5, "block.conv2": 0.9, "fc": 0.0})
    each = dist.achieved(LAYERS)
    assert (each["stem"].zeros, each["stem"].n_params, each["stem"].sparsity) == (1, 10, 0.1)
    assert each["block.conv2"].zeros == 300
    total = dist.total(LAYERS)
    assert (total.zeros, total.n_params) == (1 + 100 + 300, 593)
    assert total.asked == pytest.approx((0.5 + 100 + 299.7) / 593)
    assert total.sparsity >= total.asked
    with pytest.raises(DistributionError, match="does not fit the model"):
        dist.achieved(LAYERS[:2])


# ---- files


@given(SPARSITIES, st.sets(st.sampled_from(NAMES)), st.booleans())
def test_json_and_yaml_give_an_equal_one_back(
    values: dict[str, float], locked: set[str], linked: bool
) -> None:
    dist = SparsityDistribution(values, locked)
    if linked:
        dist = dist.unlock().link("fc", "stem").lock(*locked)
    assert SparsityDistribution.from_json(dist.to_json()) == dist
    assert SparsityDistribution.from_yaml(dist.to_yaml()) == dist


@pytest.mark.parametrize(
    "text", ["{", "[1, 2]", '{"sparsity": {"a": 0.5}, "groups": ["a"]}', '{"sparsity": 3}']
)
def test_files_that_hold_no_distribution_are_refused(text: str) -> None:
    with pytest.raises(FormatError):
        SparsityDistribution.from_json(text)
    with pytest.raises(FormatError):
        SparsityDistribution.from_yaml(text)
