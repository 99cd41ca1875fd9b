"""What notebooks around the page do to it, played in the page itself; tests/browser/check_jupyterlab.py drives the real ones."""

from __future__ import annotations

import pytest
from playwright.sync_api import Page, expect

pytestmark = pytest.mark.browser


def test_keys_that_move_or_type_stay_in_the_page_and_commands_leave_it(fake_page: Page) -> None:
    # VS Code hears what arrives at the window, and takes "d d" on a bar for "delete this cell".
    fake_page.evaluate(
        "() => { window.heard = []; addEventListener('keydown', (event) => heard.push(event.key)); }"
    )
    bar = fake_page.get_by_role("slider", name="block3.conv2")
    bar.focus()
    for key in ("d", "d", "a", "x", "ArrowUp", "Delete", "Enter"):
        fake_page.keyboard.press(key)
    expect(fake_page.get_by_label("Sparsity", exact=True)).to_be_focused()
    fake_page.keyboard.type("42")
    fake_page.keyboard.press("Enter")
    expect(bar).to_have_attribute("aria-valuenow", "42")
    bar.focus()
    fake_page.keyboard.press("Control+z")
    expect(bar).to_have_attribute("aria-valuenow", "91")
    assert [key for key in fake_page.evaluate("heard") if key != "Control"] == []
    for key in ("F8", "Control+Shift+p", "Escape", "Tab"):
        fake_page.keyboard.press(key)
    # A gesture of the bar takes Escape.
    assert [key for key in fake_page.evaluate("heard") if key not in ("Control", "Shift")] == [
        "F8",
        "p",
        "Tab",
    ]


def test_the_page_follows_the_theme_of_vs_code_and_of_colab_around_it(fake_page: Page) -> None:
    root = fake_page.locator("html")
    toggle = fake_page.get_by_role("button", name="Use dark colours")
    expect(root).to_have_attribute("data-se-theme", "light")
    for kind, theme in (("vscode-dark", "dark"), ("vscode-light", "light"), ("vscode-high-contrast", "dark")):
        fake_page.evaluate("(kind) => { document.body.dataset.vscodeThemeKind = kind; }", kind)
        expect(root).to_have_attribute("data-se-theme", theme)
    expect(toggle).to_have_count(0)
    fake_page.evaluate("() => { delete document.body.dataset.vscodeThemeKind; }")
    expect(root).to_have_attribute("data-se-theme", "light")
    expect(toggle).to_have_count(1)
    fake_page.evaluate("() => document.documentElement.setAttribute('theme', 'dark')")
    expect(root).to_have_attribute("data-se-theme", "dark")
