"""The page in a real browser, over a study that answers at once: keyboard, touch of the mouse, errors, sizes, access."""

from __future__ import annotations

import re
import sys
import time

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, expect

from tests.browser.voila_server import VoilaServer

pytestmark = [pytest.mark.browser, pytest.mark.timeout(180)]


def measured(page: Page) -> Page:
    page.get_by_role("button", name="Measure", exact=True).click()
    expect(page.locator(".se-now")).to_contain_text("Next: drag the bars", timeout=30_000)
    return page


def value(page: Page, layer: str) -> float:
    return float(page.get_by_role("slider", name=layer, exact=True).get_attribute("aria-valuenow") or "nan")


def test_the_page_stands_before_anything_is_measured_and_says_what_to_do(fake_page: Page) -> None:
    expect(fake_page.locator(".se-now")).to_have_text("Next: measure how each layer reacts to pruning.")
    expect(fake_page.get_by_text("Not measured yet")).to_be_visible()
    expect(fake_page.get_by_text("No result yet")).to_be_visible()
    expect(fake_page.get_by_role("button", name="Solve")).to_be_disabled()
    expect(fake_page.get_by_role("button", name="Download", exact=True)).to_be_disabled()
    expect(fake_page).to_have_title("Sparsity Explorer")


def test_a_page_weighs_little(fake_page: Page) -> None:
    watch = fake_page.watch  # type: ignore[attr-defined]
    assert 10_000 < watch.received < 400_000
    # Voila brings scripts of 5 MB. Those of other packages in the environment have no business here: plotly's, which the page does not use, are another 5.
    assert not [url for url in watch.files if "plotly" in url]
    assert 2_000_000 < sum(watch.files.values()) < 7_000_000


def test_the_whole_job_can_be_done_by_keyboard(page_with_torch: Page) -> None:
    page = page_with_torch
    page.get_by_role("button", name="Measure", exact=True).focus()
    page.keyboard.press("Enter")
    expect(page.locator(".se-now")).to_contain_text("Next: drag the bars", timeout=30_000)
    # One stop of the Tab key for all bars.
    assert page.locator("[role=slider][tabindex='0']").count() == 1
    page.locator("[role=slider][tabindex='0']").focus()
    page.keyboard.press("ArrowRight")
    bar = page.get_by_role("slider", name="block1.conv1")
    expect(bar).to_be_focused()
    # Else JupyterLab would cut the cell at an "x", and delete it at "d d".
    assert page.evaluate("document.activeElement.hasAttribute('data-lm-suppress-shortcuts')")
    page.keyboard.press("Home")
    expect(bar).to_have_attribute("aria-valuenow", "0")
    page.keyboard.press("PageUp")
    page.keyboard.press("ArrowUp")
    page.keyboard.press("Shift+ArrowUp")
    expect(bar).to_have_attribute("aria-valuenow", "11.1")
    expect(bar).to_have_attribute("aria-valuetext", re.compile(r"^11\.1 %, 0\.167 milliseconds, KL "))
    page.keyboard.press("End")
    expect(bar).to_have_attribute("aria-valuenow", "99")
    page.keyboard.press("Control+z")
    expect(bar).to_have_attribute("aria-valuenow", "11.1")
    page.keyboard.press("Control+y")
    expect(bar).to_have_attribute("aria-valuenow", "99")
    page.keyboard.press("Enter")
    expect(page.get_by_label("Sparsity", exact=True)).to_be_focused()
    page.keyboard.type("42")
    page.keyboard.press("Enter")
    expect(bar).to_have_attribute("aria-valuenow", "42")
    bar.focus()
    page.keyboard.press("l")
    expect(bar).to_have_attribute("aria-disabled", "true")
    page.keyboard.press("ArrowUp")
    expect(bar).to_have_attribute("aria-valuenow", "42")
    page.get_by_label("Target speed-up, typed").focus()
    page.keyboard.press("Control+a")
    page.keyboard.type("2")
    page.keyboard.press("Enter")
    expect(page.locator("[data-key=speedup] .se-big")).to_contain_text(re.compile(r"^2\.[0-4]"))
    expect(bar).to_have_attribute("aria-valuenow", "42")
    # The speed-up may have been 2.x before.
    expect(page.get_by_role("region", name="Distribution").get_by_text("solved", exact=True)).to_be_visible()
    expect(page.get_by_role("button", name="Start pruning")).to_be_enabled()
    page.get_by_role("textbox", name="Epochs").focus()
    page.keyboard.press("Control+a")
    page.keyboard.type("1")
    page.get_by_role("button", name="Start pruning").focus()
    page.keyboard.press("Enter")
    expect(page.locator(".se-now")).to_contain_text("Run 1 finished", timeout=30_000)
    expect(page.locator("[data-key=accuracy] .se-big")).to_have_text("92.4%")


