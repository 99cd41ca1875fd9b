"""Measures how much the network's answers change when one layer is pruned and nothing is trained.

For each layer and level: the divergence of the outputs from the dense network's, the loss, the accuracy; first as is, then with BatchNorm
statistics estimated anew, because most of what one-shot pruning breaks in inner layers is a shift of those statistics, which training
repairs at once. The caller's module is never touched: everything happens on a private copy, and between two points even that
copy is as it was.
"""

from __future__ import annotations

import copy
import difflib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from explorer.errors import DataError, ModelError
from explorer.masks import magnitude_mask
from explorer.models import PrunableLayer, prunable_layers
from explorer.sensitivity.cache import CellCache, cache_folder, scan_key
from explorer.sensitivity.points import (
    DEFAULT_LEVELS,
    WHOLE_NETWORK,
    SensitivityPoint,
    check_levels,
    level_order,
)
from explorer.sensitivity.replay import PrefixReplay
from explorer.sensitivity.second_order import measure_fisher

__all__ = ["Criterion", "JointLoss", "LabelledData", "choose_layers", "measure_joint", "measure_loss"]

BATCH_SIZE = 125
MIN_IMAGES = 16
# Statistics over a few hundred images are within about a per cent: convolutions average over positions as well.
N_CALIBRATION = 250
MEMORY_LIMIT = 1 << 30
_TRIAL_IMAGES = 2
_TRIAL_SPARSITY = 0.9

Criterion = Callable[[Tensor, Tensor], Tensor]
_Result = TypeVar("_Result")


class LabelledData(Protocol):
    """What the scan asks of a data set: `explorer.data.LoadedData` answers it."""

    def validation_tensors(self, limit: int | None = None) -> tuple[Tensor, Tensor]:
        """Return inputs ``(N, ...) float32`` and labels ``(N,) int64`` that were held out from training."""
        ...


