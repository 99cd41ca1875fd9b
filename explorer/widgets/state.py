"""The one state behind the page: what is under study, how sparse it shall be, what is running, what came out.

It is not a widget. Widgets observe its traits and call its methods; the study underneath takes plain values and knows neither.
Everything here runs in the main thread; what takes longer than a blink is given to the `JobRunner`, whose news come back through the
`Publisher`. Invariant: a trait is only ever given a new value, never changed in place, so that an observer sees each change.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import itertools
import math
import tempfile
import time
import traceback
import uuid
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import traitlets as t

from explorer.errors import DistributionError, ExplorerError, InfeasibleTarget, RunError
from explorer.history import History
from explorer.widgets import documents
from explorer.widgets.choices import Choice, open_study
from explorer.widgets.curves import CurveBuilder, Curves
from explorer.widgets.jobs import IDLE, JobKind, JobRunner, JobStatus
from explorer.widgets.publisher import DirectScheduler, HomeThread, Publisher, Scheduler
from explorer.widgets.run_options import RunOptions, checked_options, options_of, run_settings
from explorer.widgets.runs import MAX_RUNS, ORIGINS, STATUSES, RunRecord, RunRecorder, renewed
from explorer.widgets.sharing import MAX_ADDRESS, Shared, model_key, read_recipe
from explorer.widgets.targets import KINDS, TargetKind
from explorer.widgets.texts import phrase
from explorer.widgets.weights_desk import WeightsDesk

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Collection, Mapping, Sequence
    from concurrent.futures import Executor

MAX_SPARSITY = 0.99
"""Highest sparsity that the page lets a layer have; the tables are measured up to here."""

MAX_DOWNLOAD = 96 * 2**20
"""Largest file in bytes that is sent through the notebook's connection; a larger one is left in a folder and named."""

DEFAULT_IMAGES = 500
"""Validation images behind each point of a loss curve."""

CURVES_EVERY = 0.3
"""Shortest time in seconds between two drawings of growing curves."""

FIRST_SPEEDUP = 3.0
"""What is solved for before anything is chosen."""

COMFORTABLE = 0.8
"""Share of the highest speed-up that is solved for without being asked: at the very edge every layer is nearly empty."""

LEVELS_IN_VIEW = 4
"""How many more levels of the chosen layer are measured while nothing else is asked for."""

SEARCHING = "looking for a better distribution"
"""Says `ExplorerState.background` while the search goes on."""

MAX_SNAPSHOTS, MAX_NAME = 24, 40
"""Most distributions that are kept by name, and most characters of a name."""

LOG_LINES = 200
PATIENCE = 180.0
"""Seconds without a sign of life from any page after which a job is stopped; browsers slow the timers of hidden pages to one a minute."""
GRACE = 30.0
"""The same after a page has said good-bye: a reload in a notebook is back by then."""


@dataclass(frozen=True, slots=True)
class Dense:
    """The dense network that every speed-up is measured against: the fastest of those tried."""

    name: str
    latency_ms: float
    spread_ms: float


@dataclass(frozen=True, slots=True)
class Worthwhile:
    """A distribution that is the best at its speed, as predicted; `harm` is the change that `Curves.harm_kind` names, in nats."""

    distribution: Any
    speedup: float
    harm: float


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A distribution that is kept by name."""

    name: str
    distribution: Any


@dataclass(frozen=True, slots=True)
class Package:
    """A file for the user to keep. `number` tells one download from the next."""

    number: int
    filename: str
    content: bytes


def _worthwhile(
    study: Any, locked: Mapping[str, float], groups: Any, harm_kind: str
) -> tuple[Worthwhile, ...]:
    found = []
    for point in study.pareto(locked=locked, groups=groups).points:
        told = study.predict(point.distribution)
        found.append(Worthwhile(point.distribution, told.speedup, harm_of(study, told, harm_kind)))
    return tuple(found)


def harm_of(study: Any, told: Any, harm_kind: str) -> float:
    """Return the change that a prediction tells of, in nats; for `harm_kind` see `Curves.harm_kind`."""
    harm = told.kl if harm_kind == "kl" else told.loss - study.table.baseline("loss")
    return max(0.0, float(harm))


def _guarded(method: Callable[..., None]) -> Callable[..., None]:
    """Turn what a gesture raises into the page's error region, and keep the page alive."""

    @functools.wraps(method)
    def call(self: ExplorerState, *args: Any, **kwargs: Any) -> None:
        try:
            method(self, *args, **kwargs)
        except Exception as error:  # noqa: BLE001 - this is the last place before the user
            self.report(error)

    return call


