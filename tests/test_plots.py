"""Figures hold the numbers of the table, and plotly is imported only for them."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import numpy as np
import pytest

from explorer import plots
from explorer.errors import DistributionError, EngineError
from explorer.inference import LayerTiming, MachinePeak
from explorer.sensitivity import SensitivityPoint, SensitivityTable

POINTS = [
    SensitivityPoint(layer, s, kind, value, std_error=error)
    for layer in ("conv", "fc")
    for kind, values, error in [("kl", (0.0, 0.3, 0.2), 0.01), ("latency_ms", (3.0, 2.0, 1.0), None)]
    for s, value in zip((0.0, 0.5, 0.9), values, strict=True)
]


def test_each_layer_has_a_monotone_curve_and_its_raw_points_on_both_sides() -> None:
    figure = plots.sensitivity(SensitivityTable.from_points(POINTS))
    lines = [trace for trace in figure.data if trace.mode == "lines"]
    markers = [trace for trace in figure.data if trace.mode == "markers"]
    assert [trace.name for trace in lines] == ["conv", "fc", "conv", "fc"]
    np.testing.assert_array_equal(lines[0].y, [np.nan, 0.3, 0.3])
    np.testing.assert_array_equal(markers[0].y, [0.3, 0.2])
    np.testing.assert_array_equal(markers[0].error_y.array, [0.01, 0.01])
    np.testing.assert_array_equal(lines[2].y, [3.0, 2.0, 1.0])
    assert figure.layout.yaxis.type == "log"
    assert figure.layout.yaxis2.title.text == "Latency (ms)"
    assert sum(bool(trace.showlegend) for trace in figure.data) == 2


def test_without_latency_there_is_one_panel() -> None:
    figure = plots.sensitivity(SensitivityTable.from_points([p for p in POINTS if p.kind == "kl"]))
    assert {trace.xaxis for trace in figure.data} == {"x"}


def test_what_was_not_measured_cannot_be_drawn() -> None:
    table = SensitivityTable.from_points(POINTS)
    with pytest.raises(DistributionError, match="'loss' has not been measured; measured are kl, latency_ms"):
        plots.sensitivity(table, "loss")
    with pytest.raises(DistributionError, match="with refreshed"):
        plots.sensitivity(table, refreshed=True)
    with pytest.raises(DistributionError, match="kind must be one of"):
        plots.sensitivity(table, "latency_ms")


def test_importing_the_module_does_not_import_plotly() -> None:
    code = "import sys, explorer.plots; assert 'plotly' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


ROWS = (
    LayerTiming("conv", "conv", 2.0, "sparse", 0.9, 400_000_000, True, 2_000_000, 100.0),
    LayerTiming("fc", "linear", 0.5, "dense", 0.0, 1_000_000, True, 4_000_000, 100.0),
    LayerTiming("pool", "max_pool", 0.1, "pool", 0.0, 0, False, 1_000_000, 100.0),
    LayerTiming("norm", "layer_norm.default", 0.3, "torch", 0.0, 0, False),
)


def test_the_roofline_places_each_layer_by_useful_operations_per_byte_and_second() -> None:
    figure = plots.roofline(ROWS, MachinePeak(100.0, 20.0, "avx2", threads=2))
    roof, *kernels = figure.data
    assert "100 GFLOP/s, 20 GB/s (2 threads, avx2)" in roof.name
    np.testing.assert_allclose(roof.y, np.minimum(100.0, 20 * np.asarray(roof.x)))
    assert 5.0 in roof.x  # where the roofs meet, exactly
    drawn = {t.customdata[0][0]: (t.name, t.x[0], t.y[0]) for t in kernels}
    assert drawn.keys() == {"conv", "fc"}
    # 2 * 4e8 * 0.1 operations in 2 ms on 2e6 bytes; 2 * 1e6 in 0.5 ms on 4e6 bytes.
    assert drawn["conv"] == ("sparse", pytest.approx(40.0), pytest.approx(40.0))
    assert drawn["fc"] == ("dense", pytest.approx(0.5), pytest.approx(4.0))


def test_the_areas_of_marks_are_shares_of_the_time_whatever_they_are() -> None:
    rows = [dataclasses.replace(ROWS[0], name=str(ms), ms=ms) for ms in (900.0, 90.0, 9.0, 0.001)]
    _, marks = plots.roofline(rows, MachinePeak(50.0, 10.0, "avx2")).data
    largest, large, small, least = marks.marker.size
    np.testing.assert_allclose([largest / large, large / small], np.sqrt(10))
    assert 4 <= least < small
    # Nothing is rounded to zero, or to all.
    assert marks.hovertemplate.count(".3r}") == 3
    assert ":.1%" in marks.hovertemplate


def test_a_profile_without_kernels_has_no_roofline() -> None:
    with pytest.raises(EngineError, match="nothing to draw"):
        plots.roofline(ROWS[2:], MachinePeak(50.0, 10.0, "avx2"))


# ---- other views of sensitivities


def test_the_heat_map_holds_every_value_of_every_layer() -> None:
    figure = plots.sensitivity(SensitivityTable.from_points(POINTS), view="heatmap")
    [trace] = figure.data
    assert list(trace.y) == ["conv", "fc"]
    assert list(trace.x) == ["0", "50", "90"]
    np.testing.assert_allclose(trace.customdata, [[0.0, 0.3, 0.3]] * 2)
    np.testing.assert_allclose(trace.z[:, 1], np.log10(0.3))
    assert np.isfinite(trace.z).all()


def test_the_heat_map_of_accuracies_is_not_logarithmic() -> None:
    points = [SensitivityPoint("a", s, "accuracy", v) for s, v in ((0.0, 0.9), (0.5, 0.8), (0.9, 0.1))]
    [trace] = plots.sensitivity(SensitivityTable.from_points(points), "accuracy", view="heatmap").data
    np.testing.assert_allclose(trace.z, [[0.9, 0.8, 0.1]])


def test_bars_are_ordered_and_what_removed_nothing_is_hatched() -> None:
    points = [
        SensitivityPoint("a", 0.9, "kl", 0.1, std_error=0.01, n_removed=4),
        SensitivityPoint("empty", 0.9, "kl", 0.0, n_removed=0),
        SensitivityPoint("b", 0.9, "kl", 0.4, std_error=0.02, n_removed=4),
    ]
    figure = plots.sensitivity(SensitivityTable.from_points(points), view="bars", sparsity=0.9)
    [trace] = figure.data
    assert list(trace.y) == ["b", "a", "empty"]
    assert list(trace.x) == [0.4, 0.1, 0.0]
    assert list(trace.error_x.array) == [0.04, 0.02, 0.0]
    assert list(trace.marker.pattern.shape) == ["", "", "/"]
    assert next(iter(trace.customdata)) == "place 1 to 1 of 3"
    assert "nothing is known" in trace.customdata[2]


def test_break_even_is_marked_on_the_latency() -> None:
    points = [
        SensitivityPoint("a", s, "latency_ms", min(2.0, 5 * (1 - s))) for s in (0.0, 0.5, 0.8, 0.9, 0.95)
    ]
    points += [SensitivityPoint("a", s, "kl", s) for s in (0.0, 0.5)]
    figure = plots.sensitivity(SensitivityTable.from_points(points))
    [mark] = [trace for trace in figure.data if trace.marker.symbol == "diamond-open"]
    assert mark.xaxis == "x2"
    assert mark.x[0] == pytest.approx(0.608)
    assert mark.y[0] == pytest.approx(1.96)


def test_views_and_sparsities_that_there_are_not() -> None:
    table = SensitivityTable.from_points(POINTS)
    with pytest.raises(DistributionError, match="curves, heatmap or bars"):
        plots.sensitivity(table, view="pie")  # type: ignore[arg-type]
    with pytest.raises(DistributionError, match=r"Write 90 % as 0\.9"):
        plots.sensitivity(table, view="bars", sparsity=90)
