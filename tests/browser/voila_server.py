"""A Voila server of our own for the tests: on a free port, known by its process, gone at the end."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, Self

from explorer.widgets.serving import UserLimits, server_command, server_environment

NOTEBOOK: dict[str, Any] = {
    "cells": [],
    "metadata": {
        "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
    },
    "nbformat": 4,
    "nbformat_minor": 5,
}


def write_notebook(path: Path, *sources: str) -> Path:
    """Write a notebook of code cells."""
    cells = [
        {
            "cell_type": "code",
            "id": f"cell-{i}",
            "execution_count": None,
            "metadata": {},
            "outputs": [],
            "source": source,
        }
        for i, source in enumerate(sources)
    ]
    path.write_text(json.dumps({**NOTEBOOK, "cells": cells}))
    return path


def free_port() -> int:
    """Return a port on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def voila_command(
    notebook: Path, port: int, limits: UserLimits | None = None, *, token: bool = False
) -> list[str]:
    """Return the command that serves `notebook` as the app is served."""
    return server_command(notebook, port, limits=limits, token=token)


class VoilaServer:
    """Runs a Voila server while the `with` block lasts.

    Parameters
    ----------
    command : list of str
        Starts Voila on `port`.
    port : int
    log : Path
        Where the server's output goes.
    environment : dict, optional
        Added to the environment of server and kernels.
    """

    def __init__(
        self, command: list[str], port: int, log: Path, environment: dict[str, str] | None = None
    ) -> None:
        self.url = f"http://127.0.0.1:{port}/"
        self._log = log
        self._command = command
        # Caches of its own: a scan that an earlier run has left on disk would be over before anyone could stop it.
        caches = {"EXPLORER_CACHE": str(log.parent / "caches")}
        self._environment = {**server_environment({**os.environ, **caches}), **(environment or {})}
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        with self._log.open("wb") as log:
            # A session of its own, so that the kernels can be ended together with the server.
            self.process = subprocess.Popen(
                self._command,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment,
                start_new_session=True,
            )
        end = time.monotonic() + 60
        while time.monotonic() < end:
            self.check_alive()
            try:
                with urllib.request.urlopen(f"{self.url}voila/static/voila.js", timeout=2):
                    return self
            except urllib.error.HTTPError:
                return self
            except OSError:
                time.sleep(0.1)
        self.__exit__()
        raise AssertionError(f"Voila did not answer within a minute:\n{self.output()}")

    def __exit__(self, *_: object) -> None:
        if self.process is None:
            return
        try:
            os.killpg(self.process.pid, signal.SIGTERM)
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(10)
        except ProcessLookupError:
            pass

    def output(self) -> str:
        """Return what the server has printed."""
        return self._log.read_text(errors="replace")

    def check_alive(self) -> None:
        """Fail when the process has ended: another server may answer on its port otherwise."""
        assert self.process is not None
        assert self.process.poll() is None, f"Voila has ended:\n{self.output()}"
