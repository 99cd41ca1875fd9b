"""The one command of the benchmark, for `sparsity-explorer bench` and `python -m explorer.bench`: its options, and what they start.

Only the options are made at import, so this module needs neither torch nor numpy; what runs is imported when it runs.
"""

from __future__ import annotations

import argparse
import datetime as dt
import itertools
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from explorer.errors import EngineError, ExplorerError, FormatError

if TYPE_CHECKING:
    from explorer.bench.records import Combination, Record, Results

__all__ = ["ENGINE_NAMES", "FAILED", "NETWORK_NAMES", "add_options", "combinations", "count", "run"]

NETWORK_NAMES = ("resnet18", "resnet50", "mobilenet_v1", "mobilenet_v2", "vgg11", "bert")
"""The keys of `explorer.bench.networks.NETWORKS`, which takes torch to load."""

ENGINE_NAMES = ("onnxruntime", "openvino-f32", "openvino", "deepsparse", "mnn")
"""The keys of `explorer.bench.foreign.FOREIGN`, which takes torch to load."""

FAILED = 2
"""Exit code of an error the user can act on; nothing was measured."""

_ENGINE_FAILED = 1
_INTERRUPTED = 130
_SPARSITIES = (0.8, 0.9, 0.95)
_REPLAY = "replay:"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Give `parser` the options of the benchmark, for `run`."""
    parser.add_argument(
        "what",
        nargs="?",
        choices=("engines", "kernels", "compile", "prediction", "scan", "distributions"),
        default="engines",
        help="engines: time networks in every engine (default); "
        "kernels: how near the loop over nonzeros comes to the peak of a core; "
        "compile: how long compiling takes, with an empty cache and a full one, and new weights, beside this project's limits; "
        "prediction: compare predicted with measured speed-ups of many distributions; "
        "scan: the sensitivity scan against a naive one; "
        "distributions: solved ones against those of the literature, after training",
    )
    parser.add_argument(
        "--model",
        nargs="+",
        default=["demo:fashion-resnet"],
        metavar="NAME",
        help=f"demo:fashion-resnet (default), or with random weights: {', '.join(NETWORK_NAMES)}; timm:NAME, torchvision:NAME where these are installed",
    )
    parser.add_argument(
        "--sparsity",
        type=_sparsity,
        nargs="+",
        metavar="S",
        help=f"fractions in [0, 1), default {' '.join(map(str, _SPARSITIES))}, for compile 0.9; for prediction, those of the uniform distributions, for scan its levels",
    )
    parser.add_argument(
        "--threads",
        type=count,
        nargs="+",
        default=[1],
        metavar="N",
        help="threads of every engine (default 1)",
    )
    parser.add_argument(
        "--batch-size",
        type=count,
        nargs="+",
        default=[1],
        metavar="N",
        help="samples in one call (default 1)",
    )
    prediction = parser.add_argument_group("prediction")
    prediction.add_argument("--data", help="default demo:fashion")
    scan = parser.add_argument_group("scan")
    scan.add_argument(
        "--images", type=count, metavar="N", help="images, noise for networks without data (default 500)"
    )
    trained = parser.add_argument_group("distributions")
    trained.add_argument(
        "--speedup", type=float, nargs="+", metavar="X", help="targets, measured (default 3 5)"
    )
    trained.add_argument(
        "--contestants",
        nargs="+",
        metavar="NAME",
        help="uniform, erk, lamp, global, inverse, solved, solved:SCORE, searched (default: all without colon but the last)",
    )
    trained.add_argument(
        "--trained",
        type=Path,
        metavar="FOLDER",
        help="a network that 'python -m explorer.models.demo.train --out FOLDER' left, in place of the demo",
    )
    trained.add_argument("--seeds", type=count, metavar="N", help="runs of each (default 3)")
    trained.add_argument("--epochs", type=float, metavar="E", help="of each run (default 5)")
    trained.add_argument(
        "--record",
        type=Path,
        metavar="FILE",
        help="JSON file of the runs: those that it holds are not made again",
    )
    engines = parser.add_argument_group("engines")
    engines.add_argument(
        "--engine",
        nargs="+",
        default=[],
        metavar="NAME=PYTHON",
        help=f"also time these, each in a process of the Python that has it installed: {', '.join(ENGINE_NAMES)}",
    )
    engines.add_argument(
        "--no-torch-compile",
        action="store_true",
        help="leave out torch.compile, which takes a while to compile",
    )
    engines.add_argument(
        "--seconds", type=_seconds, metavar="S", help="about how long each combination is timed (default 5)"
    )
    engines.add_argument(
        "--patience",
        type=_seconds,
        metavar="S",
        help="on a machine that is shared: how long each combination may wait for quiet moments, and measure again (default 0)",
    )
    engines.add_argument(
        "--timeout",
        type=_seconds,
        metavar="S",
        help="an engine of another Python that is silent for longer is given up (default 600)",
    )
    engines.add_argument(
        "--markdown", type=Path, metavar="FILE", help="write a document, anew after each combination"
    )
    engines.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="write the results, anew after each combination (default with --markdown: its name, ending in .json)",
    )
    engines.add_argument(
        "--resume",
        action="store_true",
        help="keep the combinations that the JSON file holds with all these engines, and measure the others",
    )
    engines.add_argument(
        "--redo",
        nargs="+",
        choices=("busy", "failed"),
        default=[],
        help="with --resume, also measure again where the machine was busy, or an engine failed",
    )


def run(options: argparse.Namespace) -> int:
    """Run the benchmark that the options of `add_options` describe.

    Returns
    -------
    int
        0 when it is done, 1 when it is done and an engine failed, 130 when it was interrupted.

    Raises
    ------
    ExplorerError
        If the options cannot be followed; nothing is measured then.
    """
    if options.what == "prediction":
        return _prediction(options)
    if options.what == "scan":
        return _scan(options)
    if options.what == "kernels":
        return _kernels(options)
    if options.what == "compile":
        return _compile(options)
    if options.what == "distributions":
        return _distributions(options)
    _refuse(options, ("images", *_TRAINED_ONLY))
    return _engines(options)


def combinations(options: argparse.Namespace) -> Iterator[Combination]:
    """Yield every combination of the options, a network's after each other, the sparsity changing fastest."""
    from explorer.bench.records import Combination

    sparsities = options.sparsity or _SPARSITIES
    for name, batch_size, threads, sparsity in itertools.product(
        options.model, options.batch_size, options.threads, sparsities
    ):
        yield Combination(name, sparsity, threads, batch_size)


