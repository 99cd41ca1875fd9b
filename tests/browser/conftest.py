"""A server and a watched page for the browser tests.

Two servers: the app as a user starts it, with the real demo, and the same page over the fake study, whose work takes milliseconds.
A page fails its test when a script throws, when the console has an error, or when anything is asked of another host.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlparse

import pytest
from playwright.sync_api import (
    Browser,
    BrowserContext,
    ConsoleMessage,
    Error,
    Page,
    Playwright,
    Request,
    Response,
    WebSocket,
    sync_playwright,
)

from tests.browser.voila_server import VoilaServer, free_port, voila_command, write_notebook

ROOT = Path(__file__).resolve().parents[2]
BROWSER_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
FAKE_PAGE = """
import os

asked = os.environ.get("QUERY_STRING", "").split("&")
if "torch" in asked:
    import torch

from tests.widgets.fake_study import FakeStudy
from explorer.widgets import ExplorerState, SensitivityExplorer
from explorer.widgets.publisher import kernel_scheduler
from explorer.widgets.state import Choice
from explorer.errors import DataError

def open_study(choice):
    if choice.data == "missing":
        raise DataError("Fashion-MNIST was not found. Install dataset-fashion-mnist, or name its folder.")
    return FakeStudy(pause_s=0.06 if "slow" in asked else {pause_s}, steps_per_epoch=20)

choices = (Choice("Fake network", "fake", "fake"), Choice("Missing data", "fake", "missing"))
state = ExplorerState(choices=choices, scheduler=kernel_scheduler(), open_study=open_study)
page = SensitivityExplorer(state)
state.load(0)
page
"""


class Watch:
    """What a page did that it should not, and how much came to it: by its websocket, and as files."""

    def __init__(self, page: Page) -> None:
        self.problems: list[str] = []
        self.received = 0
        self.files: dict[str, int] = {}
        page.on("pageerror", self._on_error)
        page.on("console", self._on_console)
        page.on("request", self._on_request)
        page.on("response", self._on_response)
        page.on("websocket", self._on_websocket)

    def _on_error(self, error: Error) -> None:
        self.problems.append(f"script: {error}")

    def _on_console(self, message: ConsoleMessage) -> None:
        if message.type == "error":
            self.problems.append(f"console: {message.text} ({message.location})")

    def _on_request(self, request: Request) -> None:
        url = urlparse(request.url)
        own = url.hostname in (None, "127.0.0.1") or url.scheme in ("data", "blob")
        if not own:
            self.problems.append(f"foreign request: {request.url}")

    def _on_response(self, response: Response) -> None:
        self.files[response.url] = int(response.headers.get("content-length", 0))

    def _on_websocket(self, socket: WebSocket) -> None:
        def count(frame: str | bytes) -> None:
            self.received += len(frame)

        socket.on("framereceived", count)


@pytest.fixture(scope="session")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VoilaServer]:
    """The app as `sparsity-explorer app` serves it."""
    port = free_port()
    command = [sys.executable, "-m", "explorer", "app", "--no-browser", f"--port={port}"]
    log = tmp_path_factory.mktemp("app") / "voila.log"
    # One thread: several that spin for each other on a busy machine are much slower than one.
    with VoilaServer(command, port, log, {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}) as server:
        yield server


@pytest.fixture(scope="session")
def fake_app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VoilaServer]:
    """The page over the fake study."""
    folder = tmp_path_factory.mktemp("fake")
    port = free_port()
    notebook = write_notebook(folder / "fake.ipynb", FAKE_PAGE.format(pause_s=0.004))
    with VoilaServer(
        voila_command(notebook, port), port, folder / "voila.log", {"PYTHONPATH": str(ROOT)}
    ) as server:
        yield server


@pytest.fixture(scope="session")
def playwright() -> Iterator[Playwright]:
    with sync_playwright() as running:
        yield running


@pytest.fixture(scope="session")
def browser(playwright: Playwright, browser_executable: str) -> Iterator[Browser]:
    browser = playwright.chromium.launch(
        executable_path=browser_executable, headless=True, args=BROWSER_FLAGS
    )
    yield browser
    browser.close()


@pytest.fixture
def context(browser: Browser, request: pytest.FixtureRequest) -> Iterator[BrowserContext]:
    """A profile that knows nothing of others; `@pytest.mark.parametrize("context", [{"viewport": ...}], indirect=True)` changes its options."""
    options = {"viewport": {"width": 1440, "height": 1000}, **getattr(request, "param", {})}
    context = browser.new_context(**options)
    context.set_default_timeout(20_000)
    yield context
    context.close()


@pytest.fixture
def page(context: BrowserContext) -> Iterator[Page]:
    """A page that fails the test for anything a user would call broken."""
    page = context.new_page()
    watch = Watch(page)
    page.watch = watch  # type: ignore[attr-defined]
    yield page
    assert watch.problems == []


@pytest.fixture
def fake_page(page: Page, fake_app: VoilaServer) -> Page:
    """The page over the fake study, with its model loaded; torch is not, as long as nobody asks for weights or results, which spares seconds."""
    return _opened(page, fake_app, "")


@pytest.fixture
def page_with_torch(page: Page, fake_app: VoilaServer) -> Page:
    """The same with torch, as with any network, for tests of how long it takes to get weights or results."""
    return _opened(page, fake_app, "?torch")


@pytest.fixture
def slow_page(page: Page, fake_app: VoilaServer) -> Page:
    """The same, whose steps take fifteen times as long: a busy machine may take seconds from one click to the next, and a run must not end meanwhile."""
    return _opened(page, fake_app, "?torch&slow")


def _opened(page: Page, server: VoilaServer, query: str) -> Page:
    server.check_alive()
    page.goto(server.url + query)
    page.get_by_role("slider", name="block3.conv2").wait_for(timeout=60_000)
    return page
