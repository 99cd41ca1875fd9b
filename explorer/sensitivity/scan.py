"""The private copy that is pruned, measured and restored: everything that one cell of a scan needs.

A cell is one layer at one level. The copy is run from the changed layer on, with what earlier layers gave when the dense network ran
(`explorer.sensitivity.replay`). Between two cells the copy is as it was. A batch holds images of one cell: several levels in one batch would save nothing, since batches
are as large as is quick already (the demo takes as long in batches of 85, 100, 125 and 250).

Refreshed curves are the second opinion, and cost a pass over the calibration images besides. They are measured on the first two fifths of the images, 200 at least,
and so is the baseline that they start from.
"""

from __future__ import annotations

import copy
import math
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from explorer.errors import DataError, ModelError
from explorer.sensitivity.cache import scan_key
from explorer.sensitivity.estimates import MIN_DRAWN, Estimate, Resampler
from explorer.sensitivity.material import Material
from explorer.sensitivity.points import SensitivityPoint
from explorer.sensitivity.replay import PrefixReplay

__all__ = ["Cell", "Sample", "Scan"]

BATCH_SIZE = 100
# A criterion says one thing of a batch, so that its error can only be had from several batches.
CRITERION_BATCH = 25
# Larger outputs fit into no cache, and smaller batches leave the late layers of large networks too little to do at once: with outputs of 64 MiB, ResNet-50 is scanned
# 1.6 times as fast on one thread as with 16 MiB, and 1.1 times on two.
OUTPUT_LIMIT = 64 << 20
MEMORY_LIMIT = 4 << 30
_REFRESHED_SHARE = 0.4
_MIN_REFRESHED = 200
_TRIAL_IMAGES = 2
_TRIAL_SPARSITY = 0.9


@dataclass(frozen=True, slots=True)
class Cell:
    """What one layer at one level gave: an estimate by kind, the removed share of squared weights, and how many non-zero weights were removed."""

    values: dict[str, Estimate]
    removed_energy: float
    n_removed: int

    def points(
        self, layer: str, level: float, *, refreshed: bool, energy: bool = False
    ) -> tuple[SensitivityPoint, ...]:
        """Return the cell's points; with `energy` also that of kind "removed_energy"."""
        points = [
            SensitivityPoint(
                layer, level, kind, one.value, refreshed, one.std_error, self.n_removed, one.low, one.high
            )
            for kind, one in self.values.items()
        ]
        if energy:
            points.append(
                SensitivityPoint(
                    layer, level, "removed_energy", self.removed_energy, n_removed=self.n_removed
                )
            )
        return tuple(points)


@dataclass(frozen=True, slots=True)
class Sample:
    """What one layer at one level gave for each image: by kind ``(images,)`` float64; of a criterion for each batch."""

    values: dict[str, Tensor]
    batch_sizes: tuple[float, ...]
    removed_energy: float
    n_removed: int

    def __add__(self, more: Sample) -> Sample:
        """Return what was found on both sets of images."""
        return Sample(
            {kind: torch.cat([each, more.values[kind]]) for kind, each in self.values.items()},
            self.batch_sizes + more.batch_sizes,
            self.removed_energy,
            self.n_removed,
        )


class _Stopped(Exception):
    """The stop event was set between two batches."""


