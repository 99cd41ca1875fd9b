"""The equalizer in a browser: several layers at once, strokes, order and search, kept distributions, and figures that follow the hand."""

from __future__ import annotations

import json

import numpy as np
import pytest
from playwright.sync_api import Page, expect

from explorer.distribution import PredictionTables, SparsityDistribution, predict
from explorer.models import PrunableLayer
from explorer.sensitivity import SensitivityPoint, SensitivityTable
from explorer.sensitivity.points import WHOLE_NETWORK
from explorer.widgets import assets

pytestmark = pytest.mark.browser


def bar(page: Page, name: str):
    return page.get_by_role("slider", name=name)


def now(page: Page, name: str) -> float:
    return float(bar(page, name).get_attribute("aria-valuenow") or "nan")


def measure(page: Page) -> None:
    page.get_by_role("button", name="Measure", exact=True).click()
    expect(page.locator(".se-now")).to_contain_text("Next: drag the bars", timeout=60_000)


def test_the_page_predicts_what_the_kernel_predicts(page: Page) -> None:
    random = np.random.default_rng(0)
    layers = [PrunableLayer(name, "conv2d", (n,), n, n) for name, n in (("a", 999), ("b", 20_000), ("c", 17))]
    levels = (0.0, 0.5, 0.8, 0.9, 0.99)
    points = [
        SensitivityPoint(layer.name, s, kind, value)
        for layer in layers
        for kind in ("kl", "loss", "accuracy", "latency_ms")
        for s, value in zip(
            levels, sorted(random.uniform(0, 1, 5), reverse=kind in ("accuracy", "latency_ms")), strict=True
        )
    ]
    points += [SensitivityPoint(WHOLE_NETWORK, s, "latency_ms", float(3.5 - 2 * s)) for s in levels]
    table = SensitivityTable.from_points(
        points, layers=[layer.name for layer in layers], metadata={"baseline_latency_ms": 4.0}
    )
    tables = PredictionTables.of(layers, table, other_params=7).to_page(digits=15)
    assert {*tables["curves"]} == {"kl", "loss", "accuracy", "latency_ms"}
    page.goto("about:blank")
    page.add_script_tag(content=assets.module("predict"))
    for _ in range(20):
        values = [round(float(v), 3) for v in random.choice([0.0, 0.3, 0.5, 0.873, 0.99, 0.955], 3)]
        got = page.evaluate("([tables, values]) => predict(tables, values)", [tables, values])
        told = predict(
            layers,
            table,
            SparsityDistribution(dict(zip("abc", values, strict=True))),
            other_params=7,
        )
        for name in ("kl", "loss", "accuracy", "latency_ms", "speedup", "sparsity", "size_bytes"):
            assert got[name] == pytest.approx(getattr(told, name), rel=1e-9, abs=1e-12), (name, values)


def test_figures_follow_the_hand_in_the_same_frame(fake_page: Page) -> None:
    page = fake_page
    measure(page)
    # The pointer's event is handled and the figures are read without giving the kernel a moment to answer.
    before, during = page.evaluate("""() => {
        const field = document.querySelector(".se-field"), bar = field.querySelector("[aria-label='block2.conv2']");
        const box = bar.getBoundingClientRect();
        const figures = () => [...document.querySelectorAll(".se-tile .se-big span")].map((one) => one.textContent);
        const act = (type, y) => bar.dispatchEvent(new PointerEvent(type, { bubbles: true, pointerId: 1, clientX: box.left + 5, clientY: box.top + y * box.height }));
        field.setPointerCapture = () => {};
        const before = figures();
        act("pointerdown", 0.5);
        act("pointermove", 0.7);
        const during = figures();
        act("pointerup", 0.7);
        return [before, during];
    }""")
    assert all(a != b for a, b in zip(before, during, strict=True)), (before, during)
    # What the kernel says to the same sparsities.
    expect(bar(page, "block2.conv2")).to_have_attribute("aria-valuenow", "30")
    page.wait_for_timeout(300)
    assert page.locator(".se-tile .se-big span").all_text_contents() == during


