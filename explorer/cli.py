"""The command line: every button of the app has a command, and every command is a few calls of `Study`.

What a person reads goes to standard output, progress and errors to standard error, so that output can be kept. Exit codes: 0 done,
1 a benchmark in which an engine failed, 2 an error the user can act on (one line, no traceback unless `--debug`), 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import webbrowser
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from explorer import __version__
from explorer.bench import command as bench_command
from explorer.errors import ExplorerError
from explorer.folders import cache_contents, cache_root, clear_caches

if TYPE_CHECKING:
    from concurrent.futures import Executor
    from types import FrameType

    from explorer.distribution import SparsityDistribution
    from explorer.formats import Recipe
    from explorer.pruning import PruningRun
    from explorer.sensitivity import SensitivityTable
    from explorer.study import Study

_INTERRUPTED = 130
_FAILED = 2

# Enough to rank layers (the divergence needs few images), quick enough to leave the time to training.
_SOLVE_IMAGES = 128

_APP_MODULES = ("voila", "ipywidgets", "anywidget", "plotly", "ipykernel")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Parameters
    ----------
    arguments : sequence of str, optional
        Without the program's name; those of this process when not given.
    """
    parsed = _parser().parse_args(arguments)
    # Before torch is loaded: its idle threads then sleep instead of spinning, which costs a little where nothing else runs and
    # keeps a run several times faster where something does: in a benchmark, the contestants that come after torch. A choice of the user's own stands.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    command: Callable[[argparse.Namespace], int] = parsed.command
    try:
        return command(parsed)
    except ExplorerError as error:
        if parsed.debug:
            raise
        print(f"sparsity-explorer: {' '.join(str(error).split())}", file=sys.stderr)
        return _FAILED
    except KeyboardInterrupt:
        if parsed.debug:
            raise
        print("sparsity-explorer: interrupted, nothing was written.", file=sys.stderr)
        return _INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sparsity-explorer",
        description="See what pruning does to a network, and make it smaller and faster on a CPU.",
    )
    parser.add_argument("--version", action="version", version=f"sparsity-explorer {__version__}")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(required=True, metavar="command")

    inspect = commands.add_parser("inspect", parents=[common], help="list the layers that can be pruned")
    _add_study(inspect, data=False)
    inspect.add_argument("--no-latency", action="store_true", help="do not measure each layer's time")
    inspect.add_argument("--json", type=Path, metavar="FILE", help="write the layers as JSON")
    inspect.set_defaults(command=_inspect)

    sensitivity = commands.add_parser(
        "sensitivity", parents=[common], help="measure how much each layer minds being pruned"
    )
    _add_study(sensitivity, data=True)
    sensitivity.add_argument(
        "--levels", type=_levels, metavar="S,S,...", help="sparsities, such as 0.5,0.9,0.98"
    )
    sensitivity.add_argument(
        "--images", type=bench_command.count, default=500, metavar="N", help="validation images (default 500)"
    )
    sensitivity.add_argument(
        "--no-refresh", action="store_true", help="do not measure with refreshed batch norm statistics"
    )
    sensitivity.add_argument("--no-latency", action="store_true", help="measure the loss only")
    sensitivity.add_argument(
        "--kinds",
        type=_names,
        metavar="KIND,KIND,...",
        help="kl, loss, accuracy, removed_energy, fisher (default all but the last)",
    )
    sensitivity.add_argument(
        "--refine",
        type=bench_command.count,
        metavar="N",
        help="afterwards measure so many more pairs of layer and level, where curves bend",
    )
    workers = sensitivity.add_mutually_exclusive_group()
    workers.add_argument(
        "--workers",
        type=bench_command.count,
        metavar="N",
        help="processes that measure losses (default: this one)",
    )
    workers.add_argument(
        "--cluster",
        nargs="?",
        const="auto",
        metavar="ADDRESS",
        help="measure losses on a Ray cluster, by default the one that this machine belongs to",
    )
    sensitivity.add_argument(
        "--anew", action="store_true", help="take nothing from disk that was measured before"
    )
    sensitivity.add_argument("--csv", type=Path, metavar="FILE", help="write all points as CSV")
    sensitivity.add_argument("--json", type=Path, metavar="FILE", help="write the table as JSON")
    _add_report(sensitivity)
    sensitivity.set_defaults(command=_sensitivity)

    solve = commands.add_parser(
        "solve",
        parents=[common],
        help="find the distribution that reaches a target at the least expected loss",
    )
    _add_study(solve, data=True)
    _add_target(solve, every=True)
    _add_solver(solve)
    solve.add_argument(
        "--no-check", action="store_true", help="do not measure what was solved, trust the tables"
    )
    solve.add_argument(
        "--search",
        type=bench_command.count,
        metavar="N",
        help="for networks that will not be trained: then measure N pruned ones, to find the distribution that does the least harm at once in the same time (250 take a minute or so on the demo); Ctrl-C keeps the best",
    )
    solve.add_argument("--out", type=Path, metavar="FILE", help="write the distribution, as .yaml or .json")
    solve.set_defaults(command=_solve)

    compare = commands.add_parser(
        "compare-distributions",
        parents=[common],
        help="set the solved distribution beside those of the literature at the same target",
    )
    _add_study(compare, data=True)
    _add_target(compare, every=False)
    _add_solver(compare)
    compare.add_argument(
        "--measure", action="store_true", help="also measure latency and divergence with all layers pruned"
    )
    compare.set_defaults(command=_compare)

    prune = commands.add_parser(
        "prune", parents=[common], help="prune while training, and leave weights, recipe and result"
    )
    _add_prune(prune)
    prune.set_defaults(command=_prune)

    bench = commands.add_parser(
        "bench", parents=[common], help="time this engine beside the alternatives on this machine"
    )
    bench_command.add_options(bench)
    bench.set_defaults(command=bench_command.run)

    caches = commands.add_parser(
        "cache", parents=[common], help="show what is kept on disk to be quick the next time, or clear it"
    )
    caches.add_argument("--clear", action="store_true", help="delete it; it is made again when it is needed")
    caches.set_defaults(command=_cache)

    app = commands.add_parser("app", parents=[common], help="open the app in a browser, on this machine only")
    _add_app(app)
    app.set_defaults(command=_app)
    return parser


