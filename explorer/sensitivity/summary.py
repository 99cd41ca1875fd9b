"""A table at a glance: for each layer how much it minds one sparsity, how sure that is, and what the sparsity brings it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from explorer.errors import DistributionError
from explorer.sensitivity.ranking import ranking
from explorer.sensitivity.table import SensitivityTable

__all__ = ["LayerSummary", "Summary", "summary"]

_PREFERRED = ("kl", "loss", "accuracy", "fisher", "removed_energy")


@dataclass(frozen=True, slots=True)
class LayerSummary:
    """One layer at one sparsity.

    Attributes
    ----------
    layer : str
    value : float or None
        Of the summary's kind (of accuracy what was lost); None where nothing is known, because the layer was that sparse already, or was not measured.
    low, high : float or None
        The band of `value` at the nearest measured level, see `explorer.sensitivity.estimates`.
    place : (int, int) or None
        First and last place, counted from 1 for the most sensitive, that the errors allow.
    dense_ms, pruned_ms : float or None
        Latency of the layer.
    break_even : float or None
        Sparsity from which it is faster than dense.
    """

    layer: str
    value: float | None
    low: float | None
    high: float | None
    place: tuple[int, int] | None
    dense_ms: float | None
    pruned_ms: float | None
    break_even: float | None


@dataclass(frozen=True, slots=True)
class Summary(Sequence[LayerSummary]):
    """Layers in the table's order; printed, an aligned text."""

    layers: tuple[LayerSummary, ...]
    sparsity: float
    kind: str

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, at):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN204 - a sequence's own
        return self.layers[at]

    def __iter__(self) -> Iterator[LayerSummary]:
        return iter(self.layers)

    def __str__(self) -> str:
        header = (
            "layer",
            self.kind,
            "95 % band",
            "place",
            "dense ms",
            f"at {self.sparsity:.4g}",
            "faster from",
        )
        rows = [header, *(self._row(one) for one in self.layers)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
        lines = [
            "  ".join(
                cell.rjust(width) if i else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]
        return "\n".join(lines)

    @staticmethod
    def _row(one: LayerSummary) -> tuple[str, ...]:
        def number(value: float | None, form: str) -> str:
            return "" if value is None else format(value, form)

        place = "" if one.place is None else "-".join(map(str, dict.fromkeys(one.place)))
        band = "" if one.low is None or one.high is None else f"{one.low:.3g} to {one.high:.3g}"
        return (
            one.layer or "model",
            "unknown" if one.value is None else f"{one.value:.4g}",
            band,
            place,
            number(one.dense_ms, ".3g"),
            number(one.pruned_ms, ".3g"),
            number(one.break_even, ".0%"),
        )


def summary(
    table: SensitivityTable, sparsity: float = 0.9, kind: str | None = None, *, refreshed: bool = False
) -> Summary:
    """Summarise every layer at one sparsity.

    Parameters
    ----------
    table : SensitivityTable
    sparsity : float
        In [0, 1).
    kind : str, optional
        By default the first that was measured of kl, loss, accuracy, fisher, removed_energy.
    refreshed : bool

    Raises
    ------
    DistributionError
        If nothing was measured that tells of sensitivity, or `sparsity` is out of range.
    """
    if not 0.0 <= sparsity < 1.0:
        raise DistributionError(
            f"sparsity is a fraction of zeros in [0, 1); got {sparsity!r}. Write 90 % as 0.9."
        )
    chosen = kind or next((one for one in _PREFERRED if one in table.kinds), None)
    if chosen is None:
        raise DistributionError("No loss of any kind has been measured; measure the sensitivity first.")
    ranked = {one.layer: one for one in ranking(table, sparsity, chosen, refreshed=refreshed)}
    levels = table.levels(chosen, refreshed=refreshed)
    nearest = min(levels, key=lambda level: abs(level - sparsity))
    rows = []
    for layer in table.layers:
        one = ranked.get(layer)
        known = one is not None and one.is_known
        point = table.point(layer, nearest, chosen, refreshed=refreshed) if known else None
        is_timed = table.has(layer, "latency_ms")
        rows.append(
            LayerSummary(
                layer,
                one.value if one is not None and known else None,
                point.low if point is not None and chosen != "accuracy" else None,
                point.high if point is not None and chosen != "accuracy" else None,
                (one.lowest + 1, one.highest + 1) if one is not None and known else None,
                table.value(layer, 0.0, "latency_ms") if is_timed else None,
                table.value(layer, sparsity, "latency_ms") if is_timed else None,
                table.break_even(layer)
                if is_timed and table.point(layer, 0.0, "latency_ms") is not None
                else None,
            )
        )
    return Summary(tuple(rows), sparsity, chosen)