def test_several_layers_are_chosen_moved_tied_and_locked_together(fake_page: Page) -> None:
    page = fake_page
    page.get_by_role("button", name="block3", exact=True).click()
    expect(page.locator(".se-readout b")).to_have_text("3 layers")
    names = ["block3.conv1", "block3.conv2", "block3.shortcut.conv"]
    others = ["block1.conv1", "block2.conv2"]
    kept = [now(page, name) for name in others]
    page.keyboard.press("PageDown")
    for name in names:
        expect(bar(page, name)).to_have_attribute("aria-valuenow", "80")
    assert [now(page, name) for name in others] == kept
    # By mouse, as far as the pointer goes; one more is chosen with Ctrl.
    bar(page, "block1.conv1").click(modifiers=["Control"], position={"x": 5, "y": 100})
    expect(page.locator(".se-readout b")).to_have_text("4 layers")
    box = bar(page, "block3.conv2").bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + 5, box["y"] + 100)
    page.mouse.down()
    page.mouse.move(box["x"] + 5, box["y"] + 100 + 0.2 * box["height"], steps=4)
    page.mouse.up()
    for name in names:
        expect(bar(page, name)).to_have_attribute("aria-valuenow", "60")
    expect(bar(page, "block1.conv1")).to_have_attribute("aria-valuenow", "70")
    # A typed number counts for all of them; Escape leaves one.
    page.get_by_label("Sparsity", exact=True).fill("75")
    page.get_by_label("Sparsity", exact=True).press("Enter")
    for name in [*names, "block1.conv1"]:
        expect(bar(page, name)).to_have_attribute("aria-valuenow", "75")
    page.get_by_role("button", name="Tie", exact=True).click()
    expect(page.get_by_role("button", name="Untie")).to_be_visible()
    bar(page, "block3.conv2").focus()
    page.keyboard.press("Escape")
    page.keyboard.press("ArrowUp")
    for name in [*names, "block1.conv1"]:
        expect(bar(page, name)).to_have_attribute("aria-valuenow", "76")
    # A range with Shift, and its lock.
    bar(page, "block2.conv1").click(position={"x": 3, "y": 60})
    page.keyboard.press("Shift+ArrowRight")
    expect(page.locator(".se-readout b")).to_have_text("2 layers")
    page.keyboard.press("l")
    for name in ("block2.conv1", "block2.conv2"):
        expect(bar(page, name)).to_have_attribute("aria-disabled", "true")
    expect(page.get_by_role("button", name="Unlock")).to_be_visible()
    page.keyboard.press("Control+z")
    expect(bar(page, "block2.conv1")).not_to_have_attribute("aria-disabled", "true")


def test_one_stroke_draws_across_the_bars_and_undo_takes_it_back(fake_page: Page) -> None:
    page = fake_page
    page.get_by_role("button", name="Draw").click()
    page.locator(".se-field").scroll_into_view_if_needed()
    field = page.locator(".se-field").bounding_box()
    assert field is not None
    height = field["height"]
    page.mouse.move(field["x"] + 1, field["y"] + 0.8 * height)
    page.mouse.down()
    page.mouse.move(field["x"] + field["width"] - 1, field["y"] + 0.2 * height, steps=2)
    page.mouse.up()
    bars = page.get_by_role("slider").filter(has=page.locator(".se-fill"))
    expect(bars.last).not_to_have_attribute("aria-valuenow", "0")
    drawn = [float(one.get_attribute("aria-valuenow") or 0) for one in bars.all()]
    assert len(drawn) == 10
    assert drawn == sorted(drawn), "the stroke rises"
    # The height of the stroke over the middle of each bar.
    assert drawn[0] == pytest.approx(20, abs=4)
    assert drawn[-1] == pytest.approx(80, abs=4)
    page.get_by_role("button", name="Undo").click()
    expect(bars.last).to_have_attribute("aria-valuenow", "0")


def test_layers_are_found_sorted_and_kept_by_name(fake_page: Page) -> None:
    page = fake_page
    find = page.get_by_label("Find layers by name")
    find.fill("conv2")
    expect(page.get_by_text("3 of 10")).to_be_visible()
    find.press("Enter")
    expect(page.locator(".se-readout b")).to_have_text("3 layers")
    find.fill("")
    page.get_by_label("Order of the layers").select_option("weights")
    labels = [one.get_attribute("aria-label") for one in page.locator(".se-bar").all()]
    assert labels[:3] == ["block3.conv2", "block3.conv1", "block2.conv2"]
    assert labels[-1] == "stem.conv"
    # Left and right go along the bars as they stand.
    bar(page, "block3.conv2").focus()
    page.keyboard.press("ArrowRight")
    expect(bar(page, "block3.conv1")).to_be_focused()

    page.get_by_label("Name to keep this distribution by").fill("all at 90")
    page.get_by_role("button", name="Keep", exact=True).click()
    expect(page.get_by_role("button", name="Take all at 90")).to_be_visible()
    page.keyboard.press("Escape")
    bar(page, "block3.conv1").focus()
    page.keyboard.press("Home")
    expect(bar(page, "block3.conv1")).to_have_attribute("aria-valuenow", "0")
    page.get_by_role("button", name="Compare with all at 90").click()
    expect(page.locator("[data-key=ghost]")).to_contain_text("all at 90")
    ghost = page.locator(".se-bar[aria-label='block3.conv1'] .se-ghost")
    assert json.loads(ghost.evaluate("(one) => one.style.bottom.replace('%', '')")) == pytest.approx(90)
    page.get_by_role("button", name="Take all at 90").click()
    expect(bar(page, "block3.conv1")).to_have_attribute("aria-valuenow", "90")
    page.get_by_role("button", name="Forget all at 90").click()
    expect(page.get_by_role("button", name="Take all at 90")).to_have_count(0)
    # Wider bars scroll inside their own field.
    width = bar(page, "block3.conv2").bounding_box()["width"]  # type: ignore[index]
    page.get_by_role("button", name="Wider bars").click()
    assert bar(page, "block3.conv2").bounding_box()["width"] > 1.3 * width  # type: ignore[index]
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