def _add_weights(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--weights", type=Path, metavar="FILE", help="safetensors file of other weights for the model"
    )


def _opened(options: argparse.Namespace, model: str, data: str | None = None) -> Study:
    """Return the study of a model and data, with the weights that were asked for."""
    from explorer.study import Study

    study = Study(model, data, threads=options.threads, batch_size=options.batch_size or 1)
    return study if options.weights is None else study.with_weights(options.weights)


def _add_study(parser: argparse.ArgumentParser, *, data: bool) -> None:
    parser.add_argument("--model", default="demo:fashion-resnet", help="default demo:fashion-resnet")
    _add_weights(parser)
    if data:
        parser.add_argument("--data", default="demo:fashion", help="default demo:fashion, or fashion-mnist")
    parser.add_argument(
        "--threads", type=bench_command.count, default=None, help="threads of latencies (default 1)"
    )
    parser.add_argument(
        "--batch-size", type=bench_command.count, default=1, help="samples an inference (default 1)"
    )


def _add_target(parser: argparse.ArgumentParser, *, every: bool) -> None:
    target = parser.add_argument_group("target, one of")
    target.add_argument(
        "--speedup", type=float, metavar="X", help="times faster than the fastest dense network"
    )
    target.add_argument("--latency-ms", type=float, metavar="MS", help="median latency")
    target.add_argument("--sparsity", type=float, metavar="S", help="zeros over all prunable weights")
    if every:
        target.add_argument("--params", type=bench_command.count, metavar="N", help="weights that remain")
        target.add_argument(
            "--size-bytes", type=bench_command.count, metavar="N", help="size with zeros left out"
        )
        target.add_argument(
            "--max-loss", type=float, metavar="NATS", help="predicted divergence; the fastest within it"
        )


def _add_app(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--port", type=bench_command.count, default=8866, help="default 8866")
    parser.add_argument("--no-browser", action="store_true", help="only print the address")
    parser.add_argument(
        "--study",
        action="append",
        default=[],
        metavar="LABEL=MODULE:FUNCTION",
        help="also offer what a function of yours returns, a Study or (model, data); may be given several times, the first is shown first",
    )
    parser.add_argument(
        "--weights-folder",
        metavar="FOLDER",
        help="safetensors files in it can be opened on the page without being sent",
    )
    others = parser.add_argument_group("other people")
    others.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="address to listen on, such as 0.0.0.0 for all of this machine (default 127.0.0.1, for this machine only); needs --token",
    )
    others.add_argument(
        "--token",
        nargs="?",
        const="",
        metavar="TOKEN",
        help="let in only those who bring it; without a value, a random one that the printed address contains",
    )
    others.add_argument(
        "--max-users",
        type=bench_command.count,
        metavar="N",
        help="pages at once, each with a process of its own (default: as many as memory and CPUs are good for, at most 8)",
    )
    others.add_argument(
        "--threads-per-user", type=bench_command.count, metavar="N", help="CPUs for each (default all)"
    )
    others.add_argument(
        "--memory-per-user",
        type=float,
        metavar="GB",
        help="memory for each, enforced on Linux (default: an equal share of four fifths of the machine's)",
    )


