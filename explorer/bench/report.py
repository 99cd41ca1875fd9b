"""Results for readers: lines for a terminal, and a document that says what was measured, where, with what, and by which command."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from explorer.bench.engines import ALL, DENSE, SPARSE, SPARSE_HALF, SPARSE_PAIRS, accepted_difference
from explorer.bench.foreign import FOREIGN
from explorer.bench.records import Record, Results
from explorer.bench.surroundings import BUSY
from explorer.bench.usage import TOO_MANY
from explorer.inference.timing import Benchmark

__all__ = ["markdown", "text"]

REFERENCES = ("onnxruntime", "deepsparse")
"""The engines that every row of a document's tables is compared with."""

_RATIO = "Their median / ours, of engines that alternated in one run: above 1 this engine is faster, by that factor."


def text(record: Record, noise: float) -> str:
    """Lay one record out for a terminal: a line for each engine, the fastest dense one at speed-up 1, then what there is to say."""
    lines = [
        f"{record.combination}; pruned by magnitude: {record.rule}",
        f"  {'engine':<20} {'median ms':>10} {'± ms':>8} {'fastest ms':>10} {'speed-up':>9} {'theirs / ours':>14}",
    ]
    ours = record.median_ms(SPARSE)
    for one in record.timings:
        b = one.benchmark
        ratio = f"{b.latency_ms / ours:>13.2f}x" if ours else f"{'–':>14}"
        lines.append(
            f"  {one.contestant:<20} {b.latency_ms:>10.3f} {b.spread_ms:>8.3f} {b.min_ms:>10.3f} {one.speedup:>8.2f}x {ratio}"
        )
    return "\n".join([*lines, *(f"  {note}" for note in (*_slower(record), *_notes(record, noise)))])


def markdown(results: Results) -> str:
    """Write the document: summary, circumstances, then a table for each network, batch and number of threads.

    Parameters
    ----------
    results : Results

    Returns
    -------
    str
        Markdown, with a line end at its end.
    """
    records = _sorted(results.records)
    blocks = [
        "# Engines beside each other",
        "Written by `sparsity-explorer bench`, from measured results.",
        *_several_runs(records),
        "## Summary",
        _RATIO,
        _summary(results, records),
        *_all_slower(records),
        "## How it was measured",
        *_circumstances(results, records),
    ]
    for part in _groups(records):
        blocks += _section(results, part)
    return "\n\n".join(blocks) + "\n"


def _sorted(records: Iterable[Record]) -> list[Record]:
    """Networks in the order in which they were first measured, and each network's combinations by size."""
    given = list(records)
    networks = list(dict.fromkeys(one.combination.network for one in given))

    def key(one: Record) -> tuple[int, int, int, float]:
        c = one.combination
        return networks.index(c.network), c.batch_size, c.threads, c.sparsity

    return sorted(given, key=key)


def _groups(records: Sequence[Record]) -> list[list[Record]]:
    found: dict[tuple[str, int, int], list[Record]] = {}
    for one in records:
        c = one.combination
        found.setdefault((c.network, c.batch_size, c.threads), []).append(one)
    return list(found.values())


def _runs(records: Sequence[Record]) -> dict[str, list[Record]]:
    found: dict[str, list[Record]] = {}
    for one in sorted(records, key=lambda one: one.run):
        found.setdefault(one.run, []).append(one)
    return found


def _several_runs(records: Sequence[Record]) -> list[str]:
    runs = _runs(records)
    if len(runs) < 2:
        return []
    notice = (
        f"**These results come from {len(runs)} runs**, which began on {', '.join(runs)}. Each combination was measured in one of them, "
        "all its engines in turn, and names its own date; do not compare times of different combinations as if they were taken together."
    )
    return [notice]


def _contestants(records: Sequence[Record]) -> list[str]:
    """All that were timed or failed, other engines first."""
    met = [name for one in records for name in (*_timed_names(one), *(a.contestant for a in one.absences))]
    names = [name for name in dict.fromkeys(met) if name not in (SPARSE, ALL)]
    order = {name: place for place, name in enumerate(dict.fromkeys(("deepsparse", "mnn", *FOREIGN)))}
    return sorted(names, key=lambda name: order.get(name, len(order)))


def _timed_names(record: Record) -> list[str]:
    return [one.contestant for one in record.timings]


def _summary(results: Results, records: Sequence[Record]) -> str:
    names = _contestants(records)
    rows = []
    for one in records:
        c = one.combination
        ours = one.median_ms(SPARSE)
        cells = [
            c.network,
            f"{c.sparsity:g}",
            str(c.batch_size),
            str(c.threads),
            "–" if ours is None else f"{ours:.3f}",
        ]
        absent = {a.contestant: "failed" if a.failed else "left out" for a in one.absences}
        for name in names:
            theirs = one.median_ms(name)
            cells.append(absent.get(name, absent.get(ALL, "–")) if theirs is None else _ratio(theirs, ours))
        rows.append([*cells, "busy" if results.noise(one) > BUSY else "", one.date])
    head = ["network", "sparsity", "batch", "threads", "ours, ms", *names, "noise", "date"]
    return _table(head, rows, left=1)


