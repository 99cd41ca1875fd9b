"""The schedule is shaped by hand before a run, and the run and its masks are watched."""

from __future__ import annotations

import re

import pytest
from playwright.sync_api import Page, expect

pytestmark = [pytest.mark.browser, pytest.mark.timeout(180)]


def test_a_schedule_is_dragged_a_run_is_watched_and_its_masks_are_looked_at(slow_page: Page) -> None:
    page = slow_page
    monitor, mask = page.get_by_role("region", name="Prune"), page.get_by_role("region", name="Mask")
    page.get_by_role("button", name="Settings").click()
    stabilise, ramp = page.get_by_label("Stabilise (share)"), page.get_by_label("Prune (share)")
    begin = monitor.get_by_role("slider", name="End of stabilise")
    end = monitor.get_by_role("slider", name="End of prune")
    expect(begin).to_have_attribute("aria-valuetext", "pruning begins after 0.5 epochs")
    expect(end).to_have_attribute("aria-valuetext", "pruning ends after 2.5 epochs")

    # By keyboard; the other end stays.
    begin.focus()
    page.keyboard.press("PageUp")
    page.keyboard.press("ArrowLeft")
    expect(begin).to_have_attribute("aria-valuetext", "pruning begins after 0.95 epochs")
    expect(end).to_have_attribute("aria-valuetext", "pruning ends after 2.5 epochs")
    expect(stabilise).to_have_value("0.19")
    expect(ramp).to_have_value("0.31")
    expect(begin).to_be_focused()
    # Not beyond the other end.
    page.keyboard.press("End")
    expect(begin).to_have_attribute("aria-valuenow", "2.5")
    expect(ramp).to_have_value("0")
    page.keyboard.press("Home")

    # By mouse: in the page until it is let go.
    planned = monitor.locator("[data-chart=sparsity] path").nth(1)
    before = planned.get_attribute("d")
    end.scroll_into_view_if_needed()
    box, plot = end.bounding_box(), monitor.locator("[data-chart=sparsity] .se-plot").bounding_box()
    assert box is not None and plot is not None
    page.evaluate(
        """() => { window.asked = 0; const send = WebSocket.prototype.send;
        WebSocket.prototype.send = function (...data) {
          const text = data[0] instanceof ArrayBuffer ? new TextDecoder().decode(data[0]) : String(data[0]);
          if (text.includes('"options"')) window.asked += 1;
          return send.apply(this, data); }; }"""
    )
    y = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + box["width"] / 2, y)
    page.mouse.down()
    # The axis begins 46 pixels from the left and ends 14 from the right.
    page.mouse.move(plot["x"] + 46 + 0.8 * (plot["width"] - 60), y, steps=6)
    expect(end).to_have_attribute("aria-valuetext", "pruning ends after 4 epochs")
    expect(ramp).to_have_value("0.8")
    assert page.evaluate("window.asked") == 0
    assert planned.get_attribute("d") != before
    page.mouse.up()
    page.wait_for_function("window.asked === 1")

    # The fields and the handles say the same; what is refused is explained.
    stabilise.fill("0.2")
    expect(begin).to_have_attribute("aria-valuetext", "pruning begins after 1 epoch")
    stabilise.fill("0.95")
    stabilise.press("Tab")
    expect(page.get_by_role("alert")).to_contain_text("give a share of the run between 0 and 0.9")
    page.get_by_role("button", name="Start pruning").click()
    expect(page.get_by_role("alert")).to_contain_text("give a share of the run between 0 and 0.9")
    expect(page.get_by_role("button", name="Start pruning")).to_be_visible()
    stabilise.fill("0.1")

    # Before the run the mask is that of the bars.
    mask.get_by_label("Layer").select_option("block3.conv2")
    picture = mask.get_by_role("img")
    expect(picture).to_have_attribute("aria-label", re.compile(r"^block3\.conv2: 10\.0 % of 331,776 weights"))
    bar = page.get_by_role("slider", name="block3.conv2")
    bar.focus()
    page.keyboard.press("Home")
    expect(picture).to_have_attribute("aria-label", re.compile(r"^block3\.conv2: 100\.0 %"))
    page.keyboard.press("End")
    expect(picture).to_have_attribute("aria-label", re.compile(r"^block3\.conv2: 1\.0 %"))

    # The run.
    page.get_by_role("textbox", name="Epochs").fill("30")
    page.get_by_role("button", name="Start pruning").click()
    expect(begin).to_have_attribute("aria-disabled", "true")
    expect(begin).to_have_attribute("aria-valuetext", "pruning begins after 3 epochs")
    expect(monitor.locator(".se-below .se-hint")).to_contain_text(
        re.compile(r"learning rate 0\.0\d+ · \d+ s gone · about \d+ s left · memory [\d,]+ MB")
    )
    # Between the half that is pruned after seconds and the 1 % of the end, wherever a busy machine lets the pause come.
    some_pruned = re.compile(r"^block3\.conv2: [1-4]\d\.\d %")
    expect(picture).to_have_attribute("aria-label", some_pruned, timeout=30_000)
    monitor.get_by_role("button", name="Pause").click()
    for face in ("Training loss", "Each layer", "Stored size"):
        monitor.get_by_role("button", name=face, exact=True).click()
    # Two of the learning rate, and one of each layer.
    expect(monitor.locator("[data-chart=layers] path")).to_have_count(12)
    monitor.locator("[data-chart=stored] .se-plot").hover(position={"x": 70, "y": 90})
    reads = monitor.locator(".se-read")
    expect(reads).to_have_text([re.compile(r"^0\.4"), re.compile("^block3.conv2 0.0 %"), re.compile(r"kB$")])
    # The same by keyboard.
    reader = monitor.get_by_role("slider", name="Read all charts at one epoch")
    reader.focus()
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    expect(reader).to_have_attribute(
        "aria-valuetext",
        re.compile(
            r"^after 0\.3 epochs: Training loss 0\.4\d?; Each layer block3\.conv2 0\.0 %; Stored size [\d,]+ kB$"
        ),
    )

    # The masks of the run, back in time.
    moment = mask.get_by_role("slider", name="Moment of the run")
    moment.focus()
    page.keyboard.press("Home")
    expect(picture).to_have_attribute("aria-label", re.compile(r"^block3\.conv2: 100\.0 %"))
    expect(moment).to_have_attribute("aria-valuetext", "after 0 epochs")
    inked = "canvas => [...canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data].filter((v, i) => i % 4 === 3 && v === 255).length"
    full = picture.evaluate(inked)
    assert full == 96 * 192
    page.keyboard.press("End")
    expect(picture).to_have_attribute("aria-label", some_pruned)
    assert picture.evaluate(inked) < full / 2
    monitor.get_by_role("button", name="Stop").click()
    expect(page.locator(".se-now")).to_contain_text("Run 1 stopped early")
    expect(begin).not_to_have_attribute("aria-disabled", "true")
