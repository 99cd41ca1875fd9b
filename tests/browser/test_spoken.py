"""The page as a screen reader has it: what the browser's own tree of roles and names says of each step, and what is read out on the way."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from playwright.sync_api import Page, expect

pytestmark = [pytest.mark.browser, pytest.mark.timeout(120)]

CONTROLS = {
    "button",
    "checkbox",
    "combobox",
    "DisclosureTriangle",
    "link",
    "searchbox",
    "slider",
    "spinbutton",
    "textbox",
}
PLACES = {"dialog", "group", "main", "navigation", "region", "row", "table"}
LISTEN = """() => {
  window.heard = [];
  for (const region of document.querySelectorAll("[role=status], [role=alert], [aria-live], output")) {
    if (region.getAttribute("aria-live") === "off") continue;
    new MutationObserver(() => { if (region.textContent) window.heard.push(region.textContent); })
      .observe(region, { childList: true, characterData: true, subtree: true });
  }
}"""
STEPS = ("Model", "Sensitivity", "Distribution", "Prune", "Result")


class Tree:
    """The accessibility tree of a page at one moment."""

    def __init__(self, page: Page) -> None:
        session = page.context.new_cdp_session(page)
        nodes: list[dict[str, Any]] = session.send("Accessibility.getFullAXTree")["nodes"]
        session.detach()
        self._by_id = {node["nodeId"]: node for node in nodes}
        self.nodes = [node for node in nodes if not node.get("ignored")]

    def _place(self, node: dict[str, Any]) -> tuple[str, ...]:
        """The named parts of the page that a node stands in, the innermost first."""
        places = []
        while (node := self._by_id.get(node.get("parentId", ""), {})) != {}:
            name = node.get("name", {}).get("value", "")
            if not node.get("ignored") and node["role"]["value"] in PLACES and name:
                places.append(name)
        return tuple(places)

    def controls(self) -> list[tuple[str, str, tuple[str, ...]]]:
        """Role, name and place of everything that can be worked with."""
        return [
            (node["role"]["value"], node.get("name", {}).get("value", ""), self._place(node))
            for node in self.nodes
            if node["role"]["value"] in CONTROLS
        ]

    def without_role(self) -> list[str]:
        """What takes the focus, but does not say what it is."""
        return [
            str(node)
            for node in self.nodes
            if node["role"]["value"] in ("generic", "none", "")
            and any(p["name"] == "focusable" and p["value"].get("value") for p in node.get("properties", []))
        ]


def check(page: Page) -> list[tuple[str, str, tuple[str, ...]]]:
    tree = Tree(page)
    controls = tree.controls()
    assert tree.without_role() == []
    assert [one for one in controls if not one[1].strip()] == []
    twice = {one: n for one, n in Counter(controls).items() if n > 1}
    assert twice == {}, "these cannot be told apart"
    for step in STEPS:
        assert any(step in place for _, _, place in controls), f"nothing can be reached in {step}"
    mute = page.locator("[role=slider], input[type=range]").evaluate_all(
        """(sliders) => sliders.filter((one) => one.checkVisibility({ visibilityProperty: true }) && !one.disabled && !one.getAttribute("aria-valuetext"))
        .map((one) => one.outerHTML.slice(0, 120))"""
    )
    assert mute == [], "sliders say their value with its unit"
    return controls


def heard(page: Page) -> list[str]:
    """What was read out since the last time that this was asked."""
    return page.evaluate("() => window.heard.splice(0)")


def test_every_step_can_be_heard_and_results_are_read_out_once(fake_page: Page) -> None:
    page = fake_page
    controls = check(page)
    assert len(controls) > 50
    page.evaluate(LISTEN)

    page.get_by_role("button", name="Measure", exact=True).click()
    expect(page.locator(".se-now")).to_contain_text("Next: drag the bars", timeout=60_000)
    check(page)
    said = heard(page)
    assert said[-1].startswith("Next: drag the bars")
    assert len(said) == len(set(said)) <= 4, "measuring each layer at each level is read out once"

    # A bar that moves is read by its own slider; several that are chosen are counted aloud.
    bar = page.get_by_role("slider", name="block1.conv2")
    page.locator(".se-bar[tabindex='0']").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    expect(bar).to_be_focused()
    figure = page.locator("[data-key=latency] .se-big")
    before = figure.inner_text()
    for _ in range(12):
        page.keyboard.press("ArrowDown")
    expect(figure).not_to_have_text(before)
    assert heard(page) == []
    page.keyboard.press("Shift+ArrowRight")
    expect(page.locator(".se-readout b")).to_have_text("2 layers")
    assert heard(page) == ["2 layers"]
    page.keyboard.press("Escape")

    page.get_by_role("button", name="Settings").click()
    page.get_by_role("textbox", name="Epochs").fill("3")
    page.get_by_role("button", name="Start pruning").click()
    expect(page.get_by_role("slider", name="End of prune")).to_have_attribute("aria-disabled", "true")
    check(page)
    finished = "Run 1 finished. Download the result, or shape the bars and start another run."
    expect(page.locator(".se-now")).to_have_text(finished, timeout=30_000)
    check(page)
    said = heard(page)
    assert said[-1] == finished
    assert said.count(finished) == 1
    # The run has been drawn anew at each of its 60 steps; only its phases are spoken.
    assert len(said) <= 8, said