def test_a_dragged_bar_reaches_the_kernel_exactly_and_sends_few_messages(fake_page: Page) -> None:
    page = measured(fake_page)
    sent: list[str | bytes] = []
    bar = page.get_by_role("slider", name="block1.conv2")
    bar.scroll_into_view_if_needed()
    box = bar.bounding_box()
    assert box is not None
    before = page.locator("[data-key=latency] .se-big").inner_text()
    page.evaluate(
        """() => { window.sent = 0; const send = WebSocket.prototype.send;
        WebSocket.prototype.send = function (...data) { window.sent += 1; return send.apply(this, data); }; }"""
    )
    x = box["x"] + box["width"] / 2
    page.mouse.move(x, box["y"] + 0.3 * box["height"])
    page.mouse.down()
    for i in range(61):
        page.mouse.move(x, box["y"] + box["height"] * (0.3 + 0.01 * i))
    page.mouse.up()
    sent_count = page.evaluate("window.sent")
    assert sent == [] and sent_count < 61
    # 0.9 of the way down from the top is 10 % of the height.
    assert value(page, "block1.conv2") == pytest.approx(10.0, abs=0.6)
    expect(page.locator("[data-key=latency] .se-big")).not_to_have_text(before)
    expect(page.get_by_label("Sparsity", exact=True)).to_have_value(f"{value(page, 'block1.conv2'):.1f}")
    page.get_by_role("button", name="Undo").click()
    expect(bar).not_to_have_attribute("aria-valuenow", re.compile("^(9|10)"))


def test_a_drag_is_answered_within_a_quarter_of_a_second(fake_page: Page) -> None:
    page = measured(fake_page)
    bar = page.get_by_role("slider", name="block3.conv2")
    bar.scroll_into_view_if_needed()
    box = bar.bounding_box()
    assert box is not None
    x = box["x"] + box["width"] / 2
    page.mouse.move(x, box["y"] + 0.5 * box["height"])
    page.mouse.down()
    times = []
    for i in range(8):
        before = page.locator("[data-key=latency] .se-big").inner_text()
        started = time.perf_counter()
        page.mouse.move(x, box["y"] + box["height"] * (0.1 + 0.05 * i))
        expect(page.locator("[data-key=latency] .se-big")).not_to_have_text(before)
        times.append(time.perf_counter() - started)
    page.mouse.up()
    sys.stdout.write(f"drag to figure: median {1000 * sorted(times)[4]:.0f} ms\n")
    # The poll of the test is in it; a busy machine is allowed for.
    assert sorted(times)[4] < 0.5


def test_wrong_targets_are_explained_in_alerts_that_can_be_dismissed(fake_page: Page) -> None:
    page = measured(fake_page)
    bars = [value(page, name) for name in ("block1.conv1", "fc")]
    for typed in ("fast", "0.2", "1000"):
        page.get_by_label("Target speed-up, typed").fill(typed)
        page.get_by_role("button", name="Solve").click()
        alert = page.get_by_role("alert")
        expect(alert).to_contain_text(re.compile("between 1.0 and 9.5|highest is 9.46"))
        assert "Traceback" not in page.content()
        page.get_by_role("button", name="Dismiss").click()
        expect(alert).to_be_hidden()
        assert bars == [value(page, name) for name in ("block1.conv1", "fc")]