def choose_layers(
    module: nn.Module, example_input: Tensor, layers: Iterable[str | PrunableLayer] | None
) -> tuple[PrunableLayer, ...]:
    """Return the layers to measure, in execution order.

    Parameters
    ----------
    module : nn.Module
    example_input : Tensor
        One batch that the module accepts.
    layers : iterable of str or PrunableLayer, optional
        Names to keep; all by default. A name that is tied to a layer stands for that layer.

    Raises
    ------
    ModelError
        If a name is no prunable layer; the message suggests near ones.
    """
    present = prunable_layers(module, example_input)
    if layers is None:
        return present
    by_name = {alias: layer for layer in present for alias in (layer.name, *layer.tied)}
    chosen: set[str] = set()
    for wanted in layers:
        name = wanted if isinstance(wanted, str) else wanted.name
        if name not in by_name:
            near = difflib.get_close_matches(name, by_name, n=3, cutoff=0.5)
            advice = (
                f"Did you mean {', '.join(map(repr, near))}?" if near else f"Layers are {', '.join(by_name)}."
            )
            raise ModelError(f"{name!r} is no prunable layer of this {type(module).__name__}. {advice}")
        chosen.add(by_name[name].name)
    if not chosen:
        raise ModelError("No layer was named; leave `layers` out to measure all of them.")
    return tuple(layer for layer in present if layer.name in chosen)


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
    stop: threading.Event | None = None,
) -> Iterator[SensitivityPoint]:
    """Prune one layer at a time and yield what it does to the outputs.

    Points come in an order that makes the picture useful early: the dense baseline of every layer, one coarse level of every layer, then
    finer levels; afterwards the same again with refreshed BatchNorm statistics. Where there are several batches, the coarse level is first
    measured on one batch, and its points come again, with smaller errors, from all images: of two points with the same key the later
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
        Runs each cell, one at a time, in a thread of its own. The copy is shared, so a pool of processes will not do.
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
    inputs, labels, calibration = _take_images(data, n_images)
    if criterion is not None and labels is None:
        raise DataError(
            "A criterion compares outputs with labels, and the data have none. Pass labels, or leave the criterion out."
        )
    chosen = choose_layers(module, inputs[:1], layers)
    # The checks above run when the generator is made, not at its first point: a mistake shows where it was made.
    extra: Iterator[SensitivityPoint] = iter(())
    if second_order:
        extra = measure_fisher(module, inputs, labels, chosen, (0.0, *ordered), stop=stop)
    return _points(
        module,
        inputs,
        labels,
        calibration,
        chosen,
        ordered,
        criterion,
        refresh_batchnorm,
        extra,
        resume,
        executor,
        stop,
    )


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
    inputs, labels, calibration = _take_images(data, n_images)
    chosen = choose_layers(module, inputs[:1], distribution) if distribution else ()
    check_levels([*distribution.values(), 0.5])
    aliases = {alias: layer.name for layer in chosen for alias in (layer.name, *layer.tied)}
    by_name = {aliases[name]: level for name, level in distribution.items()}
    scan = _Scan(module, inputs, labels, calibration, chosen, None, stop)
    scan.prepare()
    if scan.record(scan.n_batches) is None:
        return None
    cell = scan.measure_joint(by_name, refreshed=refresh_batchnorm and scan.has_batchnorm)
    if cell is None:
        return None
    return JointLoss(
        {kind: value for kind, (value, _) in cell.values.items()},
        {kind: error for kind, (_, error) in cell.values.items()},
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
    module: nn.Module,
    inputs: Tensor,
    labels: Tensor | None,
    calibration: Tensor,
    layers: tuple[PrunableLayer, ...],
    levels: tuple[float, ...],
    criterion: Criterion | None,
    refresh_batchnorm: bool,
    extra: Iterator[SensitivityPoint],
    resume: bool,
    executor: Executor | None,
    stop: threading.Event | None,
) -> Iterator[SensitivityPoint]:
    scan = _Scan(module, inputs, labels, calibration, layers, criterion, stop)
    _execute(executor, scan.prepare)
    refresh = refresh_batchnorm and scan.has_batchnorm
    # A criterion is code, of which no digest tells whether it is still the same.
    kept = CellCache(scan.key(), cache_folder()) if resume and criterion is None else CellCache("", None)
    baseline = kept.get(WHOLE_NETWORK, 0.0, refreshed=False)
    is_recorded = baseline is None
    for n_batches in sorted({1, scan.n_batches}) if baseline is None else (scan.n_batches,):
        if is_recorded:
            cell = _execute(executor, partial(scan.record, n_batches))
            if cell is None:
                return
            baseline = tuple(cell.points(WHOLE_NETWORK, 0.0, refreshed=False))
        assert baseline is not None
        for layer in layers:
            yield from (replace(point, layer=layer.name) for point in baseline)
            if n_batches == 1 or not is_recorded:
                yield SensitivityPoint(layer.name, 0.0, "removed_energy", 0.0, n_removed=0)
        if n_batches < scan.n_batches:
            for layer in layers:
                cell = _execute(executor, partial(scan.measure, layer, levels[0], refreshed=False))
                if cell is None:
                    return
                yield from cell.points(layer.name, levels[0], refreshed=False)
    assert baseline is not None
    if is_recorded:
        kept.put(baseline)
    yield from extra
    for refreshed in (False, True) if refresh else (False,):
        if refreshed:
            for layer in layers:  # nothing is pruned, so there is nothing to refresh
                yield from (replace(point, layer=layer.name, refreshed=True) for point in baseline)
        for level in levels:
            for layer in layers:
                points = kept.get(layer.name, level, refreshed=refreshed)
                if points is None:
                    if not is_recorded and _execute(executor, partial(scan.record, scan.n_batches)) is None:
                        return
                    is_recorded = True
                    cell = _execute(executor, partial(scan.measure, layer, level, refreshed=refreshed))
                    if cell is None:
                        return
                    points = tuple(cell.points(layer.name, level, refreshed=refreshed))
                    if not refreshed:
                        energy = SensitivityPoint(
                            layer.name, level, "removed_energy", cell.removed_energy, n_removed=cell.n_removed
                        )
                        points = (*points, energy)
                    kept.put(points)
                yield from points


def _execute(executor: Executor | None, task: Callable[[], _Result]) -> _Result:
    return task() if executor is None else executor.submit(task).result()


def _take_images(
    data: LabelledData | tuple[Tensor, Tensor | None], n_images: int
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return the images to measure on, their labels, and the images to estimate BatchNorm statistics from."""
    if n_images < MIN_IMAGES:
        raise DataError(
            f"n_images={n_images} is too few to tell layers apart; at least {MIN_IMAGES}, and better 500, are needed."
        )
    labels: Tensor | None
    if isinstance(data, tuple):
        if len(data) != 2:
            raise DataError(
                f"Data must be LoadedData or a pair (inputs, labels); got a tuple of {len(data)}."
            )
        inputs, labels = data
    else:
        inputs, labels = data.validation_tensors()
    if not isinstance(inputs, Tensor) or inputs.ndim < 2 or not inputs.is_floating_point():
        what = (
            f"{inputs.dtype} of shape {tuple(inputs.shape)}"
            if isinstance(inputs, Tensor)
            else type(inputs).__name__
        )
        raise DataError(f"Inputs must be a floating-point tensor (N, ...), one row an image; got {what}.")
    n = len(inputs)
    if n < MIN_IMAGES:
        raise DataError(
            f"{n} validation images are too few to tell layers apart; at least {MIN_IMAGES}, better 500, are needed."
        )
    if labels is not None:
        if not isinstance(labels, Tensor) or labels.dtype.is_floating_point or len(labels) != n:
            what = (
                f"{labels.dtype} of shape {tuple(labels.shape)}"
                if isinstance(labels, Tensor)
                else type(labels).__name__
            )
            raise DataError(
                f"Labels must be an integer tensor with one row for each of the {n} inputs; got {what}."
            )
        labels = labels.long()
    # A random draw, since validation sets are often sorted by class; a fixed seed, since a scan must be repeatable.
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    measured = order[:n_images]
    spare = order[n_images : n_images + N_CALIBRATION]
    if len(spare) < min(N_CALIBRATION, n_images):
        spare = order[:N_CALIBRATION]
    return inputs[measured], None if labels is None else labels[measured], inputs[spare]


