"""The report, read as a browser reads it: parsed, with every figure looked up in what was measured."""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from explorer.data import load_data
from explorer.distribution import SparsityDistribution, predict
from explorer.errors import DistributionError, FormatError
from explorer.formats import FinalLatency, Recipe, ReportContent, report_html, write_report
from explorer.formats.markup import element
from explorer.formats.report_charts import Axis, Frame, Line, chart
from explorer.models import PrunableLayer, load_model
from explorer.pruning import EvalEvent, LatencyEvent, RunSettings
from explorer.sensitivity import SensitivityPoint, SensitivityTable
from explorer.study import Study
from tests.formats.test_result import Timed, a_result
from tests.pruning.tiny import TinyNet, quadrants

VOID = {"meta", "br", "hr", "img", "input", "link"}
NOW = dt.datetime(2026, 3, 4, 5, 6, tzinfo=dt.UTC)
MACHINE = {
    "cpu": "Abacus 9",
    "cores": 3,
    "system": "Plan 9",
    "python": "3.11",
    "torch": "2.0",
    "numpy": "2.1",
}
HOSTILE = '<img src=x onerror="alert(1)">'


class Page(HTMLParser):
    """Checks that elements are closed in order, and collects tables, texts and attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[list[list[str]]] = []
        self.texts: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self.texts.append(data)
        # The words of a bar are told by its drawing, which is no cell text.
        if {"td", "th"} & {*self.open} and "svg" not in self.open:
            self.tables[-1][-1][-1] += data

    def table(self, *first: str) -> dict[str, list[str]]:
        """Return the rows, by their first cell, of the table whose header begins so."""
        [found] = [rows for rows in self.tables if tuple(rows[0][: len(first)]) == first]
        return {row[0]: row[1:] for row in found[1:]}


LAYERS = (
    PrunableLayer("a", "conv2d", (10, 10), 100, 1000, 0.8, 0.5),
    PrunableLayer("b", "linear", (10, 30), 300, 300, 0.4, 0.25),
)


def points() -> Iterator[SensitivityPoint]:
    for level in (0.0, 0.5, 0.9):
        yield SensitivityPoint("", level, "latency_ms", 0.4 + 1.2 * (1 - level), std_error=0.01)
        for name, harm, ms in (("a", 0.5, 0.8), ("b", 0.02, 0.4)):
            yield SensitivityPoint(name, level, "kl", harm * level**2, std_error=0.001 * level)
            yield SensitivityPoint(name, level, "accuracy", 0.93 - harm * level**2 / 2)
            yield SensitivityPoint(name, level, "latency_ms", ms * (1 - level), std_error=0.002)


TABLE = SensitivityTable.from_points(
    points(), layers=["a", "b"], metadata={"n_images": 500, "baseline_latency_ms": 1.6}
)
LATENCY = FinalLatency(Timed(0.5), {"torch eager": Timed(2.0), "engine dense": Timed(1.6, 0.02)})


def content(**changes: Any) -> ReportContent:
    distribution = SparsityDistribution({"a": 0.5, "b": 0.899}, locked=["a"])
    values: dict[str, Any] = {
        "model": "demo:net",
        "data": "demo:data",
        "layers": LAYERS,
        "threads": 2,
        "batch_size": 4,
        "dense_bytes": 1_600_000,
        "table": TABLE,
        "dense": LATENCY.dense,
        "distribution": distribution,
        "prediction": predict(LAYERS, TABLE, distribution),
        "recipe": Recipe("demo:net", "demo:data", dict(distribution), locked=("a",)),
    }
    return ReportContent(**(values | changes))


def after_a_run(**changes: Any) -> ReportContent:
    latencies = (LatencyEvent(0, 1.6, 0.02, 1.61, 1.006), LatencyEvent(40, 0.51, 0.015, 1.59, 3.12))
    result = a_result(latencies=latencies, settings=RunSettings(epochs=2, seed=7))
    return content(result=result, latency=LATENCY, pruned_bytes=400_000, **changes)


def test_every_figure_of_a_run_is_there_with_unit_and_spread() -> None:
    text = report_html(after_a_run(), now=NOW, machine=MACHINE)
    page = Page(text)
    rows = page.table("", "Dense", "Predicted, before training", "Measured, after the run")
    # Standard errors of 0.92 and 0.915 over 2,000 images: sqrt(p (1 - p) / n).
    assert rows["Accuracy"][0] == "92.00 ± 0.61 %"
    assert rows["Accuracy"][2] == "91.50 ± 0.62 %"
    assert "2,000 test images" in rows["Accuracy"][3]
    assert rows["Latency"][0] == "1.600 ± 0.020 ms"
    assert rows["Latency"][2] == "0.500 ± 0.010 ms"
    assert "batch of 4 on 2 threads" in rows["Latency"][3]
    # 3.2 × sqrt((0.02 / 1.6)² + (0.01 / 0.5)²)
    assert rows["Speed-up"][2] == "3.20 ± 0.08 ×"
    assert "engine dense" in rows["Speed-up"][3]
    assert rows["Sparsity"][2] == "80.00 %"
    assert rows["Weights, zeros left out"][::2] == ["1.6 MB", "0.4 MB"]
    told = after_a_run().prediction
    assert told is not None and told.latency_ms is not None and told.latency_error_ms is not None
    assert rows["Latency"][1] == f"{told.latency_ms:.3f} ± {told.latency_error_ms:.3f} ms"
    assert rows["Divergence from the dense outputs"][1].startswith(f"{told.kl:.3g} ± ")

    layers = page.table("Layer", "Zeros, share of the layer's weights")
    assert layers["a"][1:] == ["50.00 %", "50.00 %", "50 of 100", "0.800 ms (50%)", "locked"]
    assert layers["b"][1:4] == ["89.90 %", "90.00 %", "270 of 300"]
    assert layers["all layers"][1:4] == [f"{(50 + 269.7) / 4:.2f} %", "80.00 %", "320 of 400"]

    run = page.table("Epoch", "Step")
    assert run["0.00"] == ["0", "93.00 %", "0.2000 nats", "0.00 %", "1.600 ± 0.020 ms", "1.01 ×"]
    assert run["2.00"] == ["40", "92.50 %", "0.2100 nats", "80.00 %", "0.510 ± 0.015 ms", "3.12 ×"]

    timed = page.table("Network")
    assert timed["engine dense"] == ["1.600 ± 0.020 ms", "0.500 ms", "50", "baseline of every speed-up"]
    words = " ".join(page.texts)
    for fact in ("Abacus 9", "3 cores", "2026-03-04 05:06", "torch 2.0", "2 threads, batch 4", "seed 7"):
        assert fact in words


def test_the_curves_stand_beside_tables_with_the_same_numbers() -> None:
    page = Page(report_html(content(), now=NOW, machine=MACHINE))
    headers = [rows for rows in page.tables if rows[0] == ["Layer", "0 %", "50 %", "90 %"]]
    harm, ms = ({row[0]: row[1:] for row in rows[1:]} for rows in headers)
    assert harm["a"] == ["0", "0.125± 0.0005", "0.405± 0.0009"]
    assert harm["b"][2] == "0.0162± 0.0009"
    assert ms["a"] == ["0.800± 0.0020", "0.400± 0.0020", "0.0800± 0.0020"]
    drawn = [attributes for tag, attributes in page.tags if tag == "svg"]
    names = [attributes["aria-label"] for attributes in drawn]
    assert "a: divergence from the dense outputs by sparsity" in names
    assert "b: latency in ms by sparsity" in names
    assert all(attributes["role"] == "img" for attributes in drawn)


def test_a_chart_puts_values_where_they_belong() -> None:
    frame = Frame(110, 130, left=10, right=0, top=10, bottom=20)
    drawn = chart(
        "t", Axis(0, 1), Axis(0.01, 1, logarithmic=True), [Line([(0, 0.01), (0.5, 0.1), (1, 1)])], frame,
        x_words=str, y_words=str,
    )  # fmt: skip
    found = re.search(r'<polyline class="l" points="([^"]*)"', drawn)
    assert found is not None
    # 100 pixels wide from 10, 100 pixels high from 110 up.
    assert found[1] == "10,110 60,60 110,10"


def test_the_file_asks_for_nothing_and_runs_nothing() -> None:
    text = report_html(after_a_run(), now=NOW, machine=MACHINE)
    tags = {tag for tag, _ in Page(text).tags}
    assert not tags & {"script", "link", "img", "iframe", "object", "base"}
    assert "http" not in text
    assert "url(" not in text
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text
    assert len(text) < 60_000


def test_what_others_named_is_text_and_never_markup() -> None:
    layers = (PrunableLayer(HOSTILE, "linear", (10, 10), 100, 100), LAYERS[1])
    distribution = SparsityDistribution({HOSTILE: 0.5, "b": 0.5})
    table = SensitivityTable.from_points(
        [SensitivityPoint(HOSTILE, level, "kl", level) for level in (0.0, 0.5)], layers=[HOSTILE, "b"]
    )
    recipe = Recipe(HOSTILE, HOSTILE, dict(distribution))
    changes = {"model": HOSTILE, "data": HOSTILE, "layers": layers, "table": table, "recipe": recipe}
    text = report_html(
        content(**changes, distribution=distribution, prediction=None), now=NOW, machine={"cpu": HOSTILE}
    )
    page = Page(text)
    assert "<img" not in text
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert HOSTILE in page.table("Layer", "Zeros, share of the layer's weights")
    assert (
        element("b", HOSTILE, title='"')
        == f'<b title="&quot;">{HOSTILE.replace("<", "&lt;").replace(">", "&gt;").replace(chr(34), "&quot;")}</b>'
    )


def test_what_was_not_measured_is_said_to_be_missing() -> None:
    bare = content(table=None, dense={}, distribution=None, prediction=None, recipe=None)
    words = " ".join(Page(report_html(bare, now=NOW, machine=MACHINE)).texts)
    assert "There is no distribution yet" in words
    assert "Not measured: no layer has been pruned on its own" in words
    assert "No latency of the whole network was measured." in words
    assert "nan" not in words
    planned = content(table=None, dense={}, prediction=None)
    page = Page(report_html(planned, now=NOW, machine=MACHINE))
    assert page.table("Layer", "Zeros, share of the layer's weights")["a"][1] == "50.00 %"
    failed = a_result(failure="The loss is not a number.", evaluations=(), accuracy=float("nan"))
    words = " ".join(Page(report_html(content(result=failed), now=NOW, machine=MACHINE)).texts)
    assert "The loss is not a number." in words
    assert "nan" not in words


def test_the_recipe_in_a_report_is_the_recipe() -> None:
    page = Page(report_html(after_a_run(), now=NOW, machine=MACHINE))
    [text] = [words for words in page.texts if words.startswith("recipe: ")]
    assert Recipe.from_yaml(text) == after_a_run().recipe
    assert any("sparsity-explorer prune --recipe recipe.yaml" in words for words in page.texts)
    # Nothing to train on: the distribution alone.
    words = Page(report_html(content(data="", recipe=None), now=NOW, machine=MACHINE)).texts
    [text] = [one for one in words if one.startswith("sparsity:")]
    assert SparsityDistribution.from_yaml(text) == content().distribution


def test_a_hundred_layers_stay_well_under_half_a_megabyte() -> None:
    layers = [
        PrunableLayer(f"encoder.block.{i}.conv", "conv2d", (8, 8), 64, 64, 0.1, 0.005) for i in range(100)
    ]
    levels = (0.0, 0.5, 0.7, 0.8, 0.9, 0.95, 0.97, 0.98, 0.99)
    table = SensitivityTable.from_points(
        SensitivityPoint(layer.name, level, kind, (1 - level if kind == "latency_ms" else level) + 0.001, std_error=0.01)
        for layer in layers for level in levels for kind in ("kl", "latency_ms")
    )  # fmt: skip
    distribution = SparsityDistribution({layer.name: 0.9 for layer in layers})
    text = report_html(content(layers=layers, table=table, distribution=distribution, recipe=None), now=NOW)
    assert len(text.encode()) < 400_000


def test_a_study_reports_what_it_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    study = Study(
        load_model(TinyNet(), torch.zeros(1, 1, 8, 8), name="tiny"),
        load_data(quadrants(64, 0), quadrants(64, 1)),
    )
    study.measure_sensitivity((0.5, 0.9), n_images=32, latency=False)
    plan = study.uniform(0.5)
    study.report(tmp_path / "plan.html", distribution=plan, epochs=3)
    page = Page((tmp_path / "plan.html").read_text())
    assert page.table("Layer", "Zeros, share of the layer's weights")["conv2"][1] == "50.00 %"
    [text] = [words for words in page.texts if words.startswith("recipe: ")]
    assert Recipe.from_yaml(text) == study.recipe_of(plan, epochs=3)
    assert Recipe.from_yaml(text).settings.epochs == 3

    result = study.prune(plan, epochs=1, batch_size=32, latency=False).finish()
    # Of another run, which was timed last.
    monkeypatch.setattr(study, "_final", (SimpleNamespace(), LATENCY))
    study.report(tmp_path / "run.html", result)
    page = Page((tmp_path / "run.html").read_text())
    zeros, elements = result.achieved["conv2"]
    layers = page.table("Layer", "Zeros, share of the layer's weights")
    assert layers["conv2"][1:4] == [
        "50.00 %",
        f"{100 * zeros / elements:.2f} %",
        f"{zeros:,} of {elements:,}",
    ]
    assert "engine sparse" not in " ".join(page.texts)
    with pytest.raises(DistributionError, match="missing layers"):
        study.report(tmp_path / "x.html", distribution={"conv1": 0.5})
    with pytest.raises(FormatError, match="Check that the folder exists"):
        study.report(tmp_path / "none" / "x.html")


def test_a_run_keeps_the_latencies_that_it_told(tmp_path: Path) -> None:
    study = Study(
        load_model(nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), torch.zeros(1, 1, 8, 8)),
        load_data(quadrants(64, 0), quadrants(64, 1)),
    )
    timed = SimpleNamespace(latency_ms=0.5, spread_ms=0.1, dense_ms=1.0)
    study.latency = lambda _module: timed  # type: ignore[method-assign,assignment,return-value]
    run = study.prune({"1": 0.5}, epochs=1, batch_size=32)
    told = [event for event in run if isinstance(event, LatencyEvent)]
    assert run.result.latencies == tuple(told)
    assert len(told) >= 2
    assert isinstance(run.result.evaluations[0], EvalEvent)
    write_report(content(result=a_result(latencies=run.result.latencies)), tmp_path / "r.html", now=NOW)
    assert "0.500 ± 0.100 ms" in (tmp_path / "r.html").read_text()
