"""Where what can be made again is kept on disk, and how it is held small.

Imports nothing of this project: every room may use it.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

__all__ = ["cache_contents", "cache_root", "clear_caches", "held_below"]


def cache_root() -> Path | None:
    """Return the folder of all caches: EXPLORER_CACHE, or the system's place for caches; None when switched off (EXPLORER_CACHE=off) or there is no home."""
    setting = os.environ.get("EXPLORER_CACHE")
    if setting == "off":
        return None
    if setting:
        return Path(setting)
    try:
        if sys.platform == "darwin":
            base = Path.home() / "Library" / "Caches"
        elif sys.platform == "win32":
            base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
        else:
            base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # no HOME, and a user that no list of users knows: usual in containers
        return None
    return base / "sparsity-explorer"


def held_below(folder: Path, limit_bytes: int, suffixes: tuple[str, ...]) -> None:
    """Delete the files that were not used for longest, until those with these suffixes take no more than `limit_bytes`.

    Safe beside other processes: one that reads a deleted file has it open, or makes it again; one whose unfinished file is deleted writes nothing.
    """
    found = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                with contextlib.suppress(OSError):
                    if entry.name.endswith(suffixes) and entry.is_file(follow_symlinks=False):
                        status = entry.stat(follow_symlinks=False)
                        found.append((status.st_mtime, status.st_size, entry.path))
    except OSError:
        return
    total = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if total <= limit_bytes:
            return
        with contextlib.suppress(OSError):
            Path(path).unlink()
            total -= size


# What this project keeps below `cache_root`: what it is called, and its files.
_KEPT = {
    "machine code": "kernels/*.o",
    "kernel choices": "choices.json",
    "sensitivity scans": "sensitivity/*.jsonl",
    "layer times": "sensitivity/*.times.json",
}


def cache_contents() -> dict[str, list[Path]]:
    """Return the files of each cache."""
    root = cache_root()
    if root is None:
        return {what: [] for what in _KEPT}
    return {what: sorted(root.glob(pattern)) for what, pattern in _KEPT.items()}


def clear_caches() -> int:
    """Delete these files, and no others; return how many are gone."""
    gone = 0
    for files in cache_contents().values():
        for path in files:
            with contextlib.suppress(OSError):
                path.unlink()
                gone += 1
    return gone
