"""Measured layer times on disk, so that a stopped measurement goes on where it was and a finished one is not made twice.

A time on disk is of another moment, and machines change their speed from hour to hour. So the dense network's time of then is kept beside it; whoever takes times from here
times the dense network now, and scales them by the ratio. Where it is not nearly the same machine any more, the times are not used.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import platform
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from explorer.atomic import write_atomically
from explorer.errors import FormatError
from explorer.folders import held_below
from explorer.sensitivity.cache import LIMIT_BYTES, scan_key

__all__ = ["SUFFIX", "TimesFile", "times_key"]

SUFFIX = ".times.json"
_FORMAT = 1
_SAME_MACHINE = 2.0
"""Dense times further apart than this factor are of another machine, or of one in another state."""

Rounds = dict[str, list[float]]
"""What was measured of one level: by name the milliseconds of each round, as many for each name."""


def times_key(module: nn.Module, example_input: Tensor, answers: Tensor, about: str) -> str:
    """Return a digest of a network, its input's shape, the engine's code, this machine's processor, and whatever else times depend on."""
    shape = torch.tensor(example_input.shape)
    machine = f"{platform.machine()} {platform.processor()} {os.cpu_count()}"
    return scan_key(module, (shape,), answers, f"{example_input.dtype} {machine} {_engine_code()} {about}")


@cache
def _engine_code() -> str:
    """A digest of the engine's sources: another release may be faster."""
    digest = hashlib.sha256()
    for source in sorted((Path(__file__).parents[1] / "inference").rglob("*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()


class TimesFile:
    """The times of one network.

    Parameters
    ----------
    key : str
        From `times_key`.
    folder : Path, optional
        Without one, nothing is kept.
    """

    def __init__(self, key: str, folder: Path | None) -> None:
        self._path = None if folder is None else folder / f"{key}{SUFFIX}"
        self._levels: dict[float, Rounds] = {}
        self._dense_ms = 0.0
        if self._path is not None:
            with contextlib.suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
                content = json.loads(self._path.read_text(encoding="utf-8"))
                if content["format"] == _FORMAT:
                    levels = {float(level): _checked(rounds) for level, rounds in content["levels"].items()}
                    self._dense_ms, self._levels = _milliseconds(content["dense_ms"]), levels
                os.utime(self._path)  # what is in use stays

    def rounds(self, dense_ms: float) -> dict[float, Rounds]:
        """Return what was kept of each level, in the milliseconds of a moment at which the dense network takes `dense_ms`; nothing when that cannot be."""
        if (
            not self._levels
            or not self._dense_ms
            or not 1 / _SAME_MACHINE <= dense_ms / self._dense_ms <= _SAME_MACHINE
        ):
            return {}
        factor = dense_ms / self._dense_ms
        return {
            level: {name: [ms * factor for ms in each] for name, each in rounds.items()}
            for level, rounds in self._levels.items()
        }

    def put(self, levels: dict[float, Rounds], dense_ms: float) -> None:
        """Keep the rounds of these levels, in milliseconds of a moment at which the dense network takes `dense_ms`, in place of what was kept of them."""
        if self._path is None:
            return
        self._levels = self.rounds(dense_ms) | levels
        self._dense_ms = dense_ms
        content = {"format": _FORMAT, "dense_ms": dense_ms, "levels": self._levels}
        with contextlib.suppress(OSError, FormatError):  # a disk that refuses costs time, and nothing else
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self._path, json.dumps(content).encode())
            held_below(self._path.parent, LIMIT_BYTES, (SUFFIX,))


def _milliseconds(value: Any) -> float:
    number = float(value)
    if not (math.isfinite(number) and number >= 0.0):
        raise ValueError(value)
    return number


def _checked(rounds: dict[str, list[float]]) -> Rounds:
    checked = {str(name): [_milliseconds(ms) for ms in each] for name, each in rounds.items()}
    if len({len(each) for each in checked.values()}) != 1:
        raise ValueError(rounds)
    return checked
