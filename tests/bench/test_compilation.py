"""The benchmark of compiling: its processes begin with the cache that they should, and what goes wrong in them is told."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import pytest

from explorer.bench import command, compilation
from explorer.errors import EngineError
from explorer.inference.native import why_torch


@pytest.mark.skipif(why_torch() is not None, reason="no machine code here")
def test_the_second_process_finds_what_the_first_has_left(tmp_path: Path) -> None:
    def objects() -> dict[str, int]:
        return {path.name: path.stat().st_ino for path in tmp_path.rglob("*.o")}

    assert not objects()
    empty = compilation._in_a_process("demo:fashion-resnet", 0.9, 1, 2, str(tmp_path))
    left = objects()
    full = compilation._in_a_process("demo:fashion-resnet", 0.9, 1, 2, str(tmp_path))
    assert left
    assert objects() == left, "nothing was compiled anew"
    for times in (empty, full):
        assert times.keys() == {"first_capture_s", "capture_s", "compile_s", "update_s"}
        assert all(0 < seconds < 100 for seconds in times.values())


def test_what_goes_wrong_in_a_process_is_told(tmp_path: Path) -> None:
    with pytest.raises(
        EngineError, match=r"no-such-network could not be compiled in a process of its own: .*no-such-network"
    ):
        compilation._in_a_process("no-such-network", 0.9, 1, 1, str(tmp_path))


def test_the_command_prints_medians_and_extremes_and_that_the_machine_was_busy(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def measured(name: str, sparsity: float, **options: int) -> compilation.Compilation:
        asked.append((name, sparsity, options))
        return compilation.Compilation((3.0, 2.0, 4.0), (0.5,), (1.0, 0.8, 0.9), (0.25,), (0.2,), 0.3)

    monkeypatch.setattr(compilation, "measure_compilation", measured)
    parser = argparse.ArgumentParser()
    command.add_options(parser)
    assert command.run(parser.parse_args(["compile", "--model", "resnet50", "bert", "--threads", "2"])) == 0
    assert asked == [(name, 0.9, {"threads": 2, "batch_size": 1}) for name in ("resnet50", "bert")]
    _, first, _ = capsys.readouterr().out.splitlines()
    assert first == (
        "resnet50 at 90%, 2 thread(s), batch 1: capture 3.00 s (2.00 to 4.00) the first time in a process, 0.50 s (0.50 to 0.50) again; after it "
        "0.90 s (0.80 to 1.00) with an empty cache, 0.25 s (0.25 to 0.25) with a full one; new weights 0.20 s (0.20 to 0.20); something else was running"
    )


def test_limits_stand_beside_their_figures_and_a_median_above_one_is_marked() -> None:
    limits = compilation.limits_of("resnet50", 0.9)
    assert limits == compilation.Limits(cold_s=1.0, cached_s=0.5, update_s=0.25)
    # The slowest round of new weights is above the limit, their median is not.
    found = compilation.Compilation(
        (3.0,), (0.5,), (1.0,), (0.4, 0.5, 0.6, 0.7), (0.1, 0.2, 0.3), 0.0, limits
    )
    assert str(found).partition("after it ")[2] == (
        "1.00 s (1.00 to 1.00, limit 1 s) with an empty cache, 0.55 s (0.40 to 0.70, ABOVE the limit of 0.5 s) with a full one; "
        "new weights 0.20 s (0.10 to 0.30, limit 0.25 s)"
    )


def test_a_measurement_has_the_limits_of_its_network_and_exceeding_them_is_no_failure(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    times = {"first_capture_s": 3.0, "capture_s": 1.0, "compile_s": 2.5, "update_s": 0.7}
    monkeypatch.setattr(compilation, "_in_a_process", lambda *_: times)
    monkeypatch.setattr("explorer.bench.surroundings.probe_ms", lambda _: (1.0, 1.0))
    parser = argparse.ArgumentParser()
    command.add_options(parser)
    line = "compile --model resnet50 bert mobilenet_v1 --sparsity 0.8 0.9"
    assert command.run(parser.parse_args(line.split())) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert "limit where it has one" in head
    above = [re.findall(r"ABOVE the limit of ([\d.]+) s", line) for line in lines]
    assert above == [[], ["1", "0.5", "0.25"], ["2"], ["2"], [], []]
