"""What must never happen: a crash, a hang, a leak, a wrong number; whatever threads, processes, inputs and files are thrown at the engine."""

from __future__ import annotations

import ast
import gc
import os
import signal
import stat
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import explorer
import explorer.errors
from explorer.errors import EngineError
from explorer.folders import held_below
from explorer.inference import choosing, native
from explorer.inference.layout import Planes
from explorer.inference.memory import Memory
from explorer.inference.module import SparseModule
from explorer.inference.pack import linear_sparse, weight_words
from explorer.inference.sparse_rows import SparseWeights, sparse_entries
from tests.inference.graphs import conv_graph, relative_error
from tests.inference.test_kernels import why_not
from tests.inference.test_partners import needs_code
from tests.inference.workers import X, expected, network, right

ROOT = Path(__file__).resolve().parents[2]
POSIX = pytest.mark.skipif(os.name != "posix", reason="Windows knows neither fork nor mprotect")
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def python(*arguments: str, seconds: float = 200, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=False, cwd=ROOT, timeout=seconds,
        env={**os.environ, **environment}, stdin=subprocess.DEVNULL,
    )  # fmt: skip


# ---- threads


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_that_share_a_module_each_get_their_own_answer(threads: int) -> None:
    engine = explorer.compile(network(), X, threads=threads)
    inputs = [X[: 1 + i] + i for i in range(4)]  # other values and other batches
    wanted = [expected(x) for x in inputs]
    wrong: list[int] = []

    def call(i: int) -> None:
        for _ in range(100):
            got = engine(inputs[i])
            if got.shape != wanted[i].shape or not torch.allclose(got, wanted[i], atol=1e-4):
                wrong.append(i)

    callers = [threading.Thread(target=call, args=(i,)) for i in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert wrong == []


def test_a_call_that_waited_for_new_weights_uses_them(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, other = explorer.compile(network(), X), network()
    for parameter in other.parameters():
        parameter.data *= 2
    lock = engine._lock

    class Taken:
        """By another thread, which is quicker."""

        def inside(self) -> object:
            monkeypatch.setattr(engine, "_lock", lock)
            assert engine._network._runner is not None
            engine._network._runner.scratch_bytes = -1  # the new weights need more, and another runner
            engine.update_weights(other, choose=False)
            return lock.inside()

    monkeypatch.setattr(engine, "_lock", Taken())
    with torch.no_grad():
        assert relative_error(engine(X), other(X)) < 1e-4


# ---- inputs


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ((X, X), "2 inputs .* takes 1"),
        ((), "0 inputs .* takes 1"),
        ((X.numpy(),), r"ndarray; .*tensor of shape \(4, 2, 12, 12\)"),
        ((None,), "NoneType; .*tensor"),
        ((X[0],), r"\(2, 12, 12\); .*compiled for \(4, 2, 12, 12\)"),
        ((X.repeat(2, 1, 1, 1),), r"\(8, 2, 12, 12\); .*compiled for \(4, 2, 12, 12\)"),
        ((X[:, :1],), r"\(4, 1, 12, 12\); .*compiled for"),
        ((X[:0],), r"empty: it has shape \(0, 2, 12, 12\)"),
        ((X[..., :0],), "empty"),
        ((X.half(),), "float16; .*float32"),
        ((X.long(),), "int64; .*float32"),
        ((X.to("meta"),), "on meta; .*cpu"),
        ((X.to_sparse(),), "sparse_coo tensor .*strided"),
    ],
)
def test_an_input_that_does_not_fit_is_named_beside_what_does(inputs: tuple, words: str) -> None:
    engine = explorer.compile(network(), X)
    for _ in range(2):
        with pytest.raises(EngineError, match=words):
            engine(*inputs)
        assert right(engine, X)


class Scaled(nn.Module):
    def forward(self, x: torch.Tensor, y: torch.Tensor, by: int = 2) -> torch.Tensor:
        return torch.relu(x + y) * by


def test_inputs_whose_batches_differ_are_refused() -> None:
    x = torch.randn(4, 3)
    engine = explorer.compile(Scaled(), (x, x))
    assert torch.equal(engine(x[:2], x[:2]), torch.relu(2 * x[:2]) * 2)
    with pytest.raises(EngineError, match=r"Input 1 has shape \(4, 3\), but input 0 holds a batch of 2"):
        engine(x[:2], x)


