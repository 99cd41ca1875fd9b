"""Several people at once: each alone with a kernel and its limits, a clear page for one too many, and no kernel without its page."""

from __future__ import annotations

import contextlib
import os
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import BrowserContext, Page, expect

from explorer.widgets.serving import UserLimits, can_limit_memory
from tests.browser.conftest import FAKE_PAGE, ROOT, Watch
from tests.browser.voila_server import VoilaServer, free_port, voila_command, write_notebook

pytestmark = [pytest.mark.browser, pytest.mark.timeout(180)]

LIMITS = UserLimits(max_users=2, threads=1, memory_gb=2.0)
# Times of a minute in the product, short here.
QUICK = [
    "--UserKernels.cull_interval=1",
    "--UserKernels.absent_seconds=1",
    "--UserKernels.yield_seconds=1",
    "--UserKernels.reload_seconds=2",
    "--KernelRestarter.time_to_dead=0.5",
]


@pytest.fixture(scope="module")
def small_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VoilaServer]:
    """A server with room for two."""
    folder, port = tmp_path_factory.mktemp("users"), free_port()
    notebook = write_notebook(folder / "fake.ipynb", FAKE_PAGE.format(pause_s=0.004))
    command = [*voila_command(notebook, port, LIMITS), *QUICK]
    with VoilaServer(command, port, folder / "voila.log", {"PYTHONPATH": str(ROOT)}) as server:
        yield server


def kernels(server: VoilaServer) -> list[psutil.Process]:
    assert server.process is not None

    def is_kernel(child: psutil.Process) -> bool:
        # One that has just ended is known to the system for a moment more.
        with contextlib.suppress(psutil.NoSuchProcess):
            return "ipykernel_launcher" in " ".join(child.cmdline())
        return False

    return [child for child in psutil.Process(server.process.pid).children() if is_kernel(child)]


def wait_until(what: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.05)


def opened(context: BrowserContext, server: VoilaServer) -> Page:
    page = context.new_page()
    page.watch = Watch(page)  # type: ignore[attr-defined]
    page.goto(server.url)
    page.get_by_role("slider", name="fc").wait_for(timeout=60_000)
    return page


def start_long_run(page: Page) -> None:
    page.get_by_role("textbox", name="Epochs").fill("500")
    page.get_by_role("button", name="Start pruning").click()
    expect(page.locator(".se-now")).to_contain_text("Pruning, run 1")


def test_two_users_have_kernels_of_their_own_and_a_third_gets_the_next_free_place(
    context: BrowserContext, small_server: VoilaServer
) -> None:
    first, second = opened(context, small_server), opened(context, small_server)
    assert len(kernels(small_server)) == 2

    # What one does, the other does not see.
    first.bring_to_front()
    first.locator("[role=slider][tabindex='0']").focus()
    first.keyboard.press("ArrowRight")
    bar = first.get_by_role("slider", name="block1.conv1")
    expect(bar).to_be_focused()
    first.keyboard.press("Home")
    expect(bar).to_have_attribute("aria-valuenow", "0")
    expect(first.get_by_role("button", name="Undo")).to_be_enabled()
    start_long_run(second)
    expect(first.locator(".se-now")).to_have_text("Next: measure how each layer reacts to pruning.")
    expect(second.get_by_role("slider", name="block1.conv1")).to_have_attribute("aria-valuenow", "90")

    # Each within its limits, on CPUs of its own where there are two.
    if can_limit_memory():
        import resource

        allowed = [resource.prlimit(kernel.pid, resource.RLIMIT_DATA) for kernel in kernels(small_server)]
        assert allowed == [(2_000_000_000, 2_000_000_000)] * 2
        places = [frozenset(os.sched_getaffinity(kernel.pid)) for kernel in kernels(small_server)]
        assert all(len(place) == 1 for place in places)
        assert len(set(places)) == min(2, len(os.sched_getaffinity(0)))
    assert all(kernel.environ()["OMP_NUM_THREADS"] == "1" for kernel in kernels(small_server))

    # One too many: said in words, without a kernel, and let in when there is room.
    third = context.new_page()
    answer = third.goto(small_server.url)
    assert answer is not None and answer.status == 503
    expect(third.get_by_role("heading")).to_have_text("All places are taken for now")
    expect(third.locator("main")).to_contain_text("2 people are working here")
    assert [v["id"] for v in Axe().run(third).response["violations"]] == []
    assert len(kernels(small_server)) == 2

    # Reloading in the middle of a run, with all places taken, takes nobody's place and needs no other; while nobody waits, who might be first.
    third.goto("about:blank")
    before = {kernel.pid for kernel in kernels(small_server)}
    second.reload()
    second.get_by_role("slider", name="fc").wait_for(timeout=60_000)
    expect(second.locator(".se-now")).to_have_text("Next: measure how each layer reacts to pruning.")
    assert len(kernels(small_server)) == 2
    assert len(before & {kernel.pid for kernel in kernels(small_server)}) == 1

    third.goto(small_server.url)
    expect(third.get_by_role("heading")).to_have_text("All places are taken for now")
    second.close(run_before_unload=True)
    third.get_by_role("slider", name="fc").wait_for(timeout=60_000)
    expect(bar).to_have_attribute("aria-valuenow", "0")
    assert first.watch.problems == []  # type: ignore[attr-defined]
    assert second.watch.problems == []  # type: ignore[attr-defined]
    assert len(kernels(small_server)) == 2


