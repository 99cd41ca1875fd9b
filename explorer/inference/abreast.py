"""Late layers of a batch compute several images at once, side by side in the rows of one plane.

Seven columns fill less than half of a vector of sixteen: a plane of 7 x 7 pixels needs four vectors, two such planes in common rows seven. The gap behind each
row of an image is the padding of its neighbour, too: a layer at stride one sees nothing but a wider image, in which some columns stay zero. Each weight is
also read once for all of these images.

The layers before them go on image by image, so that their activations stay in the caches: they run in **turns**, one for each of the images. What they leave (the
*entries*) has room for all. Then the splits whose phases have the small size put them side by side, and the late layers run once. What averages their
planes (the *exits*) takes one image after the other again.

(ResNet-50's last stage at 90 %, alone, Zen 4, one thread: 0.83 of the time.)

This module knows neither kernels nor memory: `Plan` gives tensors their places and `Plan.seen` says what a turn sees of them.
"""

from __future__ import annotations

from dataclasses import dataclass

from explorer.inference.graph import Graph, Operation, Ref
from explorer.inference.kernels.registers import LARGEST_SHUFFLED

_LATE = ("split", "conv", "add", "clamp", "activation")
"""What computes each pixel for itself, or at stride one from its neighbours, and what puts images side by side. Not what writes whole rows, or looks at columns."""

_WORTH_IT = 0.9
"""Vectors of the images side by side / vectors of each alone, at most."""


@dataclass(frozen=True, slots=True)
class Abreast:
    """Which layers those are.

    Attributes
    ----------
    images : int
        Images side by side.
    period : int
        Columns from one to the next, of which some are gaps.
    size : (int, int)
        Rows and columns of one image.
    late : frozenset of str
        Results of the operations that compute all of them at once, first of them splits.
    entries : frozenset of str
        What those splits read.
    exits : frozenset of str
        Results of what makes one value of each plane, for one image at a time.
    """

    images: int
    period: int
    size: tuple[int, int]
    late: frozenset[str]
    entries: frozenset[str]
    exits: frozenset[str]

    @property
    def columns(self) -> int:
        """From the first column of the first image to the last of the last."""
        return self.period * (self.images - 1) + self.size[1]

    def arrange(self, graph: Graph) -> None:
        """Put the operations of a turn first, and then those that know all images; each part keeps its order."""
        after = {*self.late, *self.exits}
        for operation in graph.operations:
            if after & {*operation.read}:
                after.add(operation.output)
        first, last = (
            [o for o in graph.operations if (o.output in after) == is_after] for is_after in (False, True)
        )
        graph.operations = first + last

    def turns(self, operations: list[Operation]) -> list[tuple[int, int | None]]:
        """The order in which these run, in that of `arrange`: pairs of an operation's place among them, and the turn, None for what knows all images."""
        steps: list[tuple[int, int | None]] = []
        late = next(i for i, o in enumerate(operations) if o.output in self.late)
        for turn in range(self.images):
            steps += [(i, turn) for i in range(late)]
        for i, operation in enumerate(operations[late:], late):
            steps += (
                [(i, turn) for turn in range(self.images)] if operation.output in self.exits else [(i, None)]
            )
        return steps


def find(graph: Graph, lanes: int) -> Abreast | None:
    """The layers of a lowered graph that had better take several images at once, in vectors of so many lanes; None where there are none."""
    averages = [o for o in graph.operations if o.kind == "plane_average"]
    shapes = {graph.shapes[o.inputs[0]][2:] for o in averages}
    if len(shapes) != 1 or len(size := shapes.pop()) != 2:
        return None
    rows, columns = size
    if rows * columns == 1:
        return None  # vectors, to most kernels
    period = 1 << columns.bit_length()  # at least one column of it is a gap
    images = lanes // period
    if images < 2 or -(-rows * images * period // lanes) > _WORTH_IT * images * -(-rows * period // lanes):
        return None
    mine = [o for o in graph.operations if o.kind in _LATE and graph.shapes[o.output][2:] == size]
    late = {o.output for o in mine}
    entries = {o.inputs[0] for o in mine if o.kind == "split"}
    exits = {o.output for o in averages}
    found = Abreast(images, period, (rows, columns), frozenset(late), frozenset(entries), frozenset(exits))
    return found if entries and _is_closed(graph, found) else None


def _is_closed(graph: Graph, found: Abreast) -> bool:
    """Whether each operation either works on images side by side as it does on one, or never meets them."""
    seen = {output.name for output in graph.outputs if isinstance(output, Ref)} | {*graph.inputs}
    if seen & (found.late | found.entries):
        return False
    for operation in graph.operations:
        read = {*operation.read}
        a = operation.attributes
        if operation.output in found.late and operation.kind == "split":
            fits = not read & found.late and a["stride"][1] <= LARGEST_SHUFFLED
        elif operation.output in found.late:
            # The gap between two images has to hold the padding of both.
            padding = max((*a.get("padding", (0,)), *a.get("beyond", (0,))))
            fits = (
                read <= found.late
                and not a.get("depthwise")
                and "one_value" not in a
                and padding <= found.period - found.size[1]
            )
        elif operation.output in found.exits:
            fits = read <= found.late
        else:
            fits = not read & found.late
        if not fits:
            return False
    return True
