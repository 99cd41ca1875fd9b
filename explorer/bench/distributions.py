"""Solved distributions against those of the literature, where it counts: accuracy after training, at equal measured latency.

Every distribution of a target is corrected until the engine's measured speed-up is what was asked, whatever its tables predicted; then the demo is pruned to it, with the
same settings and the same seeds as all others. Beside that: how long solving takes, and what it gains on paper.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from explorer.atomic import write_atomically
from explorer.distribution import SCORES, Frontier, Target, solve, uniform_for_target
from explorer.errors import DistributionError, FormatError, InfeasibleTarget, ModelError
from explorer.models import LoadedModel, load_model
from explorer.models.architectures import FashionResNet
from explorer.study import Study

__all__ = [
    "NAMES",
    "SEARCHED",
    "Trained",
    "check_names",
    "compare_trained",
    "load_trained",
    "solver_report",
    "table",
]

NAMES = ("uniform", "erk", "lamp", "global", "inverse", "solved")
# Solved with this score, or searched by measuring whole networks.
_SCORED = "solved:"
SEARCHED = "searched"
_REPEATS = 9
_LATENCY_TURNS = 5


@dataclass(frozen=True, slots=True)
class Trained:
    """One pruned network.

    Attributes
    ----------
    target : float
        Speed-up that was asked for.
    name : str
        Of `NAMES`, "solved:" and the name of a score, or "searched".
    seed : int
    sparsity : float
        Zeros over all prunable weights.
    speedup : float
        Measured, before training; zeros move in training, and their number in each layer stays.
    accuracy : float
        Fraction of the test images.
    """

    target: float
    name: str
    seed: int
    sparsity: float
    speedup: float
    accuracy: float


def compare_trained(
    study: Study,
    targets: Sequence[float],
    seeds: Sequence[int],
    *,
    names: Sequence[str] = NAMES,
    epochs: float = 5,
    record: Path | None = None,
) -> Iterator[Trained]:
    """Prune to each distribution with each seed, and yield the networks' accuracies; seeds outermost, so that an early end leaves whole rounds.

    Parameters
    ----------
    study : Study
        With data and measured sensitivity.
    targets : sequence of float
        Speed-ups. Distributions that do not reach one are left out of it.
    seeds : sequence of int
    names : sequence of str
    epochs : float
    record : Path, optional
        JSON file: what it holds is not done again, and it grows with each network.

    Raises
    ------
    FormatError
        If the record is none, or cannot be written.
    """
    done = [] if record is None else _read(record)
    known = {(one.target, one.name, one.seed) for one in done}
    yield from done
    chosen: dict[tuple[float, str], tuple[Any, float] | None] = {}
    for seed in seeds:
        for target in targets:
            for name in names:
                if (target, name, seed) in known:
                    continue
                if (target, name) not in chosen:
                    chosen[target, name] = _at_equal_latency(study, name, target)
                found = chosen[target, name]
                if found is None:
                    continue
                distribution, speedup = found
                run = study.prune(distribution, epochs=epochs, seed=seed, latency=False)
                result = run.finish()
                one = Trained(
                    target,
                    name,
                    seed,
                    study.predict(distribution).sparsity,
                    speedup,
                    result.accuracy,
                )
                done.append(one)
                if record is not None:
                    content = json.dumps([asdict(each) for each in done], indent=1)
                    write_atomically(record, (content + "\n").encode())
                yield one


def _at_equal_latency(study: Study, name: str, target: float) -> tuple[Any, float] | None:
    """Return the distribution that is measured to reach the target, and what was measured; None when it is out of reach."""
    try:
        if name == "solved":
            found = study.solve(speedup=target)
        elif name.startswith(_SCORED):
            found = study.solve(speedup=target, score=name.removeprefix(_SCORED))
        elif name == SEARCHED:
            *_, last = study.search(speedup=target)
            found = last.distribution
        else:
            found = study.baseline(name, speedup=target, check=True)
    except InfeasibleTarget:
        return None
    turns = [study.pruned_latency(found) for _ in range(_LATENCY_TURNS)]
    return found, median(turn.dense_ms / turn.latency_ms for turn in turns)


def check_names(names: Sequence[str]) -> None:
    """Refuse distributions that there are not.

    Raises
    ------
    DistributionError
    """
    for name in names:
        if name not in (*NAMES, SEARCHED) and name.removeprefix(_SCORED) not in SCORES:
            raise DistributionError(
                f"There is no distribution {name!r}; there are {', '.join(NAMES)}, {SEARCHED}, and {_SCORED} with one of {', '.join(SCORES)}."
            )


def load_trained(folder: Path) -> LoadedModel:
    """Load a network that `explorer.models.demo.train` wrote with ``--out``.

    Raises
    ------
    ModelError
        If the folder holds none.
    """
    try:
        about = json.loads((folder / "fashion-resnet.json").read_text(encoding="utf-8"))
        module = FashionResNet(tuple(about["widths"]), depth=about["depth"])
        module.load_state_dict(load_file(folder / "fashion-resnet.safetensors"))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise ModelError(
            f"{folder} holds no network of 'python -m explorer.models.demo.train --out {folder}': {error}."
        ) from error
    return load_model(module.eval(), example_input=torch.zeros(1, 1, 28, 28))


def _read(record: Path) -> list[Trained]:
    if not record.exists():
        return []
    try:
        return [Trained(**one) for one in json.loads(record.read_text(encoding="utf-8"))]
    except (ValueError, TypeError, OSError) as error:
        raise FormatError(f"{record} is no record of this benchmark: {error}. Name another file.") from error


def table(trained: Sequence[Trained]) -> str:
    """Lay the results out as text, one line for each target and distribution, the most accurate first, with the spread over seeds."""
    lines = []
    for target in sorted({one.target for one in trained}):
        mine = [one for one in trained if one.target == target]
        rows = []
        for name in dict.fromkeys(one.name for one in mine):
            these = [one for one in mine if one.name == name]
            accuracies = [100 * one.accuracy for one in these]
            spread = stdev(accuracies) if len(accuracies) > 1 else float("nan")
            rows.append((mean(accuracies), spread, name, these))
        lines.append(f"{target:g} x, {max(len(row[3]) for row in rows)} seed(s)")
        lines.append(f"  {'':<22} {'accuracy %':>16} {'sparsity':>9} {'speed-up':>9}")
        for accuracy, spread, name, these in sorted(rows, key=lambda row: -row[0]):
            lines.append(
                f"  {name:<22} {accuracy:>8.2f} ± {spread:>5.2f} {these[0].sparsity:>9.1%} {these[0].speedup:>8.2f}x"
            )
    return "\n".join(lines)


def solver_report(study: Study, targets: Sequence[float]) -> str:
    """Say how long solving takes, and what it gains over a uniform distribution of the same predicted latency.

    Parameters
    ----------
    study : Study
        With measured sensitivity.
    targets : sequence of float
        Speed-ups; those out of reach are left out.
    """
    assert study.table is not None
    layers, tables = study.model.layers, study.table
    lines = []
    for speedup in targets:
        target = Target(speedup=speedup)
        try:
            solved, seconds = _timed(lambda target=target: solve(layers, tables, target))
            even = uniform_for_target(layers, tables, target)
        except InfeasibleTarget:
            continue
        ours, theirs = study.predict(solved), study.predict(even)
        if ours.kl is None or theirs.kl is None:
            continue
        lines.append(
            f"{speedup:g} x: solved in {1e3 * seconds:.1f} ms; divergence before training {ours.kl:.3f} against {theirs.kl:.3f} nats of uniform"
        )
    generator = np.random.default_rng(0)
    loss = np.sort(generator.gamma(1.0, 1.0, (100, 50)), axis=1)
    ms = np.sort(generator.gamma(1.0, 1.0, (100, 50)), axis=1)[:, ::-1]
    budget = 0.5 * (ms.min(axis=1).sum() + ms.max(axis=1).sum())
    _, seconds = _timed(lambda: Frontier(loss, ms).best(budget))
    lines.append(f"100 layers x 50 levels, drawn at random: solved in {1e3 * seconds:.1f} ms")
    return "\n".join(lines)


def _timed(call: Any) -> tuple[Any, float]:
    seconds = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        result = call()
        seconds.append(time.perf_counter() - start)
    return result, median(seconds)
