"""What a reader takes along from the page and brings back, in a real browser: the address, and files."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from explorer.distribution import SparsityDistribution
from explorer.formats import Recipe
from explorer.widgets.sharing import MAX_FILE

pytestmark = [pytest.mark.browser, pytest.mark.timeout(180)]


def test_bars_survive_a_reload_and_travel_as_files(page_with_torch: Page, tmp_path: Path) -> None:
    page = page_with_torch
    bar = page.get_by_role("slider", name="block1.conv2", exact=True)
    expect(page).to_have_url(re.compile(r"^[^#]*$"))
    page.locator("[role=slider][tabindex='0']").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    expect(bar).to_be_focused()
    expect(page.locator(".se-readout b")).to_contain_text("block1.conv2")
    page.keyboard.press("Home")
    page.keyboard.press("PageUp")
    page.keyboard.press("ArrowUp")
    expect(bar).to_have_attribute("aria-valuenow", "11")
    page.keyboard.press("l")
    expect(bar).to_have_attribute("aria-disabled", "true")
    shaped = bar.get_attribute("aria-valuenow")
    expect(page).to_have_url(re.compile("#distribution=[A-Za-z0-9_-]{20,90}$"))
    # Leaving writes what has not been written yet.
    page.reload()
    bar.wait_for(timeout=60_000)
    expect(bar).to_have_attribute("aria-valuenow", str(shaped))
    expect(bar).to_have_attribute("aria-disabled", "true")
    address = page.url

    # A recipe goes out and comes back.
    files = page.get_by_role("group", name="Files")
    expect(files.get_by_role("button", name="Save measurements")).to_be_disabled()
    with page.expect_download() as download:
        files.get_by_role("button", name="Save recipe").click()
    saved = tmp_path / "recipe.yaml"
    download.value.save_as(saved)
    kept = Recipe.load(saved)
    assert 100 * kept.distribution["block1.conv2"] == pytest.approx(float(shaped or "nan"))
    changed = SparsityDistribution({**kept.distribution, "block1.conv2": 0.7})
    good, bad, large = tmp_path / "good.yaml", tmp_path / "bad.yaml", tmp_path / "large.yaml"
    good.write_text(changed.to_yaml())
    bad.write_text(changed.to_yaml().replace("block1.conv2", "block9.conv2"))
    large.write_text("#" * (2 * MAX_FILE))

    def choose(path: Path) -> None:
        with page.expect_file_chooser() as chooser:
            files.get_by_role("button", name="Load a recipe").click()
        chooser.value.set_files(path)

    choose(good)
    expect(bar).to_have_attribute("aria-valuenow", "70")
    choose(bad)
    alert = page.locator(".se-alert [role=alert]")
    expect(alert).to_contain_text("no layer 'block9.conv2'")
    expect(bar).to_have_attribute("aria-valuenow", "70")
    choose(large)
    expect(files.get_by_role("alert")).to_contain_text("large.yaml has 2 MB, and at most 1 MB are sent")
    expect(bar).to_have_attribute("aria-valuenow", "70")

    # A link that is pasted into the same page.
    expect(page).not_to_have_url(address)
    page.goto(address)
    expect(bar).to_have_attribute("aria-valuenow", str(shaped))
    page.evaluate("location.hash = 'notes'")
    expect(alert).to_contain_text('The address ends in "#notes"')
    expect(bar).to_have_attribute("aria-valuenow", str(shaped))
