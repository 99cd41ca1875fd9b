"""Fingers on the page: they scroll past the bars, choose with a tap, pull what is chosen and any bar by its upper end, read charts, and shape the schedule."""

from __future__ import annotations

import pytest
from playwright.sync_api import CDPSession, FloatRect, Locator, Page, expect

pytestmark = [pytest.mark.browser, pytest.mark.timeout(180)]


def box_of(locator: Locator) -> FloatRect:
    box = locator.bounding_box()
    assert box is not None
    return box


def values(page: Page) -> list[float]:
    return [
        float(bar.get_attribute("aria-valuenow") or "nan")
        for bar in page.get_by_role("group", name="Sparsity of each layer").get_by_role("slider").all()
    ]


def upper_end(bar: Locator) -> tuple[float, float]:
    """Where the coloured part of a bar ends."""
    box = box_of(bar.locator(".se-fill"))
    return box["x"] + box["width"] / 2, box["y"] + 2


class Finger:
    """One finger: real touches of the browser, which may take them for scrolling."""

    def __init__(self, page: Page) -> None:
        self._page = page
        self._session: CDPSession = page.context.new_cdp_session(page)

    def _send(self, kind: str, *points: tuple[float, float]) -> None:
        self._session.send(
            "Input.dispatchTouchEvent",
            {"type": kind, "touchPoints": [{"x": x, "y": y} for x, y in points]},
        )

    def swipe(
        self, start: tuple[float, float], by: tuple[float, float], end: str = "touchEnd", steps: int = 10
    ) -> None:
        self._send("touchStart", start)
        for i in range(1, steps + 1):
            self._send("touchMove", (start[0] + by[0] * i / steps, start[1] + by[1] * i / steps))
        self._send(end)


@pytest.mark.parametrize(
    "context", [{"viewport": {"width": 380, "height": 800}, "has_touch": True}], indirect=True
)
def test_fingers_scroll_past_the_bars_pull_the_one_that_was_tapped_and_shape_the_schedule(
    page_with_torch: Page,
) -> None:
    page, finger = page_with_torch, Finger(page_with_torch)
    page.get_by_role("button", name="Measure", exact=True).click()
    expect(page.locator(".se-now")).to_contain_text("Next: drag the bars", timeout=30_000)
    # Each bar shows its number once, also beside the handle for fingers.
    shown = page.locator(".se-bar").evaluate_all("bars => bars.map((bar) => bar.innerText.trim())")
    assert shown and all(text.replace(".", "", 1).isdigit() for text in shown)
    bar = page.get_by_role("slider", name="block3.conv2", exact=True)
    bar.evaluate("(one) => one.scrollIntoView({ block: 'center' })")
    before, box = values(page), box_of(bar)
    middle = (box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)

    finger.swipe(middle, (0, -160))
    page.wait_for_function(
        "(y) => document.querySelector('.se-bar').getBoundingClientRect().y < y - 60", arg=box["y"]
    )
    assert values(page) == before
    expect(page.locator(".se-readout b")).to_have_text("stem.conv")  # what was chosen before

    bar.evaluate("(one) => one.scrollIntoView({ block: 'center' })")
    box = box_of(bar)
    middle = (box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.touchscreen.tap(*middle)
    expect(bar).to_be_focused()
    assert values(page) == before

    at = box_of(bar)["y"]
    finger.swipe(middle, (0, 0.3 * box["height"]))
    assert float(bar.get_attribute("aria-valuenow") or "nan") == pytest.approx(before[7] - 30, abs=1.5)
    assert box_of(bar)["y"] == pytest.approx(at, abs=1)
    pulled = values(page)
    assert [i for i in range(len(before)) if pulled[i] != before[i]] == [7]

    # What is taken from the finger half-way leaves no trace.
    finger.swipe(middle, (0, -0.2 * box["height"]), end="touchCancel")
    assert values(page) == pulled
    expect(page.get_by_label("Sparsity", exact=True)).to_have_value(f"{pulled[7]:.1f}")

    # A bar that is not chosen is pulled by its upper end; a touch that hardly moves only chooses.
    other = page.get_by_role("slider", name="block1.conv2", exact=True)
    end = upper_end(other)
    finger.swipe(end, (0, 4))
    expect(other).to_be_focused()
    assert values(page) == pulled
    page.touchscreen.tap(*middle)
    expect(bar).to_be_focused()
    finger.swipe(end, (0, 0.2 * box["height"]))
    assert values(page)[2] == pytest.approx(pulled[2] - 20, abs=1.5)

    # A locked bar stays, and the page scrolls, also where the bar is chosen.
    page.get_by_role("button", name="Lock", exact=True).click()
    expect(other).to_have_attribute("aria-disabled", "true")
    bar.evaluate("(one) => one.scrollIntoView({ block: 'center' })")
    locked, y = values(page), box_of(bar)["y"]
    finger.swipe(upper_end(other), (0, -90))
    page.wait_for_function(
        "(y) => document.querySelector('.se-bar').getBoundingClientRect().y < y - 40", arg=y
    )
    assert values(page) == locked

    # A tap chooses a layer in a chart, and says what is read there until the next touch.
    sensitivity = page.get_by_role("region", name="Sensitivity")
    sensitivity.get_by_role("button", name="Bars", exact=True).click()
    row = sensitivity.locator("svg").first.locator("g[data-name]").nth(6)
    row.evaluate("(one) => one.scrollIntoView({ block: 'center' })")
    at_row = box_of(row)
    page.touchscreen.tap(at_row["x"] + 20, at_row["y"] + at_row["height"] / 2)
    expect(page.locator(".se-readout b")).to_have_text(row.get_attribute("data-name") or "")
    tip = sensitivity.locator(".se-tip").first
    expect(tip).to_contain_text("90 % sparse")
    monitor = page.get_by_role("region", name="Prune")
    monitor.get_by_role("button", name="Each layer", exact=True).click()
    chart = monitor.locator("[data-chart=layers] .se-plot")
    chart.evaluate("(one) => one.scrollIntoView({ block: 'center' })")
    plot = box_of(chart)
    page.touchscreen.tap(plot["x"] + 0.9 * plot["width"], plot["y"] + 0.1 * plot["height"])
    read = monitor.locator(".se-read").nth(1)
    expect(read).to_contain_text("planned")
    expect(page.locator(".se-readout b")).to_have_text(read.inner_text().split(" planned")[0])
    monitor.get_by_role("heading", name="Prune").tap()
    expect(read).to_be_hidden()
    monitor.get_by_role("button", name="Sparsity", exact=True).click()

    # The schedule of the run is shaped the same way.
    handle = page.get_by_role("slider", name="End of prune")
    handle.evaluate("(one) => one.scrollIntoView({ block: 'center' })")
    start, box = float(handle.get_attribute("aria-valuenow") or "nan"), box_of(handle)
    middle = (box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    finger.swipe(middle, (60, 0))
    after = float(handle.get_attribute("aria-valuenow") or "nan")
    assert after > start + 0.3
    assert box_of(handle)["x"] == pytest.approx(box["x"] + 60, abs=6)
    assert box_of(handle)["y"] == pytest.approx(box["y"], abs=1)
    # The kernel has it: the fields in the settings are written from it.
    page.get_by_role("button", name="Settings").click()
    epochs = float(handle.get_attribute("aria-valuemax") or "nan")
    stabilise, ramp = (
        float(page.locator(f"input[name={name}]").input_value()) for name in ("stabilise", "ramp")
    )
    assert (stabilise + ramp) * epochs == pytest.approx(after, abs=0.06)
