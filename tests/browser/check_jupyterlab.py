"""Drive the page in JupyterLab 4 and Notebook 7, as a person would: `python -m tests.browser.check_jupyterlab --jupyter ENVIRONMENT/bin/jupyter`.

JupyterLab is no dependency of the project, so it comes from an environment of its own:

    python -m venv ~/jupyter && ~/jupyter/bin/pip install jupyterlab notebook
    python -m tests.browser.check_jupyterlab --jupyter ~/jupyter/bin/jupyter --out docs/results/jupyter.txt

The kernel, the widgets and their front end come from the environment that runs this command. In each of the two, `notebooks/explorer.ipynb` is run, then a
notebook of single steps. Each line says what was seen; the first thing that is not as it should be ends the command with status 1. It takes about five minutes, and needs
the extra `test` and a chromium. What it printed last is kept in docs/results/jupyter.txt.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from playwright.sync_api import Error as PlaywrightError
from playwright.sync_api import Locator, Page, Playwright, expect, sync_playwright

from tests.browser.conftest import BROWSER_FLAGS, ROOT, Watch
from tests.browser.voila_server import VoilaServer, free_port, write_notebook
from tests.conftest import find_browser

MINUTES = 60_000
FRONTENDS = {
    "lab": ("JupyterLab", "jupyterlab", "lab/tree", "LabApp"),
    "notebook": ("Notebook", "notebook", "notebooks", "JupyterNotebookApp"),
}
STEPS = (
    'import explorer\n\nstudy = explorer.Study("demo:fashion-resnet", "demo:fashion")',
    "explorer.SensitivityView(study)",
    (
        "import threading\n\nthreads = set()\neditor = explorer.DistributionEditor(study)\n"
        "editor.state.observe(lambda change: threads.add(threading.current_thread().name))\neditor"
    ),
    "explorer.RunMonitor(study)",
    "print(f\"the kernel has {100 * editor.distribution['block3.conv2']:.1f} %, threads {sorted(threads)}\")",
)
TAKEN = (
    "x",
    "a",
    "b",
    "d",
    "d",
    "c",
    "v",
    "m",
    "y",
    "r",
    "z",
    "o",
    "s",
    "0",
    "0",
    "i",
    "i",
    "j",
    "k",
    "Shift+m",
)
"""Keys with which JupyterLab cuts, adds, deletes, copies, pastes, turns into text, hides, restarts ..., all on the focused bar."""


class Report:
    """What was seen, printed as it comes and kept for the file."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()

    def ok(self, what: str) -> None:
        self.say(f"  ok  {what}")


class FrontendWatch(Watch):
    """What a page did that it should not; errors that come from the scripts of JupyterLab or Notebook alone are kept apart."""

    def __init__(self, page: Page) -> None:
        self.foreign: list[str] = []
        super().__init__(page)

    def _on_error(self, error: PlaywrightError) -> None:
        # Modules of widgets come from blob: addresses, and anywidget itself from an extension's.
        scripts = re.findall(r"(?:https?|blob):[^\s)]+", error.stack or "")
        if scripts and all(re.search(r"^http[^?]*/static/(lab|notebook)/", script) for script in scripts):
            self.foreign.append(str(error))
        else:
            super()._on_error(error)


