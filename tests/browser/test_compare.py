"""Runs side by side, in a real browser: two runs of different distributions in chart and table, A beside B by keyboard."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, expect

from explorer.widgets import assets
from explorer.widgets.compare_view import ResultsView
from tests.widgets.test_compare_view import document, saved

pytestmark = [pytest.mark.browser, pytest.mark.timeout(180)]


def run(page: Page, number: int) -> None:
    page.get_by_role("button", name="Start pruning").click()
    expect(page.locator(".se-now")).to_contain_text(f"Run {number} finished", timeout=30_000)


def test_two_runs_stand_side_by_side_and_any_two_are_compared_by_keyboard(page_with_torch: Page) -> None:
    page = page_with_torch
    card = page.get_by_role("region", name="Compare")
    expect(card).to_contain_text("waits for the measurement")
    page.get_by_role("button", name="Measure", exact=True).click()
    expect(page.locator(".se-now")).to_contain_text("Next: drag the bars", timeout=30_000)
    expect(card).to_contain_text("No run yet. Start one")
    # A distribution has a predicted latency before training, and no accuracy.
    expect(card.locator("[data-planned]")).to_have_count(2)
    expect(card.locator(".se-track .se-result-mark[transform]")).to_have_count(0)
    page.get_by_role("textbox", name="Epochs").fill("1")
    run(page, 1)
    page.get_by_role("button", name="Uniform", exact=True).click()
    run(page, 2)

    # The chart: the dense network and both runs, told apart by colour, by shape and by name.
    tracks = card.locator(".se-track")
    expect(tracks).to_have_count(3)
    marks = card.locator(".se-track:not(.se-dense) .se-result-mark")
    expect(marks).to_have_count(2)
    drawn = marks.evaluate_all("all => all.map((m) => [m.getAttribute('d'), getComputedStyle(m).fill])")
    assert drawn[0][0] != drawn[1][0] and drawn[0][1] != drawn[1][1]
    expect(card.locator("svg text", has_text=re.compile("^(run 1|run 2|dense)$"))).to_have_count(3)
    expect(card.get_by_role("img", name=re.compile("2 runs and the dense network"))).to_be_visible()
    # They are of one latency, so they lie on each other: the tooltip names both.
    marks.nth(1).hover()
    expect(card.locator(".se-tip")).to_contain_text("on 2,000 test images")
    expect(card.locator(".se-tip")).to_contain_text("Also here: run")

    # The table: a row each, sorted by what is asked for, the dense network on top.
    table = card.get_by_role("table", name="Runs and the dense network")
    rows = table.get_by_role("rowheader")
    expect(rows).to_have_text(["dense", "run 1, solved", "run 2, uniform"])
    sort = table.get_by_role("button", name="Run", exact=True)
    sort.focus()
    page.keyboard.press("Enter")
    expect(rows).to_have_text(["dense", "run 2, uniform", "run 1, solved"])
    expect(table.get_by_role("columnheader", name="Run")).to_have_attribute("aria-sort", "descending")
    first = table.get_by_role("row", name=re.compile("^run 1, solved"))
    expect(first).to_contain_text(re.compile(r"done.*92\.\d\d.*−0\.\d\d"))

    # The keyboard walks along a run, and makes it stand out.
    key = card.get_by_role("button", name="run 1, solved").first
    key.focus()
    page.keyboard.press("Home")
    expect(card.get_by_role("status")).to_contain_text("run 1, solved, 93.10 %, 0.980 ms, after 0 epochs")
    expect(card.locator(".se-tip")).to_contain_text("after 0 epochs, on validation images")
    page.keyboard.press("Enter")
    expect(first).to_have_class("se-selected")
    expect(card.locator("[data-run=run-2].se-track")).to_have_attribute("data-dim", "")

    # A beside B.
    sides = [card.get_by_role("combobox", name=f"Compare, {side}") for side in "AB"]
    assert [side.input_value() for side in sides] == ["run-1", "run-2"]
    sides[0].focus()
    page.keyboard.press("Home")
    expect(sides[0]).to_have_value("dense")
    layers = card.get_by_role("table", name=re.compile("Sparsity of each layer"))
    uniform = layers.get_by_role("row", name=re.compile(r"^block1\.conv1 "))
    share = float(uniform.get_by_role("cell").nth(1).inner_text())
    assert share > 50
    expect(uniform.get_by_role("cell").nth(0)).to_have_text("0.0")
    expect(uniform.get_by_role("cell").nth(2)).to_have_text(f"+{share:.1f}")
    expect(card.locator(".se-told")).to_contain_text("B is sparser in 8 layers, most in ")
    card.get_by_role("button", name="Swap A and B").focus()
    page.keyboard.press("Enter")
    expect(card.locator(".se-told")).to_contain_text("B is less sparse in 8 layers")
    assert [side.input_value() for side in sides] == ["run-2", "dense"]

    # A run's distribution goes back into the bars.
    bar = page.get_by_role("slider", name="stem.conv", exact=True)
    expect(bar).to_have_attribute("aria-valuenow", "0")
    card.get_by_role("button", name="Use its distribution: run 1").click()
    expect(bar).not_to_have_attribute("aria-valuenow", "0")
    with page.expect_download() as download:
        card.get_by_role("button", name="Download run 1").click()
    assert download.value.suggested_filename == "fashion-resnet-run1.zip"

    for dark in (False, True):
        page.evaluate(
            "theme => { document.documentElement.dataset.seTheme = theme; }", "dark" if dark else "light"
        )
        found = Axe().run(page, context=".se-compare")
        serious = [v for v in found.response["violations"] if v["impact"] in ("serious", "critical")]
        assert serious == [], found.generate_report()


STUB = """async ([source, style, traits]) => {
  const sheet = document.createElement("style");
  sheet.textContent = style;
  document.head.append(sheet);
  const model = { get: (name) => traits[name], set: (name, value) => { traits[name] = value; }, on() {}, off() {}, save_changes() {} };
  const module = await import(URL.createObjectURL(new Blob([source], { type: "text/javascript" })));
  const el = document.createElement("div");
  document.body.append(el);
  module.default.render({ model, el, signal: new AbortController().signal });
}"""


def test_results_of_files_are_drawn_as_soon_as_the_view_stands(page: Page, tmp_path: Path) -> None:
    folders = [saved(tmp_path / "solved", document(0.92, 0.5)), saved(tmp_path / "other", document(0.9, 0.4))]
    view = ResultsView(folders)
    traits = {name: getattr(view, name) for name in ("view", "contestants", "a", "b", "chosen", "order")}
    plain = json.loads(json.dumps(traits))
    page.evaluate(STUB, [assets.module("compare_view", "chart"), assets.style("compare_view"), plain])
    card = page.get_by_role("region", name="Compare")
    expect(card.locator(".se-track .se-result-mark")).to_have_count(3)
    expect(card.get_by_role("rowheader", name=re.compile("^(dense|1, solved|2, other)$"))).to_have_count(3)
    expect(card.get_by_role("button", name=re.compile("Download|Use its"))).to_have_count(0)
    expect(
        card.get_by_role("row", name=re.compile("^Latency 0.500 ms 0.400 ms 1.25 × faster"))
    ).to_be_visible()
    card.get_by_role("button", name="Accuracy, %").click()
    expect(
        card.get_by_role("table", name="Runs and the dense network").get_by_role("rowheader")
    ).to_have_text(["dense", "2, other", "1, solved"])
