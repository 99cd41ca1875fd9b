"""Runs a range of steps in one native call, on as many threads as come to help.

A step is `jobs` independent pieces of one kernel. Every thread first takes the jobs of its own share (whose
data are in its core's cache), then steals from the others' shares, by atomic tickets. A step may start when the
previous one's count of finished jobs is full. **No barrier waits for a helper that holds no job**: one that is
late, asleep or interrupted only means that the caller does more of the work itself. A ticket says of which run it
is, so that a helper that wakes up when its run is over, and another one is on, takes nothing.

    run(state, scratch)         the caller: opens the gate, works, waits for the last job, closes the gate
    answer(state, scratch, input, result)
                                the caller: one run with an input that lies elsewhere, whose answer is copied to
                                `result`
    run_turns(state, scratch, turns, moves, n_moves)
                                the caller: several runs, between which addresses in the steps' arguments move
                                on, and at the end back
    help(state, scratch, me)    a helper: waits for an open gate for a while, works, and returns when nothing
                                came (it then sleeps in Python)
    clock()                     the counter that `stamps` are read from

The caller writes the cycle counter into `stamps` when each step begins and ends: per-layer times measured
inside the network. The twin in Python, of a thread to whom nobody comes to help, is `reference`.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass

from llvmlite import ir

from explorer.inference.kernels.builder import CACHE_LINE, I1, I64, PTR, VOID, Function, Record, Value
from explorer.inference.native import Isa

STATE = Record(
    (
        "steps", "first", "last", "tickets", "done", "gate", "active", "stop", "spin", "threads", "stamps",
        "cell", "output", "n_bytes",
    ),
)  # fmt: skip
"""What the caller and its helpers share. A counter is an int64 in a cache line of its own.

steps          rows of STEP
first, last    the steps of a run: [first, last)
tickets        (steps, threads) counters: jobs of each thread's share that somebody has taken, see `COUNT_BITS`
done           (steps + 1,) counters: jobs of each step that are finished, from step -1 on, which has none
gate           a counter that goes up when a run begins and when it ends: odd while one is on, and then its number
active         a counter of the helpers that may read the steps, which must not be changed or freed before it is 0
stop           a counter: 1 where helpers are to return for good
spin           how often a helper looks at the gate before it returns
threads        the caller, thread 0, and its helpers
stamps         (steps, 2) int64: the clock at the start and the end of each step
cell           address of the cell in which kernels find the address of the input, or 0
output         address at which the steps leave the answer
n_bytes        of the answer
"""

STEP = Record(("jobs", "kernel", "arguments", "gaps"))
"""A step.

jobs         how many there are
kernel       address of its machine code, a `KERNEL`
arguments    address of its row of arguments
gaps         a row of GAPS, or 0 where nothing has to be zeroed
"""

GAPS = Record(("kernel", "arguments", "pieces"))
"""What whoever takes the first job of a thread's share does besides: its share of `pieces` jobs of another
kernel.

kernel, arguments    address of the machine code and of its row of arguments, see zero_gaps.py
pieces               jobs, of all images
"""

MOVE = Record(("cell", "n_bytes"))
"""An address that moves on.

