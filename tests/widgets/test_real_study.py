"""The state over a real, tiny study: what the fake study promises, the real one keeps."""

from __future__ import annotations

import io
import json
import zipfile

import pytest
import torch

from explorer.data import load_data
from explorer.study import Study
from explorer.widgets import SensitivityExplorer
from explorer.widgets.jobs import InlineExecutor
from explorer.widgets.state import ExplorerState
from tests.pruning.tiny import TinyNet, quadrants
from tests.widgets.fake_study import FakeStudy

pytestmark = pytest.mark.usefixtures("quick_latencies")


@pytest.fixture(scope="module")
def real_state() -> ExplorerState:
    torch.manual_seed(0)
    data = load_data(quadrants(256, 0), quadrants(128, 1))
    return ExplorerState(Study(TinyNet(), data), executor=InlineExecutor())


def test_the_fake_study_has_no_name_that_the_real_one_lacks(real_state: ExplorerState) -> None:
    own = {"pause_s", "steps_per_epoch", "fail_at", "together", "calls", "ms", "kl", "dense_ms"}
    names = {name for name in dir(FakeStudy()) if not name.startswith("_")} - own
    assert {name for name in names if not hasattr(real_state.study, name)} == set()


def test_the_whole_job_works_on_a_real_network(real_state: ExplorerState) -> None:
    state = real_state
    page = SensitivityExplorer(state)
    state.measure(64)
    assert state.error == ""
    assert state.measured
    for layer in state.layers:
        assert len(state.curves.of("kl", layer.name)) >= len(state.study.levels) + 1
        assert len(state.curves.of("latency_ms", layer.name)) == len(state.study.levels) + 1
    assert sum(layer.share for layer in state.layers) <= 1.0
    first = state.layers[0].name
    state.edit({first: 0.75}, final=True)
    state.set_options({"epochs": "1", "learning_rate": "0.05"})
    state.start_run()
    assert state.run is not None and state.run.status == "done", state.error
    zeros, elements = state.run.result.achieved[first]
    assert zeros / elements == pytest.approx(0.75, abs=1 / elements)
    state.pack()
    assert state.package is not None, state.error
    with zipfile.ZipFile(io.BytesIO(state.package.content)) as archive:
        result = json.loads(archive.read("result.json"))
    assert result["pruned"]["speedup"] == pytest.approx(state.run.speedup)
    assert result["pruned"]["accuracy"] == pytest.approx(state.run.accuracy)
    assert page.result_of_run is state.run.result


def test_a_model_and_data_make_a_page() -> None:
    page = SensitivityExplorer(TinyNet(), load_data(quadrants(64, 0), quadrants(32, 1)))
    assert len(page.study.layers) == len(page.distribution)