def _all_slower(records: Sequence[Record]) -> list[str]:
    """A list of all that `_slower` says."""
    said = [f"- {line}" for one in records for line in _slower(one)]
    return ["\n".join(said)] if said else []


def _slower(record: Record) -> list[str]:
    """Name the sparse runs of this engine that were slower than its dense one, by more than the spread of both."""
    timed = {one.contestant: one.benchmark for one in record.timings}
    dense = timed.get(DENSE)
    if dense is None:
        return []
    return [
        f"{name} was slower than {DENSE}, by more than both vary: {_time(sparse)} against {_time(dense)} ms, {record.combination}"
        for name in (SPARSE, SPARSE_HALF, SPARSE_PAIRS)
        if (sparse := timed.get(name)) is not None
        and sparse.latency_ms - dense.latency_ms > sparse.spread_ms + dense.spread_ms
    ]


def _time(benchmark: Benchmark) -> str:
    return f"{benchmark.latency_ms:.3f} ± {benchmark.spread_ms:.3f}"


def _ratio(theirs: float | None, ours: float | None) -> str:
    return "–" if theirs is None or ours is None else f"{theirs / ours:.2f} ×"


def _is_metered(records: Sequence[Record]) -> bool:
    """Whether the CPU time of any contestant is known; earlier files do not tell."""
    return any(timing.cpus is not None for one in records for timing in one.timings)


def _section(results: Results, records: Sequence[Record]) -> list[str]:
    c = records[0].combination
    head = ["sparsity", "engine", "median ms", "± ms", "fastest ms", "turns"]
    metered = _is_metered(records)
    head += ["CPUs busy"] if metered else []
    head += [f"{name} / this" for name in REFERENCES] + ["fastest dense / this"]
    rows = []
    for one in records:
        for timing in one.timings:
            b = timing.benchmark
            name = f"**{timing.contestant}**" if timing.contestant == SPARSE else timing.contestant
            row = [
                f"{timing.sparsity:g}",
                name,
                f"{b.latency_ms:.3f}",
                f"{b.spread_ms:.3f}",
                f"{b.min_ms:.3f}",
                str(b.repeats),
            ]
            if metered:
                row.append("–" if timing.cpus is None else f"{timing.cpus:.2f}")
            row += [_ratio(one.median_ms(reference), b.latency_ms) for reference in REFERENCES]
            rows.append([*row, f"{timing.speedup:.2f} ×"])
    said = []
    for one in records:
        begin = f"- sparsity {one.combination.sparsity:g}"
        noise = results.noise(one)
        said.append(
            f"{begin}: measured on {one.date}; the probe was up to {noise:.1%} slower than at its fastest."
        )
        said += [f"{begin}: {note}" for note in _notes(one, noise)]
    rules = dict.fromkeys(one.rule for one in records)
    return [
        f"## {c.network}, batch {c.batch_size}, {c.threads} thread{'s' if c.threads > 1 else ''}",
        f"Pruned by magnitude: {'; '.join(rules)}.",
        _table(head, rows, left=2),
        "\n".join(said),
    ]


def _notes(record: Record, noise: float) -> list[str]:
    """What went wrong, or may have."""
    notes = [
        f"{one.contestant} {'failed' if one.failed else 'was left out'}: {one.reason}"
        for one in record.absences
    ]
    threads = record.combination.threads
    notes += [
        f"warning: {one.contestant} kept {one.cpus:.2f} CPUs busy, but was given {threads} thread(s)"
        for one in record.timings
        if one.cpus is not None and one.cpus > threads + TOO_MANY
    ]
    if noise > BUSY:
        notes.append(
            f"warning: this machine was busy: the probe was up to {noise:.0%} slower than at its fastest, {BUSY:.0%} is accepted; measure again"
        )
    if record.comparison.usable_cpus < threads:
        notes.append(
            f"warning: {threads} threads on {record.comparison.usable_cpus} usable CPU(s) take turns instead of working together"
        )
    return notes


