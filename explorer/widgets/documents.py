"""What a study leaves as files: recipe, measurements and report, by themselves and beside the weights of a run."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from explorer.widgets.runs import RunRecord


def sizes(study: Any, result: Any) -> tuple[int, int]:
    """Return the bytes of the weights before, and after with zeros left out."""
    from explorer.formats import dense_bytes, packed_bytes

    return dense_bytes(study.model.module), packed_bytes(result.module)


def recipe_text(study: Any, distribution: Any, settings: Mapping[str, Any]) -> str:
    """Return the recipe of the distribution as YAML; where nothing can be trained, the distribution alone."""
    from explorer.distribution import SparsityDistribution

    known = SparsityDistribution(dict(distribution), distribution.locked, distribution.groups)
    return str(study.recipe_of(known, **settings).to_yaml()) if settings else known.to_yaml()


def measurements(study: Any) -> str:
    """Return every measured point as CSV."""
    from explorer.sensitivity.exchange import to_csv

    return to_csv(study.table)


def report(study: Any, run: RunRecord | None, distribution: Any, settings: Mapping[str, Any]) -> bytes:
    """Return the report of a run, or without one of the distribution."""
    with tempfile.TemporaryDirectory(prefix="sparsity-explorer-") as folder:
        path = Path(folder) / "report.html"
        if run is not None:
            study.report(path, run.result, latency=run.final)
        else:
            study.report(path, distribution=distribution, **settings)
        return path.read_bytes()


def add_documents(study: Any, result: Any, folder: Path, times: Any) -> None:
    """Put what can be read without this program beside the result."""
    study.report(folder / "report.html", result, latency=times)
    if study.table is not None:
        (folder / "measurements.csv").write_text(measurements(study), encoding="utf-8")


def file_name(name: str) -> str:
    """Return `name` with only characters that every file system takes."""
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in name).strip("-.") or "model"


def told_bytes(size: int) -> str:
    """Return a size in words, such as "1.5 MB"; units are powers of 1000."""
    if size >= 1e9:
        return f"{size / 1e9:.1f} GB"
    return f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"
