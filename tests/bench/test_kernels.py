"""The benchmark of the loop over nonzeros: it computes a product of matrices, and says what it took."""

from __future__ import annotations

import argparse
import re

import numpy as np
import pytest

from explorer.bench import command, kernels
from explorer.inference.native import current_isa, why_torch

pytestmark = pytest.mark.skipif(why_torch() is not None, reason="no machine code here")


@pytest.mark.parametrize("rows", kernels.ROWS)
@pytest.mark.parametrize(("tile", "nonzeros"), [(1, 3), (4, 9), (7, 2)])
def test_the_loop_computes_the_product_of_the_pruned_weights(tile: int, nonzeros: float, rows: str) -> None:
    if not kernels.takes(rows, tile, current_isa()):
        pytest.skip("this CPU's kernels do not take rows so")
    loop = kernels.Loop(tile, nonzeros, rows)
    loop.run(2)
    np.testing.assert_allclose(loop.out, loop.weight @ loop.x, rtol=1e-4, atol=1e-4)
    kept = np.count_nonzero(loop.weight, axis=1)
    assert kept.mean() == pytest.approx(nonzeros, rel=0.15)
    assert np.array_equal(kept[::2], kept[1::2]) == (rows == "pairs")
    assert loop.operations == 2 * kept.sum() * loop.x.shape[1]


def test_speeds_are_of_the_work_that_was_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_TURNS", 2)
    speeds = kernels.measure_loops([2, 4], [4, 16])
    assert [(s.tile, s.nonzeros, s.rows) for s in speeds] == [
        (tile, count, rows)
        for rows in kernels.ROWS
        for tile in (2, 4)
        for count in (4, 16)
        if kernels.takes(rows, tile, current_isa())
    ]
    assert all(0 < s.share < 1.2 for s in speeds)
    assert all(s.gflops == pytest.approx(s.share * speeds[0].gflops / speeds[0].share) for s in speeds)
    lines = kernels.table(speeds).splitlines()
    assert lines[0].split() == ["nonzeros", "a", "row:", "4", "16"]
    assert lines[1].split() == ["2", "vectors", f"{speeds[0].share:.0%}", f"{speeds[1].share:.0%}"]
    last = "code" if kernels.takes("code", 4, current_isa()) else "pairs"
    assert lines[-1].startswith(f"4 vectors, {last}")


def test_the_command_prints_the_table(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "_TURNS", 1)
    parser = argparse.ArgumentParser()
    command.add_options(parser)
    assert command.run(parser.parse_args(["kernels"])) == 0
    out = capsys.readouterr().out
    assert re.search(r"peak of one core [\d.]+ GFLOP/s", out)
    assert re.search(r"^7 vectors +(\d+% *){5}$", out, re.MULTILINE)
