"""What one run has written, the next one reads back; and it refuses what it cannot trust."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from explorer.bench.engines import SPARSE, Absence
from explorer.bench.records import Combination, Record, Results
from explorer.bench.report import markdown
from explorer.bench.surroundings import Probe
from explorer.errors import FormatError
from tests.bench.synthetic import BUSY, comparison, record

A = Combination("resnet18", 0.9, 1, 1)
GIVEN = comparison(
    A,
    {"torch eager": 3.0, SPARSE: 1.0},
    absences=(Absence("mnn", "gone", failed=True),),
    probe=BUSY,
    differences={SPARSE: (1e-3, 2e-6)},
    cpus={"torch eager": 1.01, SPARSE: 0.99},
)


def test_results_read_back_are_the_results_that_were_written(tmp_path: Path) -> None:
    results = Results({"cpu": "c"}, (record(A, GIVEN),))
    path = tmp_path / "r.json"
    path.write_text(results.to_json())
    assert Results.read(path) == results


def test_a_file_from_before_differences_and_cpu_time_were_kept_is_read(tmp_path: Path) -> None:
    document = json.loads(Results({"cpu": "c"}, (record(A, GIVEN),)).to_json())
    for timing in document["records"][0]["comparison"]["timings"]:
        del timing["accepted"], timing["difference"], timing["cpus"]
    path = tmp_path / "r.json"
    path.write_text(json.dumps(document))
    read = Results.read(path)
    assert [(one.accepted, one.difference, one.cpus) for one in read.records[0].timings] == [(None,) * 3] * 2
    text = markdown(read)
    assert "| not recorded |" in text
    assert "CPUs busy" not in text


def test_a_combination_counts_as_measured_only_with_all_engines_that_are_asked_for() -> None:
    results = Results({}, (record(A, GIVEN),))
    held = results.records[0]
    assert results.find(A) is held
    assert results.find(A, ["mnn"]) is held  # it failed, which is a result
    assert results.find(A, ["mnn", "deepsparse"]) is None
    assert results.find(Combination("resnet18", 0.9, 2, 1)) is None
    anew = record(A, GIVEN, date="later")
    assert results.with_record(anew).records == (anew,)


def test_noise_is_seen_within_a_combination_and_beside_quieter_ones() -> None:
    def measured(sparsity: float, threads: int, *turns: float) -> Record:
        c = Combination("resnet18", sparsity, threads, 1)
        return record(c, comparison(c, {SPARSE: 1.0}, probe=Probe(turns[:1], turns[1:])))

    quiet, uneven = measured(0.5, 1, 1.0, 1.05), measured(0.8, 1, 1.1, 1.4)
    steadily_slow, other_threads = measured(0.9, 1, 2.0, 2.0), measured(0.9, 2, 0.5, 0.52)
    results = Results({}, (quiet, uneven, steadily_slow, other_threads))
    noise = [results.noise(one) for one in results.records]
    assert noise == pytest.approx([0.05, 0.4, 1.0, 0.04])
    assert Results({}, ()).noise(steadily_slow) == 0.0


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"format": 1, "machine": {}, "records": [{"date": "x"}]}', '{"format": 99}']
)
def test_another_file_is_refused_by_name(content: str, tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_text(content)
    with pytest.raises(FormatError, match=r"r\.json .* name another file"):
        Results.read(path)


def test_another_machine_is_refused_but_not_an_update_of_its_system() -> None:
    results = Results({"cpu": "one", "system": "Linux 1"}, ())
    results.check_machine({"cpu": "one", "system": "Linux 2"}, Path("r.json"))
    with pytest.raises(FormatError, match=r"another machine .*cpu: one there, two here"):
        results.check_machine({"cpu": "two", "system": "Linux 1"}, Path("r.json"))


def test_the_file_is_plain_json() -> None:
    document = json.loads(Results({"cpu": "c"}, (record(A, GIVEN),)).to_json())
    timing = document["records"][0]["comparison"]["timings"][1]
    assert (timing["contestant"], timing["benchmark"]["latency_ms"], timing["speedup"]) == (SPARSE, 1.0, 3.0)