class NotebookPage:
    """A notebook that is open in JupyterLab or Notebook 7, with what the check asks of it."""

    def __init__(self, page: Page) -> None:
        self.page = page

    def _ask(self, expression: str) -> Any:
        return self.page.evaluate(
            f"() => {{ const panel = jupyterapp.shell.currentWidget; return {expression}; }}"
        )

    def cells(self) -> list[Any]:
        """Return the cells: kind, source and number of the latest execution."""
        return self._ask(
            "Array.from(panel.content.model.cells).map((cell) => [cell.type, cell.sharedModel.getSource(), cell.executionCount ?? null, cell.metadata])"
        )

    def state(self) -> dict[str, Any]:
        """Return everything that a key which JupyterLab takes would change."""
        numbers = self.page.locator(".jp-Notebook .cm-lineNumbers").count()
        dialogs = self.page.locator(".jp-Dialog").count()
        hidden = self.page.locator(".jp-Cell .jp-OutputPlaceholder").count()
        return {
            "cells": self.cells(),
            "active": self._ask("[panel.content.activeCellIndex, panel.content.mode]"),
            "shown": [numbers, dialogs, hidden],
        }

    def run(self, index: int) -> None:
        """Run one cell, by its own key."""
        before = self.cells()[index][2]
        self.page.locator(".jp-Notebook .jp-CodeCell").nth(index).locator(".cm-content").click()
        self.page.keyboard.press("Control+Enter")
        self.page.wait_for_function(
            "([index, before]) => ![null, before].includes(jupyterapp.shell.currentWidget.content.model.cells.get(index).executionCount)",
            arg=[index, before],
            timeout=2 * MINUTES,
        )

    def output(self, index: int) -> Locator:
        return self.page.locator(".jp-Notebook .jp-CodeCell").nth(index).locator(".jp-OutputArea")


def bar_of(page: Page, name: str = "block3.conv2") -> Locator:
    return page.get_by_role("slider", name=name).first


def drag(page: Page, bar: Locator, sparsity: float) -> str:
    """Pull a bar to a height with the mouse, and return the percentage that it shows then: a pixel may be 0.4 %."""
    bar.scroll_into_view_if_needed()
    box = bar.bounding_box()
    assert box is not None
    x, bottom = box["x"] + box["width"] / 2, box["y"] + box["height"]
    page.mouse.move(x, bottom - float(bar.get_attribute("aria-valuenow") or 0) / 100 * box["height"])
    page.mouse.down()
    page.mouse.move(x, bottom - sparsity * box["height"], steps=12)
    page.mouse.up()
    now = bar.get_attribute("aria-valuenow") or ""
    assert abs(float(now) - 100 * sparsity) < 0.5, (
        f"dragged to {100 * sparsity:g} %, and the bar shows {now} %"
    )
    return now


def shows(bar: Locator, percent: str) -> None:
    expect(bar).to_have_attribute("aria-valuenow", percent)


def check_keys(notebook: NotebookPage, report: Report) -> None:
    """Press what JupyterLab would take, on a focused bar: bars move, cells stay."""
    page = notebook.page
    bar = bar_of(page)
    bar.focus()
    before = notebook.state()
    page.keyboard.press("Home")
    shows(bar, "0")
    for key, percent in (
        ("PageUp", "10"),
        ("ArrowUp", "11"),
        ("Shift+ArrowUp", "11.1"),
        ("ArrowDown", "10.1"),
        ("End", "99"),
    ):
        page.keyboard.press(key)
        shows(bar, percent)
    page.keyboard.press("Control+z")
    shows(bar, "10.1")
    page.keyboard.press("Control+y")
    shows(bar, "99")
    page.keyboard.press("ArrowLeft")
    expect(bar).not_to_be_focused()
    page.keyboard.press("ArrowRight")
    expect(bar).to_be_focused()
    page.keyboard.press("Control+a")
    expect(page.get_by_text(re.compile(r"^10 layers$")).first).to_be_visible()
    page.keyboard.press("Escape")
    expect(bar).to_be_focused()
    report.ok(
        "on a bar, arrows, Page, Home, End, Ctrl+Z, Ctrl+Y, Ctrl+A and Escape do what they do in the app"
    )
    page.keyboard.press("l")
    expect(bar).to_have_attribute("aria-disabled", "true")
    page.keyboard.press("l")
    expect(bar).not_to_have_attribute("aria-disabled", "true")
    page.keyboard.press("Enter")
    field = page.get_by_label("Sparsity", exact=True).first
    expect(field).to_be_focused()
    page.keyboard.type("42")
    page.keyboard.press("Enter")
    shows(bar, "42")
    report.ok("L locks the layer, Enter goes to its number, 42 and Enter are taken")
    bar.focus()
    for key in TAKEN:
        page.keyboard.press(key)
    expect(bar).to_be_focused()
    shows(bar, "42")
    for name in ("Draw", "Undo"):
        page.get_by_role("button", name=name, exact=True).first.focus()
        for key in ("x", "d", "d", "a", "b"):
            page.keyboard.press(key)
    find = page.get_by_label("Find layers").first
    find.fill("")
    find.focus()
    page.keyboard.type("dd abx")
    expect(find).to_have_value("dd abx")
    find.fill("")
    after = notebook.state()
    assert after == before, f"keys on the page have changed the notebook from {before} to {after}"
    report.ok(
        f"{' '.join(TAKEN)} on a bar, d d, x, a, b on buttons, and words typed into a field leave every cell as it was"
    )


