"""The sensitivity view in a browser: three ways to draw it, one pointer for the whole page, and a measurement that goes on where it was stopped."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from playwright.sync_api import Locator, Page, expect

pytestmark = pytest.mark.browser


def drawn(figure: Locator, selector: str, expression: str) -> Any:
    """Ask `one`, a mark in a figure, in a single turn of the page: each answer of the kernel draws all marks anew."""
    return figure.evaluate(
        f"(figure) => {{ const one = figure.querySelector({json.dumps(selector)}); return {expression}; }}"
    )


def test_a_stopped_measurement_goes_on_and_is_drawn_in_three_ways(fake_page: Page) -> None:
    page = fake_page
    view = page.get_by_role("region", name="Sensitivity")
    page.get_by_role("button", name="Measure", exact=True).click()
    expect(view.locator("svg").first).to_be_visible()
    page.get_by_role("button", name="Stop", exact=True).click()
    page.get_by_role("button", name="Continue", exact=True).click()
    expect(page.locator(".se-now")).to_contain_text("Next: drag the bars", timeout=60_000)
    expect(page.get_by_role("button", name="Measure again")).to_be_enabled()
    height = view.bounding_box()["height"]  # type: ignore[index]

    view.get_by_role("button", name="Heat map").click()
    left, right = view.locator("figure").all()
    expect(left.get_by_role("img", name=re.compile("heat map"))).to_be_visible()
    # Of ten layers nine levels, that which was added in the background where curves bend, and the row of the chosen one.
    for figure, cells in ((left, 101), (right, 91)):
        expect(figure.locator("g[data-name]")).to_have_count(10)
        expect(figure.locator("g[data-name] rect")).to_have_count(cells)
    # The network's first layer minds most, so its cells differ from those of the last in colour.
    colours = [
        drawn(left, f"g[data-name='{name}'] rect:nth-of-type(9)", "getComputedStyle(one).fill")
        for name in ("block1.conv1", "fc")
    ]
    assert colours[0] != colours[1]

    # What is pointed at here is marked in the bars and in the table, and the other way round.
    row = left.locator("g[data-name='block2.conv1'] rect").nth(5)
    row.hover()
    expect(left.locator(".se-tip")).to_contain_text("block2.conv1")
    for other in (".se-bar[aria-label='block2.conv1']", "tr[data-layer='block2.conv1']"):
        expect(page.locator(other)).to_have_attribute("data-pointed", "yes")
    page.locator("tr[data-layer='block3.conv1']").hover()
    expect(left.locator("g[data-name='block3.conv1']")).to_have_attribute("data-pointed", "yes")
    expect(left.locator("g[data-name='block2.conv1']")).not_to_have_attribute("data-pointed", "yes")
    row.click()
    expect(page.locator("tr[data-layer='block2.conv1']")).to_have_class("se-selected")

    view.get_by_role("button", name="Bars", exact=True).click()
    slider = view.get_by_role("slider", name="Sparsity at which layers are compared")
    bar = "g[data-name='block3.conv2'] rect[style]"
    expect(right.locator(bar)).to_be_visible()  # a slow machine is still drawing the heat map
    width = drawn(right, bar, "one.getBoundingClientRect().width")
    slider.focus()
    page.keyboard.press("End")
    expect(slider).to_have_attribute("aria-valuetext", "99 %")
    assert drawn(right, bar, "one.getBoundingClientRect().width") < width / 2
    assert view.bounding_box()["height"] == pytest.approx(height, abs=1)  # type: ignore[index]
