"""Predictions against sums done by hand."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest

from explorer.distribution import PredictionTables, SparsityDistribution, predict, stored_bytes, uniform
from explorer.errors import DistributionError
from explorer.sensitivity import SensitivityTable

_spec = importlib.util.spec_from_file_location("distribution_tables", Path(__file__).parent / "tables.py")
assert _spec is not None
assert _spec.loader is not None
tables = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tables)
LAYERS, a_table = tables.LAYERS, tables.a_table


def test_a_measured_uniform_distribution_is_predicted_as_the_sum_of_its_layers() -> None:
    got = predict(LAYERS, a_table(baseline_latency_ms=6.0), uniform(LAYERS, 0.9, dense_first_last=False))
    assert got.latency_ms == pytest.approx(0.3 + sum(tables.layer_ms(n, 0.9) for n in tables.SIZES))
    assert got.speedup == pytest.approx(6.0 / got.latency_ms)
    harm = sum(tables.HARM.values()) * 0.9**4
    assert got.kl == pytest.approx(harm)
    assert got.loss == pytest.approx(0.25 + harm)
    assert got.accuracy == pytest.approx(0.92 - 0.02 * harm)
    assert got.kl_error == pytest.approx(0.1 * 0.9**4 * math.sqrt(sum(h * h for h in tables.HARM.values())))
    assert got.loss_error == pytest.approx(0.01 * math.sqrt(6))


def test_a_dense_distribution_predicts_the_dense_network() -> None:
    got = predict(LAYERS, a_table(), uniform(LAYERS, 0.0))
    assert (got.kl, got.loss, got.accuracy, got.sparsity) == (0.0, 0.25, 0.92, 0.0)
    assert got.latency_ms == pytest.approx(6.5)
    assert got.speedup == pytest.approx(1.0)
    assert got.size_bytes == 4 * sum(tables.SIZES.values())


def test_counts_and_size_are_exact() -> None:
    dist = SparsityDistribution({"stem": 0.0, "a": 0.9, "b": 0.95, "c": 0.5, "d": 0.99, "fc": 0.0})
    got = predict(LAYERS, None, dist, other_params=100)
    nnz = {"stem": 500, "a": 2000, "b": 2000, "c": 40_000, "d": 800, "fc": 2000}
    assert got.nnz == sum(nnz.values())
    assert got.n_params == sum(tables.SIZES.values())
    assert got.sparsity == pytest.approx(1 - got.nnz / got.n_params)
    masks = (20_000 + 40_000 + 80_000 + 80_000) // 8
    assert got.size_bytes == masks + 4 * got.nnz + 400
    assert got.latency_ms is got.speedup is got.loss is got.kl is None


def test_a_layer_is_stored_in_the_smaller_of_two_ways() -> None:
    assert stored_bytes(80, 80) == 320
    assert stored_bytes(80, 40) == 10 + 160
    assert stored_bytes(9, 1) == 2 + 4


def test_the_latency_error_is_what_sums_missed_at_measured_levels() -> None:
    exact, noisy = a_table(), a_table(noise_ms=0.1)
    dist = uniform(LAYERS, 0.9)
    assert predict(LAYERS, exact, dist).latency_error_ms == pytest.approx(0.0, abs=1e-12)
    got = predict(LAYERS, noisy, dist)
    assert 0.01 < got.latency_error_ms < 0.3
    assert got.speedup_error == pytest.approx(got.speedup * got.latency_error_ms / got.latency_ms)
    assert got.latency_ms == pytest.approx(predict(LAYERS, exact, dist).latency_ms, abs=0.15)


def test_what_was_not_measured_is_none_and_not_a_guess() -> None:
    got = predict(LAYERS, a_table(latency=False), uniform(LAYERS, 0.9))
    assert got.latency_ms is None
    assert got.speedup is None
    assert got.kl is not None
    assert predict(LAYERS, a_table(), uniform(LAYERS, 0.9), refreshed=True).kl is None


def test_another_models_distribution_is_refused() -> None:
    with pytest.raises(DistributionError, match="does not fit the model"):
        predict(LAYERS, None, SparsityDistribution({"x": 0.5}))


@pytest.mark.parametrize("seed", range(5))
def test_plain_tables_say_what_predict_says(seed: int) -> None:
    """With nothing but interpolation and sums, as whoever holds the tables elsewhere does them."""
    random = np.random.default_rng(seed)
    table = a_table(baseline_latency_ms=6.0)
    plain = PredictionTables.of(LAYERS, table, other_params=25)
    values = {layer.name: round(float(v), 3) for layer, v in zip(LAYERS, random.uniform(0, 0.99, len(LAYERS)), strict=True)}  # fmt: skip
    values[LAYERS[seed].name] = 0.0
    told = predict(LAYERS, table, SparsityDistribution(values), other_params=25)

    def summed(kind: str) -> float:
        return sum(
            float(np.interp(values[layer.name], *knots)) - (0.0 if kind == "latency_ms" else float(np.interp(0.0, *knots)))
            for layer, knots in zip(LAYERS, plain.curves[kind], strict=True)
        )  # fmt: skip

    assert plain.fixed_ms is not None
    assert plain.scale is not None
    assert plain.baseline_ms == 6.0
    assert plain.other_bytes == 100
    assert plain.fixed_ms + plain.scale * summed("latency_ms") == pytest.approx(told.latency_ms)
    for kind in ("kl", "loss", "accuracy"):
        assert plain.dense[kind] + summed(kind) == pytest.approx(getattr(told, kind))
    page = plain.to_page()
    assert page["n_params"] == [layer.n_params for layer in LAYERS]
    assert page["curves"]["kl"][1][1] == pytest.approx(plain.curves["kl"][1][1], rel=1e-5)


def test_plain_tables_leave_out_what_is_not_measured_of_every_layer() -> None:
    table = a_table()
    points = [p for p in table.points if (p.layer, p.kind) not in {("a", "kl"), ("b", "latency_ms")}]
    plain = PredictionTables.of(LAYERS, SensitivityTable.from_points(points, layers=[x.name for x in LAYERS]))
    assert set(plain.curves) == {"loss", "accuracy"}
    assert set(plain.dense) == {"loss", "accuracy"}
    assert plain.fixed_ms is plain.scale is None
