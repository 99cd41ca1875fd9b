"""What is taken along from a page and brought back: the address, recipes, and files of what there is."""

from __future__ import annotations

import csv
import io
import zipfile
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from explorer.distribution import SparsityDistribution
from explorer.errors import DataError, DistributionError, FormatError
from explorer.formats import Recipe
from explorer.pruning import RunSettings
from explorer.widgets.header import Header
from explorer.widgets.jobs import InlineExecutor
from explorer.widgets.result_panel import ResultPanel
from explorer.widgets.sharing import MAX_FILE, PREFIX, Shared, layers_key, model_key
from explorer.widgets.state import Choice, ExplorerState
from explorer.widgets.targets import KINDS
from tests.widgets.fake_study import FakeStudy
from tests.widgets.test_widgets import press

CHOICES = (
    Choice("First", "fake:one", "d"),
    Choice("Second", "fake:two", "d"),
    Choice("Gone", "fake:gone", "d"),
)


class Later(Executor):
    """Keeps what is submitted until the test lets it run."""

    def __init__(self) -> None:
        self.waiting: list[Callable[[], Any]] = []

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        self.waiting.append(lambda: fn(*args, **kwargs))
        return Future()

    def run(self) -> None:
        while self.waiting:
            self.waiting.pop(0)()


def open_study(choice: Choice) -> FakeStudy:
    if choice.model == "fake:gone":
        raise DataError("It is not here; install it.")
    study = FakeStudy()
    study.model.name = choice.model
    if choice.model == "fake:two":
        study.layers = study.layers[:4]
    return study


def app(executor: Executor | None = None) -> ExplorerState:
    """Return a page as the app opens it: its first model is on the way, or there."""
    state = ExplorerState(choices=CHOICES, executor=executor or InlineExecutor(), open_study=open_study)
    state.load(0)
    return state


def shaped() -> ExplorerState:
    state = app()
    state.edit({"block1.conv1": 0.123, "fc": 0.456}, final=True)
    state.toggle_lock(["fc"])
    state.toggle_tie(["block2.conv1", "block2.conv2"])
    state.choose_target("sparsity")
    state.target = 87.5
    return state


# The address


@given(
    st.lists(st.tuples(st.integers(0, 999), st.booleans(), st.integers(0, 300)), min_size=1, max_size=300),
    st.sampled_from(sorted(KINDS)),
    st.floats(0, 1e6, width=32),
    st.booleans(),
)
def test_what_an_address_holds_comes_back(
    cells: list[tuple[int, bool, int]], kind: str, target: float, tied: bool
) -> None:
    steps, locked, groups = zip(*cells, strict=True)
    shared = Shared(
        7, 2**32 - 1, kind, target, tuple(step / 1000 for step in steps), locked, groups if tied else ()
    )
    text = shared.to_text()
    assert Shared.from_text(text) == shared
    assert len(text) < 60 + len(cells) * (6 if tied else 3)
    assert set(text.removeprefix(PREFIX)) <= set(
        "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    )


def test_an_address_of_ten_layers_is_short() -> None:
    assert len(shaped().address()) < 100


def test_every_damage_is_noticed() -> None:
    text = shaped().address()
    # The last character holds bits that mean nothing.
    for i in range(len(PREFIX), len(text) - 1):
        other = "A" if text[i] != "A" else "B"
        for damaged in (text[:i], text[:i] + other + text[i + 1 :], text[:i] + "%" + text[i + 1 :]):
            with pytest.raises(FormatError, match="not used"):
                Shared.from_text(damaged)


def test_a_page_that_nobody_has_touched_has_no_address() -> None:
    state = app()
    header = Header(state)
    assert header.address == ""
    state.edit({"fc": 0.5}, final=True)
    assert header.address == state.address() != ""
    state.undo()
    assert header.address.startswith(PREFIX)


def test_a_reload_brings_back_bars_locks_ties_and_target() -> None:
    before = shaped()
    address = Header(before).address
    executor = Later()
    state = app(executor)
    header = Header(state)
    # The page asks while the model is still on its way.
    press(header, "restore", text=address)
    assert state.distribution is None
    assert header.heard == ""
    executor.run()
    assert {name: round(value, 3) for name, value in before.distribution.items()} == dict(state.distribution)
    assert state.distribution["block1.conv1"] == 0.123
    assert state.distribution.locked == {"fc"}
    assert state.distribution.groups == (("block2.conv1", "block2.conv2"),)
    assert (state.target_kind, state.target) == ("sparsity", 87.5)
    assert (header.heard, header.address) == (address, address)
    assert state.error == ""
    state.undo()
    assert dict(state.distribution) == dict(state.study.uniform(0.9))


def test_measuring_leaves_the_bars_that_came_with_the_address() -> None:
    address = shaped().address()
    state = app()
    state.restore(address)
    told = dict(state.distribution)
    state.measure()
    assert dict(state.distribution) == told
    assert state.prediction is not None
    assert (state.target_kind, state.target) == ("sparsity", 87.5)


def test_an_address_loads_its_model_first() -> None:
    there = app()
    there.load(1)
    there.edit({"block1.conv1": 0.3}, final=True)
    executor = Later()
    state = app(executor)
    state.restore(there.address())
    executor.run()
    assert state.choice == 1
    assert len(state.layers) == 4
    assert state.distribution["block1.conv1"] == 0.3


def test_a_model_that_is_chosen_by_hand_wins_over_the_address() -> None:
    executor = Later()
    state = app(executor)
    address = shaped().address()
    state.restore(address)
    state.load(1)  # refused, as a model is on its way already; the wish is the reader's all the same
    executor.run()
    assert state.heard == address
    assert dict(state.distribution) == dict(state.study.uniform(0.9))


def test_a_model_that_cannot_be_loaded_leaves_the_page_as_it_was() -> None:
    state = app()
    names = [layer.name for layer in state.layers]
    gone = Shared.of(model_key("fake:gone", "d"), names, "speedup", 3.0, state.distribution).to_text()
    state.restore(gone)
    assert "It is not here" in state.error
    assert state.heard == gone
    assert state.choice == 0
    state.edit({"fc": 0.5}, final=True)
    assert state.distribution["fc"] == 0.5


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("notes", 'ends in "#notes"'),
        (PREFIX + "AAAA", "version 0"),
        (PREFIX + "!!", "damaged"),
        (PREFIX, "damaged"),
        (PREFIX + "A" * 20_000, "damaged"),
    ],
)
def test_an_address_that_is_none_of_ours_is_explained_and_changes_nothing(text: str, words: str) -> None:
    executor = Later()
    state = app(executor)
    # Before the model is there, as when a page is opened with it: the words must outlive the load.
    state.restore(text)
    executor.run()
    assert words in state.error
    assert state.heard == text
    assert dict(state.distribution) == dict(state.study.uniform(0.9))
    assert not state.can_undo


