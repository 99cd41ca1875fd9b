"""Measures how long the page takes for one move of a drag: of one bar, and of all bars at once.

Run it with `python -m tests.browser.measure_drag --layers 100 200`; docs/results/drag.txt keeps what it printed. The time is that of the script and of the
layout that follows it, from the move to the moment where the browser could paint: no kernel takes part in it.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
from playwright.sync_api import Page, expect, sync_playwright

from explorer.formats.machine import machine
from tests.browser.conftest import BROWSER_FLAGS, FAKE_PAGE, ROOT
from tests.browser.voila_server import VoilaServer, free_port, voila_command, write_notebook
from tests.conftest import find_browser

MINUTES = 60_000
MOVES = 60

_LAYERS = """
import tests.widgets.fake_study as fake
fake.LAYERS = tuple(
    (f"stage{{i // 24}}.{{i // 6}}.conv{{i % 6}}", (32 + 8 * (i // 24), 32, 3, 3), 196 >> (i // 48)) for i in range({count})
)
"""
"""A fake network of as many layers, in blocks and stages."""

# A pointer that no hand holds cannot be captured: without that, moves are sent to the field itself. Asking for a height makes the browser lay the page out.
_DRAG = """([bar, moves]) => {
    const field = document.querySelector(".se-field"), box = field.children[bar].getBoundingClientRect(), times = [];
    field.setPointerCapture = () => {};
    const send = (type, share) => {
        const place = { bubbles: true, pointerId: 1, clientX: box.left + 3, clientY: box.top + share * box.height };
        const start = performance.now();
        field.children[bar].dispatchEvent(new PointerEvent(type, place));
        document.body.offsetHeight;
        return performance.now() - start;
    };
    const before = document.querySelectorAll(".se-bar")[bar].getAttribute("aria-valuetext");
    send("pointerdown", 0.5);
    for (let i = 0; i < moves; i++) times.push(send("pointermove", 0.2 + 0.6 * i / moves));
    const after = document.querySelectorAll(".se-bar")[bar].getAttribute("aria-valuetext");
    send("pointerup", 0.8);
    return { times, before, after };
}"""


def measure(page: Page, what: str, bar: int) -> None:
    """Print the milliseconds of the moves of one drag."""
    found = page.evaluate(_DRAG, [bar, MOVES])
    assert found["before"] != found["after"], "the drag moved nothing"
    median, most = np.percentile(found["times"], (50, 95))
    print(
        f"{what:<22}{median:5.1f} ms a move, 95 % of them within {most:.1f} ms, the longest {max(found['times']):.1f} ms"
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--layers", type=int, nargs="+", default=[100, 200])
    counts = parser.parse_args().layers
    found = machine()
    print(
        f"{found['cpu']}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f} before, voila {version('voila')}"
    )
    with tempfile.TemporaryDirectory() as name, sync_playwright() as playwright:
        folder = Path(name)
        browser = playwright.chromium.launch_persistent_context(
            folder / "profile",
            executable_path=find_browser(),
            headless=True,
            args=BROWSER_FLAGS,
            viewport={"width": 1440, "height": 1740},
        )
        for count in counts:
            port = free_port()
            source = _LAYERS.format(count=count) + FAKE_PAGE.format(pause_s=0.0)
            notebook = write_notebook(folder / f"{count}.ipynb", source)
            command = voila_command(notebook, port)
            with VoilaServer(command, port, folder / f"{count}.log", {"PYTHONPATH": str(ROOT)}) as server:
                page = browser.new_page()
                page.goto(server.url)
                page.get_by_role("button", name="Measure", exact=True).click(timeout=MINUTES)
                expect(page.locator(".se-now")).to_contain_text("Next: drag the bars", timeout=5 * MINUTES)
                bars = page.locator(".se-bar")
                expect(bars).to_have_count(count)
                page.wait_for_timeout(1000)
                measure(page, f"{count} layers, one bar", count // 2)
                page.wait_for_timeout(1000)
                bars.nth(count // 2).focus()
                page.keyboard.press("Control+a")
                page.wait_for_timeout(500)
                measure(page, f"{count} layers, all bars", count // 2)
                page.close()
        browser.close()
    print(f"load {os.getloadavg()[0]:.1f} after")


if __name__ == "__main__":
    main()
