"""Engines that live in environments of their own: each runs in a process of the Python that the user names, and waits there for its turn.

None of them is a dependency of this package, and two of them cannot share an environment with it. What is timed is the engine alone: the clock
runs in its process.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import tempfile
import threading
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from explorer.bench.usage import Usage
from explorer.errors import EngineError

__all__ = [
    "FOREIGN",
    "HALF_TOLERANCE",
    "TIMEOUT_S",
    "TOLERANCE",
    "Foreign",
    "ForeignEngine",
    "export",
    "installed_version",
    "parse",
]

TIMEOUT_S = 600.0
"""An engine may take so long to compile a network, or to run a slice of a few milliseconds, before it is given up."""

TOLERANCE = 1e-3
"""Largest difference to torch's output that is accepted of float32 engines, relative to its largest entry, in each sample."""

HALF_TOLERANCE = 0.15
"""The same for float16. With random weights and recomputed BatchNorm statistics a network amplifies each rounding a hundredfold: ResNet-50 is off by 9 %
where float32 is off by 0.002 %. (The trained demo network: 0.1 %, see `SparseModule.compare`.)"""


@dataclass(frozen=True, slots=True)
class Foreign:
    """An engine that can be run in another Python.

    Attributes
    ----------
    engine : str
        What `foreign_worker` calls it.
    precision : str
        The arithmetic that it is asked for.
    is_dense_float32 : bool
        It uses neither zeros nor a shorter arithmetic, so that speed-ups may refer to it.
    tolerance : float
        See `TOLERANCE`.
    """

    engine: str
    precision: str = "f32"
    is_dense_float32: bool = True
    tolerance: float = TOLERANCE


FOREIGN = {
    "onnxruntime": Foreign("onnxruntime"),
    "openvino-f32": Foreign("openvino"),
    # bfloat16 where the CPU multiplies it: on random weights its outputs are off by up to a fifth.
    "openvino": Foreign("openvino", "default", is_dense_float32=False, tolerance=0.3),
    "deepsparse": Foreign("deepsparse", is_dense_float32=False),
    # It is float32 too, but its Winograd convolutions round more: dense, with random weights, ResNet-50 is off by 0.3 %.
    "mnn": Foreign("mnn", is_dense_float32=False, tolerance=1e-2),
}
"""Contestants by the name that the command line takes."""

_OPSET = 14  # the oldest with attention as one operator; DeepSparse reads no much newer ones


def parse(text: str) -> tuple[str, str]:
    """Read "NAME=PYTHON", where PYTHON has that engine installed.

    Raises
    ------
    EngineError
        If the name is unknown or the Python is not there.
    """
    name, _, python = text.partition("=")
    if name not in FOREIGN or not python:
        raise EngineError(
            f"{text!r} names no engine; write NAME=PYTHON, with NAME one of {', '.join(FOREIGN)}, "
            "and PYTHON the interpreter of an environment in which it is installed."
        )
    if not Path(python).exists():
        raise EngineError(f"There is no {python}, which is to run {name}.")
    return name, python


def installed_version(name: str, python: str, timeout_s: float = TIMEOUT_S) -> str:
    """Version of an engine in another Python.

    Raises
    ------
    EngineError
        If it cannot be imported there.
    """
    with _Worker(name, python, timeout_s) as worker:
        try:
            return str(worker.ask({"do": "version", "engine": FOREIGN[name].engine})["version"])
        except EngineError as error:
            raise EngineError(
                f"{error} Name the Python of an environment in which {name} is installed: {name}=PYTHON, not {python}."
            ) from error


def export(module: nn.Module, example_input: Tensor, folder: Path) -> Path:
    """Write ``model.onnx`` and ``input.npy`` to `folder`, and return the path of the first."""
    path = folder / "model.onnx"
    with warnings.catch_warnings():
        # Only the older exporter writes this opset, and it says at length that it is old; outputs are compared anyway.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module,
            (example_input,),
            str(path),
            dynamo=False,
            opset_version=_OPSET,
            input_names=["x"],
            output_names=["y"],
        )
    np.save(folder / "input.npy", example_input.numpy())
    return path