def check_drag(notebook: NotebookPage, report: Report) -> None:
    """Drag a bar; what is predicted follows, and the cells stay."""
    page = notebook.page
    bar = bar_of(page)
    cells = notebook.cells()
    drag(page, bar, 0.2)
    figure = page.locator("[data-key=speedup] .se-big span").first
    expect(figure).to_have_text(re.compile(r"\d"), timeout=MINUTES)
    low = float(figure.inner_text())
    drag(page, bar, 0.9)
    expect(figure).not_to_have_text(f"{low:.2f}")
    high = float(figure.inner_text())
    assert high > low, f"{high} is predicted at 90 %, {low} at 20 %"
    assert notebook.cells() == cells
    report.ok(f"a bar dragged with the mouse from 20 to 90 %: predicted speed-up {low:g}, then {high:g}")


def check_theme(notebook: NotebookPage, report: Report) -> None:
    """Change JupyterLab's theme while the page is shown."""
    page = notebook.page
    dark = page.locator("html[data-se-theme=dark]")
    expect(dark).to_have_count(0)
    for name, count in (("JupyterLab Dark", 1), ("JupyterLab Light", 0)):
        page.evaluate("(theme) => jupyterapp.commands.execute('apputils:change-theme', { theme })", name)
        expect(dark).to_have_count(count)
        # While JupyterLab's own picture for the change is still there, the next change fails in JupyterLab itself.
        expect(page.locator("#jupyterlab-splash")).to_have_count(0)
    report.ok("the page turns dark and light with the front end's theme")


def kernel_says(notebook: NotebookPage, sparsity: str) -> None:
    """Ask the kernel for the sparsity that the page shows, and in which threads its state was written."""
    wanted, text = f"the kernel has {float(sparsity):.1f} %", ""
    for _ in range(5):  # a gesture may be on its way still
        notebook.run(4)
        notebook.page.wait_for_timeout(300)
        text = notebook.output(4).inner_text()
        if wanted in text:
            break
    assert f"{wanted}, threads ['MainThread']" in text, text


def measure(page: Page, status: Locator) -> None:
    page.get_by_label("Images to measure on").first.select_option("100")
    page.get_by_role("button", name="Measure", exact=True).first.click()
    expect(status).to_contain_text("Next: drag the bars", timeout=6 * MINUTES)


def check_run(notebook: NotebookPage, report: Report, elsewhere: Callable[[], None] | None = None) -> None:
    """Start a run, see it move, and stop it."""
    page = notebook.page
    page.get_by_role("button", name="Start pruning").first.click()
    step = 0
    for _ in range(4):
        found = page.wait_for_function(
            "(step) => { const now = /step (\\d+) of/.exec(document.querySelector('.se-run').innerText)?.[1]; return Number(now) > step ? Number(now) : null; }",
            arg=step,
            timeout=MINUTES,
        )
        step = found.json_value()
    report.ok("a run goes on in the kernel, and its progress is seen")
    if elsewhere is not None:
        elsewhere()
    page.get_by_role("button", name="Stop", exact=True).first.click()
    expect(page.locator(".se-run").first).to_contain_text("stopped", timeout=3 * MINUTES, ignore_case=True)
    report.ok("Stop ends it")


def check_app(notebook: NotebookPage, report: Report) -> None:
    """The notebook that is the app."""
    page = notebook.page
    notebook.run(0)
    expect(page.locator("tr[data-layer='block3.conv2']")).to_contain_text(
        "256 × 256 × 3 × 3", timeout=2 * MINUTES
    )
    report.ok("notebooks/explorer.ipynb runs, and its page shows the layers of the demo")
    measure(page, page.locator(".se-now"))
    report.ok("Measure measures, and says what comes next")
    check_keys(notebook, report)
    check_drag(notebook, report)
    check_theme(notebook, report)
    check_run(notebook, report)


