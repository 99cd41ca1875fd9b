"""The document's figures are those of the results, and it hides nothing that a reader must know."""

from __future__ import annotations

import pytest

from explorer.bench import report
from explorer.bench.engines import ALL, DENSE, SPARSE, SPARSE_PAIRS, Absence
from explorer.bench.records import Combination, Results
from tests.bench.synthetic import BUSY, comparison, record

A = Combination("resnet18", 0.9, 1, 1)
B = Combination("resnet18", 0.95, 1, 1)
C = Combination("mobilenet_v1", 0.9, 2, 16)
MEDIANS = {"torch eager": 40.0, "onnxruntime": 30.0, "deepsparse": 15.0, "mnn": 25.0, SPARSE: 10.0}
MACHINE = {
    "cpu": "Some CPU",
    "logical_cpus": 8,
    "caches": {"L1d": "32K", "L2": "1024K"},
    "instruction_sets": {"avx512f": True, "avx512bf16": True, "avx512fp16": False, "amx-bf16": False},
    "memory_gib": 32,
    "system": "Linux 6",
}


def tables(text: str) -> list[list[dict[str, str]]]:
    """All Markdown tables of a document, each row by the names of its columns."""
    found = []
    for block in text.split("\n\n"):
        lines = [line for line in block.splitlines() if line.startswith("|")]
        if lines:
            head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
            assert all(len(row) == len(head) for row in rows)
            found.append([dict(zip(head, row, strict=True)) for row in rows])
    return found


def test_the_summary_comes_first_and_holds_every_ratio() -> None:
    slower = {**MEDIANS, SPARSE: 20.0}
    text = report.markdown(
        Results(MACHINE, (record(A, comparison(A, MEDIANS)), record(C, comparison(C, slower))))
    )
    sections = [line for line in text.splitlines() if line.startswith("## ")]
    assert sections[0] == "## Summary"
    assert sections[2:] == ["## resnet18, batch 1, 1 thread", "## mobilenet_v1, batch 16, 2 threads"]
    first, second = tables(text)[0]
    assert {name: first[name] for name in ("network", "sparsity", "batch", "threads", "ours, ms")} == {
        "network": "resnet18",
        "sparsity": "0.9",
        "batch": "1",
        "threads": "1",
        "ours, ms": "10.000",
    }
    for row, ours in ((first, 10.0), (second, 20.0)):
        for name in ("torch eager", "onnxruntime", "deepsparse", "mnn"):
            assert row[name] == f"{MEDIANS[name] / ours:.2f} ×"
    assert first["deepsparse"] == "1.50 ×"
    assert second["deepsparse"] == "0.75 ×"


def test_each_table_compares_every_row_with_onnx_runtime_and_deepsparse() -> None:
    results = Results(MACHINE, (record(B, comparison(B, MEDIANS)), record(A, comparison(A, MEDIANS))))
    rows = tables(report.markdown(results))[-1]
    assert [row["sparsity"] for row in rows] == ["0.9"] * 5 + ["0.95"] * 5
    for row in rows:
        name = row["engine"].strip("*")
        median = MEDIANS[name]
        assert (row["median ms"], row["± ms"]) == (f"{median:.3f}", f"{median / 100:.3f}")
        assert row["onnxruntime / this"] == f"{30.0 / median:.2f} ×"
        assert row["deepsparse / this"] == f"{15.0 / median:.2f} ×"
        assert row["fastest dense / this"] == f"{30.0 / median:.2f} ×"
    assert [row["engine"] for row in rows if row["engine"].startswith("**")] == [f"**{SPARSE}**"] * 2


