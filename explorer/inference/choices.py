"""Which kernel won on this machine, remembered, so that the same question is not timed twice.

A question is one layer as the engine sees it: its shapes, how many of its weights are zero (in steps of 1/32), the threads and the CPU. An answer is
kept in memory, and in one small JSON file beside the folder of cached machine code. A file that cannot be read, or that another user can have written, is ignored and
written anew: an answer is only ever a matter of speed, and one that names no present candidate is not used.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from explorer.inference.fork import EngineLock
from explorer.inference.native import cache_folder, read_own

_MOST_ANSWERS = 20_000
"""Answers kept in the file; the oldest go first."""


class ChoiceCache:
    """Questions and answers, both plain strings.

    Parameters
    ----------
    path : Path, optional
        The JSON file; without one, answers live as long as the process.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._lock = EngineLock()
        self._answers: dict[str, str] = _read(path)

    def get(self, question: str) -> str | None:
        """The answer, or None when it has not been found yet."""
        return self._answers.get(question)

    def put(self, answers: Mapping[str, str]) -> None:
        """Remember these, and write the file when anything is new. A disk that refuses costs the next process some time, nothing else."""
        with self._lock.inside():
            if all(self._answers.get(question) == answer for question, answer in answers.items()):
                return
            # Another process may have written since.
            self._answers = _read(self._path) | self._answers | dict(answers)
            if self._path is None:
                return
            kept = dict(list(self._answers.items())[-_MOST_ANSWERS:])
            with contextlib.suppress(OSError):
                self._path.parent.mkdir(parents=True, exist_ok=True)
                handle, name = tempfile.mkstemp(dir=self._path.parent)
                try:
                    with os.fdopen(handle, "w", encoding="utf-8") as file:
                        json.dump(kept, file)
                    Path(name).replace(self._path)
                finally:
                    Path(name).unlink(missing_ok=True)  # unless it has become the file


def _read(path: Path | None) -> dict[str, str]:
    text = read_own(path) if path is not None else None
    if text is None:
        return {}
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):  # the last: brackets that nobody closes
        return {}
    if not isinstance(content, dict):
        return {}
    return {q: a for q, a in content.items() if isinstance(a, str)}


@cache
def _cache_at(path: Path | None) -> ChoiceCache:
    return ChoiceCache(path)


def choice_cache() -> ChoiceCache:
    """The cache of this process, for the folder that the environment names now."""
    folder = cache_folder()
    return _cache_at(None if folder is None else folder.parent / "choices.json")
