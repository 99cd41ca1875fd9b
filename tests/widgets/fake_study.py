"""A study without a network: the interface of `explorer.Study` over formulas, so that the state behind the page is tested in milliseconds.

Loss and latency follow simple laws per layer, so the expected numbers of a test can be written down.
"""

from __future__ import annotations

import functools
import json
import math
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

LEVELS = (0.5, 0.7, 0.8, 0.9, 0.95, 0.97, 0.98, 0.99)


@dataclass(frozen=True, slots=True)
class Layer:
    name: str
    kind: str
    weight_shape: tuple[int, ...]
    n_params: int
    macs: int
    dense_ms: float | None = None
    share: float | None = None
    tied: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Point:
    layer: str
    sparsity: float
    kind: str
    value: float
    refreshed: bool = False
    std_error: float | None = None
    n_removed: int | None = None
    low: float | None = None
    high: float | None = None


class Distribution(Mapping[str, float]):
    def __init__(
        self,
        values: Mapping[str, float],
        locked: frozenset[str] = frozenset(),
        groups: tuple[tuple[str, ...], ...] = (),
    ) -> None:
        self._values, self.locked, self.groups = dict(values), locked, groups

    def __getitem__(self, name: str) -> float:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Distribution) and (self._values, self.locked, self.groups) == (
            other._values,
            other.locked,
            other.groups,
        )

    def __hash__(self) -> int:
        return hash((tuple(self._values.items()), self.locked))

    def set(self, name: str, value: float) -> Distribution:
        tied = next((group for group in self.groups if name in group), (name,))
        return Distribution({**self._values, **dict.fromkeys(tied, value)}, self.locked, self.groups)

    def lock(self, *names: str) -> Distribution:
        return Distribution(self._values, self.locked | set(names), self.groups)

    def unlock(self, *names: str) -> Distribution:
        return Distribution(self._values, self.locked - set(names), self.groups)

    def link(self, *names: str) -> Distribution:
        equal = dict.fromkeys(names, self._values[names[0]])
        return Distribution({**self._values, **equal}, self.locked, (*self.groups, names))

    def unlink(self, *names: str) -> Distribution:
        left = tuple(group for group in self.groups if not set(group) & set(names))
        return Distribution(self._values, self.locked, left)


@dataclass(frozen=True)
class StepEvent:
    step: int
    total_steps: int
    phase: str
    loss: float
    learning_rate: float
    sparsity: float
    seconds_left: float


@dataclass(frozen=True)
class EvalEvent:
    step: int
    accuracy: float
    loss: float
    sparsity: float


@dataclass(frozen=True)
class LatencyEvent:
    step: int
    latency_ms: float
    spread_ms: float
    dense_ms: float
    speedup: float


@dataclass(frozen=True)
class MaskEvent:
    step: int
    zeros: Mapping[str, int]
    masks: Mapping[str, Any]


@dataclass(frozen=True)
class DoneEvent:
    result: Any


class WithModule(SimpleNamespace):
    """Attributes, and a network of 1,000 weights, of which the share `zeros` is zero.

    It is made, and torch imported, once somebody asks for it: most pages of the tests never do, and torch takes seconds to import.
    """

    def __init__(self, zeros: float, **attributes: Any) -> None:
        super().__init__(**attributes)
        self._zeros = zeros

    @functools.cached_property
    def module(self) -> Any:
        import torch

        network = torch.nn.Linear(100, 10, bias=False)
        with torch.no_grad():
            network.weight.fill_(1.0).view(-1)[: round(1000 * self._zeros)] = 0.0
        return network


@functools.cache
def _ranks(name: str, shape: tuple[int, ...]) -> Any:
    """Return the place of each weight of a layer by magnitude, smallest first; some outputs are weaker than others."""
    rng = np.random.default_rng(len(name) + math.prod(shape))
    magnitudes = rng.random(shape) * (0.2 + rng.random((shape[0],) + (1,) * (len(shape) - 1)))
    ranks = np.empty(magnitudes.size, int)
    ranks[magnitudes.argsort(axis=None)] = np.arange(magnitudes.size)
    return ranks.reshape(shape)


