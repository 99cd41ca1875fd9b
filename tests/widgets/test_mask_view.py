"""The mask of a layer as a picture, against the slowest way to make it, and the widget that shows it."""

from __future__ import annotations

import json
import math
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

from explorer.errors import DistributionError
from explorer.widgets.mask_picture import (
    MAX_COLUMNS,
    MAX_ROWS,
    MaskPicture,
    limits_for,
    picture_of,
)
from explorer.widgets.mask_view import MaskView
from explorer.widgets.runs import MASK_BUDGET, MAX_MOMENTS
from explorer.widgets.state import ExplorerState
from tests.widgets.fake_study import FakeStudy
from tests.widgets.test_widgets import press

LAYER = "block3.conv2"


def cells(picture: MaskPicture) -> list[list[int]]:
    rows = np.frombuffer(picture.cells, np.uint8).reshape(picture.n_rows, picture.n_columns)
    return [[int(cell) for cell in row] for row in rows]


def slowly(mask: np.ndarray, row_span: int, column_span: int) -> list[list[int]]:
    """Return the cells by counting weight after weight."""
    matrix = mask.reshape(len(mask), -1)
    found = []
    for top in range(0, len(matrix), row_span):
        row = []
        for left in range(0, matrix.shape[1], column_span):
            block = [
                bool(matrix[i, j])
                for i in range(top, min(top + row_span, len(matrix)))
                for j in range(left, min(left + column_span, matrix.shape[1]))
            ]
            row.append(math.ceil(255 * sum(block) / len(block)))
        found.append(row)
    return found


@pytest.mark.parametrize(
    ("shape", "limits", "spans"),
    [
        ((5, 7), (128, 256), (1, 1)),
        ((1, 1, 1, 1), (128, 256), (1, 1)),
        ((10, 300), (128, 256), (1, 2)),
        ((130, 3, 3, 3), (128, 256), (2, 1)),
        # More weights than columns: whole inputs are put together.
        ((6, 40, 3, 3), (128, 256), (1, 9)),
        ((9, 7, 2, 3), (4, 3), (3, 18)),
        ((7, 11, 5), (3, 55), (3, 1)),
    ],
)
@pytest.mark.parametrize("alive", [0.0, 0.03, 0.5, 1.0])
def test_a_picture_is_what_counting_gives(
    shape: tuple[int, ...], limits: tuple[int, int], spans: tuple[int, int], alive: float
) -> None:
    mask = np.random.default_rng(3).random(shape) < alive
    picture = picture_of(mask, max_rows=limits[0], max_columns=limits[1])
    assert (picture.row_span, picture.column_span) == spans
    assert picture.n_rows <= limits[0]
    assert picture.n_columns <= limits[1]
    assert cells(picture) == slowly(mask, *spans)
    assert picture.n_alive == mask.sum()
    assert picture.dead_outputs == sum(not row.any() for row in mask)
    assert picture.unused_inputs == sum(not mask[:, i].any() for i in range(shape[1]))
    assert not picture.grouped


def test_a_single_weight_in_a_large_cell_can_be_seen() -> None:
    mask = np.zeros((1000, 1000), bool)
    mask[501, 77] = True
    picture = picture_of(mask)
    assert (picture.n_rows, picture.n_columns) == (125, 250)
    assert np.count_nonzero(np.frombuffer(picture.cells, np.uint8)) == 1
    assert picture.unused_inputs == 999


@pytest.mark.parametrize("groups", [2, 6])
def test_inputs_of_grouped_convolutions_are_counted_group_by_group(groups: int) -> None:
    mask = np.random.default_rng(0).random((6, 3, 1, 1)) < 0.3
    mask[:2] = False
    picture = picture_of(mask, groups=groups)
    unused = sum(
        not mask[group * 6 // groups : (group + 1) * 6 // groups, i].any()
        for group in range(groups)
        for i in range(3)
    )
    assert (picture.n_inputs, picture.unused_inputs) == (3 * groups, unused)
    assert picture.grouped


def test_a_mask_of_torch_in_channels_last_is_read_by_its_indices() -> None:
    mask = torch.rand(8, 5, 3, 3) < 0.4
    assert picture_of(mask.to(memory_format=torch.channels_last)) == picture_of(mask.numpy())


@pytest.mark.parametrize("shape", [(4,), (0, 3), (3, 0)])
def test_what_is_no_matrix_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="no matrix"):
        picture_of(np.zeros(shape, bool))
    with pytest.raises(ValueError, match="4 outputs cannot be split into 3 groups"):
        picture_of(np.ones((4, 3), bool), groups=3)


def test_words_say_how_much_is_alive_and_what_is_left_unused() -> None:
    mask = np.ones((4, 6, 3, 3), bool)
    mask[1] = False
    mask[:, 2:4] = False
    assert picture_of(mask).describe("conv") == (
        "conv: 50.0 % of 216 weights alive; 1 of 4 output channels entirely zero; 2 of 6 input channels unused."
    )
    assert picture_of(np.ones((1, 2), bool)).describe("fc") == (
        "fc: 100.0 % of 2 weights alive; 0 of 1 output entirely zero; 0 of 2 inputs unused."
    )


@pytest.mark.parametrize("n_layers", [1, 10, 54, 200, 3000])
def test_all_moments_of_all_layers_fit_the_budget(n_layers: int) -> None:
    rows, columns = limits_for(n_layers, MAX_MOMENTS, MASK_BUDGET)
    assert rows <= MAX_ROWS
    assert columns <= MAX_COLUMNS
    assert rows * columns * n_layers * MAX_MOMENTS <= MASK_BUDGET
    assert rows * columns >= 200


