"""Make the pictures of the README from the real app: `python -m tests.browser.make_pictures`.

It starts the app, does the main job on the demo as a person would, then once more with a uniform distribution, and writes `app-light.png`, `app-dark.png`,
`prune.png`, `mask.png`, `compare.png` and `app.gif` to `docs/images`. Run it on a quiet machine: the figures in the pictures are measured ones. Needs the extra `test`, pillow and a chromium.
"""

from __future__ import annotations

import argparse
import io
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright

from tests.browser.conftest import BROWSER_FLAGS, ROOT
from tests.browser.voila_server import VoilaServer, free_port
from tests.conftest import find_browser

IMAGES = ROOT / "docs" / "images"
WIDTH, HEIGHT = 1440, 1640
GIF_WIDTH = 860
GIF_COLOURS = 96
MAX_WATCHED = 24
SWATCH = 160
THEME = [
    "--se-bg",
    "--se-card",
    "--se-accent",
    "--se-wash",
    "--se-line",
    "--se-mute",
    "--se-ramp-0",
    "--se-ramp-1",
    "--se-ramp-2",
    "--se-ramp-3",
]
MINUTES = 60_000
CURSOR = """() => {
  const arrow = document.createElement("div");
  arrow.id = "film-cursor";
  arrow.style.cssText = "position:fixed;z-index:9999;width:18px;height:18px;margin:-9px 0 0 -9px;border-radius:50%;"
    + "background:rgb(20 30 35 / 35%);border:2px solid white;pointer-events:none;left:-40px";
  document.body.append(arrow);
  addEventListener("pointermove", (event) => { arrow.style.left = `${event.clientX}px`; arrow.style.top = `${event.clientY}px`; }, true);
}"""


