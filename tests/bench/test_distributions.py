"""The comparison after training: equal measured latency, every run once, and a table that can be trusted."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from explorer.bench.distributions import (
    NAMES,
    Trained,
    check_names,
    compare_trained,
    load_trained,
    solver_report,
    table,
)
from explorer.data import load_data
from explorer.errors import DistributionError, FormatError, ModelError
from explorer.models import load_model
from explorer.models.architectures import FashionResNet
from explorer.models.demo.train import save_weights
from explorer.study import LatencyBesideDense, Study
from tests.pruning.tiny import TinyNet, quadrants


@pytest.fixture(scope="module")
def study() -> Study:
    torch.manual_seed(0)
    data = load_data(quadrants(256, 0), quadrants(128, 1), name="quadrants")
    study = Study(load_model(TinyNet(), torch.zeros(1, 1, 8, 8), name="tiny"), data)
    study.measure_sensitivity((0.5, 0.8, 0.95), n_images=64, refresh_batchnorm=False)
    return study


@pytest.fixture
def known_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network as fast as it is sparse."""
    monkeypatch.setattr(Study, "_reached", lambda _self, d: 1 / (1 - 0.8 * d["conv2"]))
    monkeypatch.setattr(
        Study, "pruned_latency", lambda _self, d: LatencyBesideDense(1 - 0.8 * d["conv2"], 0.0, 1.0)
    )


@pytest.mark.usefixtures("known_times")
def test_each_network_is_trained_once_and_kept(study: Study, tmp_path: Path) -> None:
    record = tmp_path / "runs.json"
    names = ("uniform", "solved")
    options = {"names": names, "epochs": 0.5, "record": record}
    least, most = study.feasible_speedups()
    target = (least + most) / 2
    runs = compare_trained(study, [target], [0, 1], **options)
    first = next(runs)
    runs.close()
    assert len(json.loads(record.read_text())) == 1
    every = list(compare_trained(study, [target], [0, 1], **options))
    assert every[0] == first
    assert sorted((one.name, one.seed) for one in every) == sorted(
        (name, seed) for name in names for seed in (0, 1)
    )
    assert list(compare_trained(study, [target], [0, 1], **options)) == every
    assert all(0 <= one.accuracy <= 1 and 0 <= one.sparsity < 1 for one in every)


@pytest.mark.usefixtures("known_times")
def test_what_is_out_of_reach_is_left_out(study: Study) -> None:
    assert list(compare_trained(study, [1000.0], [0], names=("uniform", "solved"), epochs=0.5)) == []


@pytest.mark.usefixtures("known_times")
def test_scores_and_searches_are_contestants_by_name(study: Study) -> None:
    names = ("solved:quadratic", "searched")
    least, most = study.feasible_speedups()
    runs = list(compare_trained(study, [(least + most) / 2], [0], names=names, epochs=0.2))
    assert [one.name for one in runs] == list(names)
    check_names([*NAMES, *names])
    with pytest.raises(
        DistributionError, match=r"no distribution 'solved:other'.*searched.*solved: with one of"
    ):
        check_names(["uniform", "solved:other"])


def test_another_dense_network_is_loaded_from_its_training(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = FashionResNet((2, 4, 6), depth=2).eval()
    save_weights(module, tmp_path / "fashion-resnet.safetensors")
    (tmp_path / "fashion-resnet.json").write_text('{"widths": [2, 4, 6], "depth": 2}')
    loaded = load_trained(tmp_path)
    x = torch.randn(3, 1, 28, 28)
    with torch.no_grad():
        assert torch.equal(loaded.module(x), module(x))
    assert len(loaded.layers) == 1 + 2 * 6 + 2 + 1
    (tmp_path / "fashion-resnet.json").write_text('{"widths": [2, 4, 8], "depth": 2}')
    with pytest.raises(ModelError, match=r"holds no network of 'python -m explorer\.models\.demo\.train"):
        load_trained(tmp_path)


def test_a_file_that_is_no_record_is_refused(study: Study, tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text('[{"name": "x"}]')
    with pytest.raises(FormatError, match="no record of this benchmark"):
        next(compare_trained(study, [2.0], [0], record=path))


def test_the_table_has_the_best_first_with_the_spread_over_seeds() -> None:
    runs = [
        Trained(3.0, "uniform", 0, 0.9, 3.01, 0.90), Trained(3.0, "uniform", 1, 0.9, 3.01, 0.92),
        Trained(3.0, "solved", 0, 0.88, 3.02, 0.93), Trained(3.0, "solved", 1, 0.88, 3.02, 0.94),
        Trained(5.0, "solved", 0, 0.95, 5.0, 0.8),
    ]  # fmt: skip
    lines = table(runs).splitlines()
    assert lines[0] == "3 x, 2 seed(s)"
    assert re.match(r"  solved +93\.50 ± +0\.71 +88\.0% +3\.02x", lines[2])
    assert re.match(r"  uniform +91\.00 ± +1\.41 +90\.0% +3\.01x", lines[3])
    assert lines[4] == "5 x, 1 seed(s)"
    assert "nan" in lines[6]


def test_the_solver_is_timed_on_the_study_and_on_a_large_problem(study: Study) -> None:
    least, most = study.feasible_speedups()
    text = solver_report(study, [(least + most) / 2, 1000.0])
    assert len(text.splitlines()) == 2
    assert re.search(r"solved in [\d.]+ ms; divergence before training [\d.]+ against [\d.]+ nats", text)
    assert re.search(r"100 layers x 50 levels.* [\d.]+ ms", text)
    assert "solved" in NAMES
