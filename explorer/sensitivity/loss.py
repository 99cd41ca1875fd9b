"""Measures how much the network's answers change when one layer is pruned and nothing is trained.

For each layer and level: the divergence of the outputs from the dense network's, the loss, the accuracy; first as is, then with BatchNorm
statistics estimated anew, because most of what one-shot pruning breaks in inner layers is a shift of those statistics, which training
repairs at once. The caller's module is never touched: everything happens on a private copy, and between two points even that
copy is as it was.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace

from torch import Tensor, nn

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

__all__ = ["JointLoss", "measure_joint", "measure_loss"]


def measure_loss(
    module: nn.Module,
    data: LabelledData | tuple[Tensor, Tensor | None],
    *,
    layers: Iterable[str | PrunableLayer] | None = None,
    levels: Sequence[float] = DEFAULT_LEVELS,
    criterion: Criterion | None = None,
    n_images: int = 500,
    refresh_batchnorm: bool = True,
    second_order: bool = False,
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
    what they saw in training. Their statistics come from validation images that are not measured on where there are enough of them, else
    from the measured ones; labels are not used.

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
    second_order : bool
        Also give points of kind "fisher" for all levels, before the finer levels, see `explorer.sensitivity.second_order.measure_fisher`.
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
        A level outside [0, 1).
    """
    ordered = level_order(check_levels(levels))
    material = take_material(module, data, n_images, layers, criterion)
    # The checks above run when the generator is made, not at its first point: a mistake shows where it was made.
    extra: Iterator[SensitivityPoint] = iter(())
    if second_order:
        extra = measure_fisher(
            module, material.inputs, material.labels, material.layers, (0.0, *ordered), stop=stop
        )
    names = [layer.name for layer in material.layers]
    coarse = [(name, ordered[0]) for name in names]
    cells = [(name, level) for level in ordered for name in names]
    return _points(material, coarse, cells, refresh_batchnorm, extra, resume, executor, memory_limit, stop)


def measure_joint(
    module: nn.Module,
    data: LabelledData | tuple[Tensor, Tensor | None],
    distribution: Mapping[str, float],
    *,
    n_images: int = 500,
    refresh_batchnorm: bool = False,
    stop: threading.Event | None = None,
) -> JointLoss | None:
    """Prune all layers at once, as a distribution says, and measure what single-layer curves can only add up.

    Parameters
    ----------
    module : nn.Module
        A classifier, as for `measure_loss`. Not changed; a copy is.
    data : LoadedData or (inputs, labels)
    distribution : mapping of str to float
        Sparsity in [0, 1) by layer; layers that are not named stay as they are.
    n_images : int
        As for `measure_loss`: with the same number, the same images.
    refresh_batchnorm : bool
        Measure with BatchNorm statistics estimated anew.
    stop : threading.Event, optional
        When set, the measurement ends before the next batch and gives None.

    Raises
    ------
    DataError, ModelError
        As `measure_loss`.
    DistributionError
        A sparsity outside [0, 1).
    """
    material = take_material(module, data, n_images, distribution or None)
    check_levels([*distribution.values(), 0.5])
    aliases = {alias: layer.name for layer in material.layers for alias in (layer.name, *layer.tied)}
    by_name = {aliases[name]: level for name, level in distribution.items()}
    scan = Scan(material, stop)
    scan.prepare()
    if scan.record(range(scan.n_batches)) is None:
        return None
    cell = scan.measure_joint(by_name, refreshed=refresh_batchnorm and scan.has_batchnorm)
    if cell is None:
        return None
    return JointLoss(
        {kind: one.value for kind, one in cell.values.items()},
        {kind: one.std_error for kind, one in cell.values.items()},
        cell.n_removed,
    )


@dataclass(frozen=True, slots=True)
class JointLoss:
    """What a network gives when all its layers are pruned at once.

    Attributes
    ----------
    values : dict of str to float
        "kl", and with labels "loss" and "accuracy".
    std_errors : dict of str to float or None
        Over images.
    n_removed : int
        Non-zero weights that were removed.
    """

    values: dict[str, float]
    std_errors: dict[str, float | None]
    n_removed: int


def _points(
    material: Material,
    coarse: Sequence[tuple[str, float]],
    cells: Sequence[tuple[str, float]],
    refresh_batchnorm: bool,
    extra: Iterator[SensitivityPoint],
    resume: bool,
    executor: Executor | None,
    memory_limit: int | None,
    stop: threading.Event | None,
) -> Iterator[SensitivityPoint]:
    """Yield the baseline of all layers, the coarse cells on few images, what is `extra`, and all cells; then the refreshed ones."""
    names = [layer.name for layer in material.layers]
    scan = Scan(material, stop, memory_limit)
    scan.prepare()
    # A criterion is code, of which no digest tells whether it is still the same.
    is_kept = resume and material.criterion is None
    kept = CellCache(scan.key(), cache_folder()) if is_kept else CellCache("", None)

    def of_all_layers(dense: Sequence[SensitivityPoint]) -> Iterator[SensitivityPoint]:
        for name in names:
            yield from (replace(point, layer=name) for point in dense)
            yield SensitivityPoint(name, 0.0, "removed_energy", 0.0, n_removed=0)

    everything = range(scan.n_batches)
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
        dense = scan.record(everything)
        if dense is None:
            return
        baseline = dense.points(WHOLE_NETWORK, 0.0, refreshed=False)
        kept.put(baseline)
    yield from of_all_layers(baseline)
    yield from extra

    for refreshed in (False, True) if refresh_batchnorm and scan.has_batchnorm else (False,):
        if refreshed:
            for name in names:  # nothing is pruned, so there is nothing to refresh
                yield from (replace(point, layer=name, refreshed=True) for point in baseline)
        known = {
            Task(name, level, refreshed): kept.get(name, level, refreshed=refreshed) for name, level in cells
        }
        missing = [task for task, points in known.items() if points is None]
        if missing and scan.record(everything) is None:
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