cell       where it stands
n_bytes    by how many bytes it moves each turn
"""

KERNEL = ir.FunctionType(VOID, [PTR, I64, PTR])
"""What every kernel of a step is: ``kernel(arguments, job, scratch)``."""

_LINE = CACHE_LINE  # each counter has one of its own

COUNT_BITS = 24
"""The lower bits of a ticket count the jobs of a share that are taken, the others hold the number of the run."""


def _pause(f: Function) -> None:
    """Tells the core that this is a spin loop; does nothing where the instruction is unknown."""
    machine = platform.machine().lower()
    word = {"x86_64": "pause", "amd64": "pause", "aarch64": "yield", "arm64": "yield"}.get(machine)
    if word:
        f.b.asm(ir.FunctionType(VOID, []), word, "", [], True)


def cycles(f: Function) -> Value:
    """A counter that runs at a constant rate: on ARM the timer, since user code may not read the cycle register."""
    if platform.machine().lower() in {"aarch64", "arm64"}:
        return f.b.asm(ir.FunctionType(I64, []), "mrs $0, cntvct_el0", "=r", [], True)
    return f.call("llvm.readcyclecounter", I64, [])


def _read(f: Function, pointer: Value, offset: int = 0) -> Value:
    return f.b.load_atomic(f.at(pointer, offset), "seq_cst", 8, typ=I64)


def _add(f: Function, pointer: Value, amount: int) -> Value:
    return f.b.atomic_rmw("add", pointer, I64(amount), "seq_cst")


def _work(module: Value, isa: Isa) -> Value:
    """work(state, scratch, me, run): take part in the run of this number, as long as it is on."""
    f = Function(module, "work", VOID, [PTR, PTR, I64, I64], isa)
    f.native.linkage = "internal"
    b, (state, scratch, me, run) = f.b, f.arguments

    def get(name: str, type_: Value = I64) -> Value:
        return f.field(state, STATE, name, type_)

    steps, tickets, done, threads, stamps = (
        get("steps", PTR),
        get("tickets", PTR),
        get("done", PTR),
        get("threads"),
        get("stamps", PTR),
    )
    first, gate = get("first"), get("gate", PTR)

    def one_step(index: Value, before: Value) -> list[Value]:
        step = f.row(steps, STEP, index)
        jobs, arguments = f.field(step, STEP, "jobs"), f.field(step, STEP, "arguments", PTR)
        kernel = f.field(step, STEP, "kernel")
        mine = f.at(done, b.mul(b.add(index, I64(1)), I64(_LINE)))
        previous = f.at(mine, -_LINE)
        with f.forever() as leave_if:
            leave_if(b.icmp_signed(">=", _read(f, previous), before))
            leave_if(b.icmp_signed("!=", _read(f, gate), run))
            _pause(f)
        with b.if_then(b.icmp_signed("==", me, I64(0))):
            now, stamp = cycles(f), f.at(stamps, b.mul(index, I64(16)))
            f.store(now, stamp, 0, 8)
            with b.if_then(b.icmp_signed(">", index, first)):
                f.store(now, stamp, -8, 8)
        counters = f.at(tickets, b.mul(b.mul(index, threads), I64(_LINE)))

        def zero_gaps(gaps: Value, low: Value, high: Value) -> None:
            """As much of it as jobs [low, high) are of all jobs."""

            def one_piece(piece: Value) -> None:
                kernel = b.inttoptr(f.field(gaps, GAPS, "kernel"), KERNEL.as_pointer())
                b.call(kernel, [f.field(gaps, GAPS, "arguments", PTR), piece, scratch])

            with b.if_then(f.is_there(gaps)):
                pieces = f.field(gaps, GAPS, "pieces")
                first, last = (b.sdiv(b.mul(pieces, bound), jobs) for bound in (low, high))
                f.loop(last, one_piece, start=first)

        def one_share(k: Value) -> None:
            whose = b.srem(b.add(me, k), threads)
            low = b.sdiv(b.mul(jobs, whose), threads)
            high = b.sdiv(b.mul(jobs, b.add(whose, I64(1))), threads)
            ticket = f.at(counters, b.mul(whose, I64(_LINE)))
            with f.forever() as leave_if:
                now = _read(f, ticket)
                leave_if(b.icmp_signed("!=", b.lshr(now, I64(COUNT_BITS)), run))
                job = b.add(low, b.and_(now, I64((1 << COUNT_BITS) - 1)))
                leave_if(b.icmp_signed(">=", job, high))
                taken = b.cmpxchg(ticket, now, b.add(now, I64(1)), "seq_cst")
                with b.if_then(b.extract_value(taken, 1)):
                    with b.if_then(b.icmp_signed("==", job, low)):
                        zero_gaps(f.field(step, STEP, "gaps", PTR), low, high)
                    b.call(b.inttoptr(kernel, KERNEL.as_pointer()), [arguments, job, scratch])
                    _add(f, mine, 1)

        f.loop(threads, one_share)
        return [jobs]

    f.loop(get("last"), one_step, [I64(0)], start=first)
    b.ret_void()
    return f.native


def _run(module: Value, work: Value, isa: Isa) -> Value:
    f = Function(module, "run", VOID, [PTR, PTR], isa)
    b, (state, scratch) = f.b, f.arguments

    def get(name: str, type_: Value = I64) -> Value:
        return f.field(state, STATE, name, type_)

    first, last, threads, done, tickets = (
        get("first"),
        get("last"),
        get("threads"),
        get("done", PTR),
        get("tickets", PTR),
    )
    gate = get("gate", PTR)
    number = b.add(_read(f, gate), I64(1))
    f.store(I64(0), f.at(done, b.mul(first, I64(_LINE))), 0, 8)

    def clear(index: Value) -> None:
        f.store(I64(0), f.at(done, b.mul(b.add(index, I64(1)), I64(_LINE))), 0, 8)

        def clear_ticket(k: Value) -> None:
            ticket = f.at(tickets, b.mul(b.add(b.mul(index, threads), k), I64(_LINE)))
            f.store(b.shl(number, I64(COUNT_BITS)), ticket, 0, 8)

        f.loop(threads, clear_ticket)

    f.loop(last, clear, start=first)
    _add(f, gate, 1)
    b.call(work, [state, scratch, I64(0), number])
    final = f.row(get("steps", PTR), STEP, b.sub(last, I64(1)))
    jobs = f.field(final, STEP, "jobs")
    with f.forever() as leave_if:
        leave_if(b.icmp_signed(">=", _read(f, f.at(done, b.mul(last, I64(_LINE)))), jobs))
        _pause(f)
    f.store(cycles(f), f.at(get("stamps", PTR), b.mul(last, I64(16))), -8, 8)
    _add(f, gate, 1)
    b.ret_void()
    return f.native


def _answer(module: Value, run: Value, isa: Isa) -> None:
    """One run, and its answer copied.

    After a network has run, Python's code and data have left the caches: what is done here takes a fraction of
    the time.
    """
    f = Function(module, "answer", VOID, [PTR, PTR, PTR, PTR], isa)
    b, (state, scratch, input_, result) = f.b, f.arguments
    cell = f.field(state, STATE, "cell", PTR)
    with b.if_then(f.is_there(cell)):
        f.store(input_, cell, 0, 8)
    b.call(run, [state, scratch])
    output, n_bytes = f.field(state, STATE, "output", PTR), f.field(state, STATE, "n_bytes")
    f.call("llvm.memcpy.p0.p0.i64", VOID, [result, output, n_bytes, I1(0)])
    b.ret_void()


def _run_turns(module: Value, run: Value, isa: Isa) -> None:
    f = Function(module, "run_turns", VOID, [PTR, PTR, I64, PTR, I64], isa)
    b, (state, scratch, turns, moves, n_moves) = f.b, f.arguments

    def move_all(turns: Value) -> None:
        def one(index: Value) -> None:
            move = f.row(moves, MOVE, index)
            cell, n_bytes = f.field(move, MOVE, "cell", PTR), f.field(move, MOVE, "n_bytes")
            f.store(b.add(f.load(cell, I64, 0, 8), b.mul(n_bytes, turns)), cell, 0, 8)

        f.loop(n_moves, one)

    def one_turn(_: Value) -> None:
        b.call(run, [state, scratch])
        move_all(I64(1))

    f.loop(turns, one_turn)
    move_all(b.neg(turns))
    b.ret_void()


def _help(module: Value, work: Value, isa: Isa) -> None:
    f = Function(module, "help", VOID, [PTR, PTR, I64], isa)
    b, (state, scratch, me) = f.b, f.arguments
    gate, active, stop = (f.field(state, STATE, n, PTR) for n in ("gate", "active", "stop"))
    spin = f.field(state, STATE, "spin")
    seen, left = b.alloca(I64), b.alloca(I64)
    b.store(I64(0), seen)
    b.store(spin, left)
    with f.forever() as leave_if:
        leave_if(b.icmp_signed("!=", _read(f, stop), I64(0)))
        now = _read(f, gate)
        is_open = b.icmp_signed("==", b.and_(now, I64(1)), I64(1))
        is_new = b.icmp_signed("!=", now, b.load(seen, typ=I64))
        with b.if_else(b.and_(is_open, is_new)) as (yes, no):
            with yes:
                _add(f, active, 1)
                # Who changes or frees steps waits for `active` to be zero while the gate is closed: look again before reading them.
                with b.if_then(b.icmp_signed("==", _read(f, gate), now)):
                    b.call(work, [state, scratch, me, now])
                _add(f, active, -1)
                b.store(now, seen)
                b.store(spin, left)
            with no:
                b.store(b.sub(b.load(left, typ=I64), I64(1)), left)
                _pause(f)
        leave_if(b.icmp_signed("<", b.load(left, typ=I64), I64(0)))
    b.ret_void()


def _clock(module: Value, isa: Isa) -> None:
    f = Function(module, "clock", I64, [], isa)
    f.b.ret(cycles(f))


ENTRIES = ("run", "answer", "run_turns", "help", "clock")


@dataclass(frozen=True, slots=True)
class DriverKernel:
    """One of `ENTRIES`, or "work", which they call; the machine code depends on nothing else but the CPU."""

    entry: str

    def build(self, isa: Isa) -> tuple[Value, str]:
        """The IR module with the entry, and its name."""
        module = ir.Module("driver")
        if self.entry == "clock":
            _clock(module, isa)
            return module, self.entry
        work = _work(module, isa)
        if self.entry == "work":
            work.linkage = ""
        elif self.entry == "help":
            _help(module, work, isa)
        else:
            run = _run(module, work, isa)
            if self.entry == "run_turns":
                _run_turns(module, run, isa)
            elif self.entry == "answer":
                _answer(module, run, isa)
        return module, self.entry


def reference(
    steps: Sequence[tuple[int, int, int, tuple[int, int, int] | None]], threads: int, me: int = 0
) -> list[tuple[int, int, int]]:
    """The twin in Python: what one thread calls in a run, one after the other, when no other takes a job.

    Parameters
    ----------
    steps : sequence of (jobs, kernel, arguments, gaps)
        As in STEP; `gaps` is a row of GAPS, (kernel, arguments, pieces), or None.
    threads : int
        The shares that the jobs of each step are dealt to.
    me : int
        Whose share comes first.

    Returns
    -------
    list of (kernel, arguments, job)
    """
    found = []
    for jobs, kernel, arguments, gaps in steps:
        for k in range(threads):
            whose = (me + k) % threads
            low, high = jobs * whose // threads, jobs * (whose + 1) // threads
            if gaps and low < high:
                zero, where, pieces = gaps
                mine = range(pieces * low // jobs, pieces * high // jobs)
                found += [(zero, where, piece) for piece in mine]
            found += [(kernel, arguments, job) for job in range(low, high)]
    return found
