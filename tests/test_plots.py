"""Figures hold the numbers of the table, and plotly is imported only for them."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from explorer import plots
from explorer.errors import DistributionError
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
