"""Where every tensor lives, and the order in which native and torch segments run.

A `Plan` is made once per network. `explorer.inference.steps` then fills the tables for given weights and kernel choices, and does so again when
only the weights change.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from explorer.inference.abreast import Abreast
from explorer.inference.depth_first import Access, Bands, Step
from explorer.inference.graph import Graph, Operation, Ref
from explorer.inference.kernels.registers import LARGEST_SHUFFLED, MANY_REGISTERS, linear_room, pair_parts
from explorer.inference.larger_kernels import SHORT, has_programs
from explorer.inference.layout import (
    Layout,
    PitchClasses,
    Planes,
    Vectors,
    channel_columns,
    channel_tile,
    tile_of,
)
from explorer.inference.memory import Memory, address
from explorer.inference.native import Isa, generator_version, l2_bytes
from explorer.inference.taps import Taps
from explorer.inference.winograd import Chunks, Filter

_INFINITY = float("inf")

_ONE_PITCH = ("linear", "add", "mul", "affine", "clamp", "activation", "concat", "slice", "layer_norm")
"""Operations (besides convolutions) whose operands and result must share their pitch."""

_ELEMENTWISE = ("add", "mul", "affine", "clamp", "activation")

_LARGE = 1.0
"""Operands and result of a step for one image, in level 2 caches, beyond which it may run band by band (0.5 to 1.5 alike within 2 %)."""

_FEW_VECTORS = 4
"""Vectors of pixels up to which programs of more than one tap read copies of their operands that lie at the beginning of cache lines."""

ALWAYS_DENSE, ALWAYS_SPARSE = 0.75, 0.2
"""Densities (nonzeros / weights) beyond which one kind of kernel is not timed: no sparse kernel has been seen to win above the first, no dense one
below the second (the closest was a tie at 0.3)."""


@dataclass(frozen=True, slots=True)
class Choice:
    """How one convolution or linear layer runs: by a dense or a sparse kernel, how it reaches its operands, and whether in pairs of channels or as code."""

    dense: bool
    reach: str = "direct"
    pairs: bool = False
    code: bool = False

    @property
    def label(self) -> str:
        kind = "dense" if self.dense else "code" if self.code else "sparse pairs" if self.pairs else "sparse"
        return kind + ("" if self.reach == "direct" else f", {self.reach}")


@dataclass(frozen=True, slots=True)
class NativeSegment:
    """Steps [first, last) in one native call."""

    first: int
    last: int


@dataclass(frozen=True, slots=True)
class TorchSegment:
    """One operator through torch; when `into` is set its result is copied to that native tensor."""

    operation: Operation


@dataclass(frozen=True, slots=True)
class ImportSegment:
    """Copy a torch value to its native place."""

    value: str
    place: str


Segment = NativeSegment | TorchSegment | ImportSegment


@dataclass(slots=True)
class Place:
    """A tensor's home in native memory."""

    layout: Layout
    start: int = 0
    view: torch.Tensor | None = None
    cell: NDArray[np.int64] | None = None  # where kernels find the address of a tensor that may lie elsewhere
    skipped: int = 0  # bytes from there to the first image

    @property
    def address(self) -> int:
        """Address of the first pixel of the first plane, or of the first value."""
        return self.start + self.layout.element_bytes * self.layout.before

    def borrow(self, value: torch.Tensor) -> bool:
        """Let kernels read `value` where it lies, until the next call; False, and they read this place, when it does not lie as they need it."""
        if self.cell is None:
            return False
        fits = (
            value.__class__ is torch.Tensor
            and value.dtype == torch.float32
            and value.shape[1:] == self.layout.shape[1:]
            and value.is_contiguous()
            and not value.is_neg()
        )
        self.cell[0] = value.data_ptr() if fits else self.address
        return fits


def density_of(weight: NDArray[np.float32]) -> float:
    """Nonzeros / weights."""
    # On booleans numpy counts ten times as fast as on floats.
    return float(np.count_nonzero(weight != 0)) / max(weight.size, 1)


def _joins_channels(operation: Operation) -> bool:
    """Whether an operation is a convolution of all channels, or a linear layer."""
    a = operation.attributes
    return operation.kind in ("conv", "linear") and not a.get("depthwise") and a.get("groups", 1) == 1


def _is_pointwise(graph: Graph, operation: Operation, position: int) -> bool:
    """Whether its operand at `position` is the input of a 1 x 1 convolution, or of a linear layer."""
    if position or not _joins_channels(operation):
        return False
    a, taps = operation.attributes, graph.shapes[operation.weight or ""][2:]
    return prod(taps) == 1 and len(a.get("phases", ((0, 0),))) == 1 and not operation.is_padded


def _writes_tiles(operation: Operation, y: Planes) -> bool:
    """Whether the kernel of an operation can leave its result in tiles."""
    a = operation.attributes
    if operation.kind == "split":
        return y.takes_rows
    if a.get("depthwise"):
        return y.takes_rows or a["stride"] == (1, 1)
    if operation.kind in _ELEMENTWISE:
        activation = a.get("activation")
        by_channel = operation.kind == "affine" or "one_value" in a
        return not by_channel and not (activation and activation.moves_zero)
    return operation.kind == "layer_norm" or _joins_channels(operation)


def _reads_tiles(graph: Graph, tiled: Planes, operation: Operation, position: int) -> bool:
    """Whether the kernel of an operation finds its operand in tiles."""
    if _joins_channels(operation):
        return position > 0 or _is_pointwise(graph, operation, position)
    if operation.kind == "plane_average":
        return tiled.vectors == tiled.tile
    if operation.kind == "split":
        return True
    return not operation.attributes.get("depthwise") and _writes_tiles(operation, tiled)


