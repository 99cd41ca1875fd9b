"""Sensitivity tables as files of other tools: tidy CSV, data frames, Parquet; and what others measured, read from theirs.

A CSV is recognised by its header, so that one function reads all of them:

    layer,sparsity,kind,value,refreshed,std_error,n_removed   what `to_csv` writes, one point a line
    parameter,sparsity,top1,top5,loss                         Distiller's sensitivity analysis (IntelLabs/distiller, `sensitivity.csv`)
    layer,sparsity,latency_ms[,spread_ms]                     layer times measured elsewhere: plan here, deploy there

Pandas and pyarrow are asked for only by the functions that need them.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from explorer.atomic import write_atomically
from explorer.errors import FormatError
from explorer.sensitivity.points import KINDS, WHOLE_NETWORK, SensitivityPoint
from explorer.sensitivity.table import SensitivityTable

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["from_csv", "from_frame", "from_parquet", "to_csv", "to_frame", "to_parquet"]

PathLike = str | os.PathLike[str]
_Reader = Callable[[Mapping[str, str]], Iterator[SensitivityPoint]]

_COLUMNS = tuple(field.name for field in fields(SensitivityPoint))
_REQUIRED = ("layer", "sparsity", "kind", "value")
_DISTILLER = ("parameter", "sparsity", "top1", "top5", "loss")
_TIMINGS = ("layer", "sparsity", "latency_ms")
_KEY = b"sparsity-explorer"
# 0.15 is written as 0.15000000000000002 by tools that count in steps.
_DIGITS = 9


def to_csv(table: SensitivityTable, path: PathLike | None = None) -> str:
    """Write the raw points as tidy CSV, one a line; numbers are written in full.

    Parameters
    ----------
    table : SensitivityTable
    path : path, optional
        Where to write as well.

    Returns
    -------
    str
        The text. Metadata are not in it; `SensitivityTable.to_json` and `to_parquet` keep them.

    Raises
    ------
    FormatError
        If the file cannot be written.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, _COLUMNS, lineterminator="\n")
    writer.writeheader()
    for point in table.points:
        row = asdict(point)
        row["refreshed"] = int(point.refreshed)
        writer.writerow({name: "" if value is None else value for name, value in row.items()})
    if path is not None:
        write_atomically(path, text.getvalue().encode())
    return text.getvalue()


