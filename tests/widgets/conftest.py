"""A page over the fake study, with all work done at once in the calling thread."""

from __future__ import annotations

import pytest

from explorer.widgets.jobs import InlineExecutor
from explorer.widgets.state import ExplorerState
from tests.widgets.fake_study import FakeStudy


@pytest.fixture
def study() -> FakeStudy:
    return FakeStudy()


@pytest.fixture
def state(study: FakeStudy) -> ExplorerState:
    return ExplorerState(study, executor=InlineExecutor())