LAYERS = (
    ("stem.conv", (48, 1, 3, 3), 196),
    ("block1.conv1", (48, 48, 3, 3), 196),
    ("block1.conv2", (48, 48, 3, 3), 196),
    ("block2.conv1", (96, 48, 3, 3), 49),
    ("block2.conv2", (96, 96, 3, 3), 49),
    ("block2.shortcut.conv", (96, 48, 1, 1), 49),
    ("block3.conv1", (192, 96, 3, 3), 16),
    ("block3.conv2", (192, 192, 3, 3), 16),
    ("block3.shortcut.conv", (192, 96, 1, 1), 16),
    ("fc", (10, 192), 1),
)
FIXED_MS = 0.03


@dataclass
class FakeStudy:
    """See `explorer.Study`; `pause_s` slows the long work so that a person or a browser can watch."""

    pause_s: float = 0.0
    steps_per_epoch: int = 20
    threads: int = 1
    batch_size: int = 1
    fail_at: int | None = None
    together: float = 1.3
    """How many times the sum of single layers it costs to prune them all at once."""
    levels: tuple[float, ...] = LEVELS
    table: Any = None
    dense_baseline: Any = None
    model: Any = field(default_factory=lambda: WithModule(0.0, name="fashion-resnet"))
    data: Any = field(default_factory=lambda: SimpleNamespace(name="fashion", train=range(8000)))
    calls: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.layers = tuple(
            Layer(
                name,
                "linear" if name == "fc" else "conv2d",
                shape,
                math.prod(shape),
                math.prod(shape) * pixels,
            )
            for name, shape, pixels in LAYERS
        )

    provenance: str | None = None

    @property
    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        return {f"{layer.name}.weight": layer.weight_shape for layer in self.layers}

    def with_weights(self, path: Path, *, name: str | None = None) -> FakeStudy:
        from explorer.errors import FormatError
        from explorer.formats import read_weights

        found = {key: tuple(tensor.shape) for key, tensor in read_weights(path).items()}
        if found != self.weight_shapes:
            raise FormatError("The file does not belong to this network.")
        model = WithModule(0.0, name=name or self.model.name)
        return FakeStudy(self.pause_s, self.steps_per_epoch, model=model)

    def ms(self, layer: Layer, sparsity: float) -> float:
        dense = layer.macs / 2.4e7
        return dense if sparsity < 0.5 else dense * (1.75 * (1 - sparsity) + 0.06)

    def kl(self, layer: Layer, sparsity: float) -> float:
        place = [entry.name for entry in self.layers].index(layer.name)
        return 2.0 * math.exp(-0.35 * place) * sparsity ** (4 + place)

    def n_sensitivity_cells(self, **_: Any) -> int:
        return 2 * 9 * len(self.layers)

    def sensitivity_points(self, stop: threading.Event | None = None, **_: Any) -> Iterator[Point]:
        points: list[Point] = []
        for kind in ("kl", "latency_ms"):
            for sparsity in (0.0, 0.9, 0.5, 0.98, 0.7, 0.8, 0.95, 0.97, 0.99):
                for layer in self.layers:
                    if stop is not None and stop.is_set():
                        return
                    time.sleep(self.pause_s)
                    value = self.kl(layer, sparsity) if kind == "kl" else self.ms(layer, sparsity)
                    points.append(Point(layer.name, sparsity, kind, value))
                    yield points[-1]
                    if kind == "kl":
                        yield Point(layer.name, sparsity, "accuracy", 0.93 - 0.4 * min(1.0, value))
        total = self.dense_ms
        self.layers = tuple(
            Layer(*(getattr(layer, key) for key in ("name", "kind", "weight_shape", "n_params", "macs")),
                  dense_ms=self.ms(layer, 0.0), share=self.ms(layer, 0.0) / total)
            for layer in self.layers
        )  # fmt: skip
        self.dense_baseline = ("engine, dense", SimpleNamespace(latency_ms=total, spread_ms=0.02))
        self.table = SimpleNamespace(points=tuple(points))

    @property
    def dense_ms(self) -> float:
        return FIXED_MS + sum(self.ms(layer, 0.0) for layer in self.layers)

    def uniform(self, sparsity: float) -> Distribution:
        ends = {self.layers[0].name, self.layers[-1].name}
        return Distribution({layer.name: 0.0 if layer.name in ends else sparsity for layer in self.layers})

    def feasible_speedups(self) -> tuple[float, float]:
        return 1.0, self.dense_ms / (FIXED_MS + sum(self.ms(layer, 0.99) for layer in self.layers))

    def solve(
        self,
        *,
        locked: Mapping[str, float] | None = None,
        groups: Any = (),
        check: bool = True,
        **target: float,
    ) -> Distribution:
        from explorer.errors import InfeasibleTarget

        [(kind, wanted)] = target.items()
        if kind == "speedup" and wanted > self.feasible_speedups()[1]:
            raise InfeasibleTarget(
                f"{wanted:g} × cannot be reached; the highest is {self.feasible_speedups()[1]:.2f} ×."
            )
        self.calls.append(("solve" if check else "turn", wanted if kind == "speedup" else target, locked))
        best = self.uniform(0.0)
        for i in range(100):
            place = {layer.name: (i / 100) * (0.99 - 0.02 * (9 - j)) for j, layer in enumerate(self.layers)}
            tried = Distribution({**place, **(locked or {})})
            told = self.predict(tried)
            if kind == "max_loss":
                if told.kl > wanted:
                    break
                best = tried
                continue
            best = tried
            reached = {"latency_ms": told.latency_ms <= wanted, "size_bytes": told.size_bytes <= wanted}
            reached |= {"speedup": told.speedup >= wanted, "sparsity": told.sparsity >= wanted}
            if reached[kind]:
                break
        return best

    def predict(self, distribution: Mapping[str, float]) -> Any:
        latency = FIXED_MS + sum(self.ms(layer, distribution[layer.name]) for layer in self.layers)
        loss = sum(self.kl(layer, distribution[layer.name]) for layer in self.layers)
        n_params = sum(layer.n_params for layer in self.layers)
        nonzeros = [
            layer.n_params
            - min(layer.n_params - 1, math.ceil(layer.n_params * distribution[layer.name] - 1e-9))
            for layer in self.layers
        ]
        nnz = sum(nonzeros)
        stored = (
            min(math.ceil(layer.n_params / 8) + 4 * n, 4 * layer.n_params)
            for layer, n in zip(self.layers, nonzeros, strict=True)
        )
        return SimpleNamespace(
            kl=loss, loss=loss, accuracy=max(0.0, 0.93 - 0.03 * loss), latency_ms=latency, latency_error_ms=0.05 * latency,
            speedup=self.dense_ms / latency, nnz=nnz, n_params=n_params, sparsity=1 - nnz / n_params,
            size_bytes=sum(stored),
        )  # fmt: skip

    def prediction_tables(self) -> Any:
        levels = [i / 100 for i in range(100)]

        def curves(of: Any) -> list[Any]:
            return [[levels, [of(layer, level) for level in levels]] for layer in self.layers]

        page = {
            "n_params": [layer.n_params for layer in self.layers],
            "curves": {
                "kl": curves(self.kl),
                "accuracy": curves(lambda layer, level: -0.03 * self.kl(layer, level)),
                "latency_ms": curves(self.ms),
            },
            "dense": {"kl": 0.0, "accuracy": 0.93},
            "fixed_ms": FIXED_MS, "scale": 1.0, "baseline_ms": self.dense_ms, "other_bytes": 0,
        }  # fmt: skip
        return SimpleNamespace(to_page=lambda: page)

    def pareto(self, *, locked: Mapping[str, float], groups: Any) -> Any:
        self.calls.append(("pareto", locked, groups))
        found = []
        for i in range(0, 100, 4):
            place = {layer.name: (i / 100) * (0.99 - 0.02 * (9 - j)) for j, layer in enumerate(self.layers)}
            found.append(SimpleNamespace(distribution=Distribution({**place, **locked}, frozenset(locked))))
        return SimpleNamespace(points=tuple(found))

    def trust(
        self, distribution: Mapping[str, float], *, n_images: int, stop: threading.Event | None = None
    ) -> Any:
        self.calls.append(("trust", distribution, n_images))
        time.sleep(20 * self.pause_s)
        if stop is not None and stop.is_set():
            return None
        predicted = self.predict(distribution).loss
        return SimpleNamespace(
            kind="kl", predicted=predicted, measured=self.together * predicted, std_error=0.01,
            verdict="worse" if self.together > 2 else "agrees",
        )  # fmt: skip

    def refine(
        self,
        n_cells: int,
        *,
        n_images: int,
        near: Mapping[str, float] | None = None,
        layers: frozenset[str] | None = None,
        stop: threading.Event | None = None,
    ) -> Iterator[Point]:
        self.calls.append(("refine", near, layers, n_cells))
        chosen = [layer for layer in self.layers if layers is None or layer.name in layers]
        level = 0.93 if layers is None else 0.85
        new = [Point(layer.name, level, "kl", self.kl(layer, level)) for layer in chosen[:n_cells]]
        for point in new:
            if stop is not None and stop.is_set():
                return
            time.sleep(self.pause_s)
            self.table = SimpleNamespace(points=(*self.table.points, point))
            yield point

    def search(
        self,
        *,
        latency_ms: float,
        begin: Distribution,
        n_images: int,
        stop: threading.Event | None = None,
        **options: Any,
    ) -> Iterator[Any]:
        self.calls.append(("search", begin, latency_ms, options))
        name = self.layers[2].name
        better = begin.set(name, round(begin[name] - 0.05, 6))
        for number in range(1, 5):
            if stop is not None and stop.is_set():
                return
            time.sleep(5 * self.pause_s)
            is_better = number > 2
            yield SimpleNamespace(
                distribution=better if is_better else begin, loss=1.8 if is_better else 2.0,
                first_loss=2.0, n_measured=number, n_total=4,
            )  # fmt: skip

    def prune(self, distribution: Distribution, *, epochs: float = 5, **options: Any) -> FakeRun:
        self.calls.append(("prune", distribution, {"epochs": epochs, **options}))
        return FakeRun(self, distribution, epochs, options.get("stabilise", 0.1), options.get("ramp", 0.4))

    def alive(self, name: str, sparsity: float) -> Any:
        shape = next(layer.weight_shape for layer in self.layers if layer.name == name)
        return _ranks(name, shape) >= math.ceil(math.prod(shape) * sparsity - 1e-9)

    def n_groups(self, name: str) -> int:
        return 1

    def stored_bytes(self, zeros: Mapping[str, int]) -> int:
        return sum(
            min(4 * layer.n_params, 4 * (layer.n_params - zeros.get(layer.name, 0)) + layer.n_params // 8)
            for layer in self.layers
        )

    def final_latency(self, result: Any) -> Any:
        ms = self.predict(result.asked).latency_ms
        timed = SimpleNamespace(latency_ms=self.dense_ms, spread_ms=0.02)
        return SimpleNamespace(
            pruned=SimpleNamespace(latency_ms=ms, spread_ms=0.01),
            dense={"engine, dense": timed},
            baseline="engine, dense",
        )

    def save(self, result: Any, folder: Path, *, latency: Any = None) -> None:
        self.calls.append(("save", result, latency))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "model.safetensors").write_bytes(b"\0" * 64)
        (folder / "recipe.yaml").write_text("model: fashion-resnet\n")
        (folder / "result.json").write_text(json.dumps({"pruned": {"accuracy": result.accuracy}}))

    model_source = "fake:fashion-resnet"

    def recipe_of(self, distribution: Distribution, **settings: Any) -> Any:
        from explorer.formats import Recipe
        from explorer.pruning import RunSettings

        held = tuple(name for name in distribution if name in distribution.locked)
        return Recipe(
            self.model_source, "fake:fashion", dict(distribution), held, distribution.groups, settings=RunSettings(**settings)
        )  # fmt: skip

    def adopt(self, recipe: Any) -> None:
        self.calls.append(("adopt", recipe))

    def report(self, path: Path, result: Any = None, **options: Any) -> None:
        self.calls.append(("report", result, options))
        path.write_text(f"<!DOCTYPE html><title>{'a run' if result is not None else 'a plan'}</title>")


