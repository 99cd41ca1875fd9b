"""The benchmark of compiling: its processes begin with the cache that they should, and what goes wrong in them is told."""

from __future__ import annotations

import argparse
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