def shown(view: MaskView) -> np.ndarray:
    rows, columns = struct.unpack("<HH", view.picture[:4])
    return np.frombuffer(view.picture[4:], np.uint8).reshape(rows, columns)


def expected(study: FakeStudy, name: str, sparsity: float) -> list[list[int]]:
    return cells(picture_of(study.alive(name, sparsity)))


def test_before_a_run_it_shows_what_magnitude_pruning_at_the_bar_would_keep(
    state: ExplorerState, study: FakeStudy
) -> None:
    view = MaskView(state)
    press(view, "select", layer=LAYER)
    assert shown(view).tolist() == expected(study, LAYER, 0.9)
    assert view.view["source"] == "bars"
    assert view.view["text"].startswith(f"{LAYER}: 10.0 % of 331,776 weights alive; ")
    assert "at the bar's 90.0 % would keep" in view.view["caption"]
    state.edit({LAYER: 0.5}, final=True)
    assert shown(view).tolist() == expected(study, LAYER, 0.5)
    assert len(view.picture) <= 4 + MAX_ROWS * MAX_COLUMNS


def test_a_run_is_shown_when_it_begins_and_can_be_looked_at_over_time(
    state: ExplorerState, study: FakeStudy
) -> None:
    view = MaskView(state)
    press(view, "select", layer=LAYER)
    state.start_run()
    final = state.distribution[LAYER]
    assert view.view["source"] == "run"
    assert shown(view).tolist() == expected(study, LAYER, final)
    moments = state.run.moments
    assert 5 < len(moments) <= MAX_MOMENTS
    assert view.view["at"] == len(moments) - 1
    assert view.view["times"][0] == 0
    assert view.view["times"][-1] == state.run.epochs
    view.set_state({"moment": 0})
    assert (shown(view) == 255).all()
    assert view.view["text"].startswith(f"{LAYER}: 100.0 % of")
    assert view.view["caption"] == "Run 1, after 0 of 5 epochs."
    alive = []
    for moment in moments:
        view.set_state({"moment": moment.step})
        alive.append(moment.pictures[LAYER].n_alive)
        assert shown(view).tolist() == cells(moment.pictures[LAYER])
    assert alive == sorted(alive, reverse=True)
    # A step of which there is no picture shows the nearest; one beyond the end the last.
    view.set_state({"moment": 10_000})
    assert view.view["at"] == len(moments) - 1
    view.set_state({"source": "bars"})
    state.edit({LAYER: 0.0}, final=True)
    assert (shown(view) == 255).all()
    state.start_run()
    assert (view.source, view.moment) == ("run", -1)
    assert view.view["caption"].startswith("Run 2, after 5 of 5")


def test_a_page_that_sends_nonsense_changes_nothing(state: ExplorerState) -> None:
    view = MaskView(state)
    before = view.view
    press(view, "select", layer="no such layer")
    press(view, "select")
    with pytest.raises(Exception, match="source"):
        view.set_state({"source": "elsewhere"})
    view.set_state({"moment": -7})
    assert view.view["selected"] == before["selected"]
    json.dumps(view.view, allow_nan=False)


def test_without_a_model_and_without_masks_it_says_so(state: ExplorerState, study: FakeStudy) -> None:
    empty = MaskView(ExplorerState())
    assert empty.picture == b""
    assert empty.view["text"] == "Choose a model first: its masks are shown here."

    def refused(*_: Any) -> Any:
        raise DistributionError("The weights are not here.")

    study.alive = refused
    state.select("fc")
    view = MaskView(state)
    assert view.picture == b""
    assert view.view["text"] == "The mask of fc cannot be shown: The weights are not here."


def test_a_network_without_its_weights_has_no_mask(state: ExplorerState) -> None:
    view = MaskView(state)
    assert view.picture != b""
    replay = FakeStudy()
    replay.provenance = "Losses of ResNet-50: somebody."
    state.adopt(replay)
    assert view.picture == b""
    assert "not bundled" in view.view["text"]
    assert view.view["caption"] == ""


def test_nothing_is_sent_while_nothing_changes(state: ExplorerState) -> None:
    view = MaskView(state)
    sent: list[object] = []
    view.observe(sent.append, names=["picture", "view"])
    view.refresh()
    state.choose_target("sparsity")
    assert sent == []


def test_the_latest_wish_is_shown_and_the_page_does_not_wait(study: FakeStudy) -> None:
    gate, asked = threading.Event(), []
    real = study.alive

    def slow(name: str, sparsity: float) -> Any:
        asked.append(sparsity)
        gate.wait(10)
        return real(name, sparsity)

    study.alive = slow
    with ThreadPoolExecutor(1) as executor:
        state = ExplorerState(study, executor=executor, interval=0.0)
        state.select(LAYER)
        view = MaskView(state)
        for sparsity in (0.2, 0.3, 0.4):
            state.edit({LAYER: sparsity}, final=True)
        assert view.view["text"] == f"The mask of {LAYER} is being worked out."
        gate.set()
        deadline = time.monotonic() + 10
        while f"{LAYER}: 60.0 % of" not in view.view["text"] and time.monotonic() < deadline:
            time.sleep(0.005)
        assert shown(view).tolist() == expected(study, LAYER, 0.4)
        assert asked[:2] == [0.9, 0.4]


def test_a_closed_view_takes_nothing_in(study: FakeStudy) -> None:
    gate = threading.Event()
    real = study.alive
    study.alive = lambda name, sparsity: (gate.wait(10), real(name, sparsity))[1]
    with ThreadPoolExecutor(1) as executor:
        state = ExplorerState(study, executor=executor, interval=0.0)
        view = MaskView(state)
        view.close()
        gate.set()
    assert view.picture == b""