class ExplorerState(t.HasTraits):
    """State of one page.

    Parameters
    ----------
    study : Study, optional
        What is under study; without one, `load` a choice.
    choices : sequence of Choice
        Models and data that the page offers.
    executor : concurrent.futures.Executor, optional
        Runs the long work; a single thread by default.
    scheduler : Scheduler, optional
        Brings news back to the main thread; directly by default.
    interval : float
        Shortest time in seconds between two deliveries of news.
    open_study : callable, optional
        Makes a study of a `Choice`.
    clock : callable
        Seconds, monotonic.
    """

    study = t.Any(None)
    """The `Study`, or None until one is loaded."""
    choice = t.Int(0)
    """Index of the chosen entry of `choices`."""
    layers = t.Tuple()
    """Tuple of `PrunableLayer`."""
    facts = t.Unicode("")
    """One line about model, data and machine."""
    curves = t.Instance(Curves, ())
    """What was measured."""
    measured = t.Bool(False)
    """Whether a measurement is complete, so that targets can be solved."""
    dense = t.Instance(Dense, allow_none=True, default_value=None)
    """The dense network that speed-ups refer to, once it was timed."""
    distribution = t.Any(None)
    """The `SparsityDistribution` on the page."""
    origin = t.Unicode("")
    """Where the distribution comes from: "uniform", "solved", "mine", or "loaded" from a file or an address."""
    ghost = t.Any(None)
    """A distribution to compare with: the uniform one of about the same latency."""
    prediction = t.Any(None)
    """The `Prediction` for `distribution`, or None before a measurement."""
    feasible = t.Tuple(default_value=(1.0, None))
    """Lowest and highest speed-up that a distribution can reach; the highest None before a measurement."""
    target_kind = t.Enum(tuple(KINDS), default_value="speedup")
    """What is solved for: a name of `KINDS`."""
    target = t.Float(FIRST_SPEEDUP)
    """Speed-up that was asked for last."""
    snapshots = t.Tuple()
    """Tuple of `Snapshot`, the oldest first."""
    compared = t.Unicode("")
    """Name of the snapshot that is drawn behind the bars; empty for the uniform one of about the same latency."""
    can_undo = t.Bool(False)
    can_redo = t.Bool(False)
    selected = t.Unicode("")
    """Name of the layer that the page is about."""
    job = t.Instance(JobStatus, ())
    """What the worker is doing."""
    options = t.Instance(RunOptions, ())
    """Settings for the next run."""
    run = t.Instance(RunRecord, allow_none=True, default_value=None)
    """The latest run."""
    runs = t.Tuple()
    """Every `RunRecord` of the session by rising number, the one that is going on included; bounded by `MAX_RUNS`, the oldest dropped."""
    trust = t.Any(None)
    """The `Trust` in the prediction for `distribution`: single-layer curves added up, beside all layers pruned at once. None before it was measured."""
    frontier = t.Tuple()
    """Tuple of `Worthwhile` by rising speed-up: what solving gives at any target, with the locks on the page."""
    is_one_shot = t.Bool(False)
    """The user will not train the pruned network: a search for less harm as it is goes on in the background."""
    search = t.Any(None)
    """The latest `SearchStep` of the search that began at `distribution`; None before there is one."""
    background = t.Unicode("")
    """What is being measured while nothing else is asked for."""
    provenance = t.Unicode("")
    """Where losses come from that were not measured here; empty when they were."""
    package = t.Instance(Package, allow_none=True, default_value=None)
    """A file that waits to be taken by the page."""
    heard = t.Unicode("")
    """The latest address of the page that was dealt with, whether it could be used or not."""
    error = t.Unicode("")
    """What went wrong, in a sentence that says what to do; empty when nothing did."""
    log = t.Tuple()
    """Lines of what happened, newest last, bounded."""

    def __init__(
        self,
        study: Any = None,
        *,
        choices: Sequence[Choice] = (),
        executor: Executor | None = None,
        scheduler: Scheduler | None = None,
        interval: float = 0.1,
        open_study: Callable[[Choice], Any] = open_study,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__()
        self.page = uuid.uuid4().hex[:12]
        self.choices = tuple(choices)
        self._open_study = open_study
        self._clock = clock
        self._executor = executor or ThreadPoolExecutor(1, thread_name_prefix="explorer")
        scheduler = scheduler or DirectScheduler()
        self.home = HomeThread(scheduler)
        self._publisher = Publisher(scheduler, interval)
        self._jobs = JobRunner(self._executor, self._publisher)
        self._idle_jobs = JobRunner(self._executor, self._publisher, "background end")
        self._quick = executor or ThreadPoolExecutor(1, thread_name_prefix="explorer-quick")
        self._n_images = DEFAULT_IMAGES
        self._is_refined = False
        self._refined_layers: frozenset[str] = frozenset()
        self._trusted: Any = None
        self._searched: Any = None
        self._idle_for: Any = None
        self._n_tables = 0
        self._frontier_of: Any = None
        self._limits_of: Any = None
        self._limits: tuple[float, float] | None = None
        self._history: History[Any] = History()
        self._pruning: Any = None
        self._deadline: float | None = None
        # What the study was loaded from, as an address tells it; and an address that waits for its model.
        self._model_key = 0
        self._wish = ""
        if study is not None:
            self.adopt(study)
        self.weights = WeightsDesk(self)

    # What the page is about

    def adopt(self, study: Any, *, key: int = 0) -> None:
        """Put `study` on the page, with what it knows already; `key` is the `model_key` of what it was loaded from."""
        self._model_key = key
        builder = CurveBuilder(() if study.table is None else study.table.points)
        self._idle_jobs.stop()
        self.study = study
        self.provenance = getattr(study, "provenance", None) or ""
        self.run = None
        self.error = ""
        self._distrust()
        self.dense = None
        self.measured = (builder.count("kl") > 0 or builder.count("loss") > 0) and builder.count(
            "latency_ms"
        ) > 0
        self.layers = tuple(study.layers)
        self.curves = builder.curves()
        self.selected = self.layers[0].name
        self._refresh_facts()
        self._history.clear()
        self._refresh_snapshots()
        self.ghost = None
        self._take(study.uniform(0.9), "uniform")
        self._refresh_limits()
        self._say(f"{study.model.name}: {len(self.layers)} layers that can be pruned.")

    @_guarded
    def load(self, index: int) -> None:
        """Load the choice at `index`; an address that waits for another model is forgotten."""
        if self._wish:
            self.heard, self._wish = self._wish, ""
        self._load(index)

    def _load(self, index: int, shared: Shared | None = None) -> None:
        if not 0 <= index < len(self.choices):
            raise ExplorerError(phrase("refusal.no_choice", number=index, total=len(self.choices)))
        choice = self.choices[index]

        def finished(study: Any) -> None:
            self.choice = index
            self.adopt(study, key=model_key(choice.model, choice.data))
            if shared is not None:
                self._take_shared(shared)
            self._grant()

        self._start(
            "load", phrase("job.load", choice=choice.label), lambda _stop: self._open_study(choice), finished
        )

    def make_study(self, text: str, make: Callable[[], Any], shown: Callable[[Any], None]) -> None:
        """Have `make` make a study, in the background, and give it to `shown`."""
        self._start("load", text, lambda _stop: make(), shown)

    @property
    def key(self) -> int:
        """Number that an address tells the model and its weights by."""
        return self._model_key

    def adopt_again(self, study: Any, key: int, distribution: Any = None, origin: str = "") -> None:
        """Put a study of the same architecture on the page, with what it knows already, and the bars of `distribution`."""
        self.adopt(study, key=key)
        if distribution is not None:
            self._take(distribution, origin)

    @_guarded
    def select(self, name: str) -> None:
        """Make `name` the layer that the page is about."""
        if name in {layer.name for layer in self.layers}:
            self.selected = name
            self._settle(final=True)

    # Sensitivity

    @_guarded
    def measure(self, n_images: int = DEFAULT_IMAGES) -> None:
        """Measure the loss on `n_images` validation images and the latency of each layer, then solve for the target."""
        study = self._need_study()
        self._n_images = n_images
        if n_images < 1:
            raise ExplorerError(phrase("refusal.images", number=n_images))
        self._start(
            "measure",
            phrase("job.measure"),
            lambda stop: self._measure(study, n_images, stop),
            lambda _: self._measured(study),
        )

    def _measure(self, study: Any, n_images: int, stop: threading.Event) -> None:
        from explorer.sensitivity import CellCounter

        builder = CurveBuilder()
        started = self._clock()
        shown = -math.inf
        count = CellCounter()
        # Predictions do not use refreshed BatchNorm statistics, so nobody is made to wait for them.
        total = study.n_sensitivity_cells(refresh_batchnorm=False)
        for point in study.sensitivity_points(n_images=n_images, stop=stop, refresh_batchnorm=False):
            builder.add(point)
            if count.add(point):
                left = (self._clock() - started) / count.done * max(0, total - count.done)
                self._progress(done=min(count.done, total), total=total, seconds_left=left)
            # The curves are the largest thing that is sent, so they grow a little less often than the bar.
            if self._clock() - shown > CURVES_EVERY:
                shown = self._clock()
                self._publisher.post("curves", functools.partial(setattr, self, "curves", builder.curves()))
            self._stop_if_abandoned()
        self._publisher.post("curves", functools.partial(setattr, self, "curves", builder.curves()))

    def _measured(self, study: Any) -> None:
        self._refresh_layers()
        if self._jobs.stop_event.is_set():
            self._say("Measurement stopped; what was measured stays on the page.")
            return
        self.measured = True
        self._distrust()
        self._refresh_limits()
        self._refresh_prediction()
        self._say(f"Measured {len(study.layers)} layers.")
        if self.origin in {"mine", "loaded"}:
            self._say("The bars stay as they were shaped; a target solves them anew.")
            return
        # A first picture of what solving does; the target that stands on the page may be beyond this model.
        if self.target_kind != "speedup":
            self.target_kind, self.target = "speedup", FIRST_SPEEDUP
        target = min(self.target, round(COMFORTABLE * self.feasible[1], 1))
        if target > 1:
            self.solve(target)
        else:
            self._say(
                "This network gains next to nothing from sparsity on this machine; no target was solved."
            )

    # Distribution

    @_guarded
    def edit(self, values: Mapping[str, float], *, final: bool) -> None:
        """Take sparsities by layer from the page; `final` when the gesture is over, which makes it a step of undo."""
        distribution = self._need_distribution()
        changed = {name: value for name, value in values.items() if abs(distribution[name] - value) > 1e-9}
        for name, value in changed.items():
            if name in distribution.locked:
                raise DistributionError(
                    phrase("refusal.locked", layer=name, sparsity=f"{distribution[name]:.1%}")
                )
            distribution = distribution.set(name, _checked_sparsity(value))
        if changed:
            self.distribution = distribution
            self.origin = "mine"
            self._refresh_prediction()
            self._settle()
        if final:
            self._remember()
            self._settle(final=True)

    @_guarded
    def type_sparsity(self, names: Sequence[str], text: str) -> None:
        """Take a sparsity for some layers that was typed, in per cent."""
        self._check_layers(names)
        number = _number(text.replace("%", ""), phrase("refusal.sparsity_accepted"))
        self.edit(dict.fromkeys(names, _checked_sparsity(number / 100)), final=True)

    @_guarded
    def toggle_lock(self, names: Sequence[str]) -> None:
        """Lock some layers at their sparsity, or unlock them when all of them are."""
        distribution = self._check_layers(names)
        locked = set(names) <= distribution.locked
        self._change(distribution.unlock(*names) if locked else distribution.lock(*names))

    @_guarded
    def toggle_tie(self, names: Sequence[str]) -> None:
        """Have some layers share one sparsity from now on, in the hand and in the solver; free them when all of them are tied to each other."""
        distribution = self._check_layers(names)
        is_tied = any(set(names) <= set(group) for group in distribution.groups)
        self._change(distribution.unlink(*names) if is_tied else distribution.link(*names))

    def _check_layers(self, names: Sequence[str]) -> Any:
        """Return the distribution, which has these layers."""
        distribution = self._need_distribution()
        unknown = [name for name in names if name not in distribution]
        if unknown or not names:
            told = ", ".join(map(repr, unknown)) or phrase("refusal.no_name")
            raise DistributionError(phrase("refusal.no_layer", layer=told, layers=", ".join(distribution)))
        return distribution

    def _change(self, distribution: Any) -> None:
        """Take what differs in more than sparsities; where these differ too, it was made by hand."""
        if dict(distribution) != dict(self.distribution):
            self.origin = "mine"
        self.distribution = distribution
        self._refresh_prediction()
        self._remember()
        self._settle(final=True)

    # Snapshots

    @_guarded
    def keep(self, name: str = "") -> None:
        """Keep the distribution by name; without one it is called after its speed-up, or its sparsity."""
        self._need_distribution()
        known = {snapshot.name for snapshot in self.snapshots}
        name = " ".join(str(name).split())
        if len(name) > MAX_NAME:
            raise DistributionError(phrase("refusal.name_too_long", count=len(name), limit=MAX_NAME))
        if len(known) >= MAX_SNAPSHOTS and name not in known:
            raise DistributionError(phrase("refusal.too_many_kept", limit=MAX_SNAPSHOTS))
        self._remember()
        self._history.snapshot(name or _unused(self._described(), known))
        self._refresh_snapshots()

    def _described(self) -> str:
        origin = ORIGINS.get(self.origin, ORIGINS["mine"])
        if self.prediction is not None and self.prediction.speedup is not None:
            return phrase("kept.at_speedup", origin=origin, speedup=f"{self.prediction.speedup:.2f}")
        sparsity = _mean_sparsity(self.layers, self.distribution)
        return phrase("kept.at_sparsity", origin=origin, sparsity=f"{sparsity:.1%}")

    @_guarded
    def take_snapshot(self, name: str) -> None:
        """Put a kept distribution on the page; a step of undo like any other."""
        self._take(self._history.restore(name), "mine")

    @_guarded
    def forget_snapshot(self, name: str) -> None:
        """Drop a kept distribution."""
        self._history.forget(name)
        self._refresh_snapshots()

    @_guarded
    def compare_with(self, name: str) -> None:
        """Draw a kept distribution behind the bars; with an empty name the uniform one."""
        if name and name not in self._history.snapshots:
            raise DistributionError(phrase("refusal.not_kept", name=repr(name)))
        self.compared = name

    def _refresh_snapshots(self) -> None:
        kept = self._history.snapshots
        self.snapshots = tuple(Snapshot(name, distribution) for name, distribution in kept.items())
        if self.compared not in kept:
            self.compared = ""

    @_guarded
    def choose_target(self, kind: str) -> None:
        """Solve for another kind of target from now on; what the distribution on the page has of it stands there first."""
        if kind not in KINDS:
            raise DistributionError(phrase("refusal.no_target", target=repr(kind), targets=", ".join(KINDS)))
        self.target_kind = kind
        self._refresh_target()

    def target_limits(self) -> tuple[float, float] | None:
        """Return the least and the most that this kind of target can be with the locks on the page, in its unit; None before the measurement."""
        if not self.measured:
            return None
        if self.target_kind == "speedup":
            return self.feasible
        # Asked for at every step of a drag, which changes none of this.
        key = self.target_kind, self._frontier_key()
        if key != self._limits_of:
            held = {name: self.distribution[name] for name in self.distribution.locked}
            ends = [dict.fromkeys(self.distribution, end) | held for end in (0.0, MAX_SPARSITY)]
            low, high = sorted(self._shown(self.study.predict(end)) for end in ends)
            self._limits_of, self._limits = key, (low, high)
        return self._limits

    def _shown(self, prediction: Any) -> float:
        """Return what a prediction tells of the present kind of target, in the unit of the page."""
        harm = harm_of(self.study, prediction, self.curves.harm_kind)
        return KINDS[self.target_kind].shown(prediction, harm)

    def _refresh_target(self) -> None:
        if self.prediction is not None:
            self.target = self._shown(self.prediction)

    def _checked_target(self, text: Any) -> float:
        """Return the target that was typed, in the unit of the page."""
        kind, limits = KINDS[self.target_kind], self.target_limits()
        if limits is None:
            within = phrase("refusal.target.at_least", least=kind.words(kind.least))
        elif self.target_kind == "speedup":
            within = phrase("refusal.target.between", low=f"{limits[0]:.1f}", high=f"{limits[1]:.1f}")
        else:
            within = phrase("refusal.target.between", low=kind.words(limits[0]), high=kind.words(limits[1]))
        number = _number(
            str(text).removesuffix(kind.unit),
            phrase("refusal.target.accepted", kind=kind.label, within=within),
        )
        if not self.measured:
            raise DistributionError(phrase("refusal.target.measure_first", kind=kind.label))
        if not kind.least <= number <= kind.most:
            raise DistributionError(
                phrase(
                    "refusal.target.out_of_range",
                    kind=kind.label,
                    number=f"{number:g}",
                    unit=kind.unit,
                    within=within,
                )
            )
        return number

    @staticmethod
    def _solved(study: Any, kind: TargetKind, number: float, current: Any, *, check: bool) -> Any:
        """Solve for a target in the unit of the page, with the locks and groups of `current`."""
        locked = {name: current[name] for name in current.locked}
        found = study.solve(
            **{kind.name: number * kind.scale}, locked=locked, groups=current.groups, check=check
        )
        return found.lock(*locked) if locked else found

    @_guarded
    def turn(self, target: Any) -> None:
        """Follow the dial while it turns: solve from the tables alone, within this call; letting go solves with a check on the engine."""
        if not self.measured or self.job.busy:
            return
        number = self._checked_target(target)
        try:
            solved = self._solved(self.study, KINDS[self.target_kind], number, self.distribution, check=False)
        except InfeasibleTarget:
            return  # the end of the dial is a rounded number; letting go tells it
        self.target, self.origin, self.ghost = number, "solved", None
        self.distribution = solved
        self._refresh_prediction()
        self._settle()

    @_guarded
    def solve(self, target: Any) -> None:
        """Find the distribution that reaches the target, of the present kind and in its unit, with the least loss, in the worker."""
        study = self._need_study()
        number = self.target = self._checked_target(target)
        before = self._need_distribution()
        kind = KINDS[self.target_kind]
        words = kind.words(number)

        def work(_stop: threading.Event) -> tuple[Any, Any]:
            solved = self._solved(study, kind, number, before, check=True)
            return solved, _uniform_like(study, study.predict(solved).latency_ms)

        def finished(found: tuple[Any, Any]) -> None:
            solved, uniform = found
            if self.distribution != before:
                self._say(
                    f"Solved for {words}, but the bars have been moved since: they stay. Press Solve to take a solution."
                )
                return
            self.ghost = uniform
            self._take(solved, "solved")
            self._say(f"Solved for {words}: predicted {self.prediction.speedup:.2f} ×.")

        self._start("solve", phrase("job.solve", target=words), work, finished)

    @_guarded
    def make_uniform(self) -> None:
        """Give all layers the same sparsity: that of the same latency where latency was measured, else 90 %."""
        study = self._need_study()
        current = self._need_distribution()
        ghost = self.ghost if self.ghost is not None else study.uniform(0.9)
        free = {name: value for name, value in ghost.items() if name not in current.locked}
        for name, value in free.items():
            current = current.set(name, value)
        self._take(current, "uniform")

    @_guarded
    def undo(self) -> None:
        """Step back to the distribution before the last change."""
        self._show(self._history.undo())

    @_guarded
    def redo(self) -> None:
        """Step forward again."""
        self._show(self._history.redo())

    # Addresses and recipes

    def address(self) -> str:
        """Return what the page keeps in its address, see `Shared`; empty while nothing has been changed."""
        names = [layer.name for layer in self.layers]
        is_plain = not (self.can_undo or self.can_redo or self.choice)
        if self.distribution is None or is_plain or {*self.distribution} != {*names}:
            return ""
        shared = Shared.of(self._model_key, names, self.target_kind, self.target, self.distribution)
        text = shared.to_text()
        return text if len(text) <= MAX_ADDRESS else ""

    @_guarded
    def restore(self, text: str) -> None:
        """Take the distribution in the page's address, as soon as its model is loaded; a step of undo."""
        self._wish = text
        if self.study is not None and self.job.kind != "load":
            self._grant()

    @_guarded
    def _grant(self) -> None:
        """Do what an address asks for, if one waits: the model that it is for comes first."""
        text, self._wish = self._wish, ""
        if not text:
            return
        self.heard = text
        shared = Shared.from_text(text)
        if shared.model == self._model_key:
            self._take_shared(shared)
            return
        keys = [model_key(choice.model, choice.data) for choice in self.choices]
        if shared.model not in keys:
            raise DistributionError(phrase("refusal.address.other_model"))
        self._load(keys.index(shared.model), shared)

    def _take_shared(self, shared: Shared) -> None:
        distribution = shared.distribution([layer.name for layer in self.layers])
        for value in distribution.values():
            _checked_sparsity(value)
        self.target_kind, self.target = shared.target_kind, shared.target
        if distribution != self.distribution:
            self._take(distribution, "loaded")
        self._say("Took the distribution in the address; Undo takes it back.")

    @_guarded
    def load_recipe(self, text: str) -> None:
        """Take the distribution, and the settings of a run, from a recipe or a distribution as YAML or JSON; the bars are a step of undo."""
        study = self._need_study()
        names = [layer.name for layer in self.layers]
        model = getattr(study, "model_source", study.model.name)

        def finished(found: tuple[Any, Any]) -> None:
            distribution, recipe = found
            if recipe is not None:
                self._take_recipe(recipe)
            self._take(distribution, "loaded")
            self._say(
                f"Loaded a {'recipe' if recipe is not None else 'distribution'} for {len(names)} layers; Undo brings the bars back."
            )

        self._start(
            "read",
            phrase("job.read"),
            lambda _stop: read_recipe(text, names, MAX_SPARSITY, model),
            finished,
        )

    def _take_recipe(self, recipe: Any) -> None:
        """Take what a recipe says of the run and of the target."""
        # It remembers the target, for the recipe of a run.
        self.study.adopt(recipe)
        settings = recipe.settings
        own = [field.name for field in dataclasses.fields(RunOptions)]
        self.options = checked_options({name: getattr(settings, name) for name in own})
        default = type(settings)()
        others = [
            f"{field.name} {getattr(settings, field.name)}"
            for field in dataclasses.fields(settings)
            if field.name not in {*own, "evaluate_every"}
            and getattr(settings, field.name) != getattr(default, field.name)
        ]
        if others:
            self._say(
                f"A run on this page does not take over {', '.join(others)}; sparsity-explorer prune --recipe does."
            )
        for name, value in (recipe.target or {}).items():
            if name in KINDS:
                self.target_kind, self.target = name, round(value / KINDS[name].scale, KINDS[name].digits)

    # Runs

    @_guarded
    def set_options(self, given: Mapping[str, Any]) -> None:
        """Take the settings of the next run from the page; what is missing or empty keeps its default."""
        self.options = checked_options(given)

    @_guarded
    def start_run(self, given: Any = None, *, settings: Mapping[str, Any] | None = None) -> None:
        """Prune the model to the distribution on the page while it trains, with `settings` as they were typed, of which wrong ones start nothing; or begin a `PruningRun` that was `given`, whose distribution comes onto the page."""
        study = self._need_study()
        if given is not None and given.state != "ready":
            raise RunError(phrase("refusal.run.begun", status=STATUSES.get(given.state, given.state)))
        if settings is not None:
            self.options = checked_options(settings)
        if given is not None and not self.job.busy:
            self._take(self._need_distribution().replace(given.asked), "mine")
        distribution = self._need_distribution()
        if getattr(study, "data", None) is None:
            raise RunError(phrase("refusal.no_data"))
        number = self.run.number + 1 if self.run else 1
        asked = _mean_sparsity(self.layers, distribution)
        options = self.options if given is None else options_of(given.settings)
        record = RunRecord(
            number,
            distribution,
            asked,
            options.epochs,
            predicted_ms=self.prediction.latency_ms if self.prediction is not None else None,
            options=options,
            origin=self.origin,
        )

        def work(stop: threading.Event) -> RunRecord:
            return self._prune(study, record, options, stop, given)

        def finished(last: RunRecord) -> None:
            self.run = last
            words = "stopped" if last.status == "stopped" else "finished"
            self._say(
                f"Run {last.number} {words}: accuracy {_percent(last.accuracy)}, sparsity {last.sparsity:.1%}."
            )

        self._refuse_when_busy()
        # Before the job begins: its own news of the run come after this one.
        self.run = record
        self._start("prune", phrase("job.prune", number=number), work, finished)

    def _prune(
        self, study: Any, record: RunRecord, options: RunOptions, stop: threading.Event, given: Any
    ) -> RunRecord:
        groups = {name: study.n_groups(name) for name in record.distribution}
        recorder = RunRecorder(record, stored_bytes=study.stored_bytes, groups=groups, clock=self._clock)
        run = given
        if run is None:
            run = study.prune(record.distribution, **run_settings(study, options))
        self._pruning = run
        if self.job.paused:
            run.pause()
        try:
            for event in run:
                last = recorder.add(event)
                if self.job.paused or stop.is_set():
                    last = (
                        dataclasses.replace(last, status="stopping" if stop.is_set() else "paused")
                        if last.active
                        else last
                    )
                self._publisher.post("run", functools.partial(setattr, self, "run", last))
                self._progress(done=last.step, total=last.total_steps, seconds_left=last.seconds_left)
                self._stop_if_abandoned()
                if stop.is_set():
                    run.stop()
        except RunError:
            # The last good weights are worth keeping: they stay on the page, and can be downloaded, beside the error.
            kept = dataclasses.replace(recorder.record, status="failed", result=run.result)
            self._publisher.post("run", functools.partial(setattr, self, "run", kept))
            raise
        finally:
            self._pruning = None
        last = recorder.record
        self._publisher.post("job", functools.partial(self._tell, phrase("job.time")))
        return dataclasses.replace(
            last, final=study.final_latency(last.result), sizes=documents.sizes(study, last.result)
        )

    def _tell(self, text: str) -> None:
        if self.job.busy:
            self.job = dataclasses.replace(self.job, text=text, done=0, total=0, seconds_left=None)

    @t.observe("run")
    def _keep_run(self, change: Any) -> None:
        """Keep every run of the session beside the latest one."""
        run = change["new"]
        if run is None:
            self.runs = ()
            return
        runs = renewed(self.runs, run)
        if len(runs) > MAX_RUNS:
            self._say(
                f"Run {runs[0].number} is not kept any longer: the page keeps the latest {MAX_RUNS} runs. Download a result to keep it."
            )
        self.runs = runs[-MAX_RUNS:]

    def _kept_run(self, number: int) -> RunRecord:
        """Return the run of that number."""
        for run in self.runs:
            if run.number == number:
                return run
        told = ", ".join(str(run.number) for run in self.runs) or phrase("refusal.run.none_yet")
        raise RunError(phrase("refusal.run.unknown", number=number, runs=told))

    @_guarded
    def use_run(self, number: int) -> None:
        """Put the distribution of a run back into the equalizer; a step of undo like any other."""
        run = self._kept_run(number)
        if run.origin == "solved":
            # The uniform one of its latency is worked out when there is time.
            self.ghost = None
        self._take(run.distribution, run.origin or "mine")
        self._say(f"The distribution of run {number} is in the equalizer.")

    @_guarded
    def pause(self) -> None:
        """Hold the run after its current step."""
        if self.job.kind != "prune" or self.run is None or not self.run.active:
            return
        # Noted first: the worker looks here when it has made the run, which takes a moment.
        self.job = dataclasses.replace(self.job, paused=True)
        if self._pruning is not None:
            self._pruning.pause()
        self.run = dataclasses.replace(self.run, status="paused")
        self._say("Paused.")

    @_guarded
    def resume(self) -> None:
        """Let a paused run go on."""
        if self.job.kind != "prune" or self.run is None or not self.run.active:
            return
        self.job = dataclasses.replace(self.job, paused=False)
        if self._pruning is not None:
            self._pruning.resume()
        self.run = dataclasses.replace(self.run, status="running")
        self._say("Resumed.")

    @_guarded
    def stop(self) -> None:
        """Stop the job; what it has so far stays."""
        self._stop_job()
        if self.job.busy:
            self.job = dataclasses.replace(self.job, stopping=True)
        if self.run is not None and self.run.active:
            self.run = dataclasses.replace(self.run, status="stopping")

    def _stop_job(self) -> None:
        self._jobs.stop()
        if self._pruning is not None:
            self._pruning.stop()

    # Results

    @_guarded
    def pack(self, number: int | None = None) -> None:
        """Pack the result of a run, by default of the latest one, into a zip file and offer it to the page."""
        study = self._need_study()
        run = self.run if number is None else self._kept_run(number)
        if run is None:
            raise RunError(phrase("refusal.run.no_result"))
        if run.result is None:
            raise RunError(phrase("refusal.run.no_result_of", number=run.number))
        result, number, times = run.result, run.number, run.final
        filename = f"{documents.file_name(study.model.name)}-run{number}.zip"

        def work(_stop: threading.Event) -> tuple[str, bytes | None]:
            folder = Path(tempfile.mkdtemp(prefix="sparsity-explorer-"))
            study.save(result, folder, latency=times)
            try:
                documents.add_documents(study, result, folder, times)
            except Exception as error:  # noqa: BLE001 - the weights are what matters: they are not kept back for a report
                note = f"The report could not be written and is not in the download, the rest is: {error}"
                self._publisher.post("no report", functools.partial(self._say, note))
            buffer = io.BytesIO()
            with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
                for path in sorted(folder.iterdir()):
                    archive.write(path, path.name)
            content = buffer.getvalue()
            if len(content) > MAX_DOWNLOAD:
                return str(folder), None
            for path in folder.iterdir():
                path.unlink()
            folder.rmdir()
            return "", content

        def finished(packed: tuple[str, bytes | None]) -> None:
            folder, content = packed
            if content is None:
                raise ExplorerError(phrase("refusal.too_large", size=MAX_DOWNLOAD >> 20, folder=folder))
            self._offer(filename, content)

        self._start("pack", phrase("job.pack"), work, finished)

    @_guarded
    def save(self, what: str) -> None:
        """Offer a file of what there is now to the page: "recipe", "measurements" (CSV) or "report" (HTML)."""
        study, distribution = self._need_study(), self._need_distribution()
        begin = documents.file_name(study.model.name)
        settings = run_settings(study, self.options) if getattr(study, "data", None) is not None else {}
        if what == "recipe":
            # Small enough for the main thread, and so there is also a way to keep the bars while a run goes on.
            kind = "recipe" if settings else "distribution"
            self._offer(f"{begin}-{kind}.yaml", documents.recipe_text(study, distribution, settings).encode())
        elif what == "measurements":
            if study.table is None:
                raise ExplorerError(phrase("refusal.not_measured"))
            self._start(
                "pack",
                phrase("job.write_measurements"),
                lambda _stop: documents.measurements(study),
                lambda text: self._offer(f"{begin}-measurements.csv", text.encode()),
            )
        elif what == "report":
            of_these = (
                run
                for run in reversed(self.runs)
                if run.result is not None and run.distribution == distribution
            )
            run = next(of_these, None)
            self._start(
                "pack",
                phrase("job.write_report"),
                lambda _stop: documents.report(study, run, distribution, settings),
                lambda content: self._offer(f"{begin}-report.html", content),
            )
        else:
            raise ExplorerError(phrase("refusal.no_file", file=repr(what)))

    def _offer(self, filename: str, content: bytes) -> None:
        self.package = Package((self.package.number if self.package else 0) + 1, filename, content)
        self._say(f"Packed {filename}, {documents.told_bytes(len(content))}.")

    def taken(self) -> None:
        """Forget the content of the file that the page has taken."""
        if self.package is not None:
            self.package = dataclasses.replace(self.package, content=b"")

    # Signs of life

    def beat(self, *, leaving: bool = False) -> None:
        """Note that a page is there, or that it is leaving; jobs of pages that do not come back are stopped."""
        self._deadline = self._clock() + (GRACE if leaving else PATIENCE)

    def _stop_if_abandoned(self) -> None:
        """Stop the job when no page has been heard of for long; without any page ever, as in a script, nothing is stopped."""
        if self._deadline is not None and self._clock() > self._deadline:
            self._stop_job()

    def quick_runner(self, slot: str) -> JobRunner:
        """Return a runner for work of well under a second, which does not wait for the job that goes on; `slot` is its own name."""
        return JobRunner(self._quick, self._publisher, slot)

    # Errors and log

    def report(self, error: BaseException) -> None:
        """Show an error to the user, and keep its origin in the log."""
        if isinstance(error, ExplorerError):
            self.error = str(error)
            self._say(str(error))
            return
        # torch says the same in an error of its own.
        short_of_memory = isinstance(error, MemoryError) or "can't allocate memory" in str(error)
        self.error = (
            phrase("refusal.memory")
            if short_of_memory
            else phrase("refusal.unexpected", kind=type(error).__name__, error=error)
        )
        for line in "".join(traceback.format_exception(error)).splitlines():
            self._say(line)

    def dismiss(self) -> None:
        """Take the error away."""
        self.error = ""

    def _say(self, line: str) -> None:
        stamp = time.strftime("%H:%M:%S")
        self.log = (*self.log, f"{stamp}  {line}")[-LOG_LINES:]

    # Inner workings

    def _start(
        self,
        kind: JobKind,
        text: str,
        work: Callable[[threading.Event], Any],
        finished: Callable[[Any], None],
    ) -> None:
        self._refuse_when_busy()
        self.error = ""
        # It shares the worker: what is asked for comes first.
        self._idle_jobs.stop()
        self.background = ""
        self.job = JobStatus(kind, text)

        def end(result: Any) -> None:
            # The page is told once, after all of it: what follows may start the next job, and in between it would invite the next gesture.
            with self.hold_trait_notifications():
                self.job = IDLE
                try:
                    finished(result)
                except Exception as error:  # noqa: BLE001 - see `_guarded`
                    self.report(error)
                self._settle(final=True)

        def failed(error: BaseException) -> None:
            self.job = IDLE
            self._settle(final=True)
            if self.run is not None and self.run.active:
                self.run = dataclasses.replace(self.run, status="failed")
            self.report(error)

        self._jobs.start(work, end, failed)

    def _refuse_when_busy(self) -> None:
        if self._jobs.running:
            raise ExplorerError(phrase("refusal.busy", job=self.job.text or phrase("job.some")))

    # What is measured while nothing is asked for

    def _distrust(self) -> None:
        """Forget what the background has found: of another study, or of an earlier measurement."""
        self._refined_layers = frozenset()
        self._is_refined = False
        self._trusted = self.trust = None
        self._searched = self.search = None
        self._n_tables += 1
        self.frontier = ()

    def _settle(self, *, final: bool = False) -> None:
        """Note that the distribution may have changed; when it is `final` and the worker is free, measure what can be trusted of its prediction."""
        is_trusted = self._trusted is not None and dict(self.distribution) == self._trusted
        if not is_trusted:
            self.trust = None
        if self.distribution != self._searched:
            self.search = None
        study = self.study
        if not final or not self.measured or self._jobs.running:
            return
        if self._idle_jobs.running:
            # Its end comes here again.
            if self.distribution != self._idle_for:
                self._idle_jobs.stop()
            return
        distribution, n_images = self.distribution, self._n_images
        self._idle_for = distribution
        wanted = self._frontier_key()
        if wanted != self._frontier_of:
            _, held, groups = wanted
            self._idle_jobs.start(
                lambda _stop: _worthwhile(study, dict(held), groups, self.curves.harm_kind),
                functools.partial(self._drawn, study, wanted),
                self._background_failed,
            )
            return
        if self.origin == "solved" and self.ghost is None:
            self._idle_jobs.start(
                lambda _stop: _uniform_like(study, study.predict(distribution).latency_ms),
                functools.partial(self._compared, study, distribution),
                self._background_failed,
            )
            return
        if getattr(study, "data", None) is None:
            return
        if not is_trusted:
            self.background = "checking the prediction"
            self._idle_jobs.start(
                lambda stop: study.trust(distribution, n_images=n_images, stop=stop),
                functools.partial(self._checked_trust, study, distribution),
                self._background_failed,
            )
        elif not self._is_refined and self.origin == "solved":
            self.background = "refining the curves"
            self._idle_jobs.start(
                lambda stop: self._refine(study, len(study.layers), n_images, stop, near=distribution),
                functools.partial(self._refined, study, frozenset()),
                self._background_failed,
            )
        elif self.is_one_shot and self.origin == "solved" and distribution != self._searched:
            self.background = SEARCHING
            self._searched = distribution
            self._idle_jobs.start(
                functools.partial(self._search, study, distribution, n_images),
                functools.partial(self._search_ended, study),
                self._background_failed,
            )
        elif self._is_refined and self.selected not in self._refined_layers:
            # What is looked at.
            chosen = frozenset({self.selected})
            self.background = "refining the curve in view"
            self._idle_jobs.start(
                lambda stop: self._refine(study, LEVELS_IN_VIEW, n_images, stop, layers=chosen),
                functools.partial(self._refined, study, chosen),
                self._background_failed,
            )

    def _frontier_key(self) -> tuple[int, tuple[tuple[str, float], ...], Any]:
        """Return what a frontier depends on: which tables, which locks, which groups."""
        distribution = self.distribution
        held = sorted((name, distribution[name]) for name in distribution.locked)
        return self._n_tables, tuple(held), distribution.groups

    def _drawn(self, study: Any, of: Any, found: tuple[Worthwhile, ...]) -> None:
        if study is self.study:
            self._frontier_of, self.frontier = of, found
        self._settle(final=True)

    @_guarded
    def adopt_worthwhile(self, index: int) -> None:
        """Adopt a distribution of the frontier."""
        if not 0 <= index < len(self.frontier):
            raise DistributionError(phrase("refusal.no_point", count=len(self.frontier), number=index))
        chosen = self.frontier[index]
        # The uniform one to compare with is worked out when there is time: a slider does not wait.
        self.ghost = None
        self._take(chosen.distribution, "solved")
        self._refresh_target()

    def _compared(self, study: Any, of: Any, uniform: Any) -> None:
        if study is self.study and of == self.distribution:
            self.ghost = uniform
        self._settle(final=True)

    def _checked_trust(self, study: Any, distribution: Any, found: Any) -> None:
        self.background = ""
        if study is self.study and found is not None and distribution == self.distribution:
            self._trusted, self.trust = dict(distribution), found
        self._settle(final=True)

    def _refine(self, study: Any, n_cells: int, n_images: int, stop: threading.Event, **where: Any) -> bool:
        """Measure a few more cells, and tell whether that was finished."""
        for _ in study.refine(n_cells, n_images=n_images, stop=stop, **where):
            self._stop_if_abandoned()
        return not stop.is_set()

    def _refined(self, study: Any, layers: frozenset[str], complete: bool) -> None:
        self.background = ""
        if study is not self.study:
            self._settle(final=True)
            return
        if layers:
            self._refined_layers |= layers if complete else frozenset()
        else:
            self._is_refined = complete
        self._n_tables += 1
        with self.hold_trait_notifications():
            self.curves = CurveBuilder(study.table.points).curves()
            self._refresh_prediction()
        if complete and not layers:
            self._say("Measured more levels where the curves bend; predictions are nearer for it.")
        self._settle(final=True)

    def _search(self, study: Any, begin: Any, n_images: int, stop: threading.Event) -> bool:
        """Measure networks that are pruned otherwise within the same predicted time, and tell whether that was finished."""

        def show(step: Any) -> None:
            if self.is_one_shot and study is self.study and begin == self.distribution:
                self.search = step

        steps = study.search(
            latency_ms=study.predict(begin).latency_ms,
            begin=begin,
            n_images=n_images,
            locked={name: begin[name] for name in begin.locked},
            groups=begin.groups,
            stop=stop,
        )
        for step in steps:
            self._publisher.post("search", functools.partial(show, step))
            self._stop_if_abandoned()
        return not stop.is_set()

    def _search_ended(self, study: Any, complete: bool) -> None:
        self.background = ""
        if study is not self.study:
            self._searched = None
        elif not complete and self.search is None:
            # Before anything was measured: it is begun anew when the worker is free.
            self._searched = None
        elif complete and self.search is not None:
            gain = less_harm(self.search)
            self._say(
                f"Measured {self.search.n_measured} distributions of the same predicted latency, nothing being trained: the best diverges {gain:.0%} less from the dense network than the one on the page."
            )
        self._settle(final=True)

    def choose_one_shot(self, chosen: bool) -> None:
        """Say whether the network stays as it is pruned, so that a search for less harm without training is worth its time."""
        self.is_one_shot = bool(chosen)
        if not chosen:
            if self.background == SEARCHING:
                self._idle_jobs.stop()
            self._searched = self.search = None
        self._settle(final=True)

    @_guarded
    def take_better(self) -> None:
        """Adopt what the search has found."""
        found = self.search
        if found is None or found.distribution == self.distribution:
            raise DistributionError(phrase("refusal.nothing_better"))
        self._idle_jobs.stop()
        # What it leads to is not searched again, with the same networks.
        self._searched = found.distribution
        self._take(found.distribution, "solved")

    def _background_failed(self, error: BaseException) -> None:
        """Say it in the log: nobody asked for it, so nobody is to be interrupted."""
        self.background = ""
        # Not tried for ever.
        self._is_refined = True
        self._refined_layers = frozenset(layer.name for layer in self.layers)
        self._frontier_of = self._frontier_key()
        self._trusted, self._searched = dict(self.distribution), self.distribution
        self._say(f"A measurement in the background failed: {error}")

    def _progress(self, *, done: int, total: int, seconds_left: float | None) -> None:
        def show() -> None:
            if self.job.busy:
                self.job = dataclasses.replace(self.job, done=done, total=total, seconds_left=seconds_left)

        self._publisher.post("job", show)

    def _need_study(self) -> Any:
        if self.study is None:
            raise ExplorerError(phrase("refusal.no_model"))
        return self.study

    def idle_study(self) -> Any:
        """Return the study on the page, when nothing goes on that needs it."""
        study = self._need_study()
        self._refuse_when_busy()
        return study

    def _need_distribution(self) -> Any:
        self._need_study()
        return self.distribution

    def _take(self, distribution: Any, origin: str) -> None:
        self.origin = origin
        self.distribution = distribution
        self._refresh_prediction()
        self._remember()
        self._settle(final=True)

    def _show(self, distribution: Any) -> None:
        if distribution is not None:
            self.distribution = distribution
            self.origin = "mine"
            self._refresh_prediction()
            self._settle(final=True)
        self._refresh_undo()

    def _remember(self) -> None:
        self._history.record(self.distribution)
        self._refresh_undo()

    def _refresh_undo(self) -> None:
        self.can_undo = self._history.can_undo
        self.can_redo = self._history.can_redo

    def _refresh_prediction(self) -> None:
        self.prediction = self.study.predict(self.distribution) if self.measured else None

    def _refresh_limits(self) -> None:
        self._refresh_layers()
        if self.measured:
            self.feasible = tuple(self.study.feasible_speedups())

    def _refresh_layers(self) -> None:
        """Take over what a measurement has added: each layer's dense time, and the dense baseline."""
        study = self.study
        self.layers = tuple(study.layers)
        baseline = study.dense_baseline
        if baseline is not None:
            name, benchmark = baseline
            self.dense = Dense(name, benchmark.latency_ms, benchmark.spread_ms)
        self._refresh_facts()

    def _refresh_facts(self) -> None:
        study = self.study
        threads = study.threads
        parts = [study.model.name, phrase("common.layers", count=len(study.layers))]
        if getattr(study, "data", None) is not None:
            parts.insert(1, study.data.name)
        parts.append(phrase("common.batch", size=study.batch_size))
        if threads:
            parts.append(phrase("common.threads", count=threads))
        self.facts = " · ".join(parts)


def less_harm(step: Any) -> float:
    """Return by which share the best of a search diverges less from the dense network than what it began with."""
    return 1.0 - step.loss / step.first_loss if step.first_loss > 0 else 0.0


def _uniform_like(study: Any, latency_ms: float) -> Any:
    """Return the uniform distribution whose predicted latency is closest to `latency_ms`, by bisection."""
    low, high = 0.0, MAX_SPARSITY
    for _ in range(12):
        middle = (low + high) / 2
        if study.predict(study.uniform(middle)).latency_ms > latency_ms:
            low = middle
        else:
            high = middle
    return study.uniform(round(high, 3))


def _unused(name: str, known: Collection[str]) -> str:
    """Return `name`, with a number behind it when it is taken."""
    numbers = itertools.count(2)
    tried = name
    while tried in known:
        tried = f"{name} ({next(numbers)})"
    return tried


def _number(value: Any, accepted: str) -> float:
    """Return `value` as a finite number, or raise an error that says what is accepted."""
    try:
        number = float(str(value).strip().rstrip("x×").replace(",", "."))
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise DistributionError(phrase("refusal.not_a_number", given=value, accepted=accepted))
    return number


def _checked_sparsity(value: float) -> float:
    if not 0 <= value <= MAX_SPARSITY + 1e-9:
        raise DistributionError(
            phrase("refusal.sparsity_range", given=f"{value:.1%}", highest=f"{MAX_SPARSITY:.0%}")
        )
    return min(float(value), MAX_SPARSITY)


def _mean_sparsity(layers: Sequence[Any], distribution: Mapping[str, float]) -> float:
    """Return the sparsity over all prunable weights, a fraction."""
    total = sum(layer.n_params for layer in layers)
    return sum(layer.n_params * distribution[layer.name] for layer in layers) / max(1, total)


def _percent(value: float | None) -> str:
    return "not measured" if value is None or math.isnan(value) else f"{value:.2%}"
