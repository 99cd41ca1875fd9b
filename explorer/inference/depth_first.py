"""The order in which bands of neighbouring layers are computed, so that what lies between two layers is read while it is still in the cache.

Layer by layer, a large activation is written to the outer cache and read back from there. Here a layer is cut into **bands** of pixels, from the top of the
image to the bottom, and as soon as a band of the last layer can be computed, it is: each tensor is read soon after it was written. (Known as depth-first
execution, or cascaded inference: Alwani et al., "Fused-Layer CNN Accelerators", 2016. Nothing is computed twice here: a band waits until those that it reads are there.)

The order must give what layer by layer gives, whatever shares memory. Two bands may not change places when one writes what the other reads or writes. Bands
touch *intervals* of pixels; tensors that lie alike in the same memory are compared pixel by pixel, and of others in the same memory the whole of one must be
done first.

This module knows neither kernels nor weights.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Access:
    """What the bands of a step read, or write, of one tensor.

    Attributes
    ----------
    memory : int
        Where it lies; tensors in the same memory have the same number.
    alike : tuple
        How it lies there: of equal ones in the same memory, the same pixel has the same place.
    intervals : (bands, 2) int64
        The first pixel that each band touches, and the one after the last.
    """

    memory: int
    alike: tuple[Any, ...]
    intervals: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Bands:
    """One step, in the bands it may be cut into; each is computed after the one before it.

    Attributes
    ----------
    calls : tuple of tuple of (int, int, int)
        Of each band: address of the arguments, first job and number of jobs. Jobs are those of the first image.
    reads : tuple of (bands, 2) int64
        The interval of pixels that each band reads, for each operand, in elements of a plane of that operand.
    writes : (bands, 2) int64
        The same of the result.
    """

    calls: tuple[tuple[tuple[int, int, int], ...], ...]
    reads: tuple[NDArray[np.int64], ...]
    writes: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Step:
    """What the order depends on: the tensors that the bands of a step read, and the one that they write."""

    reads: tuple[Access, ...]
    writes: Access

    def __len__(self) -> int:
        return len(self.writes.intervals)


def order(steps: Sequence[Step]) -> list[tuple[int, int]]:
    """All bands of all steps, as pairs of step and band: always a band of the last step that can go on.

    Parameters
    ----------
    steps : sequence of Step
        In the order in which they would run one after the other.
    """
    # For each step and band: earlier steps, and how many of their bands must be done.
    needed: list[list[list[tuple[int, int]]]] = [[[] for _ in range(len(step))] for step in steps]
    for s, step in enumerate(steps):
        for e, earlier in enumerate(steps[:s]):
            for band, count in enumerate(_needed(step, earlier)):
                if count:
                    needed[s][band].append((e, count))
    done = [0] * len(steps)
    found: list[tuple[int, int]] = []
    # Steps whose next band can be computed, by their place from the end. The others wait for one step each that has too few bands done, and are
    # looked at again when it has enough: a band that was waited for stays done.
    able: list[int] = []
    waiting: list[list[int]] = [[] for _ in steps]

    def look(s: int) -> None:
        if done[s] == len(steps[s]):
            return
        waits_for = needed[s][done[s]]
        while waits_for and done[waits_for[-1][0]] >= waits_for[-1][1]:
            waits_for.pop()
        if waits_for:
            waiting[waits_for[-1][0]].append(s)
        else:
            heapq.heappush(able, -s)

    for s in range(len(steps)):
        look(s)
    # The first step that is not done can always go on.
    while able:
        s = -heapq.heappop(able)
        found.append((s, done[s]))
        done[s] += 1
        again, waiting[s] = waiting[s], []
        for waits in (s, *again):
            look(waits)
    assert done == [len(step) for step in steps]
    return found


def _needed(step: Step, earlier: Step) -> list[int]:
    """How many bands of `earlier` must be done before each band of `step`; empty when none need be."""
    needed: list[NDArray[np.int64]] = []
    mine, theirs = (step.writes, *step.reads), (earlier.writes, *earlier.reads)
    for a in mine:
        for b in theirs:
            if a.memory != b.memory or (a is not step.writes and b is not earlier.writes):
                continue
            if a.alike != b.alike:
                return [len(earlier)] * len(step)
            # The lowest pixel that the bands from each on will still touch.
            lowest = np.minimum.accumulate(b.intervals[::-1, 0])[::-1]
            count = np.searchsorted(lowest, a.intervals[:, 1], "left")
            # Who reads nothing but zeros above the image waits too: they are made with the first band of the image.
            is_read = b is earlier.writes and a is not step.writes
            needed.append(np.maximum(count, 1) if is_read else count)
    return np.max(needed, axis=0).tolist() if needed else []