_CHANGES = {
    "plane_average": ("planes", "vectors"),
    "flatten": ("planes", "vectors"),
    "token": ("tokens", "vectors"),
    "to_tokens": ("planes", "tokens"),
    "to_planes": ("tokens", "planes"),
}
"""Operations that change the layout family: that of their operand, and that of their result."""

VECTOR_MAKERS = tuple(kind for kind, (_, made) in _CHANGES.items() if made == "vectors")
"""Operations that turn planes, or tokens, into vectors."""


class Plan:
    """Layouts, buffers and the order of execution of a lowered graph.

    Parameters
    ----------
    graph : Graph
        Lowered.
    isa : Isa
    threads : int
        Work is cut so that this many threads find jobs in each step.
    batch : int, optional
        Images of a whole call, when they go through in turns: `head` tells which steps come after all turns.
    mode : str
        Which kernels layers may have: "auto", "sparse" or "dense".
    abreast : Abreast, optional
        The layers that take several images side by side. The first dimension of the tensors of `graph`, which is arranged for it, then counts groups of so many, except
        that of inputs, and of what the head knows.

    Attributes
    ----------
    images : int
        Images that go through the network together.
    groups : int
        Groups of images that those are: each of one image, but where late layers take several side by side.
    head : int
        The first of the steps at the end that know vectors only (a classifier after pooling). In turns, the steps before it leave the vectors of each turn
        behind those of the turn before, and the head takes all of them at once: its weights, most of what it reads, come from afar once.
    constant : list of ImportSegment
        What is the same in each call, and has to be copied only when there are new weights.
    unclean : frozenset of str
        Places whose gaps must be zero, and in whose memory something else lies before them.
    """

    def __init__(
        self,
        graph: Graph,
        isa: Isa,
        threads: int,
        batch: int | None = None,
        mode: str = "auto",
        abreast: Abreast | None = None,
    ) -> None:
        self.isa, self.threads, self._mode, self.abreast = isa, threads, mode, abreast
        self.images = (
            graph.shapes[graph.inputs[0]][0] if graph.inputs and graph.shapes.get(graph.inputs[0]) else 1
        )
        self.groups = self.images // abreast.images if abreast else self.images
        self.batch = batch or self.images
        self.places: dict[str, Place] = {}
        self.native: list[int] = []  # indices into graph.operations, one per step
        self.segments: list[Segment] = []
        self.constant: list[ImportSegment] = []
        self._alias: dict[str, str] = {}
        self._family: dict[str, str] = {}
        # place -> the place it is a range of, and its first channel there
        self._range_of: dict[str, tuple[str, int]] = {}
        self._decide(graph)
        self._kinds = {operation.output: operation.kind for operation in graph.operations}
        self._share(graph)
        self.head, self.head_places = self._find_head(graph)
        self._lay_out(graph)
        self._tile(graph)
        self._allocate(graph)
        self.is_dynamic = not any(isinstance(s, TorchSegment) for s in self.segments) and all(
            self.follows_batch(p.layout) for p in self.places.values()
        )

    def follows_batch(self, layout: Layout) -> bool:
        """Whether the first axis of this tensor is the batch, so that a smaller batch needs fewer jobs."""
        return layout.images in (self.images, self.groups, self.batch) and not (
            isinstance(layout, Planes) and layout.tokens
        )

    # ---- which operations are native, and in which layout family each value is needed

    def _fits(self, operation: Operation, graph: Graph) -> str | None:
        """The layout family in which this operation can run natively: "planes", "tokens", "vectors"; None for torch."""
        shapes = [graph.shapes.get(name, ()) for name in operation.inputs]
        if not shapes or any(len(s) == 0 or 0 in s for s in shapes):
            return None
        if any(graph.dtypes.get(name) != torch.float32 for name in operation.inputs):
            return None
        shape = shapes[0]
        # An operation that carries a residual or a clamp must find a family here: its torch form knows nothing of them.
        if operation.kind == "conv":
            weight = graph.constants[operation.weight or ""]
            is_vector = len(shape) == 4 and shape[2:] == (1, 1) and weight.shape[2:] == (1, 1)
            plain = (
                len(operation.inputs) == 1 and not operation.is_padded and operation.attributes["groups"] == 1
            )
            return "vectors" if is_vector and plain else "planes"
        if operation.kind == "linear":
            return "vectors" if len(shape) == 2 else "tokens"
        if operation.kind in ("layer_norm", "attention"):
            return "tokens"
        if operation.kind in ("max_pool", "average_pool", "adaptive_average", "split"):
            return "planes"
        if operation.kind in _CHANGES and operation.kind != "flatten":
            return _CHANGES[operation.kind][0]
        if operation.kind == "upsample":
            return None if self.isa.lanes % operation.attributes["scale"][1] else "planes"
        families = {self._family.get(self.root(name)) for name in operation.inputs}
        if operation.kind in ("concat", "slice", "flatten"):
            return "planes" if "planes" in families else None
        if operation.kind == "affine" and operation.attributes["axis"] is not None:
            return self._affine_family(operation, families, len(shape))
        if operation.kind in ("add", "mul", "affine", "clamp", "activation"):
            native = families - {None}
            if native and "one_value" in operation.attributes:
                return "planes"
            if len(native) == 1:
                return next(iter(native))
            carries = operation.kind not in ("clamp", "activation") and {"low", "activation"} & {
                *operation.attributes
            }
            if native or carries:
                return {2: "vectors", 3: "tokens", 4: "planes"}.get(len(shape))
        return None

    @staticmethod
    def _affine_family(operation: Operation, families: set[str | None], rank: int) -> str | None:
        """Where the channels of a scale and shift are what the layout calls channels."""
        if rank == 2 or families == {"vectors"}:
            return "vectors"
        if operation.attributes["axis"] == 1:
            return "planes" if rank in (3, 4) else None
        return "tokens" if rank > 2 else None

    def root(self, name: str) -> str:
        """The value whose memory `name` is another name of."""
        while name in self._alias:
            name = self._alias[name]
        return name

    def _decide(self, graph: Graph) -> None:
        """Order of segments; imports are put right before the first native step that needs them."""
        imported: set[str] = set()
        for index, operation in enumerate(graph.operations):
            if operation.kind == "same":
                source = self.root(operation.inputs[0])
                if self._family.get(source) == "vectors":
                    self._alias[operation.output] = source
                    continue
                operation.kind = "flatten" if len(graph.shapes[operation.output]) == 2 else "torch"
            family = self._fits(operation, graph)
            if family is None:
                operation.kind = "torch"
                self.segments.append(TorchSegment(operation))
                continue
            for name, place in self._operands(operation, family):
                if place not in imported and place != self.root(name):
                    imported.add(place)
                    where = self.constant if name in graph.constants else self.segments
                    where.append(ImportSegment(name, place))
            self._family[operation.output] = self._output_family(operation, family)
            last = self.segments[-1] if self.segments else None
            step = len(self.native)
            if isinstance(last, NativeSegment):
                self.segments[-1] = NativeSegment(last.first, step + 1)
            else:
                self.segments.append(NativeSegment(step, step + 1))
            self.native.append(index)

    @staticmethod
    def _output_family(operation: Operation, family: str) -> str:
        return _CHANGES[operation.kind][1] if operation.kind in _CHANGES else family

    def _operands(self, operation: Operation, family: str) -> list[tuple[str, str]]:
        """The inputs of an operation that works in `family`, and the places where it reads them."""
        families = [family] * len(operation.inputs)
        if "one_value" in operation.attributes:
            families[1] = "vectors"
        return [(n, self.place_name(n, f)) for n, f in zip(operation.inputs, families, strict=True)]

    def _is_late(self, place: str) -> bool:
        return self.abreast is not None and place in self.abreast.late

    def order(self, graph: Graph) -> list[tuple[int, int | None]]:
        """Steps as they are run, the same step perhaps more than once: pairs of a step and its turn, see `explorer.inference.abreast`."""
        if self.abreast is None:
            return [(step, None) for step in range(len(self.native))]
        return self.abreast.turns([graph.operations[index] for index in self.native])

    def seen(self, place: str, turn: int | None) -> Place:
        """A place as the layers see it that compute one of the images that late layers take side by side."""
        home, layout = self.places[place], self.places[place].layout
        if turn is None or self.abreast is None:
            return home
        n_bytes = turn * layout.image_bytes
        if isinstance(layout, Vectors):
            if place not in self.abreast.exits:
                return home
            each = replace(layout, stride=self.abreast.images * layout.stride)
            return replace(home, layout=each, start=home.start + n_bytes)
        if self._is_late(place):
            shape = (*layout.shape[:-1], layout.image_columns)
            alone = replace(layout, shape=shape, columns=layout.image_columns, abreast=1)
            return replace(home, layout=alone, start=home.start + turn * layout.slot * layout.element_bytes)
        if layout.images == self.images:
            apart = self.abreast.images * layout.image
            mine = replace(layout, images=self.groups, apart=apart)
            return replace(home, layout=mine, start=home.start + n_bytes, skipped=n_bytes)
        return home

    def differs(self, operation: Operation) -> bool:
        """Whether the turns of an operation differ in what they read or write."""
        places = (*self.operands(operation), operation.output)
        return any(self.seen(place, 1).start != self.places[place].start for place in places)

    def operands(self, operation: Operation) -> list[str]:
        """The places that a native operation reads."""
        return [place for _, place in self._operands(operation, self.step_family(operation))]

    def place_name(self, name: str, family: str) -> str:
        """The key of a value's native home in a family; a value that lives elsewhere gets a second home by an import."""
        root = self.root(name)
        return root if self._family.get(root) == family else f"{root}@{family}"

    def adopt(self, graph: Graph) -> None:
        """Make a freshly lowered graph of the same structure run in the places of this plan."""
        for operation in graph.operations:
            operation.kind = self._kinds[operation.output]

    def _find_head(self, graph: Graph) -> tuple[int, frozenset[str]]:
        """The first step of the head, and the places of all images at once: what it reads and makes. Without a head: the number of steps, and none."""
        steps = [graph.operations[index] for index in self.native]
        first = len(steps)
        while first and self.step_family(steps[first - 1]) == "vectors":
            first -= 1
        made = {operation.output for operation in steps[first:]}
        read = {place for operation in steps[first:] for place in self.operands(operation)} - made
        makers = {o.output for o in steps[:first] if o.kind in VECTOR_MAKERS}
        others = {place for operation in steps[:first] for place in self.operands(operation)}
        returned = {self.root(output.name) for output in graph.outputs if isinstance(output, Ref)}
        if not made or not read <= makers - others or not returned <= made:
            return len(steps), frozenset()
        return first, frozenset(made | read)

    # ---- layouts

    def step_family(self, operation: Operation) -> str:
        """The layout family of the operands of a native operation."""
        return _CHANGES[operation.kind][0] if operation.kind in _CHANGES else self._family[operation.output]

    # ---- concatenations and slices

    def _share(self, graph: Graph) -> None:
        """Let slices be read where they lie, and what is concatenated be written where the concatenation lies.

        From the last concatenation to the first, so that in a dense block (each layer reads all layers before it) the largest takes all its
        parts in, and the smaller ones, whose parts then lie side by side already, are ranges of it. A part that has a place elsewhere
        (it stands twice in one concatenation, or first in two) is copied, see `explorer.inference.kernels.copy_planes`.
        """
        native = [graph.operations[index] for index in self.native]
        for operation in native:
            if operation.kind == "slice":
                self._range_of[operation.output] = (
                    self.operands(operation)[0],
                    operation.attributes["first"],
                )
        for operation in reversed(native):
            if operation.kind != "concat":
                continue
            out, parts = operation.output, self.operands(operation)
            channels = [graph.shapes[name][1] for name in operation.inputs]
            firsts = np.cumsum([0, *channels[:-1]]).tolist()
            found = [self.located(place) for place in parts]
            start = found[0][1]
            side_by_side = found == [(found[0][0], start + first) for first in firsts]
            if side_by_side and out not in self._range_of:
                self._range_of[out] = found[0]
                continue
            whole = self.located(out)[0]
            for place, first in zip(parts, firsts, strict=True):
                if place not in self._range_of and place != whole:
                    self._range_of[place] = (out, first)

    def located(self, place: str) -> tuple[str, int]:
        """The place with memory of its own that holds this one, and the channel of it at which this one begins."""
        first = 0
        while place in self._range_of:
            place, more = self._range_of[place]
            first += more
        return place, first

    def _lay_out(self, graph: Graph) -> None:
        classes = PitchClasses()
        sizes: dict[str, tuple[tuple[int, ...], int, int, int, int, bool]] = {}
        vectors: dict[str, tuple[tuple[int, ...], int]] = {}

        def meet(place: str, shape: tuple[int, ...], family: str) -> None:
            if family == "vectors":
                vectors.setdefault(place, (shape, 0))
                return
            if place in sizes:
                return
            if family == "tokens":
                pixels = int(np.prod(shape[:-1]))
                sizes[place] = (shape, 1, shape[-1], 1, pixels, True)
            else:
                if self.abreast and self._is_late(place):
                    shape = (*shape[:-1], self.abreast.columns)
                rows = shape[2] if len(shape) == 4 else 1
                sizes[place] = (shape, shape[0], shape[1], rows, shape[-1], False)
            classes.add(place, sizes[place][3], sizes[place][4])
            if self.abreast and self._is_late(place):
                # Each image has a gap of its own.
                classes.pad(place, 0, self.abreast.period - self.abreast.size[1])

        for index in self.native:
            operation = graph.operations[index]
            family = self.step_family(operation)
            ins = self.operands(operation)
            for i, (name, place) in enumerate(zip(operation.inputs, ins, strict=True)):
                one_value = i == 1 and "one_value" in operation.attributes
                meet(place, graph.shapes[name], "vectors" if one_value else family)
            out = operation.output
            meet(out, graph.shapes[out], self._family[out])
            if family == "vectors":
                continue
            a = operation.attributes
            # The zeros of one side serve the other as well.
            zeros = [
                max(sides)
                for sides in zip(a.get("padding", ()), a.get("beyond", a.get("padding", ())), strict=True)
            ]
            if a.get("depthwise"):
                if a["stride"] == (1, 1):
                    classes.tie(ins[0], out)
                classes.pad(ins[0], *zeros)
            elif operation.kind == "conv":
                for place in ins:
                    classes.tie(place, out)
                # In phases, a padding of p pixels is one of p / stride, rounded up.
                rows, columns = (-(-p // s) for p, s in zip(zeros, a["stride"], strict=True))
                classes.pad(ins[0], rows, columns, masked=bool(columns) and self._may_mask(graph, operation))
            elif operation.kind in _ONE_PITCH:
                for place in ins[:1] if "one_value" in a else ins:
                    classes.tie(place, out)
        self._borrowed = self._readable_in_place(graph)
        added = self._added_to_scores(graph)
        for place, (shape, images, channels, rows, columns, tokens) in sizes.items():
            sharing = self.threads_on_an_image(images)
            layout = classes.planes(place, shape, images, channels, rows, columns, self.isa, tokens, sharing)
            if place in self._borrowed:
                layout = replace(layout, pitch=columns, plane=rows * columns, guard=0, element_bytes=4)
            if place in added:
                layout = replace(layout, element_bytes=4)  # scores are float32 whatever planes hold
            if self.abreast and self._is_late(place):
                layout = replace(layout, abreast=self.abreast.images, slot=self.abreast.period)
                assert layout.pitch == layout.abreast * layout.slot
            self.places[place] = Place(layout)
        for place in self._range_of:
            home, whole = self.places[place], self.places[self.located(place)[0]].layout
            assert isinstance(home.layout, Planes)
            assert isinstance(whole, Planes)
            assert home.layout.plane == whole.plane
            home.layout = replace(home.layout, of_channels=whole.channels)
        for place, (shape, _) in vectors.items():
            # Dense kernels write whole groups of vectors. What comes from planes is written in vectors as long as theirs.
            lanes, single = self.isa.lanes, self.isa.single.lanes
            stride = -(-linear_room(-(-shape[1] // single)) * single // lanes) * lanes
            self.places[place] = Place(Vectors(shape, shape[0], shape[1], stride))

    def _added_to_scores(self, graph: Graph) -> set[str]:
        """Where attention reads what it adds to its scores: torch makes it, see `explorer.inference.attention_masks`."""
        attentions = [graph.operations[i] for i in self.native if graph.operations[i].kind == "attention"]
        return {place for one in attentions for place in self.operands(one)[3:]}

    def threads_on_an_image(self, images: int) -> int:
        """Threads that share an image of so many, unless each has images of its own."""
        return self.threads if images % self.threads else 1

    def _may_mask(self, graph: Graph, operation: Operation) -> bool:
        """Whether the kernel of a convolution zeroes what lies beyond the ends of rows itself, if there is no gap between them.

        Only what is copied is zeroed, and only sparse kernels lose nothing by copying. (Programs, which AVX-512 has, need not copy either.)
        """
        groups, weight = operation.attributes["groups"], graph.constants[operation.weight or ""]
        if has_programs(self.isa) or self._mode == "dense" or 1 < groups == weight.shape[0]:
            return False
        return density_of(weight.detach().numpy()) <= ALWAYS_SPARSE

    def reaches_over(self, graph: Graph, operation: Operation) -> bool:
        """Whether a convolution in planes reads beyond the ends of rows between which there is no gap."""
        x, y = (self.places[place].layout for place in (self.operands(operation)[0], operation.output))
        if operation.kind != "conv" or not isinstance(x, Planes) or not isinstance(y, Planes):
            return False
        if operation.attributes.get("depthwise"):
            return False  # its kernel needs the gaps
        taps = Taps.of(operation.attributes, graph.shapes[operation.weight or ""][2:])
        return taps.reach_over(x.columns, y.columns, x.pitch)

    def _readable_in_place(self, graph: Graph) -> set[str]:
        """Inputs that kernels may read where the caller has them: by splits alone, which read whole rows and nothing behind their ends."""
        found = {s.place for s in self.segments if isinstance(s, ImportSegment) and s.value in graph.inputs}
        for index in self.native:
            operation = graph.operations[index]
            if operation.kind != "split" or not self._reads_rows_alone(graph, operation):
                found -= {*self.operands(operation)}
        return found

    def _reads_rows_alone(self, graph: Graph, operation: Operation) -> bool:
        """Whether a split can read float32 rows, and nothing behind their ends."""
        columns, phase_columns = graph.shapes[operation.inputs[0]][-1], graph.shapes[operation.output][-1]
        stride = operation.attributes["stride"][1]
        if self.isa.precision == "fp16":
            # What lies behind is masked, for which other CPUs have no instruction.
            return self.isa.name == "avx512" and stride <= LARGEST_SHUFFLED
        return -(-phase_columns // self.isa.lanes) * self.isa.lanes * stride <= columns

    # ---- tiles

    def _tile(self, graph: Graph) -> None:
        """Let what 1 x 1 convolutions and linear layers read lie tile by tile, see `explorer.inference.layout`, where all that touch it can."""
        kept = self._pinned(graph) | {*self._range_of} | {self.located(place)[0] for place in self._range_of}
        readers: dict[str, list[tuple[Operation, int]]] = {}
        tiled: dict[str, Planes] = {}
        for operation in (graph.operations[index] for index in self.native):
            for position, place in enumerate(self.operands(operation)):
                readers.setdefault(place, []).append((operation, position))
            layout = self.places[operation.output].layout
            if operation.output in kept or not isinstance(layout, Planes):
                continue
            # Of tokens, one thread chooses other tiles for each layer.
            if self.threads == 1 and layout.tokens:
                continue
            candidate = layout.in_tiles(self.threads_on_an_image(layout.images))
            if candidate is not None and not layout.is_compactable and _writes_tiles(operation, candidate):
                tiled[operation.output] = candidate
        for place in [*tiled]:
            mine = readers.get(place, [])
            # An image is split into all its phases faster from planes.
            only_split = all(one.kind == "split" for one, _ in mine)
            readable = all(_reads_tiles(graph, tiled[place], *one) for one in mine)
            if only_split or not readable:
                del tiled[place]
        # All tensors of an elementwise operation lie alike: one that cannot takes the others with it, and so on.
        together = [
            {*self.operands(operation), operation.output}
            for operation in (graph.operations[index] for index in self.native)
            if operation.kind in _ELEMENTWISE
        ]
        while broken := [places for places in together if 0 < len(places & tiled.keys()) < len(places)]:
            for place in set().union(*broken) & tiled.keys():
                del tiled[place]
        for place, layout in tiled.items():
            self.places[place].layout = layout

    # ---- buffers

    def _pinned(self, graph: Graph) -> set[str]:
        """Places that torch or the caller may see, or write."""
        pinned = {s.place for s in (*self.segments, *self.constant) if isinstance(s, ImportSegment)}
        for segment in self.segments:
            if isinstance(segment, TorchSegment):
                # torch may return a view of what it was given: such memory is never given away
                pinned.update(self.root(n) for n in segment.operation.references())
            if isinstance(segment, ImportSegment):
                pinned.add(self.root(segment.value))
        pinned.update(self.root(o.name) for o in graph.outputs if isinstance(o, Ref))
        return pinned

    def _allocate(self, graph: Graph) -> None:
        """Give each place memory, which places share when their lives do not overlap."""
        self.memory = Memory()
        last_use: dict[str, float] = {}
        pinned = self._pinned(graph)
        for step, index in enumerate(self.native):
            for place in self.operands(graph.operations[index]):
                last_use[place] = step
        born = {graph.operations[index].output: step for step, index in enumerate(self.native)}
        # Ranges of one place live together: from the first that is written to the last that is read.
        lives: dict[str, tuple[float, float]] = {}
        for place in self.places:
            start = born.get(place, -1)
            end = _INFINITY if place in pinned else last_use.get(place, born.get(place, _INFINITY))
            if place in self.head_places and self.batch > self.images:
                start, end = -1, _INFINITY  # what one turn leaves there, the next must not touch
            if self.abreast and place in self.abreast.entries:
                # Nor the layers of the next image what there is of this one; and late layers, of which there are fewer images, would write over those of other groups, which
                # another thread may not have read yet.
                start, end = -1, _INFINITY
            whole = self.located(place)[0]
            before = lives.get(whole, (start, end))
            lives[whole] = (min(before[0], start), max(before[1], end))
        takes_over = self._in_place(graph, lives)
        owners = self._sharing(graph, lives, takes_over)
        self.unclean = self._find_unclean(graph, owners)
        for names in owners:
            self._set_apart(names)
            size = max(self.places[name].layout.elements for name in names)
            array = self.memory.zeros(size, f"f{self.places[names[0]].layout.element_bytes}")
            storage = torch.from_numpy(array)
            for home in (self.places[name] for name in names):
                home.start, home.view = address(array), home.layout.view(storage)
            for place in self._range_of:
                whole, first = self.located(place)
                if whole in names:
                    home = self.places[place]
                    assert isinstance(home.layout, Planes)
                    skipped = first * home.layout.plane
                    home.start = address(array) + home.layout.element_bytes * skipped
                    home.view = home.layout.view(storage, skipped)

        for place in self._borrowed:
            self.places[place].cell = self.memory.zeros(1, np.int64)
            self.places[place].borrow(torch.empty(0))
        self.memory.trim()

    def _sharing(
        self, graph: Graph, lives: Mapping[str, tuple[float, float]], takes_over: Mapping[str, str]
    ) -> list[list[str]]:
        """Which places share memory: the largest first, so that small ones find room in what large ones need anyway.

        What takes over an operand's memory shares its fate. A place that torch or the caller may see shares with nobody.
        """
        heads: dict[str, str] = {}
        units: dict[str, list[str]] = {}
        for place in sorted(lives, key=lambda p: lives[p][0]):
            heads[place] = head = heads.get(takes_over.get(place, ""), place)
            units.setdefault(head, []).append(place)

        def life(names: list[str]) -> tuple[float, float]:
            return min(lives[n][0] for n in names), max(lives[n][1] for n in names)

        def size(names: list[str]) -> int:
            return max(self.places[n].layout.elements for n in names)

        shares = self._may_share(graph)
        slots: dict[tuple[Any, ...], list[list[list[str]]]] = {}
        for names in sorted(units.values(), key=lambda names: (-size(names), life(names))):
            layout, (start, end) = self.places[names[0]].layout, life(names)
            if shares >= {*names}:
                what: tuple[Any, ...] = ("planes",)
            else:
                what = (*layout.reuse_key, layout.image_bytes if self.images > 1 else 0)
            mine = slots.setdefault(what, [])
            free = [
                slot
                for slot in mine
                if end != _INFINITY and all(until < start or end < since for since, until in map(life, slot))
            ]
            if free:
                free[0].append(names)
            else:
                mine.append([names])
        return [
            sorted((n for names in slot for n in names), key=lambda n: lives[n][0])
            for group in slots.values()
            for slot in group
        ]

    def _may_share(self, graph: Graph) -> set[str]:
        """Planes that may lie in the same memory as any others: one step writes them, which can see to it that their gaps are zero."""
        planes = {place for place, home in self.places.items() if isinstance(home.layout, Planes)}
        in_parts = {*self._range_of} | {self.located(place)[0] for place in self._range_of}
        return planes - in_parts - self._pinned(graph)

    def _set_apart(self, names: list[str]) -> None:
        """Let the images of tensors in the same memory coincide: each goes its way at its own pace, and must not meet another."""
        layouts = [layout for n in names if isinstance(layout := self.places[n].layout, Planes)]
        # Of different layouts, the zeros in front of an image must not be pixels of the image before it either.
        if self.images > 1 and len({(layout.image, layout.reuse_key) for layout in layouts}) > 1:
            apart = max(layout.before + layout.image for layout in layouts)
            for n, layout in zip(names, layouts, strict=True):
                self.places[n].layout = replace(layout, apart=apart)

    def _find_unclean(self, graph: Graph, owners: list[list[str]]) -> frozenset[str]:
        """Places whose gaps have to be zeroed; of each owner its tenants, one after the other."""
        harmless = self._gaps_do_not_matter(graph)

        def leaves_zeros(before: str, place: str) -> bool:
            a, b = self.places[before].layout, self.places[place].layout
            return before not in harmless and a.reuse_key == b.reuse_key and a.elements >= b.elements

        found = set()
        for names in owners:
            # The last one of a run comes before the first one of the next. So does the last one of a turn, where layers take turns.
            pairs = [*zip([names[-1], *names], names, strict=False)]
            if self.abreast and (in_turns := [n for n in names if n not in self.abreast.late]):
                pairs.append((in_turns[-1], in_turns[0]))
            for before, place in pairs:
                is_planes = isinstance(self.places[place].layout, Planes)
                if is_planes and place not in harmless and not leaves_zeros(before, place):
                    found.add(place)
        return frozenset(found)

    def _gaps_do_not_matter(self, graph: Graph) -> set[str]:
        """Places in tiles, and planes whose readers look at pixels only, or at each element for itself: whatever lay in their memory before does no harm.

        Those are maxima, and 1 x 1 convolutions, what comes of which in the gaps is zeroed, or lies in tiles.
        """
        found = {p for p, home in self.places.items() if isinstance(home.layout, Planes) and home.layout.tile}
        harmless: dict[str, bool] = {}
        for operation in (graph.operations[index] for index in self.native):
            for position, place in enumerate(self.operands(operation)):
                may = operation.kind == "max_pool" or _is_pointwise(graph, operation, position)
                harmless[place] = harmless.get(place, True) and may
        ranges = {*self._range_of} | {self.located(place)[0] for place in self._range_of}
        pinned = self._pinned(graph)
        return found | {place for place, may in harmless.items() if may} - ranges - pinned

    def _in_place(self, graph: Graph, lives: dict[str, tuple[float, float]]) -> dict[str, str]:
        """Results that may overwrite an operand which nobody reads afterwards: result -> operand.

        What is added to a convolution is read just before the sum is stored in the same place, so that it need not be fetched and evicted twice: the
        caches' bandwidth is what large activations cost.
        """
        found: dict[str, str] = {}
        for step, index in enumerate(self.native):
            operation = graph.operations[index]
            out = operation.output
            layout = self.places[out].layout
            places = [self.located(place)[0] for place in self.operands(operation)]
            wholes = [place for place in self.operands(operation) if place not in self._range_of]
            added = {"conv": wholes[1:], "linear": wholes[1:]} | dict.fromkeys(_ELEMENTWISE, wholes)
            # Where the last tile computes pixels again, it would add to them again. Ranges of a place come and go with the whole.
            is_whole = lives.get(out, (-1,))[0] == step
            overlaps = (
                operation.kind in ("conv", "linear") and isinstance(layout, Planes) and layout.tiles_overlap
            )
            if overlaps or not is_whole:
                continue
            for place in added.get(operation.kind, []):
                # An operand that the convolution itself reads, other than by adding it, must stay.
                dies = lives[place][1] == step and places.count(place) == 1
                if dies and self.places[place].layout.reuse_key == layout.reuse_key:
                    found[out] = place
                    break
        return found

    # ---- depth first

    def deep(self, graph: Graph, can: Sequence[bool]) -> list[tuple[int, int]]:
        """Ranges of steps to be run band by band, see `explorer.inference.depth_first`: between tensors that the cache of a core does not hold.

        Only where each thread has images of its own. `can`: which steps can be cut into bands.
        """
        if self.groups < self.threads:
            return []
        wholes = {self.located(place)[0] for place in self._range_of}
        found: list[list[int]] = []
        for segment in self.segments:
            if not isinstance(segment, NativeSegment):
                continue
            range_: list[int] = []  # of steps that can, from a large one to the last large one so far
            for step in range(segment.first, segment.last):
                operation = graph.operations[self.native[step]]
                places = [*self.operands(operation), operation.output]
                layouts = [self.places[place].layout for place in places]
                if (
                    not can[step]
                    or self._is_late(operation.output)  # its rows do not follow those of the steps before it
                    or not all(self.follows_batch(layout) for layout in layouts)
                    or {*places} & (wholes | {*self._range_of})
                ):
                    range_ = []
                elif sum(layout.n_bytes for layout in layouts) > self.groups * l2_bytes() * _LARGE:
                    if range_:
                        range_[1] = step + 1
                    else:
                        range_ = [step, step + 1]
                        found.append(range_)
        return [(first, last) for first, last in found if last - first > 1]

    def accesses(self, graph: Graph, step: int, bands: Bands) -> Step:
        """What the bands of a step touch."""
        operation = graph.operations[self.native[step]]

        def access(place: str, intervals: NDArray[np.int64]) -> Access:
            home = self.places[place]
            y = home.layout
            assert isinstance(y, Planes)
            # Where the first pixel lies counts too: zeros around it may be more or fewer.
            alike = (home.address, y.tile, y.tile and y.channels, y.plane, y.pitch)
            return Access(home.start, alike, intervals)

        operands = self.operands(operation)
        return Step(
            tuple(access(place, intervals) for place, intervals in zip(operands, bands.reads, strict=True)),
            access(operation.output, bands.writes),
        )

    # ---- choices

    def candidates(
        self,
        graph: Graph,
        index: int,
        mode: str,
        density: float,
        *,
        paired: bool = False,
        code: bool = False,
        winograd: bool = False,
    ) -> list[Choice]:
        """The kernels worth timing for operation `index`, `density` of whose weights are not zero; best guess first.

        Parameters
        ----------
        graph : Graph
        index : int
        mode : str
        density : float
        paired : bool
            Whether the weights come in pairs of output channels.
        code : bool
            Whether it may become a program, see `may_be_code`.
        winograd : bool
            Whether Winograd's filtering may compute it, see `may_be_winograd`.
        """
        operation = graph.operations[index]
        if operation.kind not in ("conv", "linear"):
            return [Choice(True)]
        taps = graph.shapes[operation.weight or ""][2:]
        forms, dense_forms = ["direct"], None
        a = operation.attributes
        if operation.kind == "conv" and self._family[operation.output] == "planes":
            if a.get("depthwise"):
                return [Choice(True, "depthwise")]
            if 1 < a["groups"] == graph.shapes[operation.output][1]:
                return [Choice(False)]  # one output channel of a group has nobody to share operands with
            out = self.places[operation.output].layout
            assert isinstance(out, Planes)
            reaches_over = self.reaches_over(graph, operation)
            if reaches_over:
                forms = ["shift"]
            elif out.is_compactable:
                forms = ["compact", "direct"]
            elif prod(taps) > 1:
                forms = ["shift", "direct"]
            if (
                a["groups"] == 1
                and out.has_gaps
                and not reaches_over
                and self._fits_channels(graph, operation, out)
            ):
                # It has been the fastest nearly everywhere: one other is enough to compare with. Not so with 16 registers, where its tile is small, and
                # "direct" often wins, as few loads of 32 bytes cross a cache line: the first layer of ResNet-50 took 0.7 of the time on Zen 3.
                few = self.isa.registers < MANY_REGISTERS
                dense_forms = [*forms, "channels"] if few else ["channels", forms[0]]
        dense = [Choice(True, form) for form in dense_forms or forms]
        if winograd:
            dense = [Choice(True, "winograd"), dense[0]]
        sparse = [Choice(False, form) for form in forms]
        in_group = graph.shapes[operation.output][1] // a.get("groups", 1)
        if paired and in_group % 2 == 0 and self._family[operation.output] != "vectors":
            out = self.places[operation.output].layout
            assert isinstance(out, Planes)
            fitting = [
                form
                for form in forms
                if form != "compact" or len(pair_parts(out.compact_vectors, self.isa)) == 1
            ]
            sparse = [*(Choice(False, form, pairs=True) for form in fitting), sparse[0]]
        programs = []
        if code:
            # Where operands are loaded so rarely, copying them so that no load crosses a line is worth it for few pixels only. (Intel Xeon, float16, 3 x 3: with 7 vectors
            # 1.3 times as long as without, with 2 vectors 0.8 to 1.1 times.)
            form = forms[0] if self.vectors_of(operation) <= _FEW_VECTORS else "direct"
            programs, sparse = [Choice(False, form, code=True)], sparse[: 1 + paired]
        if mode == "dense":
            return dense
        if mode == "sparse":
            return programs + sparse
        return (
            programs + (sparse if density < ALWAYS_DENSE else []) + (dense if density > ALWAYS_SPARSE else [])
        )

    def may_be_code(self, graph: Graph, index: int) -> bool:
        """Whether operation `index` could become a program, see `explorer.inference.kernels.conv_code`."""
        operation = graph.operations[index]
        a = operation.attributes
        alone = a.get("depthwise") or 1 < a.get("groups", 1) == graph.shapes[operation.output][1]
        return has_programs(self.isa) and self._family[operation.output] != "vectors" and not alone

    def has_short_offsets(self, graph: Graph, index: int, block_bytes: int) -> bool:
        """Whether the operands of a K block of operation `index`, of so many bytes, lie near enough to each other, also where they are not copied, see `explorer.inference.pack`."""
        operation = graph.operations[index]
        x = self.places[self.operands(operation)[0]].layout
        if not has_programs(self.isa) or not isinstance(x, Planes):
            return False
        channels = block_bytes // ((x.tile or tile_of(x.vectors)) * x.vector_bytes) + 2
        return channels * x.plane_bytes + 4 * x.pitch_bytes < SHORT * x.element_bytes

    def vectors_of(self, operation: Operation) -> int:
        """Vectors of pixels of one channel of a result in planes."""
        out = self.places[operation.output].layout
        return out.vectors if isinstance(out, Planes) else 1

    def _tiles(self, operation: Operation) -> list[int]:
        """The size of the tiles that each operand and the result of an operation lie in, 0 for planes."""
        layouts = [self.places[place].layout for place in (*self.operands(operation), operation.output)]
        return [layout.tile if isinstance(layout, Planes) else 0 for layout in layouts]

    def _fits_channels(self, graph: Graph, operation: Operation, out: Planes) -> bool:
        """Whether the dense kernel with channels in its lanes can run: its pixels are a part of one row, and must not lie in two tiles."""
        if out.abreast > 1:
            return False
        form = channel_tile(
            out.columns, graph.shapes[operation.output][1], self.isa, overlap=len(operation.inputs) == 1
        )
        tile = max(self._tiles(operation)) * self.isa.lanes
        if form is None or not tile:
            return form is not None
        first = np.arange(out.rows)[:, None] * out.pitch + channel_columns(out.columns, form[0])
        return bool(np.all(first // tile == (first + form[0] - 1) // tile))

    def may_be_winograd(self, graph: Graph, index: int, density: float) -> bool:
        """Whether the dense kernel that computes four rows at a time can run operation `index`, and saves enough."""
        operation = graph.operations[index]
        a, size = operation.attributes, graph.shapes[operation.weight or ""][2:]
        out, tiles = self.places[operation.output].layout, self._tiles(operation)
        if operation.kind != "conv" or len(size) != 2 or not isinstance(out, Planes) or out.abreast > 1:
            return False
        has_residual = len(operation.inputs) > 1
        if density <= ALWAYS_SPARSE or self.isa.precision != "fp32" or a["groups"] > 1:
            return False
        if tiles[0] or (has_residual and any(tiles)) or self.reaches_over(graph, operation):
            return False
        form = Filter.of(Taps.of(a, size))
        return form is not None and Chunks.of(out, residual=has_residual) is not None

    def layers(self, graph: Graph) -> list[int]:
        """The native convolutions and linear layers, which have a choice of kernels."""
        return [i for i in self.native if graph.operations[i].kind in ("conv", "linear")]

    def network(self, graph: Graph, densities: Mapping[int, float]) -> str:
        """What a decision about the whole network depends on, for `explorer.inference.choices`: all its layers."""
        every = "\n".join(self.question(graph, i, density) for i, density in densities.items())
        return f"{generator_version()} {self.isa.cpu} {self.threads} {hashlib.sha256(every.encode()).hexdigest()}"

    def question(
        self,
        graph: Graph,
        index: int,
        density: float,
        *,
        paired: bool = False,
        code: bool = False,
        winograd: bool = False,
    ) -> str:
        """What the fastest kernel of operation `index` depends on, for `explorer.inference.choices`."""
        operation = graph.operations[index]
        shapes = [
            graph.shapes[name] for name in (*operation.inputs, operation.weight or "", operation.output)
        ]
        about = sorted((k, v) for k, v in operation.attributes.items() if k not in ("low", "high"))
        return f"{generator_version()} {self.isa.cpu} {self.isa.name} {self.isa.precision} {self.threads} {operation.kind} {shapes} {about} {round(32 * density)} {paired} {code} {winograd} {self._tiles(operation)} {self.reaches_over(graph, operation)} {self._is_late(operation.output)}"