def _add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--report",
        type=_report_file,
        metavar="FILE",
        help="write a report as one HTML file that opens without a kernel or a network",
    )


def _add_lock(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--lock",
        action="append",
        type=_lock,
        default=[],
        metavar="LAYER=S",
        help="fix a layer's sparsity; may be given several times",
    )


def _add_solver(parser: argparse.ArgumentParser) -> None:
    solver = parser.add_argument_group("distribution")
    _add_lock(solver)
    solver.add_argument(
        "--bound",
        action="append",
        type=_bound,
        default=[],
        metavar="LAYER=LOW:HIGH",
        help="keep a layer's sparsity between two; may be given several times",
    )
    solver.add_argument(
        "--link",
        action="append",
        type=_names,
        default=[],
        metavar="LAYER,LAYER,...",
        help="layers that get the same sparsity; may be given several times",
    )
    solver.add_argument("--score", help="what the solver minimises")
    solver.add_argument("--any-ends", action="store_true", help="do not leave first and last layer dense")
    solver.add_argument(
        "--images",
        type=bench_command.count,
        default=500,
        metavar="N",
        help="validation images of the sensitivity (default 500)",
    )


def _add_prune(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="such as demo:fashion-resnet")
    _add_weights(parser)
    parser.add_argument("--data", help="such as demo:fashion")
    parser.add_argument("--recipe", type=Path, metavar="FILE", help="repeat a run from its recipe.yaml")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where the result goes")
    parser.add_argument("--overwrite", action="store_true", help="write even if the folder is not empty")
    _add_report(parser)
    _add_target(parser, every=False)
    solver = parser.add_argument_group("distribution")
    _add_lock(solver)
    solver.add_argument("--score", help="what the solver minimises")
    training = parser.add_argument_group("run")
    training.add_argument("--method", help="default gmp")
    training.add_argument("--epochs", type=float, help="default 5")
    training.add_argument("--seed", type=int, help="default 0")
    training.add_argument("--learning-rate", type=float)
    training.add_argument(
        "--distillation", type=float, metavar="W", help="weight of the dense outputs in the loss"
    )
    training.add_argument(
        "--precision",
        choices=("auto", "float32", "bfloat16"),
        help="arithmetic of the training (default auto)",
    )
    training.add_argument(
        "--training-threads", type=bench_command.count, help="default: all that torch takes"
    )
    latency = parser.add_argument_group("latency")
    latency.add_argument("--threads", type=bench_command.count, help="threads of latencies (default 1)")
    latency.add_argument("--batch-size", type=bench_command.count, help="samples an inference (default 1)")


def _inspect(options: argparse.Namespace) -> int:

    study = _opened(options, options.model)
    if not options.no_latency:
        _show_dense(study)
    rows = [
        (
            layer.name or "model",
            layer.kind,
            "×".join(map(str, layer.weight_shape)),
            f"{layer.n_params:,}",
            f"{layer.macs:,}",
            "" if layer.dense_ms is None else f"{layer.dense_ms:.3f}",
            "" if layer.share is None else f"{layer.share:.1%}",
        )
        for layer in study.layers
    ]
    total = (
        "all",
        "",
        "",
        f"{sum(layer.n_params for layer in study.layers):,}",
        f"{sum(layer.macs for layer in study.layers):,}",
        "",
        "",
    )
    _print_table(("layer", "kind", "weight", "weights", "MACs", "dense ms", "share"), [*rows, total], left=3)
    if options.json:
        from explorer.atomic import write_atomically

        fields = ("name", "kind", "weight_shape", "n_params", "macs", "dense_ms", "share", "tied")
        layers = [{field: getattr(layer, field) for field in fields} for layer in study.layers]
        write_atomically(options.json, (json.dumps(layers, indent=2) + "\n").encode())
    return 0


