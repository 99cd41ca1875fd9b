"""A pruning run: training with masks, told as a stream of events, that can be paused, stopped and looked at at any time.

The run works on a copy and owns all its state, so that the worker thread that iterates it and the thread that presses Stop meet in
one lock only. Invariants: between two steps every masked weight is exactly zero; `result` can be taken at any moment and waits for at
most one step; the same settings and training threads give the same weights, bit for bit.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from explorer.data import LoadedData
from explorer.errors import DistributionError, RunError
from explorer.masks import magnitude_mask
from explorer.memory import pages_kept
from explorer.models import LoadedModel, load_model
from explorer.models.memory_format import training_memory_format
from explorer.pruning.batches import BatchStream
from explorer.pruning.evaluation import Evaluation, evaluate
from explorer.pruning.events import DoneEvent, EvalEvent, LatencyEvent, MaskEvent, RunEvent, StepEvent
from explorer.pruning.masks import HeldMasks
from explorer.pruning.methods import make_method
from explorer.pruning.result import RunResult
from explorer.pruning.schedule import learning_rate_at
from explorer.pruning.settings import RunSettings

State = Literal["ready", "running", "paused", "finished", "stopped", "failed"]

# Validation samples of an evaluation during the run, unless the settings say otherwise: enough for a curve, cheap enough to
# leave the time to training. The final figures use all test samples.
_N_VALIDATION = 1000


class TimedLatency(Protocol):
    """What a latency measurement must say, in milliseconds.

    Median and interquartile half-range of the pruned network, and the median of the fastest dense one beside it.
    """

    @property
    def latency_ms(self) -> float: ...

    @property
    def spread_ms(self) -> float: ...

    @property
    def dense_ms(self) -> float: ...


@dataclass(frozen=True)
class _GoodState:
    """Weights, buffers and masks of a moment when the loss was finite."""

    step: int
    tensors: dict[str, Tensor]
    masks: dict[str, Tensor]


class _Diverged(Exception):
    """The loss is no longer a number; carries the message for the user."""


class PruningRun:
    """Prune a network to a sparsity distribution while it trains.

    Iterate it for events. Iterating may be broken off and taken up again; `finish` iterates to the end.

    Parameters
    ----------
    model : LoadedModel or nn.Module
        Classifier to prune; it is copied and stays as it is.
    data : LoadedData
        `train` trains, `validation` is evaluated during the run, `test` (or `validation` where there is none) at its end.
    distribution : mapping of str to float
        Final sparsity by layer name, fractions in [0, 1). Layers that are not named are trained but not pruned.
    settings : RunSettings, optional
        How to prune and train; the defaults are those of `RunSettings`.
    measure_latency : callable, optional
        Takes the network in evaluation mode and returns its latency, with the dense one beside it; called at each evaluation,
        while nothing trains.
    **options
        Single fields of `RunSettings`, for instance `epochs=3, seed=1`.

    Raises
    ------
    RunError
        If an option is unknown or out of range, or there are no training data.
    DistributionError
        If the distribution names a layer that cannot be pruned, or a sparsity outside [0, 1).

    Examples
    --------
    >>> import torch
    >>> from explorer.data import load_data
    >>> x, y = torch.randn(64, 8), torch.arange(64) % 2
    >>> network = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
    >>> run = PruningRun(network, load_data((x, y), (x, y)), {"0": 0.75}, epochs=4, batch_size=16)
    >>> run.finish().achieved["0"]
    (96, 128)
    """

    def __init__(
        self,
        model: LoadedModel | nn.Module,
        data: LoadedData,
        distribution: Mapping[str, float],
        *,
        settings: RunSettings | None = None,
        measure_latency: Callable[[nn.Module], TimedLatency] | None = None,
        **options: Any,
    ) -> None:
        chosen = _with_options(settings or RunSettings(), options)
        # Sums in another order or precision round differently: the recipe must say how these weights came about.
        self.settings = dataclasses.replace(
            chosen,
            threads=chosen.threads or torch.get_num_threads(),
            precision=_fastest_precision() if chosen.precision == "auto" else chosen.precision,
        )
        self._data = data
        inputs, labels = data.train_tensors()
        if len(inputs) == 0:
            raise RunError("The training data are empty; a run needs labelled samples to train on.")
        loaded = model if isinstance(model, LoadedModel) else load_model(model, inputs[:1])
        self._dense = copy.deepcopy(loaded.module).eval()
        self._module = copy.deepcopy(self._dense)
        # The images follow in `_laid_out`.
        self._memory_format = training_memory_format(self._module, inputs)
        self._module.to(memory_format=self._memory_format)  # type: ignore[call-overload]
        self._teacher = self._dense
        if self.settings.distillation > 0.0 and self._memory_format == torch.channels_last:
            self._teacher = copy.deepcopy(self._dense).to(memory_format=self._memory_format)  # type: ignore[call-overload]
        self.asked = _checked(distribution, tuple(layer.name for layer in loaded.layers))
        # A plain mapping has neither.
        self.locked: tuple[str, ...] = tuple(sorted(getattr(distribution, "locked", ())))
        self.groups: tuple[tuple[str, ...], ...] = tuple(getattr(distribution, "groups", ()))
        weights = {name: _weight(self._module, name) for name in self.asked}
        self._elements = {name: weight.numel() for name, weight in weights.items()}
        self._weights = weights

        batch_size = min(self.settings.batch_size, len(inputs))
        self.total_steps = max(1, round(self.settings.epochs * len(inputs) / batch_size))
        self._evaluate_every = self.settings.evaluate_every or max(1, round(len(inputs) / batch_size))
        initial = {name: _initial_sparsity(weights[name], sparsity) for name, sparsity in self.asked.items()}
        self._method = make_method(initial, self.asked, self.total_steps, self.settings)
        self._batches = BatchStream(inputs, labels, batch_size, data.augment, self.settings.seed)
        self._held = HeldMasks(weights)
        self._held.replace({name: magnitude_mask(weights[name], initial[name]) for name in self.asked})
        self._held.apply()
        self._optimizer = torch.optim.SGD(
            self._module.parameters(),
            lr=self.settings.learning_rate,
            momentum=self.settings.momentum,
            nesterov=self.settings.momentum > 0,
            weight_decay=self.settings.weight_decay,
        )
        # Dropout draws from torch's global generator: the run has a state of it of its own.
        self._random_state = torch.Generator().manual_seed(self.settings.seed).get_state()

        self.study: Any = None
        """The `Study` that made this run, for those who show it."""
        self._measure_latency = measure_latency
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._go_on = threading.Event()
        self._go_on.set()
        self._state: State = "ready"
        self._step = 0
        self._train_seconds = 0.0
        self._eval_seconds = 0.0
        self._n_measured = 0
        self._dense_validation: Evaluation | None = None
        self._evaluations: list[EvalEvent] = []
        self._masks_told = False
        self._latencies: list[LatencyEvent] = []
        self._good = self._snapshot()
        self._result: RunResult | None = None
        self._events = self._generate()

    @property
    def state(self) -> State:
        """Where the run is: ready, running, paused, finished, stopped or failed."""
        return "paused" if self._state == "running" and not self._go_on.is_set() else self._state

    @property
    def step(self) -> int:
        """Optimiser steps made so far."""
        return self._step

    @property
    def n_evaluations(self) -> int:
        """Evaluations that the whole run makes on validation data, the one before the first step included."""
        return 1 + math.ceil(self.total_steps / self._evaluate_every)

    @property
    def result(self) -> RunResult:
        """The network as it is now, or as it was left at the end; waits for at most one step."""
        with self._lock:
            return self._result or self._build_result(None)

    def pause(self) -> None:
        """Hold the iterating thread before its next step, until `resume` or `stop`. Call it from another thread."""
        self._go_on.clear()

    def resume(self) -> None:
        """Go on after `pause`."""
        self._go_on.set()

    def stop(self) -> None:
        """End the run before its next step; what it has reached is evaluated and kept in `result`."""
        self._stop.set()
        self._go_on.set()

    def finish(self) -> RunResult:
        """Make all steps that are left, and return the result."""
        for _ in self:
            pass
        return self.result

    def __iter__(self) -> Iterator[RunEvent]:
        return self

    def __next__(self) -> RunEvent:
        return next(self._events)

    def _generate(self) -> Iterator[RunEvent]:
        self._state = "running"
        try:
            with pages_kept():
                yield self._mask_event()
                yield from self._measured()
                while self._step < self.total_steps:
                    self._go_on.wait()
                    if self._stop.is_set():
                        break
                    yield self._train_step()
                    if not self._masks_told:
                        yield self._mask_event()
                    if self._step == self.total_steps or self._step % self._evaluate_every == 0:
                        yield from self._measured()
                result = self._final_result()
        except _Diverged as error:
            self._state = "failed"
            with self._lock:
                self._restore()
                self._result = self._build_result(str(error))
            raise RunError(str(error)) from None
        except BaseException:
            # A full disk, an interrupt: the weights are whole (see `_train_step`) and `result` still works.
            self._state = "stopped"
            raise
        with self._lock:
            self._result = result
        self._state = "stopped" if result.stopped else "finished"
        yield DoneEvent(result)

    def _train_step(self) -> StepEvent:
        started = time.perf_counter()
        step = self._step
        settings = self.settings
        learning_rate = learning_rate_at(settings.learning_rate, step, self.total_steps)
        with self._lock, self._own_threads(), self._own_randomness():
            masks = self._method.select(step, self._weights)
            if masks is not None:
                self._held.replace(masks)
                self._held.apply(self._optimizer)
                self._masks_told = False
            for group in self._optimizer.param_groups:
                group["lr"] = learning_rate
            inputs, labels = self._batches.next()
            inputs = self._laid_out(inputs)
            self._module.train()
            try:
                loss = self._loss(inputs, labels)
                value = loss.item()
                if not math.isfinite(value):
                    raise _Diverged(self._diverged_message(value, learning_rate))
                if step % settings.update_every == 0:
                    self._good = self._snapshot()
                self._optimizer.zero_grad(set_to_none=True)
                loss.backward()
                self._optimizer.step()
            finally:
                # Also after an interrupt half way: no masked weight survives a step.
                self._held.apply(self._optimizer)
                self._module.eval()
            self._step = step + 1
        self._train_seconds += time.perf_counter() - started
        return StepEvent(
            step=self._step,
            total_steps=self.total_steps,
            phase=self._method.phase(step),
            loss=value,
            learning_rate=learning_rate,
            sparsity=self._sparsity(),
            seconds_left=self._seconds_left(),
        )

    def _mask_event(self) -> MaskEvent:
        self._masks_told = True
        return MaskEvent(self._step, self._held.zeros, self._held.masks)

    def _loss(self, inputs: Tensor, labels: Tensor) -> Tensor:
        with self._autocast():
            scores = self._module(inputs).float()
        if scores.ndim != 2 or len(scores) != len(labels):
            raise RunError(
                f"The model's output has shape {tuple(scores.shape)} for {len(labels)} samples; "
                "pruning runs need a classifier with one row of class scores a sample."
            )
        share = self.settings.distillation
        loss = functional.cross_entropy(scores, labels)
        if share == 0.0:
            return loss
        # Hinton et al., "Distilling the knowledge in a neural network" (2015); T^2 keeps the gradients' size at any temperature.
        temperature = self.settings.temperature
        with torch.no_grad(), self._autocast():
            taught = functional.log_softmax(self._teacher(inputs).float() / temperature, dim=1)
        learnt = functional.log_softmax(scores / temperature, dim=1)
        distance = functional.kl_div(learnt, taught, reduction="batchmean", log_target=True)
        return (1.0 - share) * loss + share * temperature**2 * distance

    def _measured(self) -> Iterator[RunEvent]:
        started = time.perf_counter()
        inputs, labels = self._data.validation_tensors(self.settings.n_validation or _N_VALIDATION)
        with self._own_threads():
            found = evaluate(self._module, self._laid_out(inputs), labels)
        if not math.isfinite(found.loss):
            raise _Diverged(self._diverged_message(found.loss, self.settings.learning_rate))
        if self._dense_validation is None:
            self._dense_validation = found
        event = EvalEvent(self._step, found.accuracy, found.loss, self._sparsity())
        self._evaluations.append(event)
        self._eval_seconds += time.perf_counter() - started
        yield event
        if self._measure_latency is not None:
            started = time.perf_counter()
            timed = self._measure_latency(self._module.eval())
            self._eval_seconds += time.perf_counter() - started
            speedup = timed.dense_ms / timed.latency_ms
            measured = LatencyEvent(self._step, timed.latency_ms, timed.spread_ms, timed.dense_ms, speedup)
            self._latencies.append(measured)
            yield measured
        self._n_measured += 1

    def _final_result(self) -> RunResult:
        started = time.perf_counter()
        held_out = self._data.test is not None
        inputs, labels = self._data.test_tensors() if held_out else self._data.validation_tensors()
        with self._own_threads():
            inputs = self._laid_out(inputs)
            dense = evaluate(self._dense, inputs, labels)
            pruned = evaluate(self._module, inputs, labels)
        if not math.isfinite(pruned.loss):
            raise _Diverged(self._diverged_message(pruned.loss, self.settings.learning_rate))
        self._eval_seconds += time.perf_counter() - started
        return dataclasses.replace(
            self._build_result(None),
            dense_accuracy=dense.accuracy,
            accuracy=pruned.accuracy,
            measured_on="test" if held_out else "validation",
            n_evaluated=pruned.n_samples,
        )

    def _build_result(self, failure: str | None) -> RunResult:
        """Copy what there is now; the accuracies are the last ones measured on validation data."""
        module = copy.deepcopy(self._dense)
        module.load_state_dict(self._module.state_dict())
        masks = {
            name: mask.clone(memory_format=torch.contiguous_format) for name, mask in self._held.masks.items()
        }
        achieved = {}
        with torch.no_grad():
            for name, mask in masks.items():
                weight = _weight(module, name)
                # Multiplying by zero leaves negative zeros, which are zeros but not the same bytes.
                weight.masked_fill_(~mask, 0.0)
                achieved[name] = (weight.numel() - int(torch.count_nonzero(weight)), weight.numel())
        dense, last = self._dense_validation, self._evaluations[-1] if self._evaluations else None
        if failure is not None:
            last = next((event for event in reversed(self._evaluations) if event.step <= self._step), None)
        return RunResult(
            module=module.eval(),
            masks=masks,
            asked=dict(self.asked),
            locked=self.locked,
            groups=self.groups,
            achieved=achieved,
            dense_accuracy=dense.accuracy if dense else math.nan,
            accuracy=last.accuracy if last else math.nan,
            measured_on="validation",
            n_evaluated=dense.n_samples if dense else 0,
            stopped=self._step < self.total_steps,
            failure=failure,
            step=self._step,
            total_steps=self.total_steps,
            seconds=self._train_seconds + self._eval_seconds,
            evaluations=tuple(self._evaluations),
            settings=self.settings,
            latencies=tuple(self._latencies),
        )

    def _snapshot(self) -> _GoodState:
        tensors = {name: value.clone() for name, value in self._module.state_dict().items()}
        return _GoodState(self._step, tensors, self._held.masks)

    def _restore(self) -> None:
        self._module.load_state_dict(self._good.tensors)
        self._held.replace(self._good.masks)
        self._held.apply()
        self._step = self._good.step

    def _diverged_message(self, loss: float, learning_rate: float) -> str:
        if self._step == 0:
            return (
                f"The loss is {loss} before the first step, so the model or the data hold values that are not finite. "
                "Check the weights and the inputs for nan and inf."
            )
        return (
            f"The loss became {loss} after {self._step} steps (learning rate {learning_rate:.3g}). "
            f"Lower learning_rate, for instance to {self.settings.learning_rate / 10:.3g}, and run again; "
            f"the weights after {self._good.step} steps, the last good ones, are kept in result."
        )

    def _sparsity(self) -> float:
        return sum(self._held.zeros.values()) / max(1, sum(self._elements.values()))

    def _seconds_left(self) -> float:
        a_step = self._train_seconds / max(1, self._step)
        a_measurement = self._eval_seconds / max(1, self._n_measured)
        # One more for the final evaluation.
        measurements_left = self.n_evaluations - self._n_measured + 1
        return a_step * (self.total_steps - self._step) + a_measurement * measurements_left

    def _laid_out(self, inputs: Tensor) -> Tensor:
        return inputs.contiguous(memory_format=self._memory_format)

    def _autocast(self) -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.settings.precision == "bfloat16")

    @contextmanager
    def _own_threads(self) -> Iterator[None]:
        before = torch.get_num_threads()
        wanted = self.settings.threads or before
        if wanted == before:
            yield
            return
        torch.set_num_threads(wanted)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    @contextmanager
    def _own_randomness(self) -> Iterator[None]:
        outside = torch.get_rng_state()
        torch.set_rng_state(self._random_state)
        try:
            yield
        finally:
            self._random_state = torch.get_rng_state()
            torch.set_rng_state(outside)


def _fastest_precision() -> str:
    """Return bfloat16 where the CPU multiplies it itself; elsewhere it is emulated, and slower than float32."""
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return "bfloat16" if capabilities.get("amx_bf16") or capabilities.get("avx512_bf16") else "float32"


def _with_options(settings: RunSettings, options: Mapping[str, Any]) -> RunSettings:
    known = [field.name for field in dataclasses.fields(RunSettings)]
    unknown = [name for name in options if name not in known]
    if unknown:
        raise RunError(
            f"There is no option {', '.join(map(repr, unknown))} of a pruning run; the options are {', '.join(known)}."
        )
    return dataclasses.replace(settings, **options)


def _checked(distribution: Mapping[str, float], layers: tuple[str, ...]) -> dict[str, float]:
    asked = {name: float(sparsity) for name, sparsity in distribution.items()}
    for name, sparsity in asked.items():
        if name not in layers:
            raise DistributionError(
                f"The distribution names layer {name!r}, which cannot be pruned; layers are {', '.join(layers)}."
            )
        if not 0.0 <= sparsity < 1.0:
            raise DistributionError(
                f"Layer {name!r} has sparsity {sparsity}; give a fraction of at least 0 and below 1."
            )
    return asked


def _weight(module: nn.Module, name: str) -> nn.Parameter:
    weight = module.get_submodule(name).weight
    if not isinstance(weight, nn.Parameter):
        raise RunError(
            f"The weight of layer {name!r} is computed from other parameters; remove its parametrisation before pruning."
        )
    return weight


def _initial_sparsity(weight: Tensor, final: float) -> float:
    """Return the share of zeros that the weights already have, at most `final`: a layer that is sparser lets weights back in."""
    zeros = weight.numel() - int(torch.count_nonzero(weight))
    return min(zeros / weight.numel(), final)