def test_an_address_for_other_layers_or_an_unknown_model_is_refused() -> None:
    state = app()
    mine = dict(state.distribution)
    shared = Shared.from_text(shaped().address())
    for changes, words in (
        ({"layers": layers_key(["x"])}, "is not the one on the page"),
        ({"model": 12345}, "does not offer"),
        ({"sparsities": (0.995,) * 10}, "out of range"),
    ):
        values = {name: getattr(shared, name) for name in shared.__slots__} | changes
        state.restore(Shared(**values).to_text())
        assert words in state.error
        assert dict(state.distribution) == mine
    with pytest.raises(DistributionError):
        shared.distribution(["a"])


# Recipes


def recipe(state: ExplorerState, **changes: Any) -> Recipe:
    values: dict[str, Any] = {
        "model": "fake:fashion-resnet",
        "data": "d",
        "distribution": {layer.name: 0.25 for layer in reversed(state.layers)},
        "locked": ("fc",),
        "target": {"size_bytes": 120_000.0},
        "settings": RunSettings(epochs=2.5, seed=9, momentum=0.8),
    }
    return Recipe(**(values | changes))


def test_a_loaded_recipe_sets_bars_target_and_run_and_can_be_undone(state: ExplorerState) -> None:
    before = state.distribution
    press(ResultPanel(state), "load_recipe", text=recipe(state).to_yaml())
    assert state.error == ""
    assert list(state.distribution) == [layer.name for layer in state.layers]
    assert set(state.distribution.values()) == {0.25}
    assert state.distribution.locked == {"fc"}
    assert state.origin == "loaded"
    assert (state.target_kind, state.target) == ("size_bytes", 120.0)
    assert (state.options.epochs, state.options.seed) == (2.5, 9)
    assert any("momentum 0.8" in line for line in state.log)
    state.undo()
    assert dict(state.distribution) == dict(before)


@pytest.mark.parametrize("form", ["to_yaml", "to_json"])
def test_a_distribution_alone_sets_the_bars_alone(state: ExplorerState, form: str) -> None:
    chosen = SparsityDistribution({layer.name: 0.75 for layer in state.layers})
    options = state.options
    state.load_recipe(getattr(chosen, form)())
    assert dict(state.distribution) == dict(chosen)
    assert state.options == options