def test_a_killed_kernel_is_told_and_the_kernel_of_a_page_that_vanishes_in_a_run_ends(
    context: BrowserContext, small_server: VoilaServer
) -> None:
    wait_until(lambda: kernels(small_server) == [], 10)
    page = opened(context, small_server)
    told = page.get_by_role("alert").filter(has_text="The kernel of this page has ended")
    expect(told).to_be_hidden()
    start_long_run(page)
    kernels(small_server)[0].send_signal(signal.SIGKILL)
    expect(told).to_be_visible(timeout=15_000)
    assert [
        v["id"] for v in Axe().run(page).response["violations"] if v["impact"] in ("serious", "critical")
    ] == []
    # It is not started again behind the page's back, and its place is free.
    wait_until(lambda: kernels(small_server) == [], 5)

    page.get_by_role("button", name="Reload").click()
    page.get_by_role("slider", name="fc").wait_for(timeout=60_000)
    expect(told).to_be_hidden()
    assert len(kernels(small_server)) == 1

    # As a crash of the browser: without a word of good-bye.
    start_long_run(page)
    page.close(run_before_unload=False)
    wait_until(lambda: kernels(small_server) == [], 10)
    small_server.check_alive()


def test_a_stopped_kernel_and_a_server_that_is_gone_are_told(context: BrowserContext, tmp_path: Path) -> None:
    port = free_port()
    notebook = write_notebook(tmp_path / "fake.ipynb", FAKE_PAGE.format(pause_s=0.004))
    token = {"PYTHONPATH": str(ROOT), "JUPYTER_TOKEN": "a-token-of-the-test"}
    command = voila_command(notebook, port, token=True)
    with VoilaServer(command, port, tmp_path / "voila.log", token) as server:
        # Nobody without the token, neither to the page nor to a kernel.
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(f"{server.url}api/kernels/00000000-0000-0000-0000-000000000000")
        assert kernels(server) == []
        page = context.new_page()
        page.clock.install()
        page.goto(server.url)
        page.get_by_label("Token").fill("not-the-token")
        page.get_by_role("button", name="Open the app").click()
        expect(page.get_by_role("alert")).to_contain_text("That is not the token of this app")
        assert [v["id"] for v in Axe().run(page).response["violations"]] == []
        page.get_by_label("Token").fill("a-token-of-the-test")
        page.get_by_role("button", name="Open the app").click()
        page.get_by_role("slider", name="fc").wait_for(timeout=60_000)
        assert "JUPYTER_TOKEN" not in kernels(server)[0].environ()

        # Silent, not dead: named after a minute and three beats, and no more once it answers.
        silent = page.get_by_role("alert").filter(has_text="has not answered for a minute")
        kernels(server)[0].suspend()
        page.clock.run_for(45_000)
        expect(silent).to_be_hidden()
        page.clock.run_for(30_000)
        expect(silent).to_be_visible()
        kernels(server)[0].resume()
        page.clock.run_for(20_000)
        expect(silent).to_be_hidden()

        assert server.process is not None
        server.process.terminate()
        server.process.wait(20)
        page.clock.run_for(10_000)
        expect(page.get_by_role("alert").filter(has_text="does not answer")).to_be_visible()