def _sensitivity(options: argparse.Namespace) -> int:
    from explorer.atomic import write_atomically
    from explorer.sensitivity import stability

    _check_report(options.report)
    study = _opened(options, options.model, options.data)
    if options.refine and options.kinds is not None and "kl" not in options.kinds:
        raise ExplorerError(
            "Curves are refined by their divergences; add kl to --kinds, or leave out --refine."
        )
    with _workers(options) as executor:
        table = _measured(
            study,
            levels=options.levels,
            n_images=options.images,
            refresh=not options.no_refresh,
            latency=not options.no_latency,
            kinds=options.kinds,
            executor=executor,
            resume=not options.anew,
        )
        refined: dict[str, list[float]] = {}
        if options.refine:
            for point in study.refine(options.refine, n_images=options.images, executor=executor):
                if point.kind == "kl" and point.sparsity > 0.0:
                    refined.setdefault(point.layer, []).append(point.sparsity)
    images = min(options.images, len(study.data.validation_tensors()[0])) if study.data else 0
    kinds = table.kinds
    if "accuracy" in kinds:
        dense = table.baseline("accuracy")
        print(f"\nAccuracy on {images} validation images with one layer pruned (dense {dense:.1%})")
        _print_levels(table, "accuracy", "{:.1%}")
        if table.levels("accuracy", refreshed=True):
            print("\nThe same after a refresh of the batch norm statistics")
            _print_levels(table, "accuracy", "{:.1%}", refreshed=True)
    if "kl" in kinds:
        print("\nKullback-Leibler divergence from the dense outputs, nats")
        _print_levels(table, "kl", "{:.4f}")
        print(stability(table).hint(images))
        print("\nEach layer at 90 %")
        print(table.summary(0.9, "kl"))
    if "fisher" in kinds:
        print("\nSecond-order estimate of the increase of the loss, nats")
        _print_levels(table, "fisher", "{:.4f}")
    if "latency_ms" in kinds:
        print(f"\nLatency, ms (median, {study.threads} thread(s), batch {study.batch_size})")
        _print_levels(table, "latency_ms", "{:.3f}")
    table = study.table or table
    if options.refine:
        print("\nMeasured besides, where the divergence bends")
        _print_refined(table, refined)
    if options.json:
        write_atomically(options.json, table.to_json().encode())
    if options.csv:
        write_atomically(options.csv, table.to_csv().encode())
    if options.report:
        study.report(options.report)
        print(f"\nreport written to {options.report}")
    return 0


def _prune(options: argparse.Namespace) -> int:
    from explorer.study import prepared_folder

    # Before anything long begins.
    prepared_folder(options.out, overwrite=options.overwrite)
    _check_report(options.report)
    clock = _Clock()
    with clock("load"):
        study, recipe, settings = _prepared(options)
    print(f"{study.model.name} on {study.data_source}: {len(study.layers)} prunable layers")
    with clock("dense latency"):
        _show_dense(study)
    if recipe is not None:
        distribution = study.adopt(recipe)
    else:
        with clock("sensitivity"):
            _measured(study, levels=None, n_images=_SOLVE_IMAGES, refresh=False, latency=True)
        with clock("solve"):
            distribution = _solved(study, options)
    run = study.prune(distribution, **settings)
    _follow(run)
    result = run.result
    with clock("final latency"):
        study.final_latency(result)
    # It has no clock: the figures that are written must contain it.
    document = study.save(result, options.out, overwrite=True, seconds=clock.seconds)
    _show_result(document, options.out)
    if options.report:
        study.report(options.report, result)
        print(f"report written to {options.report}")
    if result.stopped:
        print("The run was stopped; this is what it had reached.")
        return _INTERRUPTED
    return 0


def _prepared(options: argparse.Namespace) -> tuple[Study, Recipe | None, dict[str, Any]]:
    """Return study, recipe if there is one, and the settings that the command line or the recipe give."""
    import dataclasses

    from explorer.formats import Recipe

    given = {
        "method": options.method,
        "epochs": options.epochs,
        "seed": options.seed,
        "learning_rate": options.learning_rate,
        "distillation": options.distillation,
        "precision": options.precision,
        "threads": options.training_threads,
    }
    settings: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    targets = [name for name in ("speedup", "latency_ms", "sparsity") if getattr(options, name) is not None]
    if options.recipe is None:
        if len(targets) != 1:
            raise ExplorerError(
                "Give exactly one target, --speedup X, --latency-ms MS or --sparsity S, or a run to repeat with --recipe FILE."
            )
        if options.model is None or options.data is None:
            raise ExplorerError(
                "Give --model and --data, for instance --model demo:fashion-resnet --data demo:fashion."
            )
        return _opened(options, options.model, options.data), None, settings
    if targets or options.lock or options.score:
        raise ExplorerError(
            "A recipe has its own distribution; leave out --speedup, --latency-ms, --sparsity, --lock and --score."
        )
    recipe = Recipe.load(options.recipe)
    options.threads = options.threads or recipe.threads
    options.batch_size = options.batch_size or recipe.batch_size
    if recipe.weights is not None and options.weights is None:
        raise ExplorerError(
            f"The recipe began with the weights of {recipe.weights['file']}; name the file with --weights."
        )
    study = _opened(options, options.model or recipe.model, options.data or recipe.data)
    if recipe.weights and study.weights and study.weights["sha256"] != recipe.weights["sha256"]:
        raise ExplorerError(
            f"{options.weights} is not the file that the recipe began with, which was called {recipe.weights['file']} (their SHA-256 differ). "
            "Name that file, or take `weights` out of the recipe."
        )
    return study, recipe, dataclasses.asdict(recipe.settings) | settings


