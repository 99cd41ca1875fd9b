"""What a screen reader gets of the page: the browser's own accessibility tree, and what is read out by itself."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
from playwright.sync_api import Page, expect

pytestmark = [pytest.mark.browser, pytest.mark.timeout(180)]

CONTROLS = {"button", "slider", "textbox", "searchbox", "combobox", "checkbox", "spinbutton", "link", "radio"}
LISTEN = """() => {
  window.heard = [];
  const live = "[role=status], [role=alert], [role=log], output, [aria-live]";
  for (const one of document.querySelectorAll(live))
    if (one.getAttribute("aria-live") !== "off")
      new MutationObserver(() => { if (one.textContent) window.heard.push(one.textContent); })
        .observe(one, { childList: true, characterData: true, subtree: true });
}"""


def nodes_of(page: Page) -> Iterator[tuple[tuple[str, ...], str, str, bool]]:
    """Yield the place (names of what is around it), role, name and whether it takes the focus of each node of the accessibility tree."""
    nodes = page.context.new_cdp_session(page).send("Accessibility.getFullAXTree")["nodes"]
    by_id = {node["nodeId"]: node for node in nodes}

    def walk(
        node: dict[str, Any], place: tuple[str, ...]
    ) -> Iterator[tuple[tuple[str, ...], str, str, bool]]:
        role, name = node.get("role", {}).get("value", ""), node.get("name", {}).get("value", "")
        if not node.get("ignored"):
            focusable = any(one["name"] == "focusable" for one in node.get("properties", []))
            yield place, role, name, focusable
            if name and role not in {"StaticText", "RootWebArea"}:
                place = (*place, f"{role} {name}")
        for child in node.get("childIds", []):
            if child in by_id:
                yield from walk(by_id[child], place)

    yield from walk(nodes[0], ())


def assert_complete(page: Page) -> None:
    """Everything that can be used has a name of its own in its place, and every slider says its value in words."""
    found = list(nodes_of(page))
    controls = [(place, role, name) for place, role, name, _ in found if role in CONTROLS]
    assert len(controls) > 40
    assert [one for one in controls if not one[2].strip()] == []
    assert [one for one, n in Counter(controls).items() if n > 1] == []
    unnamed = [
        (place, role)
        for place, role, name, focusable in found
        if focusable
        and role in {"group", "region", "generic", "table", "log", "image", "none"}
        and not name.strip()
    ]
    assert unnamed == []
    silent = page.evaluate(
        """() => [...document.querySelectorAll(".se [role=slider], .se input[type=range]")]
        .filter((one) => one.checkVisibility({ visibilityProperty: true }) && !one.disabled && !(one.getAttribute("aria-valuetext") ?? "").trim())
        .map((one) => one.getAttribute("aria-label") ?? one.outerHTML)"""
    )
    assert silent == []


def test_each_step_is_complete_in_the_accessibility_tree_and_a_run_is_told_in_few_words(
    page_with_torch: Page,
) -> None:
    page = page_with_torch
    expect(page.get_by_role("main", name="Sparsity Explorer")).to_be_visible()
    result = page.get_by_role("region", name="Result", exact=True)
    expect(result).not_to_be_in_viewport()
    page.get_by_role("navigation", name="Steps").get_by_role("button", name="Result").click()
    expect(result).to_be_in_viewport()
    names = {name for _, role, name, _ in nodes_of(page) if role == "region"}
    assert names >= {"Model", "Sensitivity", "Distribution", "Prune", "Result", "Compare"}
    assert_complete(page)
    page.get_by_role("button", name="Measure", exact=True).click()
    expect(page.locator(".se-now")).to_contain_text("Next: drag the bars", timeout=30_000)
    expect(page.get_by_label("Balance between little harm and much speed")).to_be_visible()
    assert_complete(page)
    page.evaluate(LISTEN)
    # A bar that moves is read by its own slider, and nothing else speaks; several that are chosen are counted aloud.
    page.locator(".se-bar[tabindex='0']").focus()
    page.keyboard.press("ArrowRight")
    speedup = page.locator("[data-key=speedup] .se-big")
    before = speedup.inner_text()
    for _ in range(5):
        page.keyboard.press("PageDown")
    expect(speedup).not_to_have_text(before)
    page.keyboard.press("Shift+ArrowRight")
    expect(page.locator(".se-readout b")).to_have_text("2 layers")
    assert page.evaluate("window.heard.splice(0)") == ["2 layers"]
    page.keyboard.press("Escape")
    page.get_by_text("Log", exact=True).click()
    page.get_by_role("textbox", name="Epochs").fill("3")
    page.get_by_role("button", name="Start pruning").click()
    expect(page.locator(".se-now")).to_contain_text("Run 1 finished", timeout=30_000)
    heard = page.evaluate("window.heard")
    # Each phase of the run and its end once, not the sixty steps.
    assert sum("Run 1 finished" in text for text in heard) == 1
    assert all(one != after for one, after in pairwise(heard))
    assert 3 <= len(heard) <= 9, heard
    assert [text for text in heard if re.fullmatch(r"[\d.]+ epochs?", text)] == []
    assert_complete(page)