def test_wrong_settings_and_wrong_sparsities_are_explained(fake_page: Page) -> None:
    page = fake_page
    page.get_by_role("textbox", name="Epochs").fill("many")
    page.get_by_role("textbox", name="Epochs").press("Tab")
    expect(page.get_by_role("alert")).to_contain_text('epochs is "many"; give epochs between 0.1 and 1000.')
    page.get_by_label("Sparsity", exact=True).fill("120")
    page.get_by_label("Sparsity", exact=True).press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("120.0% is out of range")


def test_data_that_are_missing_are_explained_and_the_page_goes_on(fake_page: Page) -> None:
    page = fake_page
    page.get_by_label("Model and data").select_option(label="Missing data")
    expect(page.get_by_role("alert")).to_contain_text("Install dataset-fashion-mnist")
    expect(page.get_by_label("Model and data")).to_have_value("Fake network")
    measured(page)
    expect(page.get_by_role("alert")).to_be_hidden()


def test_a_run_is_paused_resumed_and_stopped_with_a_result(page_with_torch: Page) -> None:
    page = page_with_torch
    page.get_by_role("textbox", name="Epochs").fill("500")
    page.get_by_role("button", name="Start pruning").click()
    monitor = page.get_by_role("region", name="Prune")
    monitor.get_by_role("button", name="Pause").click()
    expect(page.locator(".se-now")).to_contain_text("paused")
    monitor.get_by_role("button", name="Resume").click()
    expect(page.locator(".se-now")).not_to_contain_text("paused")
    started = time.perf_counter()
    monitor.get_by_role("button", name="Stop").click()
    expect(page.locator(".se-now")).to_contain_text("Run 1 stopped early")
    assert time.perf_counter() - started < 3
    expect(page.get_by_role("button", name="Download", exact=True)).to_be_enabled()


def test_a_reload_in_the_middle_of_a_run_gives_a_working_page(
    page_with_torch: Page, fake_app: VoilaServer
) -> None:
    page = page_with_torch
    page.get_by_role("textbox", name="Epochs").fill("500")
    page.get_by_role("button", name="Start pruning").click()
    expect(page.locator(".se-now")).to_contain_text("Pruning, run 1")
    page.reload()
    page.get_by_role("slider", name="fc").wait_for(timeout=60_000)
    expect(page.locator(".se-now")).to_have_text("Next: measure how each layer reacts to pruning.")
    measured(page)
    fake_app.check_alive()


@pytest.mark.parametrize(
    "context", [{"viewport": {"width": 380, "height": 800}, "has_touch": True}], indirect=True
)
def test_at_380_pixels_nothing_is_cut_off_and_bars_can_be_pulled(fake_page: Page) -> None:
    page = measured(fake_page)
    assert page.evaluate("document.scrollingElement.scrollWidth") <= 380
    wide = page.evaluate(
        """() => [...document.querySelectorAll(".se button, .se input, .se select, .se h2, .se-tile")]
        .filter((e) => e.offsetParent && !e.closest(".se-scroll, .se-wide"))
        .filter((e) => { const b = e.getBoundingClientRect(); return b.right > innerWidth + 1 || b.left < -1; })
        .map((e) => e.outerHTML.slice(0, 90))"""
    )
    assert wide == []
    bar = page.get_by_role("slider", name="block3.conv2")
    bar.scroll_into_view_if_needed()
    bar.click(position={"x": 8, "y": 100})
    expect(bar).to_be_focused()
    assert 30 < value(page, "block3.conv2") < 70