class FakeRun:
    def __init__(
        self, study: FakeStudy, distribution: Distribution, epochs: float, stabilise: float, ramp: float
    ) -> None:
        self.study, self.distribution = study, distribution
        self.stabilise, self.ramp = stabilise, ramp
        self.result: Any = None
        self.total = max(1, round(epochs * study.steps_per_epoch))
        self._stop, self._go = threading.Event(), threading.Event()
        self._go.set()

    def pause(self) -> None:
        self._go.clear()

    def resume(self) -> None:
        self._go.set()

    def stop(self) -> None:
        self._stop.set()
        self._go.set()

    def __iter__(self) -> Iterator[Any]:
        from explorer.errors import RunError

        study, final = self.study, self.study.predict(self.distribution)
        yield self.masks(0, 0.0)
        yield EvalEvent(0, 0.931, 0.2, 0.0)
        accuracy, sparsity, step = 0.931, 0.0, 0
        for step in range(1, self.total + 1):
            self._go.wait()
            if self._stop.is_set():
                break
            if study.fail_at == step:
                raise RunError("The loss is not a number any more; lower the learning rate and start again.")
            time.sleep(study.pause_s)
            done = step / self.total
            grown = min(1.0, max(0.0, (done - self.stabilise) / max(1e-9, self.ramp)))
            sparsity = final.sparsity * (1 - (1 - grown) ** 3)
            phase = "stabilise" if done <= self.stabilise else "prune" if grown < 1 else "fine-tune"
            yield StepEvent(
                step,
                self.total,
                phase,
                0.4 + 0.3 * grown * (1 - done),
                0.025 * (1 + math.cos(math.pi * (step - 1) / self.total)),
                sparsity,
                (1 - done) * 10,
            )
            if phase == "prune" and step % max(1, self.total // 50) == 0:
                yield self.masks(step, sparsity / max(1e-9, final.sparsity))
            if step % max(1, self.total // 12) == 0:
                accuracy = 0.931 - 0.06 * grown * max(0.12, 1.4 - 1.4 * done)
                scaled = {
                    name: value * sparsity / max(1e-9, final.sparsity)
                    for name, value in self.distribution.items()
                }
                ms = study.predict(scaled).latency_ms
                yield EvalEvent(step, accuracy, 0.3, sparsity)
                yield LatencyEvent(step, ms, 0.02, study.dense_ms, study.dense_ms / ms)
        yield self.masks(step, sparsity / max(1e-9, final.sparsity))
        stopped = step < self.total or self._stop.is_set()
        achieved = {
            layer.name: (math.ceil(layer.n_params * self.distribution[layer.name]), layer.n_params)
            for layer in study.layers
        }
        yield DoneEvent(
            WithModule(
                0.9, accuracy=accuracy, dense_accuracy=0.931, stopped=stopped, achieved=achieved, sparsity=sparsity,
                measured_on="test", asked=self.distribution, n_evaluated=2000, seconds=3.0,
            )
        )  # fmt: skip

    def masks(self, step: int, share: float) -> MaskEvent:
        """Return the masks at a share of the asked sparsity."""
        study = self.study
        masks = {name: study.alive(name, value * share) for name, value in self.distribution.items()}
        zeros = {name: int(mask.size - np.count_nonzero(mask)) for name, mask in masks.items()}
        return MaskEvent(step, zeros, masks)
