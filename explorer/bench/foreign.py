"""Engines that live in environments of their own: each runs in a process of the Python that the user names, and waits there for its turn.

None of them is a dependency of this package, and two of them cannot share an environment with it. What is timed is the engine alone: the clock
runs in its process.
"""

from __future__ import annotations

import json
import subprocess
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from explorer.errors import EngineError

__all__ = ["FOREIGN", "TOLERANCE", "Foreign", "ForeignEngine", "export", "parse"]

TOLERANCE = 1e-3
"""Largest difference to torch's output that is accepted of float32 engines, relative to its largest entry."""


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

    Raises
    ------
    EngineError
        If the engine cannot be loaded, or cannot compile the network.
    """

    def __init__(self, name: str, python: str, model: Path, threads: int) -> None:
        self.name = name
        self.isa = "foreign"
        self._process = subprocess.Popen(  # noqa: S603  # the interpreter that the user named
            [python, str(Path(__file__).with_name("foreign_worker.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        output = model.with_name(f"{name}.npy")
        what = FOREIGN[name]
        request = {"do": "load", "engine": what.engine, "precision": what.precision, "threads": threads}
        paths = {"model": str(model), "input": str(model.with_name("input.npy")), "output": str(output)}
        try:
            self.version = str(self._ask(request | paths)["version"])
        except EngineError:
            self.close()
            raise
        self.output = torch.from_numpy(np.load(output))

    def seconds(self, calls: int) -> float:
        """Return what `calls` inferences after one another took, on the clock of the engine's process."""
        return float(self._ask({"do": "run", "calls": calls})["seconds"])

    def __call__(self) -> Tensor:
        """Run once, and return what the engine gave when it was loaded."""
        self.seconds(1)
        return self.output

    def close(self) -> None:
        """End the process."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.kill()
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except (BrokenPipeError, ValueError):  # the second when `close` was called
            line = ""
        if not line:
            raise EngineError(f"The process of {self.name} ended, with status {self._process.wait()}.")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise EngineError(f"{self.name} failed: {answer['error']}")
        return answer
