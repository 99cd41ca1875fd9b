"""Steps of the page on their own, over one tiny real study: one state, however many cells show it."""

from __future__ import annotations

import gc

import pytest
import torch

import explorer
from explorer.data import load_data
from explorer.errors import ExplorerError
from explorer.widgets import ExplorerState, steps
from explorer.widgets.equalizer import Equalizer
from explorer.widgets.jobs import InlineExecutor
from tests.pruning.tiny import TinyNet, quadrants

pytestmark = pytest.mark.usefixtures("quick_latencies")


@pytest.fixture
def study() -> explorer.Study:
    torch.manual_seed(0)
    return explorer.Study(TinyNet(), load_data(quadrants(256, 0), quadrants(128, 1)))


def test_cells_that_show_one_study_share_its_state(study: explorer.Study) -> None:
    table, editor = explorer.LayerTable(study), explorer.DistributionEditor(study)
    view, page = explorer.SensitivityView(study), explorer.SensitivityExplorer(study)
    assert table.state is editor.state is view.state is page.state
    assert editor.study is study
    name = study.layers[0].name
    page.state.edit({name: 0.25}, final=True)
    assert editor.distribution[name] == 0.25
    [equalizer] = [part for part in editor.children[0].children if isinstance(part, Equalizer)]
    assert equalizer.values[0] == 0.25
    assert equalizer.page == page.equalizer.page
    other = explorer.LayerTable(explorer.Study(TinyNet(), study.data))
    assert other.state is not table.state


def test_a_state_goes_with_the_last_widget_that_shows_it(study: explorer.Study) -> None:
    before = len(steps._STATES)
    widget = explorer.LayerTable(study)
    assert len(steps._STATES) == before + 1
    for part in (*widget.children[0].children, *widget.children, widget):
        part.close()
    del widget, part
    gc.collect()
    assert len(steps._STATES) == before


def test_what_is_no_study_is_refused_in_words() -> None:
    with pytest.raises(ExplorerError, match=r"is no study; give explorer\.Study"):
        explorer.LayerTable(torch.nn.Linear(2, 2))


def test_a_run_that_was_made_elsewhere_is_watched(study: explorer.Study) -> None:
    state = ExplorerState(study, executor=InlineExecutor())
    steps._STATES[id(study)] = state
    asked = {layer.name: 0.5 for layer in study.layers}
    run = study.prune(asked, epochs=1, learning_rate=0.05)
    monitor = explorer.RunMonitor(run)
    assert monitor.state is state
    assert state.run is not None and state.run.status == "done", state.error
    assert state.run.result is run.result
    assert dict(state.distribution) == asked
    # Its own schedule is drawn, and not the one that the page would have taken.
    assert (state.run.options.stabilise, state.run.options.ramp) == (
        run.settings.stabilise,
        run.settings.ramp,
    )
    last = state.run.moments[-1].pictures
    assert {name: picture.n_weights - picture.n_alive for name, picture in last.items()} == {
        name: zeros for name, (zeros, _) in run.result.achieved.items()
    }
    explorer.RunMonitor(run)
    assert "This run is finished; show one that has not begun." in state.error
    alone = explorer.PruningRun(study.model, study.data, asked, epochs=1)
    with pytest.raises(ExplorerError, match=r"not made by Study\.prune"):
        explorer.RunMonitor(alone)