_TARGETS = ("speedup", "latency_ms", "sparsity", "params", "size_bytes", "max_loss")


def _target(options: argparse.Namespace) -> dict[str, Any]:
    """Return the one target that was given, by its name."""
    given = {name: getattr(options, name, None) for name in _TARGETS}
    wanted = {name: value for name, value in given.items() if value is not None}
    if len(wanted) != 1:
        flags = [f"--{name.replace('_', '-')}" for name in _TARGETS if hasattr(options, name)]
        raise ExplorerError(f"Give exactly one target: {', '.join(flags)}.")
    return wanted


def _solver_options(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "locked": dict(options.lock) or None,
        "bounds": dict(options.bound) or None,
        "groups": options.link,
        "score": options.score,
        "dense_first_last": not options.any_ends,
    }


def _solve(options: argparse.Namespace) -> int:
    from explorer.atomic import write_atomically

    target = _target(options)
    if options.search is not None and "max_loss" in target:
        raise ExplorerError(
            "A search keeps a budget of time, count or size; leave out --search, or ask for something other than --max-loss."
        )
    if options.out is not None and options.out.suffix not in (".yaml", ".yml", ".json"):
        raise ExplorerError(
            f"{options.out} is neither .yaml nor .json; name the file so that its format is known."
        )
    study = _opened(options, options.model, options.data)
    _measured(study, levels=None, n_images=options.images, refresh=False, latency=True)
    least, most = study.feasible_speedups()
    print(f"within reach of these tables, without locks: {least:.2f} to {most:.2f} × faster")
    found = study.solve(**target, check=not options.no_check, **_solver_options(options))
    if options.search is not None:
        found = _searched(study, found, target, options)
    rows = [
        (
            layer or "model",
            f"{one.asked:.2%}",
            f"{one.zeros:,}",
            f"{one.n_params:,}",
            f"{one.sparsity:.2%}",
            "locked" if layer in found.locked else "",
        )
        for layer, one in found.achieved(study.layers).items()
    ]
    total = found.total(study.layers)
    rows.append(
        ("all", f"{total.asked:.2%}", f"{total.zeros:,}", f"{total.n_params:,}", f"{total.sparsity:.2%}", "")
    )
    _print_table(("layer", "asked", "zeros", "of", "achieved", ""), rows, left=1)
    print(_forecast(study, found))
    if options.out is not None:
        text = found.to_json() + "\n" if options.out.suffix == ".json" else found.to_yaml()
        write_atomically(options.out, text.encode())
    return 0


def _searched(
    study: Study, found: SparsityDistribution, target: dict[str, Any], options: argparse.Namespace
) -> SparsityDistribution:
    """Return the best of many distributions that keep the budget of the solved one."""
    from tqdm import tqdm

    last = None
    with (
        tqdm(total=options.search, desc="search", unit="network", leave=False, disable=None) as bar,
        contextlib.suppress(KeyboardInterrupt),
    ):
        for step in study.search(
            **target,
            begin=found,
            n_total=options.search,
            n_images=options.images,
            **_solver_options(options),
        ):
            last = step
            bar.update()
    if last is None:
        return found
    print(
        f"search: {last.n_measured} networks measured, divergence before training {last.first_loss:.4g} -> {last.loss:.4g} nats (batch norm refreshed)"
    )
    return last.distribution


def _forecast(study: Study, distribution: SparsityDistribution) -> str:
    predicted = study.predict(distribution)
    parts = []
    if predicted.latency_ms is not None and predicted.speedup is not None:
        error = f" ± {predicted.latency_error_ms:.3f}" if predicted.latency_error_ms is not None else ""
        parts.append(f"{predicted.latency_ms:.3f}{error} ms ({predicted.speedup:.2f} × faster)")
    if predicted.kl is not None:
        parts.append(f"divergence before training {predicted.kl:.3g} nats")
    parts.append(f"{predicted.size_bytes / 1e6:.2f} MB")
    return f"predicted: {', '.join(parts)}"