class Sum(nn.Module):
    """Of two inputs, a parameter and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.layer = nn.Parameter(torch.randn(4, 3)), nn.Linear(3, 3)
        self.register_buffer("shift", torch.randn(4, 3))

    def forward(self, x: torch.Tensor, y: list[torch.Tensor]) -> torch.Tensor:
        return self.layer(x) + y[0] * self.scale + self.shift


@pytest.mark.parametrize("places", ["both inputs", "the first and a parameter", "the second and a buffer"])
def test_a_tensor_that_stands_in_two_places_of_the_example_is_two_inputs_all_the_same(places: str) -> None:
    module, x = Sum().eval(), torch.randn(4, 3)
    first = module.scale if "parameter" in places else x
    second = x if places == "both inputs" else module.shift if "buffer" in places else torch.randn(4, 3)
    engine = explorer.compile(module, (first, [second]))
    x, y = torch.randn(2, 4, 3)
    with torch.no_grad():
        assert torch.allclose(engine(x, [y]), module(x, [y]), atol=1e-5)
        assert torch.allclose(engine(x, [x]), module(x, [x]), atol=1e-5)


def test_a_number_among_the_arguments_stays_what_it_was_and_another_one_is_refused() -> None:
    x, module = torch.randn(4, 3), Scaled().eval()
    engine = explorer.compile(module, (x, x, 2))
    assert torch.allclose(engine(x, x, 2), module(x, x, 2), atol=1e-5)
    with pytest.raises(EngineError, match="'by' is 3; this network was compiled with 2"):
        engine(x, x, 3)


def test_inputs_of_any_strides_and_with_gradients_give_the_same_answer() -> None:
    engine = explorer.compile(network(), X)
    wide = torch.zeros(8, 3, 12, 24)
    wide[::2, 1:, :, ::2] = X
    variants = [
        X.to(memory_format=torch.channels_last), X.transpose(2, 3).contiguous().transpose(2, 3), wide[::2, 1:, :, ::2],
        X.clone().requires_grad_(), nn.Parameter(X.clone()), X[:1].expand(4, -1, -1, -1),
    ]  # fmt: skip
    for x in variants:
        got = engine(x)
        assert not got.requires_grad
        assert got.is_contiguous()
        assert torch.allclose(got, expected(x.detach()), atol=1e-4)
    with torch.inference_mode():
        assert torch.allclose(engine(X + 0), expected(X), atol=1e-4)


# ---- numbers that are none


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("size", [(4, 4), (5, 9), (16, 16), (7, 33)])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("mode", ["sparse", "dense"])
def test_a_poisoned_pixel_spreads_as_far_as_in_torch_and_no_further(
    poison: float, size: tuple[int, int], stride: int, mode: str
) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 7, 3, stride, 1), nn.ReLU6(), nn.Conv2d(7, 5, 3, padding=1), nn.MaxPool2d(2, 1, 1), nn.ReLU()
    ).eval()  # fmt: skip
    for y, x in ((0, 0), (size[0] - 1, size[1] - 1), (0, size[1] - 1), (2, 3)):
        image = torch.randn(1, 3, *size)
        image[0, 1, y, x] = poison
        engine = explorer.compile(net, image, sparse=mode)
        with torch.no_grad():
            np.testing.assert_allclose(engine(image).numpy(), net(image).numpy(), atol=1e-4)
            clean = torch.randn(1, 3, *size)  # nothing of it may stay in gaps and guards
            np.testing.assert_allclose(engine(clean).numpy(), net(clean).numpy(), atol=1e-4)


@pytest.mark.parametrize("nonzeros", range(1, 10))
@pytest.mark.parametrize("sparse", ["sparse", "auto"])
def test_an_infinity_that_meets_nonzero_weights_only_stays_infinite(nonzeros: int, sparse: str) -> None:
    # Rows are filled up to whole vectors or unrolled steps; zero weights there would make 0 * inf = NaN of it.
    conv, line = nn.Conv2d(nonzeros, 3, 1, bias=False), nn.Linear(nonzeros, 3, bias=False)
    for layer, shape in ((conv, (1, nonzeros, 3, 3)), (line, (1, nonzeros))):
        layer.weight.data.abs_()
        x = torch.full(shape, float("inf"))
        with torch.no_grad():
            wanted = layer(x)
        assert wanted.isinf().all()
        assert torch.equal(explorer.compile(layer, x, sparse=sparse)(x), wanted)


def test_a_nan_behind_a_zero_weight_is_never_read_by_a_sparse_kernel() -> None:
    layer = nn.Linear(20, 6)
    layer.weight.data[:, 0] = 0
    x = torch.randn(1, 20)
    x[0, 0] = torch.nan
    got = explorer.compile(layer, x, sparse="sparse")(x)
    assert torch.allclose(got, layer(x.nan_to_num()), atol=1e-5)


@needs_code
@pytest.mark.parametrize("unroll", [1, 2, 4])
def test_filled_up_rows_hold_the_weights_exactly(unroll: int) -> None:
    generator = np.random.default_rng(0)
    weight = generator.standard_normal((40, 33)).astype(np.float32)
    weight[generator.random(weight.shape) < generator.random((40, 1))] = 0
    weights = SparseWeights.of(weight, native.current_isa())
    block = np.arange(33) * 3 // 33  # three blocks of columns
    entries = sparse_entries(
        weights,
        4 * np.arange(33),
        block,
        3,
        unroll,
        partial(weight_words, isa=native.Isa("test", 16, 32, "", "")),
        native.current_isa(),
    )
    offsets, rows, groups = entries.offsets, entries.rows, entries.groups
    values = entries.words[:, 0].copy().view(np.float32)
    assert (values != 0).all()
    assert not entries.pairs.any()
    rebuilt = np.zeros(weight.shape)  # float64: the sum of the pieces is exact
    for first, last in pairwise(entries.starts):
        runs = groups[first[3] : last[3]]
        at = first[0]
        for row, n in zip(rows[first[2] : last[2]], np.repeat(runs[:, 1], runs[:, 2]) * unroll, strict=True):
            np.add.at(rebuilt[row], offsets[at : at + n] // 4, values[at : at + n])
            at += n
        assert at == last[0] == last[1]
    starts = entries.starts
    assert set(rows[: starts[1, 2]]) == set(rows[starts[2, 2] :]) == set(range(40))
    np.testing.assert_array_equal(rebuilt, weight)
    starts, indices, values = linear_sparse(weights, 4 * unroll)
    rebuilt = np.zeros(weight.shape)
    of = np.repeat(np.arange(40), np.diff(starts) * 4 * unroll)
    np.add.at(rebuilt, (of, indices), values)
    np.testing.assert_array_equal(rebuilt, weight)


def test_tensors_share_memory_only_when_their_gaps_coincide() -> None:
    # Both are 2 vectors of 16 with a guard of 10: what is a pixel of the one is a gap of the other.
    a = Planes((1, 1, 4, 6), 1, 1, 4, 6, 8, 48, 10, 16)
    b = Planes((1, 1, 3, 8), 1, 1, 3, 8, 9, 48, 10, 16)
    assert (a.vectors, a.plane, a.guard) == (b.vectors, b.plane, b.guard)
    assert a.reuse_key != b.reuse_key


# ---- processes, signals


@POSIX
@pytest.mark.parametrize(
    "program",
    [
        "calls",
        "forks",
        "forks_with_torch",
        pytest.param("spawns", marks=pytest.mark.slow),
        "interrupts",
        "interrupts_anywhere",
        "interrupts_compile",
        "ends",
    ],
)
def test_other_processes_and_signals_do_no_harm(program: str) -> None:
    start = time.monotonic()
    done = python("-m", "tests.inference.workers", program)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert time.monotonic() - start < 150


def test_a_compiled_module_is_not_pickled_but_says_what_to_do() -> None:
    import copy
    import pickle

    engine = explorer.compile(network(), X)
    for attempt in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(EngineError, match=r"Send the nn\.Module instead"):
            attempt(engine)


def test_an_interrupted_update_leaves_all_old_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, other = explorer.compile(network(), X), network()
    for parameter in other.parameters():
        parameter.data *= 2
    assert right(engine, X[:2])  # what is kept is set for a smaller batch
    original = choosing._step_times

    def interrupted(*_: object) -> object:
        monkeypatch.setattr(choosing, "_step_times", original)
        raise KeyboardInterrupt

    monkeypatch.setattr(choosing, "_step_times", interrupted)
    monkeypatch.setattr(engine._network, "mode", "sparse")  # two candidates for each convolution
    with pytest.raises(KeyboardInterrupt):
        engine.update_weights(other)
    assert right(engine, X)
    assert right(engine, X[:2])
    engine.update_weights(other)
    with torch.no_grad():
        assert relative_error(engine(X), other(X)) < 1e-4


# ---- leaks


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def tiny(threads: int = 1) -> SparseModule:
    plain = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1}
    graph = conv_graph((1, 1, 4, 4), torch.ones(1, 1, 3, 3), None, **plain)
    return SparseModule(graph, (torch.zeros(1, 1, 4, 4),), threads, "sparse")


@LINUX
def test_networks_that_are_dropped_give_back_memory_and_threads() -> None:
    made: list[weakref.ref[Memory]] = []
    original = Memory.__init__

    def counted(self: Memory) -> None:
        original(self)
        made.append(weakref.ref(self))

    tiny(2)
    gc.collect()
    threads, before = threading.active_count(), resident_bytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Memory, "__init__", counted)
        for _ in range(50):
            tiny(2)(torch.ones(1, 1, 4, 4))
    gc.collect()
    assert len(made) >= 150
    assert not [memory for memory in made if memory() is not None]
    assert threading.active_count() == threads
    assert resident_bytes() - before < 8 << 20


# ---- the cache of object code


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    tiny()  # what a process makes but once is made elsewhere
    monkeypatch.setenv("EXPLORER_CACHE", str(tmp_path))
    monkeypatch.setattr(native, "_loaded", {})
    native._prune_once.cache_clear()
    return tmp_path / "kernels"


def works_from_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_loaded", {})
    got = tiny()(torch.ones(1, 1, 4, 4))
    assert got.flatten().tolist() == [4, 6, 6, 4, 6, 9, 9, 6, 6, 9, 9, 6, 4, 6, 6, 4]


def test_damaged_and_foreign_files_are_compiled_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    works_from_disk(monkeypatch)
    entries = sorted(cache.glob("*.o"))
    good = {entry: entry.read_bytes() for entry in entries}
    assert len(good) >= 3

    def foreign(entry: Path) -> bytes:
        return next(
            code for other, code in good.items() if other != entry
        )  # whole, valid, and another kernel's

    for damage in (
        lambda e: good[e][: len(good[e]) // 2], lambda e: good[e][:20], lambda _: b"", lambda _: os.urandom(3000),
        lambda e: good[e][:-1] + bytes([good[e][-1] ^ 1]), lambda e: b"\0" + good[e][1:], foreign,
    ):  # fmt: skip
        for entry in entries:
            entry.write_bytes(damage(entry))
        works_from_disk(monkeypatch)
        for entry in entries:
            assert entry.read_bytes()[:32] == native._ObjectFile(entry.stem)._seal(entry.read_bytes()[32:])


def test_what_is_whole_is_not_compiled_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    works_from_disk(monkeypatch)

    def never(*_: object) -> bytes:
        raise AssertionError("compiled again")

    monkeypatch.setattr(native, "_emit", never)
    works_from_disk(monkeypatch)


def test_a_folder_in_the_place_of_a_file_and_a_file_in_the_place_of_the_folder_do_no_harm(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    works_from_disk(monkeypatch)
    for entry in list(cache.glob("*.o")):
        entry.unlink()
        entry.mkdir()
    works_from_disk(monkeypatch)
    assert not list(cache.glob("*.tmp"))
    for entry in cache.iterdir():
        entry.rmdir()
    cache.rmdir()
    cache.write_text("not a folder")
    works_from_disk(monkeypatch)
    assert cache.read_text() == "not a folder"


def test_a_folder_that_may_not_be_read_or_written_does_no_harm(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    works_from_disk(monkeypatch)

    def refused(*_: object, **__: object) -> object:
        raise PermissionError

    monkeypatch.setattr(Path, "read_bytes", refused)
    monkeypatch.setattr(native, "_at_once", refused)
    native.generator_version.cache_clear()  # it reads the generators' sources
    for where in ("native", "plan"):
        monkeypatch.setattr(f"explorer.inference.{where}.generator_version", lambda: "1")
    monkeypatch.setattr(native.tempfile, "mkstemp", refused)
    works_from_disk(monkeypatch)


@POSIX
def test_an_entry_that_another_user_can_have_written_is_compiled_again(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    works_from_disk(monkeypatch)
    entries = sorted(cache.glob("*.o"))
    for entry in entries:
        entry.chmod(0o666)
    works_from_disk(monkeypatch)
    assert {stat.S_IMODE(entry.stat().st_mode) for entry in entries} == {0o600}

    def trusted(mode: int, owner: int) -> bool:
        return native._is_ours(os.stat_result((mode, 0, 0, 1, owner, 0, 100, 0, 0, 0)))

    me = os.geteuid()
    assert trusted(stat.S_IFREG | 0o644, me)
    assert trusted(stat.S_IFREG | 0o644, 0)
    assert not trusted(stat.S_IFREG | 0o644, me + 1)
    assert not trusted(stat.S_IFREG | 0o664, me)
    assert not trusted(stat.S_IFDIR | 0o600, me)


@POSIX
def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    works_from_disk(monkeypatch)
    entries = sorted(cache.glob("*.o"))
    for entry in entries:
        entry.unlink()
        os.mkfifo(entry)
    works_from_disk(monkeypatch)
    assert all(entry.is_file() for entry in entries)


def test_the_cache_knows_all_that_generators_import() -> None:
    folder = Path(native.__file__).parent
    imported = set()
    for source in (folder / "kernels").glob("*.py"):
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module is not None:
                found = node.module.removeprefix("explorer.inference.").split(".")[0] + ".py"
                imported |= {found} if (folder / found).exists() else set()
    assert imported == set(native.GENERATED_WITH)


def test_a_user_without_a_home_has_no_cache_and_no_trouble(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for variable in ("EXPLORER_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    assert native.cache_folder() is None
    works_from_disk(monkeypatch)


def test_processes_that_write_the_same_files_at_once_do_no_harm(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = (
        "import torch\nfrom explorer.inference import native\nfrom tests.inference.test_safety import tiny\n"
        "for _ in range(5):\n    native._loaded.clear()\n    [f.unlink(missing_ok=True) for f in native.cache_folder().glob('*.o')]\n"
        "    assert tiny()(torch.ones(1, 1, 4, 4)).sum() == 100\n"
    )
    both = [subprocess.Popen([sys.executable, "-c", program], cwd=ROOT) for _ in range(2)]
    assert [process.wait(timeout=200) for process in both] == [0, 0]
    works_from_disk(monkeypatch)
    assert not list(cache.glob("*.tmp"))


def test_the_cache_forgets_what_was_not_used_for_longest(tmp_path: Path) -> None:
    for i in range(10):
        file = tmp_path / f"{i}.o"
        file.write_bytes(bytes(100))
        os.utime(file, (1000 + i, 1000 + i))
    (tmp_path / "mine.txt").write_bytes(bytes(1000))
    held_below(tmp_path, 450, (".o", ".tmp"))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["6.o", "7.o", "8.o", "9.o", "mine.txt"]
    held_below(tmp_path / "missing", 0, (".o",))


def test_a_process_that_compiles_holds_the_cache_below_its_limit(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.mkdir()
    old = cache / "old.o"
    old.write_bytes(bytes(1 << 20))
    os.utime(old, (1, 1))
    monkeypatch.setattr(native, "CACHE_LIMIT_BYTES", 1 << 20)
    works_from_disk(monkeypatch)
    assert not old.exists()
    assert list(cache.glob("*.o"))


# ---- bounds


@pytest.fixture(scope="module")
def guarded_runs(request: pytest.FixtureRequest) -> Iterator[dict[tuple[str, str], Future[Any]]]:
    """The processes of all bounds tests that were asked for: one for each side, whose instruction sets share what torch captures."""
    wanted: dict[tuple[str, str], list[str]] = {}
    for item in request.session.items:
        parameters = getattr(item, "callspec", None) and item.callspec.params
        if parameters and "networks" in parameters:
            isa, side, networks, precision = (
                parameters[name] for name in ("isa", "side", "networks", "precision")
            )
            if not why_not(isa, precision):
                wanted.setdefault((side, networks), []).append(f"{isa}:{precision}")
    with ThreadPoolExecutor(2) as pool:
        yield {
            which: pool.submit(python, "-m", "tests.inference.guarded", *which, *ways, seconds=580)
            for which, ways in wanted.items()
        }


@POSIX
@pytest.mark.timeout(600)
@pytest.mark.parametrize("isa", ["avx512", "avx2", "neon", "generic"])
@pytest.mark.parametrize(
    ("side", "networks"),
    [
        # All of them by hand: `python -m tests.inference.guarded end all avx512:fp32 avx2:fp32 ...`
        pytest.param("end", "in-turns", marks=pytest.mark.slow),
        # Kernels read ahead more often than back: one size of each network will do.
        ("start", "(5, 9)"),
    ],
)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_no_kernel_reads_or_writes_outside_its_buffers(
    isa: str, side: str, networks: str, precision: str, guarded_runs: dict[tuple[str, str], Future[Any]]
) -> None:
    if why := why_not(isa, precision):
        pytest.skip(why)
    done = guarded_runs[side, networks].result()
    assert done.returncode == 0, done.stdout[-200:] + done.stderr
    assert f"engines of {isa}:{precision} ran within their buffers" in done.stdout


OVERRUN = """
import ctypes, sys
import numpy as np
from tests.inference.guarded import Guards
from explorer.inference.memory import Memory
guards = Guards(sys.argv[1]); guards.install()
floats = Memory().zeros(32, np.float32)
at = floats.ctypes.data + int(sys.argv[2])
(ctypes.memset(at, 1, 4) if sys.argv[3] == "write" else ctypes.string_at(at, 4))
guards.check()
"""

TOO_SMALL = """
from explorer.inference import layout
# Up to the last pixel, and without the guard after it.
layout.Planes.elements = property(lambda p: p.before + (p.images * p.channels - 1) * p.plane + p.rows * p.pitch)
from tests.inference import guarded
guarded.main("end", "conv 3x3 (5, 9)")
"""

TABLE_TOO_SMALL = """
import numpy as np
from explorer.inference import native, sparse_rows
from explorer.inference.kernels import find_nonzeros
from tests.inference.guarded import Guards
Guards("end").install()
room = 100
tables = {
    "weight": np.ones((40, 50), np.float32), "ends": np.zeros(40, np.int64),
    "columns": np.zeros(room, np.int64), "values": np.zeros((room, 1), np.float32),
}
kernel, numbers = find_nonzeros.FindNonzerosKernel(1), {"rows": 40, "row_length": 50, "most": 40 * 50}
sparse_rows.run_kernel(kernel, find_nonzeros.ARGUMENTS, native.current_isa().single, tables, **numbers)
"""


@POSIX
@pytest.mark.parametrize(
    ("side", "offset", "access", "crashes"),
    [
        ("end", 124, "read", False), ("end", 128, "read", True), ("end", 128, "write", True), ("start", 0, "write", False),
        ("start", -4, "read", True), ("start", -4, "write", True),
    ],
)  # fmt: skip
def test_the_guards_catch_an_access_one_element_outside(
    side: str, offset: int, access: str, crashes: bool
) -> None:
    done = python("-c", OVERRUN, side, str(offset), access)
    assert done.returncode == (-signal.SIGSEGV if crashes else 0), done.stderr


@POSIX
def test_the_guards_catch_kernels_whose_planes_have_too_little_room() -> None:
    assert python("-c", TOO_SMALL).returncode == -signal.SIGSEGV


@POSIX
@needs_code
def test_the_guards_catch_kernels_that_pack_weights_into_tables_with_too_little_room() -> None:
    assert python("-c", TABLE_TOO_SMALL).returncode == -signal.SIGSEGV


# ---- machines without machine code


WITHOUT_LLVMLITE = """
import runpy, sys
sys.modules["llvmlite"] = sys.modules["llvmlite.binding"] = None
sys.argv = ["workers", "without_llvmlite"]
runpy.run_module("tests.inference.workers", run_name="__main__", alter_sys=True)
"""


def test_without_llvmlite_everything_runs_through_torch_with_one_warning() -> None:
    done = python("-c", WITHOUT_LLVMLITE)
    assert done.returncode == 0, done.stderr


def test_a_cpu_without_wide_vectors_gets_torch_and_a_warning_that_names_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(native.ISA_VARIABLE, raising=False)
    monkeypatch.setattr(native.llvm, "get_host_cpu_features", native.llvm.targets.FeatureMap)
    monkeypatch.setattr(native.llvm, "get_process_triple", lambda: "x86_64-unknown-linux-gnu")
    native.host_isa.cache_clear()
    try:
        with pytest.warns(explorer.errors.EngineWarning, match="neither AVX2 with FMA nor NEON"):
            engine = explorer.compile(network(), X)
        assert native.host_isa("generic").lanes == 4
    finally:
        native.host_isa.cache_clear()
    assert engine.isa == "torch"
    for n in (4, 1):
        assert right(engine, X[:n])


def test_torch_can_be_asked_for_and_is_then_no_surprise(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setenv(native.ISA_VARIABLE, "torch")
    engine = explorer.compile(network(), X)
    assert engine.isa == "torch"
    assert right(engine, X[:3])
    assert not [w for w in recwarn if issubclass(w.category, explorer.errors.EngineWarning)]


class Stem(nn.Module):
    """What reads an image where the caller has it: a convolution with a stride, of rows that fill whole vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.conv(x))


