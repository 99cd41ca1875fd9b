"""Which jobs of which kernels are run, and in which order: pieces, chains and the driver, against their twins in Python."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from explorer.inference import native
from explorer.inference.kernels import chain, driver, pieces
from explorer.inference.memory import Memory, address
from explorer.inference.threads import _State
from tests.inference.test_partners import needs_code

pytestmark = needs_code

Call = tuple[int, int, int]
KERNEL = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p)


class Noted:
    """Kernels in Python that only write down how they are called."""

    def __init__(self, count: int) -> None:
        self.calls: list[Call] = []
        self._alive = [KERNEL(self._kernel(number)) for number in range(count)]
        self.addresses = [ctypes.cast(kernel, ctypes.c_void_p).value or 0 for kernel in self._alive]

    def _kernel(self, number: int) -> Callable[..., None]:
        def kernel(arguments: int | None, job: int, _scratch: int | None) -> None:
            self.calls.append((self.addresses[number], arguments or 0, job))

        return kernel


def code_of(kernel: native.Kernel) -> Callable[..., None]:
    return KERNEL(native.machine_code(native.current_isa(), kernel))


@given(images=st.integers(1, 3), n_pieces=st.integers(1, 4), jobs=st.integers(1, 5))
@settings(max_examples=30, deadline=None)
def test_each_job_is_one_of_a_piece(images: int, n_pieces: int, jobs: int) -> None:
    noted, where = Noted(1), np.arange(1, n_pieces + 1, dtype=np.int64) * 1000
    row = pieces.ARGUMENTS.filled(
        kernel=noted.addresses[0], arguments=address(where), pieces=n_pieces, jobs=jobs
    )
    run = code_of(pieces.PiecesKernel())
    every = range(images * n_pieces * jobs)
    for job in every:
        run(address(row), job, None)
    wanted = [pieces.reference(job, n_pieces, jobs) for job in every]
    assert noted.calls == [(noted.addresses[0], int(where[piece]), job) for piece, job in wanted]
    # Each piece has all jobs of the kernel for all images.
    assert sorted(wanted) == [(piece, job) for piece in range(n_pieces) for job in range(images * jobs)]


@given(
    rows=st.lists(
        st.tuples(st.integers(0, 1), st.integers(0, 3), st.integers(0, 4), st.integers(1, 6), st.integers(0, 2)),
        min_size=1,
        max_size=6,
    ),
    image=st.integers(0, 3),
)  # fmt: skip
@settings(max_examples=50, deadline=None)
def test_a_chain_makes_its_calls_in_their_order(
    rows: list[tuple[int, int, int, int, int]], image: int
) -> None:
    noted, scratch = Noted(2), np.zeros(8 + 3, np.int64)
    calls = np.array(
        [
            (noted.addresses[which], 1000 + i, first, jobs, of_image, 8 * layer)
            for i, (which, first, jobs, of_image, layer) in enumerate(rows)
        ],
        np.int64,
    )
    row = chain.ARGUMENTS.filled(calls=address(calls), n_calls=len(calls), cycles=8 * 8)
    code_of(chain.ChainKernel())(address(row), image, address(scratch))
    assert noted.calls == chain.reference(calls, image)
    # What each layer took is added up behind what the kernels use.
    assert not scratch[:8].any()
    layers = {layer for *_, jobs, _, layer in rows if jobs}
    assert all(scratch[8 + layer] > 0 for layer in layers)


class Run:
    """A driver with steps of noted kernels. `gaps` are rows of GAPS, of which some steps have one."""

    def __init__(self, jobs: list[int], gaps: list[int | None], threads: int) -> None:
        isa, self.noted, self.memory = native.current_isa(), Noted(2), Memory()
        kernel, zero = self.noted.addresses
        self.steps = [
            (n, kernel, 1000 * (i + 1), None if more is None else (zero, 1000 * (i + 1) + 1, more))
            for i, (n, more) in enumerate(zip(jobs, gaps, strict=True))
        ]
        table = [
            driver.STEP.filled(jobs=n, kernel=code, arguments=where, gaps=self._row(more))
            for n, code, where, more in self.steps
        ]
        self.state = _State(isa, threads)
        self.scratch = self.memory.zeros(512, np.int64, 4096)
        n = len(table)
        self.arrays = {
            "steps": self._zeros(table),
            "stamps": self.memory.zeros(2 * n, np.int64),
            "tickets": self.memory.zeros((n + 1) * threads * 8, np.int64),
            "done": self.memory.zeros((n + 2) * 8, np.int64),
        }
        for name, array in self.arrays.items():
            self.state.set(name, address(array))

    def _zeros(self, rows: list[NDArray[np.int64]]) -> NDArray[np.int64]:
        array: NDArray[np.int64] = self.memory.zeros(sum(row.size for row in rows), np.int64)
        array[:] = np.concatenate(rows)
        return array

    def _row(self, gaps: Call | None) -> int:
        if gaps is None:
            return 0
        names = dict(zip(("kernel", "arguments", "pieces"), gaps, strict=True))
        return self.memory.put(driver.GAPS.filled(**names))

    def __call__(self, first: int, last: int) -> list[Call]:
        self.noted.calls.clear()
        self.state.set("first", first)
        self.state.set("last", last)
        self.state.run(address(self.state.record), address(self.scratch))
        return list(self.noted.calls)


STEPS = {
    "steps": st.lists(
        st.tuples(st.integers(1, 9), st.one_of(st.none(), st.integers(1, 7))), min_size=1, max_size=5
    ),
    "threads": st.integers(1, 4),
    "part": st.tuples(st.integers(0, 4), st.integers(0, 4)),
}


@given(**STEPS)
@settings(max_examples=60, deadline=None)
def test_a_thread_that_nobody_helps_makes_all_calls_in_the_order_of_the_twin(
    steps: list[tuple[int, int | None]], threads: int, part: tuple[int, int]
) -> None:
    run = Run([jobs for jobs, _ in steps], [gaps for _, gaps in steps], threads)
    some = sorted(min(edge, len(steps)) for edge in part)
    first, last = (some[0], some[1]) if some[0] < some[1] else (0, len(steps))
    for _ in range(2):
        assert run(first, last) == driver.reference(run.steps[first:last], threads)
    stamps = run.arrays["stamps"].reshape(-1, 2)[first:last]
    assert (stamps[:, 1] >= stamps[:, 0]).all()
    assert (stamps[1:, 0] == stamps[:-1, 1]).all()


@given(**STEPS)
@settings(max_examples=15, deadline=None)
def test_with_helpers_the_calls_are_the_same_and_no_step_begins_before_the_last_one_ends(
    steps: list[tuple[int, int | None]], threads: int, part: tuple[int, int]
) -> None:
    run = Run([jobs for jobs, _ in steps], [gaps for _, gaps in steps], threads)
    run.state.set("spin", 1 << 40)

    def help_out(me: int, scratch: Any) -> None:
        run.state.help(address(run.state.record), address(scratch), me)

    helpers = [
        threading.Thread(target=help_out, args=(me, np.zeros(512, np.int64)), daemon=True)
        for me in range(1, threads)
    ]
    for helper in helpers:
        helper.start()
    try:
        for _ in range(5):
            calls = run(0, len(steps))
            assert sorted(calls) == sorted(driver.reference(run.steps, threads))
            order = [arguments // 1000 for _, arguments, _ in calls]
            assert order == sorted(order)
    finally:
        run.state.flags[16] = 1  # see `_State`
        for helper in helpers:
            helper.join(10)
    assert not any(helper.is_alive() for helper in helpers)
