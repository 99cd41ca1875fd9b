"""Runs step tables: owns the driver's state, each thread's scratch memory, and the helper threads.

Helpers are Python threads that live inside one native call (the GIL is released there). They spin for a short while after a run and then sleep,
each beside a bell of its own, which works the same on every system; the caller rings when a run begins. A caller that is interrupted (Ctrl-C) between any
two statements leaves nothing half done.

A forked child has no helpers. Its first run starts them again, with a gate and bells of their own.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from functools import cache
from typing import cast

import numpy as np
from numpy.typing import NDArray

from explorer.inference import fork
from explorer.inference.kernels import driver
from explorer.inference.memory import Memory, address
from explorer.inference.native import Isa, machine_code
from explorer.inference.orders import Chain
from explorer.inference.steps import Move, Steps

_SPINS = 20_000
"""Looks at the gate before a helper goes to sleep: some hundred microseconds."""

_LOOKS = 1000
"""Looks for helpers that are still in the last run before its caller sleeps between them: some ten microseconds."""


class _Bell:
    """Wakes the one thread that sleeps beside it. Who lies down after it was rung wakes at once; several rings are one.

    A lock that the sleeper takes and the ringer gives back, each in one step. A `threading.Event` takes an inner lock in Python, where Ctrl-C could leave it held: the
    next call would wait for ever.
    """

    __slots__ = ("_lock",)

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()

    def sleep(self) -> None:
        self._lock.acquire()

    def ring(self) -> None:
        with contextlib.suppress(RuntimeError):  # nobody has slept since it was last rung
            self._lock.release()


class _State:
    """What the native driver and the helper threads share. Helpers keep this alive, not the runner."""

    def __init__(self, isa: Isa, threads: int) -> None:
        self.memory = Memory()
        self.record = self.memory.zeros(len(driver.STATE.fields), np.int64)
        self.flags = self.memory.zeros(3 * 8, np.int64)  # gate, active, stop: a cache line each
        self.bells = [_Bell() for _ in range(threads)]
        self.asleep = [False] * threads
        self.calls = 0  # of the helpers, whether they slept or not
        self.scratch: list[int] = []
        run, answer, turns, help_ = (
            machine_code(isa, driver.DriverKernel(name)) for name in ("run", "answer", "run_turns", "help")
        )
        self.run = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)(run)
        self.answer = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 4)(answer)
        self.run_turns = ctypes.CFUNCTYPE(
            None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64
        )(turns)
        self.help = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)(help_)
        for i, name in enumerate(("gate", "active", "stop")):
            self.set(name, address(self.flags) + 64 * i)
        self.set("spin", _SPINS)
        self.set("threads", threads)

    def set(self, name: str, value: int) -> None:
        self.record[driver.STATE.index(name)] = value

    @property
    def stopped(self) -> bool:
        return bool(self.flags[16])


def _helper(state: _State, me: int) -> None:
    while not state.stopped:
        calls = state.calls
        state.help(address(state.record), state.scratch[me], me)
        state.asleep[me] = True
        # Who called since then may have found it awake, and will not ring: it has to look once more. Without this a helper that gave up looking
        # while its caller held the GIL slept through the whole run (every second one of dense ResNet-50).
        if state.calls == calls:
            # Before `stopped` is read again: `_stop` sets the flag first and rings after it.
            state.bells[me].sleep()
        state.asleep[me] = False


def _stop(state: _State, helpers: list[threading.Thread]) -> None:
    state.flags[16] = 1
    for bell in state.bells:
        bell.ring()
    for helper in helpers:
        # The garbage collector may call this in any thread, also in a helper.
        if helper.is_alive() and helper is not threading.current_thread():
            helper.join(timeout=5)


@cache
def _current_cpu() -> Callable[[], int] | None:
    """Tells the CPU that the calling thread runs on, where the system has a function for it (Linux)."""
    try:
        return cast("Callable[[], int]", ctypes.CDLL(None).sched_getcpu)
    except (AttributeError, OSError, TypeError):  # TypeError: Windows has no library of that name
        return None


def _keep_off_this_cpu(helper: threading.Thread) -> None:
    """Let a sleeping helper wake up on any other CPU that the process may use.

    After some milliseconds of sleep Linux likes to wake a thread where its waker runs, counting on the waker to go to sleep soon. The caller does not: the
    two would take turns on one CPU, beside an idle one, for as long as a whole inference takes.
    """
    current_cpu, affinity = _current_cpu(), getattr(os, "sched_getaffinity", None)
    if current_cpu is None or affinity is None or helper.native_id is None:
        return
    others = affinity(0) - {current_cpu()}
    if others:
        # It may have ended, or the CPUs have just been taken away: then it wakes up where it can.
        with contextlib.suppress(OSError):
            os.sched_setaffinity(helper.native_id, others)


class Runner:
    """Runs one network's steps. Not thread-safe: the module that owns it takes a lock.

    Parameters
    ----------
    isa : Isa
    threads : int
    n_steps : int
    scratch_bytes : int
        Scratch memory of each thread.
    """

    def __init__(self, isa: Isa, threads: int, n_steps: int, scratch_bytes: int) -> None:
        self.threads, self.scratch_bytes = threads, scratch_bytes
        self._state = state = _State(isa, threads)
        self.stamps = state.memory.zeros(2 * n_steps, np.int64).reshape(-1, 2)
        tickets = state.memory.zeros((n_steps + 1) * threads * 8, np.int64)
        done = state.memory.zeros((n_steps + 2) * 8, np.int64)
        scratch = [state.memory.zeros(-(-scratch_bytes // 8), np.int64, 4096) for _ in range(threads)]
        state.memory.trim()
        state.scratch = [address(array) for array in scratch]
        self._scratch = scratch[0]
        for name, array in (("stamps", self.stamps), ("tickets", tickets), ("done", done)):
            state.set(name, address(array))
        self._steps: Steps | None = None
        self._range = (-1, -1)
        self._arguments = ctypes.c_void_p(address(state.record)), ctypes.c_void_p(state.scratch[0])
        self._helpers: list[threading.Thread] = []
        # Before the first helper starts: an interrupt must not leave threads that nobody stops.
        self.close = weakref.finalize(self, _stop, state, self._helpers)
        self._start()
        fork.revive_in_child(self)

    def _start(self) -> None:
        for me in range(1, self.threads):
            self._state.asleep[me] = False
            helper = threading.Thread(
                target=_helper, args=(self._state, me), name=f"explorer-helper-{me}", daemon=True
            )
            self._helpers.append(helper)
            helper.start()

    def revive(self) -> None:
        """In a forked child: the helpers are gone, and may have left gate and bells in any state. The next run starts new ones."""
        state = self._state
        state.flags[:16] = 0
        state.bells[:] = [_Bell() for _ in range(self.threads)]
        state.asleep[1:] = [True] * (self.threads - 1)
        self._helpers.clear()

    def _wake(self) -> None:
        """Call the helpers that sleep."""
        self._state.calls += 1  # before looking who sleeps: see `_helper`
        if not any(self._state.asleep):
            return
        if not self._helpers:
            self._start()
        # An interrupt may have left fewer helpers than there were to be.
        helpers = zip(self._state.bells[1:], self._state.asleep[1:], self._helpers, strict=False)
        for bell, asleep, helper in helpers:
            if asleep:
                _keep_off_this_cpu(helper)
                bell.ring()

    def use(self, steps: Steps) -> None:
        """Run these steps from now on."""
        if steps.scratch_bytes > self.scratch_bytes:
            raise ValueError("these steps need more scratch memory than the runner has")
        self.settle()
        self._steps = steps  # keeps their memory alive
        self._state.set("steps", address(steps.table))

    def settle(self) -> None:
        """Wait until no helper is left in the last run: one that was held up may still read the table of its steps. Then this may be changed, or freed."""
        active = self._state.flags[8:9]
        for _ in range(_LOOKS):  # it mostly is on its way out
            if not active[0]:
                return
        while active[0]:
            time.sleep(1e-4)

    def forget_cycles(self) -> None:
        """Begin to count anew what the layers of chains take."""
        for chain in self._steps.chains[self._steps.order] if self._steps else ():
            self._counters(chain)[:] = 0

    def cycles(self) -> NDArray[np.int64]:
        """Ticks that each step of the last runs took, as the calling thread saw them; those of a chain in proportion to what its layers took there."""
        found: NDArray[np.int64] = self.stamps[:, 1] - self.stamps[:, 0]
        for chain in self._steps.chains[self._steps.order] if self._steps else ():
            counted = self._counters(chain)
            whole, sum_ = int(found[chain.first : chain.last].sum()), int(counted.sum())
            if sum_:  # else threads share images in this batch, or another thread took all of them
                found[chain.first : chain.last] = counted / sum_ * whole
        return found

    def _counters(self, chain: Chain) -> NDArray[np.int64]:
        first = chain.counters // 8
        return self._scratch[first : first + chain.last - chain.first]

    def run(self, first: int, last: int) -> None:
        """Run steps [first, last)."""
        self._set_range(first, last)
        self._wake()
        self._state.run(*self._arguments)

    def answers(self, cell: int, output: int, n_bytes: int) -> None:
        """Let `answer` write the input's address to `cell`, unless that is 0, and copy so many bytes of the answer from `output`."""
        for name, value in (("cell", cell), ("output", output), ("n_bytes", n_bytes)):
            self._state.set(name, value)

    def answer(self, last: int, input_: int, result: int) -> None:
        """Run all steps, of which there are `last`, on the input at one address, and copy the answer to another, see `answers`."""
        self._set_range(0, last)
        self._wake()
        self._state.answer(*self._arguments, input_, result)

    def run_turns(self, first: int, last: int, turns: int, moves: Sequence[Move]) -> None:
        """Run steps [first, last) so many times, in one native call; from turn to turn, and only until this returns, `moves` go on."""
        self._set_range(first, last)
        table = np.array([(address(move.cell), move.n_bytes) for move in moves], np.int64)
        self._wake()
        self._state.run_turns(*self._arguments, turns, address(table), len(moves))

    def _set_range(self, first: int, last: int) -> None:
        state = self._state
        if self._range != (first, last):
            # An interrupt between the two must not leave a range that is half the old one.
            self._range = (-1, -1)
            state.set("first", first)
            state.set("last", last)
            self._range = (first, last)


@cache
def cycles_per_ms(isa: Isa) -> float:
    """Ticks of the driver's clock per millisecond, calibrated against the system's clock once per process."""
    clock = ctypes.CFUNCTYPE(ctypes.c_int64)(machine_code(isa, driver.DriverKernel("clock")))
    start, ticks = _both_clocks(clock)
    while time.perf_counter_ns() - start < 10_000_000:
        pass
    end, more = _both_clocks(clock)
    return (more - ticks) / ((end - start) / 1e6)


def _both_clocks(clock: Callable[[], int]) -> tuple[int, int]:
    """What the system's clock, in nanoseconds, and `clock` show at one moment: that of a few looks between which least time passed, as other work may come between two."""
    looks = [(time.perf_counter_ns(), clock(), time.perf_counter_ns()) for _ in range(8)]
    before, ticks, _ = min(looks, key=lambda look: look[2] - look[0])
    return before, ticks
