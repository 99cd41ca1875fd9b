"""The page under a finger: bars and handles are pulled, and the page scrolls past them. Touches go through the browser's own gestures, scrolling among them."""

from __future__ import annotations

import re
from collections.abc import Iterable

import pytest
from playwright.sync_api import CDPSession, Locator, Page, expect

pytestmark = [pytest.mark.browser, pytest.mark.timeout(120)]

PHONE = {"viewport": {"width": 380, "height": 760}, "has_touch": True, "is_mobile": True}


class Finger:
    """One finger on a page."""

    def __init__(self, page: Page) -> None:
        self._page = page
        self._session: CDPSession = page.context.new_cdp_session(page)

    def _send(self, kind: str, points: Iterable[tuple[float, float]]) -> None:
        self._session.send(
            "Input.dispatchTouchEvent",
            {"type": kind, "touchPoints": [{"x": x, "y": y} for x, y in points]},
        )

    def stroke(self, start: tuple[float, float], by: tuple[float, float], steps: int = 8) -> None:
        """Come down at `start`, move by so many pixels, and let go."""
        (x, y), (dx, dy) = start, by
        self._send("touchStart", [start])
        for i in range(1, steps + 1):
            self._send("touchMove", [(x + dx * i / steps, y + dy * i / steps)])
        self._send("touchEnd", [])

    def tap(self, at: tuple[float, float]) -> None:
        self.stroke(at, (0, 0), steps=0)

    def pinch(self, start: tuple[float, float], by: float) -> None:
        """Move one finger down, then lay a second one beside it, which takes the gesture away from what was under the first."""
        x, y = start
        self._send("touchStart", [start])
        self._send("touchMove", [(x, y + by)])
        self._send("touchCancel", [])


def bar(page: Page, name: str) -> Locator:
    return page.get_by_role("slider", name=name, exact=True)


def values(page: Page) -> list[float]:
    return page.locator(".se-bar").evaluate_all("(bars) => bars.map((bar) => Number(bar.ariaValueNow))")


def inside(locator: Locator, across: float, down: float) -> tuple[float, float]:
    """A place in an element, as shares of its width and height."""
    box = locator.bounding_box()
    assert box is not None
    return box["x"] + across * box["width"], box["y"] + down * box["height"]


def top(page: Page) -> float:
    """Where the bars are in the window."""
    return page.locator(".se-field").evaluate("(field) => field.getBoundingClientRect().top")


def to_the_middle(locator: Locator) -> None:
    locator.evaluate("(one) => one.scrollIntoView({ block: 'center', behavior: 'instant' })")