@dataclass(frozen=True, slots=True)
class _Cell:
    """What one layer at one level gave: (mean, standard error) by kind."""

    values: dict[str, tuple[float, float | None]]
    removed_energy: float
    n_removed: int

    def points(self, layer: str, level: float, *, refreshed: bool) -> Iterator[SensitivityPoint]:
        for kind, (value, error) in self.values.items():
            yield SensitivityPoint(layer, level, kind, value, refreshed, error, self.n_removed)


class _Stopped(Exception):
    """The stop event was set between two batches."""


class _Scan:
    """The private copy, the batches and the recorded outputs."""

    def __init__(
        self,
        module: nn.Module,
        inputs: Tensor,
        labels: Tensor | None,
        calibration: Tensor,
        layers: tuple[PrunableLayer, ...],
        criterion: Criterion | None,
        stop: threading.Event | None,
    ) -> None:
        try:
            self._module = copy.deepcopy(module)
        except Exception as error:
            raise ModelError(
                f"This {type(module).__name__} cannot be copied ({error}), and pruning is tried on a copy only. "
                "Detach tensors that it holds besides parameters and buffers, or give it a __deepcopy__."
            ) from error
        self._module.eval().requires_grad_(False)
        self._criterion = criterion
        self._stop = stop
        self._layers = layers
        if inputs.ndim == 4:
            # Convolutions on a CPU run about a quarter faster so; the numbers agree to rounding.
            self._module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's stubs
            inputs = inputs.contiguous(memory_format=torch.channels_last)
            calibration = calibration.contiguous(memory_format=torch.channels_last)
        self._images = inputs.split(BATCH_SIZE)
        self._labels = None if labels is None else labels.split(BATCH_SIZE)
        self._calibration = calibration.split(BATCH_SIZE)
        self._replay = PrefixReplay(self._module, MEMORY_LIMIT)
        self._first_use: dict[str, int] = {}
        self._start: dict[str, int] = {}
        self._dense: list[Tensor] = []
        self._dense_log: list[Tensor] = []
        self._calibration_recorded = False
        self.has_batchnorm = any(
            isinstance(child, _BatchNorm) and _has_statistics(child) for child in self._module.modules()
        )

    @property
    def n_batches(self) -> int:
        """Number of batches that are measured on."""
        return len(self._images)

    def prepare(self) -> None:
        """Learn the calls and try the shortened passes."""
        few = self._images[0][:_TRIAL_IMAGES]
        try:
            with torch.inference_mode():
                dense = self._check_output(self._module(few))
            self._replay.trace(few)
        except ModelError:
            raise
        except Exception as error:
            dtypes = {str(p.dtype) for p in self._module.parameters()}
            raise DataError(
                f"The model refuses the data: inputs of shape {tuple(self._images[0].shape)} and type {few.dtype} "
                f"(model: {', '.join(sorted(dtypes))}) gave: {error}"
            ) from error
        self._check_labels(dense)
        self._find_starts(few, dense)
        self._replay.choose(list(self._start.values()))

    def key(self) -> str:
        """What the numbers of this scan depend on, see `explorer.sensitivity.cache`."""
        few = self._images[0][:_TRIAL_IMAGES]
        with torch.inference_mode():
            answers = self._module(few)
        labels = () if self._labels is None else self._labels
        return scan_key(
            self._module,
            (*self._images, *labels, *self._calibration),
            answers,
            f"batches of {BATCH_SIZE}, labels {self._labels is not None}",
        )

    def record(self, n_batches: int) -> _Cell | None:
        """Record the dense outputs of the first batches, on which cells are measured from now on; returns the dense cell, or None when stopped."""
        try:
            with torch.inference_mode():
                for key in range(len(self._dense), n_batches):
                    self._check_stop()
                    output = self._check_output(self._replay.record(key, self._images[key]))
                    if not bool(torch.isfinite(output).all()):
                        raise ModelError(
                            "The dense model's outputs are not finite on the validation images. "
                            "Check its weights and that the inputs are normalised as in training."
                        )
                    self._dense.append(output)
                    self._dense_log.append(_log_softmax(output))
                return self._summarise(self._dense, "of the dense model", 0.0, 0)
        except _Stopped:
            return None

    def measure(self, layer: PrunableLayer, level: float, *, refreshed: bool) -> _Cell | None:
        """Prune, measure, restore; None when stopped."""
        start = self._start[layer.name]
        try:
            if refreshed and not self._calibration_recorded:
                self._record_calibration()
            with torch.inference_mode(), self._pruned(layer.name, level) as (energy, n_removed):
                where = f"with layer {layer.name!r} at sparsity {level}"
                if not refreshed:
                    return self._summarise(self._outputs(start), where, energy, n_removed)
                with self._refreshed(layer.name):
                    return self._summarise(
                        self._outputs(start), where + " and BatchNorm refreshed", energy, n_removed
                    )
        except _Stopped:
            return None

    def measure_joint(self, distribution: Mapping[str, float], *, refreshed: bool) -> _Cell | None:
        """Prune many layers at once, measure, restore; None when stopped."""
        names = [name for name, level in distribution.items() if level > 0.0]
        try:
            if refreshed and names and not self._calibration_recorded:
                self._record_calibration()
            with torch.inference_mode(), ExitStack() as restored:
                n_removed = sum(
                    restored.enter_context(self._pruned(name, distribution[name]))[1] for name in names
                )
                if refreshed and names:
                    restored.enter_context(self._refreshed(min(names, key=self._first_use.__getitem__)))
                start = min((self._start[name] for name in names), default=0)
                return self._summarise(self._outputs(start), "with all layers pruned", 0.0, n_removed)
        except _Stopped:
            return None

    def _record_calibration(self) -> None:
        with torch.inference_mode():
            for key, images in enumerate(self._calibration, start=len(self._images)):
                self._check_stop()
                self._replay.record(key, images)
        self._calibration_recorded = True

    def _outputs(self, start: int) -> list[Tensor]:
        outputs = []
        for key in range(len(self._dense)):
            self._check_stop()
            outputs.append(self._replay.run_from(start, key, self._images[key]))
        return outputs

    def _weight(self, name: str) -> Tensor:
        return self._module.get_submodule(name).get_parameter("weight")

    @contextmanager
    def _pruned(self, name: str, level: float) -> Iterator[tuple[float, int]]:
        """Prune a layer for a while; gives the removed share of squared weights and the number of removed non-zero weights."""
        weight = self._weight(name)
        saved = weight.detach().clone()
        removed = saved.masked_fill(magnitude_mask(saved, level), 0.0)
        total = float(saved.double().square().sum())
        energy = float(removed.double().square().sum()) / total if total > 0 else 0.0
        try:
            weight.detach().masked_fill_(removed != 0, 0.0)
            yield energy, int(torch.count_nonzero(removed))
        finally:
            weight.detach().copy_(saved)

    @contextmanager
    def _refreshed(self, name: str) -> Iterator[None]:
        """Re-estimate, for a while, the statistics of BatchNorms that run after a layer, from the calibration images."""
        after = self._replay.modules_from(self._first_use[name])
        norms = [child for child in after if isinstance(child, _BatchNorm) and _has_statistics(child)]
        saved = [
            (norm, norm.momentum, {k: v.clone() for k, v in norm.named_buffers(recurse=False)})
            for norm in norms
        ]
        try:
            if norms:
                for norm in norms:
                    norm.momentum = (
                        None  # a cumulative average, so the first batch replaces the old statistics
                    )
                    norm.get_buffer("num_batches_tracked").zero_()
                    norm.train()
                for key, images in enumerate(self._calibration, start=len(self._images)):
                    self._check_stop()
                    self._replay.run_from(self._start[name], key, images)
                for norm in norms:
                    norm.eval()
            yield
        finally:
            for norm, momentum, buffers in saved:
                norm.eval()
                norm.momentum = momentum
                for key_, value in buffers.items():
                    norm.get_buffer(key_).copy_(value)

    def _find_starts(self, few: Tensor, dense: Tensor) -> None:
        """Find the call from which on each layer's change matters, and prove it on a few images."""
        for layer in self._layers:
            self._first_use[layer.name] = self._replay.first_use(self._weight(layer.name))
        self._replay.choose(list(self._first_use.values()))
        with torch.inference_mode():
            trial = -1
            self._replay.record(trial, few)
            for layer in self._layers:
                start = self._first_use[layer.name]
                with self._pruned(layer.name, _TRIAL_SPARSITY) as (_, n_removed):
                    full = self._module(few)
                    short = self._replay.run_from(start, trial, few)
                if n_removed and torch.equal(full, dense) and not self._matters(layer.name, few, dense):
                    raise ModelError(
                        f"The weights of layer {layer.name!r} have no influence on the outputs, so its sensitivity is unknown, not zero. "
                        "Remove re-parametrisations such as weight_norm before the scan, or leave the layer out of `layers`."
                    )
                same = torch.allclose(
                    full, short, rtol=1e-5, atol=1e-6 * float(dense.abs().max()), equal_nan=True
                )
                self._start[layer.name] = start if same else 0
            self._replay.forget(trial)

    def _matters(self, name: str, few: Tensor, dense: Tensor) -> bool:
        """Tell whether a gross change of the weights changes the outputs: small ones can vanish in rounding or behind a ReLU."""
        weight = self._weight(name)
        saved = weight.detach().clone()
        try:
            noise = torch.randn(saved.shape, generator=torch.Generator().manual_seed(0)).to(saved.dtype)
            weight.detach().copy_(noise * (10 * saved.abs().max() + 1))
            return not torch.equal(self._module(few), dense)
        finally:
            weight.detach().copy_(saved)

    def _check_output(self, output: Any) -> Tensor:
        if not isinstance(output, Tensor):
            raise ModelError(
                f"The model must return one tensor of logits (N, classes); it returned {type(output).__name__}. "
                "Wrap it in a module whose forward returns the logits."
            )
        if output.ndim < 2 or output.shape[1] < 2:
            raise ModelError(
                f"The model must return logits (N, classes) with at least two classes; it returned {tuple(output.shape)}."
            )
        return output

    def _check_labels(self, output: Tensor) -> None:
        if self._labels is None:
            return
        classes = output.shape[1]
        low = min(int(part.min()) for part in self._labels)
        high = max(int(part.max()) for part in self._labels)
        if low < 0 or high >= classes:
            raise DataError(
                f"Labels run from {low} to {high}, but the model has {classes} outputs: labels must lie in 0..{classes - 1}."
            )
        expected = output.shape[2:]
        if self._criterion is None and self._labels[0].shape[1:] != expected:
            raise DataError(
                f"Labels of one image have shape {tuple(self._labels[0].shape[1:])}, the model's outputs need {tuple(expected)}."
            )

    def _check_stop(self) -> None:
        if self._stop is not None and self._stop.is_set():
            raise _Stopped

    def _summarise(self, outputs: list[Tensor], where: str, energy: float, n_removed: int) -> _Cell:
        divergences, losses, hits, sizes = [], [], [], []
        for number, output in enumerate(outputs):
            log_pruned = _log_softmax(output)
            log_dense = self._dense_log[number]
            # The sum is never negative but for rounding.
            divergence = (log_dense.exp() * (log_dense - log_pruned)).sum(1).clamp_min(0.0)
            divergences.append(_per_image(divergence))
            if self._labels is None:
                continue
            labels = self._labels[number]
            sizes.append(len(labels))
            hits.append(_per_image((output.argmax(1) == labels).double()))
            if self._criterion is None:
                losses.append(_per_image(functional.nll_loss(log_pruned, labels, reduction="none")))
            else:
                losses.append(_scalar(self._criterion(output, labels), where).reshape(1))
        values: dict[str, tuple[float, float | None]] = {"kl": _mean(torch.cat(divergences))}
        if self._labels is not None:
            loss = torch.cat(losses)
            if self._criterion is None:
                values["loss"] = _mean(loss)
            else:
                weights = torch.tensor(sizes, dtype=torch.float64)
                values["loss"] = (float((loss * weights).sum() / weights.sum()), None)
            values["accuracy"] = _mean(torch.cat(hits))
        for kind, (value, _) in values.items():
            if not torch.isfinite(torch.tensor(value)):
                raise ModelError(
                    f"The {kind} is {value} {where}: the outputs are not finite. Check weights and inputs."
                )
        return _Cell(values, energy, n_removed)


def _has_statistics(norm: _BatchNorm) -> bool:
    return norm.track_running_stats and norm.running_mean is not None


def _log_softmax(output: Tensor) -> Tensor:
    return functional.log_softmax(output.double(), dim=1)


def _per_image(values: Tensor) -> Tensor:
    return values if values.ndim == 1 else values.flatten(1).mean(1)


def _mean(values: Tensor) -> tuple[float, float | None]:
    """Return the mean over images and its standard error."""
    return float(values.mean()), float(values.std() / len(values) ** 0.5)


def _scalar(value: Any, where: str) -> Tensor:
    advice = "A criterion must return the mean loss of a batch as one finite number, as nn.CrossEntropyLoss() does."
    if not isinstance(value, (Tensor, float, int)):
        raise DataError(f"The criterion returned {type(value).__name__} {where}. {advice}")
    tensor = torch.as_tensor(value).detach().double()
    if tensor.numel() != 1:
        raise DataError(
            f"The criterion returned a tensor of shape {tuple(tensor.shape)} {where}. {advice} Use reduction='mean'."
        )
    if not bool(torch.isfinite(tensor).all()):
        raise DataError(f"The criterion returned {float(tensor)} {where}. {advice}")
    return tensor
