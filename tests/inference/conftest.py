"""What the tests of the engine share: networks whose kernels are chosen after one look."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def chosen_after_one_look(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which kernel is the fastest matters to few tests, and measuring takes a third of the time of all: each candidate runs once.

    So any of them may win, which serves tests of correctness. Those that are about measuring ask for `measured_as_users_have_it`.
    """
    if "measured_as_users_have_it" in request.fixturenames:
        return
    for name, value in (("_MOST_PASSES", 1), ("_REPEATS", 1), ("_ORDER_TURNS", 1), ("_ORDERS_S", 0.0)):
        monkeypatch.setattr(f"explorer.inference.choosing.{name}", value)
    monkeypatch.setattr("explorer.inference.compilation._REPEATS", 1)


@pytest.fixture
def measured_as_users_have_it() -> None:
    """Kernels and orders are measured as often as they are for users."""