class Scan:
    """A private copy of a network, its batches, and what the dense network answered to them.

    Call `prepare`, then `record`, then `measure` as often as wanted.

    Parameters
    ----------
    material : Material
    stop : threading.Event, optional
        When set, what is being measured ends before the next batch and gives None.
    memory_limit : int, optional
        Bytes that recorded outputs may take; by default an eighth of the machine's memory, and 4 GiB at most.

    Raises
    ------
    ModelError
        If the network cannot be copied.
    """

    def __init__(
        self,
        material: Material,
        stop: threading.Event | None = None,
        memory_limit: int | None = None,
    ) -> None:
        self._memory_limit = default_memory_limit() if memory_limit is None else memory_limit
        module = material.module
        try:
            self._module = copy.deepcopy(module)
        except Exception as error:
            raise ModelError(
                f"This {type(module).__name__} cannot be copied ({error}), and pruning is tried on a copy only. "
                "Detach tensors that it holds besides parameters and buffers, or give it a __deepcopy__."
            ) from error
        self._module.eval().requires_grad_(False)
        self._criterion = material.criterion
        self._stop = stop
        self._units = {unit.name: unit for unit in material.units}
        self._inputs, self._all_labels = material.inputs, material.labels
        calibration = material.calibration
        if self._inputs.ndim == 4:
            # Convolutions on a CPU run about a quarter faster so; the numbers agree to rounding.
            self._module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's stubs
            self._inputs = self._inputs.contiguous(memory_format=torch.channels_last)
            calibration = calibration.contiguous(memory_format=torch.channels_last)
        self._images: tuple[Tensor, ...] = ()
        self._labels: tuple[Tensor, ...] | None = None
        # In one batch: statistics of several small ones would leave out how images differ.
        self._calibration = calibration
        self._replay = PrefixReplay(self._module, self._memory_limit)
        self._resampler = Resampler()
        self._first_use: dict[str, int] = {}
        self._start: dict[str, int] = {}
        self._matter: set[str] = set()
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

    @property
    def n_first(self) -> int:
        """Number of batches that are enough for a first picture."""
        return min(self.n_batches, -(-MIN_DRAWN // len(self._images[0])))

    def batches(self, *, refreshed: bool) -> range:
        """Return the batches that are measured on: all, or with refreshed BatchNorm statistics the first."""
        if not refreshed:
            return range(self.n_batches)
        n_images = max(_MIN_REFRESHED, _REFRESHED_SHARE * len(self._inputs))
        return range(min(self.n_batches, math.ceil(n_images / len(self._images[0]))))

    def _recorded(self, *, refreshed: bool) -> range:
        """Return those of them whose dense outputs are known."""
        return self.batches(refreshed=refreshed)[: len(self._dense)]

    def prepare(self) -> None:
        """Learn the calls, choose the size of batches, and try the shortened passes.

        Raises
        ------
        DataError
            If the model refuses the images, or labels are out of range.
        ModelError
            If the outputs are no logits.
        """
        few = self._few()
        try:
            with torch.inference_mode():
                dense = self._check_output(self._module(few))
            self._replay.trace(few)
        except ModelError:
            raise
        except Exception as error:
            dtypes = {str(p.dtype) for p in self._module.parameters()}
            raise DataError(
                f"The model refuses the data: inputs of shape {tuple(self._inputs.shape)} and type {few.dtype} "
                f"(model: {', '.join(sorted(dtypes))}) gave: {error}"
            ) from error
        most = BATCH_SIZE if self._criterion is None else min(BATCH_SIZE, CRITERION_BATCH)
        each = self._replay.largest_output // len(few)
        size = min(most, max(1, OUTPUT_LIMIT // max(1, each)))
        if self._criterion is None:
            size = -(-len(self._inputs) // -(-len(self._inputs) // size))  # no small one at the end
        self._images = self._inputs.split(size)
        self._labels = None if self._all_labels is None else self._all_labels.split(size)
        self._check_labels(dense)
        self._find_starts(few, dense)
        self._replay.choose(list(self._start.values()))

    def forget(self) -> None:
        """Drop what was recorded, but not the dense outputs, to make room for other batches."""
        for key in range(self.n_batches):
            self._replay.forget(key)

    def _few(self) -> Tensor:
        return self._inputs[:_TRIAL_IMAGES]

    def key(self) -> str:
        """What the numbers of this scan depend on, see `explorer.sensitivity.cache`."""
        with torch.inference_mode():
            answers = self._module(self._few())
        return scan_key(
            self._module,
            (self._inputs, self._all_labels, self._calibration),
            answers,
            f"labels {self._all_labels is not None} {list(self._units.values()) if any(unit.channels for unit in self._units.values()) else ''}",
        )

    @property
    def n_fitting(self) -> int:
        """For how many batches memory holds what shortened passes need; known when the first was recorded."""
        each = self._replay.size(0)
        return 1 if each is None else max(1, min(self.n_batches, self._memory_limit // max(1, each)))

    def record(self, batches: range, *, again: bool = False) -> Cell | None:
        """Record the dense outputs of some batches, after all before them, and what shortened passes need.

        Parameters
        ----------
        batches : range
        again : bool
            Also of batches whose dense outputs are known, but for which there was no memory.

        Returns
        -------
        Cell or None
            The dense network, on all batches so far; None when stopped.
        """
        try:
            with torch.inference_mode():
                for key in batches:
                    self._check_stop()
                    is_known = key < len(self._dense)
                    if is_known and not (again and self._replay.size(key) is None):
                        continue
                    output = self._check_output(self._replay.record(key, self._images[key]))
                    if is_known:
                        continue
                    if not bool(torch.isfinite(output).all()):
                        raise ModelError(
                            "The dense model's outputs are not finite on the validation images. "
                            "Check its weights and that the inputs are normalised as in training."
                        )
                    self._dense.append(output)
                    self._dense_log.append(_log_softmax(output))
        except _Stopped:
            return None
        return self.dense()

    def dense(self, *, refreshed: bool = False) -> Cell:
        """Return what the dense network gives on the recorded batches; if `refreshed`, on those that refreshed cells are measured on."""
        batches = self._recorded(refreshed=refreshed)
        return self.cell(self._sample(self._dense[: len(batches)], batches, "of the dense model", 0.0, 0))

    def measure(self, name: str, level: float, *, refreshed: bool) -> Cell | None:
        """Prune a layer, measure on all recorded batches (see `batches`), restore; None when stopped.

        Raises
        ------
        ModelError
            If the layer's weights have no influence on the outputs, or these are not finite.
        """
        try:
            if not refreshed:
                return self.cell(self._sampled(name, level, self._recorded(refreshed=False)))
            if not self._calibration_recorded:
                self._record_calibration()
            with (
                torch.inference_mode(),
                self._units[name].pruned(self._module, level) as removed,
                self._refreshed(name),
            ):
                where = f"with layer {name!r} at sparsity {level} and BatchNorm refreshed"
                batches = self._recorded(refreshed=True)
                outputs = self._outputs(self._start[name], batches)
                return self.cell(self._sample(outputs, batches, where, *removed))
        except _Stopped:
            return None

    def sample(self, name: str, level: float, batches: range) -> Sample | None:
        """Prune a layer, measure on some of the recorded batches, restore; None when stopped."""
        try:
            return self._sampled(name, level, batches)
        except _Stopped:
            return None

    def _sampled(self, name: str, level: float, batches: range) -> Sample:
        with torch.inference_mode(), self._units[name].pruned(self._module, level) as (energy, n_removed):
            outputs = self._outputs(self._start[name], batches)
            if n_removed:
                self._check_influence(name, outputs, batches)
            return self._sample(
                outputs, batches, f"with layer {name!r} at sparsity {level}", energy, n_removed
            )

    def measure_joint(self, distribution: Mapping[str, float], *, refreshed: bool) -> Cell | None:
        """Prune many layers at once, measure, restore; None when stopped."""
        names = [name for name, level in distribution.items() if level > 0.0]
        try:
            if refreshed and names and not self._calibration_recorded:
                self._record_calibration()
            with torch.inference_mode(), ExitStack() as restored:
                n_removed = sum(
                    restored.enter_context(self._units[name].pruned(self._module, distribution[name]))[1]
                    for name in names
                )
                if refreshed and names:
                    restored.enter_context(self._refreshed(min(names, key=self._first_use.__getitem__)))
                start = min((self._start[name] for name in names), default=0)
                batches = self._recorded(refreshed=refreshed)
                outputs = self._outputs(start, batches)
                return self.cell(self._sample(outputs, batches, "with all layers pruned", 0.0, n_removed))
        except _Stopped:
            return None

    def _record_calibration(self) -> None:
        with torch.inference_mode():
            self._check_stop()
            self._replay.record(self.n_batches, self._calibration)
        self._calibration_recorded = True

    def _outputs(self, start: int, batches: range) -> list[Tensor]:
        outputs = []
        for key in batches:
            self._check_stop()
            outputs.append(self._replay.run_from(start, key, self._images[key]))
        return outputs

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
                    norm.momentum = 1.0  # the batch replaces the old statistics
                    norm.train()
                self._check_stop()
                self._replay.run_from(self._start[name], self.n_batches, self._calibration)
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
        """Find the call from which on each layer's change matters, and prove it on a few images.

        Two proofs serve all layers: a pass in which every weight is spoiled until the call that is said to see it first, and from each start a
        shortened pass after other images have gone through the network. Layers for which they fail are tried one by one.
        """
        for name, unit in self._units.items():
            self._first_use[name] = min(map(self._replay.first_use, unit.weights(self._module)))
        self._replay.choose(list(self._first_use.values()))
        slack = 1e-6 * float(dense.abs().max())

        def alike(one: Tensor, other: Tensor) -> bool:
            return torch.allclose(one, other, rtol=1e-5, atol=slack, equal_nan=True)

        trial = -1
        with torch.inference_mode():
            is_first = self._spoiled_until_first_use(few, dense)
            self._replay.record(trial, few)
            # What a module keeps for itself outside of its outputs is now of other images. From the last start to the first, so that
            # it stays so in the calls that are left out.
            self._module(self._inputs[_TRIAL_IMAGES : 2 * _TRIAL_IMAGES])
            same: dict[int, bool] = {}
            later: int | None = None
            for start in sorted(set(self._first_use.values()), reverse=True):
                if later is None:
                    same[start] = alike(dense, self._replay.run_from(start, trial, few))
                else:
                    same[start] = same[later] and self._replay.repeats(start, later, trial, few, alike)
                later = start
            for name, start in self._first_use.items():
                if is_first:
                    proven = same[start]
                else:
                    with self._units[name].pruned(self._module, _TRIAL_SPARSITY):
                        full, short = self._module(few), self._replay.run_from(start, trial, few)
                    proven = same[start] and alike(full, short)
                self._start[name] = start if proven else 0
        self._replay.forget(trial)

    def _spoiled_until_first_use(self, few: Tensor, dense: Tensor) -> bool:
        """Tell whether the network's answers stay the same when each weight is nonsense until its first use is said to begin."""
        waiting: dict[int, list[tuple[Tensor, Tensor]]] = {}

        def restore(call: int) -> None:
            for weight, saved in waiting.pop(call, ()):
                weight.detach().copy_(saved)

        try:
            for unit in self._units.values():
                for weight in unit.weights(self._module):
                    first = self._replay.first_use(weight)
                    waiting.setdefault(first, []).append((weight, weight.detach().clone()))
                    # Cheap, and unlike the weight in every element.
                    weight.detach().mul_(-7.0).add_(weight.detach().abs().max() + 1.0)
            return torch.equal(dense, self._replay.run_watched(few, restore))
        finally:
            for call in list(waiting):
                restore(call)

    def _check_influence(self, name: str, outputs: list[Tensor], batches: range) -> None:
        """Refuse a layer that changes nothing whatever its weights are: small changes can vanish in rounding or behind a ReLU."""
        if name in self._matter or not all(
            map(torch.equal, outputs, self._dense[batches.start : batches.stop])
        ):
            self._matter.add(name)
            return
        weight, few = self._units[name].weights(self._module)[0], self._few()
        saved = weight.detach().clone()
        before = self._module(few)
        try:
            noise = torch.randn(saved.shape, generator=torch.Generator().manual_seed(0)).to(saved)
            weight.detach().copy_(noise * (10 * saved.abs().max() + 1))
            matters = not torch.equal(self._module(few), before)
        finally:
            weight.detach().copy_(saved)
        if not matters:
            raise ModelError(
                f"The weights of layer {name!r} have no influence on the outputs, so its sensitivity is unknown, not zero. "
                "Remove re-parametrisations such as weight_norm before the scan, or leave the layer out of `layers`."
            )
        self._matter.add(name)

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

    def _sample(
        self, outputs: list[Tensor], batches: range, where: str, energy: float, n_removed: int
    ) -> Sample:
        divergences, losses, hits, sizes = [], [], [], []
        for number, output in zip(batches, outputs, strict=True):
            log_pruned = _log_softmax(output)
            log_dense = self._dense_log[number]
            # The sum is never negative but for rounding.
            divergence = (log_dense.exp() * (log_dense - log_pruned)).sum(1).clamp_min(0.0)
            divergences.append(_per_image(divergence))
            if self._labels is None:
                continue
            labels = self._labels[number]
            sizes.append(float(len(labels)))
            hits.append(_per_image((output.argmax(1) == labels).double()))
            if self._criterion is None:
                losses.append(_per_image(functional.nll_loss(log_pruned, labels, reduction="none")))
            else:
                losses.append(_scalar(self._criterion(output, labels), where).reshape(1))
        values = {"kl": torch.cat(divergences)}
        if self._labels is not None:
            values |= {"loss": torch.cat(losses), "accuracy": torch.cat(hits)}
        for kind, each in values.items():
            if not bool(torch.isfinite(each).all()):
                raise ModelError(
                    f"The {kind} of some images is not finite {where}: the outputs are not. Check weights and inputs."
                )
        return Sample(values, tuple(sizes), energy, n_removed)

    def cell(self, sample: Sample) -> Cell:
        """Return means, errors and bands of what was sampled."""
        weights = None if self._criterion is None else torch.tensor(sample.batch_sizes, dtype=torch.float64)
        estimates = {
            kind: self._resampler.estimate(each, weights if kind == "loss" else None)
            for kind, each in sample.values.items()
        }
        return Cell(estimates, sample.removed_energy, sample.n_removed)


def default_memory_limit() -> int:
    """An eighth of the machine's memory, as far as the system tells, and not more than is ever of use."""
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not POSIX
        memory = 8 << 30
    return min(MEMORY_LIMIT, memory // 8)


def _has_statistics(norm: _BatchNorm) -> bool:
    return norm.track_running_stats and norm.running_mean is not None


def _log_softmax(output: Tensor) -> Tensor:
    return functional.log_softmax(output.double(), dim=1)


def _per_image(values: Tensor) -> Tensor:
    return values if values.ndim == 1 else values.flatten(1).mean(1)


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