def _find_networks(names: Sequence[str]) -> None:
    """Raise an error now for a network that cannot be loaded, rather than after the others have been measured."""
    from explorer.bench.networks import NETWORKS, load_network

    for name in names:
        if name not in NETWORKS:
            load_network(name)


def _engines(options: argparse.Namespace) -> int:
    if options.data is not None:
        raise ExplorerError(
            "--data is for `prediction`: `engines` times networks on random input. Leave it out."
        )
    kept, markdown = _files(options)
    from explorer.bench.foreign import installed_version, parse
    from explorer.bench.records import Results
    from explorer.bench.report import text
    from explorer.bench.surroundings import BUSY, machine

    foreign = [parse(text) for text in options.engine]
    named = [name for name, _ in foreign]
    if len(named) != len(set(named)):
        raise EngineError("--engine names the same engine twice; one Python for each.")
    _find_networks(options.model)
    for name, python in foreign:
        installed_version(name, python)

    here = machine()
    results = Results(here, ())
    if kept is not None and options.resume and kept.exists():
        results = Results.read(kept)
        results.check_machine(here, kept)
    run_began = _now()
    wanted = list(combinations(options))
    try:
        for combination in wanted:
            held = results.find(combination, named)
            if held is not None and not _again(held, options.redo, busy=results.noise(held) > BUSY):
                print(f"{combination}: measured on {held.date}, kept", flush=True)
                continue
            fastest_ms = results.fastest_probe_ms(combination.threads)
            record = _measured(combination, options, foreign, run_began, fastest_ms)
            results = results.with_record(record)
            _write(results, kept, markdown)
            print(text(record, results.noise(record)), flush=True)
    except KeyboardInterrupt:
        rest = (
            f"what was measured is in {kept}; --resume goes on from there" if kept else "nothing was written"
        )
        print(f"interrupted: {rest}.", file=sys.stderr)
        return _INTERRUPTED
    _write(results, kept, markdown)  # also when nothing was left to measure
    found = [record for record in results.records if record.combination in wanted]
    return _ENGINE_FAILED if any(one.failed for record in found for one in record.absences) else 0


