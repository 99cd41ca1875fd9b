"""Why each layer has its kernel."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import explorer
from explorer.inference import choices, explanation, native
from explorer.inference.plan import ALWAYS_DENSE, ALWAYS_SPARSE
from explorer.masks import magnitude_mask

pytestmark = pytest.mark.skipif(
    native.current_isa().name == "torch", reason="no machine code on this machine"
)


def network(sparsity: float) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, 16, 3, padding=1),
        nn.Conv2d(16, 16, 3, padding=1, groups=16),
        nn.Conv2d(16, 32, 1),
    ]
    with torch.no_grad():
        layers[2].weight *= magnitude_mask(layers[2].weight, sparsity)
    return nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2]).eval()


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    choices._cache_at.cache_clear()
    return tmp_path


@pytest.mark.usefixtures("empty_cache")
def test_each_layer_names_what_its_kernel_was_measured_against() -> None:
    x = torch.randn(1, 3, 24, 24)
    engine = explorer.compile(network(0.5), x)
    rows = {row.name: row for row in engine.explain()}
    assert list(rows) == ["0", "2", "4"]
    assert {name: row.kernel for name, row in rows.items()} == engine.choices
    assert rows["2"].reason == "the only one for depthwise layers"
    assert rows["2"].candidates_ms == {}
    last = rows["4"]
    assert last.sparsity == pytest.approx(0.5, abs=0.01)
    assert len(last.candidates_ms) > 1
    assert min(last.candidates_ms, key=lambda kernel: last.candidates_ms[kernel]) == last.kernel
    assert all(0 < ms < 1000 for ms in last.candidates_ms.values())
    assert all(kernel in last.line() for kernel in last.candidates_ms)


def test_what_was_measured_is_remembered_with_the_answer(empty_cache: Path) -> None:
    x = torch.randn(1, 3, 24, 24)
    first = explorer.compile(network(0.5), x).explain()
    choices._cache_at.cache_clear()  # as in another process
    assert explorer.compile(network(0.5), x).explain() == first
    file = next(empty_cache.rglob("choices.json"))
    file.write_text(file.read_text().replace('"ms of ', '"was '))
    choices._cache_at.cache_clear()
    again = {row.name: row for row in explorer.compile(network(0.5), x).explain()}
    assert again["4"].kernel == first[-1].kernel
    assert again["4"].candidates_ms == {}
    assert "remembers" in again["4"].reason


@pytest.mark.usefixtures("empty_cache")
def test_what_is_decided_without_measuring_says_why() -> None:
    x = torch.randn(1, 3, 24, 24)
    forced = explorer.compile(network(0.95), x, sparse="dense").explain()[-1]
    assert forced.kernel.startswith("dense")
    assert len(forced.candidates_ms) > 1 or "was asked for" in forced.reason
    assert "80 % or more are zeros" in explanation.reason("auto", "sparse", ALWAYS_SPARSE, 1, {})
    assert "less than 25 % are zeros" in explanation.reason("auto", "dense", ALWAYS_DENSE, 1, {})
    assert explanation.reason("auto", "sparse", 0.5, 1, {}) == "the only one that can compute it"


@pytest.mark.parametrize("line", [None, "", "[1]", '{"a": "b"}', "{" * 5000, "null", "3"])
def test_times_that_are_none_are_not_believed(line: str | None) -> None:
    assert explanation.read(line) == {}
    assert explanation.read(explanation.written({"code": 0.25})) == {"code": 0.25}