def test_what_is_saved_can_be_loaded(state: ExplorerState) -> None:
    state.edit({"block1.conv1": 0.321}, final=True)
    state.toggle_lock(["block1.conv1"])
    mine = state.distribution
    state.save("recipe")
    assert state.package is not None and state.package.filename == "fashion-resnet-recipe.yaml"
    text = state.package.content.decode()
    assert Recipe.from_yaml(text).settings.epochs == state.options.epochs
    state.toggle_lock(["block1.conv1"])
    state.make_uniform()
    state.load_recipe(text)
    assert (dict(state.distribution), state.distribution.locked) == (dict(mine), mine.locked)


def without(state: ExplorerState, name: str) -> dict[str, float]:
    return {layer.name: 0.5 for layer in state.layers if layer.name != name}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: {"distribution": without(s, "fc"), "locked": ()}, "gives no sparsity for 'fc'"),
        (lambda s: {"distribution": {**without(s, "-"), "head": 0.5}}, "no layer 'head'"),
        (
            lambda _: {"model": "other:net", "distribution": {"x": 0.5}, "locked": ()},
            "made for the model 'other:net'",
        ),
        (lambda s: {"distribution": {**without(s, "-"), "fc": 0.995}}, "'fc' has sparsity 0.995"),
        (lambda _: {"settings": RunSettings(epochs=5000)}, "epochs"),
    ],
)
def test_a_recipe_that_does_not_fit_is_refused_and_nothing_is_lost(
    state: ExplorerState, change: Callable[[ExplorerState], dict[str, Any]], words: str
) -> None:
    state.edit({"fc": 0.5}, final=True)
    before, options, target = state.distribution, state.options, state.target
    state.load_recipe(recipe(state, **change(state)).to_yaml())
    assert words in state.error
    assert (state.distribution, state.options, state.target) == (before, options, target)
    assert not state.job.busy
    state.dismiss()
    assert state.error == ""


def test_a_file_that_is_too_large_or_no_recipe_is_refused(state: ExplorerState) -> None:
    before = state.distribution
    for text, words in (("x" * (MAX_FILE + 1), "million characters"), ("sparsity: {fc: [", "line 1")):
        state.load_recipe(text)
        assert words in state.error
        assert state.distribution is before


# Files


def test_measurements_and_a_report_are_offered_as_they_come(state: ExplorerState, study: FakeStudy) -> None:
    panel = ResultPanel(state)
    assert panel.view["files"] == {
        "recipe": "", "measurements": "Nothing has been measured yet", "report": "", "load": "",
    }  # fmt: skip
    press(panel, "save", what="measurements")
    assert "press Measure first" in state.error
    state.measure()
    press(panel, "save", what="measurements")
    assert panel.file["filename"] == "fashion-resnet-measurements.csv"
    rows = list(csv.DictReader(io.StringIO(panel.content.decode())))
    assert len(rows) == len(study.table.points)
    assert float(rows[0]["value"]) == study.table.points[0].value
    press(panel, "taken")
    press(panel, "save", what="report")
    assert b"a plan" in panel.content
    assert study.calls[-1][2]["distribution"] == state.distribution
    state.start_run()
    state.save("report")
    assert b"a run" in panel.content
    # Other bars than those of the run: a report of them.
    state.edit({"block1.conv1": 0.111}, final=True)
    state.save("report")
    assert b"a plan" in panel.content
    state.save("poem")
    assert "there are recipe, measurements and report" in state.error


def test_while_something_goes_on_only_the_recipe_can_be_saved() -> None:
    executor = Later()
    state = ExplorerState(FakeStudy(), executor=executor)
    panel = ResultPanel(state)
    state.measure()
    assert {what for what, why in panel.view["files"].items() if not why} == {"recipe"}
    state.save("recipe")
    assert panel.file["filename"] == "fashion-resnet-recipe.yaml"
    state.load_recipe("sparsity: {}")
    assert "is still going on" in state.error


def test_without_data_the_distribution_itself_is_saved() -> None:
    study = FakeStudy(data=None)
    state = ExplorerState(study, executor=InlineExecutor())
    state.save("recipe")
    assert state.package is not None and state.package.filename == "fashion-resnet-distribution.yaml"
    assert dict(SparsityDistribution.from_yaml(state.package.content.decode())) == dict(state.distribution)


def test_weights_are_not_kept_back_when_the_report_fails(
    state: ExplorerState, monkeypatch: pytest.MonkeyPatch
) -> None:
    state.measure()
    state.set_options({"epochs": "1"})
    state.start_run()

    def fails(*_: object, **__: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(type(state.study), "report", fails)
    state.pack()
    assert state.package is not None, state.error
    with zipfile.ZipFile(io.BytesIO(state.package.content)) as archive:
        assert {"model.safetensors", "recipe.yaml", "result.json"} <= set(archive.namelist())
        assert "report.html" not in archive.namelist()
    assert any("No space left on device" in line for line in state.log)