def _again(record: Record, redo: Sequence[str], *, busy: bool) -> bool:
    """Whether what was measured is to be measured once more."""
    failed = any(one.failed for one in record.absences)
    return ("busy" in redo and busy) or ("failed" in redo and failed)


def _measured(
    combination: Combination,
    options: argparse.Namespace,
    foreign: Sequence[tuple[str, str]],
    run_began: str,
    fastest_ms: float,
) -> Record:
    from explorer.bench.engines import time_engines
    from explorer.bench.networks import example_batch, load_network
    from explorer.bench.records import Record

    model, network = load_network(combination.network)
    comparison = time_engines(
        model,
        example_batch(model, combination.batch_size),
        sparsity=combination.sparsity,
        threads=combination.threads,
        seconds=options.seconds or 5.0,
        foreign=foreign,
        layers=network.pruned(model.layers),
        torch_compile=not options.no_torch_compile,
        timeout_s=options.timeout or 600.0,
        patience_s=options.patience or 0.0,
        fastest_ms=fastest_ms,
    )
    return Record(
        combination=combination,
        rule=network.rule,
        date=_now(),
        run=run_began,
        command=_command(options),
        comparison=comparison,
    )


def _write(results: Results, kept: Path | None, markdown: Path | None) -> None:
    from explorer.atomic import write_atomically
    from explorer.bench.report import markdown as as_markdown

    if kept is not None:
        write_atomically(kept, results.to_json().encode())
    if markdown is not None:
        write_atomically(markdown, as_markdown(results).encode())


def _files(options: argparse.Namespace) -> tuple[Path | None, Path | None]:
    """Return where JSON and Markdown go, or say why they cannot go there."""
    markdown: Path | None = options.markdown
    kept: Path | None = options.json or (markdown.with_suffix(".json") if markdown else None)
    if options.redo and not options.resume:
        raise FormatError("--redo says what --resume measures again; give both.")
    if kept is None:
        if options.resume:
            raise FormatError(
                "--resume needs the file of an earlier run: name it with --json FILE or --markdown FILE."
            )
        return None, None
    for path in filter(None, (kept, markdown)):
        if not path.parent.is_dir():
            raise FormatError(
                f"Cannot write {path}: there is no folder {path.parent}. Make it, or name another file."
            )
    if kept == markdown:
        raise FormatError(f"--json and --markdown are both {kept}; name two files.")
    held = next((path for path in (kept, markdown) if path is not None and path.exists()), None)
    if held is not None and not options.resume:
        raise FormatError(
            f"{held} exists. Give --resume to keep what it holds and measure the rest, or name another file."
        )
    if held is not None and not kept.exists():
        raise FormatError(
            f"{held} exists, but {kept}, from which it would be written anew, does not. Name it with --json FILE, or another document."
        )
    return kept, markdown


_TRAINED_ONLY = ("speedup", "contestants", "trained", "seeds", "epochs", "record")
# What any score reads.
_ALL_KINDS = ("kl", "loss", "accuracy", "removed_energy", "fisher")
_ENGINES_ONLY = (
    "engine",
    "no_torch_compile",
    "seconds",
    "patience",
    "timeout",
    "markdown",
    "json",
    "resume",
    "redo",
)


def _refuse(options: argparse.Namespace, useless: Sequence[str]) -> None:
    """Refuse options that do nothing here."""
    given = [f"--{name.replace('_', '-')}" for name in useless if getattr(options, name)]
    if given:
        raise ExplorerError(f"{', '.join(given)}: does nothing for `{options.what}`. Leave it out.")


