"""What was measured, as values and as a JSON file: a long run is interrupted, goes on another day, and must say so."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from explorer.bench.engines import Absence, Comparison, EngineTiming
from explorer.bench.surroundings import Probe
from explorer.errors import FormatError
from explorer.inference.timing import Benchmark

__all__ = ["Combination", "Record", "Results"]

_FORMAT = 1


@dataclass(frozen=True, slots=True)
class Combination:
    """What the engines are compared on.

    Attributes
    ----------
    network : str
        As the command line names it.
    sparsity : float
        Fraction of zeros in each pruned layer, in [0, 1).
    threads, batch_size : int
    """

    network: str
    sparsity: float
    threads: int
    batch_size: int

    def __str__(self) -> str:
        return (
            f"{self.network}, sparsity {self.sparsity:g}, batch {self.batch_size}, {self.threads} thread(s)"
        )


@dataclass(frozen=True, slots=True)
class Record:
    """One combination, measured.

    Attributes
    ----------
    combination : Combination
    rule : str
        Which layers are pruned.
    date : str
        When it was measured.
    run : str
        When the run that measured it began; records of one run share it.
    command : str
        What that run was started with.
    comparison : Comparison
    """

    combination: Combination
    rule: str
    date: str
    run: str
    command: str
    comparison: Comparison

    @property
    def timings(self) -> tuple[EngineTiming, ...]:
        """Of its comparison."""
        return self.comparison.timings

    @property
    def absences(self) -> tuple[Absence, ...]:
        """Of its comparison."""
        return self.comparison.absences

    def median_ms(self, contestant: str) -> float | None:
        """Return the median of one contestant, None when it was not timed."""
        return next((t.benchmark.latency_ms for t in self.timings if t.contestant == contestant), None)


@dataclass(frozen=True, slots=True)
class Results:
    """All records of one machine.

    Attributes
    ----------
    machine : dict
        As `explorer.bench.surroundings.machine` describes it.
    records : tuple of Record
    """

    machine: dict[str, Any]
    records: tuple[Record, ...]

    def find(self, combination: Combination, contestants: Sequence[str] = ()) -> Record | None:
        """Return the record of a combination in which all these contestants were timed or failed, if there is one."""
        for record in self.records:
            met = {one.contestant for one in record.timings} | {one.contestant for one in record.absences}
            if record.combination == combination and met.issuperset(contestants):
                return record
        return None

    def noise(self, record: Record) -> float:
        """How much slower the probe's slowest turn of this record was than the fastest of all with as many threads, as a fraction.

        A machine that is busy throughout one combination shows no difference within it, but beside a quieter one.
        """
        mine = record.comparison.probe
        fastest = min(self.fastest_probe_ms(record.combination.threads), mine.fastest_ms)
        return mine.slowest_ms / fastest - 1.0

    def fastest_probe_ms(self, threads: int) -> float:
        """What the probe took at its fastest with so many threads; infinite where there is no record."""
        alike = (one for one in self.records if one.combination.threads == threads)
        return min((one.comparison.probe.fastest_ms for one in alike), default=float("inf"))

    def with_record(self, record: Record) -> Results:
        """Return these results with one more record, in place of an earlier one of the same combination."""
        others = [one for one in self.records if one.combination != record.combination]
        return Results(self.machine, (*others, record))

    def check_machine(self, here: dict[str, Any], path: Path) -> None:
        """Refuse to go on with what another machine measured.

        Raises
        ------
        FormatError
            If `here` is not the machine of these results.
        """
        keys = [
            key for key in {**self.machine, **here} if key != "system"
        ]  # which may have been updated since
        differing = [key for key in keys if self.machine.get(key) != here.get(key)]
        if differing:
            told = "; ".join(
                f"{key}: {self.machine.get(key)} there, {here.get(key)} here" for key in differing
            )
            raise FormatError(
                f"{path} was measured on another machine ({told}). Times of two machines do not belong in one table; name another file."
            )

    def to_json(self) -> str:
        """Write everything as JSON."""
        document = {
            "format": _FORMAT,
            "machine": self.machine,
            "records": [dataclasses.asdict(record) for record in self.records],
        }
        return json.dumps(document, indent=1) + "\n"

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read what `to_json` wrote.

        Raises
        ------
        FormatError
            If the file holds anything else.
        """
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            if document["format"] != _FORMAT:
                raise FormatError(
                    f"{path} has format {document['format']}, this version reads {_FORMAT}; name another file."
                )
            return cls(document["machine"], tuple(_record(one) for one in document["records"]))
        except FormatError:
            raise
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise FormatError(
                f"{path} is not a file of benchmark results ({type(error).__name__}: {error}); name another file."
            ) from error


def _record(document: dict[str, Any]) -> Record:
    told = document["comparison"]
    probe = Probe(*(tuple(map(float, told["probe"][name])) for name in ("before_ms", "after_ms")))
    timings = tuple(
        EngineTiming(**one | {"benchmark": Benchmark(**one["benchmark"])}) for one in told["timings"]
    )
    absences = tuple(Absence(**one) for one in told["absences"])
    comparison = Comparison(**told | {"timings": timings, "absences": absences, "probe": probe})
    return Record(
        **document | {"combination": Combination(**document["combination"]), "comparison": comparison}
    )
