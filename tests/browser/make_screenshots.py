"""Look at every step of the page: `python -m tests.browser.make_screenshots FOLDER`.

It starts the app with the bundled model, does the main job as a person would, and takes a picture of each of the five steps when nothing is measured yet, when the
layers are measured, during a run, after it, and with three runs to compare: 1440 and 900 pixels wide, in light and in dark, and at the end 380 pixels wide.
Files are called `STEP-STATE-WIDTH-THEME.png`. The pictures are made to be looked at and are not committed; those of the README come from `make_pictures`.
Needs the extra `test`, pillow and a chromium.
"""

from __future__ import annotations

import argparse
import io
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright

from tests.browser.conftest import BROWSER_FLAGS, ROOT
from tests.browser.voila_server import VoilaServer, free_port
from tests.conftest import find_browser

WIDTHS = (1440, 900)
THEMES = ("light", "dark")
PHONE = 380
HEIGHT = 1000
MINUTES = 60_000
STEPS = {
    "1-model": (".se-header", ".se-notice", ".se-metrics", ".se-layers"),
    "2-sensitivity": (".se-sens",),
    "3-distribution": (".se-eq", ".se-pareto"),
    "4-prune": (".se-run", ".se-mask"),
    "5-compare": (".se-result", ".se-compare"),
}
"""What is shown of the page for each step, by the class of the widget."""
MARGIN = 12


def photograph(page: Page, folder: Path, state: str, widths: tuple[int, ...] = WIDTHS) -> None:
    """Take the five steps in all themes at all widths, and leave the page as it was."""
    before = page.viewport_size
    for width in widths:
        page.set_viewport_size({"width": width, "height": HEIGHT})
        page.wait_for_timeout(300)  # charts are drawn anew for the width
        # Voila's page scrolls in its body, so that "the full page" would be one screen: the screen is made as high as the page.
        height = page.evaluate("() => Math.ceil(document.querySelector('.se-app').scrollHeight)")
        page.set_viewport_size({"width": width, "height": height + 2 * MARGIN})
        for theme in THEMES:
            page.emulate_media(color_scheme=theme)  # type: ignore[arg-type]
            expect(page.locator("html")).to_have_attribute("data-se-theme", theme)
            page.wait_for_timeout(300)  # until colours have changed
            boxes = {step: _around(page, parts) for step, parts in STEPS.items()}
            whole = Image.open(io.BytesIO(page.screenshot()))
            for step, (top, bottom) in boxes.items():
                part = whole.crop((0, max(0, top - MARGIN), whole.width, min(whole.height, bottom + MARGIN)))
                part.save(folder / f"{step}-{state}-{width}-{theme}.png")
    if before is not None:
        page.set_viewport_size(before)


def _around(page: Page, parts: tuple[str, ...]) -> tuple[int, int]:
    """Return the upper and the lower bound of some widgets, in pixels."""
    bounds = page.evaluate(
        """(parts) => parts.map((part) => document.querySelector(part).getBoundingClientRect())
        .map((box) => [box.top, box.bottom])""",
        parts,
    )
    return int(min(top for top, _ in bounds)), int(max(bottom for _, bottom in bounds)) + 1


def _do_the_job(page: Page, folder: Path, speedup: str, epochs: str) -> None:
    """Do the main job, and take pictures on the way."""
    status = page.locator(".se-now")
    expect(status).to_have_text("Next: measure how each layer reacts to pruning.", timeout=2 * MINUTES)
    photograph(page, folder, "a-waiting")
    page.get_by_role("button", name="Measure", exact=True).click()
    expect(status).to_contain_text("Next: drag the bars", timeout=10 * MINUTES)
    page.get_by_label("Target speed-up, typed").fill(speedup)
    page.get_by_role("button", name="Solve", exact=True).click()
    expect(page.get_by_role("region", name="Distribution").get_by_text("solved", exact=True)).to_be_visible()
    expect(page.get_by_role("button", name="Solve", exact=True)).to_be_enabled(timeout=5 * MINUTES)
    expect(page.locator("[data-key=accuracy] .se-badge")).to_contain_text("checked", timeout=5 * MINUTES)
    expect(status).to_contain_text("Next: drag the bars", timeout=5 * MINUTES)
    page.get_by_role("slider", name="block3.conv2").press("Escape")  # chooses this bar alone
    photograph(page, folder, "b-measured")
    page.get_by_role("textbox", name="Epochs").fill(epochs)
    page.get_by_role("button", name="Start pruning").click()
    # Half of the run is over: all of its charts have something in them.
    page.wait_for_function(
        "() => document.querySelector('.se-progress').ariaValueNow >= 50 && document.querySelectorAll('.se-run svg').length === 3",
        timeout=20 * MINUTES,
    )
    photograph(page, folder, "c-running")
    expect(status).to_contain_text("Run 1 finished", timeout=20 * MINUTES)
    photograph(page, folder, "d-finished")
    for number, name in ((2, "Uniform"), (3, "Undo")):
        page.get_by_role("button", name=name, exact=True).click()
        page.get_by_role("textbox", name="Epochs").fill("1")
        page.get_by_role("button", name="Start pruning").click()
        expect(status).to_contain_text(f"Run {number} finished", timeout=20 * MINUTES)
    photograph(page, folder, "e-compared")
    photograph(page, folder, "e-compared", (PHONE,))


def main() -> None:
    """Take all screenshots."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where the pictures go; it is made if it does not exist")
    parser.add_argument("--speedup", default="3", help="target that is solved for")
    parser.add_argument("--epochs", default="2", help="length of the first run")
    options = parser.parse_args()
    browser = find_browser()
    if browser is None:
        sys.exit("No chromium was found. Install one, or name one with EXPLORER_BROWSER=/path/to/it.")
    options.folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    command = [sys.executable, "-m", "explorer", "app", "--no-browser", f"--port={port}"]
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        environment = {"PYTHONPATH": str(ROOT), "EXPLORER_CACHE": str(work / "cache")}
        server = stack.enter_context(VoilaServer(command, port, work / "voila.log", environment))
        playwright = stack.enter_context(sync_playwright())
        context = playwright.chromium.launch_persistent_context(
            work / "profile",
            executable_path=browser,
            headless=True,
            args=BROWSER_FLAGS,
            viewport={"width": WIDTHS[0], "height": HEIGHT},
        )
        page = context.new_page()
        page.goto(server.url)
        _do_the_job(page, options.folder, options.speedup, options.epochs)
        context.close()
    sys.stdout.write(f"{len(list(options.folder.glob('*.png')))} pictures in {options.folder}\n")


if __name__ == "__main__":
    main()
