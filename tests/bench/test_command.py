"""One command with two names: what it runs, what it keeps, and what it refuses before anything is measured."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from explorer import cli
from explorer.bench import __main__ as module
from explorer.bench import command, engines, foreign, networks, prediction, surroundings
from explorer.bench.engines import SPARSE, Absence, Comparison
from explorer.bench.records import Combination, Results
from explorer.models import LoadedModel
from tests.bench.synthetic import BUSY, QUIET, comparison

MEDIANS = {"torch eager": 4.0, "onnxruntime": 3.0, SPARSE: 1.0}
PYTHON = sys.executable
HERE = {"cpu": "this one"}


def parsed(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_options(parser)
    return parser.parse_args(arguments)


class Measure:
    """Stands for `time_engines`: keeps what it was asked for, and answers with known times."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, float, int, int]] = []
        self.settings: dict[str, Any] = {}
        self.absences: tuple[Absence, ...] = ()
        self.interrupted_at: int | None = None
        self.busy = False

    def __call__(self, model: LoadedModel, example: torch.Tensor, **settings: Any) -> Comparison:
        if self.interrupted_at == len(self.asked):
            raise KeyboardInterrupt
        self.settings = settings
        self.asked.append((model.name, settings["sparsity"], settings["threads"], example.shape[0]))
        medians = MEDIANS | {name: 2.0 for name, _ in settings["foreign"]}
        for one in self.absences:
            medians.pop(one.contestant, None)
        combination = Combination(model.name, settings["sparsity"], settings["threads"], example.shape[0])
        probe = {"probe": BUSY} if self.busy else {}
        return comparison(combination, medians, absences=self.absences, **probe)


@pytest.fixture
def measure(monkeypatch: pytest.MonkeyPatch) -> Iterator[Measure]:
    one = Measure()
    monkeypatch.setattr(engines, "time_engines", one)
    monkeypatch.setattr(surroundings, "machine", lambda: HERE)
    return one


def test_the_names_that_help_shows_are_those_there_are() -> None:
    assert set(command.NETWORK_NAMES) == networks.NETWORKS.keys()
    assert set(command.ENGINE_NAMES) == foreign.FOREIGN.keys()


def test_both_entrances_read_the_same_options() -> None:
    arguments = [
        "prediction",
        "--model",
        "a",
        "b",
        "--sparsity",
        "0.5",
        "0.9",
        "--threads",
        "1",
        "2",
        "--batch-size",
        "1",
        "8",
        "--data",
        "d",
    ]
    options = vars(parsed(arguments))
    through_cli = vars(cli._parser().parse_args(["bench", *arguments]))
    assert through_cli.pop("command") is command.run
    assert through_cli.pop("debug") is False
    assert through_cli == options
    assert parsed([]).what == "engines"


def test_asking_for_help_loads_neither_torch_nor_numpy() -> None:
    code = (
        "import sys\nfrom explorer import cli\n"
        "try: cli.main(['bench', '--help'])\n"
        "except SystemExit: print(sorted({'torch', 'numpy'} & sys.modules.keys()))"
    )
    done = subprocess.run(
        [PYTHON, "-c", code], capture_output=True, text=True, check=True, cwd=Path(cli.__file__).parent.parent
    )
    assert "mobilenet_v1" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


def test_all_combinations_are_run_once_with_the_settings_that_were_given(measure: Measure) -> None:
    line = "engines --model demo:fashion-resnet --sparsity 0.5 0.9 --threads 1 2 --batch-size 1 8 --seconds 2 --patience 30 --timeout 9"
    assert module.main([*line.split(), "--no-torch-compile", "--engine", f"onnxruntime={PYTHON}"]) == 0
    expected = [("fashion-resnet", s, t, b) for b in (1, 8) for t in (1, 2) for s in (0.5, 0.9)]
    assert measure.asked == expected
    layers = measure.settings.pop("layers")
    demo, _ = networks.load_network("demo:fashion-resnet")
    assert layers == demo.layers[1:-1]
    assert measure.settings == {
        "sparsity": 0.9,
        "threads": 2,
        "seconds": 2.0,
        "foreign": [("onnxruntime", PYTHON)],
        "torch_compile": False,
        "timeout_s": 9.0,
        "patience_s": 30.0,
        "fastest_ms": QUIET.fastest_ms,  # of the combinations before this one
    }


