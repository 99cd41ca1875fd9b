"""Measures how much the network's answers change when one layer is pruned and nothing is trained.

For each layer and level: the divergence of the outputs from the dense network's, the loss, the accuracy; first as is, then with BatchNorm
statistics estimated anew, because most of what one-shot pruning breaks in inner layers is a shift of those statistics, which training
repairs at once. The caller's module is never touched: everything happens on a private copy, and between two points even that
copy is as it was.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from typing import Literal

from torch import Tensor, nn

from explorer.errors import DataError, DistributionError
from explorer.memory import pages_kept
from explorer.models import PrunableLayer
from explorer.sensitivity.cache import CellCache, cache_folder
from explorer.sensitivity.material import Criterion, LabelledData, Material, take_material
from explorer.sensitivity.points import (
    DEFAULT_LEVELS,
    WHOLE_NETWORK,
    SensitivityPoint,
    check_levels,
    level_order,
)
from explorer.sensitivity.scan import Sample, Scan
from explorer.sensitivity.second_order import measure_fisher
from explorer.sensitivity.tasks import Task, by_groups, distributed, inline
from explorer.sensitivity.units import named

__all__ = ["measure_loss"]


def measure_loss(
    module: nn.Module,
    data: LabelledData | tuple[Tensor, Tensor | None],
    *,
    layers: Iterable[str | PrunableLayer] | None = None,
    levels: Sequence[float] = DEFAULT_LEVELS,
    criterion: Criterion | None = None,
    n_images: int = 500,
    refresh_batchnorm: bool = True,
    structure: Literal["weights", "channels"] = "weights",
    kinds: Iterable[str] | None = None,
    cells: Iterable[tuple[str, float]] | None = None,
    resume: bool = False,
    executor: Executor | None = None,
    memory_limit: int | None = None,
    stop: threading.Event | None = None,
) -> Iterator[SensitivityPoint]:
    """Prune one layer at a time and yield what it does to the outputs.

    Points come in an order that makes the picture useful early: the dense baseline of every layer, one coarse level of every layer, then
    finer levels; afterwards the same again with refreshed BatchNorm statistics. Where there are several batches, the coarse level is first
    measured on few images, and its points come again, with smaller errors, from all: of two points with the same key the later
    counts, as it does in `SensitivityTable`. Each cell gives points of kind "kl", and with labels "loss" and "accuracy", and once
    "removed_energy".

    The divergence is KL(dense || pruned) of the softmax outputs (dimension 1), in nats, averaged over images (and over positions, if
    the output has any): it needs no labels, and ranks layers with fewer images than the loss does.

    Refreshing re-estimates mean and variance of all BatchNorms that run after the pruned weights are first used; those before see
    what they saw in training. Their statistics come from 125 validation images that are not measured on where there are enough of them, else
    from measured ones; labels are not used. Refreshed curves are a second opinion, and measured on the first two fifths of the images (200 at least): their
    level 0 is the dense network on those images.

    Parameters
    ----------
    module : nn.Module
        A classifier: ``(N, ...) float32`` to logits ``(N, C, ...)`` with C >= 2. Not changed; a copy is.
    data : LoadedData or (inputs, labels)
        Held-out data. Labels ``(N, ...) int64``, or None for the divergence alone.
    layers : iterable of str or PrunableLayer, optional
        Layers to measure; all by default.
    levels : sequence of float
        Sparsities in [0, 1). Level 0 is measured once and reported for each layer.
    criterion : callable, optional
        ``criterion(outputs, labels)`` gives the mean loss of a batch as a scalar. Cross-entropy by default, which also has a standard
        error.
    n_images : int
        Images to measure on, at most; drawn without replacement by a fixed seed.
    refresh_batchnorm : bool
        Do the second pass. Without BatchNorm in the model it is left out.
    structure : {"weights", "channels"}
        Remove the smallest weights of a layer, or the weakest output channels of a group of layers that share them (`explorer.models.channel_groups`): a level is then the
        fraction of channels, and a point's layer is the first of the group. Points of both belong into tables of their own.
    kinds : iterable of str, optional
        What to give: "kl", "loss", "accuracy" (these three come of the same passes), "removed_energy", and "fisher", a second-order estimate from one pass for all levels
        (`explorer.sensitivity.second_order.measure_fisher`), which comes before the finer levels. By default all but the last, without labels without loss and accuracy.
    cells : iterable of (str, float), optional
        Layer and level of the only cells to measure besides the baseline, in place of `layers` and `levels`; see `explorer.sensitivity.refinement`.
    resume : bool
        Keep what is measured on disk (see `explorer.sensitivity.cache`), and take from there what an earlier scan of the same network and data has measured. Not
        with a criterion of one's own.
    executor : concurrent.futures.Executor, optional
        Its workers measure the cells, several at a time: threads, processes (each with its share of the cores, see `worker_pool`), or a Ray cluster
        (`explorer.sensitivity.RayExecutor`). The numbers are the same to rounding. For processes the network must be picklable. Without one, cells are measured here, one after another.
    memory_limit : int, optional
        Bytes that outputs of earlier layers may take (of each worker); by default an eighth of the machine's memory, and 4 GiB at most. What does not fit at once is
        measured in groups of images: then all points of a level come several times, from more and more images.
    stop : threading.Event, optional
        When set, the scan ends before the next batch.

    Yields
    ------
    SensitivityPoint

    Raises
    ------
    DataError
        Too few images, labels out of range, a criterion that returns no finite scalar or has no labels, or data that the model refuses.
    ModelError
        Unknown layer names, outputs that are no logits, or weights that have no influence on them.
    DistributionError
        A level outside [0, 1), an unknown kind, or no cell.
    """
    chosen = None if cells is None else list(dict.fromkeys(cells))
    if chosen is not None:
        if not chosen:
            raise DistributionError("No cell was named; leave `cells` out to measure all layers and levels.")
        layers, levels = [name for name, _ in chosen], [level for _, level in chosen]
    ordered = level_order(check_levels(levels))
    if structure not in ("weights", "channels"):
        raise DistributionError(f"structure is 'weights' or 'channels'; got {structure!r}.")
    channels = structure == "channels"
    material = take_material(module, data, n_images, layers, criterion, channels=channels)
    wanted = _wanted(kinds, has_labels=material.labels is not None)
    if channels and "fisher" in wanted:
        raise DistributionError(
            "The second-order estimate is of single weights; leave 'fisher' out for channels."
        )
    # The checks above run when the generator is made, not at its first point: a mistake shows where it was made.
    fisher_levels = (0.0, *ordered) if "fisher" in wanted else ()
    names = [unit.name for unit in material.units]
    every = [(name, level) for level in ordered for name in names]
    if chosen is not None:
        aliases = {alias: layer.name for layer in material.layers for alias in (layer.name, *layer.tied)}
        by_layer = named(material.units)
        given = {(by_layer[aliases[name]].name, level) for name, level in chosen if aliases[name] in by_layer}
        every = [cell for cell in every if cell in given]
    if not wanted & _OF_PASSES:
        points = _without_passes(material, every, fisher_levels, resume, stop)
        return (point for point in points if point.kind in wanted)
    coarse = [] if chosen is not None else every[: len(names)]
    points = _points(
        material, coarse, every, refresh_batchnorm, fisher_levels, resume, executor, memory_limit, stop
    )
    return _with_pages_kept(point for point in points if point.kind in wanted)


def _with_pages_kept(points: Iterator[SensitivityPoint]) -> Iterator[SensitivityPoint]:
    with pages_kept():
        yield from points


_OF_PASSES = frozenset({"kl", "loss", "accuracy"})
_WITHOUT = frozenset({"removed_energy", "fisher"})


def _wanted(kinds: Iterable[str] | None, *, has_labels: bool) -> frozenset[str]:
    needs_labels = frozenset({"loss", "accuracy"})
    if kinds is None:
        return _OF_PASSES - (frozenset() if has_labels else needs_labels) | {"removed_energy"}
    wanted = frozenset([kinds] if isinstance(kinds, str) else kinds)
    known = _OF_PASSES | _WITHOUT
    if not wanted or wanted - known:
        raise DistributionError(
            f"kinds are {', '.join(sorted(known))}; got {', '.join(sorted(wanted)) or 'none'}."
        )
    if not has_labels and wanted & needs_labels:
        raise DataError(
            f"{' and '.join(sorted(wanted & needs_labels))} need labels, and the data have none. Pass labels, or ask for 'kl'."
        )
    return wanted


def _without_passes(
    material: Material,
    cells: Sequence[tuple[str, float]],
    fisher_levels: Sequence[float],
    resume: bool,
    stop: threading.Event | None,
) -> Iterator[SensitivityPoint]:
    """Yield what needs no pass with pruned weights: the removed share of squared weights, and the second-order estimate."""
    units = {unit.name: unit for unit in material.units}
    for name in units:
        yield SensitivityPoint(name, 0.0, "removed_energy", 0.0, n_removed=0)
    for name, level in cells:
        energy, n_removed = units[name].removed(material.module, level)
        yield SensitivityPoint(name, level, "removed_energy", energy, n_removed=n_removed)
    if fisher_levels:
        yield from _fisher(material, fisher_levels, Scan(material).key() if resume else None, stop)


def _fisher(
    material: Material, levels: Sequence[float], key: str | None, stop: threading.Event | None
) -> Iterator[SensitivityPoint]:
    """Yield the second-order estimate of all layers and levels, from disk when all of it is there; under `key`, if there is one."""
    kept = CellCache("", None) if key is None else CellCache(f"{key}-fisher", cache_folder())
    known = [
        kept.get(layer.name, level, refreshed=False) for layer in material.layers for level in sorted(levels)
    ]
    if all(known):
        for points in known:
            yield from points or ()
        return
    estimated = measure_fisher(
        material.module, material.inputs, material.labels, material.layers, levels, stop=stop
    )
    for point in estimated:
        kept.put((point,))
        yield point


def _points(
    material: Material,
    coarse: Sequence[tuple[str, float]],
    cells: Sequence[tuple[str, float]],
    refresh_batchnorm: bool,
    fisher_levels: Sequence[float],
    resume: bool,
    executor: Executor | None,
    memory_limit: int | None,
    stop: threading.Event | None,
) -> Iterator[SensitivityPoint]:
    """Yield the baseline of all layers, the coarse cells on few images, the second-order estimate, and all cells; then the refreshed ones."""
    names = [unit.name for unit in material.units]
    scan = Scan(material, stop, memory_limit)
    scan.prepare()
    # A criterion is code, of which no digest tells whether it is still the same.
    key = scan.key() if resume and material.criterion is None else None
    kept = CellCache("", None) if key is None else CellCache(key, cache_folder())

    def of_all_layers(dense: Sequence[SensitivityPoint]) -> Iterator[SensitivityPoint]:
        for name in names:
            yield from (replace(point, layer=name) for point in dense)
            yield SensitivityPoint(name, 0.0, "removed_energy", 0.0, n_removed=0)

    begun: dict[Task, Sample] = {}
    baseline = kept.get(WHOLE_NETWORK, 0.0, refreshed=False)
    if baseline is None:
        if executor is None and scan.n_first < scan.n_batches:
            dense = scan.record(range(scan.n_first))
            if dense is None:
                return
            yield from of_all_layers(dense.points(WHOLE_NETWORK, 0.0, refreshed=False))
            for name, level in coarse:
                sample = scan.sample(name, level, range(scan.n_first))
                if sample is None:
                    return
                begun[Task(name, level, False)] = sample
                yield from scan.cell(sample).points(name, level, refreshed=False)
        dense = scan.record(scan.batches(refreshed=False))
        if dense is None:
            return
        baseline = dense.points(WHOLE_NETWORK, 0.0, refreshed=False)
        kept.put(baseline)
    yield from of_all_layers(baseline)
    if fisher_levels:
        yield from _fisher(material, fisher_levels, key, stop)

    for refreshed in (False, True) if refresh_batchnorm and scan.has_batchnorm else (False,):
        used = scan.batches(refreshed=refreshed)
        if refreshed:
            # Nothing is pruned, so there is nothing to refresh; but the images are fewer.
            baseline = kept.get(WHOLE_NETWORK, 0.0, refreshed=True)
            if baseline is None:
                if scan.record(used) is None:
                    return
                baseline = scan.dense(refreshed=True).points(WHOLE_NETWORK, 0.0, refreshed=True)
                kept.put(baseline)
            for name in names:
                yield from (replace(point, layer=name) for point in baseline)
        known = {
            Task(name, level, refreshed): kept.get(name, level, refreshed=refreshed) for name, level in cells
        }
        missing = [task for task, points in known.items() if points is None]
        if missing and scan.record(used) is None:
            return
        if executor is not None:
            measured = distributed(material, scan, missing, executor, stop, memory_limit)
        elif not refreshed and scan.n_fitting < scan.n_batches:
            measured = by_groups(scan, missing, begun)
        else:
            measured = inline(scan, missing, begun)
        for task, points in known.items():
            while points is None:
                done = next(measured, None)
                if done is None:
                    return
                found = done.cell.points(
                    done.task.layer, done.task.level, refreshed=refreshed, energy=not refreshed
                )
                if done.is_final:
                    assert done.task == task
                    kept.put(found)
                    points = found
                else:
                    yield from found
            yield from points