def _scan(options: argparse.Namespace) -> int:
    _refuse(options, (*_ENGINES_ONLY, *_TRAINED_ONLY, "data"))
    import torch

    from explorer.bench.networks import load_network
    from explorer.bench.scan import compare_scans
    from explorer.bench.surroundings import summary
    from explorer.data import load_data
    from explorer.inference.timing import torch_threads
    from explorer.sensitivity import DEFAULT_LEVELS

    n_images = options.images or 500
    try:
        for name, threads in itertools.product(options.model, options.threads):
            model, network = load_network(name)
            if name in NETWORK_NAMES:
                generator = torch.Generator().manual_seed(0)
                inputs = torch.randn(n_images, *network.input_shape, generator=generator)
            else:
                inputs = load_data("demo:fashion").validation_tensors(n_images)[0]
            print(f"{model.name} on {summary()}, {threads} thread(s)", flush=True)
            with torch_threads(threads):
                print(compare_scans(model.module, inputs, options.sparsity or DEFAULT_LEVELS), flush=True)
    except KeyboardInterrupt:
        print("interrupted.", file=sys.stderr)
        return _INTERRUPTED
    return 0


def _kernels(options: argparse.Namespace) -> int:
    _refuse(options, (*_ENGINES_ONLY, *_TRAINED_ONLY, "images", "data", "sparsity"))
    from explorer.inference.native import why_torch

    if why_torch() is not None:
        raise ExplorerError(f"There are no kernels to time: {why_torch()}")
    from explorer.bench.kernels import measure_loops, table
    from explorer.bench.surroundings import summary
    from explorer.inference.peak import machine_peak

    peak = machine_peak()
    print(f"{summary()}, {peak.isa}, peak of one core {peak.gflops:.0f} GFLOP/s", flush=True)
    print(
        "The loop over nonzeros with its operands in the L1 cache, share of that peak, of 256 output channels:"
    )
    print(table(measure_loops((4, 6, 7, 8), (4, 8, 16, 32, 64))))
    return 0


def _compile(options: argparse.Namespace) -> int:
    _refuse(options, (*_ENGINES_ONLY, *_TRAINED_ONLY, "images", "data"))
    from explorer.bench.compilation import measure_compilation
    from explorer.bench.surroundings import BUSY, summary

    _find_networks(options.model)
    print(
        f"{summary()}; seconds: median (fastest to slowest, and this project's limit where it has one)",
        flush=True,
    )
    sparsities = options.sparsity or [0.9]
    try:
        for name, batch_size, threads, sparsity in itertools.product(
            options.model, options.batch_size, options.threads, sparsities
        ):
            found = measure_compilation(name, sparsity, threads=threads, batch_size=batch_size)
            busy = "; something else was running" if found.noise > BUSY else ""
            print(
                f"{name} at {sparsity:.0%}, {threads} thread(s), batch {batch_size}: {found}{busy}",
                flush=True,
            )
    except KeyboardInterrupt:
        print("interrupted.", file=sys.stderr)
        return _INTERRUPTED
    return 0


