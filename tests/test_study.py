from __future__ import annotations

import itertools
import json
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import explorer.inference
from explorer.data import LoadedData, load_data
from explorer.distribution import SparsityDistribution
from explorer.errors import DataError, DistributionError, FormatError, InfeasibleTarget, ModelError, RunError
from explorer.formats import Recipe, load_weights, save_weights
from explorer.inference import Benchmark
from explorer.masks import n_zeros
from explorer.models import LoadedModel, load_model
from explorer.pruning import EvalEvent, LatencyEvent, evaluate
from explorer.sensitivity import CellCounter, SensitivityPoint, SensitivityTable, measure_joint
from explorer.sensitivity import latency as latency_module
from explorer.study import Study
from tests.pruning.tiny import TinyNet, quadrants

pytestmark = pytest.mark.usefixtures("quick_latencies")

LEVELS = (0.5, 0.9)


@pytest.fixture(scope="module")
def data() -> LoadedData:
    return load_data(quadrants(256, 0), quadrants(128, 1), name="quadrants")


@pytest.fixture(scope="module")
def model(data: LoadedData) -> LoadedModel:
    """A network that has learnt something: sensitivity of a random one is noise."""
    torch.manual_seed(0)
    loaded = load_model(TinyNet(), torch.zeros(1, 1, 8, 8), name="tiny")
    trained = (
        Study(loaded, data)
        .prune({}, epochs=4, batch_size=32, distillation=0.0, latency=False)
        .finish()
        .module
    )
    return load_model(trained, torch.zeros(1, 1, 8, 8), name="tiny")


@pytest.fixture(scope="module")
def measured(model: LoadedModel, data: LoadedData) -> Study:
    """A study with everything measured; tests must not change it."""
    study = Study(model, data)
    study.measure_sensitivity(LEVELS, n_images=64)
    return study


