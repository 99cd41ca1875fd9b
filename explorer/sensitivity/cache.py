"""Measured losses on disk, so that a scan goes on where it was stopped, also in another process, and is not made twice.

One text file a scan, and in it a line of JSON for each cell, written as cells are measured. Its name is a digest of all that the numbers depend on: the
weights and the structure of the network, what it answers to a few images, the data, the code that measures, and the version of torch. A line that is cut short, or no
cell, is measured again; a disk that refuses costs time, and nothing else.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Iterable
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from explorer.folders import cache_root, held_below
from explorer.sensitivity.points import KINDS, SensitivityPoint

__all__ = ["LIMIT_BYTES", "CellCache", "cache_folder", "scan_key"]

LIMIT_BYTES = 64 << 20
"""Scans of some thousand networks."""

_SUFFIX = ".jsonl"

Cell = tuple[str, float, bool]
"""Layer, sparsity, and whether BatchNorm statistics were refreshed."""


def cache_folder() -> Path | None:
    """Where scans are kept; None when caches are switched off."""
    root = cache_root()
    return None if root is None else root / "sensitivity"


def scan_key(module: nn.Module, tensors: Iterable[Tensor | None], answers: Tensor, about: str) -> str:
    """Return a digest of a network, of data, and of how they are used.

    Parameters
    ----------
    module : nn.Module
        Its parameters and buffers count bit for bit, and its printed structure.
    tensors : iterable of Tensor or None
        Inputs, labels, calibration images.
    answers : Tensor
        The network's outputs for a few images, to three digits: code that computes something else with the same weights is another network.
    about : str
        Whatever else the numbers depend on.
    """
    digest = hashlib.sha256(
        f"{_measuring_code()} {torch.__version__} {type(module).__qualname__} {module!r} {about}".encode()
    )
    for name, value in module.state_dict().items():
        digest.update(name.encode())
        _update(digest, value if isinstance(value, Tensor) else None)
    for tensor in tensors:
        _update(digest, tensor)
    rounded = [f"{value:.3g}" for value in answers.double().flatten().tolist()]
    digest.update(" ".join(rounded).encode())
    return digest.hexdigest()


@cache
def _measuring_code() -> str:
    """A digest of the code that measures: numbers of an earlier release are not this one's."""
    digest = hashlib.sha256()
    here = Path(__file__).parent
    for source in (*sorted(here.glob("*.py")), here.parent / "masks.py"):
        digest.update(source.read_bytes())
    return digest.hexdigest()


def _update(digest: Any, tensor: Tensor | None) -> None:
    if tensor is None:
        digest.update(b"none")
        return
    digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    flat = torch.empty(tensor.numel(), dtype=tensor.dtype)
    flat.copy_(tensor.detach().flatten())
    digest.update(flat.view(torch.uint8).numpy())


class CellCache:
    """The cells of one scan.

    Parameters
    ----------
    key : str
        From `scan_key`.
    folder : Path, optional
        Without one, nothing is kept.
    """

    def __init__(self, key: str, folder: Path | None) -> None:
        self._path = None if folder is None else folder / f"{key}{_SUFFIX}"
        self._cells: dict[Cell, tuple[SensitivityPoint, ...]] = {}
        if self._path is not None:
            with contextlib.suppress(OSError, UnicodeDecodeError):
                for line in self._path.read_text(encoding="utf-8").splitlines():
                    points = _parsed(line)
                    if points:
                        first = points[0]
                        self._cells[first.layer, first.sparsity, first.refreshed] = points
                os.utime(self._path)  # what is in use stays

    def __len__(self) -> int:
        return len(self._cells)

    def get(self, layer: str, sparsity: float, *, refreshed: bool) -> tuple[SensitivityPoint, ...] | None:
        """Return the points of a cell, or None when it has not been measured."""
        return self._cells.get((layer, sparsity, refreshed))

    def put(self, points: tuple[SensitivityPoint, ...]) -> None:
        """Keep the points of one cell, the first of which says which it is."""
        first = points[0]
        self._cells[first.layer, first.sparsity, first.refreshed] = points
        if self._path is None:
            return
        # Begun with the line break: one that was cut short spoils only itself.
        line = "\n" + json.dumps([asdict(point) for point in points], allow_nan=False)
        with contextlib.suppress(OSError):
            is_new = not self._path.exists()
            self._path.parent.mkdir(parents=True, exist_ok=True)
            # One write, at the end: lines of two processes do not mix.
            with self._path.open("ab", buffering=0) as file:
                file.write(line.encode())
            if is_new:
                held_below(self._path.parent, LIMIT_BYTES, (_SUFFIX,))


def _parsed(line: str) -> tuple[SensitivityPoint, ...]:
    """The points of a line; none where it is no cell."""
    try:
        records = json.loads(line)
        points = tuple(SensitivityPoint(**record) for record in records)
    except (ValueError, TypeError):
        return ()
    right = all(
        isinstance(p.layer, str)
        and p.kind in KINDS
        and isinstance(p.value, float | int)
        and math.isfinite(p.value)
        and 0.0 <= p.sparsity < 1.0
        for p in points
    )
    same = len({(p.layer, p.sparsity) for p in points}) == 1
    return points if right and same else ()