def _circumstances(results: Results, records: Sequence[Record]) -> list[str]:
    commands: dict[str, list[str]] = {}
    for run, of_run in _runs(records).items():
        for one in of_run:
            began = commands.setdefault(one.command, [])
            if run not in began:
                began.append(run)
    blocks = ["```\n" + "\n".join(commands) + "\n```"]
    if len(commands) > 1:
        blocks.append(
            "Begun on, in the order of the lines above: "
            + "; ".join(", ".join(began) for began in commands.values())
            + "."
        )
    if any("_PYTHON" in command for command in commands):
        blocks.append("`$…_PYTHON` is the Python of an environment in which that engine is installed.")
    first, compared = "", "Every output was compared with torch's before."
    if all(timing.difference is not None for one in records for timing in one.timings):
        first = ", each time another one first"
        compared = "Every output was compared with torch's, sample by sample, before its engine's first turn and after the last."
    blocks.append(
        f"Each engine warms up for 20 ms (at least one inference), is timed for 20 ms more, and then, once its threads have stopped spinning, the next one does the same, many turns long{first}; a time is "
        f"the median over turns, ± half the distance between its quartiles. {compared} Before and after each combination a fixed product of two "
        f"matrices was timed, on as many threads, by each for itself: where a turn of it took more than {BUSY:.0%} longer than the fastest of all, something else was running, and the "
        "combination says so."
    )
    if any("--patience" in command for command in commands):
        blocks.append(
            "With `--patience S` the product was timed before and after each turn of an engine: where it took so much longer, the turn was put off, or measured "
            "again, until S seconds of the combination were lost in that way; a combination is called busy when more than a tenth of its probes were slow."
        )
    if _is_metered(records):
        blocks.append(
            "`CPUs busy` is the CPU time of the engine's process during its turns / their time. Threads that wait for work in a loop count too, and other work on the machine makes it less; "
            f"an engine for which it is more than {TOO_MANY:g} above the number of threads that it was given is named."
        )
    blocks.append(
        "An engine was timed only when no entry of its output differed from torch's by more than is accepted of it, relative to the largest entry of torch's output of that "
        "sample; random weights amplify each rounding, and some engines compute in less than float32 where the processor does:"
    )
    head = ["engine", "accepted difference", "largest found"]
    blocks.append(_table(head, _difference_rows(records), left=1))
    blocks.append(_table(["machine", ""], _machine_rows(results), left=2))
    blocks.append(_table(["engine", "version", "measured on"], _version_rows(records), left=3))
    rules = {one.combination.network: one.rule for one in records}
    blocks.append(
        _table(
            ["network", "pruned by magnitude, each layer alike"],
            [list(pair) for pair in rules.items()],
            left=2,
        )
    )
    return blocks


def _machine_rows(results: Results) -> list[list[str]]:
    known = results.machine
    rows = [
        ["processor", str(known.get("cpu", "unknown"))],
        ["logical CPUs", str(known.get("logical_cpus", "unknown"))],
    ]
    usable = dict.fromkeys(str(one.comparison.usable_cpus) for one in results.records)
    rows.append(["of which it might use", ", ".join(usable)])
    caches = known.get("caches", {})
    rows.append(
        ["caches of one CPU", ", ".join(f"{name} {size}" for name, size in caches.items()) or "unknown"]
    )
    sets = known.get("instruction_sets", {})
    rows.append(
        [
            "instruction sets",
            ", ".join(name for name, there in sets.items() if there) or "none that are known",
        ]
    )
    rows.append(
        [
            "it lacks",
            ", ".join(name for name, there in sets.items() if not there) or "none of those asked for",
        ]
    )
    rows.append(["memory", f"{known['memory_gib']} GiB" if "memory_gib" in known else "unknown"])
    rows.append(["system", str(known.get("system", "unknown"))])
    rows.append(
        [
            "OMP_WAIT_POLICY (PASSIVE: idle threads of torch and others sleep)",
            str(known.get("omp_wait_policy", "unknown")),
        ]
    )
    kernels = dict.fromkeys(
        one.benchmark.isa for record in results.records for one in record.timings if one.contestant == SPARSE
    )
    rows.append(["this engine's kernels are for", ", ".join(kernels) or "unknown"])
    return rows


def _version_rows(records: Sequence[Record]) -> list[list[str]]:
    """A row for each engine's version, with the days when there are several."""
    found: dict[str, dict[str, list[str]]] = {}
    for one in records:
        for name, version in one.comparison.versions.items():
            found.setdefault(name, {}).setdefault(version, []).append(one.date.partition(" ")[0])
    return [
        [name, version, ", ".join(sorted(set(days)))]
        for name, versions in found.items()
        for version, days in versions.items()
    ]


def _difference_rows(records: Sequence[Record]) -> list[list[str]]:
    """A row for each engine that was timed. What earlier files do not tell is what this version accepts."""
    accepted: dict[str, list[float]] = {}
    found: dict[str, list[float]] = {}
    for timing in (timing for one in records for timing in one.timings):
        name = timing.contestant
        limit = accepted_difference(name) if timing.accepted is None else timing.accepted
        accepted.setdefault(name, []).append(limit)
        found.setdefault(name, []).extend([] if timing.difference is None else [timing.difference])
    return [
        [
            name,
            ", ".join(f"{limit:g}" for limit in sorted(set(limits))),
            f"{max(found[name]):.2g}" if found[name] else "not recorded",
        ]
        for name, limits in accepted.items()
    ]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], *, left: int) -> str:
    """Lay out a Markdown table, its first `left` columns to the left."""
    rule = ["---" if i < left else "---:" for i in range(len(head))]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in [head, rule, *rows]
    )
