"""What was measured once is remembered, and a file that is not ours is never believed."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import explorer
from explorer.inference import choosing, native
from explorer.inference.choices import ChoiceCache, choice_cache
from explorer.inference.execution import Execution

pytestmark = pytest.mark.usefixtures("measured_as_users_have_it")


def test_answers_survive_the_process_and_those_of_another_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "choices.json"
    first, second = ChoiceCache(path), ChoiceCache(path)
    first.put({"a": "sparse"})
    second.put({"b": "dense"})
    third = ChoiceCache(path)
    assert (third.get("a"), third.get("b"), third.get("c")) == ("sparse", "dense", None)


@pytest.mark.parametrize(
    "content", ["", "{", "[1, 2]", "3", "null", '{"a": 3}', '{"a": {"b": "c"}}', '{"a": "sparse", "b": "de', "\x00\xff", "[" * 100_000]
)  # fmt: skip
def test_a_file_that_is_no_list_of_answers_is_ignored_and_replaced(tmp_path: Path, content: str) -> None:
    path = tmp_path / "choices.json"
    path.write_text(content, encoding="utf-8")
    cache = ChoiceCache(path)
    assert cache.get("a") is None
    cache.put({"a": "sparse"})
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": "sparse"}


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def of_another_user(path: Path) -> None:
    if os.geteuid() == 0:
        os.chown(path, 12345, -1)
    else:
        pytest.skip("only root can give files away")


def writable_by_all(path: Path) -> None:
    path.chmod(0o666)


@pytest.mark.skipif(os.name != "posix", reason="Windows knows neither pipes of this kind nor modes")
@pytest.mark.timeout(20)
@pytest.mark.parametrize("change", [pipe, of_another_user, writable_by_all])
def test_what_is_no_file_or_another_could_have_written_is_neither_waited_for_nor_believed(
    tmp_path: Path, change: Callable[[Path], None]
) -> None:
    path = tmp_path / "choices.json"
    ChoiceCache(path).put({"a": "sparse"})
    assert ChoiceCache(path).get("a") == "sparse"
    change(path)
    cache = ChoiceCache(path)
    assert cache.get("a") is None
    cache.put({"b": "dense"})
    assert json.loads(path.read_text(encoding="utf-8")) == {"b": "dense"}
    assert ChoiceCache(path).get("b") == "dense"


def test_a_folder_in_the_place_of_the_file_costs_nothing_but_the_file(tmp_path: Path) -> None:
    path = tmp_path / "choices.json"
    path.mkdir()
    cache = ChoiceCache(path)
    cache.put({"a": "sparse"})
    assert cache.get("a") == "sparse"
    assert [entry.name for entry in tmp_path.iterdir()] == ["choices.json"]
    assert path.is_dir()


def test_a_file_that_may_not_be_read_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "choices.json"
    ChoiceCache(path).put({"a": "sparse"})

    def refused(*_: object) -> int:  # root may read everything
        raise PermissionError

    monkeypatch.setattr(native, "_at_once", refused)
    cache = ChoiceCache(path)
    assert cache.get("a") is None
    cache.put({"b": "dense"})
    assert cache.get("b") == "dense"


@pytest.mark.skipif(os.name != "posix", reason="Windows knows no pipes of this kind")
@pytest.mark.timeout(60)
def test_a_network_is_compiled_also_where_a_pipe_lies_in_the_place_of_the_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EXPLORER_CACHE", str(tmp_path))
    os.mkfifo(tmp_path / "choices.json")
    torch.manual_seed(0)
    layer, x = nn.Conv2d(8, 16, 1), torch.randn(1, 8, 16, 16)
    layer.weight.data[torch.rand_like(layer.weight) < 0.5] = 0
    assert torch.allclose(explorer.compile(layer, x)(x), layer(x), atol=1e-5)
    assert (tmp_path / "choices.json").is_file()


def test_a_folder_that_cannot_be_written_costs_nothing_but_the_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    cache = ChoiceCache(tmp_path / "file" / "choices.json")
    cache.put({"a": "sparse"})
    assert cache.get("a") == "sparse"


@pytest.mark.parametrize("trouble", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_file_that_could_not_be_finished_is_not_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trouble: BaseException
) -> None:
    def full(*_: object) -> None:
        raise trouble

    monkeypatch.setattr(json, "dump", full)
    with contextlib.suppress(KeyboardInterrupt):
        ChoiceCache(tmp_path / "choices.json").put({"a": "sparse"})
    assert not list(tmp_path.iterdir())


def test_a_choice_is_timed_once_and_then_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXPLORER_CACHE", str(tmp_path))
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 8, 1)).eval()
    for layer in (network[0], network[2]):
        layer.weight.data[torch.rand_like(layer.weight) < 0.5] = 0
    x = torch.randn(1, 8, 20, 20)
    timed = []
    original = choosing._time_candidates
    monkeypatch.setattr(choosing, "_time_candidates", lambda *a: (timed.append(1), original(*a))[1])
    first = explorer.compile(network, x)
    assert timed
    assert (tmp_path / "choices.json").exists()
    timed.clear()
    second = explorer.compile(network, x)
    assert not timed
    assert second.choices == first.choices
    # Remembered answers are only used where they name a candidate of the layer.
    path = tmp_path / "choices.json"
    damaged = dict.fromkeys(json.loads(path.read_text(encoding="utf-8")), "quantum")
    choice_cache().put(damaged)
    assert set(explorer.compile(network, x).choices.values()) <= {
        "sparse", "dense", "sparse, shift", "dense, shift", "sparse, compact", "dense, compact", "dense, channels",
        "code", "code, shift", "code, compact",
    }  # fmt: skip
    assert timed


@pytest.mark.parametrize(("noisy", "passes"), [(0, 3), (1, 3), (2, 4), (5, 7), (100, 8)])
def test_while_other_work_slows_the_layers_down_they_are_timed_again(
    noisy: int, passes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EXPLORER_CACHE", str(tmp_path))
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(8, 16, 1)).eval()
    network[0].weight.data[torch.rand_like(network[0].weight) < 0.5] = 0
    calls = dict.fromkeys(("sparse", "dense"), 0)

    def step_times(timed: Execution, _: object) -> np.ndarray:
        assert timed.steps is not None
        kind = timed.steps.labels[0].partition(",")[0]
        calls[kind] += 1
        # The sparse kernel is the faster one. Other work, never twice the same, meets all passes that are noisy.
        disturbance = 10.0 + 7 * calls[kind] if kind == "sparse" and calls[kind] <= noisy else 0.0
        return np.array([{"sparse": 1.0, "dense": 2.0}[kind] + disturbance])

    monkeypatch.setattr(choosing, "_step_times", step_times)
    # Not a large network, whose layers are timed twice.
    monkeypatch.setattr(choosing, "_PASSES_S", float("inf"))
    engine = explorer.compile(network, torch.randn(1, 8, 16, 16))
    assert calls == {"sparse": passes, "dense": passes}
    assert engine.choices["0"].startswith("sparse" if noisy < passes else "dense")