class KnownTimes:
    """Stands in for the engine: a network takes 1 ms, and 10 ms times what is left of its second convolution, times `bias`."""

    def __init__(self, study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
        self.bias = 1.0
        study._dense = {"torch eager": timed(20.0), "engine dense": timed(11.0)}
        monkeypatch.setattr(study, "_dense_calls", lambda: {"engine dense": None})
        monkeypatch.setattr(
            study, "_packed", lambda module: SimpleNamespace(module=module, isa="test", precision="fp32")
        )
        monkeypatch.setattr(explorer.inference, "compare_latency", self.compare)

    def compare(self, calls: dict[str, Any], **_: object) -> dict[str, Benchmark]:
        weight = calls["pruned"].engine.module.get_submodule("conv2").weight
        left = float((weight != 0).float().mean())
        return {"dense": timed(11.0), "pruned": timed(self.bias * (1.0 + 10.0 * left))}


def timed(ms: float) -> Benchmark:
    return Benchmark(ms, 0.0, ms, 1, 1, 1, "test")


def known_table() -> SensitivityTable:
    """The times of `KnownTimes`, and a loss that rises with sparsity, alike in all layers."""
    points = []
    for level in (0.0, 0.5, 0.9, 0.99):
        points.append(SensitivityPoint("", level, "latency_ms", 1.0 + 10.0 * (1.0 - level)))
        for name in ("conv1", "conv2", "fc"):
            points.append(SensitivityPoint(name, level, "kl", level**2))
            points.append(SensitivityPoint(name, level, "removed_energy", level**2))
            ms = 10.0 * (1.0 - level) if name == "conv2" else 0.0
            points.append(SensitivityPoint(name, level, "latency_ms", ms))
    return SensitivityTable.from_points(
        points, layers=["conv1", "conv2", "fc"], metadata={"baseline_latency_ms": 11.0}
    )


def test_measuring_fills_the_table_with_both_curves_and_the_layers_with_their_share(measured: Study) -> None:
    table = measured.table
    assert table is not None
    names = [layer.name for layer in measured.layers]
    assert names == ["conv1", "conv2", "fc"]
    for kind in ("kl", "accuracy", "latency_ms"):
        values = table.values(kind)
        assert values.shape == (3, 3)
        assert bool(np.isfinite(values).all())
    assert table.metadata["threads"] == 1
    assert measured.dense_baseline is not None
    name, best = measured.dense_baseline
    assert all(best.latency_ms <= other.latency_ms for other in measured.dense_latency().values())
    assert table.metadata["baseline"] == name
    # The fastest contestant against the engine's own dense run, in the units of the table.
    whole = table.baseline("latency_ms")
    assert whole is not None
    assert table.baseline_latency_ms == pytest.approx(
        whole * best.latency_ms / measured.dense_latency()["engine dense"].latency_ms
    )
    shares = [layer.share for layer in measured.layers]
    assert all(share is not None and 0.0 < share < 1.0 for share in shares)
    assert sum(share or 0.0 for share in shares) < 1.0


def test_points_come_so_that_both_curves_grow_and_the_table_grows_with_them(
    model: LoadedModel, data: LoadedData
) -> None:
    study = Study(model, data)
    points = []
    for point in study.sensitivity_points(LEVELS, n_images=64, refresh_batchnorm=False):
        if point.kind == "latency_ms" and not any(seen.kind == "latency_ms" for seen in points):
            # The first level of the loss was there for every layer before the first latency.
            assert study.table is not None
            assert {seen.layer for seen in points if seen.sparsity == 0.9} == {"conv1", "conv2", "fc"}
            assert not study.table.levels("latency_ms")
            assert study.table.levels("kl") == (0.0, 0.9)
        points.append(point)
    kinds = [point.kind for point in points if point.kind in ("kl", "latency_ms")]
    switches = sum(first != second for first, second in itertools.pairwise(kinds))
    assert switches >= 3
    assert len(kinds) == study.n_sensitivity_cells(LEVELS, refresh_batchnorm=False)
    count = CellCounter()
    assert sum(map(count.add, points)) == count.done == len(kinds)
    assert not count.add(points[0]), "a cell that comes again counts once"
    assert study.table is not None
    latest = {(point.kind, point.layer, point.sparsity): point for point in points}
    assert set(study.table.points) == set(latest.values())


def test_stopping_a_measurement_keeps_what_was_measured(model: LoadedModel, data: LoadedData) -> None:
    study = Study(model, data)
    stop = threading.Event()
    n = 0
    for n, _ in enumerate(study.sensitivity_points(LEVELS, n_images=64, stop=stop), 1):
        if n == 20:
            stop.set()
    assert study.table is not None
    assert 20 <= n < 40
    assert len(study.table) == n


def test_a_consumer_that_goes_away_leaves_the_table_with_what_it_saw(
    model: LoadedModel, data: LoadedData
) -> None:
    study = Study(model, data)
    points = study.sensitivity_points(LEVELS, n_images=64)
    seen = [next(points) for _ in range(5)]
    points.close()  # type: ignore[attr-defined]
    assert study.table is not None
    assert set(study.table.points) == set(seen)


def test_a_solved_distribution_is_corrected_until_the_measured_speedup_is_reached(
    model: LoadedModel, data: LoadedData, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = Study(model, data)
    study._table = known_table()
    times = KnownTimes(study, monkeypatch)
    believed = study.solve(speedup=3.0, check=False)
    assert study.predict(believed).speedup >= 3.0
    # The engine is a quarter slower than the table says.
    times.bias = 1.25
    assert study._reached(believed) < 3.0
    checked = study.solve(speedup=3.0)
    assert study._reached(checked) >= 3.0
    assert study._reached(study.solve(latency_ms=11.0 / 3.0)) >= 3.0


def test_a_speedup_refers_to_the_fastest_dense_contestant(
    model: LoadedModel, data: LoadedData, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = Study(model, data)
    KnownTimes(study, monkeypatch)
    assert study.dense_baseline is not None
    assert study.dense_baseline[0] == "engine dense"
    speedup = study._reached({"conv2": 0.5})
    assert speedup == pytest.approx(11.0 / 6.0)
    run = study.prune({"conv2": 0.5}, epochs=1, batch_size=64)
    assert all(event.dense_ms == 11.0 for event in run if isinstance(event, LatencyEvent))


def test_the_range_of_speedups_is_that_of_the_solver(model: LoadedModel, data: LoadedData) -> None:
    study = Study(model, data)
    study._table = known_table()
    low, high = study.feasible_speedups()
    assert low == pytest.approx(1.0, rel=0.05)
    study.solve(speedup=high * 0.98, check=False)
    with pytest.raises(InfeasibleTarget):
        study.solve(speedup=high * 1.1, check=False)


def test_latency_of_a_pruned_network_is_measured_on_that_network(measured: Study) -> None:
    # Whatever memory layout the weights come in, the engine computes what the network computes.
    for seed in range(2):
        torch.manual_seed(seed)
        other = TinyNet().eval().to(memory_format=torch.channels_last)
        assert measured.latency(other).latency_ms > 0
        x = torch.randn(1, 1, 8, 8)
        assert measured._engine is not None
        with torch.no_grad():
            torch.testing.assert_close(measured._engine(x), other(x), rtol=1e-4, atol=1e-5)


def test_the_example_input_has_the_asked_batch_size(model: LoadedModel) -> None:
    assert Study(model, batch_size=5).example_input.shape == (5, 1, 8, 8)
    assert Study(model).example_input.shape == (1, 1, 8, 8)


def test_the_main_job_from_measurement_to_files(measured: Study, tmp_path: Path) -> None:
    study = measured
    distribution = study.solve(sparsity=0.7, locked={"conv1": 0.25})
    assert distribution["conv1"] == 0.25
    run = study.prune(distribution, epochs=4, batch_size=32, update_every=3)
    events = list(run)
    assert any(isinstance(event, EvalEvent) for event in events)
    assert any(isinstance(event, LatencyEvent) for event in events)
    result = run.result

    document = study.save(result, tmp_path / "run", seconds={"load": 1.5})
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "model.safetensors",
        "recipe.yaml",
        "result.json",
    ]
    assert json.loads((tmp_path / "run" / "result.json").read_text()) == document
    assert document["pruned"]["sparsity"] >= 0.7
    assert document["pruned"]["sparsity"] == result.sparsity
    assert document["pruned"]["size_bytes"] < document["dense"]["size_bytes"]
    dense = document["dense"]
    assert dense["latency_ms"] == min(entry["latency_ms"] for entry in dense["contestants"].values())
    assert document["pruned"]["speedup"] == dense["latency_ms"] / document["pruned"]["latency_ms"]
    assert document["target"] == {"sparsity": 0.7}
    assert document["predicted"]["sparsity"] == pytest.approx(result.sparsity)
    assert document["seconds"]["load"] == 1.5
    for layer in study.layers:
        entry = document["layers"][layer.name]
        assert entry["asked"] == distribution[layer.name]
        assert entry["zeros"] == n_zeros(layer.n_params, distribution[layer.name])

    fresh = TinyNet().eval()
    load_weights(fresh, tmp_path / "run" / "model.safetensors")
    assert study.data is not None
    assert evaluate(fresh, *study.data.validation_tensors()).accuracy == result.accuracy

    # The recipe makes the same weights again, without any measurement.
    recipe = Recipe.load(tmp_path / "run" / "recipe.yaml")
    assert recipe == study.recipe(result)
    assert recipe.target == {"sparsity": 0.7}
    again = Study(study.model, study.data)
    settings = recipe.settings
    repeated = again.prune(
        again.adopt(recipe),
        latency=False,
        **{name: getattr(settings, name) for name in type(settings).__dataclass_fields__},
    ).finish()
    ours, theirs = result.module.state_dict(), repeated.module.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert again.recipe(repeated).distribution == recipe.distribution

    with pytest.raises(FormatError, match="is not empty"):
        study.save(result, tmp_path / "run")
    study.save(result, tmp_path / "run", overwrite=True)


def test_the_predicted_size_is_that_of_the_whole_network_with_batch_norm_and_all(measured: Study) -> None:
    from explorer.formats import dense_bytes

    dense = measured.uniform(0.0)
    assert measured.predict(dense).size_bytes == dense_bytes(measured.model.module)


def test_the_stored_size_follows_from_the_zeros_of_each_layer(measured: Study) -> None:
    from explorer.formats import dense_bytes, packed_bytes

    result = measured.prune({"conv2": 0.9, "fc": 0.5}, epochs=0.5, batch_size=32, latency=False).finish()
    zeros = {name: count for name, (count, _) in result.achieved.items()}
    assert (
        measured.stored_bytes({}) == packed_bytes(measured.model.module) <= dense_bytes(measured.model.module)
    )
    # Counted in the network itself; its other weights are as full as they were.
    assert measured.stored_bytes(zeros) == packed_bytes(result.module) < measured.stored_bytes({})
    assert packed_bytes(result.module, {"fc": 0}) > packed_bytes(result.module)


def test_the_weights_that_magnitude_pruning_keeps_can_be_looked_at(measured: Study) -> None:
    weight = measured.model.module.get_submodule("conv2").weight
    before = weight.detach().clone()
    alive = measured.alive("conv2", 0.75)
    assert alive.shape == weight.shape
    assert int((~alive).sum()) == n_zeros(weight.numel(), 0.75)
    assert weight.detach().abs()[alive].min() >= weight.detach().abs()[~alive].max()
    assert torch.equal(before, weight)
    assert measured.n_groups("conv2") == measured.n_groups("fc") == 1
    with pytest.raises(DistributionError, match="There is no layer 'conv9'; layers are conv1, conv2, fc"):
        measured.alive("conv9", 0.5)
    with pytest.raises(DistributionError, match="There is no layer 'conv9'"):
        measured.n_groups("conv9")
    with pytest.raises(DistributionError, match="fraction of zeros"):
        measured.alive("fc", 1.5)


def test_a_layer_that_stays_as_it_is_needs_no_entry(measured: Study) -> None:
    run = measured.prune({"fc": 0.5}, epochs=0.5, batch_size=32, latency=False)
    recipe = measured.recipe(run.finish())
    assert dict(measured.adopt(recipe)) == {"fc": 0.5}


def test_what_a_study_cannot_do_it_says(model: LoadedModel, data: LoadedData) -> None:
    study = Study(model)
    with pytest.raises(DataError, match="has no data"):
        study.prune({"fc": 0.5})
    with pytest.raises(DataError, match="has no data"):
        study.measure_sensitivity()
    with pytest.raises(DistributionError, match="has not been measured"):
        study.solve(speedup=2.0)
    with pytest.raises(DistributionError, match="has not been measured"):
        study.predict(study.uniform(0.5))
    with pytest.raises(RunError, match="threads is 0"):
        Study(model, threads=0)
    with pytest.raises(RunError, match="batch_size is -1"):
        Study(model, batch_size=-1)
    with pytest.raises(DistributionError, match="names other, and the layers are conv1"):
        study.adopt(Recipe("x", "y", {"other": 0.5}))
    with pytest.raises(DataError, match="shape"):
        Study(
            model,
            load_data(
                (torch.zeros(8, 3, 8, 8), torch.zeros(8).long()),
                (torch.zeros(8, 3, 8, 8), torch.zeros(8).long()),
            ),
        )


def test_other_weights_make_a_study_of_their_own_and_leave_the_first_alone(
    measured: Study, tmp_path: Path
) -> None:
    torch.manual_seed(7)
    other = TinyNet().eval()
    save_weights(other, tmp_path / "other.safetensors")
    before = {name: value.clone() for name, value in measured.model.module.state_dict().items()}
    study = measured.with_weights(tmp_path / "other.safetensors")
    assert study.weight_shapes == {name: tuple(value.shape) for name, value in other.state_dict().items()}
    found = study.model.module.state_dict()
    assert all(torch.equal(found[name], value) for name, value in other.state_dict().items())
    now = measured.model.module.state_dict()
    assert all(torch.equal(now[name], value) for name, value in before.items())
    assert study.model.name == f"{measured.model.name}, other.safetensors"
    assert (study.data, study.threads, study.batch_size) == (
        measured.data,
        measured.threads,
        measured.batch_size,
    )
    assert study.table is None
    assert measured.table is not None
    save_weights(torch.nn.Linear(2, 2), tmp_path / "foreign.safetensors")
    with pytest.raises(FormatError, match=r"does not belong to this TinyNet"):
        measured.with_weights(tmp_path / "foreign.safetensors")


def test_published_losses_belong_to_their_weights(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="published for other people's weights"):
        Study.replay("resnet18-imagenet").with_weights(tmp_path / "any.safetensors")


def test_a_module_takes_its_example_input_from_the_data(data: LoadedData) -> None:
    study = Study(TinyNet(), data)
    assert study.example_input.shape == (1, 1, 8, 8)
    assert isinstance(study.uniform(0.5), SparsityDistribution)


def test_a_recipe_names_what_loads_the_demo_again() -> None:
    study = Study(load_model("demo:fashion-resnet"), load_data("demo:fashion"))
    assert (study.model_source, study.data_source) == ("demo:fashion-resnet", "demo:fashion")


def test_refining_measures_where_curves_bend_and_leaves_the_rest(
    model: LoadedModel, data: LoadedData
) -> None:
    study = Study(model, data)
    study.measure_sensitivity(LEVELS, n_images=128, latency=False, refresh_batchnorm=False)
    before = study.table
    points = list(study.refine(4, n_images=128))
    cells = {(p.layer, p.sparsity) for p in points if p.kind == "kl" and p.sparsity > 0}
    assert 1 <= len(cells) <= 4
    assert not cells & {(p.layer, p.sparsity) for p in before.points}
    assert all(study.table.point(layer, level, "kl") is not None for layer, level in cells)
    assert set(before.points) <= set(study.table.points)
    solved = {layer.name: 0.7 for layer in model.layers}
    inside = {
        p.sparsity
        for p in study.refine(3, near=solved, layers=["conv2"], between=(0.5, 0.9), n_images=128)
        if p.sparsity > 0
    }
    assert all(0.5 < level < 0.9 for level in inside)


def test_with_workers_the_table_is_the_same(model: LoadedModel, data: LoadedData) -> None:
    from concurrent.futures import ThreadPoolExecutor

    alone, shared = Study(model, data), Study(model, data)
    alone.measure_sensitivity(LEVELS, n_images=64, latency=False)
    with ThreadPoolExecutor(2) as pool:
        shared.measure_sensitivity(LEVELS, n_images=64, executor=pool)
    expected = {(p.layer, p.sparsity, p.kind, p.refreshed): p.value for p in alone.table.points}
    losses = [p for p in shared.table.points if p.kind != "latency_ms"]
    assert {(p.layer, p.sparsity, p.kind, p.refreshed): p.value for p in losses} == pytest.approx(
        expected, abs=1e-9
    )
    assert shared.table.levels("latency_ms") == (0.0, *LEVELS)


def test_kinds_are_chosen(model: LoadedModel, data: LoadedData) -> None:
    study = Study(model, data)
    study.measure_sensitivity(LEVELS, n_images=64, latency=False, kinds=("fisher", "removed_energy"))
    assert study.table.kinds == ("removed_energy", "fisher")


def test_every_target_is_solved_for(measured: Study) -> None:
    total = sum(layer.n_params for layer in measured.layers)
    free = {"dense_first_last": False, "score": "removed_energy"}
    few = measured.solve(params=total // 4, **free)
    assert measured.predict(few).nnz <= total // 4
    small = measured.solve(size_bytes=measured.predict(few).size_bytes, **free)
    assert measured.predict(small).size_bytes <= measured.predict(few).size_bytes
    harmless = measured.solve(max_loss=0.0)
    assert measured.predict(harmless).kl == pytest.approx(0.0, abs=1e-9)
    linked = measured.solve(sparsity=0.5, groups=[("conv1", "conv2")], bounds={"fc": (0.0, 0.6)}, **free)
    assert linked["conv1"] == linked["conv2"]
    assert linked["fc"] <= 0.6


@pytest.mark.parametrize("name", ["uniform", "erk", "lamp", "global", "inverse"])
def test_baselines_reach_what_is_asked(measured: Study, name: str) -> None:
    found = measured.baseline(name, sparsity=0.6, dense_first_last=False)
    assert measured.predict(found).sparsity >= 0.6
    latency = measured.predict(measured.uniform(0.7, dense_first_last=False)).latency_ms * 1.05
    fast = measured.baseline(name, latency_ms=latency, dense_first_last=False)
    assert measured.predict(fast).latency_ms <= latency
    with pytest.raises(DistributionError, match="no baseline 'best'"):
        measured.baseline("best", sparsity=0.5)


def test_the_frontier_of_a_study_falls_in_time_and_rises_in_score(measured: Study) -> None:
    frontier = measured.pareto(dense_first_last=False)
    times = [measured.predict(point.distribution).latency_ms for point in frontier.points]
    assert times == pytest.approx([point.latency_ms for point in frontier.points])
    assert times == sorted(times, reverse=True)
    assert len(times) > 3


def test_a_study_takes_from_disk_what_was_measured_unless_told_otherwise(
    model: LoadedModel, data: LoadedData, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, same_machine: None
) -> None:
    for part in ("loss", "latency"):
        monkeypatch.setattr(f"explorer.sensitivity.{part}.cache_folder", lambda: tmp_path)
    cells = 0
    real = latency_module._Rounds.add

    def counted(*args: Any) -> None:
        nonlocal cells
        cells += 1
        real(*args)

    monkeypatch.setattr(latency_module._Rounds, "add", counted)
    Study(model, data).measure_sensitivity(LEVELS, n_images=64)
    first = cells
    assert first == 3 * 3, "levels and passes"
    Study(model, data).measure_sensitivity(LEVELS, n_images=64)
    assert cells == first
    Study(model, data).measure_sensitivity(LEVELS, n_images=64, resume=False)
    assert cells == 2 * first


def test_groups_go_through_a_run_and_its_recipe(measured: Study) -> None:
    asked = SparsityDistribution({"conv1": 0.5, "conv2": 0.5, "fc": 0.0}, groups=[("conv1", "conv2")])
    result = measured.prune(asked, epochs=0.2, latency=False).finish()
    recipe = Recipe.from_yaml(measured.recipe(result).to_yaml())
    assert recipe.groups == (("conv1", "conv2"),)
    assert measured.adopt(recipe) == asked


def test_a_search_measures_whole_networks_and_remembers_its_target(measured: Study) -> None:
    steps = list(measured.search(sparsity=0.6, n_total=12, n_images=64, seed=1, dense_first_last=False))
    assert 1 < len(steps) <= 12
    assert steps[-1].loss <= steps[0].first_loss
    for step in steps:
        assert measured.predict(step.distribution).sparsity >= 0.6
    best = steps[-1].distribution
    joint = measure_joint(measured.model.module, measured.data, best, n_images=64, refresh_batchnorm=True)
    assert joint is not None
    assert joint.values["kl"] == pytest.approx(steps[-1].loss, rel=1e-5)
    assert measured.recipe(measured.prune(best, epochs=0.2, latency=False).finish()).target == {
        "sparsity": 0.6
    }


def test_a_search_keeps_to_a_measured_speedup(measured: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is solved is checked on the engine, and the budget of the search is what that one is predicted to take."""
    solved = measured.solve(sparsity=0.6)
    monkeypatch.setattr(measured, "solve", lambda **_: solved)
    budget = measured.predict(solved).latency_ms
    steps = list(measured.search(speedup=1.2, n_total=8, n_images=64, dense_first_last=False))
    assert steps
    assert all(measured.predict(step.distribution).latency_ms <= budget * (1 + 1e-6) for step in steps)
