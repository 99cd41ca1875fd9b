"""What every test shares: one thread, fixed seeds, and one rule for browser tests on a machine that has no browser."""

from __future__ import annotations

import math
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

CI = os.environ.get("CI", "").lower() in {"true", "1"}
NO_BROWSER = (
    "no chromium or chrome on this machine. Install one (Debian, Ubuntu: apt-get install chromium) "
    "or name one with EXPLORER_BROWSER=/path/to/it"
)
_MAC_APPLICATIONS = [
    f"/Applications/{name}.app/Contents/MacOS/{name}" for name in ("Google Chrome", "Chromium")
]


def find_browser() -> str | None:
    """Return the path of a chromium or chrome; `.ci/ensure-browser` looks for the same names."""
    names = [
        os.environ.get("EXPLORER_BROWSER"),
        "chromium",
        "chromium-browser",
        "google-chrome",
        "google-chrome-stable",
    ]
    found = [path for name in names if name and (path := shutil.which(name))]
    found += [path for path in _MAC_APPLICATIONS if Path(path).exists()]
    return found[0] if found else None


def pytest_configure() -> None:
    # Threads of torch and of a test's own subprocesses would fight for the same few cores.
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def measured_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that an earlier run of the tests measured is taken from disk; tests of the cache itself give it a folder of their own."""
    for part in ("loss", "latency"):
        monkeypatch.setattr(f"explorer.sensitivity.{part}.cache_folder", lambda: None)


@pytest.fixture
def same_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """However busy the machine is, it is the one on which the times were measured.

    The networks of such tests take microseconds: other work can make it several times slower for a while.
    """
    monkeypatch.setattr("explorer.sensitivity.times._SAME_MACHINE", math.inf)


@pytest.fixture(scope="module")
def quick_latencies() -> Iterator[None]:
    """Contestants are timed in short turns: for files of tests whose networks take microseconds, and which do not ask how many."""
    from explorer.inference.timing import compare_latency

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(compare_latency.__kwdefaults__, "slice_s", 0.0002)
        yield


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("browser") is None or find_browser() is not None:
        return
    if CI:
        pytest.fail(
            f"With CI={os.environ['CI']} a browser test must not be skipped: {NO_BROWSER}.", pytrace=False
        )
    pytest.skip(NO_BROWSER)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = [
        report for report in terminalreporter.getreports("skipped") if NO_BROWSER in str(report.longrepr)
    ]
    if skipped:
        terminalreporter.write_sep("!", f"{len(skipped)} BROWSER TESTS SKIPPED", red=True)
        terminalreporter.write_line(f"The app itself was not tested: {NO_BROWSER}.")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - for libraries that still draw from the global generator
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def browser_executable() -> str:
    """The path of the browser that a test marked `browser` drives."""
    path = find_browser()
    assert path is not None, NO_BROWSER
    return path