@pytest.mark.parametrize(
    "context", [{"color_scheme": "light"}, {"color_scheme": "dark"}], indirect=True, ids=["light", "dark"]
)
def test_axe_finds_nothing_serious_before_and_after_a_run(page_with_torch: Page) -> None:
    page = page_with_torch

    def serious() -> list[str]:
        found = Axe().run(page).response["violations"]
        return [
            f"{entry['id']}: {entry['help']}: {[node['html'][:120] for node in entry['nodes'][:3]]}"
            for entry in found
            if entry["impact"] in ("serious", "critical")
        ]

    assert serious() == []
    measured(page)
    assert serious() == []
    page.get_by_role("textbox", name="Epochs").fill("1")
    page.get_by_role("button", name="Start pruning").click()
    expect(page.locator(".se-now")).to_contain_text("Run 1 finished", timeout=30_000)
    page.get_by_text("Log", exact=True).click()
    page.get_by_role("button", name="Settings").click()
    assert serious() == []


def test_the_balance_is_set_by_keyboard_and_by_mouse(fake_page: Page) -> None:
    page = measured(fake_page)
    slider = page.get_by_label("Balance between little harm and much speed")
    # Hidden until the frontier has been worked out, in the background.
    expect(slider).to_be_visible()
    expect(slider).to_be_enabled()
    speedup = page.locator("[data-key=speedup] .se-big")
    slider.focus()
    page.keyboard.press("Home")
    expect(speedup).to_have_text(re.compile(r"^1\.00\s*×$"))
    page.keyboard.press("End")
    expect(slider).to_have_attribute(
        "aria-valuetext",
        re.compile(r"^[\d.]+ times faster, KL to the dense outputs [\d.]+ nats before training$"),
    )
    expect(speedup).to_have_text(re.compile(r"^2\.98\s*×$"))
    fastest = speedup.inner_text()
    page.keyboard.press("ArrowLeft")
    expect(speedup).not_to_have_text(fastest)

    plot = page.locator(".se-strip .se-plot")
    box = plot.bounding_box()
    assert box is not None
    plot.click(position={"x": box["width"] - 20, "y": 80})
    expect(speedup).to_have_text(fastest)
    expect(page.locator(".se-pareto svg")).to_contain_text("you are here")


def test_for_one_shot_pruning_a_better_distribution_is_found_and_taken(page_with_torch: Page) -> None:
    page = measured(page_with_torch)
    box = page.get_by_label("Will not be trained: search for less harm")
    expect(box).not_to_be_checked()
    better = page.get_by_role("button", name="Take the better one")
    expect(better).to_be_hidden()
    box.focus()
    page.keyboard.press("Space")
    expect(box).to_be_checked()
    expect(better).to_be_visible(timeout=30_000)
    expect(page.locator(".se-offer")).to_contain_text("4 networks tried, the best diverges 10% less")
    at = value(page, "block1.conv2")
    better.click()
    expect(better).to_be_hidden()
    assert value(page, "block1.conv2") == pytest.approx(at - 5, abs=0.11)
    box.uncheck()
    expect(page.locator(".se-offer [role=status]")).to_have_text("")


@pytest.mark.parametrize("context", [{"color_scheme": "dark"}], indirect=True)
def test_the_theme_follows_the_system_until_the_reader_chooses(fake_page: Page) -> None:
    page = fake_page
    root = page.locator("html")
    expect(root).to_have_attribute("data-se-theme", "dark")
    page.get_by_role("button", name="Use light colours").click()
    expect(root).to_have_attribute("data-se-theme", "light")
    page.reload()
    page.get_by_role("slider", name="fc").wait_for(timeout=60_000)
    expect(root).to_have_attribute("data-se-theme", "light")


@pytest.mark.parametrize("context", [{"reduced_motion": "reduce"}], indirect=True)
def test_with_reduced_motion_nothing_moves_by_itself(fake_page: Page) -> None:
    durations = fake_page.evaluate(
        """() => [...document.querySelectorAll(".se *")].map((e) => getComputedStyle(e))
        .filter((s) => parseFloat(s.transitionDuration) > 0 || (s.animationName !== "none")).length"""
    )
    assert durations == 0
