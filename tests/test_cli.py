from __future__ import annotations

import contextlib
import csv
import dataclasses
import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import explorer.study
from explorer import cli
from explorer.data import LoadedData, load_data
from explorer.distribution import SparsityDistribution
from explorer.formats import Recipe, read_weights, save_weights
from explorer.models import LoadedModel, load_model
from explorer.pruning import PruningRun, StepEvent
from explorer.sensitivity import SensitivityTable
from tests.pruning.tiny import TinyNet, quadrants

pytestmark = pytest.mark.usefixtures("quick_latencies")


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes "tiny" and "quadrants" names that the command line knows."""
    torch.manual_seed(0)
    module = TinyNet()

    def model_named(source: Any) -> LoadedModel:
        if source != "tiny":
            return load_model(source)
        return dataclasses.replace(load_model(module, torch.zeros(1, 1, 8, 8), name="tiny"), source="tiny")

    def data_named(source: Any) -> LoadedData:
        if source != "quadrants":
            return load_data(source)
        return load_data(quadrants(256, 0), quadrants(128, 1), name="quadrants")

    monkeypatch.setattr(explorer.study, "load_model", model_named)
    monkeypatch.setattr(explorer.study, "load_data", data_named)


ON_TINY = ["--model", "tiny", "--data", "quadrants"]


def words(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()]


def test_inspect_lists_every_layer_with_its_size(
    tiny: None, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert cli.main(["inspect", "--model", "tiny", "--no-latency", "--json", str(tmp_path / "l.json")]) == 0
    rows = words(capsys.readouterr().out)
    assert rows[0] == ["layer", "kind", "weight", "weights", "MACs", "dense", "ms", "share"]
    assert rows[1] == ["conv1", "conv2d", "8×1×3×3", "72", f"{72 * 64:,}"]
    assert rows[2] == ["conv2", "conv2d", "16×8×3×3", "1,152", f"{1152 * 16:,}"]
    assert rows[3] == ["fc", "linear", "4×64", "256", "256"]
    assert rows[4] == ["all", "1,480", f"{72 * 64 + 1152 * 16 + 256:,}"]
    found = json.loads((tmp_path / "l.json").read_text())
    assert [entry["n_params"] for entry in found] == [72, 1152, 256]


def test_inspect_measures_every_layers_share_of_the_dense_time(
    tiny: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["inspect", "--model", "tiny", "--threads", "1"]) == 0
    out = capsys.readouterr().out
    assert out.count("<- baseline") == 1
    rows = {row[0]: row for row in words(out) if row}
    shares = [float(rows[name][-1].rstrip("%")) for name in ("conv1", "conv2", "fc")]
    assert all(share > 0.0 for share in shares)
    assert sum(shares) <= 100.1


def test_sensitivity_prints_tables_and_writes_all_points(
    tiny: None, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    files = ["--csv", str(tmp_path / "t.csv"), "--json", str(tmp_path / "t.json")]
    files += ["--report", str(tmp_path / "t.html")]
    assert (
        cli.main(["sensitivity", *ON_TINY, "--levels", "0.5,0.9", "--images", "64", "--no-latency", *files])
        == 0
    )
    out = capsys.readouterr().out
    assert "on 64 validation images" in out
    assert "refresh of the batch norm statistics" in out
    assert "rank correlation" in out
    table = SensitivityTable.from_json((tmp_path / "t.json").read_text())
    assert table.levels("kl") == (0.0, 0.5, 0.9)
    rows = [row for row in words(out) if row and row[0] == "conv2"]
    expected = [f"{table.value('conv2', level, 'accuracy'):.1%}" for level in (0.0, 0.5)]
    assert rows[0][1:3] == expected
    with (tmp_path / "t.csv").open() as file:
        records = list(csv.DictReader(file))
    assert len(records) == len(table)
    assert {record["layer"] for record in records} == {"conv1", "conv2", "fc"}
    report = (tmp_path / "t.html").read_text()
    assert "sensitivity --model tiny --data quadrants --images 64 --threads 1" in report
    assert f"{table.value('conv2', 0.9, 'kl'):.3f}"[:4] in report


def test_a_report_that_cannot_be_written_is_refused_before_anything_runs(
    tiny: None, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert cli.main(["sensitivity", *ON_TINY, "--report", str(tmp_path / "no" / "r.html")]) == 2
    said = capsys.readouterr()
    assert "its folder does not exist" in said.err
    assert said.out == ""


def test_sensitivity_is_refined_by_several_workers(
    tiny: None, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    options = ["--levels", "0.5,0.98", "--images", "64", "--no-latency", "--no-refresh"]
    more = ["--kinds", "kl, fisher", "--refine", "3", "--workers", "2", "--json", str(tmp_path / "t.json")]
    assert cli.main(["sensitivity", *ON_TINY, *options, *more]) == 0
    out = capsys.readouterr().out
    assert "Accuracy" not in out
    assert "Second-order estimate" in out
    table = SensitivityTable.from_json((tmp_path / "t.json").read_text())
    new = [(p.layer, p.sparsity) for p in table.points if p.kind == "kl" and p.sparsity not in (0, 0.5, 0.98)]
    assert 1 <= len(new) <= 3
    shown = [row[:2] for row in words(out[out.index("Measured besides") :])[2:] if row]
    assert sorted(shown) == sorted([layer, f"{level:.2%}"] for layer, level in new)


def test_sensitivity_asks_for_what_refining_needs(tiny: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["sensitivity", *ON_TINY, "--kinds", "fisher", "--refine", "3"]) == 2
    assert "add kl to --kinds" in capsys.readouterr().err
    assert cli.main(["sensitivity", *ON_TINY, "--kinds", "magic"]) == 2
    assert "got magic" in capsys.readouterr().err


SOLVE = ["--images", "64", "--any-ends", "--score", "removed_energy"]


def test_a_distribution_is_solved_shown_and_written(
    tiny: None, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "found.yaml"
    options = ["--params", "300", "--lock", "conv1=0.25", "--bound", "fc=0.1:0.6", "--out", str(path)]
    assert cli.main(["solve", *ON_TINY, *SOLVE, *options]) == 0
    out = capsys.readouterr().out
    assert "within reach of these tables" in out
    found = SparsityDistribution.from_yaml(path.read_text())
    assert found["conv1"] == 0.25
    assert found.locked == {"conv1"}
    assert 0.1 <= found["fc"] <= 0.6
    rows = {row[0]: row for row in words(out) if row}
    assert rows["conv1"][-1] == "locked"
    remaining = int(rows["all"][3].replace(",", "")) - int(rows["all"][2].replace(",", ""))
    assert remaining <= 300
    assert "divergence before training" in out


def test_a_search_goes_on_from_what_was_solved(
    tiny: None, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    solved, searched = tmp_path / "solved.json", tmp_path / "searched.json"
    options = [*ON_TINY, "--images", "64", "--any-ends", "--params", "300", "--lock", "conv1=0.25"]
    assert cli.main(["solve", *options, "--out", str(solved)]) == 0
    capsys.readouterr()
    assert cli.main(["solve", *options, "--search", "12", "--out", str(searched)]) == 0
    out = capsys.readouterr().out
    found = re.search(r"search: (\d+) networks measured, divergence before training (\S+) -> (\S+) nats", out)
    assert found is not None
    assert 1 < int(found[1]) <= 12
    assert float(found[3]) <= float(found[2])
    best = SparsityDistribution.from_json(searched.read_text())
    assert best["conv1"] == 0.25
    assert best.locked == {"conv1"}
    rows = {row[0]: row for row in words(out) if row}
    assert int(rows["all"][3].replace(",", "")) - int(rows["all"][2].replace(",", "")) <= 300
    assert (best == SparsityDistribution.from_json(solved.read_text())) == (found[2] == found[3])


def test_distributions_are_compared_at_one_target(tiny: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["compare-distributions", *ON_TINY, *SOLVE, "--sparsity", "0.6", "--measure"]) == 0
    rows = {row[0]: row for row in words(capsys.readouterr().out) if row}
    for name in ("uniform", "erk", "lamp", "global", "inverse", "solved"):
        assert float(rows[name][1].rstrip("%")) >= 59.99
        assert len(rows[name]) == 9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["solve", *ON_TINY], "exactly one target: --speedup, --latency-ms, --sparsity, --params"),
        (["solve", *ON_TINY, "--speedup", "2", "--params", "9"], "exactly one target"),
        (["solve", *ON_TINY, "--params", "9", "--out", "found.txt"], "neither .yaml nor .json"),
        (["solve", *ON_TINY, "--max-loss", "1", "--search", "9"], "leave out --search"),
        (["compare-distributions", *ON_TINY], "exactly one target"),
        (["solve", *ON_TINY, "--params", "1", "--images", "64"], "weights are out of reach"),
    ],
)
def test_solving_says_what_is_missing(
    arguments: list[str], message: str, tiny: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_caches_are_shown_and_cleared_and_nothing_else_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EXPLORER_CACHE", str(tmp_path))
    ours = [
        tmp_path / name
        for name in (
            "kernels/a.o",
            "kernels/b.o",
            "choices.json",
            "sensitivity/c.jsonl",
            "sensitivity/d.times.json",
        )
    ]
    theirs = [tmp_path / name for name in ("notes.txt", "kernels/notes.txt", "sensitivity/table.json")]
    for path in (*ours, *theirs):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x" * (1 << 20))
    assert cli.main(["cache"]) == 0
    out = words(capsys.readouterr().out)
    assert out[0][0] == str(tmp_path)
    assert [row[-2:] for row in out[2:]] == [["2", "2.0"], ["1", "1.0"], ["1", "1.0"], ["1", "1.0"]]
    assert cli.main(["cache", "--clear"]) == 0
    assert "Deleted 5 files" in capsys.readouterr().out
    assert not any(path.exists() for path in ours)
    assert all(path.exists() for path in theirs)
    assert cli.main(["cache", "--clear"]) == 0
    assert "Deleted 0 files" in capsys.readouterr().out


def test_switched_off_there_is_no_cache(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EXPLORER_CACHE", "off")
    assert cli.main(["cache"]) == 0
    assert "switched off" in capsys.readouterr().out


def test_prune_leaves_weights_recipe_and_result_and_its_recipe_repeats_it(
    tiny: None, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    first, second = tmp_path / "run", tmp_path / "run2"
    arguments = [*ON_TINY, "--sparsity", "0.6", "--lock", "conv1=0.25", "--epochs", "2", "--seed", "5"]
    report = first / "report.html"
    assert cli.main(["prune", *arguments, "--out", str(first), "--report", str(report)]) == 0
    out = capsys.readouterr().out
    result = json.loads((first / "result.json").read_text())
    assert f"{result['pruned']['speedup']:.2f} × faster" in out
    assert set(result) >= {"dense", "pruned", "layers", "machine"}
    assert set(result["dense"]) >= {"accuracy", "latency_ms", "size_bytes"}
    assert set(result["pruned"]) >= {"accuracy", "latency_ms", "speedup", "sparsity", "size_bytes"}
    assert result["layers"]["conv1"] == {"asked": 0.25, "achieved": 0.25, "zeros": 18, "n_params": 72}
    assert result["pruned"]["sparsity"] >= 0.6
    assert result["seed"] == 5
    assert result["stopped"] is False
    assert set(result["seconds"]) >= {"run", "load", "dense latency", "sensitivity", "solve", "final latency"}
    recipe = Recipe.load(first / "recipe.yaml")
    assert (recipe.model, recipe.data) == ("tiny", "quadrants")
    assert recipe.locked == ("conv1",)
    assert f"{result['pruned']['speedup']:.2f} ×" in report.read_text()
    assert f"report written to {report}" in out

    assert cli.main(["prune", "--recipe", str(first / "recipe.yaml"), "--out", str(second)]) == 0
    ours, theirs = (read_weights(folder / "model.safetensors") for folder in (first, second))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert Recipe.load(second / "recipe.yaml") == recipe


def test_other_weights_stand_in_the_recipe_and_are_asked_for_again(
    tiny: None, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    torch.manual_seed(9)
    save_weights(TinyNet(), tmp_path / "mine.safetensors")
    weights = ["--weights", str(tmp_path / "mine.safetensors")]
    assert cli.main(["inspect", "--model", "tiny", "--no-latency", *weights]) == 0
    first, second = tmp_path / "run", tmp_path / "run2"
    arguments = [*ON_TINY, "--sparsity", "0.6", "--epochs", "1", *weights]
    assert cli.main(["prune", *arguments, "--out", str(first)]) == 0
    recipe = Recipe.load(first / "recipe.yaml")
    digest = hashlib.sha256((tmp_path / "mine.safetensors").read_bytes()).hexdigest()
    assert recipe.weights == {"file": "mine.safetensors", "sha256": digest}
    assert recipe.model == "tiny"
    again = ["prune", "--recipe", str(first / "recipe.yaml"), "--out", str(second)]
    capsys.readouterr()
    assert cli.main(again) == 2
    assert (
        "began with the weights of mine.safetensors; name the file with --weights" in capsys.readouterr().err
    )
    assert cli.main([*again, "--weights", str(first / "model.safetensors")]) == 2
    assert "is not the file that the recipe began with" in capsys.readouterr().err
    assert not list(second.glob("*"))
    assert cli.main([*again, *weights]) == 0
    ours, theirs = (read_weights(folder / "model.safetensors") for folder in (first, second))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert cli.main(["inspect", "--model", "tiny", "--weights", str(tmp_path / "none.safetensors")]) == 2
    assert "There is no file" in capsys.readouterr().err


def test_a_folder_that_holds_something_is_refused_before_anything_runs(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    assert cli.main(["prune", *ON_TINY, "--speedup", "3", "--out", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert "is not empty; choose another folder" in captured.err
    assert captured.out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_an_interrupt_stops_the_run_and_keeps_what_it_had_reached(
    tiny: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    events = PruningRun.__next__

    def interrupted(run: PruningRun) -> Any:
        event = events(run)
        if isinstance(event, StepEvent) and event.step == 7:
            os.kill(os.getpid(), signal.SIGINT)
        return event

    monkeypatch.setattr(PruningRun, "__next__", interrupted)
    before = signal.getsignal(signal.SIGINT)
    arguments = ["prune", *ON_TINY, "--sparsity", "0.6", "--epochs", "10", "--out", str(tmp_path / "run")]
    assert cli.main(arguments) == 130
    assert signal.getsignal(signal.SIGINT) is before
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["stopped"] is True
    assert result["steps"] == {"made": 7, "planned": 20}
    assert result["pruned"]["accuracy"] is not None
    assert (tmp_path / "run" / "model.safetensors").exists()
    assert "The run was stopped" in capsys.readouterr().out


def test_an_interrupt_before_the_run_says_that_nothing_was_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def interrupt(*_: Any, **__: Any) -> Iterator[None]:
        raise KeyboardInterrupt

    monkeypatch.setattr(explorer.study.Study, "__init__", interrupt)
    assert cli.main(["prune", *ON_TINY, "--speedup", "2", "--out", str(tmp_path / "run")]) == 130
    assert "nothing was written" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "tiny", "--data", "quadrants"], "Give exactly one target"),
        ([*ON_TINY, "--speedup", "2", "--sparsity", "0.5"], "Give exactly one target"),
        (["--speedup", "2"], "Give --model and --data"),
        (["--recipe", "no.yaml"], "Cannot read the recipe no.yaml"),
        (["--recipe", "no.yaml", "--speedup", "2"], "A recipe has its own distribution"),
        ([*ON_TINY, "--sparsity", "1.5"], "1.5"),
        (["--model", "tiny", "--data", "nothing", "--speedup", "2"], "nothing"),
        (["--model", "demo:fashion-renet", "--data", "quadrants", "--speedup", "2"], "demo:fashion-resnet"),
    ],
)
def test_what_cannot_be_done_is_one_line_without_a_traceback(
    tiny: None, capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str], message: str
) -> None:
    assert cli.main(["prune", *arguments, "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err.splitlines()
    lines = [line for line in error if line.startswith("sparsity-explorer: ")]
    assert len(lines) == 1
    assert message in lines[0]
    assert "Traceback" not in "".join(error)


def test_debug_shows_the_traceback(tiny: None, tmp_path: Path) -> None:
    with pytest.raises(explorer.errors.ExplorerError):
        cli.main(["prune", "--debug", *ON_TINY, "--out", str(tmp_path / "run")])


@pytest.mark.parametrize(
    "arguments",
    [
        ["prune", *ON_TINY, "--speedup", "3"],
        ["prune", "--out", "x", "--lock", "conv1"],
        ["prune", "--out", "x", "--lock", "conv1=2"],
        ["sensitivity", "--levels", "0.5,often"],
        ["sensitivity", "--images", "0"],
        ["sensitivity", "--report", "report.pdf"],
        ["solve", "--speedup", "2", "--bound", "fc=0.5"],
        ["solve", "--speedup", "2", "--bound", "fc=0.6:0.5"],
        ["inspect", "--threads", "-1"],
        ["dance"],
        [],
    ],
)
def test_arguments_that_make_no_sense_are_refused(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_ending_the_command_ends_the_server_too() -> None:
    pytest.importorskip("voila", reason="the extra 'app' is not installed")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]

    def is_served() -> bool:
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return True
        return False

    command = [sys.executable, "-m", "explorer", "app", "--no-browser", "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as app:
        deadline = time.monotonic() + 90
        while not is_served() and app.poll() is None and time.monotonic() < deadline:
            time.sleep(0.2)
        assert is_served()
        app.terminate()
        app.wait(timeout=60)
    assert not is_served()


def test_a_port_that_is_taken_is_said_before_a_server_starts(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert cli.main(["app", "--no-browser", "--port", str(port)]) == 2
    assert f"Port {port} is in use; choose another one with --port" in capsys.readouterr().err


def test_a_missing_extra_is_named_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None if name == "voila" else object())
    assert cli.main(["app", "--no-browser"]) == 2
    error = capsys.readouterr().err
    assert "needs voila, which is not installed" in error
    assert "pip install 'sparsity-explorer[app]'" in error


def test_the_module_is_the_same_program() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "explorer", "--version"],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert done.stdout.strip() == f"sparsity-explorer {explorer.__version__}"


def test_help_and_version_do_not_wait_for_torch() -> None:
    code = (
        "import sys; from explorer.cli import main\n"
        "try: main(['prune', '--help'])\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules, 'torch was loaded'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=120)


def test_a_run_in_another_thread_is_followed_without_signals(tiny: None, tmp_path: Path) -> None:
    codes: list[int] = []
    arguments = ["prune", *ON_TINY, "--sparsity", "0.5", "--epochs", "1", "--out", str(tmp_path / "run")]
    worker = threading.Thread(target=lambda: codes.append(cli.main(arguments)))
    worker.start()
    worker.join(240)
    assert codes == [0]