@pytest.mark.parametrize("context", [PHONE], indirect=True)
def test_a_finger_scrolls_past_the_bars_pulls_them_and_shapes_the_schedule(fake_page: Page) -> None:
    page, finger = fake_page, Finger(fake_page)
    bars = page.locator(".se-bar")
    expect(bars).to_have_count(10)
    before = values(page)
    assert before == [0.0, *[90.0] * 8, 0.0]
    to_the_middle(page.locator(".se-field"))
    conv, last = bar(page, "block2.conv1"), bar(page, "block3.conv2")
    readout = page.locator(".se-readout b")
    expect(readout).to_have_text("stem.conv")

    # Over a bar that is not chosen the page scrolls, and nothing else happens.
    at = top(page)
    finger.stroke(inside(conv, 0.5, 0.7), (0, -90))
    page.wait_for_function(
        "(at) => document.querySelector('.se-field').getBoundingClientRect().top < at - 40", arg=at
    )
    assert values(page) == before
    expect(readout).to_have_text("stem.conv")

    # A tap chooses a layer and leaves its sparsity.
    to_the_middle(page.locator(".se-field"))
    finger.tap(inside(conv, 0.5, 0.7))
    expect(readout).to_have_text("block2.conv1")
    expect(conv).to_be_focused()
    assert values(page) == before

    # The chosen bar goes as far as the finger, wherever it was taken; the page stays.
    height = conv.bounding_box()["height"]  # type: ignore[index]
    at = top(page)
    finger.stroke(inside(conv, 0.5, 0.5), (0, 0.3 * height), steps=20)
    moved = values(page)
    assert moved[3] == pytest.approx(60, abs=4), "less the few pixels that tell a pull from a tap"
    assert moved == [*before[:3], moved[3], *before[4:]]
    assert top(page) == pytest.approx(at, abs=1)
    page.get_by_role("button", name="Undo").click()
    expect(conv).to_have_attribute("aria-valuenow", "90")

    # Any bar is pulled by its upper end at once.
    to_the_middle(page.locator(".se-field"))
    finger.stroke(inside(last, 0.5, 0.12), (0, 0.4 * height), steps=20)
    expect(readout).to_have_text("block3.conv2")
    assert values(page)[7] == pytest.approx(50, abs=4)

    # A gesture that the browser takes away leaves everything as it was.
    was = values(page)
    finger.pinch(inside(last, 0.5, 0.5), 60)
    page.wait_for_function(
        "(was) => Number(document.querySelectorAll('.se-bar')[7].ariaValueNow) === was", arg=was[7]
    )
    assert values(page) == was

    # A locked bar is scrolled past, although it is chosen.
    page.get_by_role("button", name="Lock", exact=True).click()
    expect(last).to_have_attribute("aria-disabled", "true")
    to_the_middle(page.locator(".se-field"))
    at = top(page)
    finger.stroke(inside(last, 0.5, 0.6), (0, -90))
    page.wait_for_function(
        "(at) => document.querySelector('.se-field').getBoundingClientRect().top < at - 40", arg=at
    )
    assert values(page) == was

    # The ends of the schedule, as soon as they are touched.
    monitor = page.get_by_role("region", name="Prune")
    end = monitor.get_by_role("slider", name="End of prune")
    expect(end).to_have_attribute("aria-valuetext", "pruning ends after 2.5 epochs")
    to_the_middle(end)
    plot = monitor.locator("[data-chart=sparsity] .se-plot").bounding_box()
    assert plot is not None
    # From 2.5 epochs of five to 4; the axis begins 46 pixels from the left and ends 14 from the right.
    finger.stroke(inside(end, 0.5, 0.5), (0.3 * (plot["width"] - 60), 30), steps=12)
    expect(end).to_have_attribute("aria-valuetext", "pruning ends after 4 epochs")

    # A tap on a line chooses its layer, and all charts are read there.
    monitor.get_by_role("button", name="Each layer", exact=True).click()
    chart = monitor.locator("[data-chart=layers] .se-plot")
    to_the_middle(chart)
    finger.tap(inside(chart, 0.9, 0.8))
    expect(readout).to_have_text("stem.conv")
    expect(monitor.locator(".se-read").nth(1)).to_have_text(re.compile(r"^stem\.conv planned 0\.0 %"))
    heading = monitor.get_by_role("heading", name="Prune")
    to_the_middle(heading)
    finger.tap(inside(heading, 0.5, 0.5))
    expect(monitor.locator(".se-read").nth(1)).to_be_hidden()

    # A tap in a chart of the sensitivity chooses the layer, and tells what it reads.
    page.get_by_role("button", name="Measure", exact=True).click()
    expect(page.locator(".se-now")).to_contain_text("Next: drag the bars", timeout=30_000)
    sensitivity = page.get_by_role("region", name="Sensitivity")
    sensitivity.get_by_role("button", name="Bars", exact=True).click()
    chart = sensitivity.locator("svg").first
    to_the_middle(chart)
    rows = chart.locator("g[data-name]")
    wanted = rows.nth(6)
    name = wanted.get_attribute("data-name")
    finger.tap(inside(wanted, 0.2, 0.5))
    expect(readout).to_have_text(name or "")
    expect(sensitivity.locator(".se-tip").first).to_be_visible()
