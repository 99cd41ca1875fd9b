"""Measures the app as a user meets it: memory of a kernel, bytes and time to the page, updates in a run, time to stop.

Run it with `python -m tests.browser.measure_app`; docs/results/app.txt keeps what it printed. Memory and bytes are of the program, times
of the machine and of what else runs on it: the load is printed, and times are medians.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import psutil
from playwright.sync_api import BrowserContext, Page, expect, sync_playwright

from explorer.formats.machine import machine
from tests.browser.conftest import BROWSER_FLAGS, FAKE_PAGE, ROOT, Watch
from tests.browser.voila_server import VoilaServer, free_port, voila_command, write_notebook
from tests.conftest import find_browser

MINUTES = 60_000

# Notes every change of the step that the run monitor shows, with its time in ms.
_WATCH_STEPS = r"""() => { window.seen = []; const place = document.querySelector("[data-se-step='4'] h2 ~ small, [data-se-step='4'] .se-head .se-mute");
    const look = () => { const step = /step ([\d,]+)/.exec(place.textContent)?.[1].replace(",", ""); if (step && step !== window.seen.at(-1)?.[1]) window.seen.push([performance.now(), step]); };
    new MutationObserver(look).observe(place, { subtree: true, childList: true, characterData: true }); look(); }"""


def kernel_of(server: VoilaServer) -> psutil.Process:
    """Return the one kernel of the server."""
    assert server.process is not None
    # The command starts the server, and the server the kernel.
    children = psutil.Process(server.process.pid).children(recursive=True)
    (kernel,) = [child for child in children if "ipykernel_launcher" in " ".join(child.cmdline())]
    return kernel


def memory(kernel: psutil.Process) -> str:
    """Return what a kernel holds: resident, of that not shared, and what the limit counts."""
    found = kernel.memory_full_info()
    return f"{found.rss / 1e6:6.0f} MB resident, {found.uss / 1e6:6.0f} MB of its own, {found.data / 1e6:6.0f} MB counted by --memory-per-user"


def opened(context: BrowserContext, server: VoilaServer) -> tuple[Page, dict[str, float]]:
    """Open a page, and return it with the seconds to its first frame of our own, to its layers, and to the moment where it can be used."""
    page = context.new_page()
    page.watch = Watch(page)  # type: ignore[attr-defined]
    started = time.perf_counter()
    seconds = {}
    page.goto(server.url, wait_until="commit")
    page.get_by_role("heading", name="Sparsity Explorer").wait_for(timeout=MINUTES)
    seconds["frame of the page"] = time.perf_counter() - started
    page.locator("tr[data-layer='block3.conv2']").wait_for(timeout=MINUTES)
    seconds["layers in the table"] = time.perf_counter() - started
    return page, seconds


def close(page: Page, kernel: psutil.Process) -> float:
    """Close a page, and return the seconds until its kernel is gone."""
    started = time.perf_counter()
    page.close(run_before_unload=True)
    while kernel.is_running() and kernel.status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.02)
    return time.perf_counter() - started


def measure_a_run(page: Page, kernel: psutil.Process, repeats: int) -> None:
    """Print memory before, in and after a run, its updates, and how soon Stop is obeyed."""
    watch: Watch = page.watch  # type: ignore[attr-defined]
    status = page.locator(".se-now")
    expect(status).to_have_text("Next: measure how each layer reacts to pruning.", timeout=MINUTES)
    print(f"memory with the demo loaded:  {memory(kernel)}")
    page.get_by_role("button", name="Measure", exact=True).click()
    expect(status).to_contain_text("Next: drag the bars", timeout=5 * MINUTES)
    print(f"memory after measuring:       {memory(kernel)}")
    rates, steps, stops, evaluated = [], [], [], []
    for _ in range(repeats):
        page.get_by_role("textbox", name="Epochs").fill("50")
        page.get_by_role("button", name="Start pruning").click()
        expect(status).to_contain_text("Pruning, run", timeout=MINUTES)
        expect(page.locator("[data-se-step='4']")).to_contain_text(re.compile(r"step \d"), timeout=MINUTES)
        rate, step = watched_rates(page)
        rates.append(rate)
        steps.append(step)
        during = memory(kernel)
        clicked = page.evaluate("performance.now()")
        started = time.perf_counter()
        page.get_by_role("region", name="Prune").get_by_role("button", name="Stop").click()
        expect(status).to_contain_text("trains no more")
        expect(status).to_contain_text("stopped early", timeout=2 * MINUTES)
        evaluated.append(time.perf_counter() - started)
        stops.append(max(0.0, page.evaluate("window.seen.at(-1)[0]") - clicked) / 1000)
    print(f"memory in a run:              {during}")
    print(f"memory after {repeats} runs:          {memory(kernel)}")
    print(f"steps a second in a run:      {told(steps)}")
    print(f"updates a second in a run:    {told(rates)}")
    print(f"seconds from Stop to the last step shown: {told(stops)}")
    print(f"seconds from Stop to the result, evaluated and timed: {told(evaluated)}")
    print(f"bytes to the page in all:     {watch.received / 1e6:.2f} MB over the socket")
    assert watch.problems == [], watch.problems


def watched_rates(page: Page) -> tuple[float, float]:
    """Return how many updates and how many steps a second the run monitor has shown for 5 seconds."""
    page.evaluate(_WATCH_STEPS)
    page.wait_for_timeout(5000)
    seen = page.evaluate("window.seen")
    seconds = (seen[-1][0] - seen[0][0]) / 1000
    return (len(seen) - 1) / seconds, (int(seen[-1][1]) - int(seen[0][1])) / seconds


def measure_quick_steps(browser: BrowserContext, folder: Path) -> None:
    """Print the updates of a run whose steps take milliseconds: what the page and the kernel can do beside the training."""
    port = free_port()
    notebook = write_notebook(folder / "fake.ipynb", FAKE_PAGE.format(pause_s=0.004))
    with VoilaServer(
        voila_command(notebook, port), port, folder / "quick.log", {"PYTHONPATH": str(ROOT)}
    ) as server:
        page = browser.new_page()
        page.goto(server.url)
        page.get_by_role("slider", name="fc").wait_for(timeout=MINUTES)
        page.get_by_role("textbox", name="Epochs").fill("500")
        page.get_by_role("button", name="Start pruning").click()
        expect(page.locator(".se-now")).to_contain_text("Pruning, run", timeout=MINUTES)
        rate, steps = watched_rates(page)
        print(f"updates a second with quick steps: {rate:.1f} (of {steps:.0f} steps a second)")
        page.close()


def told(values: list[float]) -> str:
    """Return the median and the range of values."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f}, {len(values)} times)"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    found = machine()
    print(
        f"{found['cpu']}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f} before, voila {version('voila')}, torch {found['torch']}"
    )
    port = free_port()
    with tempfile.TemporaryDirectory() as name, sync_playwright() as playwright:
        folder = Path(name)
        command = [sys.executable, "-m", "explorer", "app", "--no-browser", f"--port={port}"]
        browser = playwright.chromium.launch_persistent_context(
            folder / "profile",
            executable_path=find_browser(),
            headless=True,
            args=BROWSER_FLAGS,
            viewport={"width": 1440, "height": 1000},
        )
        with VoilaServer(command, port, folder / "voila.log", {"PYTHONPATH": str(ROOT)}) as server:
            times: dict[str, list[float]] = {}
            bytes_to_page, ends = [], []
            for last in [False] * (repeats - 1) + [True]:
                page, seconds = opened(browser, server)
                for what, took in seconds.items():
                    times.setdefault(what, []).append(took)
                expect(page.locator(".se-now")).to_contain_text("Next", timeout=MINUTES)
                bytes_to_page.append(page.watch.received / 1e6)  # type: ignore[attr-defined]
                if not last:
                    ends.append(close(page, kernel_of(server)))
            for what, taken in times.items():
                print(f"seconds to {what + ':':<23}{told(taken)}")
            print(f"bytes to the opened page:     {statistics.median(bytes_to_page):.2f} MB over the socket")
            measure_a_run(page, kernel_of(server), repeats)
            ends.append(close(page, kernel_of(server)))
            print(f"seconds from closing a page to the end of its kernel: {told(ends)}")
            assert server.process is not None
            holds = psutil.Process(server.process.pid).children()[0].memory_info().rss / 1e6
            print(f"memory of the server itself:  {holds:6.0f} MB resident")
        measure_quick_steps(browser, folder)
        browser.close()
    print(f"load {os.getloadavg()[0]:.1f} after")


if __name__ == "__main__":
    main()