def test_several_networks_are_run_with_their_own_layers(
    measure: Measure, monkeypatch: pytest.MonkeyPatch
) -> None:
    demo = networks.load_network("demo:fashion-resnet")
    seen = []

    def load(name: str) -> tuple[LoadedModel, networks.BenchNetwork]:
        seen.append(name)
        return demo

    monkeypatch.setattr(networks, "load_network", load)
    assert module.main(["--model", "resnet18", "bert", "--sparsity", "0.9"]) == 0
    assert seen == ["resnet18", "bert"]


@pytest.mark.parametrize("entrance", [module.main, lambda arguments: cli.main(["bench", *arguments])])
def test_the_command_prints_every_row(
    entrance: Any, measure: Measure, capsys: pytest.CaptureFixture[str]
) -> None:
    assert entrance(["engines", "--sparsity", "0.9", "--threads", "2", "--batch-size", "4"]) == 0
    said = capsys.readouterr().out
    assert (
        "sparsity 0.9, batch 4, 2 thread(s); pruned by magnitude: all layers but the first and the last"
        in said
    )
    assert [line.split() for line in said.splitlines() if "sparse " in line][-1] == [
        "engine", "sparse", "1.000", "0.010", "0.900", "3.00x", "1.00x",
    ]  # fmt: skip