def _compare(options: argparse.Namespace) -> int:
    from explorer.errors import InfeasibleTarget

    target = _target(options)
    study = _opened(options, options.model, options.data)
    _measured(study, levels=None, n_images=options.images, refresh=False, latency=True)
    held: dict[str, Any] = {"locked": dict(options.lock) or None, "dense_first_last": not options.any_ends}
    rows, refused = [], []
    for kind in ("uniform", "erk", "lamp", "global", "inverse", "solved"):
        try:
            if kind == "solved":
                found = study.solve(**target, check=False, **_solver_options(options))
            elif kind == "uniform":
                if options.lock:
                    refused.append("uniform: has no locked layers")
                    continue
                found = study.baseline(kind, **target, dense_first_last=not options.any_ends)
            else:
                found = study.baseline(kind, **target, **held)
        except InfeasibleTarget as error:
            refused.append(f"{kind}: {error}")
            continue
        predicted = study.predict(found)
        row = [kind, f"{predicted.sparsity:.2%}", f"{predicted.latency_ms:.3f}", f"{predicted.speedup:.2f}"]
        row += [f"{predicted.kl:.4g}" if predicted.kl is not None else ""]
        row += [f"{predicted.size_bytes / 1e6:.3f}"]
        if options.measure:
            timed, trust = study.pruned_latency(found), study.trust(found, n_images=options.images)
            row += [f"{timed.latency_ms:.3f}", f"{timed.dense_ms / timed.latency_ms:.2f}"]
            row += [f"{trust.measured:.4g}" if trust is not None else ""]
        rows.append(row)
    header = ["", "sparsity", "ms", "speed-up", "kl", "MB"]
    header += ["ms, measured", "speed-up, measured", "kl, measured"] if options.measure else []
    [(name, value)] = target.items()
    how = " and measured" if options.measure else ""
    print(f"\n{name.replace('_', ' ')} {value:g}, predicted{how}, before any training")
    _print_table(header, rows, left=1)
    for line in refused:
        print(line)
    return 0


def _solved(study: Study, options: argparse.Namespace) -> SparsityDistribution:
    distribution = study.solve(
        speedup=options.speedup,
        latency_ms=options.latency_ms,
        sparsity=options.sparsity,
        locked=dict(options.lock) or None,
        score=options.score,
    )
    predicted = study.predict(distribution)
    print(
        f"solved: sparsity {predicted.sparsity:.1%}, predicted {predicted.latency_ms:.3f} ms "
        f"({predicted.speedup:.2f} × faster)"
    )
    print("  " + ", ".join(f"{name or 'model'} {sparsity:.0%}" for name, sparsity in distribution.items()))
    return distribution


def _check_report(path: Path | None) -> None:
    """Refuse a report that could not be written, before the long work and not after it."""
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise ExplorerError(
            f"The report {path} cannot be written: {'it is a folder' if path.is_dir() else 'its folder does not exist'}. Name another file with --report."
        )


@contextlib.contextmanager
def _workers(options: argparse.Namespace) -> Iterator[Executor | None]:
    """Yield what measures losses, None for this process."""
    from explorer.sensitivity import RayExecutor, worker_pool

    if options.workers is not None:
        with worker_pool(options.workers) as pool:
            yield pool
    elif options.cluster is not None:
        with RayExecutor(options.cluster) as cluster:
            yield cluster
    else:
        yield None


def _measured(
    study: Study,
    *,
    levels: tuple[float, ...] | None,
    n_images: int,
    refresh: bool,
    latency: bool,
    kinds: Sequence[str] | None = None,
    executor: Executor | None = None,
    resume: bool = True,
) -> SensitivityTable:
    from tqdm import tqdm

    from explorer.sensitivity import CellCounter

    total = study.n_sensitivity_cells(levels, refresh_batchnorm=refresh, latency=latency)
    points = study.sensitivity_points(
        levels,
        n_images,
        refresh_batchnorm=refresh,
        latency=latency,
        kinds=kinds,
        executor=executor,
        resume=resume,
    )
    count = CellCounter()
    with tqdm(total=total, desc="sensitivity", unit="cell", leave=False, disable=None) as bar:
        for point in points:
            bar.update(count.add(point))
    table = study.table
    assert table is not None
    return table


