"""How inputs go through a plan and answers come out: segment by segment, and a large batch turn by turn.

What is decided elsewhere: which kernels there are (choosing.py), which inputs are let in (module.py).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from explorer.inference import fork
from explorer.inference.abreast import Abreast, find
from explorer.inference.choices import choice_cache
from explorer.inference.graph import Graph, Ref, base_name, with_values
from explorer.inference.lower import lower, through_torch
from explorer.inference.native import Isa
from explorer.inference.plan import (
    ALWAYS_SPARSE,
    Choice,
    ImportSegment,
    NativeSegment,
    Plan,
    TorchSegment,
    density_of,
)
from explorer.inference.straight import StraightPath

if TYPE_CHECKING:
    # What generates or runs machine code needs llvmlite: imported where it is used, so that a machine without it runs through torch.
    from explorer.inference.steps import Steps
    from explorer.inference.threads import Runner

_CACHED_BYTES = 8 << 20
"""Activations of the images that go through the network together: what the outer caches of one core may be expected to hold."""

SHARED, APART = "image by image", "images apart"
"""How threads divide a batch whose images do not all fit the caches."""


class Execution:
    """A captured graph, lowered and planned, and the steps that compute it. Not for several threads at a time.

    Parameters
    ----------
    captured : Graph
        A graph may be run by several: what this one forgets (see `let_go`) is its own.
    isa : Isa
    threads : int
    mode : {"auto", "dense", "sparse"}
        Which kernels layers may have.
    at_once : int, optional
        Images of a batch that go through together; found here when not given.

    Attributes
    ----------
    captured, graph : Graph
        Before and after lowering.
    plan : Plan
    batch_size : int
        The largest batch.
    at_once : int or None
        Images of a large batch that go through together; None when all do.
    division : str or None
        Of a batch whose images do not fit the caches, one a thread: what the better way to divide it depends on, see `explorer.inference.choices`.
    steps : Steps or None
        None where nothing is native, and until some are installed.
    cycles : (steps,) int64
        Of each step in the last run that was timed.
    straight : StraightPath or None
    choices, densities : dict
        Of each layer with weights, by its index in the graph: its kernel, and nonzeros / weights.
    tried : dict
        Of the same: how many kernels came into question when it was last chosen, and the milliseconds of each that was timed, then or earlier.
    torch_threads : int
        Threads that torch may have while it runs its part. One in a forked child: torch would wait for ever for others, which it had in the parent.
    is_inherited : bool
        Whether this is such a child.
    """

    def __init__(
        self, captured: Graph, isa: Isa, threads: int, mode: str, at_once: int | None = None
    ) -> None:
        self.captured = replace(captured, constants=dict(captured.constants))
        self.isa, self.threads, self.mode = isa, threads, mode
        self.torch_threads, self.is_inherited = threads, False
        fork.revive_in_child(self)
        self.at_once: int | None = None
        self._abreast: Abreast | None = None
        self._in_head: frozenset[str] = frozenset()
        self.graph = self._lowered()
        self.plan = Plan(self.graph, isa, threads, mode=mode)
        self.batch_size = self.plan.images
        self.division: str | None = None
        self.at_once = at_once or self._images_at_once()
        if self.at_once is not None:
            heads = self.plan.head_places
            self._in_head = frozenset(n for n in self.graph.shapes if self.plan.root(n) in heads)
            self._take_abreast()
            self.graph = self._lowered()
            self.plan = Plan(self.graph, isa, threads, self.batch_size, mode, self._abreast)
        # Operators that were captured with the strides of a tensor that lies as torch would have it.
        self._sees_strides = any(
            isinstance(segment, TorchSegment) and base_name(segment.operation.target).startswith("as_strided")
            for segment in self.plan.segments
        )
        self.cycles: NDArray[np.int64] = np.zeros(0, np.int64)
        # Images of a turn, and in all, for which the steps are set; (0, 0): not known.
        self._batch = (self.plan.images, self.plan.images)
        self._runner: Runner | None = None
        self.steps: Steps | None = None
        self.straight: StraightPath | None = None
        self.choices: dict[int, Choice] = {}
        self.densities: dict[int, float] = {}
        self.tried: dict[int, tuple[int, dict[str, float]]] = {}

    def revive(self) -> None:
        """In a forked child: torch's own threads are gone, and it does not know it."""
        self.torch_threads, self.is_inherited = 1, True

    def _lowered(self) -> Graph:
        self.captured.derive()
        if self.isa.name == "torch":
            return through_torch(self.captured)
        graph = lower(self.captured)
        if self.at_once is not None:
            groups = self.at_once // self._abreast.images if self._abreast else self.at_once
            for name, shape in graph.shapes.items():
                follows = name not in graph.constants and shape[:1] == (self.batch_size,)
                if follows and name not in self._in_head:
                    is_of_each = name in graph.inputs or (self._abreast and name in self._abreast.entries)
                    count = self.at_once if is_of_each else groups
                    graph.shapes[name] = (count, *shape[1:])
        if self._abreast is not None:
            self._abreast.arrange(graph)
        return graph

    def _take_abreast(self) -> None:
        """Let late layers take several images of a turn side by side, where they can and gain by it; turns may become that much longer."""
        assert self.at_once is not None
        found = find(self.graph, self.isa.lanes) if self.mode != "dense" else None
        if found is None or not found.exits <= self._in_head:
            return
        layers = [
            i for i, o in enumerate(self.graph.operations) if o.output in found.late and o.kind == "conv"
        ]
        # Of dense kernels, those with channels in the lanes see columns, and Winograd's filtering rows.
        if any(self.density(i) > ALWAYS_SPARSE for i in layers):
            return
        each_has_its_own = self.at_once % self.threads == 0
        whole = found.images * (self.threads if each_has_its_own else 1)
        at_once = self.at_once if self.at_once % whole == 0 else self.at_once * found.images
        if self.batch_size % at_once == 0:
            self._abreast, self.at_once = found, at_once

    def _images_at_once(self) -> int | None:
        """How many images of a large batch go through the whole network before the next ones begin; None for all of them.

        Layer by layer, the activations of a large batch would travel to main memory and back between any two layers; those of a few images stay in
        the caches, and in the same few buffers.
        """
        graph, plan, images = self.graph, self.plan, self.batch_size
        returned = [output.name for output in graph.outputs if isinstance(output, Ref)]
        follows = all(graph.shapes.get(name, ())[:1] == (images,) for name in (*graph.inputs, *returned))
        if not plan.is_dynamic or not plan.native or not follows:
            return None
        fitting = int(_CACHED_BYTES * images // max(plan.memory.n_bytes, 1))
        # Whole rounds of the threads: each then has images of its own, even where the caches do not hold so many, unless sharing was found faster.
        if fitting < self.threads <= images and self.threads > 1:
            densities = {i: self.density(i) for i in plan.layers(graph)}
            self.division = f"division {self.mode} {plan.network(graph, densities)}"
            if choice_cache().get(self.division) == SHARED:
                return 1
        fitting = max(fitting // self.threads, 1) * self.threads
        return fitting if fitting < images else None

    def let_go(self) -> None:
        """Forget the parameters that are packed by now, and keep copies of those that torch's part reads.

        The module that they came from may go on training, or be dropped.
        """
        read = {output.name for output in self.graph.outputs if isinstance(output, Ref)}
        for segment in self.plan.segments:
            if isinstance(segment, TorchSegment):
                read.update(segment.operation.references())
            elif isinstance(segment, ImportSegment):
                read.add(segment.value)
        copies: dict[str, Tensor] = {}
        for graph in (self.captured, self.graph):
            constants = graph.constants
            follow = {*self.captured.parameter_names, *(o.output for o in self.captured.derived)}
            for name in [n for n in constants if n in follow]:
                if name not in read:
                    del constants[name]
                    continue
                if name not in copies:
                    copies[name] = constants[name].clone()
                constants[name] = copies[name]

    # ---- weights

    def weight(self, index: int) -> NDArray[np.float32]:
        """The weights of a layer, of which there are none any more once they are packed."""
        weight: NDArray[np.float32] = (
            self.graph.constants[self.graph.operations[index].weight or ""].detach().numpy()
        )
        return weight

    def density(self, index: int) -> float:
        """Nonzeros / weights of a layer."""
        return density_of(self.weight(index))

    def adopt(self, constants: Mapping[str, Tensor]) -> None:
        """Lower the graph again with these in the place of its own; `install` steps for them before anything is run."""
        for operation in self.captured.derived:
            self.captured.constants.pop(operation.output, None)
        self.captured.constants.update(constants)
        self.graph = self._lowered()
        self.plan.adopt(self.graph)

    def state(self) -> tuple[Any, ...]:
        """What `adopt` and new steps change, for `restore`."""
        return dict(self.captured.constants), self.graph, self.choices, self.densities, self.tried, self.steps

    def restore(self, state: tuple[Any, ...]) -> None:
        """Be as `state` found it."""
        self.captured.constants, self.graph, self.choices, self.densities, self.tried, steps = state
        if steps is not None:
            self.install(steps)

    # ---- steps

    def install(self, steps: Steps) -> None:
        """Run these from now on, for a full batch first."""
        from explorer.inference.threads import Runner

        if self._runner is None or steps.scratch_bytes > self._runner.scratch_bytes:
            self._runner = Runner(self.isa, self.threads, len(steps.table), steps.scratch_bytes)
        self._runner.use(steps)
        for one in self.plan.constant:
            view = self.plan.places[one.place].view
            assert view is not None
            view.copy_(self.graph.constants[one.value])
        # Steps that ran before may be set for a smaller batch.
        self.steps, self._batch = steps, (0, 0)
        self._set_batch(self.plan.images, self.plan.images)
        self.straight = self._straight_path(self._runner)

    def _straight_path(self, runner: Runner) -> StraightPath | None:
        segments, outputs = self.plan.segments, self.graph.outputs
        if self.captured.arguments is not None:
            return None
        leaf = object()
        match segments:
            case [ImportSegment(value, place), NativeSegment(0, last)]:
                inputs_fit = self.graph.inputs == [value] and self.graph.dtypes[value] == torch.float32
            case _:
                return None
        if not inputs_fit or len(outputs) != 1 or not isinstance(outputs[0], Ref):
            return None
        if self.graph.unflatten([leaf]) is not leaf:
            return None
        view, result = self.plan.places[place].view, self._home(outputs[0].name)
        if view is None or result is None or view.shape != self.graph.shapes[value]:
            return None
        assert self.steps is not None
        last = self.steps.row_at(last)
        moves = self.steps.moves if self.plan.head_places else []
        head = self.steps.head if self.plan.batch > self.plan.images and moves else last
        return StraightPath.of(view, self.plan.places[place], runner, last, head, moves, result)

    def use_order(self, steps: Steps, order: str) -> None:
        """Run these steps in one of the orders that they know."""
        steps.order, self._batch = order, (0, 0)
        self._set_batch(self.plan.images, self.plan.images)

    def _set_batch(self, images: int, total: int) -> None:
        """Give the steps the jobs of turns of so many images, and the head those of all."""
        if self._batch != (images, total):
            # An interrupt between the two must not leave the table of one batch under the number of another.
            self._batch = (0, 0)
            if self.steps is not None:
                assert self._runner is not None
                self._runner.settle()
                self.steps.set_batch(images, total)
            self._batch = images, total

    # ---- running

    def run_straight(self, straight: StraightPath, x: Tensor) -> Tensor:
        """The answer to an input that the short way takes."""
        at_once = straight.shape[0]
        self._set_batch(at_once, len(x) if straight.has_head else at_once)
        ready, self._batch = self._batch, (0, 0)  # an interrupt may leave addresses moved on
        result = straight.run(x)
        self._batch = ready
        return result

    def run(self, inputs: tuple[Tensor, ...], images: int, times: list[float] | None = None) -> Any:
        """Run the network; with `times`, append the seconds of each segment, and keep the cycles of each step."""
        if self.at_once is None or images <= self.at_once:
            return self.graph.unflatten(self.run_together(inputs, images, times))
        if self.plan.head_places:
            return self.graph.unflatten(self._run_in_turns(inputs, images, times))
        parts, seconds, cycles = [], [], []
        for first in range(0, images, self.at_once):
            some = tuple(value[first : first + self.at_once] for value in inputs)
            mine: list[float] | None = None if times is None else []
            parts.append(self.run_together(some, len(some[0]), mine))
            if mine is not None:
                seconds.append(mine)
                cycles.append(self.cycles)
        if times is not None:
            times += np.sum(seconds, axis=0).tolist()
            self.cycles = np.sum(cycles, axis=0)
        joined = [
            torch.cat(values)
            if isinstance(values[0], Tensor) and not self._is_constant(output)
            else values[0]
            for output, values in zip(self.graph.outputs, zip(*parts, strict=True), strict=True)
        ]
        return self.graph.unflatten(joined)

    def run_together(
        self, inputs: tuple[Tensor, ...], images: int, times: list[float] | None = None
    ) -> list[Any]:
        """The outputs of at most as many images as the plan has room for."""
        plan = self.plan
        # Fewer images are fewer jobs; but torch's part was traced for all, and gets zeros for those that are not there.
        here = images if plan.is_dynamic else plan.images
        if here != images:
            inputs = tuple(
                self._padded(name, value, images)
                for name, value in zip(self.graph.inputs, inputs, strict=True)
            )
        self._set_batch(here, here)
        values = self._run_segments(inputs, len(plan.native), times)
        return [self._output(o, values, images) for o in self.graph.outputs]

    def _run_in_turns(
        self, inputs: tuple[Tensor, ...], images: int, times: list[float] | None = None
    ) -> list[Any]:
        """The outputs of more images: turn by turn up to the head, then the head for all."""
        plan, steps, runner = self.plan, self.steps, self._runner
        assert steps is not None
        assert runner is not None
        seconds, cycles = [], []
        for turn, first in enumerate(range(0, images, plan.images)):
            some = tuple(value[first : first + plan.images] for value in inputs)
            self._set_batch(len(some[0]), images)
            self._batch = (0, 0)
            for move in steps.moves:
                move.to(turn)
            mine: list[float] | None = None if times is None else []
            self._run_segments(some, plan.head, mine)
            if mine is not None:
                seconds.append(mine)
                cycles.append(self.cycles)
        start = time.perf_counter()
        runner.run(steps.head, len(steps.table))
        if times is not None:
            times += np.sum(seconds, axis=0).tolist()
            times[-1] += time.perf_counter() - start
            self.cycles = np.sum(cycles, axis=0)
            self.cycles[plan.head :] = steps.by_step(runner.cycles())[plan.head :]
        return [self._output(o, {}, images) for o in self.graph.outputs]

    def _run_segments(
        self, inputs: tuple[Tensor, ...], last: int, times: list[float] | None = None
    ) -> dict[str, Any]:
        """Run all segments, of native ones only the steps before `last`; the values that torch knows."""
        plan, runner = self.plan, self._runner
        values: dict[str, Any] = dict(zip(self.graph.inputs, inputs, strict=True))
        if times is not None:
            self.forget_cycles()
        for segment in plan.segments:
            start = time.perf_counter() if times is not None else 0.0
            if isinstance(segment, NativeSegment):
                assert runner is not None
                assert self.steps is not None
                runner.run(*(self.steps.row_at(step) for step in (segment.first, min(segment.last, last))))
            elif isinstance(segment, ImportSegment):
                place, value = plan.places[segment.place], self._value(segment.value, values)
                assert place.view is not None
                if not place.borrow(value):
                    view = place.view
                    (view if value.shape == view.shape else view[: value.shape[0]]).copy_(value)
            else:
                o = segment.operation
                args, kwargs = (
                    with_values(part, lambda ref: self._value(ref.name, values))
                    for part in (o.args, o.kwargs)
                )
                values[o.output] = o.target(*args, **kwargs)
            if times is not None:
                times.append(time.perf_counter() - start)
        if times is not None:
            self.keep_cycles()
        return values

    def _padded(self, name: str, value: Tensor, images: int) -> Tensor:
        wanted = self.graph.shapes.get(name)
        if not wanted or value.shape[:1] != (images,) or wanted[0] != self.batch_size:
            return value
        full = torch.zeros(wanted, dtype=value.dtype)
        full[:images] = value
        return full

    def forget_cycles(self) -> None:
        """Have the counters of all steps begin at zero."""
        if self._runner is not None:
            self._runner.forget_cycles()

    def keep_cycles(self) -> None:
        """Take over what the steps took since `forget_cycles`."""
        if self._runner is not None and self.steps is not None:
            self.cycles = self.steps.by_step(self._runner.cycles())

    def room(self, name: str) -> int:
        """Images for which there is room in a value, or a place: in the head those of all turns."""
        if self.plan.root(name) in self.plan.head_places:
            return self.plan.batch
        of_each = {*self.graph.inputs} | (self._abreast.entries if self._abreast else set())
        return self.plan.images if name.partition("@")[0] in of_each else self.plan.groups

    # ---- values

    def _value(self, name: str, values: Mapping[str, Any]) -> Any:
        if name in values:
            return values[name]
        home = self._home(name)
        if home is None:
            return self.graph.constants[name]
        # What torch computes, and what the caller gets, is float32 whatever planes hold.
        return home.float().contiguous() if self._sees_strides else home.float()

    def _home(self, name: str) -> Tensor | None:
        """The value where native code keeps it."""
        place = self.plan.places.get(self.plan.root(name))
        if place is None or place.view is None:
            return None
        # A value that is (N, C) to one reader and (N, C, 1, 1) to another is one place.
        wanted = self.graph.shapes[name]
        return place.view if tuple(place.view.shape) == wanted else place.view.reshape(wanted)

    def _is_constant(self, output: Any) -> bool:
        """Whether an output is a parameter, or follows from parameters, so that no batch changes it."""
        return isinstance(output, Ref) and output.name in self.graph.constants

    def _output(self, output: Any, values: Mapping[str, Any], images: int) -> Any:
        if not isinstance(output, Ref):
            return output
        value = self._value(output.name, values)
        if not isinstance(value, Tensor):
            return value
        room = self.room(output.name)
        if images != room and not self._is_constant(output) and value.dim() > 0 and value.shape[0] == room:
            value = value[:images]
        return value.clone(memory_format=torch.contiguous_format)
