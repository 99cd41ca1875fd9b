"""The page in a language that nobody speaks: each sentence in brackets, and nearly a third longer. What stands outside of them was forgotten in the code."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page, expect
from playwright.sync_api import TimeoutError as WaitedTooLong

from explorer.widgets.texts import ENGLISH, read_texts
from tests.browser.conftest import FAKE_PAGE, ROOT
from tests.browser.voila_server import VoilaServer, free_port, voila_command, write_notebook

pytestmark = [pytest.mark.browser, pytest.mark.timeout(120)]

LONGER = 0.3
LANGUAGE = "en-XA"

# What is no text of the page: names of layers, also shortened, of models and their choices; units, formats and the letters of two sides.
DATA = r"((block|…)\d(\.conv\d)?|stem|fc)(\.\w+)*|fashion|fashion-resnet|Fake|network|Missing|data|ms|min|s|kB|MB|GB|[kMG]|[AB]"

UNTRANSLATED = """(data) => {
  const known = new RegExp(`^(?:${data})$`);
  const left = (text) => {
    let rest = text;
    for (let before = null; before !== rest;) { before = rest; rest = rest.replace(/⟦[^⟦⟧]*⟧/g, " "); }
    return rest.split(/[\\s,;:·±×%()\\/|"“”→–−+]+/).filter((word) => /[A-Za-z]/.test(word) && !known.test(word)).join(" ");
  };
  const found = new Set();
  const note = (what, text) => { if (text && left(text)) found.add(`${what}: ${text.slice(0, 160)}`); };
  const shown = (element) => element.checkVisibility({ visibilityProperty: true });
  for (const root of document.querySelectorAll(".se")) {
    for (const element of [root, ...root.querySelectorAll("*")]) {
      if (element.closest(".se-log pre") || !shown(element)) continue;
      for (const name of ["title", "aria-label", "aria-valuetext", "placeholder", "alt"]) note(name, element.getAttribute(name));
      for (const node of element.childNodes) if (node.nodeType === Node.TEXT_NODE) note(element.tagName.toLowerCase(), node.data);
    }
  }
  return [...found];
}"""

OVERFLOWING = """() => {
  const names = (element) => `${element.tagName.toLowerCase()}.${element.getAttribute("class") ?? ""}: ${element.textContent.slice(0, 60)}`;
  const found = [];
  if (document.scrollingElement.scrollWidth > innerWidth) found.push(`the page is ${document.scrollingElement.scrollWidth} pixels wide`);
  for (const element of document.querySelectorAll(".se button, .se label, .se h2, .se h3, .se p, .se select, .se-tile dt, .se-tile .se-note, .se-tile .se-badge, .se figcaption, .se-seg, .se-push, .se-card")) {
    if (!element.checkVisibility({ visibilityProperty: true }) || element.matches(".se-hidden") || element.closest(".se-scroll, .se-wide, .se-all, .se-by-layer")) continue;
    const box = element.getBoundingClientRect();
    const isCut = element.scrollWidth > element.clientWidth + 1 && element.clientWidth > 0 && getComputedStyle(element).textOverflow !== "ellipsis";
    if (isCut || box.right > innerWidth + 1 || box.left < -1) found.push(names(element));
  }
  return found;
}"""


def lengthened(sentence: str) -> str:
    """Return a sentence in brackets, with words behind it that make it longer."""
    extra = "xxxx " * (1 + int(LONGER * len(sentence)) // 5)
    return f"⟦{sentence} {extra[: 1 + int(LONGER * len(sentence))].strip()}⟧"


def pseudo(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: lengthened(value) if isinstance(value, str) else pseudo(value) for key, value in tree.items()
    }


@pytest.fixture(scope="module")
def foreign_app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VoilaServer]:
    """The page over the fake study, in that language."""
    folder = tmp_path_factory.mktemp("foreign")
    english = Path(sys.modules[read_texts.__module__].__file__ or "").parent / f"{ENGLISH}.json"
    tree = pseudo(json.loads(english.read_text(encoding="utf-8")))
    (folder / f"{LANGUAGE}.json").write_text(json.dumps(tree), encoding="utf-8")
    port = free_port()
    notebook = write_notebook(folder / "fake.ipynb", FAKE_PAGE.format(pause_s=0.001))
    environment = {
        "PYTHONPATH": str(ROOT),
        "SPARSITY_EXPLORER_LANGUAGE": LANGUAGE,
        "SPARSITY_EXPLORER_TEXTS": str(folder),
    }
    with VoilaServer(voila_command(notebook, port), port, folder / "voila.log", environment) as server:
        yield server


@pytest.mark.parametrize("context", [{"viewport": {"width": 900, "height": 1000}}], indirect=True)
def test_in_another_language_nothing_is_left_in_english_and_nothing_overflows(
    page: Page, foreign_app: VoilaServer
) -> None:
    def check(when: str) -> None:
        assert (when, page.evaluate(UNTRANSLATED, DATA)) == (when, [])
        for width in (1440, 900):
            page.set_viewport_size({"width": width, "height": 1000})
            # Charts are drawn anew when they have their width; what is still there after a while has no room.
            with contextlib.suppress(WaitedTooLong):
                page.wait_for_function(f"({OVERFLOWING})().length === 0", timeout=2000)
            assert (when, width, page.evaluate(OVERFLOWING)) == (when, width, [])

    page.goto(foreign_app.url)
    page.get_by_role("slider", name="block3.conv2").wait_for(timeout=60_000)
    assert set(page.locator(".se[lang]").evaluate_all("all => all.map((one) => one.lang)")) == {LANGUAGE}
    assert page.locator(".se:not([lang])").count() == 0
    expect(page.locator("html")).to_have_attribute("lang", LANGUAGE)
    check("before anything is measured")
    page.locator(".se-measure").click()
    expect(page.locator(".se-now")).to_contain_text("Next: drag the bars", timeout=30_000)
    expect(page.locator(".se-balance")).to_be_visible()
    check("measured")
    page.locator(".se-field [role=slider][tabindex='0']").press("Control+a")
    page.locator(".se-kept button").first.click()
    page.locator("[data-shape=bars]").click()
    page.locator(".se-run [aria-controls]").click()
    page.locator(".se-run input[name=epochs]").fill("many")
    page.locator(".se-run input[name=epochs]").press("Tab")
    expect(page.get_by_role("alert")).to_contain_text("give")
    check("with all layers chosen, settings, and a refusal")
    page.locator(".se-run input[name=epochs]").fill("1")
    page.locator(".se-run .se-head .se-primary").click()
    expect(page.locator(".se-now")).to_contain_text("finished", timeout=30_000)
    check("after a run")