def _follow(run: PruningRun) -> None:
    """Iterate a run with a bar; the first Ctrl-C stops it, so that its result is kept."""
    from tqdm import tqdm

    from explorer.pruning import EvalEvent, LatencyEvent, StepEvent

    shown = {"accuracy": "", "latency": ""}
    with (
        _stopped_by_interrupt(run),
        tqdm(total=run.total_steps, desc="pruning", unit="step", leave=False, disable=None) as bar,
    ):
        for event in run:
            if isinstance(event, StepEvent):
                bar.set_description(event.phase, refresh=False)
                bar.set_postfix_str(
                    f"sparsity {event.sparsity:.1%}{shown['accuracy']}{shown['latency']}, "
                    f"{event.seconds_left:.0f} s left",
                    refresh=False,
                )
                bar.update()
            elif isinstance(event, EvalEvent):
                shown["accuracy"] = f", accuracy {event.accuracy:.1%}"
                bar.write(
                    f"step {event.step:5d}  sparsity {event.sparsity:6.1%}  validation accuracy {event.accuracy:.2%}",
                    file=sys.stdout,
                )
            elif isinstance(event, LatencyEvent):
                shown["latency"] = f", {event.speedup:.2f} ×"
                bar.write(
                    f"            latency {event.latency_ms:.3f} ± {event.spread_ms:.3f} ms, {event.speedup:.2f} × faster",
                    file=sys.stdout,
                )


@contextlib.contextmanager
def _stopped_by_interrupt(run: PruningRun) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        # Signals belong to the main thread; elsewhere the caller stops the run.
        yield
        return

    def stop(_signal: int, _frame: FrameType | None) -> None:
        run.stop()
        print("stopping after this step; once more to leave without a result", file=sys.stderr)
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _show_dense(study: Study) -> None:
    timings = study.dense_latency()
    assert study.dense_baseline is not None
    baseline = study.dense_baseline[0]
    print(f"dense latency, {study.threads} thread(s), batch {study.batch_size}:")
    for name, timed in timings.items():
        mark = "  <- baseline" if name == baseline else ""
        print(f"  {name:20s} {timed.latency_ms:8.3f} ± {timed.spread_ms:.3f} ms{mark}")


def _show_result(document: dict[str, Any], folder: Path) -> None:
    dense, pruned, part = document["dense"], document["pruned"], document["accuracy_measured_on"]
    print(
        f"accuracy  {dense['accuracy']:.2%} dense, {pruned['accuracy']:.2%} pruned "
        f"({part['samples']} {part['part']} samples)"
    )
    print(
        f"latency   {dense['latency_ms']:.3f} ms dense ({dense['baseline']}), {pruned['latency_ms']:.3f} ± "
        f"{pruned['spread_ms']:.3f} ms pruned: {pruned['speedup']:.2f} × faster"
    )
    print(
        f"sparsity  {pruned['sparsity']:.2%}; {dense['size_bytes']:,} bytes dense, {pruned['size_bytes']:,} without the zeros"
    )
    print(f"written to {folder}: model.safetensors, recipe.yaml, result.json")


def _cache(options: argparse.Namespace) -> int:
    root = cache_root()
    if root is None:
        print("Caches are switched off (EXPLORER_CACHE=off), or there is no home folder to keep them in.")
        return 0
    if options.clear:
        print(f"Deleted {clear_caches()} files below {root}.")
        return 0
    print(f"{root} (EXPLORER_CACHE names another folder, or switches caches off)")
    rows = [
        (what, str(len(files)), f"{sum(path.stat().st_size for path in files) / 2**20:.1f}")
        for what, files in cache_contents().items()
    ]
    _print_table(("kept", "files", "MiB"), rows, left=1)
    return 0


def _app(options: argparse.Namespace) -> int:
    missing = [name for name in _APP_MODULES if importlib.util.find_spec(name) is None]
    if missing:
        raise ExplorerError(
            f"The app needs {', '.join(missing)}, which is not installed. "
            "Install the extra: pip install 'sparsity-explorer[app]'."
        )
    from explorer.widgets import serving
    from explorer.widgets.choices import studies_environment
    from explorer.widgets.notebook_path import app_notebook

    token = serving.checked_token(options.host, options.token)
    limits = serving.limits_for(
        options.max_users,
        options.threads_per_user,
        options.memory_per_user,
        machine_gb=serving.machine_memory_gb(),
        cores=serving.usable_cores(),
        limits_memory=serving.can_limit_memory(),
    )
    _refuse_taken(options.host, options.port)
    command = serving.server_command(
        app_notebook(), options.port, host=options.host, limits=limits, token=bool(token)
    )
    address = serving.address(options.host, options.port, token)
    print(f"The app is at {address} ; Ctrl-C ends it.\n{serving.describe(limits)}", flush=True)
    environment = serving.server_environment(os.environ, token, options.weights_folder)
    environment |= studies_environment(options.study, Path.cwd())
    with subprocess.Popen(command, env=environment) as server:  # noqa: S603 - our own Python with arguments of ours
        # A service manager ends this process, not the server: pass it on, or the server and its kernels stay behind.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, lambda *_: server.terminate())
        if not options.no_browser:
            threading.Thread(target=_open_browser, args=(server, options, address), daemon=True).start()
        try:
            return server.wait()
        except KeyboardInterrupt:
            # The server is in the same terminal and has had the interrupt too.
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(timeout=10)
            server.terminate()
            return 0