def freed(engine: SparseModule, x: torch.Tensor) -> None:
    x = x.clone()
    x.untyped_storage().resize_(0)
    engine(x)


def exported(engine: SparseModule, x: torch.Tensor) -> None:
    class Outer(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return engine(x)

    torch.export.export(Outer(), (x,), strict=False)


@pytest.mark.parametrize(
    "call",
    [
        freed, exported,
        lambda engine, x: engine(torch._efficientzerotensor(x.shape)),
        lambda engine, x: torch.func.functionalize(engine)(x),
        lambda engine, x: torch.func.grad(lambda x: engine(x).sum())(x),
        lambda engine, x: torch.vmap(engine)(x[None]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("reads", ["in place", "a copy"])
def test_a_tensor_without_values_is_refused_and_not_read(call: Callable[..., Any], reads: str) -> None:
    module, x = (Stem().eval(), torch.randn(2, 3, 14, 32)) if reads == "in place" else (network(), X)
    engine = explorer.compile(module, x)
    with pytest.raises(EngineError, match="no values in memory"):
        call(engine, x)
    with torch.no_grad():
        assert torch.allclose(engine(x), module(x), atol=1e-5)


@pytest.mark.parametrize("threads", [1, 2])
def test_an_image_is_read_where_the_caller_has_it_and_only_for_the_call(threads: int) -> None:
    torch.manual_seed(0)
    network = Stem().eval()
    images = torch.randn(3, 2, 3, 14, 32)
    engine = explorer.compile(network, images[0], threads=threads)
    own = next(place for place in engine._network.plan.places.values() if place.cell is not None)
    assert own.view is not None
    own.view.fill_(float("nan"))  # would be seen if the copy were read
    for x in images:
        before = x.clone()
        out = engine(x)
        assert torch.equal(x, before)
        assert torch.allclose(out, network(x), atol=1e-5)
        x.fill_(float("nan"))  # is the caller's again, and the output no part of it
        assert torch.allclose(out, network(before), atol=1e-5)


@pytest.mark.parametrize("threads", [1, 2])
def test_images_that_lie_otherwise_are_copied(threads: int) -> None:
    torch.manual_seed(0)
    network, x = Stem().eval(), torch.randn(2, 3, 14, 32)
    engine = explorer.compile(network, x, threads=threads)
    wanted = network(x)
    wide = torch.randn(2, 3, 14, 40)
    wide[..., 4:36] = x
    double = torch.repeat_interleave(x, 2, 0)
    same = x[:1].expand(2, -1, -1, -1)
    for value, result in (
        (x.contiguous(memory_format=torch.channels_last), wanted),
        (wide[..., 4:36], wanted),
        (double[::2], wanted),
        (x.flip(3).flip(3), wanted),
        (nn.Parameter(x.clone()), wanted),
        (same, network(same)),
        (torch.complex(x, -x).conj().imag, wanted),  # negated when it is read, not before
        (x[1:], wanted[1:]),
        (x.transpose(2, 3).contiguous().transpose(2, 3)[:1], wanted[:1]),
    ):
        assert torch.allclose(engine(value), result, atol=1e-5)
        assert torch.allclose(engine(x), wanted, atol=1e-5)


@pytest.mark.parametrize("columns", [31, 33, 63, 65])
def test_rows_that_end_within_a_vector_are_not_read_in_place(columns: int) -> None:
    torch.manual_seed(0)
    network, x = Stem().eval(), torch.randn(1, 3, 14, columns)
    engine = explorer.compile(network, x)
    assert all(place.cell is None for place in engine._network.plan.places.values())
    assert torch.allclose(engine(x), network(x), atol=1e-5)
