"""What the page offers: studies of whoever runs the app, found by their names."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

import explorer
from explorer.errors import ExplorerError
from explorer.widgets.choices import DEMO_CHOICES, Choice, offered_choices, open_study, studies_environment

MODULE = """
import torch
from tests.pruning.tiny import TinyNet, quadrants
import explorer

def study():
    torch.manual_seed(0)
    return explorer.Study(TinyNet(), (quadrants(64, 0), quadrants(32, 1)))

def pair():
    return TinyNet(), (quadrants(64, 0), quadrants(32, 1))

def nothing():
    return 7

def broken():
    raise explorer.ExplorerError("The archive of the weights is not mounted.")

number = 3
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "our_models.py").write_text(MODULE)
    monkeypatch.delitem(sys.modules, "our_models", raising=False)
    return tmp_path


def test_without_studies_of_its_own_a_server_offers_the_demo() -> None:
    assert offered_choices({}) == DEMO_CHOICES
    assert studies_environment([], Path()) == {}


def test_studies_of_the_server_come_first_and_are_found_by_the_kernels(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    before = list(sys.path)
    found = studies_environment(["Our network=our_models:study", "As a pair = our_models:pair"], folder)
    assert sys.path == before
    assert found["PYTHONPATH"] == os.pathsep.join([str(folder), "/elsewhere"])
    first, second, *rest = offered_choices(found)
    assert (first, second.label) == (Choice("Our network", "python:our_models:study", ""), "As a pair")
    assert tuple(rest) == DEMO_CHOICES


@pytest.mark.parametrize(
    ("named", "why"),
    [
        ("our_models:study", "names no study; write LABEL=MODULE:FUNCTION"),
        ("Ours=our_models", "names no study"),
        ("Ours=our models:study", "names no study"),
        ("Ours=not_there:study", "There is no module not_there"),
        ("Ours=not_there.deeper:study", r"There is no module not_there\.deeper"),
    ],
)
def test_what_names_no_study_is_refused_before_the_app_starts(folder: Path, named: str, why: str) -> None:
    with pytest.raises(ExplorerError, match=why):
        studies_environment([named], folder)


@pytest.mark.parametrize("function", ["study", "pair"])
def test_a_function_returns_a_study_or_a_model_with_its_data(
    folder: Path, function: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(folder)
    found: Any = open_study(Choice("Ours", f"python:our_models:{function}", ""))
    assert isinstance(found, explorer.Study)
    assert [layer.name for layer in found.layers] == ["conv1", "conv2", "fc"]
    assert found.data is not None


@pytest.mark.parametrize(
    ("function", "why"),
    [
        ("missing", "has no function missing"),
        ("number", "has no function number"),
        ("nothing", "our_models:nothing returned int; it has to return"),
        ("broken", "The archive of the weights is not mounted"),
    ],
)
def test_a_function_that_gives_no_study_is_named(
    folder: Path, function: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(folder)
    with pytest.raises(ExplorerError, match=why):
        open_study(Choice("Ours", f"python:our_models:{function}", ""))