def check_steps(notebook: NotebookPage, report: Report, picture: Callable[[str], None]) -> None:
    """Single steps in cells of their own."""
    page = notebook.page
    for index in range(4):
        notebook.run(index)
    page.get_by_role("button", name="Measure", exact=True).first.click()
    # Not before it has ended: the figures speak of what is predicted all the time.
    expect(page.locator(".se-now").first).to_contain_text("Next: drag the bars", timeout=6 * MINUTES)
    report.ok("SensitivityView, DistributionEditor and RunMonitor of one study, each in a cell of its own")
    check_keys(notebook, report)
    check_drag(notebook, report)
    dragged = bar_of(page).get_attribute("aria-valuenow") or ""
    kernel_says(notebook, dragged)
    report.ok(
        "the next cell finds the dragged value in editor.distribution, and only the main thread has written the state"
    )
    picture("steps")

    def elsewhere() -> None:
        notebook.run(4)
        report.ok("another cell runs during the run")

    check_run(notebook, report, elsewhere)
    # While the kernel is busy with the result, JupyterLab shows what the file holds of the widgets after a reload, and nothing hears them.
    expect(page.locator(".se-now").first).to_contain_text("stopped early", timeout=3 * MINUTES)
    page.keyboard.press("Escape")
    page.evaluate("() => jupyterapp.commands.execute('docmanager:save')")
    page.reload()
    page.wait_for_function(
        "() => window.jupyterapp?.shell.currentWidget?.content?.model?.cells.length > 0", timeout=MINUTES
    )
    shows(bar_of(page), dragged)
    kernel_says(notebook, drag(page, bar_of(page), 0.5))
    report.ok("after the browser's reload the widgets are back with their values, and go on")


