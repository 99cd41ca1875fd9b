"""What the tests of processes start: small programs, and datasets that spawned workers can import.

python -m tests.inference.workers forks     (or another name in PROGRAMS)
"""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import itertools
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, Dataset

import explorer
from explorer.errors import EngineError, EngineWarning

# OpenMP's own threads do not survive a fork either, which is torch's affair: the programs leave them unused.
torch.set_num_threads(1)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 24, 3, stride=2, padding=1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(24, 10),
    ).eval()


X = torch.randn(4, 2, 12, 12, generator=torch.Generator().manual_seed(3))


def expected(x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return network()(x)


def right(engine: Any, x: torch.Tensor) -> bool:
    return torch.allclose(engine(x), expected(x), atol=1e-4)


class Ready(Dataset[torch.Tensor]):
    """Calls an engine that was compiled before the workers were made."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine

    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> torch.Tensor:
        return self.engine(X[:1] + i)[0]


class Lazy(Ready):
    """Compiles in the worker, when it is first asked."""

    def __init__(self) -> None:
        super().__init__(None)

    def __getitem__(self, i: int) -> torch.Tensor:
        if self.engine is None:
            self.engine = explorer.compile(network(), X, threads=2)
        return super().__getitem__(i)


def check_loader(dataset: Ready, method: str) -> None:
    warnings.filterwarnings(
        "ignore", "This DataLoader will create"
    )  # more workers than this machine has cores
    loader = DataLoader(dataset, batch_size=4, num_workers=2, multiprocessing_context=method, timeout=100)
    got = torch.cat(list(loader))
    assert torch.allclose(got, torch.cat([expected(X[:1] + i) for i in range(8)]), atol=1e-4)


def in_child(check: Callable[[], bool]) -> int:
    """Fork, and end the child with 0 if `check` holds there, after at most 60 seconds."""
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        try:
            os._exit(0 if check() else 1)
        finally:
            os._exit(2)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def forks() -> None:
    """A compiled module goes on working in forked children, also when other threads of the parent are inside it at that moment."""
    engine = explorer.compile(network(), X, threads=2)
    assert right(engine, X)

    def child() -> bool:
        fine = all(right(engine, X[: 1 + i % 4] + i) for i in range(50))
        alive = [t for t in threading.enumerate() if t.name.startswith("explorer-helper")]
        return fine and len(alive) == 1 and in_child(lambda: right(engine, X)) == 0

    assert in_child(child) == 0
    stop = threading.Event()

    def call(i: int) -> None:
        while not stop.is_set():
            engine(X[: 1 + i])

    callers = [threading.Thread(target=call, args=(i,)) for i in range(3)]
    for caller in callers:
        caller.start()
    codes = [in_child(lambda: right(engine, X) and right(engine, X[:2])) for _ in range(10)]
    stop.set()
    for caller in callers:
        caller.join()
    assert codes == [0] * 10, codes
    assert right(engine, X)
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert all(pool.map(in_pool, range(4)))
    check_loader(Ready(engine), "fork")
    assert right(engine, X)


def forks_with_torch() -> None:
    """In a forked child a module goes on working that lets torch copy, or compute, what torch would do with several threads: there are none of them in the child.

    By itself torch would wait for them for ever, whoever had it use them in the parent.
    """
    torch.set_num_threads(2)
    x = torch.randn(4, 4, 128, 128)
    plain = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    with_torch = nn.Sequential(plain[0], nn.Softplus(), plain[2]).eval()
    for module, threads in itertools.product((plain, with_torch), (1, 2)):
        with torch.no_grad():
            wanted = module(x).numpy()
        engine = explorer.compile(module, x, threads=threads)
        assert len(engine.fallbacks) == (module is with_torch)

        def child(engine: Any = engine, module: nn.Module = module, wanted: Any = wanted) -> bool:
            def fine() -> bool:
                # Not torch's own comparison, which waits.
                answers = ((n, engine(x[:n]).numpy()) for n in (4, 1, 4))
                return all(np.allclose(answer, wanted[:n], atol=1e-4) for n, answer in answers)

            assert fine()
            assert torch.get_num_threads() == 2
            engine.benchmark(x, repeats=2, warn=False)
            engine.profile(x, repeats=2)
            engine.update_weights(module)
            assert fine()
            return in_child(fine) == 0

        assert in_child(child) == 0, (engine.fallbacks, threads)
        engine(x)
        assert in_child(child) == 0, (engine.fallbacks, threads)
        assert np.allclose(engine(x).numpy(), wanted, atol=1e-4)
        assert torch.get_num_threads() == 2


ENGINE: list[Any] = []


def in_pool(i: int) -> bool:
    if not ENGINE:
        ENGINE.append(explorer.compile(network(), X, threads=2))
    return right(ENGINE[0], X + i)


def spawns() -> None:
    """Compiling in a spawned worker works; sending a compiled module there is refused in plain words."""
    check_loader(Lazy(), "spawn")
    engine = explorer.compile(network(), X)
    with pytest.raises(EngineError, match="in the worker"):
        check_loader(Ready(engine), "spawn")


def interrupts() -> None:
    """Ctrl-C at any moment is a KeyboardInterrupt, and the module is as good as before."""
    # A shell that starts the tests in the background makes its children ignore interrupts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Python drops an interrupt that falls into the callback of a weak reference, of which torch has some, and says so.
    hook, dropped = sys.unraisablehook, []

    def unraisable(raised: Any) -> None:
        if raised.exc_type is KeyboardInterrupt:
            dropped.append(raised.exc_type)
        else:
            hook(raised)

    sys.unraisablehook = unraisable
    engine = explorer.compile(network(), X, threads=2)
    other = network()
    main = threading.main_thread().ident
    assert main is not None
    seen = 0
    for turn in range(60):
        timer = threading.Timer(0.002 + 0.0005 * turn, signal.pthread_kill, (main, signal.SIGINT))
        try:
            timer.start()
            until, i = time.monotonic() + 1, 0
            while time.monotonic() < until:
                if turn % 3 == 2:
                    engine.update_weights(other, choose=False)
                engine(X[: 1 + i % 4])
                i += 1
        except KeyboardInterrupt:
            seen += 1
        timer.join()
        for n in (4, 3, 1, 4):
            assert right(engine, X[:n]), (turn, n)
    assert seen + len(dropped) == 60
    assert seen > 50
    helpers = [t for t in threading.enumerate() if t.name.startswith("explorer-helper")]
    assert len(helpers) == 1
    # Idle helpers sleep: an interrupted wake-up must not leave them spinning.
    time.sleep(0.2)
    before = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - before < 0.2


def interrupted(call: Callable[[], object], place: int) -> float | None:
    """Press Ctrl-C at one of the places where the interpreter looks for it: where functions begin, and where those in C end.

    The seconds that it took to end the call; None when the call was through before.
    """
    pressed = 0.0

    def count(_frame: Any, event: str, _argument: Any) -> None:
        nonlocal place, pressed
        if event in ("call", "c_return"):
            place -= 1
            if place < 0:
                sys.setprofile(None)
                pressed = time.monotonic()
                signal.raise_signal(signal.SIGINT)

    sys.setprofile(count)
    try:
        call()
    except KeyboardInterrupt:
        return time.monotonic() - pressed
    except Exception as error:
        # Python's own `Condition`, and numpy, raise errors of their own when they are interrupted.
        if not comes_from_interrupt(error):
            raise
        return time.monotonic() - pressed
    finally:
        sys.setprofile(None)
    return None


def comes_from_interrupt(error: BaseException | None) -> bool:
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def places(call: Callable[[], object]) -> int:
    """How many there are in a call."""
    found = 0

    def count(_frame: Any, event: str, _argument: Any) -> None:
        nonlocal found
        found += event in ("call", "c_return")

    sys.setprofile(count)
    try:
        call()
    finally:
        sys.setprofile(None)
    return found


def interrupts_anywhere() -> None:
    """Wherever Ctrl-C meets a call, this thread and others can go on using the module, and torch has as many threads as before."""
    from tests.inference.test_threads import asleep  # needs llvmlite, which not every program here has

    signal.signal(signal.SIGINT, signal.default_int_handler)
    faulthandler.dump_traceback_later(100, exit=True)  # who waits for ever
    engine = explorer.compile(network(), X, threads=2)
    calls: list[Callable[[], object]] = [
        lambda: engine(X),
        lambda: engine(X[:1]),
        lambda: engine.benchmark(X, repeats=1, warn=False),
    ]
    for call in calls:
        place = 0
        asleep(engine)
        while interrupted(call, place) is not None:
            with ThreadPoolExecutor(1) as pool:
                assert pool.submit(right, engine, X).result(), place
            assert right(engine, X[:3]), place
            assert torch.get_num_threads() == 1, place
            place += 1
            asleep(engine)
        assert place > 10


def interrupts_compile() -> None:
    """Wherever Ctrl-C meets `compile`, it ends soon, and the same module can be compiled as before, also from what is in the cache by then."""
    from explorer.inference import native

    signal.signal(signal.SIGINT, signal.default_int_handler)
    # See `interrupts`.
    hook, dropped = sys.unraisablehook, []
    sys.unraisablehook = lambda raised: (
        dropped.append(raised) if raised.exc_type is KeyboardInterrupt else hook(raised)
    )
    faulthandler.dump_traceback_later(140, exit=True)
    module, loaded = network(), []
    weights = [parameter.data_ptr() for parameter in module.parameters()]

    def compiled() -> explorer.SparseModule:
        return explorer.compile(module, X, threads=2, sparse="sparse")

    def forget_code(folder: Path) -> None:
        os.environ["EXPLORER_CACHE"] = str(folder)
        loaded.append(native._loaded)  # what is still running must stay
        native._loaded = {}

    with tempfile.TemporaryDirectory() as name:
        compiled()  # what a process does but once
        forget_code(Path(name) / "first")
        most, draw, ended = places(compiled), random.Random(0), 0
        for turn in range(25):
            folder = Path(name) / str(turn // 5)
            if turn % 5 == 0:
                forget_code(folder)
            place = draw.randrange(most if turn % 5 == 0 else most // 2)
            waited = interrupted(compiled, place)
            if waited is not None:
                ended += 1
                assert waited < 5, (place, waited)
            assert [parameter.data_ptr() for parameter in module.parameters()] == weights, place
            assert not any(part.training for part in module.modules())
            assert right(compiled(), X), place
            # Also code that another process would find there.
            forget_code(folder)
            assert right(compiled(), X[:1]), place
            assert {entry.name for entry in folder.iterdir()} <= {"kernels", "choices.json"}, place
            for entry in (folder / "kernels").iterdir():
                assert native._ObjectFile(entry.stem).read() is not None, (place, entry)
        assert ended + len(dropped) > 20


def ends() -> None:
    """An interpreter with a live module in a global, helpers awake, ends at once and without a word."""
    ENGINE.append(explorer.compile(network(), X, threads=3))
    assert right(ENGINE[0], X)


def resident_bytes() -> int:
    """Where there is no /proc, the greatest use so far."""
    try:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf(
            "SC_PAGE_SIZE"
        )
    except FileNotFoundError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def live_tensors() -> int:
    return sum(type(thing) is torch.Tensor for thing in gc.get_objects())


class _Mallinfo(ctypes.Structure):
    """glibc's ``struct mallinfo2``."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
        )
    ]  # fmt: skip