def test_the_document_names_machine_versions_and_command() -> None:
    given = comparison(A, MEDIANS, versions={"torch": "2.13", "mnn": "3.6.1"}, usable_cpus=2)
    text = report.markdown(Results(MACHINE, (record(A, given),)))
    machine = {row["machine"]: row[""] for row in next(t for t in tables(text) if "machine" in t[0])}
    assert machine["processor"] == "Some CPU"
    assert (machine["logical CPUs"], machine["of which it might use"]) == ("8", "2")
    assert machine["caches of one CPU"] == "L1d 32K, L2 1024K"
    assert machine["instruction sets"] == "avx512f, avx512bf16"
    assert machine["it lacks"] == "avx512fp16, amx-bf16"
    assert machine["memory"] == "32 GiB"
    assert machine["this engine's kernels are for"] == "avx512"
    versions = next(t for t in tables(text) if "version" in t[0])
    assert [(row["engine"], row["version"]) for row in versions] == [("torch", "2.13"), ("mnn", "3.6.1")]
    assert "sparsity-explorer bench engines # 2026-01-02 09:00:00 UTC" in text
    assert "runs**" not in text


def test_the_document_says_for_each_engine_what_difference_was_accepted_and_found() -> None:
    medians = {"torch eager": 40.0, "openvino": 30.0, "mnn": 25.0, SPARSE: 10.0}
    kept = {"torch eager": (0.001, 0.0), "openvino": (0.3, 0.12), SPARSE: (0.001, 2.34e-6)}
    more = {"torch eager": (0.001, 1e-7), "openvino": (0.3, 0.07), SPARSE: (0.002, 1e-6)}
    given = [
        record(one, comparison(one, medians, differences=found)) for one, found in ((A, kept), (B, more))
    ]
    text = report.markdown(Results(MACHINE, tuple(given)))
    told = text[text.index("## How it was measured") : text.index("## resnet18")]
    rows = next(table for table in tables(told) if "accepted difference" in table[0])
    assert [tuple(row.values()) for row in rows] == [
        ("torch eager", "0.001", "1e-07"),
        ("openvino", "0.3", "0.12"),
        ("mnn", "0.01", "not recorded"),  # what this version accepts
        (SPARSE, "0.001, 0.002", "2.3e-06"),
    ]
    assert "compared with torch's before." in told  # nothing more is known of mnn
    assert "another one first" not in told
    del medians["mnn"]
    later = report.markdown(Results(MACHINE, (record(A, comparison(A, medians, differences=kept)),)))
    assert (
        "compared with torch's, sample by sample, before its engine's first turn and after the last." in later
    )


def test_results_of_several_runs_say_so_and_name_their_dates_and_versions() -> None:
    later = {"date": "2026-01-05 10:00:00 UTC", "run": "2026-01-05 09:00:00 UTC"}
    one = record(A, comparison(A, MEDIANS, versions={"torch": "2.12"}))
    two = record(B, comparison(B, MEDIANS, versions={"torch": "2.13"}), **later)
    text = report.markdown(Results(MACHINE, (two, one)))
    assert (
        "**These results come from 2 runs**, which began on 2026-01-02 09:00:00 UTC, 2026-01-05 09:00:00 UTC"
        in text
    )
    assert "- sparsity 0.9: measured on 2026-01-02 10:00:00 UTC" in text
    assert "- sparsity 0.95: measured on 2026-01-05 10:00:00 UTC" in text
    versions = next(t for t in tables(text) if "version" in t[0])
    assert [(row["version"], row["measured on"]) for row in versions] == [
        ("2.12", "2026-01-02"),
        ("2.13", "2026-01-05"),
    ]
    assert text.count("sparsity-explorer bench engines # ") == 2


def test_failures_absences_and_noise_are_in_the_document_and_on_the_terminal() -> None:
    medians = {name: ms for name, ms in MEDIANS.items() if name not in ("deepsparse", "mnn")}
    absences = (
        Absence("deepsparse", "it fell over", failed=True),
        Absence("torch compile", "no compiler", failed=False),
    )
    given = record(C, comparison(C, medians, absences=absences, probe=BUSY, usable_cpus=1))
    text = report.markdown(Results(MACHINE, (given, record(A, comparison(A, MEDIANS)))))
    for said in (text, report.text(given, 0.25)):
        assert "deepsparse failed: it fell over" in said
        assert "torch compile was left out: no compiler" in said
        assert "warning: this machine was busy: the probe was up to 25% slower" in said
        assert "warning: 2 threads on 1 usable CPU(s)" in said
    row = tables(text)[0][0]
    assert (row["deepsparse"], row["torch compile"], row["mnn"], row["noise"]) == (
        "failed",
        "left out",
        "–",
        "busy",
    )
    assert row["onnxruntime"] == "3.00 ×"
    assert tables(text)[0][1]["noise"] == ""
    assert all(row["deepsparse / this"] == "–" for row in tables(text)[-2])