def from_csv(
    path: PathLike,
    *,
    layers: Iterable[str] | None = None,
    rename: Mapping[str, str] | Callable[[str], str] | None = None,
) -> SensitivityTable:
    """Read a tidy CSV of `to_csv`, Distiller's sensitivity analysis, or a table of layer times; see the head of this module.

    Distiller's names lose their ``module.`` (of data parallel wrappers) and ``.weight``; its top-1 accuracy, in per cent, becomes a fraction; its
    top-5 accuracy is not taken over. In a table of times an empty layer name is the whole network.

    Parameters
    ----------
    path : path
    layers : iterable of str, optional
        Layers to keep, by their new names, and their order; all by default. Naming one that is not there is an error.
    rename : mapping or callable, optional
        From the file's layer names to those wanted; names that a mapping lacks stay.

    Raises
    ------
    FormatError
        If the file cannot be read, has another header, or a line is wrong; the message names the line.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise FormatError(f"Cannot read {path}: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise FormatError(f"{path} is not UTF-8 text: {error}.") from error
    lines = csv.reader(io.StringIO(text))
    header = tuple(name.strip() for name in next(lines, []))
    rows = [(number, row) for number, row in enumerate(lines, start=2) if any(cell.strip() for cell in row)]
    readers = ((_tidy, _REQUIRED), (_distiller, _DISTILLER), (_timings, _TIMINGS))
    reader = next((reader for reader, required in readers if {*required} <= {*header}), None)
    if reader is None:
        raise FormatError(
            f"{path} begins with {','.join(header)!r}. Accepted are tidy points ({','.join(_COLUMNS)}), Distiller's sensitivity analysis "
            f"({','.join(_DISTILLER)}), and layer times ({','.join(_TIMINGS)})."
        )

    def cells(number: int, row: list[str]) -> dict[str, str]:
        if len(row) != len(header):
            raise FormatError(
                f"{path}, line {number}: {len(row)} values, but the header names {len(header)}."
            )
        return dict(zip(header, (cell.strip() for cell in row), strict=True))

    points = _read(reader, ((f"{path}, line {number}", cells(number, row)) for number, row in rows))
    if not points:
        raise FormatError(f"{path} holds a header and no values.")
    return _collected(points, path, layers, rename)


def to_frame(table: SensitivityTable) -> pd.DataFrame:
    """Return the raw points as a tidy pandas data frame, one a row.

    Raises
    ------
    FormatError
        If pandas is not installed.
    """
    pandas = _need("pandas")
    frame = pandas.DataFrame(table.to_records(), columns=list(_COLUMNS))
    return frame.astype({"std_error": "float64", "n_removed": "Int64", "refreshed": "bool"})


def from_frame(frame: pd.DataFrame) -> SensitivityTable:
    """Read a tidy data frame with the columns of `to_frame`, of which layer, sparsity, kind and value are required.

    Raises
    ------
    FormatError
        If a column is missing, or a row is wrong.
    """
    pandas = _need("pandas")
    missing = [name for name in _REQUIRED if name not in frame.columns]
    if missing:
        raise FormatError(
            f"The data frame lacks {', '.join(missing)}; it has {', '.join(map(str, frame.columns))}."
        )

    def cells(record: dict[Any, Any]) -> dict[str, str]:
        present = [name for name in _COLUMNS if name in record]
        return {name: "" if pandas.isna(record[name]) else str(record[name]) for name in present}

    records = enumerate(frame.to_dict("records"))
    points = _read(_tidy, ((f"Row {number} of the data frame", cells(record)) for number, record in records))
    return SensitivityTable.from_points(points)


def to_parquet(table: SensitivityTable, path: PathLike) -> None:
    """Write the whole table, with its metadata and the order of its layers, as Parquet.

    Raises
    ------
    FormatError
        If pyarrow is not installed, or the file cannot be written.
    """
    arrow, parquet = _need("pyarrow"), _need("pyarrow.parquet")
    types = {"layer": "string", "sparsity": "float64", "kind": "string", "value": "float64"}
    types |= {"refreshed": "bool_", "std_error": "float64", "n_removed": "int64"}
    about = {"layers": list(table.layers), "metadata": dict(table.metadata)}
    schema = arrow.schema(
        [(name, getattr(arrow, kind)()) for name, kind in types.items()],
        metadata={_KEY: json.dumps(about, allow_nan=False)},
    )
    buffer = io.BytesIO()
    parquet.write_table(arrow.Table.from_pylist(table.to_records(), schema=schema), buffer)
    write_atomically(path, buffer.getvalue())


def from_parquet(path: PathLike) -> SensitivityTable:
    """Read what `to_parquet` wrote, or any Parquet file with its columns.

    Raises
    ------
    FormatError
        If pyarrow is not installed, or the file is no such table.
    """
    arrow, parquet = _need("pyarrow"), _need("pyarrow.parquet")
    try:
        content = parquet.read_table(Path(path))
    except (OSError, arrow.ArrowInvalid) as error:
        raise FormatError(f"Cannot read {path} as Parquet: {error}.") from error
    missing = [name for name in _REQUIRED if name not in content.column_names]
    if missing:
        raise FormatError(f"{path} lacks the columns {', '.join(missing)}.")

    def cells(record: dict[str, Any]) -> dict[str, str]:
        return {name: "" if record.get(name) is None else str(record[name]) for name in _COLUMNS}

    records = enumerate(content.to_pylist())
    points = _read(_tidy, ((f"{path}, row {number}", cells(record)) for number, record in records))
    about = json.loads((content.schema.metadata or {}).get(_KEY, b"{}"))
    return SensitivityTable.from_points(points, layers=about.get("layers"), metadata=about.get("metadata"))


def _read(reader: _Reader, rows: Iterable[tuple[str, Mapping[str, str]]]) -> list[SensitivityPoint]:
    """The points of all rows; each comes with what an error calls it."""
    points: list[SensitivityPoint] = []
    for where, cells in rows:
        try:
            points += reader(cells)
        except ValueError as error:
            raise FormatError(f"{where}: {error}.") from error
    return points


# One reader for each header: the points of a line. What is wrong with it is a ValueError.


def _tidy(cells: Mapping[str, str]) -> Iterator[SensitivityPoint]:
    kind = cells["kind"]
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; known are {', '.join(KINDS)}")
    error, removed = cells.get("std_error", ""), cells.get("n_removed", "")
    yield SensitivityPoint(
        cells["layer"],
        _sparsity(cells["sparsity"]),
        kind,
        _number("value", cells["value"]),
        _flag(cells.get("refreshed", "")),
        _number("std_error", error) if error else None,
        int(_number("n_removed", removed)) if removed else None,
    )


def _distiller(cells: Mapping[str, str]) -> Iterator[SensitivityPoint]:
    parts = cells["parameter"].split(".")
    if parts[-1] != "weight":
        raise ValueError(f"parameter is {cells['parameter']!r}; names of weights end with '.weight'")
    layer = ".".join(part for part in parts[:-1] if part != "module")
    sparsity = _sparsity(cells["sparsity"])
    yield SensitivityPoint(layer, sparsity, "loss", _number("loss", cells["loss"]))
    accuracy = _number("top1", cells["top1"])
    if not 0.0 <= accuracy <= 100.0:
        raise ValueError(f"top1 is {cells['top1']}; it is a percentage")
    yield SensitivityPoint(layer, sparsity, "accuracy", accuracy / 100.0)


def _timings(cells: Mapping[str, str]) -> Iterator[SensitivityPoint]:
    ms = _number("latency_ms", cells["latency_ms"])
    if ms < 0.0:
        raise ValueError(f"latency_ms is {cells['latency_ms']}; a time cannot be negative")
    spread = cells.get("spread_ms", "")
    yield SensitivityPoint(
        cells["layer"],
        _sparsity(cells["sparsity"]),
        "latency_ms",
        ms,
        std_error=_number("spread_ms", spread) if spread else None,
    )


def _sparsity(text: str) -> float:
    value = round(_number("sparsity", text), _DIGITS)
    if not 0.0 <= value < 1.0:
        raise ValueError(f"sparsity is {text}; it is a fraction of zeros, in [0, 1)")
    return value


def _number(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"{name} is {text!r}, which is no number") from None
    if not math.isfinite(value):
        raise ValueError(f"{name} is {text}; only finite numbers can be used")
    return value


def _flag(text: str) -> bool:
    known = {"": False, "0": False, "false": False, "1": True, "true": True}
    if text.lower() not in known:
        raise ValueError(f"refreshed is {text!r}; it is 0 or 1")
    return known[text.lower()]


def _collected(
    points: Sequence[SensitivityPoint],
    path: PathLike,
    layers: Iterable[str] | None,
    rename: Mapping[str, str] | Callable[[str], str] | None,
) -> SensitivityTable:
    if rename is not None:
        new: Callable[[str], str] = rename if callable(rename) else lambda name: rename.get(name, name)
        old_of: dict[str, str] = {}
        for point in points:
            other = old_of.setdefault(new(point.layer), point.layer)
            if other != point.layer:
                raise FormatError(
                    f"Both {other!r} and {point.layer!r} of {path} would be called {new(point.layer)!r}."
                )
        points = [SensitivityPoint(**{**asdict(point), "layer": new(point.layer)}) for point in points]
    if layers is None:
        return SensitivityTable.from_points(points)
    wanted = list(layers)
    present = {point.layer for point in points}
    absent = [name for name in wanted if name not in present]
    if absent:
        raise FormatError(
            f"{path} has no values of {', '.join(absent)}; it has {', '.join(sorted(present - {WHOLE_NETWORK}))}. "
            "Pass `rename` where layers have other names there."
        )
    kept = [point for point in points if point.layer in {*wanted, WHOLE_NETWORK}]
    return SensitivityTable.from_points(kept, layers=wanted)


def _need(module: str) -> Any:
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise FormatError(
            f"This needs {package}, which is not installed: pip install {package}. CSV and JSON need nothing more."
        ) from error