def _open_browser(server: subprocess.Popen[bytes], options: argparse.Namespace, address: str) -> None:
    """Show the app once it is served; not left to Voila, which would leave out the token."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(options.host, options.host)  # noqa: S104 - looked up, not bound
    while server.poll() is None:
        try:
            socket.create_connection((host, options.port), timeout=1).close()
        except OSError:
            time.sleep(0.1)
        else:
            webbrowser.open(address)
            return


def _refuse_taken(host: str, port: int) -> None:
    try:
        # As Voila itself binds: a port that an ended server still lingers on is free.
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        socket.create_server((host, port), family=family, reuse_port=False).close()
    except (OSError, OverflowError) as error:
        if isinstance(error, OSError) and error.errno != errno.EADDRINUSE:
            raise ExplorerError(
                f"The app cannot listen on {host}, port {port} ({error}). Give an address of this machine with --host, or another --port."
            ) from error
        raise ExplorerError(f"Port {port} is in use; choose another one with --port ({error}).") from error


class _Clock:
    """Seconds by name of what was done under it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = time.perf_counter() - started


def _print_levels(table: SensitivityTable, kind: str, form: str, *, refreshed: bool = False) -> None:
    levels = table.levels(kind, refreshed=refreshed)
    rows = []
    for layer in table.layers:
        points = [table.point(layer, level, kind, refreshed=refreshed) for level in levels]
        rows.append(
            (layer or "model", *("" if point is None else form.format(point.value) for point in points))
        )
    _print_table(("layer", *(f"{level:.0%}" for level in levels)), rows, left=1)


def _print_refined(table: SensitivityTable, levels: dict[str, list[float]]) -> None:
    rows = [
        (layer or "model", f"{level:.2%}", f"{table.value(layer, level, 'kl'):.4f}")
        for layer in table.layers
        for level in sorted(levels.get(layer, ()))
    ]
    if rows:
        _print_table(("layer", "sparsity", "kl"), rows, left=1)
    else:
        print("nothing: more levels would only show noise. More images would lower it.")


def _print_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, left: int) -> None:
    """Print aligned columns, the first `left` of them to the left."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    for row in [header, *rows]:
        cells = [
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())


def _levels(text: str) -> tuple[float, ...]:
    try:
        levels = tuple(float(part) for part in text.split(","))
    except ValueError:
        levels = ()
    if not levels or not all(0.0 <= level < 1.0 for level in levels):
        raise argparse.ArgumentTypeError(f"{text!r} are not sparsities; give fractions such as 0.5,0.9,0.98")
    return levels


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _report_file(text: str) -> Path:
    path = Path(text)
    if path.suffix.lower() not in (".html", ".htm"):
        raise argparse.ArgumentTypeError(f"{text!r} is no name of an HTML file; give one such as report.html")
    return path


def _bound(text: str) -> tuple[str, tuple[float, float]]:
    name, equals, values = text.rpartition("=")
    low, colon, high = values.partition(":")
    try:
        pair = (float(low), float(high))
    except ValueError:
        pair = (1.0, 0.0)
    if not equals or not colon or not 0.0 <= pair[0] <= pair[1] < 1.0:
        raise argparse.ArgumentTypeError(f"{text!r} is not LAYER=LOW:HIGH, such as stem.conv=0:0.5")
    return name, pair


def _lock(text: str) -> tuple[str, float]:
    name, equals, value = text.rpartition("=")
    try:
        sparsity = float(value)
    except ValueError:
        sparsity = -1.0
    if not equals or not 0.0 <= sparsity < 1.0:
        raise argparse.ArgumentTypeError(f"{text!r} is not LAYER=SPARSITY, such as stem.conv=0 or fc=0.5")
    return name, sparsity