def test_results_are_written_after_every_combination_and_the_rest_is_measured_on_resuming(
    measure: Measure, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, kept = tmp_path / "R.md", tmp_path / "R.json"
    arguments = ["--sparsity", "0.5", "0.8", "0.9", "0.95", "--markdown", str(file)]
    measure.interrupted_at = 2
    assert module.main(arguments) == 130
    assert "--resume goes on from there" in capsys.readouterr().err
    assert [one.combination.sparsity for one in Results.read(kept).records] == [0.5, 0.8]
    assert "| 0.8 |" in file.read_text()
    assert "| 0.9 |" not in file.read_text()

    measure.interrupted_at = None
    assert module.main([*arguments, "--resume"]) == 0
    assert [sparsity for _, sparsity, _, _ in measure.asked] == [0.5, 0.8, 0.9, 0.95]
    assert capsys.readouterr().out.count(", kept\n") == 2
    assert [one.combination.sparsity for one in Results.read(kept).records] == [0.5, 0.8, 0.9, 0.95]
    assert "| 0.95 |" in file.read_text()

    assert module.main([*arguments, "--resume", "--engine", f"onnxruntime={PYTHON}"]) == 0
    assert len(measure.asked) == 4  # ONNX Runtime had taken part


def test_a_combination_is_measured_again_when_an_engine_is_added(
    measure: Measure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(foreign, "installed_version", lambda *_: "1.0")
    arguments = ["--sparsity", "0.9", "--json", str(tmp_path / "r.json")]
    assert module.main(arguments) == 0
    assert module.main([*arguments, "--resume", "--engine", f"mnn={PYTHON}"]) == 0
    assert module.main([*arguments, "--resume", "--engine", f"mnn={PYTHON}"]) == 0
    assert len(measure.asked) == 2
    (record,) = Results.read(tmp_path / "r.json").records
    assert record.median_ms("mnn") == 2.0
    assert record.command.endswith("--json r.json --resume --engine mnn=$MNN_PYTHON")
    assert "--sparsity 0.9 --threads 1 --batch-size 1 --seconds 5" in record.command
    assert str(tmp_path) not in record.command


def test_the_status_tells_that_an_engine_failed_also_when_it_failed_before(
    measure: Measure, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--sparsity", "0.9", "--json", str(tmp_path / "r.json")]
    measure.absences = (Absence("torch compile", "no compiler", failed=False),)
    assert module.main(arguments) == 0
    assert "torch compile was left out: no compiler" in capsys.readouterr().out
    (tmp_path / "r.json").unlink()
    measure.absences, measure.busy = (Absence("onnxruntime", "it fell over", failed=True),), True
    assert module.main(arguments) == 1
    said = capsys.readouterr().out
    assert "onnxruntime failed: it fell over" in said
    assert "this machine was busy" in said
    assert module.main([*arguments, "--resume"]) == 1


@pytest.mark.parametrize(
    ("redo", "again"), [([], 0), (["busy"], 1), (["failed"], 1), (["busy", "failed"], 2)]
)
def test_what_was_busy_or_failed_is_measured_again_on_request(
    redo: list[str], again: int, measure: Measure, tmp_path: Path
) -> None:
    arguments = ["--json", str(tmp_path / "r.json"), "--resume"]
    module.main([*arguments, "--sparsity", "0.5"])
    measure.busy = True
    module.main([*arguments, "--sparsity", "0.8"])
    measure.busy, measure.absences = False, (Absence("onnxruntime", "it fell over", failed=True),)
    module.main([*arguments, "--sparsity", "0.9"])
    measure.asked.clear()
    measure.absences = ()
    module.main([*arguments, "--sparsity", "0.5", "0.8", "0.9", *(["--redo", *redo] if redo else [])])
    assert len(measure.asked) == again
    assert len(Results.read(tmp_path / "r.json").records) == 3


def test_what_cannot_be_followed_is_refused_before_anything_is_measured(
    measure: Measure, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held = tmp_path / "held.json"
    held.write_text(Results({"cpu": "another"}, ()).to_json())
    document = tmp_path / "mine.md"
    document.write_text("mine")
    for arguments, said in (
        (["--model", "demo:nothing"], "demo:fashion-resnet"),
        (["--engine", "mnn=/nowhere/python"], "There is no /nowhere/python"),
        (["--engine", f"tensorrt={PYTHON}"], "NAME=PYTHON"),
        (["--engine", f"deepsparse={PYTHON}"], "No module named 'deepsparse'"),
        (["--engine", f"onnxruntime={PYTHON}", f"onnxruntime={PYTHON}"], "the same engine twice"),
        (["--resume"], "--resume needs the file"),
        (["--redo", "busy", "--json", str(tmp_path / "r.json")], "give both"),
        (["--json", str(held)], "exists. Give --resume"),
        (["--markdown", str(document)], "exists. Give --resume"),
        (["--markdown", str(document), "--resume"], "from which it would be written anew, does not"),
        (
            ["--json", str(held), "--resume"],
            "measured on another machine (cpu: another there, this one here)",
        ),
        (["--json", str(tmp_path / "no" / "r.json")], "there is no folder"),
        (["--json", str(tmp_path / "r.md"), "--markdown", str(tmp_path / "r.md")], "name two files"),
        (["--data", "demo:fashion"], "for `prediction`"),
        (["prediction", "--resume", "--seconds", "3"], "--seconds, --resume: does nothing for `prediction`"),
        (["scan", "--engine", "mnn=x"], "--engine: does nothing for `scan`"),
        (["engines", "--images", "3"], "--images: does nothing for `engines`"),
        (["prediction", "--model", "resnet18"], "without losses"),
        (["prediction", "--model", "replay:alexnet"], "There is no replay 'alexnet'"),
        (["distributions", "--model", "resnet18"], "cannot be trained"),
        (["distributions", "--threads", "1", "2"], "One model, number of threads and batch size"),
        (["distributions", "--sparsity", "0.5"], "--sparsity: does nothing for `distributions`"),
        (["scan", "--epochs", "3"], "--epochs: does nothing for `scan`"),
    ):
        assert module.main(arguments) == 2, arguments
        assert said in capsys.readouterr().err, arguments
    assert measure.asked == []
    assert document.read_text() == "mine"
    assert cli.main(["bench", "--model", "demo:nothing"]) == 2


@pytest.mark.parametrize("main", [lambda given: cli.main(["bench", *given]), module.main])
def test_torch_s_idle_threads_sleep_while_others_are_timed_unless_the_user_decided(
    main: Callable[[list[str]], int], measure: Measure, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "")  # so that it is put back
    monkeypatch.delenv("OMP_WAIT_POLICY")
    assert main(["--sparsity", "0.9"]) == 0
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    assert main(["--sparsity", "0.9"]) == 0
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--sparsity", "1.0"],
        ["--sparsity", "0.9", "x"],
        ["--threads", "1", "0"],
        ["--batch-size", "0"],
        ["--seconds", "0"],
        ["--timeout", "inf"],
    ],
)
def test_values_that_cannot_be_measured_are_refused(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        module.main(arguments)
    assert f"{arguments[-1]!r} is not" in capsys.readouterr().err


def test_predictions_are_checked_for_every_combination(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = []

    def check(study: Any, **settings: Any) -> list[prediction.PredictionCheck]:
        seen.append((study.threads, study.batch_size, settings))
        return [prediction.PredictionCheck("uniform", 0.5, 2.0, 2.0)]

    monkeypatch.setattr(prediction, "check_predictions", check)
    line = "prediction --threads 1 2 --batch-size 1 4 --sparsity 0.5"
    assert module.main(line.split()) == 0
    assert seen == [(t, b, {"uniform": [0.5]}) for b in (1, 4) for t in (1, 2)]
    assert capsys.readouterr().out.count("median 0.0%") == 4
