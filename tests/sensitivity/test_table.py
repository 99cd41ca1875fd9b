"""The table as a value: raw points kept, monotone curves, merge, JSON; and a published table read through it."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from explorer.errors import DistributionError, FormatError
from explorer.sensitivity import SensitivityPoint, SensitivityTable

GOLDEN = Path(__file__).parent / "golden" / "distiller-resnet20-cifar.csv"


def some_points() -> list[SensitivityPoint]:
    points = []
    for layer, kls, times in [
        ("a", (0.0, 0.3, 0.2), (3.0, 3.2, 1.0)),
        ("b", (0.0, 0.1, 0.5), (2.0, 1.5, 0.5)),
    ]:
        for s, kl, ms in zip((0.0, 0.5, 0.9), kls, times, strict=True):
            points.append(SensitivityPoint(layer, s, "kl", kl, std_error=0.01 + kl, n_removed=int(100 * s)))
            points.append(SensitivityPoint(layer, s, "latency_ms", ms))
    points += [SensitivityPoint("", s, "latency_ms", ms) for s, ms in [(0.0, 6.0), (0.5, 5.7), (0.9, 2.4)]]
    return points


TABLE = SensitivityTable.from_points(some_points())


def test_raw_values_are_kept_as_they_came() -> None:
    assert TABLE.layers == ("a", "b")
    assert TABLE.kinds == ("kl", "latency_ms")
    assert TABLE.levels("kl") == (0.0, 0.5, 0.9)
    np.testing.assert_array_equal(TABLE.values("kl"), [[0, 0.3, 0.2], [0, 0.1, 0.5]])
    np.testing.assert_allclose(TABLE.std_errors("kl"), [[0.01, 0.31, 0.21], [0.01, 0.11, 0.51]])
    assert set(TABLE.points) == set(some_points())


def test_what_is_missing_is_nan() -> None:
    table = TABLE.with_points([SensitivityPoint("b", 0.7, "kl", 0.2)])
    np.testing.assert_array_equal(table.values("kl"), [[0, 0.3, np.nan, 0.2], [0, 0.1, 0.2, 0.5]])
    assert table.values("loss").shape == (2, 0)


def test_loss_never_falls_and_latency_never_rises_when_read_between_levels() -> None:
    assert TABLE.value("a", 0.9, "kl") == 0.3
    assert TABLE.value("a", 0.25, "kl") == pytest.approx(0.15)
    assert TABLE.value("a", 0.5, "latency_ms") == 3.0
    assert TABLE.value("a", 0.7, "latency_ms") == pytest.approx(2.0)
    assert TABLE.value("b", 0.99, "latency_ms") == 0.5, "beyond the last level its value holds"


@given(st.lists(st.tuples(st.floats(0, 0.99), st.floats(-5, 5)), min_size=1, max_size=12))
def test_curves_are_monotone_for_any_noise(pairs: list[tuple[float, float]]) -> None:
    grid = np.linspace(0, 0.99, 40)
    for kind, sign in [("kl", 1), ("loss", 1), ("accuracy", -1), ("latency_ms", -1)]:
        table = SensitivityTable.from_points([SensitivityPoint("x", s, kind, v) for s, v in pairs])
        assert (sign * np.diff(table.values_at("x", grid, kind)) >= -1e-12).all()


def test_the_order_of_arrival_does_not_matter() -> None:
    points = some_points()
    random.Random(0).shuffle(points)
    assert SensitivityTable.from_points(points, layers=["a", "b"]) == TABLE


def test_the_later_of_two_equal_cells_counts() -> None:
    table = TABLE.with_points([SensitivityPoint("a", 0.5, "kl", 9.0)])
    assert len(table) == len(TABLE)
    assert table.value("a", 0.5, "kl") == 9.0
    assert TABLE.value("a", 0.5, "kl") == 0.3, "the old one never changes"


def test_merge_unites_points_layers_and_metadata() -> None:
    left = SensitivityTable.from_points(
        [p for p in some_points() if p.kind == "kl"], metadata={"n_images": 500}
    )
    right = SensitivityTable.from_points(
        [p for p in some_points() if p.kind != "kl"], metadata={"threads": 2}
    )
    merged = left.merge(right)
    assert merged == TABLE.with_metadata(n_images=500, threads=2)
    assert merged.merge(merged) == merged


def test_json_gives_an_equal_table_back() -> None:
    table = TABLE.with_metadata(baseline_latency_ms=5.5, note="x").with_points(
        [SensitivityPoint("a", 0.9, "kl", 0.1, refreshed=True)]
    )
    back = SensitivityTable.from_json(table.to_json())
    assert back == table
    assert back.layers == table.layers
    assert back.baseline_latency_ms == 5.5
    assert hash(back) == hash(table)


def test_records_are_tidy() -> None:
    records = TABLE.to_records()
    assert len(records) == len(TABLE)
    assert {tuple(record) for record in records} == {
        ("layer", "sparsity", "kind", "value", "refreshed", "std_error", "n_removed", "low", "high")
    }


def test_a_latency_stays_dense_up_to_where_the_sparse_kernel_is_faster() -> None:
    def ms(s: float) -> float:
        return min(4.0, 0.3 + 8.0 * (1.0 - s))  # as fast as dense at 0.5375

    levels = (0.0, 0.3, 0.7, 0.8, 0.9, 0.98)
    table = SensitivityTable.from_points([SensitivityPoint("a", s, "latency_ms", ms(s)) for s in levels])
    for s in np.linspace(0.0, 0.98, 197):
        assert table.value("a", float(s), "latency_ms") == pytest.approx(ms(float(s))), s
    assert table.curve("a", "latency_ms")[0].tolist() == list(levels)


@given(st.lists(st.floats(0.0, 10.0), min_size=1, max_size=9), st.floats(0.0, 0.99))
@example(values=[1.0, 5e-324, 0.0], s=0.0)
def test_bends_never_leave_the_measured_neighbours(values: list[float], s: float) -> None:
    levels = np.linspace(0.0, 0.99, len(values))
    table = SensitivityTable.from_points(
        [SensitivityPoint("a", float(x), "latency_ms", v) for x, v in zip(levels, values, strict=True)]
    )
    falling = np.minimum.accumulate(values)
    left = int(np.searchsorted(levels, s, side="right")) - 1
    right = min(left + 1, len(values) - 1)
    got = table.value("a", s, "latency_ms")
    assert np.interp(s, levels, falling) - 1e-9 <= got <= falling[left] + 1e-9
    assert got >= falling[right] - 1e-9


def a_timed_table(sums: list[float], wholes: list[float]) -> SensitivityTable:
    levels = np.linspace(0, 0.9, len(sums))
    return SensitivityTable.from_points(
        [SensitivityPoint("a", s, "latency_ms", v) for s, v in zip(levels, sums, strict=True)]
        + [SensitivityPoint("", s, "latency_ms", v) for s, v in zip(levels, wholes, strict=True)]
    )


def test_times_that_add_up_have_a_fixed_part_and_no_scale() -> None:
    table = a_timed_table([5.0, 3.0, 1.5, 0.5], [5.2, 3.2, 1.7, 0.7])
    assert table.latency_model == pytest.approx((0.2, 1.0))
    assert table.fixed_latency_ms == pytest.approx(0.2)
    assert table.additive_error == pytest.approx(0.0, abs=1e-12)
    assert table.network_latency_ms(2.0) == pytest.approx(2.2)


def test_a_scale_and_an_outlier_do_not_hide_the_fixed_time() -> None:
    sums = np.array([5.0, 3.0, 2.0, 1.0, 0.5])
    wholes = 0.2 + 1.1 * sums
    wholes[1] += 4.0
    table = a_timed_table(sums.tolist(), wholes.tolist())
    assert table.latency_model == pytest.approx((0.2, 1.1))
    assert table.additive_error == pytest.approx(4.0 / 7.5 / np.sqrt(5))


def test_the_latency_error_is_of_the_sum_and_of_the_runs() -> None:
    exact = a_timed_table([5.0, 3.0, 1.0], [5.2, 3.2, 1.2])
    assert exact.latency_error == pytest.approx(0.0, abs=1e-12)
    spread = exact.with_points([SensitivityPoint("", 0.9, "latency_ms", 1.2, std_error=0.12)])
    assert spread.latency_error == pytest.approx(0.1)
    missed = a_timed_table([5.0, 3.0, 2.0, 1.0, 0.5], [5.2, 6.4, 2.2, 1.2, 0.7])
    assert missed.latency_error == pytest.approx(missed.additive_error)
    assert missed.additive_error == pytest.approx(0.5 / np.sqrt(5))


def test_the_latency_model_is_the_best_line_for_relative_errors() -> None:
    rng = np.random.default_rng(0)
    sums = np.sort(rng.uniform(0.2, 5, 7))[::-1]
    wholes = (0.3 + 1.05 * sums) * rng.uniform(0.9, 1.1, 7)
    fixed, scale = a_timed_table(sums.tolist(), wholes.tolist()).latency_model
    cost = (np.abs(wholes - fixed - scale * sums) / wholes).sum()
    grid = np.stack(np.meshgrid(np.linspace(0, 1, 201), np.linspace(0.8, 1.5, 201)), -1).reshape(-1, 2)
    tried = (np.abs(wholes - grid[:, :1] - grid[:, 1:] * sums) / wholes).sum(1)
    assert cost <= tried.min() + 1e-9


def test_the_baseline_latency_is_given_or_the_engines_own() -> None:
    assert TABLE.baseline_latency_ms == TABLE.baseline("latency_ms") == 6.0
    assert TABLE.with_metadata(baseline_latency_ms=4.0).baseline_latency_ms == 4.0
    half = SensitivityTable.from_points(some_points()[:3])
    assert half.fixed_latency_ms is None
    assert half.baseline_latency_ms is None


def test_a_network_that_is_its_one_layer_has_no_fixed_time() -> None:
    points = [
        SensitivityPoint("", s, kind, v) for kind, v in [("kl", 0.1), ("latency_ms", 2.0)] for s in (0.0, 0.9)
    ]
    table = SensitivityTable.from_points(points)
    assert table.layers == ("",)
    assert table.fixed_latency_ms == 0.0


def test_refreshed_curves_are_kept_apart() -> None:
    table = TABLE.with_points([SensitivityPoint("a", 0.9, "kl", 0.05, refreshed=True)])
    assert table.value("a", 0.9, "kl", refreshed=True) == 0.05
    assert table.value("a", 0.9, "kl") == 0.3
    assert table.levels("kl", refreshed=True) == (0.9,)
    with pytest.raises(DistributionError, match="with refreshed BatchNorm statistics has not been measured"):
        table.value("b", 0.9, "kl", refreshed=True)


def test_errors_between_levels_are_those_of_the_worse_neighbour() -> None:
    assert TABLE.std_error_at("b", 0.5, "kl") == pytest.approx(0.11)
    assert TABLE.std_error_at("b", 0.7, "kl") == pytest.approx(0.51)
    assert TABLE.std_error_at("b", 0.7, "latency_ms") is None


def test_mistakes_are_explained() -> None:
    with pytest.raises(DistributionError, match="no layer 'c'; it has a, b"):
        TABLE.value("c", 0.5, "kl")
    with pytest.raises(DistributionError, match="Unknown kind 'lossy'"):
        TABLE.values("lossy")
    with pytest.raises(FormatError, match="kind 'x'"):
        SensitivityTable.from_points([SensitivityPoint("a", 0.5, "x", 1.0)])
    with pytest.raises(FormatError, match=r"sparsity 1\.5"):
        SensitivityTable.from_points([SensitivityPoint("a", 1.5, "kl", 1.0)])
    with pytest.raises(TypeError):
        TABLE.metadata["x"] = 1  # type: ignore[index]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda _: "no json", "not JSON"),
        (lambda _: json.dumps([]), "no sensitivity table"),
        (lambda c: json.dumps({**c, "version": 99}), "version 99"),
        (lambda c: json.dumps({**c, "points": [{"layer": "a"}]}), "lacks entries"),
        (lambda c: json.dumps({**c, "points": [{"colour": "red"}]}), "unknown entries"),
    ],
)
def test_files_that_are_no_tables_are_refused(change, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        SensitivityTable.from_json(change(json.loads(TABLE.to_json())))


def test_a_published_table_keeps_its_shape_and_its_story() -> None:
    points = []
    with GOLDEN.open() as file:
        for row in csv.DictReader(file):
            layer = row["parameter"].removeprefix("module.").removesuffix(".weight")
            sparsity = round(float(row["sparsity"]), 2)
            points.append(SensitivityPoint(layer, sparsity, "accuracy", float(row["top1"]) / 100))
            points.append(SensitivityPoint(layer, sparsity, "loss", float(row["loss"])))
    table = SensitivityTable.from_points(points)
    assert len(table.layers) == 22
    assert (table.layers[0], table.layers[-1]) == ("conv1", "fc")
    accuracy = table.values("accuracy")
    assert accuracy.shape == (22, 19)
    assert not np.isnan(accuracy).any()
    # One layer loses 37.9 points at 80 %, the median layer 2.3.
    drops = 0.9171 - accuracy[:, table.levels("accuracy").index(0.8)]
    assert table.layers[int(drops.argmax())] == "layer1.2.conv1"
    assert drops.max() == pytest.approx(0.3786, abs=5e-5)
    assert np.median(drops) == pytest.approx(0.0234, abs=5e-4)
    # Its curves are noisy; read through the table they are monotone and stay near the raw points.
    levels = np.asarray(table.levels("accuracy"))
    smooth = np.asarray([table.values_at(layer, levels, "accuracy") for layer in table.layers])
    assert (np.diff(accuracy, axis=1) > 0).any()
    assert (np.diff(smooth, axis=1) <= 0).all()
    assert np.abs(smooth - accuracy).max() < 0.01
