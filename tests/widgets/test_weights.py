"""Bringing other weights to the page: pieces in order, files of the server's folder, and the way back."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from explorer.errors import ExplorerError, FormatError
from explorer.widgets import weights_desk
from explorer.widgets.open_weights import OpenWeights
from explorer.widgets.state import Choice, ExplorerState
from explorer.widgets.texts import phrase
from explorer.widgets.weights_desk import WeightsDesk
from tests.widgets.fake_study import FakeStudy


def content(study: FakeStudy, **other: torch.Tensor) -> bytes:
    return safetensors.torch.save(
        {**{name: torch.ones(shape) for name, shape in study.weight_shapes.items()}, **other}
    )


def send(desk: WeightsDesk, data: bytes, name: str = "mine.safetensors", piece: int = 50_000) -> None:
    desk.begin(name, len(data))
    for offset in range(0, len(data), piece):
        assert desk.add(offset, data[offset : offset + piece]) == min(len(data), offset + piece)


def left(desk: WeightsDesk) -> list[str]:
    assert desk._temporary is not None
    return [path.name for path in Path(desk._temporary.name).iterdir()]


def test_a_file_that_arrives_in_pieces_is_opened_and_what_was_there_comes_back(
    state: ExplorerState, study: FakeStudy
) -> None:
    desk = state.weights
    state.measure()
    state.edit({"fc": 0.25}, final=True)
    shaped, curves = state.distribution, state.curves
    assert (desk.current, desk.can_return) == ("", False)
    send(desk, content(study))
    assert state.study is not study
    assert state.study.model.name == "fashion-resnet · mine.safetensors"
    assert (state.measured, state.curves.series, state.origin) == (False, {}, "uniform")
    assert (desk.current, desk.can_return, desk.name, desk.size) == ("mine.safetensors", True, "", 0)
    assert left(desk) == []
    # Weights after weights: the name of the first does not stay, and the way back is one step.
    second = state.study
    send(desk, content(study), "other.safetensors")
    assert state.study.model.name == "fashion-resnet · other.safetensors"
    desk.back()
    assert state.study is second
    assert (desk.current, desk.can_return) == ("mine.safetensors", False)
    state.adopt(study)
    assert (desk.current, desk.can_return) == ("", False)
    send(desk, content(study))
    desk.back()
    assert state.study is study
    assert state.measured
    assert (dict(state.distribution), state.curves) == (dict(study.uniform(0.9)), curves)
    assert shaped["fc"] == 0.25


def test_back_brings_the_bars_too(state: ExplorerState, study: FakeStudy) -> None:
    state.edit({"fc": 0.25}, final=True)
    shaped = state.distribution
    send(state.weights, content(study))
    assert state.distribution["fc"] != 0.25
    state.weights.back()
    assert (state.distribution, state.origin) == (shaped, "mine")


def test_back_brings_the_runs_too(state: ExplorerState, study: FakeStudy) -> None:
    state.measure()
    state.start_run()
    state.start_run()
    runs, run = state.runs, state.run
    assert len(runs) == 2
    send(state.weights, content(study))
    assert (state.runs, state.run) == ((), None)
    state.weights.back()
    assert (state.runs, state.run) == (runs, run)


def test_an_address_tells_the_models_weights_from_others(state: ExplorerState, study: FakeStudy) -> None:
    state.edit({"fc": 0.25}, final=True)
    own = state.address()
    send(state.weights, content(study))
    state.edit({"fc": 0.25}, final=True)
    theirs = state.address()
    assert own.split("=")[0] == theirs.split("=")[0]
    assert own != theirs
    state.weights.back()
    state.edit({"fc": 0.25}, final=True)
    assert state.address() == own
    state.restore(theirs)
    assert state.error == phrase("refusal.address.other_model")
    assert state.study is study


def test_names_that_come_from_a_page_are_no_paths(state: ExplorerState, study: FakeStudy) -> None:
    data = content(study)
    for name, kept in (
        ("../../etc/passwd", "passwd"), ("C:\\temp\\w.safetensors", "w.safetensors"), ("..", "_"), ("", ".safetensors"),
        ("a\n\tb", "a__b"), ("x" * 500, "x" * 80),
    ):  # fmt: skip
        send(state.weights, data, name)
        assert (state.error, state.weights.current) == ("", kept)
        assert state.study.model.name == f"fashion-resnet · {kept}"


@pytest.mark.skipif(os.name != "posix", reason="processes are not asked there")
def test_what_a_killed_kernel_left_is_removed(
    state: ExplorerState, study: FakeStudy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights_desk.tempfile, "tempdir", str(tmp_path))
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for name in (
        f"sparsity-explorer-weights-{ended.pid}-x",
        f"sparsity-explorer-weights-{os.getppid()}-x",
        "sparsity-explorer-weights-none-x",
    ):
        (tmp_path / name).mkdir()
    send(state.weights, content(study))
    assert state.weights.current
    names = {path.name for path in tmp_path.iterdir()}
    assert f"sparsity-explorer-weights-{ended.pid}-x" not in names
    assert len(names) == 3


@pytest.mark.parametrize("cut", [1, 60])
def test_a_file_that_cannot_be_used_leaves_the_page_as_it_was(
    state: ExplorerState, study: FakeStudy, cut: int
) -> None:
    state.measure()
    before = state.distribution
    data = content(study)[:-cut] if cut > 1 else content(study, more=torch.ones(2))
    send(state.weights, data)
    assert ("does not belong" if cut == 1 else "not a safetensors file") in state.error
    assert (state.study, state.distribution, state.measured) == (study, before, True)
    assert (state.weights.current, state.weights.name) == ("", "")
    assert left(state.weights) == []


def test_pieces_that_do_not_follow_each_other_are_refused_and_forgotten(
    state: ExplorerState, study: FakeStudy
) -> None:
    desk, data = state.weights, content(study)
    for offset, piece in ((10, data[10:20]), (0, data + b"more"), (0, b"")):
        desk.begin("mine.safetensors", len(data))
        with pytest.raises(FormatError, match="did not arrive in one piece"):
            desk.add(offset, piece)
        assert (desk.name, left(desk)) == ("", [])
        with pytest.raises(FormatError, match="No file is on its way"):
            desk.add(0, data)
    with pytest.raises(FormatError, match="No file is on its way"):
        desk.open()


def test_files_that_are_too_large_are_refused_before_they_come(
    state: ExplorerState, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = state.weights
    for size in (0, weights_desk.MOST_BYTES + 1):
        with pytest.raises(FormatError, match=r"between 1 byte and 1\.0 GB are sent"):
            desk.begin("large.safetensors", size)
    monkeypatch.setattr(weights_desk.shutil, "disk_usage", lambda _: os.terminal_size((1, 1)))
    monkeypatch.setattr(weights_desk.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1_000_000})())
    with pytest.raises(ExplorerError, match=r"the server has 1\.0 MB left"):
        desk.begin("large.safetensors", 2_000_000)


def test_a_new_file_takes_the_place_of_one_that_was_on_its_way(
    state: ExplorerState, study: FakeStudy
) -> None:
    desk, data = state.weights, content(study)
    desk.begin("first.safetensors", len(data))
    desk.add(0, data[:100])
    desk.begin("second.safetensors", len(data))
    assert len(left(desk)) == 1
    desk.add(0, data)
    assert desk.current == "second.safetensors"


class Waiting:
    """An executor whose work waits for a signal."""

    def __init__(self) -> None:
        from concurrent.futures import ThreadPoolExecutor

        self.pool, self.go = ThreadPoolExecutor(1), threading.Event()

    def submit(self, work: Any, *args: Any) -> Any:
        def later() -> Any:
            assert self.go.wait(10)
            return work(*args)

        return self.pool.submit(later)


def test_a_file_that_arrives_while_something_goes_on_waits_until_it_is_asked_for(study: FakeStudy) -> None:
    executor = Waiting()
    state = ExplorerState(study, executor=executor)  # type: ignore[arg-type]
    desk, data = state.weights, content(study)
    desk.begin("mine.safetensors", len(data))
    state.measure()
    assert state.job.busy
    desk.add(0, data)
    assert (desk.is_waiting, desk.current, state.study) == (True, "", study)
    with pytest.raises(ExplorerError, match="Measuring"):
        desk.open()
    with pytest.raises(ExplorerError, match="Measuring"):
        desk.begin("other.safetensors", 10)
    assert desk.is_waiting
    executor.go.set()
    executor.pool.submit(lambda: None).result()
    while state.job.busy:
        executor.pool.submit(lambda: None).result()
    desk.open()
    while state.job.busy:
        executor.pool.submit(lambda: None).result()
    assert (desk.current, desk.is_waiting) == ("mine.safetensors", False)
    executor.pool.shutdown()


@pytest.fixture
def folder(tmp_path: Path, study: FakeStudy) -> Path:
    inside = tmp_path / "weights"
    inside.mkdir()
    (inside / "a.safetensors").write_bytes(content(study))
    (inside / "notes.txt").write_text("nothing")
    (tmp_path / "secret.safetensors").write_bytes(content(study))
    (inside / "link.safetensors").symlink_to(tmp_path / "secret.safetensors")
    (inside / "within.safetensors").symlink_to(inside / "a.safetensors")
    (inside / "folder.safetensors").mkdir()
    return inside


def test_files_of_the_servers_folder_are_listed_and_picked_and_nothing_outside_is(
    folder: Path, study: FakeStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    from explorer.widgets.jobs import InlineExecutor

    monkeypatch.setenv(weights_desk.FOLDER_VARIABLE, str(folder))
    state = ExplorerState(study, executor=InlineExecutor())
    desk = state.weights
    assert [file.name for file in desk.files] == ["a.safetensors", "within.safetensors"]
    assert desk.files[0].size == (folder / "a.safetensors").stat().st_size
    for name in ("../secret.safetensors", "link.safetensors", "notes.txt", str(folder / "a.safetensors"), ""):
        with pytest.raises(FormatError, match="no file"):
            desk.pick(name)
    desk.pick("a.safetensors")
    assert (desk.current, state.error) == ("a.safetensors", "")
    # It is the server's: it stays.
    (folder / "b.safetensors").write_bytes(content(study))
    (folder / "a.safetensors").unlink()
    desk.list_files()
    assert [file.name for file in desk.files] == ["b.safetensors"]


def test_another_model_forgets_the_weights(tmp_path: Path, study: FakeStudy) -> None:
    from explorer.widgets.jobs import InlineExecutor

    state = ExplorerState(
        study,
        choices=(Choice("Fake", "fake", "fake"),),
        executor=InlineExecutor(),
        open_study=lambda _: FakeStudy(),
    )
    send(state.weights, content(study))
    state.load(0)
    assert (state.weights.current, state.weights.can_return) == ("", False)


def test_the_view_answers_each_piece_and_says_what_was_refused(
    state: ExplorerState, study: FakeStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    view = OpenWeights(state)
    said: list[Any] = []
    monkeypatch.setattr(view, "send", said.append)
    assert view.expected == {name: list(shape) for name, shape in study.weight_shapes.items()}
    assert (view.view["current"], view.view["why_not"], view.view["has_folder"]) == ("", "", False)
    data = content(study)
    view._on_message(None, {"do": "begin", "name": "mine.safetensors", "size": len(data)}, [])
    assert (view.view["name"], view.view["size"], view.view["received"]) == ("mine.safetensors", len(data), 0)
    view._on_message(None, {"do": "piece", "offset": 0}, [memoryview(data)[:1000]])
    assert view.view["received"] == 1000
    view._on_message(None, {"do": "piece", "offset": 1}, [memoryview(data)[1:2]])
    assert "did not arrive" in state.error
    assert said == [
        {"do": "received", "bytes": 0}, {"do": "received", "bytes": 1000}, {"do": "refused"},
    ]  # fmt: skip
    view._on_message(None, {"do": "begin", "name": "mine.safetensors", "size": len(data)}, [])
    view._on_message(None, {"do": "piece", "offset": 0}, [data])
    assert view.view["current"] == "mine.safetensors"
    view._on_message(None, {"do": "back"}, [])
    assert (view.view["current"], state.study) == ("", study)
    view.close()
    state.weights.begin("again.safetensors", 10)
    assert view.view["name"] == ""


def test_published_losses_take_no_other_weights(study: FakeStudy) -> None:
    study.provenance = "Losses of ResNet-50: somebody."
    view = OpenWeights(ExplorerState(study))
    assert view.expected == {}
    assert "published for other people's weights" in view.view["why_not"]
