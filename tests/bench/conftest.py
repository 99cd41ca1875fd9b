"""What the tests of the benchmark share: comparisons whose turns are short."""

from __future__ import annotations

import pytest

from explorer.bench import engines, surroundings


@pytest.fixture
def short_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who takes part, and who is right, is seen in turns that are too short to tell times well."""
    monkeypatch.setattr(engines, "_SLICE_S", 0.002)
    monkeypatch.setattr(surroundings, "_PROBE_SLICE_S", 0.0002)


@pytest.fixture
def without_onnxruntime(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the contestant whose export takes more than a second: there are enough others."""
    monkeypatch.setattr(engines, "_add_onnxruntime", lambda *_: None)