def allocated_bytes() -> int:
    """What `malloc` has given out and not got back; 0 where nobody tells (glibc does)."""
    mallinfo = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo is None:
        return 0
    mallinfo.restype = _Mallinfo
    info = mallinfo()
    return int(info.uordblks + info.hblkhd)


class Inputs(nn.Module):
    """Several inputs, one of them in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x: torch.Tensor, others: list[torch.Tensor]) -> torch.Tensor:
        return torch.relu(self.conv(x) + others[0]) + others[1]


class Interrupted(nn.Module):
    """Native layers, an operator that torch runs, and native layers again."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(2, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.sin(self.a(x)))


class Turned(nn.Module):
    """torch's own attention, which puts tokens before samples."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


def calls() -> None:
    """Thousands of calls of every kind leave no memory, no tensor and no thread behind.

    Of what `malloc` and Python's allocator gave out, 20,000 calls were seen to keep 130 blocks and 6 KB at most, and those not call by call.
    """
    from explorer.inference import execution

    x, cached_bytes = torch.ones(2, 1, 4, 4), execution._CACHED_BYTES
    plain = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), nn.ReLU())
    kinds: dict[str, tuple[nn.Module, tuple[Any, ...]]] = {
        "straight": (plain, (x,)),
        "inputs": (Inputs(), (x, [x + 1, x + 2])),
        "interrupted": (Interrupted(), (x,)),
        "turned": (Turned(), (torch.ones(2, 3, 4),)),
        "in turns": (network(), (X,)),
    }
    for (kind, (module, inputs)), threads in itertools.product(kinds.items(), (1, 2)):
        execution._CACHED_BYTES = 1 if kind == "in turns" else cached_bytes
        engine = explorer.compile(module.eval(), inputs, threads=threads)
        assert len(engine.fallbacks) == (kind == "interrupted")
        assert (engine._network.at_once is not None) == (kind == "in turns")
        fewer = pytree.tree_map(lambda value: value[:1], inputs)

        def call(times: int, few: Any = fewer, all_: Any = inputs, engine: Any = engine) -> None:
            for i in range(times):
                engine(*(all_ if i % 10 else few))
            gc.collect()

        call(2000)
        # The list of all objects takes megabytes itself: made before the memory is measured.
        tensors, alive = live_tensors(), threading.active_count()
        resident, allocated, blocks = resident_bytes(), allocated_bytes(), sys.getallocatedblocks()
        call(8000)
        blocks, allocated = sys.getallocatedblocks() - blocks, allocated_bytes() - allocated
        assert blocks < 400, (kind, threads, blocks)
        assert allocated < 32 << 10, (kind, threads, allocated)
        # Neither counts pages that are mapped; of which one may be a huge one that comes at any time.
        assert resident_bytes() - resident < 4 << 20, (kind, threads)
        assert live_tensors() - tensors <= 32, (kind, threads)  # results are made several at a time
        assert threading.active_count() == alive


def without_llvmlite() -> None:
    """The same interface through torch, with one warning that says why."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        engine = explorer.compile(network(), X, threads=2)
    assert [w.category for w in caught] == [EngineWarning], [str(w.message) for w in caught]
    assert "llvmlite" in str(caught[0].message)
    assert caught[0].filename == __file__
    assert engine.isa == "torch"
    assert len(engine.fallbacks) == 7
    assert engine.choices == {}
    for n in (4, 2, 1):
        assert right(engine, X[:n])
    rows = engine.profile(X, repeats=3)
    assert len(rows) == 7 + 1  # the last is the call itself
    assert {row.kernel for row in rows[:-1]} == {"torch"}
    assert engine.benchmark(X, repeats=5).isa == "torch"
    doubled = network()
    doubled[6].weight.data *= 2
    doubled[6].bias.data *= 2
    engine.update_weights(doubled)
    assert torch.allclose(engine(X), 2 * expected(X), atol=1e-4)
    with pytest.raises(EngineError, match="compiled for"):
        engine(X[:, :1])


PROGRAMS = {
    p.__name__: p
    for p in (
        calls,
        forks,
        forks_with_torch,
        spawns,
        interrupts,
        interrupts_anywhere,
        interrupts_compile,
        ends,
        without_llvmlite,
    )
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    PROGRAMS[sys.argv[1]]()
