"""One model under study, held together: what the command line, a notebook and the widgets share.

A study knows its model, its data, what has been measured of them, and how latency is measured. It owns no widget, prints nothing and
starts no thread. Everything long is an iterator of points or events. Invariant: every speed-up that leaves it refers to the
fastest dense way to run the network, measured on the same threads and batch.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import operator
import os
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from explorer.data import LoadedData, check_compatible, load_data
from explorer.distribution import (
    DEFAULT_MARGIN,
    ParetoFrontier,
    Prediction,
    PredictionTables,
    SearchStep,
    SparsityDistribution,
    Target,
    Trust,
    baseline_for_target,
    check_same_layers,
    erk,
    global_magnitude,
    inverse_sensitivity,
    lamp,
)
from explorer.distribution import feasible_range as feasible_latencies
from explorer.distribution import pareto as pareto_frontier
from explorer.distribution import predict as predict_distribution
from explorer.distribution import search as search_distribution
from explorer.distribution import solve as solve_distribution
from explorer.distribution import trust as compare_with_joint
from explorer.distribution import uniform as uniform_distribution
from explorer.errors import DataError, DistributionError, FormatError, InfeasibleTarget, ModelError, RunError
from explorer.formats import (
    FinalLatency,
    Recipe,
    ReportContent,
    dense_bytes,
    load_weights,
    packed_bytes,
    result_document,
    save_weights,
    weights_digest,
    write_report,
    write_result,
)
from explorer.masks import magnitude_mask
from explorer.models import LoadedModel, PrunableLayer, load_model
from explorer.pruning import PruningRun, RunResult, RunSettings
from explorer.sensitivity import (
    DEFAULT_LEVELS,
    LATENCY_PASSES,
    WHOLE_NETWORK,
    JointScan,
    SensitivityPoint,
    SensitivityTable,
    measure_joint,
    measure_latency,
    measure_loss,
    published,
    refinement,
)

if TYPE_CHECKING:
    # The engine loads torch.export and llvmlite, which nobody waits for until a latency is asked for.
    from explorer.inference import Benchmark, SparseModule

# Timing noise and the last percent of training: a solved distribution is to be this much faster than asked when it is checked.
_RESERVE = 0.02
# Each round corrects the budget by what was measured so far; more rounds only chase noise.
_CHECKS = 4
# Seconds of timing for one of these checks, and for one point of a run's latency curve.
_GLANCE_S = 0.4
_CHECK_S, _CHECK_ROUNDS = 1.2, 9


def _mobilenet_layer(theirs: str) -> str:
    """The name of a layer of MobileNetV1 here: there ``model.I.0`` are the stem and depthwise convolutions, and ``model.I.3`` pointwise ones."""
    parts = theirs.split(".")
    if parts[0] != "model":
        return theirs
    block, part = int(parts[1]), parts[2]
    return "stem.0" if block == 0 else f"blocks.{block - 1}.{0 if part == '0' else 1}.0"


def _resnet_layer(theirs: str) -> str:
    return theirs.replace("downsample", "shortcut")


# Published table: architecture of `explorer.models.architectures`, and from the table's layer names to its own.
_REPLAYS: dict[str, tuple[str, Callable[[str], str]]] = {
    "resnet50-imagenet": ("resnet50", _resnet_layer),
    "resnet18-imagenet": ("resnet18", _resnet_layer),
    "mobilenet-imagenet": ("mobilenet_v1", _mobilenet_layer),
}


@dataclass(frozen=True, slots=True)
class LatencyBesideDense:
    """Median and interquartile half-range of a pruned network, and the median of the dense baseline timed in turn with it, in ms."""

    latency_ms: float
    spread_ms: float
    dense_ms: float


class Study:
    """A model, its data and everything measured of them.

    Parameters
    ----------
    model : LoadedModel, nn.Module or str
        Loaded, or what `load_model` takes. A plain module takes its example input from the data.
    data : LoadedData, str, (train, validation) or None
        Loaded, or what `load_data` takes. Without data there is latency, but no loss and no pruning run.
    threads : int, optional
        Threads that latencies are measured with, dense and sparse alike; 1 when not given, which is what one request on a busy
        server, or one core of a small device, sees.
    batch_size : int
        Samples an inference, at least 1.

    Raises
    ------
    ModelError, DataError
        If model or data cannot be loaded, or do not belong together.
    RunError
        If `threads` or `batch_size` is below 1.

    Examples
    --------
    >>> study = Study("demo:fashion-resnet", "demo:fashion")
    >>> len(study.layers), study.threads
    (10, 1)
    """

    def __init__(
        self,
        model: LoadedModel | nn.Module | str,
        data: LoadedData | str | Sequence[Any] | None = None,
        *,
        threads: int | None = None,
        batch_size: int = 1,
    ) -> None:
        self.threads = 1 if threads is None else threads
        self.batch_size = batch_size
        for name in ("threads", "batch_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise RunError(f"{name} is {value!r}; give a whole number of at least 1.")
        self.data: LoadedData | None = None if data is None else load_data(data)
        if isinstance(model, nn.Module):
            example = None if self.data is None else self.data.validation_tensors(1)[0]
            self.model = load_model(model, example)
        else:
            self.model = model if isinstance(model, LoadedModel) else load_model(model)
        if self.data is not None:
            check_compatible(self.model, self.data)
        # What a recipe calls them: what loads them again, or the bare name of what was passed as an object.
        self.model_source = self.model.source or self.model.name
        self.data_source = self.data.name if self.data else ""
        # Name and SHA-256 of the file whose weights these are; None when the model came with them.
        self.weights: dict[str, str] | None = None
        self._layers = self.model.layers
        self._table: SensitivityTable | None = None
        self._published: SensitivityTable | None = None
        self._dense: dict[str, Benchmark] | None = None
        self._contestants: dict[str, Callable[[], object]] | None = None
        self._engine: SparseModule | None = None
        # The engine is one object with one set of weights: two threads must not re-pack it at once.
        self._engine_lock = threading.RLock()
        self._targets: dict[SparsityDistribution, dict[str, float]] = {}
        self._final: tuple[RunResult, FinalLatency] | None = None

    @classmethod
    def replay(
        cls, name: str = "resnet50-imagenet", *, threads: int | None = None, batch_size: int = 1
    ) -> Study:
        """Study a network that cannot be trained here: losses that others published, latencies of this machine.

        The network has random weights. Its latency depends on how many weights are zero and where, not on their values; its losses are those of the
        trained network, from `explorer.sensitivity.published`. So distributions can be shaped, solved and predicted, but nothing can be pruned or saved.

        Parameters
        ----------
        name : str
            "resnet50-imagenet", "resnet18-imagenet" or "mobilenet-imagenet".
        threads : int, optional
        batch_size : int

        Raises
        ------
        ModelError
            If there is no such replay.

        Examples
        --------
        >>> study = Study.replay("resnet18-imagenet")
        >>> study.table.metadata["network"], len(study.layers)
        ('ResNet-18, ImageNet', 21)
        """
        from explorer.models import architectures

        if name not in _REPLAYS:
            raise ModelError(f"There is no replay {name!r}; there are {', '.join(_REPLAYS)}.")
        architecture, rename = _REPLAYS[name]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module, example = getattr(architectures, architecture)(), torch.randn(1, 3, 224, 224)
        study = cls(load_model(module, example, name=name), threads=threads, batch_size=batch_size)
        theirs = published(name)
        study._published = SensitivityTable.from_points(
            [dataclasses.replace(point, layer=rename(point.layer)) for point in theirs.points],
            layers=[layer.name for layer in study.layers],
            metadata={
                **theirs.metadata,
                "weights": "random: latencies depend on where zeros are, not on the values of weights",
            },
        )
        study._table = study._published
        return study

    @property
    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """The tensors that a file of weights for this model must hold, by name."""
        return {name: tuple(tensor.shape) for name, tensor in self.model.module.state_dict().items()}

    def with_weights(self, path: str | os.PathLike[str], *, name: str | None = None) -> Study:
        """Return a new study of the same architecture and data, with other weights; this one stays as it is.

        Parameters
        ----------
        path : path
            A safetensors file, such as `save_weights` or `Study.save` writes. Weights that are zero in it stay weights like any others.
        name : str, optional
            What tables and files call the model; default: its name and that of the file.

        Raises
        ------
        FormatError
            If the file cannot be read, is not of this architecture, or holds NaN or infinite values.
        ModelError
            If losses of this study were published by others: they belong to weights that are not here.

        Examples
        --------
        >>> other = study.with_weights("runs/3x/model.safetensors")  # doctest: +SKIP
        """
        if self._published is not None:
            raise ModelError(
                f"The losses of {self.model.name} were published for other people's weights, and say nothing about those in {path}. Make a study of your own network and data."
            )
        module = copy.deepcopy(self.model.module)
        load_weights(module, path)
        called = name or f"{self.model.name}, {Path(path).name}"
        model = dataclasses.replace(self.model, module=module, name=called)
        study = Study(model, self.data, threads=self.threads, batch_size=self.batch_size)
        study.model_source = self.model_source
        study.weights = {"file": Path(path).name, "sha256": weights_digest(path)}
        return study

    @property
    def provenance(self) -> str | None:
        """Where losses come from that were not measured here; None when all were."""
        if self._published is None:
            return None
        return f"Losses of {self._published.metadata['network']}: {self._published.metadata['source']}. Latencies: this machine."

    @property
    def layers(self) -> tuple[PrunableLayer, ...]:
        """The prunable layers in forward order; `dense_ms` and `share` are filled once `dense_latency` was measured."""
        return self._layers

    @property
    def table(self) -> SensitivityTable | None:
        """What has been measured so far; replaced by a larger one as points arrive."""
        return self._table

    @property
    def levels(self) -> tuple[float, ...]:
        """The sparsity levels that are measured unless others are asked for."""
        return DEFAULT_LEVELS

    @property
    def example_input(self) -> Tensor:
        """What latency is measured on: the example input, repeated to `batch_size` samples."""
        example = self.model.example_input
        repeats = -(-self.batch_size // len(example))
        return torch.cat([example] * repeats)[: self.batch_size].contiguous()

    # Latency

    def dense_latency(self) -> dict[str, Benchmark]:
        """Measure every dense way to run the network, in turn, once; later calls return the same.

        Also tells `layers` what share of the dense time each of them takes.

        Returns
        -------
        dict of str to Benchmark
            By name: torch as it is, torch in other forms, and this engine without zeros.

        Raises
        ------
        EngineError
            If the engine cannot capture the network.
        """
        if self._dense is None:
            from explorer.inference import compare_latency

            with self._engine_lock:
                calls = self._dense_calls()
                self._dense = compare_latency(calls, threads=self.threads, batch_size=self.batch_size)
                self._layers = self._timed_layers(calls["engine dense"])
            if self._table is not None:
                self._table = self._table.with_metadata(**self._facts())
        return dict(self._dense)

    @property
    def dense_baseline(self) -> tuple[str, Benchmark] | None:
        """Name and latency of the fastest dense contestant, None before `dense_latency` was measured."""
        if self._dense is None:
            return None
        name = min(self._dense, key=lambda name: self._dense[name].latency_ms if self._dense else 0.0)
        return name, self._dense[name]

    def latency(self, module: nn.Module) -> LatencyBesideDense:
        """Measure a network that differs from the model in its weights only, on the sparse engine, in turn with the dense baseline.

        Parameters
        ----------
        module : nn.Module
            In evaluation mode; it is not changed.

        Raises
        ------
        EngineError
            If the engine cannot capture the network.
        """
        [(pruned, dense)] = self._beside_dense(module, seconds=_GLANCE_S)
        return LatencyBesideDense(pruned.latency_ms, pruned.spread_ms, dense.latency_ms)

    def pruned_latency(self, distribution: Mapping[str, float]) -> LatencyBesideDense:
        """Measure what a distribution gives, before any training.

        A copy is pruned by magnitude. Training moves zeros about but keeps their number in each layer, on which the time depends.

        Parameters
        ----------
        distribution : mapping of str to float
            Sparsity by layer.

        Raises
        ------
        EngineError
            If the engine cannot capture the network.
        """
        return self.latency(self._pruned_copy(distribution))

    def alive(self, name: str, sparsity: float) -> Tensor:
        """Return which weights of a layer magnitude pruning keeps, bool, shaped like the weight; nothing is changed.

        Parameters
        ----------
        name : str
            Dotted name of a prunable layer.
        sparsity : float
            Fraction in [0, 1).

        Raises
        ------
        DistributionError
            If there is no such layer, or the sparsity is out of range.
        """
        self._need_layer(name)
        weight = self.model.module.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        return magnitude_mask(weight, sparsity)

    def n_groups(self, name: str) -> int:
        """Return into how many groups a layer's inputs are split; 1 unless it is a grouped or depthwise convolution.

        Raises
        ------
        DistributionError
            If there is no such layer.
        """
        self._need_layer(name)
        return int(getattr(self.model.module.get_submodule(name), "groups", 1))

    def stored_bytes(self, zeros: Mapping[str, int]) -> int:
        """Return the bytes of the network when layers have so many zeros and zeros are left out, see `explorer.formats.packed_bytes`.

        Parameters
        ----------
        zeros : mapping of str to int
            Zeros of a layer's weight, by name; what is not named is counted in the network as it came.
        """
        return packed_bytes(self.model.module, zeros)

    def _need_layer(self, name: str) -> None:
        names = [layer.name for layer in self.layers]
        if name not in names:
            raise DistributionError(f"There is no layer {name!r}; layers are {', '.join(names)}.")

    def _pruned_copy(self, distribution: Mapping[str, float]) -> nn.Module:
        pruned = copy.deepcopy(self.model.module)
        with torch.no_grad():
            for name, sparsity in distribution.items():
                weight = pruned.get_submodule(name).weight
                assert isinstance(weight, Tensor)
                weight.masked_fill_(~magnitude_mask(weight, sparsity), 0.0)
        return pruned

    def _beside_dense(
        self, module: nn.Module, seconds: float, rounds: int = 1
    ) -> list[tuple[Benchmark, Benchmark]]:
        """Time `module` on the sparse engine and the dense baseline in turn: what slows one down slows the other."""
        from explorer.inference import EngineCall, compare_latency

        self.dense_latency()
        assert self.dense_baseline is not None
        with self._engine_lock:
            calls: dict[str, Callable[[], object]] = {
                "pruned": EngineCall(self._packed(module), self.example_input),
                "dense": self._dense_calls()[self.dense_baseline[0]],
            }
            timed = [
                compare_latency(
                    calls, threads=self.threads, batch_size=self.batch_size, seconds=seconds / rounds
                )
                for _ in range(rounds)
            ]
        return [(one["pruned"], one["dense"]) for one in timed]

    def _reached(self, distribution: Mapping[str, float]) -> float:
        """Return the speed-up that a distribution gives, see `pruned_latency`."""
        # A ratio of short rounds, in each of which the machine hardly changes its speed, and of these the median.
        rounds = self._beside_dense(self._pruned_copy(distribution), seconds=_CHECK_S, rounds=_CHECK_ROUNDS)
        return median(dense.latency_ms / pruned.latency_ms for pruned, dense in rounds)

    def final_latency(self, result: RunResult) -> FinalLatency:
        """Time a result and every dense contestant in turn, in one run; measured once for a result.

        Raises
        ------
        EngineError
            If the engine cannot capture the network.
        """
        if self._final is None or self._final[0] is not result:
            from explorer.inference import EngineCall, compare_latency

            with self._engine_lock:
                pruned = EngineCall(self._packed(result.module), self.example_input)
                timed = compare_latency(
                    {"engine sparse": pruned, **self._dense_calls()},
                    threads=self.threads,
                    batch_size=self.batch_size,
                    repeats=60,
                    seconds=3.0,
                )
            self._final = (result, FinalLatency(timed.pop("engine sparse"), timed))
        return self._final[1]

    def _dense_calls(self) -> dict[str, Callable[[], object]]:
        if self._contestants is None:
            from explorer.inference import dense_contestants

            self._contestants = dense_contestants(self.model.module, self.example_input, self.threads)
        return self._contestants

    def _timed_layers(self, dense: Callable[[], object]) -> tuple[PrunableLayer, ...]:
        """Return the layers with their time inside this engine's dense run, and its share of that run."""
        from explorer.inference import EngineCall

        assert isinstance(dense, EngineCall)
        steps = dense.engine.profile(self.example_input)
        whole = sum(step.ms for step in steps)
        layers = []
        for layer in self._layers:
            names = (layer.name or "model", *layer.tied)
            ms = sum(step.ms for step in steps if step.name in names)
            layers.append(dataclasses.replace(layer, dense_ms=ms, share=ms / whole))
        return tuple(layers)

    def _packed(self, module: nn.Module) -> SparseModule:
        """Return the engine with the weights of `module`; the graph is captured once."""
        if self._engine is None:
            from explorer.inference import compile as compile_module

            self._engine = compile_module(module, self.example_input, threads=self.threads)
        else:
            self._engine.update_weights(module)
        return self._engine

    # Sensitivity

    def sensitivity_points(
        self,
        levels: Sequence[float] | None = None,
        n_images: int = 500,
        stop: threading.Event | None = None,
        *,
        refresh_batchnorm: bool = True,
        latency: bool = True,
        kinds: Iterable[str] | None = None,
        executor: Executor | None = None,
        resume: bool = True,
    ) -> Iterator[SensitivityPoint]:
        """Measure loss and latency layer by layer and yield each point as it is measured; `table` grows meanwhile.

        The first level of the loss comes first, because it makes a useful picture within seconds; then a level of latency and one
        of loss take turns, so that both curves grow.

        Parameters
        ----------
        levels : sequence of float, optional
            Sparsities in (0, 1); `levels` when not given. The dense network is always measured.
        n_images : int
            Validation images for the loss.
        stop : threading.Event, optional
            Ends the measurement early when set; what was measured stays in `table`.
        refresh_batchnorm : bool
            Measure also with batch norm statistics estimated anew, which about doubles the time.
        latency : bool
            Measure latency as well as loss.
        kinds : iterable of str, optional
            Of losses, see `explorer.sensitivity.measure_loss`.
        executor : concurrent.futures.Executor, optional
            Its workers measure losses, see `explorer.sensitivity.measure_loss`; latencies are then measured afterwards, here, when the workers are at rest.

        resume : bool
            Take from disk what an earlier measurement of the same network, on the same images and machine, has given.

        Raises
        ------
        DataError
            If the study has no data, and is no replay.
        """
        chosen = tuple(levels) if levels is not None else self.levels
        if self._published is not None:
            by_level = sorted(self._published.points, key=operator.attrgetter("sparsity"))
            return self._collected(
                iter(by_level), chosen, stop, n_images=None, latency=latency, resume=resume
            )
        loss = measure_loss(
            self.model.module,
            self._need_data(),
            layers=self.model.layers,
            levels=chosen,
            n_images=n_images,
            refresh_batchnorm=refresh_batchnorm,
            kinds=kinds,
            resume=resume,
            executor=executor,
            stop=stop,
        )
        if executor is not None:
            alone = self._collected(loss, chosen, stop, n_images=n_images, latency=False)
            times = self._collected(iter(()), chosen, stop, n_images=n_images, latency=latency, resume=resume)
            return itertools.chain(alone, times)
        return self._collected(loss, chosen, stop, n_images=n_images, latency=latency, resume=resume)

    def n_sensitivity_cells(
        self,
        levels: Sequence[float] | None = None,
        *,
        refresh_batchnorm: bool = True,
        latency: bool = True,
    ) -> int:
        """Return how many cells and layer times `sensitivity_points` will yield: what `explorer.sensitivity.CellCounter` counts."""
        names = [layer.name for layer in self.layers]
        has_batchnorm = any(isinstance(part, _BatchNorm) for part in self.model.module.modules())
        n_levels = 1 + len(set(levels if levels is not None else self.levels))
        if self._published is not None:
            losses = len({(p.layer, p.sparsity) for p in self._published.points})
        else:
            losses = n_levels * len(names) * (1 + (refresh_batchnorm and has_batchnorm))
        # The whole network is timed too, unless it is its only layer.
        times = (len(names) + (names != [WHOLE_NETWORK])) * LATENCY_PASSES if latency else 0
        return losses + n_levels * times

    def measure_sensitivity(
        self,
        levels: Sequence[float] | None = None,
        n_images: int = 500,
        *,
        refresh_batchnorm: bool = True,
        latency: bool = True,
        kinds: Iterable[str] | None = None,
        executor: Executor | None = None,
        resume: bool = True,
    ) -> SensitivityTable:
        """Measure all points and return the table; see `sensitivity_points`."""
        for _ in self.sensitivity_points(
            levels,
            n_images,
            refresh_batchnorm=refresh_batchnorm,
            latency=latency,
            kinds=kinds,
            executor=executor,
            resume=resume,
        ):
            pass
        return self._need_table()

    def refine(
        self,
        n_cells: int,
        *,
        near: Mapping[str, float] | None = None,
        layers: Collection[str] | None = None,
        between: tuple[float, float] = (0.0, 1.0),
        n_images: int = 500,
        stop: threading.Event | None = None,
        executor: Executor | None = None,
    ) -> Iterator[SensitivityPoint]:
        """Measure losses where that tells most about the curves, and yield each point; `table` grows meanwhile.

        Parameters
        ----------
        n_cells : int
            How many pairs of layer and level, at most; fewer when no more would tell anything.
        near : mapping of str to float, optional
            A distribution, around which curves are to be known best.
        layers : collection of str, optional
            Only these.
        between : (float, float)
            Only sparsities in this range.
        n_images : int
            As for the scan: with the same number, the same images.
        stop : threading.Event, optional
        executor : concurrent.futures.Executor, optional

        Raises
        ------
        DataError
            If the study has no data.
        DistributionError
            If no divergence has been measured, or a layer is unknown.
        """
        data, table = self._need_data(), self._need_table()
        cells = refinement(table, n_cells, near=near, layers=layers, between=between)
        if not cells:
            return iter(())
        loss = measure_loss(
            self.model.module,
            data,
            cells=cells,
            n_images=n_images,
            refresh_batchnorm=False,
            resume=True,
            executor=executor,
            stop=stop,
        )
        return self._collected(loss, (), stop, n_images=n_images, latency=False)

    def trust(
        self,
        distribution: Mapping[str, float],
        *,
        n_images: int = 500,
        stop: threading.Event | None = None,
    ) -> Trust | None:
        """Prune all layers of a copy at once and compare the outcome with what the curves of single layers add up to.

        Takes about as long as one cell of the scan, on the same images.

        Parameters
        ----------
        distribution : mapping of str to float
        n_images : int
            As for the scan.
        stop : threading.Event, optional
            When set, the measurement ends early and gives None.

        Raises
        ------
        DataError
            If the study has no data.
        DistributionError
            If the sensitivity has not been measured.
        """
        table, predicted = self._need_table(), self.predict(distribution)
        joint = measure_joint(
            self.model.module, self._need_data(), distribution, n_images=n_images, stop=stop
        )
        return None if joint is None else compare_with_joint(predicted, joint, table.baseline("loss"))

    def _collected(
        self,
        loss: Iterator[SensitivityPoint],
        levels: tuple[float, ...],
        stop: threading.Event | None,
        *,
        n_images: int | None,
        latency: bool,
        resume: bool = True,
    ) -> Iterator[SensitivityPoint]:
        pending: list[SensitivityPoint] = []

        def taken(points: Iterable[SensitivityPoint]) -> Iterator[SensitivityPoint]:
            try:
                for point in points:
                    pending.append(point)
                    yield point
            finally:
                self._take(pending, n_images)
                pending.clear()

        loss_levels = itertools.groupby(loss, key=lambda point: point.sparsity)
        # Level 0, then the coarse level of all layers.
        for _, points in itertools.islice(loss_levels, 2):
            yield from taken(points)
        if latency and not (stop and stop.is_set()):
            self.dense_latency()
            times = measure_latency(
                self.model.module,
                self.example_input,
                layers=self.model.layers,
                levels=levels,
                threads=self.threads,
                resume=resume,
                stop=stop,
            )
            for _, points in itertools.groupby(times, key=lambda point: point.sparsity):
                yield from taken(points)
                for _, loss_points in itertools.islice(loss_levels, 1):
                    yield from taken(loss_points)
        for _, points in loss_levels:
            yield from taken(points)

    def _take(self, points: list[SensitivityPoint], n_images: int | None) -> None:
        names = [layer.name for layer in self.model.layers]
        old = self._table or SensitivityTable.from_points([], layers=names)
        self._table = old.with_points(points)
        images = {} if n_images is None else {"n_images": n_images}
        self._table = self._table.with_metadata(**images, **self._facts())

    def _facts(self) -> dict[str, Any]:
        facts: dict[str, Any] = {
            "model": self.model.name,
            "threads": self.threads,
            "batch_size": self.batch_size,
        }
        if self.dense_baseline is not None:
            name, timed = self.dense_baseline
            # The table and the dense contestants were timed minutes apart, and machines change their speed. The engine's dense run
            # is in both: the baseline is counted in its units, so that predicted speed-ups are ratios of one moment.
            whole = self._table.baseline("latency_ms") if self._table is not None else None
            drift = whole / self.dense_latency()["engine dense"].latency_ms if whole else 1.0
            facts |= {"baseline": name, "baseline_latency_ms": timed.latency_ms * drift}
        return facts

    # Distributions

    def uniform(self, sparsity: float, *, dense_first_last: bool = True) -> SparsityDistribution:
        """Return the same sparsity for every layer, by default but for the first and the last, which stay dense."""
        return uniform_distribution(self.model.layers, sparsity, dense_first_last=dense_first_last)

    def solve(
        self,
        *,
        speedup: float | None = None,
        latency_ms: float | None = None,
        sparsity: float | None = None,
        params: int | None = None,
        size_bytes: int | None = None,
        max_loss: float | None = None,
        locked: Mapping[str, float] | None = None,
        score: str | None = None,
        check: bool = True,
        **options: Any,
    ) -> SparsityDistribution:
        """Find the distribution that reaches a target at the least expected loss.

        Parameters
        ----------
        speedup, latency_ms, sparsity, params, size_bytes, max_loss : float
            Exactly one: times faster than the fastest dense contestant, median milliseconds, fraction of zeros over all
            prunable weights, how many of them remain, bytes on disc, or predicted one-shot divergence in nats, within which the fastest is found.
        locked : mapping of str to float, optional
            Sparsities that are fixed.
        score : str, optional
            What is minimised, see `explorer.distribution.solve`; by default what its tables suggest: divergences where they were measured, else losses.
        check : bool
            Measure what was solved for a speed-up or a latency on the engine, and solve again with a corrected budget where it is
            slower than asked, or pruned more than that needs.
        **options
            Further options of `explorer.distribution.solve`.

        Raises
        ------
        DistributionError
            If the sensitivity has not been measured, or not exactly one target is given.
        InfeasibleTarget
            If no distribution reaches the target.
        """
        target = Target(
            speedup=speedup,
            latency_ms=latency_ms,
            sparsity=sparsity,
            params=params,
            size_bytes=size_bytes,
            max_loss=max_loss,
        )
        table = self._need_table()
        options |= self._scored(score)
        options.setdefault("other_params", self._other_params())

        def solved(wanted: Target) -> SparsityDistribution:
            return solve_distribution(self.model.layers, table, wanted, locked=locked, **options)

        found = solved(target)
        if target.is_time and check:
            found = self._checked(found, speedup, latency_ms, solved)
        self._targets[found] = {target.name: target.value}
        return found

    def search(
        self,
        *,
        speedup: float | None = None,
        latency_ms: float | None = None,
        sparsity: float | None = None,
        params: int | None = None,
        size_bytes: int | None = None,
        n_total: int = 250,
        n_images: int = 500,
        begin: SparsityDistribution | None = None,
        score: str | None = None,
        check: bool = True,
        seed: int = 0,
        stop: threading.Event | None = None,
        **options: Any,
    ) -> Iterator[SearchStep]:
        """Improve on `solve` for a network that will not be trained, by measuring whole pruned ones, and yield a step for each; see `explorer.distribution.search`.

        Networks are judged by their divergence from the dense one, with BatchNorm statistics refreshed, nothing being trained.

        Parameters
        ----------
        speedup, latency_ms, sparsity, params, size_bytes : float
            Exactly one, as for `solve`.
        n_total : int
            Distributions to measure.
        n_images : int
            As for the scan.
        begin : SparsityDistribution, optional
            What was solved for the target: for a speed-up or a latency, what it is predicted to take is the budget.
        score : str, optional
            As for `solve`.
        check : bool
            Without `begin`, measure what is solved for a speed-up or a latency on the engine first, and search within the corrected budget.
        seed : int
        stop : threading.Event, optional
            When set, the search ends early; the last step holds.
        **options
            `locked`, `bounds`, `groups`, `max_sparsity` and `dense_first_last`, as for `explorer.distribution.search`.

        Raises
        ------
        DataError
            If the study has no data.
        DistributionError, InfeasibleTarget
            As `solve`.
        """
        target = Target(
            speedup=speedup,
            latency_ms=latency_ms,
            sparsity=sparsity,
            params=params,
            size_bytes=size_bytes,
        )
        table, data = self._need_table(), self._need_data()
        asked = {target.name: target.value}
        known = begin
        if target.is_time and check and known is None:
            known = self.solve(speedup=speedup, latency_ms=latency_ms, score=score, **options)
        options |= self._scored(score)
        if target.is_time and known is not None:
            found = self.predict(known).latency_ms
            assert found is not None, "solved for a time"
            target, options["margin"] = Target(latency_ms=found * (1.0 + 1e-9)), 0.0
        judge = JointScan(
            self.model.module,
            data,
            self.model.layers,
            n_images=n_images,
            refresh_batchnorm=True,
            stop=stop,
        )

        def divergence(distribution: SparsityDistribution) -> float | None:
            joint = judge.measure(distribution)
            return None if joint is None else joint.values["kl"]

        steps = search_distribution(
            self.model.layers,
            table,
            target,
            divergence,
            n_total=n_total,
            begin=begin,
            other_params=self._other_params(),
            seed=seed,
            stop=stop,
            **options,
        )
        return self._remembered(steps, asked)

    def _scored(self, score: str | None) -> dict[str, str]:
        """Return the option that names a score: the given one, or what suits a table without divergences; else none."""
        kinds = self._need_table().kinds
        if score is None and "kl" not in kinds and "loss" in kinds:
            score = "mix_loss_sqrt"
        return {} if score is None else {"score": score}

    def _remembered(self, steps: Iterator[SearchStep], asked: dict[str, float]) -> Iterator[SearchStep]:
        """Pass steps on, and remember what their distributions were found for: recipes say it."""
        for step in steps:
            self._targets[step.distribution] = asked
            yield step

    def _other_params(self) -> int:
        """Values outside prunable weights, of four bytes each."""
        prunable = 4 * sum(layer.n_params for layer in self.model.layers)
        return (dense_bytes(self.model.module) - prunable) // 4

    def baseline(
        self,
        name: str,
        *,
        speedup: float | None = None,
        latency_ms: float | None = None,
        sparsity: float | None = None,
        size_bytes: int | None = None,
        check: bool = False,
        **options: Any,
    ) -> SparsityDistribution:
        """Return a distribution from the literature: the least sparse of its kind that is predicted to reach a target.

        Parameters
        ----------
        name : {"uniform", "erk", "lamp", "global", "inverse"}
            See `explorer.distribution.baselines`.
        speedup, latency_ms, sparsity, size_bytes : float
            Exactly one, as for `solve`.
        check : bool
            Measure what was found for a speed-up or a latency on the engine, and correct it, as `solve` does.
        **options
            `locked` and `dense_first_last`, as for `solve`; uniform takes the latter alone.

        Raises
        ------
        DistributionError
            If the name is unknown, not exactly one target is given, or what is needed has not been measured.
        InfeasibleTarget
            If no distribution of this kind reaches the target.
        """
        layers, module = self.model.layers, self.model.module
        families: dict[str, Callable[[float], SparsityDistribution]] = {
            "uniform": lambda s: uniform_distribution(layers, s, **options),
            "erk": lambda s: erk(layers, s, **options),
            "lamp": lambda s: lamp(module, layers, s, **options),
            "global": lambda s: global_magnitude(module, layers, s, **options),
            "inverse": lambda s: inverse_sensitivity(
                layers,
                self._need_table(),
                s,
                kind="kl" if "kl" in self._need_table().kinds else "loss",
                **options,
            ),
        }
        if name not in families:
            raise DistributionError(f"There is no baseline {name!r}; there are {', '.join(families)}.")
        target = Target(speedup=speedup, latency_ms=latency_ms, sparsity=sparsity, size_bytes=size_bytes)
        if sparsity is not None and name != "uniform":
            return families[name](sparsity)
        table = self._table or SensitivityTable.from_points([])

        def found_for(wanted: Target) -> SparsityDistribution:
            return baseline_for_target(
                families[name], layers, table, wanted, other_params=self._other_params()
            )

        found = found_for(target)
        return self._checked(found, speedup, latency_ms, found_for) if target.is_time and check else found

    def pareto(self, **options: Any) -> ParetoFrontier:
        """Return all worthwhile distributions between the slowest and the fastest, see `explorer.distribution.pareto`.

        Raises
        ------
        DistributionError
            If the sensitivity has not been measured.
        """
        options |= self._scored(options.pop("score", None))
        return pareto_frontier(self.model.layers, self._need_table(), **options)

    def _checked(
        self,
        found: SparsityDistribution,
        speedup: float | None,
        latency_ms: float | None,
        solved: Callable[[Target], SparsityDistribution],
    ) -> SparsityDistribution:
        self.dense_latency()
        assert self.dense_baseline is not None
        dense_ms = self.dense_baseline[1].latency_ms
        wanted = speedup if speedup is not None else dense_ms / (latency_ms or dense_ms)
        least, most = wanted * (1.0 + _RESERVE), wanted * (1.0 + 3.0 * _RESERVE)
        tried: list[tuple[float, SparsityDistribution]] = []
        factors: list[float] = []
        factor = 1.0
        for _ in range(_CHECKS):
            predicted = self.predict(found).speedup
            assert predicted is not None
            tried.append((predicted, found))
            # One measurement is as noisy as what it is to correct. Distributions near one another are mispredicted by about the same
            # factor, so that all measurements tell of it together.
            factors.append(self._reached(found) / predicted)
            factor = math.exp(sum(map(math.log, factors)) / len(factors))
            if least <= predicted * factor <= most:
                break
            try:
                found = solved(Target(speedup=(least + most) / 2.0 / factor))
            except InfeasibleTarget:
                # The last one is the nearest there is; what it reaches is measured again at the end, and reported as measured.
                break
        by_speedup = operator.itemgetter(0)
        enough = [pair for pair in tried if pair[0] * factor >= least]
        return min(enough, key=by_speedup)[1] if enough else max(tried, key=by_speedup)[1]

    def predict(self, distribution: Mapping[str, float]) -> Prediction:
        """Return what is to be expected of `distribution`: loss, accuracy, latency, speed-up and size, with their errors.

        Raises
        ------
        DistributionError
            If the sensitivity has not been measured.
        """
        known = (
            distribution
            if isinstance(distribution, SparsityDistribution)
            else SparsityDistribution(distribution)
        )
        return predict_distribution(
            self.model.layers, self._need_table(), known, other_params=self._other_params()
        )

    def prediction_tables(self) -> PredictionTables:
        """Return what `predict` reads as plain numbers, to predict elsewhere.

        Raises
        ------
        DistributionError
            If the sensitivity has not been measured.
        """
        return PredictionTables.of(self.model.layers, self._need_table(), other_params=self._other_params())

    def feasible_speedups(self) -> tuple[float, float]:
        """Return the smallest and the largest predicted speed-up that `solve` can reach.

        Raises
        ------
        DistributionError
            If the latency has not been measured.
        """
        table = self._need_table()
        dense_ms = table.baseline_latency_ms
        if dense_ms is None:
            raise DistributionError("The latency has not been measured; run measure_sensitivity() first.")
        fastest, slowest = feasible_latencies(self.model.layers, table)
        # `solve` keeps this distance from its target.
        return dense_ms / slowest / (1.0 + DEFAULT_MARGIN), dense_ms / fastest / (1.0 + DEFAULT_MARGIN)

    # Pruning

    def prune(
        self,
        distribution: Mapping[str, float],
        method: str = "gmp",
        epochs: float = 5,
        *,
        latency: bool = True,
        **options: Any,
    ) -> PruningRun:
        """Return a run that prunes a copy of the model to `distribution`; iterate it, or call its `finish`.

        Parameters
        ----------
        distribution : mapping of str to float
            Final sparsity by layer.
        method : str
            Pruning method.
        epochs : float
            Passes over the training data.
        latency : bool
            Measure the latency of the pruned network at each evaluation.
        **options
            Further fields of `explorer.pruning.RunSettings`.

        Raises
        ------
        DataError
            If the study has no data.
        RunError, DistributionError
            If the run cannot start.
        """
        data = self._need_data()
        run = PruningRun(
            self.model,
            data,
            distribution,
            measure_latency=self.latency if latency else None,
            method=method,
            epochs=epochs,
            **options,
        )
        run.study = self
        return run

    def adopt(self, recipe: Recipe) -> SparsityDistribution:
        """Return the distribution of a recipe for this study's model, and remember the target that it was solved for.

        Raises
        ------
        DistributionError
            If the recipe names a layer that the model does not have.
        """
        names = [layer.name for layer in self.model.layers]
        unknown = [name for name in recipe.distribution if name not in names]
        if unknown:
            raise DistributionError(
                f"The recipe does not fit {self.model.name!r}: it names {', '.join(unknown)}, and the layers are "
                f"{', '.join(names)}. Use a recipe of this model."
            )
        distribution = SparsityDistribution(dict(recipe.distribution), recipe.locked, recipe.groups)
        if recipe.target is not None:
            self._targets[distribution] = dict(recipe.target)
        return distribution

    def recipe(self, result: RunResult) -> Recipe:
        """Return the recipe that makes `result` again."""
        return self._recipe(_asked(result), result.settings)

    def recipe_of(self, distribution: Mapping[str, float], **settings: Any) -> Recipe:
        """Return the recipe of a run that has not been made.

        Parameters
        ----------
        distribution : mapping of str to float
            Sparsity by layer.
        **settings
            Fields of `explorer.pruning.RunSettings`, as `prune` takes them.

        Raises
        ------
        RunError
            If a setting is out of its range.
        """
        known = (
            distribution
            if isinstance(distribution, SparsityDistribution)
            else SparsityDistribution(distribution)
        )
        return self._recipe(known, RunSettings(**settings))

    def _recipe(self, distribution: SparsityDistribution, settings: RunSettings) -> Recipe:
        return Recipe(
            model=self.model_source,
            data=self.data_source,
            distribution=dict(distribution),
            locked=tuple(name for name in distribution if name in distribution.locked),
            groups=distribution.groups,
            target=self._targets.get(distribution),
            settings=settings,
            threads=self.threads,
            batch_size=self.batch_size,
            weights=self.weights,
        )

    def save(
        self,
        result: RunResult,
        folder: str | os.PathLike[str],
        *,
        overwrite: bool = False,
        seconds: Mapping[str, float] | None = None,
        latency: FinalLatency | None = None,
    ) -> dict[str, Any]:
        """Write `model.safetensors`, `recipe.yaml` and `result.json` to `folder` and return the content of the last.

        The latency is measured for this, beside the dense contestants, unless it is given or `final_latency` has measured it just before.

        Parameters
        ----------
        result : RunResult
        folder : path
            Made when it does not exist.
        overwrite : bool
            Write even if there is something in the folder.
        seconds : mapping of str to float, optional
            What other parts of the work took, for the record.
        latency : FinalLatency, optional
            What `final_latency` told of this result earlier, before it was asked about another one.

        Raises
        ------
        FormatError
            If the folder is not empty, or cannot be written to.
        """
        target = prepared_folder(folder, overwrite=overwrite)
        recipe = self.recipe(result)
        latency = latency or self.final_latency(result)
        predicted = None
        if self._table is not None and set(result.asked) == {layer.name for layer in self.model.layers}:
            predicted = dataclasses.asdict(self.predict(SparsityDistribution(result.asked)))
        metadata = {"format": "sparsity-explorer", "model": self.model_source}
        file_bytes = save_weights(result.module, target / "model.safetensors", metadata)
        recipe.save(target / "recipe.yaml")
        document = result_document(
            result,
            latency=latency,
            dense_bytes=dense_bytes(self.model.module),
            pruned_bytes=packed_bytes(result.module),
            file_bytes=file_bytes,
            target=recipe.target,
            predicted=predicted,
            seconds=seconds,
        )
        write_result(document, target / "result.json")
        return document

    def report(
        self,
        path: str | os.PathLike[str],
        result: RunResult | None = None,
        *,
        distribution: Mapping[str, float] | None = None,
        latency: FinalLatency | None = None,
        **settings: Any,
    ) -> None:
        """Write a report as one HTML file that opens without a kernel, a script or a network.

        It tells what has been measured so far and measures nothing itself: what is missing is said to be.

        Parameters
        ----------
        path : path
        result : RunResult, optional
            A run to report, with its distribution.
        distribution : mapping of str to float, optional
            Without a result: how sparse each layer shall be.
        latency : FinalLatency, optional
            What `final_latency` told of the result, before it was asked about another one; by default what it told last, if that was of this result.
        **settings
            Without a result: fields of `explorer.pruning.RunSettings` for the recipe in the report.

        Raises
        ------
        FormatError
            If the file cannot be written.
        DistributionError
            If `distribution` is not of this model.
        """
        chosen = None
        if result is not None:
            chosen = _asked(result)
        elif distribution is not None:
            chosen = (
                distribution
                if isinstance(distribution, SparsityDistribution)
                else SparsityDistribution(distribution)
            )
            check_same_layers(chosen, self.model.layers)
        is_told = (
            self._table is not None
            and chosen is not None
            and set(chosen) == {layer.name for layer in self.model.layers}
        )
        recipe = None
        if result is not None:
            recipe = self.recipe(result)
        elif chosen is not None:
            recipe = self.recipe_of(chosen, **settings)
        # A report of an earlier result must not be given the later one's time.
        if latency is None and self._final is not None and self._final[0] is result:
            latency = self._final[1]
        write_report(
            ReportContent(
                model=self.model_source,
                data=self.data_source,
                layers=self.layers,
                threads=self.threads,
                batch_size=self.batch_size,
                dense_bytes=dense_bytes(self.model.module),
                table=self._table,
                dense=self._dense or {},
                distribution=chosen,
                prediction=self.predict(chosen) if is_told and chosen is not None else None,
                recipe=recipe,
                result=result,
                latency=latency,
                pruned_bytes=packed_bytes(result.module) if result is not None else None,
                provenance=self.provenance,
            ),
            path,
        )

    def _need_data(self) -> LoadedData:
        if self.data is None:
            raise DataError(
                "This study has no data; make it with Study(model, data) to measure loss or to prune."
            )
        return self.data

    def _need_table(self) -> SensitivityTable:
        if self._table is None:
            raise DistributionError("The sensitivity has not been measured; run measure_sensitivity() first.")
        return self._table


def _asked(result: RunResult) -> SparsityDistribution:
    return SparsityDistribution(result.asked, result.locked, result.groups)


def prepared_folder(folder: str | os.PathLike[str], *, overwrite: bool) -> Path:
    """Make `folder` and refuse one that holds something, unless it may be overwritten.

    Raises
    ------
    FormatError
        If the folder is not empty, is a file, or cannot be made.
    """
    target = Path(folder)
    try:
        target.mkdir(parents=True, exist_ok=True)
        if not overwrite and any(target.iterdir()):
            raise FormatError(f"{target} is not empty; choose another folder, or ask to overwrite it.")
    except OSError as error:
        raise FormatError(
            f"Cannot use {target} as a folder: {error.strerror or error}. Choose another one."
        ) from error
    return target