def write_kernel(folder: Path) -> None:
    """Write a kernel `python3` that is the Python of this command."""
    kernel = folder / "kernels" / "python3"
    kernel.mkdir(parents=True)
    (kernel / "kernel.json").write_text(
        json.dumps(
            {
                "argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
                "display_name": "Python 3 (ipykernel)",
                "language": "python",
                "env": {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            }
        )
    )


def server_command(jupyter: str, kind: str, port: int, root: Path) -> list[str]:
    """Return the command that serves the notebooks in `root`, for this machine and without a question."""
    return [
        jupyter,
        kind,
        "--allow-root",
        "--no-browser",
        f"--port={port}",
        "--ServerApp.ip=127.0.0.1",
        "--ServerApp.port_retries=0",
        "--IdentityProvider.token=",
        f"--ServerApp.root_dir={root}",
        f"--{FRONTENDS[kind][3]}.expose_app_in_browser=True",
    ]


@contextmanager
def opened(
    playwright: Playwright, browser: str, url: str, profile: Path
) -> Iterator[tuple[NotebookPage, FrontendWatch]]:
    """A notebook in a fresh browser, watched for errors and for requests to other hosts."""
    context = playwright.chromium.launch_persistent_context(
        profile,
        executable_path=browser,
        headless=True,
        args=BROWSER_FLAGS,
        viewport={"width": 1440, "height": 1500},
    )
    context.set_default_timeout(30_000)
    page = context.new_page()
    watch = FrontendWatch(page)
    page.goto(url)
    page.locator(".jp-Notebook .jp-CodeCell .cm-content").first.wait_for(timeout=2 * MINUTES)
    page.wait_for_function(
        "() => jupyterapp.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'",
        timeout=MINUTES,
    )
    # JupyterLab asks at its first start whether it may fetch its news.
    no = page.get_by_role("button", name="No", exact=True)
    if no.count():
        no.first.click()
    try:
        yield NotebookPage(page), watch
    finally:
        context.close()


def check(kind: str, jupyter: str, browser: str, pictures: Path | None, report: Report) -> None:
    """Run both notebooks in one front end."""
    label, package, path, _ = FRONTENDS[kind]
    python = Path(jupyter).with_name("python")
    number = subprocess.run(
        [python, "-c", f"import importlib.metadata as m; print(m.version({package!r}))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    report.say(f"{label} {number}")
    for file in ("explorer.ipynb", "steps.ipynb"):
        # A server for each: JupyterLab would open the other notebook again too.
        with tempfile.TemporaryDirectory() as name, sync_playwright() as playwright:
            folder = Path(name)
            root, data = folder / "notebooks", folder / "kernel"
            root.mkdir()
            write_kernel(data)
            shutil.copy(ROOT / "notebooks" / "explorer.ipynb", root)
            write_notebook(root / "steps.ipynb", *STEPS)
            environment = {
                "JUPYTER_PATH": os.pathsep.join([str(data), str(Path(sys.prefix) / "share" / "jupyter")]),
                **{f"JUPYTER_{what}_DIR": str(folder / what) for what in ("CONFIG", "DATA", "RUNTIME")},
                "JUPYTERLAB_WORKSPACES_DIR": str(folder / "workspaces"),
                "JUPYTERLAB_SETTINGS_DIR": str(folder / "settings"),
            }
            port = free_port()
            command = server_command(jupyter, kind, port, root)
            with (
                VoilaServer(command, port, folder / "server.log", environment) as server,
                opened(playwright, browser, f"{server.url}{path}/{file}", folder / "profile") as (
                    notebook,
                    watch,
                ),
            ):

                def picture(what: str, notebook: NotebookPage = notebook) -> None:
                    if pictures is not None:
                        notebook.page.screenshot(path=pictures / f"{kind}-{what}.png")

                try:
                    if file == "explorer.ipynb":
                        check_app(notebook, report)
                        picture("app")
                    else:
                        check_steps(notebook, report, picture)
                    assert watch.problems == [], "\n".join(watch.problems)
                except BaseException:
                    picture("failed")
                    raise
                report.ok(f"{file}: no error of a script or in the console, no request to another host")
                for error in sorted(set(watch.foreign)):
                    report.say(f"      but one in the scripts of {label} itself: {error}")


def main() -> None:
    """Check both front ends and print what was seen."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--jupyter",
        required=True,
        help="the command `jupyter` of the environment that has jupyterlab and notebook",
    )
    parser.add_argument("--only", choices=tuple(FRONTENDS), help="check one of the two")
    parser.add_argument("--out", type=Path, help="file that keeps what is printed")
    parser.add_argument("--pictures", type=Path, help="folder for screenshots")
    options = parser.parse_args()
    jupyter, browser = shutil.which(options.jupyter), find_browser()
    if jupyter is None:
        parser.error(
            f"{options.jupyter} is no command. Name the `jupyter` of an environment with: pip install jupyterlab notebook"
        )
    if browser is None:
        parser.error("No chromium was found. Install one, or name one with EXPLORER_BROWSER=/path/to/it")
    if options.pictures is not None:
        options.pictures.mkdir(parents=True, exist_ok=True)
    report = Report()
    report.say("$ python -m tests.browser.check_jupyterlab")
    packages = ", ".join(
        f"{name} {version(name)}" for name in ("anywidget", "ipywidgets", "jupyterlab_widgets", "ipykernel")
    )
    report.say(f"kernel: Python {platform.python_version()}, {packages}")
    chromium = subprocess.run(
        [browser, "--version"], capture_output=True, text=True, check=True
    ).stdout.split()
    report.say(f"browser: {' '.join(chromium[:2])}")
    try:
        for kind in (options.only,) if options.only else FRONTENDS:
            check(kind, jupyter, browser, options.pictures, report)
    except (AssertionError, PlaywrightError) as error:
        # Without the whole page in words, which Playwright adds.
        report.say(f"  NOT  {str(error).split('Aria snapshot')[0].strip()}")
        frame = [entry for entry in traceback.extract_tb(error.__traceback__) if entry.filename == __file__][
            -1
        ]
        report.say(f"       in {frame.name}: {frame.line}")
        sys.exit(1)
    report.say("All as it should be.")
    if options.out is not None:
        options.out.write_text("\n".join(report.lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