class Film:
    """Frames with the time that each is shown."""

    def __init__(self, page: Page) -> None:
        self._page = page
        self._frames: list[Image.Image] = []
        self._times: list[int] = []

    def shoot(self, milliseconds: int) -> None:
        """Add a frame; one that shows the same as the last makes that one longer."""
        image = Image.open(io.BytesIO(self._page.screenshot())).convert("RGB")
        frame = image.resize(
            (GIF_WIDTH, round(image.height * GIF_WIDTH / image.width)), Image.Resampling.LANCZOS
        )
        if self._frames and frame.tobytes() == self._frames[-1].tobytes():
            self._times[-1] += milliseconds
            return
        self._frames.append(frame)
        self._times.append(milliseconds)

    def thin(self, start: int, keep: int) -> None:
        """Of the frames from `start` on, keep `keep`, evenly spaced."""
        n = len(self._frames) - start
        if n > keep:
            chosen = [start + i * (n - 1) // (keep - 1) for i in range(keep)]
            self._frames[start:] = [self._frames[i] for i in chosen]
            self._times[start:] = [self._times[i] for i in chosen]

    def __len__(self) -> int:
        return len(self._frames)

    def _sheet(self) -> Image.Image:
        """Return a few frames, and the theme's colours large enough to get a place each in the palette."""
        colours = self._page.evaluate(
            "(names) => names.map((name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim())",
            THEME,
        )
        some = [self._frames[i * (len(self._frames) - 1) // 3] for i in range(4)]
        some += [Image.new("RGB", (GIF_WIDTH, SWATCH), colour) for colour in colours]
        sheet = Image.new("RGB", (GIF_WIDTH, sum(part.height for part in some)))
        top = 0
        for part in some:
            sheet.paste(part, (0, top))
            top += part.height
        return sheet

    def save(self, path: Path) -> None:
        """Write an animated GIF with one palette for all frames, so that only what moves is stored again."""
        palette = self._sheet().quantize(GIF_COLOURS)
        frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in self._frames]
        frames[0].save(
            path, save_all=True, append_images=frames[1:], duration=self._times, loop=0, optimize=False
        )


def main() -> None:
    """Make all pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--speedup", default="3", help="target that is solved for")
    parser.add_argument("--epochs", default="5")
    options = parser.parse_args()
    browser = find_browser()
    if browser is None:
        sys.exit("No chromium was found.")
    IMAGES.mkdir(parents=True, exist_ok=True)
    port = free_port()
    command = [sys.executable, "-m", "explorer", "app", "--no-browser", f"--port={port}"]
    with (
        tempfile.TemporaryDirectory() as folder,
        VoilaServer(
            command,
            port,
            Path(folder) / "voila.log",
            {"PYTHONPATH": str(ROOT), "EXPLORER_CACHE": str(Path(folder) / "cache")},
        ) as server,
        sync_playwright() as playwright,
    ):
        context = playwright.chromium.launch_persistent_context(
            Path(folder) / "profile",
            executable_path=browser,
            headless=True,
            args=BROWSER_FLAGS,
            viewport={"width": WIDTH, "height": HEIGHT},
        )
        page = context.new_page()
        page.goto(server.url)
        _do_the_job(page, options.speedup, options.epochs)
        page.locator("#film-cursor").evaluate("(cursor) => cursor.remove()")
        _compare(page)
        _show(page, "Model")
        page.screenshot(path=IMAGES / "app-light.png")
        for name in ("Prune", "Mask", "Compare"):
            _show(page, name)
            page.get_by_role("region", name=name).screenshot(path=IMAGES / f"{name.lower()}.png")
        page.emulate_media(color_scheme="dark")
        expect(page.locator("html")).to_have_attribute("data-se-theme", "dark")
        _show(page, "Model")
        page.screenshot(path=IMAGES / "app-dark.png")
        context.close()
    for path in sorted(IMAGES.iterdir()):
        sys.stdout.write(f"{path.relative_to(ROOT)}: {path.stat().st_size / 1e6:.2f} MB\n")


def _do_the_job(page: Page, speedup: str, epochs: str) -> None:
    status = page.locator(".se-now")
    expect(status).to_have_text("Next: measure how each layer reacts to pruning.", timeout=2 * MINUTES)
    page.evaluate(CURSOR)
    film = Film(page)
    film.shoot(1200)
    page.get_by_role("button", name="Measure", exact=True).hover()
    film.shoot(500)
    page.get_by_role("button", name="Measure", exact=True).click()
    film.shoot(300)
    _watch(film, page, "Solving", every=1.2, shown=220)
    expect(status).to_contain_text("Next: drag the bars", timeout=5 * MINUTES)
    target = page.get_by_label("Target speed-up, typed")
    target.click()
    target.fill(speedup)
    film.shoot(500)
    page.get_by_role("button", name="Solve", exact=True).click()
    expect(status).to_contain_text("Solving")
    expect(status).to_contain_text("Next: drag the bars", timeout=5 * MINUTES)
    film.shoot(1300)
    _drag(film, page, "block1.conv1", 0.06)
    _show(page, "Prune")
    page.get_by_role("textbox", name="Epochs").fill(epochs)
    page.get_by_role("button", name="Start pruning").hover()
    film.shoot(700)
    page.get_by_role("button", name="Start pruning").click()
    _show(page, "Prune")
    _watch(film, page, "Run 1 finished", every=2.5, shown=200)
    expect(status).to_contain_text("Run 1 finished", timeout=10 * MINUTES)
    page.mouse.move(5, 5)
    film.shoot(3000)
    film.save(IMAGES / "app.gif")


def _compare(page: Page) -> None:
    """Prune to the uniform distribution of the same latency too, and choose the layer whose masks are shown."""
    page.get_by_role("button", name="Uniform", exact=True).click()
    page.get_by_role("button", name="Start pruning").click()
    expect(page.locator(".se-now")).to_contain_text("Run 2 finished", timeout=10 * MINUTES)
    page.get_by_role("button", name="Undo", exact=True).click()
    page.get_by_role("slider", name="block3.conv2").press("Escape")  # chooses this bar alone
    page.wait_for_timeout(4000)  # until the prediction is checked


def _show(page: Page, name: str) -> None:
    """Scroll to a region, and wait until nothing moves."""
    page.get_by_role("region", name=name, exact=True).evaluate(
        "(one) => one.scrollIntoView({ block: 'center' })"
    )
    page.wait_for_function("() => document.getAnimations().length === 0")


def _watch(film: Film, page: Page, until: str, *, every: float, shown: int) -> None:
    """Add a frame every `every` seconds until the status says `until`."""
    end = time.monotonic() + 15 * 60
    start = len(film)
    while until not in page.locator(".se-now").inner_text():
        assert time.monotonic() < end, f"The page did not come to {until!r} within a quarter of an hour."
        page.wait_for_timeout(1000 * every)
        film.shoot(shown)
    film.thin(start, MAX_WATCHED)


def _drag(film: Film, page: Page, layer: str, by: float) -> None:
    """Pull a bar up by a share of the height, with a frame at each step."""
    bar = page.get_by_role("slider", name=layer)
    box = bar.bounding_box()
    assert box is not None
    x = box["x"] + box["width"] / 2
    y = box["y"] + box["height"] * (1 - float(bar.get_attribute("aria-valuenow") or 0) / 100)
    page.mouse.move(x, y)
    film.shoot(500)
    page.mouse.down()
    for i in range(1, 9):
        page.mouse.move(x, y - box["height"] * by * i / 8)
        page.wait_for_timeout(150)
        film.shoot(90)
    page.mouse.up()
    page.wait_for_timeout(400)
    film.shoot(900)


if __name__ == "__main__":
    main()
