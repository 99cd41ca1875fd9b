"""The main job, by mouse, on the real demo: from the page's address to a finished run and its file."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
from playwright.sync_api import Locator, Page, expect
from safetensors import safe_open

from tests.browser.voila_server import VoilaServer

pytestmark = [pytest.mark.browser, pytest.mark.slow, pytest.mark.timeout(900)]
MINUTES = 60_000


def figure(page: Page, key: str) -> float:
    """Return the number that a tile shows."""
    text = page.locator(f".se-tile[data-key={key}] .se-big span").inner_text()
    return float(text)


def drag_to(page: Page, bar: Locator, sparsity: float) -> None:
    """Pull a bar to a height with the mouse, in small steps as a hand does."""
    bar.scroll_into_view_if_needed()
    box = bar.bounding_box()
    assert box is not None
    x, bottom = box["x"] + box["width"] / 2, box["y"] + box["height"]
    now = float(bar.get_attribute("aria-valuenow") or 0) / 100
    page.mouse.move(x, bottom - now * box["height"])
    page.mouse.down()
    page.mouse.move(x, bottom - sparsity * box["height"], steps=12)
    page.mouse.up()


def test_the_main_job_by_mouse_from_page_load_to_a_downloaded_result(
    page: Page, app: VoilaServer, tmp_path: Path
) -> None:
    app.check_alive()
    page.goto(app.url)
    status = page.locator(".se-now")
    expect(page.get_by_role("heading", name="Sparsity Explorer")).to_be_visible(timeout=2 * MINUTES)
    expect(page.locator("tr[data-layer='block3.conv2']")).to_contain_text(
        "256 × 256 × 3 × 3", timeout=2 * MINUTES
    )
    expect(status).to_have_text("Next: measure how each layer reacts to pruning.")
    assert page.watch.received < 500_000  # type: ignore[attr-defined]

    # Sensitivity: both curves grow, then a target is solved; nothing moves away under the hand that waits for it.
    bars = page.get_by_role("slider", name="block3.conv2")
    before = bars.bounding_box()
    page.get_by_label("Images to measure on").select_option("100")
    page.get_by_role("button", name="Measure", exact=True).click()
    expect(page.get_by_role("progressbar")).to_be_visible(timeout=2 * MINUTES)
    paths = page.locator(".se-sens svg path:not([class])")  # lines, not bands and marks
    expect(paths.nth(3)).to_be_attached(timeout=4 * MINUTES)
    expect(status).to_have_text(
        "Next: drag the bars or solve for a speed-up, then start pruning.", timeout=6 * MINUTES
    )
    assert paths.count() == 20
    after = bars.bounding_box()
    assert before is not None
    assert after is not None
    assert after["y"] == pytest.approx(before["y"], abs=1)
    expect(page.locator("[data-key=speedup]")).to_contain_text("Speed-up, predicted")

    # Distribution: pull the three largest layers up.
    for name in ("block3.conv2", "block3.conv1", "block2.conv2"):
        bar = page.get_by_role("slider", name=name)
        drag_to(page, bar, 0.95)
        expect(bar).to_have_attribute("aria-valuenow", "95")
        expect(bar).to_be_focused()
    expect(page.get_by_role("region", name="Distribution").get_by_text("shaped by hand")).to_be_visible()
    predicted = figure(page, "speedup")
    assert predicted > 1.5

    # A short run.
    page.get_by_role("textbox", name="Epochs").fill("1")
    page.get_by_role("button", name="Start pruning").click()
    expect(page.locator("[data-key=accuracy]")).to_contain_text("Accuracy, live", timeout=2 * MINUTES)
    expect(page.locator("[data-key=sparsity]")).to_have_attribute("data-tone", "live")
    expect(status).to_contain_text("Run 1 finished", timeout=6 * MINUTES)

    # What the page shows is what the file says.
    with page.expect_download(timeout=2 * MINUTES) as download:
        page.get_by_role("button", name="Download", exact=True).click()
    path = tmp_path / "result.zip"
    download.value.save_as(path)
    with zipfile.ZipFile(path) as archive:
        assert sorted(archive.namelist()) == [
            "measurements.csv",
            "model.safetensors",
            "recipe.yaml",
            "report.html",
            "result.json",
        ]
        result = json.loads(archive.read("result.json"))
        archive.extract("model.safetensors", tmp_path)
    assert figure(page, "accuracy") == pytest.approx(100 * result["pruned"]["accuracy"], abs=0.051)
    assert figure(page, "speedup") == pytest.approx(result["pruned"]["speedup"], abs=0.0051)
    assert figure(page, "sparsity") == pytest.approx(100 * result["pruned"]["sparsity"], abs=0.051)
    assert result["pruned"]["accuracy"] > 0.85
    assert result["pruned"]["accuracy"] > result["dense"]["accuracy"] - 0.06
    assert result["pruned"]["speedup"] > 1.2
    assert result["layers"]["block3.conv2"]["achieved"] == pytest.approx(0.95, abs=1e-3)
    with safe_open(tmp_path / "model.safetensors", "pt") as weights:
        weight = weights.get_tensor("block3.conv2.weight")
    assert int((weight == 0).sum()) == result["layers"]["block3.conv2"]["zeros"]
    assert page.watch.received < 6_000_000  # type: ignore[attr-defined]
