"""Everything that was measured, in one immutable object that charts, solver and files read.

Invariants: raw points are kept as they came, the latest of equal keys counts; a table never changes, it is replaced by a
larger one. Values between levels are read from monotone curves, since noise must not tell the solver that more zeros cost less loss
or more time.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from explorer.errors import DistributionError, FormatError
from explorer.sensitivity.points import KINDS, WHOLE_NETWORK, SensitivityPoint

if TYPE_CHECKING:
    import pandas as pd

    from explorer.sensitivity.summary import Summary

_FORMAT = "sparsity-explorer/sensitivity"
_FORMAT_VERSION = 1
# Loss-like values can only rise with sparsity, these can only fall.
_FALLING = frozenset({"accuracy", "latency_ms"})
# A fitted scale outside says that something else went wrong.
_SCALES = (0.8, 1.5)

_Curve = tuple[NDArray[np.float64], NDArray[np.float64]]


def _with_bends(levels: NDArray[np.float64], values: NDArray[np.float64]) -> _Curve:
    """Return a latency curve with the corners that lie between its levels.

    A layer takes the smaller of its dense kernel's time, which is constant, and its sparse kernel's, which is linear in sparsity. Straight
    lines between levels would cut the corner, and a solver would buy time there that is not for sale.
    """
    corners = []
    for i in range(levels.size - 2):
        slope = (values[i + 2] - values[i + 1]) / (levels[i + 2] - levels[i + 1])
        if slope < 0.0:
            with np.errstate(over="ignore"):  # of hardly any slope: infinitely far to the left
                at = levels[i + 1] + (values[i] - values[i + 1]) / slope
            if levels[i] < at < levels[i + 1]:
                corners.append((i + 1, at, values[i]))
    if not corners:
        return levels, values
    before = [i for i, _, _ in corners]
    return np.insert(levels, before, [at for _, at, _ in corners]), np.insert(
        values, before, [value for _, _, value in corners]
    )


class SensitivityTable:
    """Measured sensitivity of each layer, immutable.

    Build one with `from_points`, grow it with `merge`. Two tables are equal when they hold the same points, layers in the same order,
    and the same metadata.

    Examples
    --------
    >>> table = SensitivityTable.from_points(
    ...     [
    ...         SensitivityPoint("conv1", 0.0, "kl", 0.0),
    ...         SensitivityPoint("conv1", 0.5, "kl", 0.2),
    ...         SensitivityPoint("conv1", 0.9, "kl", 0.1),
    ...     ]
    ... )
    >>> table.value("conv1", 0.25, "kl"), table.value("conv1", 0.9, "kl")
    (0.1, 0.2)
    """

    __slots__ = ("_cells", "_curves", "_layers", "_metadata")

    def __init__(
        self,
        points: Iterable[SensitivityPoint],
        *,
        layers: Sequence[str] | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        cells: dict[tuple[str, str, bool, float], SensitivityPoint] = {}
        for point in points:
            if point.kind not in KINDS:
                raise FormatError(
                    f"Point of layer {point.layer!r} has kind {point.kind!r}; known kinds are {', '.join(KINDS)}."
                )
            if not 0.0 <= point.sparsity < 1.0:
                raise FormatError(
                    f"Point of layer {point.layer!r} has sparsity {point.sparsity!r}; it must lie in [0, 1)."
                )
            cells[point.kind, point.layer, point.refreshed, point.sparsity] = point
        self._cells = cells
        order = list(layers or ())
        known = set(order)
        for kind, layer, _, _ in cells:
            # A latency without a layer is the whole network's; any other value without a name is of a network that is one layer.
            if layer not in known and (layer != WHOLE_NETWORK or kind != "latency_ms"):
                known.add(layer)
                order.append(layer)
        self._layers = tuple(order)
        self._metadata = MappingProxyType(dict(metadata or {}))
        self._curves: dict[tuple[str, str, bool], _Curve] | None = None

    @classmethod
    def from_points(
        cls,
        points: Iterable[SensitivityPoint],
        *,
        layers: Sequence[str] | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> Self:
        """Collect points.

        Parameters
        ----------
        points : iterable of SensitivityPoint
            In any order; of two with the same layer, sparsity, kind and refresh the later one counts.
        layers : sequence of str, optional
            Order of the layers; by default that of their first points.
        metadata : mapping, optional
            What the points belong to, JSON values: "baseline_latency_ms", threads, number of images ...

        Raises
        ------
        FormatError
            If a point has an unknown kind or a sparsity outside [0, 1).
        """
        return cls(points, layers=layers, metadata=metadata)

    # What is there

    @property
    def points(self) -> tuple[SensitivityPoint, ...]:
        """Raw points, as they came."""
        return tuple(self._cells.values())

    @property
    def layers(self) -> tuple[str, ...]:
        """Layer names, in order."""
        return self._layers

    @property
    def metadata(self) -> Mapping[str, Any]:
        """What the points belong to (read only)."""
        return self._metadata

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of which there is at least one point."""
        present = {key[0] for key in self._cells}
        return tuple(kind for kind in KINDS if kind in present)

    def __len__(self) -> int:
        return len(self._cells)

    def __repr__(self) -> str:
        kinds = ", ".join(self.kinds) or "no points"
        return f"SensitivityTable({len(self._layers)} layers, {len(self)} points: {kinds})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SensitivityTable):
            return NotImplemented
        return (
            self._layers == other._layers
            and self._cells == other._cells
            and self._metadata == other._metadata
        )

    def __hash__(self) -> int:
        return hash((self._layers, frozenset(self._cells.items())))

    def levels(
        self, kind: str = "kl", layer: str | None = None, *, refreshed: bool = False
    ) -> tuple[float, ...]:
        """Return the measured sparsities of a kind, ascending; of one layer, or of any of them."""
        return tuple(
            sorted(
                {s for k, name, r, s in self._cells if k == kind and r == refreshed and layer in (None, name)}
            )
        )

    def point(
        self, layer: str, sparsity: float, kind: str, *, refreshed: bool = False
    ) -> SensitivityPoint | None:
        """Return the raw point at exactly this sparsity, or None."""
        return self._cells.get((kind, layer, refreshed, sparsity))

    def no_ops(self) -> tuple[tuple[str, float], ...]:
        """Return the (layer, sparsity) pairs at which pruning removed nothing, because the layer was already that sparse."""
        return tuple(
            dict.fromkeys(
                (p.layer, p.sparsity) for p in self._cells.values() if p.sparsity > 0 and p.n_removed == 0
            )
        )

    # Values

    def values(self, kind: str, *, refreshed: bool = False) -> NDArray[np.float64]:
        """Return raw values.

        Returns
        -------
        ndarray
            ``(len(layers), len(levels(kind)))`` float64; NaN where nothing was measured.
        """
        return self._matrix(kind, refreshed, "value")

    def std_errors(self, kind: str, *, refreshed: bool = False) -> NDArray[np.float64]:
        """Return standard errors, shaped like `values`; NaN where unknown."""
        return self._matrix(kind, refreshed, "std_error")

    def _matrix(self, kind: str, refreshed: bool, attribute: str) -> NDArray[np.float64]:
        self._check_kind(kind)
        column = {level: i for i, level in enumerate(self.levels(kind, refreshed=refreshed))}
        row = {layer: i for i, layer in enumerate(self._layers)}
        out = np.full((len(row), len(column)), np.nan)
        for (k, layer, r, sparsity), point in self._cells.items():
            value = getattr(point, attribute)
            if k == kind and r == refreshed and layer in row and value is not None:
                out[row[layer], column[sparsity]] = value
        return out

    def curve(self, layer: str, kind: str, *, refreshed: bool = False) -> _Curve:
        """Return a layer's monotone curve through its measured levels.

        Loss-like kinds are a running maximum over sparsity, accuracy and latency a running minimum.

        Returns
        -------
        levels, values : ndarray
            ``(n,)`` float64 each, levels ascending.

        Raises
        ------
        DistributionError
            If the layer has no such points; the message says which layers and kinds there are.
        """
        if self._curves is None:
            self._curves = self._build_curves()
        found = self._curves.get((layer, kind, refreshed))
        if found is None:
            self._check_kind(kind)
            if layer not in self._layers and not (layer == WHOLE_NETWORK and kind == "latency_ms"):
                raise DistributionError(
                    f"The table has no layer {layer!r}; it has {', '.join(self._layers) or 'none'}."
                )
            how = " with refreshed BatchNorm statistics" if refreshed else ""
            raise DistributionError(
                f"{kind!r} of layer {layer!r}{how} has not been measured; measure the sensitivity first."
            )
        return found

    def _build_curves(self) -> dict[tuple[str, str, bool], _Curve]:
        gathered: dict[tuple[str, str, bool], list[tuple[float, float]]] = {}
        for (kind, layer, refreshed, sparsity), point in self._cells.items():
            gathered.setdefault((layer, kind, refreshed), []).append((sparsity, point.value))
        curves: dict[tuple[str, str, bool], _Curve] = {}
        for key, pairs in gathered.items():
            array = np.asarray(sorted(pairs), dtype=np.float64)
            levels, values = array[:, 0], array[:, 1]
            running = np.minimum if key[1] in _FALLING else np.maximum
            curves[key] = (levels, running.accumulate(values))
        return curves

    def has(self, layer: str, kind: str, *, refreshed: bool = False) -> bool:
        """Tell whether the layer has at least one point of the kind."""
        if self._curves is None:
            self._curves = self._build_curves()
        return (layer, kind, refreshed) in self._curves

    def value(self, layer: str, sparsity: float, kind: str = "kl", *, refreshed: bool = False) -> float:
        """Read a layer's monotone curve at one sparsity, linear between measured levels.

        A latency bends where the sparse kernel begins to be faster than the dense one: below that the layer takes its dense time. The bend
        is where the line through the next two levels, drawn on, reaches the value before. Outside the measured range the nearest
        measured level's value is returned.
        """
        return float(self.values_at(layer, np.asarray([sparsity]), kind, refreshed=refreshed)[0])

    def values_at(
        self, layer: str, sparsities: NDArray[np.float64], kind: str = "kl", *, refreshed: bool = False
    ) -> NDArray[np.float64]:
        """Read a layer's monotone curve at many sparsities: ``(n,)`` float64 in and out."""
        levels, values = self.knots(layer, kind, refreshed=refreshed)
        return np.interp(sparsities, levels, values)

    def knots(self, layer: str, kind: str = "kl", *, refreshed: bool = False) -> _Curve:
        """Return what `value` interpolates: a layer's monotone curve with the corners of a latency, ``(n,)`` float64 levels and values."""
        levels, values = self.curve(layer, kind, refreshed=refreshed)
        return _with_bends(levels, values) if kind == "latency_ms" else (levels, values)

    def break_even(self, layer: str, tolerance: float = 0.02) -> float | None:
        """Return the sparsity from which the sparse kernel is faster than the dense one, as measured in the running network.

        After the last measured level that is not faster: one lucky level below does not count. Faster means by more than `tolerance`, a share of the dense time that
        is the noise of a quiet machine. Between two levels it is read from a straight line, or from the line through the next two levels, drawn on, where that
        comes later: a layer takes its dense time as long as that is less. None where the last level is not faster.

        Raises
        ------
        DistributionError
            If the layer's latency was not measured at sparsity 0.
        """
        levels, _ = self.curve(layer, "latency_ms")
        if levels[0] != 0.0:
            raise DistributionError(
                f"The dense latency of layer {layer!r} has not been measured, so it has nothing to break even with."
            )
        values = np.array([self._cells["latency_ms", layer, False, float(level)].value for level in levels])
        limit = (1.0 - tolerance) * values[0]
        last = int(np.flatnonzero(values >= limit)[-1])
        if last == levels.size - 1:
            return None
        after = last + 1
        share = (values[last] - limit) / (values[last] - values[after])
        crossing = levels[last] + share * (levels[after] - levels[last])
        if after + 1 < levels.size and values[after + 1] < values[after]:
            slope = (levels[after + 1] - levels[after]) / (values[after] - values[after + 1])
            crossing = max(crossing, levels[after] - (limit - values[after]) * slope)
        return float(crossing)

    def std_error_at(
        self, layer: str, sparsity: float, kind: str, *, refreshed: bool = False
    ) -> float | None:
        """Return the larger standard error of the two measured levels around `sparsity`, None when it is unknown."""
        levels = self.levels(kind, layer, refreshed=refreshed)
        if not levels:
            return None
        at = int(np.searchsorted(levels, sparsity))
        around = {levels[min(at, len(levels) - 1)]}
        if at > 0 and sparsity not in around:
            around.add(levels[at - 1])
        errors = [self._cells[kind, layer, refreshed, level].std_error for level in around]
        known = [error for error in errors if error is not None]
        return max(known) if known else None

    def baseline(self, kind: str) -> float | None:
        """Return the dense network's value: of its outputs for losses, of the engine's dense run for latency. None if not measured."""
        self._check_kind(kind)
        if kind == "latency_ms":
            whole = self.point(WHOLE_NETWORK, 0.0, kind)
            return None if whole is None else whole.value
        for layer in self._layers:
            point = self.point(layer, 0.0, kind)
            if point is not None:
                return point.value
        return None

    # Latency of the whole

    @property
    def baseline_latency_ms(self) -> float | None:
        """Latency that a speed-up is counted against.

        It is the metadata's "baseline_latency_ms" (the fastest way to run the dense network that was measured on this machine); a table
        without it counts against the engine's own dense run.
        """
        given = self._metadata.get("baseline_latency_ms")
        return float(given) if given is not None else self.baseline("latency_ms")

    def _sums_and_wholes(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return, for each complete level, the sum of the layers' times and the whole network's time."""
        sums, wholes = [], []
        layers = [layer for layer in self._layers if layer != WHOLE_NETWORK]
        for level in self.levels("latency_ms", WHOLE_NETWORK):
            whole = self._cells["latency_ms", WHOLE_NETWORK, False, level].value
            parts = [self.point(layer, level, "latency_ms") for layer in layers]
            if not layers:
                sums.append(whole)  # the network is its one layer
                wholes.append(whole)
            elif all(part is not None for part in parts):
                sums.append(sum(part.value for part in parts if part is not None))
                wholes.append(whole)
        return np.asarray(sums, dtype=np.float64), np.asarray(wholes, dtype=np.float64)

    @property
    def latency_model(self) -> tuple[float, float] | None:
        """How layers' times make the network's: ``(fixed_ms, scale)`` with network = fixed_ms + scale * sum of layers.

        The scale is 1 where times add up. It is above 1 where work between the layers grows with them: a network that touches more
        memory leaves less of the caches to everything else, most of all on a busy machine. The two numbers make the sum of absolute
        relative errors over the measured levels least; an optimum passes through two of the points, so trying all pairs finds it. None
        before one level is complete; with fewer than three levels the scale is 1.
        """
        sums, wholes = self._sums_and_wholes()
        if not wholes.size:
            return None
        weights = 1.0 / np.maximum(wholes, 1e-9)  # timing noise grows with the time
        candidates = [(float(fixed), 1.0) for fixed in wholes - sums]
        if wholes.size >= 3:
            for i, j in itertools.combinations(range(wholes.size), 2):
                if abs(sums[i] - sums[j]) > 1e-9:
                    scale = float((wholes[i] - wholes[j]) / (sums[i] - sums[j]))
                    if _SCALES[0] <= scale <= _SCALES[1]:
                        candidates.append((float(wholes[i] - scale * sums[i]), scale))
        costs = [
            float((np.abs(wholes - fixed - scale * sums) * weights).sum()) for fixed, scale in candidates
        ]
        # Of equally good ones the first, whose scale is 1.
        return candidates[int(np.argmin(np.round(costs, 9)))]

    @property
    def fixed_latency_ms(self) -> float | None:
        """Time of the network outside its prunable layers, see `latency_model`; None before one level is complete."""
        model = self.latency_model
        return None if model is None else model[0]

    def network_latency_ms(self, layers_ms: float) -> float | None:
        """Return the network's time when its layers take `layers_ms` together; None before one level is complete."""
        model = self.latency_model
        return None if model is None else model[0] + model[1] * layers_ms

    @property
    def latency_error(self) -> float | None:
        """How far the network's time may be from `network_latency_ms`, as a share: `additive_error` and the spread over runs, root sum square."""
        missed = self.additive_error
        if missed is None:
            return None
        spreads = [
            point.std_error / point.value
            for (kind, layer, _, _), point in self._cells.items()
            if (kind, layer) == ("latency_ms", WHOLE_NETWORK)
            and point.std_error is not None
            and point.value > 0
        ]
        return float(np.hypot(missed, np.median(spreads) if spreads else 0.0))

    @property
    def additive_error(self) -> float | None:
        """Root mean square over levels of what `latency_model` misses, as a share of the whole; None when there is but one level."""
        sums, wholes = self._sums_and_wholes()
        model = self.latency_model
        if model is None or wholes.size < 2:
            return None
        misses = (wholes - model[0] - model[1] * sums) / np.maximum(wholes, 1e-9)
        return float(np.sqrt(np.mean(misses**2)))

    def summary(self, sparsity: float = 0.9, kind: str | None = None, *, refreshed: bool = False) -> Summary:
        """Return every layer at one sparsity at a glance, see `explorer.sensitivity.summary.summary`; printed, an aligned text."""
        from explorer.sensitivity.summary import summary

        return summary(self, sparsity, kind, refreshed=refreshed)

    # New tables from old

    def merge(self, other: SensitivityTable) -> SensitivityTable:
        """Return a table with the points of both; where both have one, that of `other` counts, as does its metadata."""
        order = list(dict.fromkeys([*self._layers, *other._layers]))
        return SensitivityTable(
            [*self.points, *other.points], layers=order, metadata={**self._metadata, **other._metadata}
        )

    def with_points(self, points: Iterable[SensitivityPoint]) -> SensitivityTable:
        """Return a table with these points as well."""
        return SensitivityTable([*self.points, *points], layers=self._layers, metadata=self._metadata)

    def with_metadata(self, **entries: Any) -> SensitivityTable:
        """Return a table whose metadata have these entries as well."""
        return SensitivityTable(self.points, layers=self._layers, metadata={**self._metadata, **entries})

    # In and out

    def to_records(self) -> list[dict[str, Any]]:
        """Return one dictionary a point, tidy: ``pandas.DataFrame(table.to_records())`` is a data frame."""
        return [asdict(point) for point in self._cells.values()]

    def to_json(self) -> str:
        """Return the table as a JSON text; `from_json` gives an equal table."""
        return json.dumps(
            {
                "format": _FORMAT,
                "version": _FORMAT_VERSION,
                "layers": list(self._layers),
                "metadata": dict(self._metadata),
                "points": self.to_records(),
            },
            allow_nan=False,
        )

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` wrote.

        Raises
        ------
        FormatError
            If the text is not such a table.
        """
        try:
            content = json.loads(text)
        except json.JSONDecodeError as error:
            raise FormatError(
                f"This is not JSON: {error}. Pass the text that SensitivityTable.to_json() wrote."
            ) from error
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            raise FormatError(f"This JSON is no sensitivity table: its 'format' must be {_FORMAT!r}.")
        if content.get("version") != _FORMAT_VERSION:
            raise FormatError(
                f"Sensitivity table version {content.get('version')!r}; this release reads version {_FORMAT_VERSION}."
            )
        names = {field.name for field in fields(SensitivityPoint)}
        points = []
        for record in content.get("points", []):
            unknown = set(record) - names
            if unknown:
                raise FormatError(
                    f"A point has unknown entries {sorted(unknown)}; known are {sorted(names)}."
                )
            try:
                points.append(SensitivityPoint(**record))
            except TypeError as error:
                raise FormatError(f"A point lacks entries: {record!r}.") from error
        return cls(points, layers=content.get("layers"), metadata=content.get("metadata"))

    def to_csv(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return the raw points as tidy CSV, and write them to `path`, see `explorer.sensitivity.exchange.to_csv`."""
        from explorer.sensitivity import exchange

        return exchange.to_csv(self, path)

    def to_frame(self) -> pd.DataFrame:
        """Return the raw points as a tidy pandas data frame, see `explorer.sensitivity.exchange.to_frame`."""
        from explorer.sensitivity import exchange

        return exchange.to_frame(self)

    def to_parquet(self, path: str | os.PathLike[str]) -> None:
        """Write the whole table as Parquet, see `explorer.sensitivity.exchange.to_parquet`."""
        from explorer.sensitivity import exchange

        exchange.to_parquet(self, path)

    @staticmethod
    def _check_kind(kind: str) -> None:
        if kind not in KINDS:
            raise DistributionError(f"Unknown kind {kind!r}; known are {', '.join(KINDS)}.")