def test_a_sparse_run_that_is_slower_than_the_dense_one_is_named_where_it_cannot_be_noise() -> None:
    # Each spread is a hundredth of the median.
    slower = record(A, comparison(A, {**MEDIANS, DENSE: 10.0, SPARSE: 10.21, SPARSE_PAIRS: 12.0}))
    within = record(B, comparison(B, {**MEDIANS, DENSE: 10.0, SPARSE: 10.20, SPARSE_PAIRS: 9.0}))
    alone = record(C, comparison(C, {"torch eager": 1.0, SPARSE: 20.0}))
    said = [
        f"engine sparse was slower than engine dense, by more than both vary: 10.210 ± 0.102 against 10.000 ± 0.100 ms, {A}",
        f"engine sparse pairs was slower than engine dense, by more than both vary: 12.000 ± 0.120 against 10.000 ± 0.100 ms, {A}",
    ]
    terminal = report.text(slower, 0.0).splitlines()
    assert [line.strip() for line in terminal if "slower than engine" in line] == said
    document = report.markdown(Results(MACHINE, (slower, within, alone)))
    summary = document[: document.index("## How it was measured")].splitlines()
    assert [line for line in summary if "slower than engine" in line] == [f"- {line}" for line in said]
    for quick in (within, alone):
        assert "slower than engine" not in report.text(quick, 0.0)
    assert "slower than engine" not in report.markdown(Results(MACHINE, (within, alone)))


def test_an_engine_that_keeps_more_cpus_busy_than_it_was_given_is_named() -> None:
    cpus = {"torch eager": 2.3, "onnxruntime": 1.0, "mnn": 2.31, SPARSE: 1.98}
    given = record(C, comparison(C, MEDIANS, cpus=cpus))
    text = report.markdown(Results(MACHINE, (given,)))
    for said in (text, report.text(given, 0.0)):
        assert "warning: mnn kept 2.31 CPUs busy, but was given 2 thread(s)" in said
        assert said.count(" CPUs busy, but") == 1
    assert {row["engine"].strip("*"): row["CPUs busy"] for row in tables(text)[-1]} == {
        "torch eager": "2.30", "onnxruntime": "1.00", "deepsparse": "–", "mnn": "2.31", SPARSE: "1.98",
    }  # fmt: skip
    assert "more than 0.3 above the number of threads" in text


def test_a_combination_that_nothing_could_run_keeps_its_line() -> None:
    given = record(A, comparison(A, {}, absences=(Absence(ALL, "cannot capture this", failed=True),)))
    text = report.markdown(Results(MACHINE, (given, record(B, comparison(B, MEDIANS)))))
    row = tables(text)[0][0]
    assert (row["ours, ms"], row["mnn"]) == ("–", "failed")
    assert "every engine failed: cannot capture this" in text


@pytest.mark.parametrize("noise", [0.02, 0.25])
def test_the_terminal_shows_their_time_over_ours(noise: float) -> None:
    said = report.text(record(A, comparison(A, MEDIANS)), noise)
    rows = {line.split("  ")[1].strip(): line.split() for line in said.splitlines()[2:] if line.endswith("x")}
    assert rows["deepsparse"][-2:] == ["2.00x", "1.50x"]
    assert rows["torch eager"][-2:] == ["0.75x", "4.00x"]
    assert ("busy" in said) is (noise > 0.1)