def _distributions(options: argparse.Namespace) -> int:
    _refuse(options, (*_ENGINES_ONLY, "images", "sparsity"))
    without_data = [name for name in options.model if name in NETWORK_NAMES]
    if without_data:
        raise ExplorerError(
            f"{', '.join(without_data)} comes without data, and cannot be trained; use the demo."
        )
    from explorer.bench import distributions
    from explorer.bench.surroundings import summary
    from explorer.study import Study

    targets = options.speedup or [3.0, 5.0]
    [name, *more], [threads, *_], [batch_size, *_] = options.model, options.threads, options.batch_size
    if more or len(options.threads) > 1 or len(options.batch_size) > 1:
        raise ExplorerError("One model, number of threads and batch size at a time; name one of each.")
    names = options.contestants or distributions.NAMES
    distributions.check_names(names)
    model = name if options.trained is None else distributions.load_trained(options.trained)
    study = Study(model, options.data or "demo:fashion", threads=threads, batch_size=batch_size)
    print(f"{study.model.name} on {summary()}; latencies with {threads} thread(s), batch {batch_size}")
    study.measure_sensitivity(refresh_batchnorm=False, resume=False, kinds=_ALL_KINDS)
    print(distributions.solver_report(study, targets), flush=True)
    trained = []
    try:
        for one in distributions.compare_trained(
            study,
            targets,
            range(options.seeds or 3),
            names=names,
            epochs=options.epochs or 5.0,
            record=options.record,
        ):
            trained.append(one)
            print(
                f"{one.target:g} x {one.name} seed {one.seed}: {one.accuracy:.2%} at {one.speedup:.2f} x",
                file=sys.stderr,
                flush=True,
            )
    except KeyboardInterrupt:
        print("interrupted.", file=sys.stderr)
        return _INTERRUPTED
    finally:
        if trained:
            print(distributions.table(trained), flush=True)
    return 0


def _prediction(options: argparse.Namespace) -> int:
    _refuse(options, (*_ENGINES_ONLY, *_TRAINED_ONLY, "images"))
    without_data = [name for name in options.model if name in NETWORK_NAMES]
    if without_data:
        raise ExplorerError(
            f"{', '.join(without_data)} comes without losses, on which the solved distributions depend; "
            "use the demo, or published losses: replay:resnet50-imagenet, replay:mobilenet-imagenet."
        )
    from explorer.bench import prediction
    from explorer.bench.surroundings import summary
    from explorer.study import Study

    levels = {} if options.sparsity is None else {"uniform": options.sparsity}
    try:
        for name, batch_size, threads in itertools.product(
            options.model, options.batch_size, options.threads
        ):
            if name.startswith(_REPLAY):
                study = Study.replay(name.removeprefix(_REPLAY), threads=threads, batch_size=batch_size)
            else:
                study = Study(name, options.data or "demo:fashion", threads=threads, batch_size=batch_size)
            print(f"{study.model.name} on {summary()}")
            print(
                f"{threads} thread(s), batch {batch_size}; speed-ups over the fastest dense run, in turn with it"
            )
            print(prediction.table(list(prediction.check_predictions(study, **levels))), flush=True)
    except KeyboardInterrupt:
        print("interrupted.", file=sys.stderr)
        return _INTERRUPTED
    return 0


def _command(options: argparse.Namespace) -> str:
    """The command line with every value that it left to a default; the paths of one machine stand as variables and bare names."""
    words = ["sparsity-explorer", "bench", "engines", "--model", *options.model, "--sparsity"]
    words += [str(sparsity) for sparsity in options.sparsity or _SPARSITIES]
    words += ["--threads", *map(str, options.threads), "--batch-size", *map(str, options.batch_size)]
    words += ["--seconds", f"{options.seconds or 5.0:g}", "--timeout", f"{options.timeout or 600.0:g}"]
    words += ["--patience", f"{options.patience:g}"] if options.patience else []
    words += ["--no-torch-compile"] if options.no_torch_compile else []
    for flag in ("markdown", "json"):
        path: Path | None = getattr(options, flag)
        if path is not None:
            words += [f"--{flag}", path.name if path.is_absolute() else str(path)]
    words += ["--resume"] if options.resume else []
    words += ["--redo", *options.redo] if options.redo else []
    line = shlex.join(words)
    if options.engine:
        names = [text.partition("=")[0] for text in options.engine]
        line += " --engine " + " ".join(f"{name}=${python_variable(name)}" for name in names)
    return line


def python_variable(engine: str) -> str:
    """Name the variable that stands for an engine's Python in a written command: ``MNN_PYTHON``."""
    return f"{engine.upper().replace('-', '_')}_PYTHON"


def _now() -> str:
    return dt.datetime.now(dt.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def count(text: str) -> int:
    """Read a whole number of at least 1, for argparse."""
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return value


def _sparsity(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value < 1.0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a sparsity; give a fraction from 0 to below 1")
    return value


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a time; give seconds above 0")
    return value