class _Worker:
    """The process of one engine, and what is said to it and by it."""

    def __init__(self, name: str, python: str, timeout_s: float) -> None:
        self.name = name
        self._timeout_s = timeout_s
        # Engines talk much there; of one that dies, the last line is worth knowing.
        self._said = tempfile.TemporaryFile()  # noqa: SIM115  # closed by `close`
        try:
            self._process = subprocess.Popen(  # noqa: S603  # the interpreter that the user named
                [python, str(Path(__file__).with_name("foreign_worker.py"))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._said,
                text=True,
            )
        except OSError as error:
            self._said.close()
            raise EngineError(
                f"{python}, which is to run {name}, cannot be started: {error.strerror}."
            ) from error
        # Pipes have no timeout of their own on every system; a thread that waits for lines has.
        self._answers: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put("")

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._answers.get(timeout=self._timeout_s)
        except (BrokenPipeError, ValueError):  # the second when `close` was called
            line = ""
        except queue.Empty:
            self._process.kill()
            raise EngineError(f"{self.name} was silent for {self._timeout_s:g} s, and was ended.") from None
        if not line:
            status = self._process.wait()
            raise EngineError(f"The process of {self.name} ended, with status {status}{self._last_words()}.")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise EngineError(f"{self.name} failed: {answer['error']}.")
        return answer

    def _last_words(self) -> str:
        if self._said.closed:
            return ""
        self._said.seek(-min(4096, self._said.seek(0, os.SEEK_END)), os.SEEK_END)
        lines = self._said.read().decode(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return f": {last}" if last else ""

    def close(self) -> None:
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
        self._process.kill()
        self._process.wait()
        self._listener.join(timeout=5)
        if self._process.stdout is not None and not self._listener.is_alive():
            self._process.stdout.close()
        self._said.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class ForeignEngine:
    """A process that holds a compiled network, and runs it when asked.

    Parameters
    ----------
    name : str
        One of `FOREIGN`.
    python : str
        Interpreter of the environment that holds the engine.
    model : Path
        What `export` wrote.
    threads : int
    timeout_s : float
        How long it may be silent.

    Attributes
    ----------
    version : str
        Of the engine.
    failure : str, optional
        Why it can no longer be asked.
    usage : Usage
        CPU time of its process while it was timed after a warm-up.

    Raises
    ------
    EngineError
        If the engine cannot be loaded, or cannot compile the network.
    """

    def __init__(
        self, name: str, python: str, model: Path, threads: int, timeout_s: float = TIMEOUT_S
    ) -> None:
        self.name = name
        self.isa = "foreign"
        self.failure: str | None = None
        self.usage = Usage()
        self._worker = _Worker(name, python, timeout_s)
        self._output = model.with_name(f"{name}.npy")
        what = FOREIGN[name]
        request = {"do": "load", "engine": what.engine, "precision": what.precision, "threads": threads}
        paths = {"model": str(model), "input": str(model.with_name("input.npy"))}
        try:
            self.version = str(self._worker.ask(request | paths)["version"])
        except BaseException:  # an interrupt too must not leave a process behind
            self.close()
            raise

    def seconds(self, calls: int, warm_s: float = 0.0) -> float:
        """Return what `calls` inferences after one another took, on the clock of the engine's process, after a warm-up of at least one."""
        answer = self._ask({"do": "run", "calls": calls, "warm_s": warm_s})
        if warm_s > 0:
            self.usage.add(float(answer["seconds"]), float(answer["cpu_s"]))
        return float(answer["seconds"])

    def __call__(self) -> Tensor:
        """Run once, and return what the engine gave."""
        self._ask({"do": "output", "output": str(self._output)})
        return torch.from_numpy(np.load(self._output))

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        try:
            return self._worker.ask(request)
        except EngineError as error:
            self.failure = str(error)
            raise

    def close(self) -> None:
        """End the process."""
        self._worker.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
