"""What the user holds: errors that help, smaller batches, new weights, threads, measurements."""

from __future__ import annotations

import copy
import ctypes
import itertools
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import explorer
from explorer.errors import EngineError, EngineWarning
from explorer.inference import choosing, compare_latency, compilation, dense_contestants, native, timing
from explorer.inference.choices import ChoiceCache, choice_cache
from explorer.inference.execution import Execution
from explorer.inference.memory import Memory
from explorer.inference.module import Mode, SparseModule
from explorer.models import architectures
from tests.inference.graphs import relative_error
from tests.inference.test_kernels import run_by
from tests.inference.test_networks import pruned
from tests.inference.test_operators import Function


def small_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 24, 3, stride=2, padding=1),
        nn.ReLU6(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(24, 10),
    ).eval()


X = torch.randn(4, 2, 12, 12, generator=torch.Generator().manual_seed(3))


def test_compiling_leaves_the_module_as_it_was() -> None:
    network = small_network().train()
    before = copy.deepcopy(network.state_dict())
    explorer.compile(network, X)
    assert network.training
    assert all(m.training for m in network.modules())
    assert all(torch.equal(a, b) for a, b in zip(before.values(), network.state_dict().values(), strict=True))


def test_outputs_are_the_callers_own() -> None:
    engine = explorer.compile(small_network(), X)
    first = engine(X)
    kept = first.clone()
    engine(X + 1)
    assert torch.equal(first, kept)


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (torch.zeros(5, 2, 12, 12), "compiled for"),
        (torch.zeros(4, 2, 12, 13), "compiled for"),
        (torch.zeros(4, 2, 12), "compiled for"),
        (torch.zeros(4, 2, 12, 12, dtype=torch.float64), "float64"),
    ],
)
def test_an_input_that_does_not_fit_is_refused_with_the_shape_that_does(x: torch.Tensor, words: str) -> None:
    engine = explorer.compile(small_network(), X)
    with pytest.raises(EngineError, match=words):
        engine(x)


def test_a_module_in_another_precision_is_refused() -> None:
    with pytest.raises(EngineError, match="float32"):
        explorer.compile(small_network().double(), X.double())


def test_wrong_options_are_refused() -> None:
    with pytest.raises(EngineError, match="threads"):
        explorer.compile(small_network(), X, threads=0)
    with pytest.raises(EngineError, match="sparse"):
        explorer.compile(small_network(), X, sparse="maybe")  # type: ignore[arg-type]


class Undecided(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1 if x.sum() > 0 else x - 1


def test_what_is_no_module_and_no_number_of_threads_is_refused() -> None:
    with pytest.raises(EngineError, match=r"A str was passed as the module; give an nn\.Module"):
        explorer.compile("network", X)
    with pytest.raises(EngineError, match="threads=True was passed; give a whole number"):
        explorer.compile(small_network(), X, threads=True)
    engine = explorer.compile(small_network(), X)
    with pytest.raises(EngineError, match=r"A OrderedDict was passed.*load_state_dict"):
        engine.update_weights(small_network().state_dict())


def test_no_runs_have_no_median() -> None:
    engine = explorer.compile(small_network(), X)
    for measure in (engine.benchmark, engine.profile):
        for repeats in (0, -1, 2.5, True, "3", None):
            with pytest.raises(EngineError, match=f"repeats={repeats!r} was passed; a median needs at least"):
                measure(X, repeats=repeats)
        with pytest.raises(EngineError, match="0 inputs were passed"):
            measure()


def test_networks_of_no_input_or_of_a_single_number_can_be_measured_too() -> None:
    alone = Function(lambda m: m.a.weight.sum(), a=nn.Linear(3, 2)).eval()
    engine = explorer.compile(alone, ())
    assert relative_error(engine(), alone()) < 1e-5
    assert engine.benchmark(repeats=2, warn=False).batch_size == 1
    assert engine.profile(repeats=2)
    number = Function(lambda m, x: m.a.weight * x, a=nn.Linear(3, 2)).eval()
    engine, two = explorer.compile(number, torch.tensor(2.0)), torch.tensor(2.0)
    assert relative_error(engine(two), number(two)) < 1e-5
    assert engine.benchmark(two, repeats=2, warn=False).batch_size == 1


def test_control_flow_on_values_is_named_as_the_reason() -> None:
    with pytest.raises(EngineError, match=r"(?s)could not capture Undecided.*Control flow"):
        explorer.compile(Undecided(), X)


def test_new_weights_are_taken_over_without_capturing_again() -> None:
    network, other = small_network(), small_network()
    engine = explorer.compile(network, X)
    torch.manual_seed(5)
    for parameter in other.parameters():
        parameter.data = torch.randn_like(parameter) * (torch.rand_like(parameter) < 0.2)
    other[1].running_var.uniform_(0.5, 2)
    with torch.no_grad():
        for choose in (True, False):
            engine.update_weights(other, choose=choose)
            assert relative_error(engine(X), other(X)) < 1e-5
            engine.update_weights(network, choose=choose)
            assert relative_error(engine(X), network(X)) < 1e-5


def test_weights_of_another_structure_are_refused() -> None:
    engine = explorer.compile(small_network(), X)
    wrong = small_network()
    wrong[7] = nn.Linear(24, 11)
    with pytest.raises(EngineError, match=r"7\.weight has shape \(11, 24\)"):
        engine.update_weights(wrong)
    with pytest.raises(EngineError, match="missing"):
        engine.update_weights(nn.Linear(1, 1))


def test_several_threads_may_call_one_engine() -> None:
    network = small_network()
    engine = explorer.compile(network, X, threads=2)
    with torch.no_grad():
        wanted = [network(X + i) for i in range(4)]
    wrong: list[int] = []

    def call(i: int) -> None:
        wrong.extend(i for _ in range(50) if relative_error(engine(X + i), wanted[i]) > 1e-5)

    callers = [threading.Thread(target=call, args=(i,)) for i in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert wrong == []


def test_a_forgotten_engine_ends_its_helper_threads() -> None:
    engine = explorer.compile(small_network(), X, threads=3)
    helpers = [t for t in threading.enumerate() if t.name.startswith("explorer-helper")]
    assert len(helpers) >= 2
    mine = engine._network._runner._helpers
    del engine
    for helper in mine:
        helper.join(timeout=5)
    assert not any(helper.is_alive() for helper in mine)


def test_the_profile_names_every_layer_and_its_sparsity() -> None:
    network = small_network()
    network[3].weight.data[:12] = 0
    engine = explorer.compile(network, X)
    rows = {row.name: row for row in engine.profile(X, repeats=5) if row.prunable}
    assert list(rows) == ["0", "3", "7"]
    assert rows["3"].sparsity == pytest.approx(0.5)
    assert rows["0"].macs == 4 * 12 * 12 * 16 * 2 * 9
    assert rows["3"].macs == 4 * 6 * 6 * 24 * 16 * 9
    assert all(row.ms > 0 for row in rows.values())


def test_a_benchmark_says_what_it_measured() -> None:
    engine = explorer.compile(small_network(), X, threads=2)
    result = engine.benchmark(X, repeats=20)
    assert (result.threads, result.batch_size, result.repeats, result.isa) == (2, 4, 20, engine.isa)
    assert 0 < result.min_ms <= result.latency_ms
    assert result.spread_ms >= 0


def test_contestants_alternate_and_the_slow_one_is_seen_to_be_slow() -> None:
    calls: list[str] = []

    def work(name: str, n: int) -> object:
        calls.append(name)
        return sum(range(n))

    result = compare_latency(
        {"slow": lambda: work("slow", 400_000), "quick": lambda: work("quick", 10)}, repeats=6, seconds=1
    )
    assert result["slow"].latency_ms > 5 * result["quick"].latency_ms
    # Who has ended a turn begins the next one: after the first calls of both, slow, quick, quick, slow, slow, quick, ...
    turns = [name for name, _ in itertools.groupby(calls)]
    assert turns[:4] == ["slow", "quick"] * 2
    assert len(turns) == 3 + result["slow"].repeats
    assert result["slow"].repeats == result["quick"].repeats >= 5


class Named:
    """A contestant that writes its name down for each of its turns, with the warm-up that it was asked for, and takes no time."""

    def __init__(self, name: str, turns: list[tuple[str, float]]) -> None:
        self.name, self.turns = name, turns

    def __call__(self) -> None: ...

    def seconds(self, calls: int, warm_s: float) -> float:
        self.turns.append((self.name, warm_s))
        return 1e-4 * calls


def test_each_turn_begins_with_another_contestant_and_all_have_as_many_turns() -> None:
    turns: list[tuple[str, float]] = []
    names = ["a", "b", "c"]
    result = compare_latency({name: Named(name, turns) for name in names}, repeats=7, warm_s=1e-6)
    said = "".join(name for name, _ in turns)
    assert said[:3] == "abc"  # how long one call takes
    assert [said[i : i + 3] for i in range(3, len(said), 3)] == [
        "abc", "bca", "cab", "abc", "bca", "cab", "abc",
    ]  # fmt: skip
    assert {warm_s for _, warm_s in turns[3:]} == {1e-6}
    assert [result[name].repeats for name in result] == [7, 7, 7]
    assert list(result) == names


def test_a_contestant_warms_up_before_each_of_its_turns() -> None:
    calls: list[float] = []

    def work() -> None:
        time.sleep(0.002)
        calls.append(time.perf_counter())

    result = compare_latency({"one": work}, repeats=5, seconds=0.1, slice_s=0.001, warm_s=0.02)
    assert 2 <= result["one"].latency_ms < 15  # a mean over what was timed alone
    assert result["one"].repeats == 5
    # Three calls, and one that is timed after one more, come first.
    assert calls[-1] - calls[4] > 5 * 0.02
    assert len(calls) >= 5 + 5 * 3


class Clock:
    """What `time` gives to a process in which nothing runs but, for a while, a helper that spins."""

    def __init__(self) -> None:
        self.now = self.used = self.spins_until = 0.0

    def perf_counter(self) -> float:
        self.now += 1e-6
        return self.now

    def process_time(self) -> float:
        return self.used

    def sleep(self, seconds: float) -> None:
        self.used += max(0.0, min(self.spins_until - self.now, seconds))
        self.now += seconds


def test_a_turn_begins_when_the_helpers_of_the_last_one_have_stopped_spinning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock, early = Clock(), []
    monkeypatch.setattr(timing, "time", clock)

    def spins_on() -> None:
        if clock.now >= clock.spins_until:
            clock.spins_until = clock.now + 0.06

    def next_one() -> None:
        early.append(max(0.0, clock.spins_until - clock.now))

    def run(warm_s: float) -> int:
        early.clear()
        compare_latency({"spins on": spins_on, "next": next_one}, seconds=0.05, slice_s=0.0, warm_s=warm_s)
        return sum(left > 0 for left in early)

    assert run(warm_s=0.0) > 0
    # The five calls that say how long one takes come before the first turn.
    run(warm_s=1e-6)
    assert len(early) > 10
    assert not any(early[5:])


def test_the_dense_contestants_compute_the_same() -> None:
    network = small_network()
    contestants = dense_contestants(network, X)
    assert set(contestants) == {"torch eager", "torch channels_last", "torch jit", "engine dense"}
    with torch.no_grad():
        for call in contestants.values():
            assert relative_error(call(), network(X)) < 1e-4


def test_a_damaged_cache_entry_is_compiled_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = small_network()
    explorer.compile(network, X, sparse="sparse")  # what a process makes but once is made elsewhere
    monkeypatch.setenv("EXPLORER_CACHE", str(tmp_path))
    monkeypatch.setattr(native, "_loaded", {})
    # Each time all kernels are tried, and none is made ahead that nobody needs: how many of these there are depends on who is faster.
    monkeypatch.setattr(choosing, "choice_cache", lambda: ChoiceCache(None))
    monkeypatch.setattr(compilation, "code_ahead", lambda *_, **__: nullcontext())
    with torch.no_grad():
        wanted = network(X)
    assert relative_error(explorer.compile(network, X, sparse="sparse")(X), wanted) < 1e-5
    entries = sorted((tmp_path / "kernels").glob("*.o"))
    assert entries
    for i, entry in enumerate(entries):
        content = entry.read_bytes()
        entry.write_bytes([content[:50], b"", content[:-1] + b"x"][i % 3])
    monkeypatch.setattr(native, "_loaded", {})
    assert relative_error(explorer.compile(network, X, sparse="sparse")(X), wanted) < 1e-5
    assert all(len(entry.read_bytes()) > 100 for entry in entries)


def test_the_cache_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXPLORER_CACHE", "off")
    assert native.cache_folder() is None


def test_an_instruction_set_that_the_cpu_lacks_is_refused() -> None:
    with pytest.raises(EngineError, match="cannot run"):
        native.host_isa("sve2048")


def test_a_profile_says_how_near_each_layer_comes_to_what_the_machine_can_do() -> None:
    network = small_network()
    for layer in (network[0], network[3]):
        layer.weight.data[torch.rand_like(layer.weight) < 0.5] = 0
    engine = explorer.compile(network, X, sparse="sparse")
    rows = {row.name: row for row in engine.profile(X)}
    for name, index in (("0", 0), ("3", 3)):
        row, weight = rows[name], network[index].weight
        pixels = 4 * (12 * 12 if name == "0" else 6 * 6)
        assert row.macs == pixels * weight.numel()
        nonzeros = int((weight != 0).sum())
        assert row.gflops == pytest.approx(2 * pixels * nonzeros / row.ms / 1e6)
        assert 0 < row.share_of_peak < 1
        # Its nonzeros at 8 bytes each, its output, and more.
        assert row.n_bytes > 8 * nonzeros + 4 * pixels * len(weight)


def test_a_profile_is_one_of_calls_and_not_of_the_way_on_which_steps_are_timed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = torch.randn(1, 8)
    engine = explorer.compile(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).eval(), x)
    assert engine._network.straight is not None
    original, slow_ms = Execution.run, 50.0

    def slow(self: Execution, *args: Any) -> Any:
        time.sleep(slow_ms / 1e3)
        return original(self, *args)

    # A call of this network does without it.
    monkeypatch.setattr(Execution, "run", slow)
    rows = engine.profile(x, repeats=5)
    assert sum(row.ms for row in rows) < slow_ms
    assert [row.name for row in rows] == ["0", "2", "call"]


def test_a_module_that_is_a_layer_itself_has_one_name() -> None:
    engine = explorer.compile(nn.Linear(4, 3).eval(), torch.randn(2, 4))
    assert list(engine.choices) == [row.name for row in engine.profile(torch.randn(2, 4), repeats=1)][:1]


class ThroughTorch(nn.Module):
    """Layers with weights that torch runs, beside one that the engine does."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.up = nn.Conv2d(2, 6, 3), nn.ConvTranspose2d(6, 4, 2, stride=2, groups=2)
        self.deep, self.recurrent = nn.Conv3d(1, 5, 3, padding=1), nn.LSTM(5, 7)
        self.norm = nn.GroupNorm(2, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.deep(self.norm(self.up(self.first(x))).unsqueeze(1)).mean((2, 3))
        return self.recurrent(y.transpose(1, 2))[0]


def test_a_profile_knows_the_weights_of_layers_that_run_through_torch() -> None:
    torch.manual_seed(0)
    network, x = ThroughTorch().eval(), torch.randn(2, 2, 7, 7)
    parts = [network.first.weight, network.up.weight, network.deep.weight, *network.recurrent.parameters()]
    with torch.no_grad():
        for part in parts:
            part[torch.rand_like(part) < 0.7] = 0
    engine = explorer.compile(network, x)
    rows = {row.name: row for row in engine.profile(x, repeats=2) if row.sparsity > 0}
    assert list(rows) == ["first", "up", "deep", "recurrent"]
    for name in ("first", "up", "deep"):
        weight = getattr(network, name).weight
        assert rows[name].sparsity == pytest.approx(float((weight == 0).double().mean()))
        assert rows[name].prunable
    # Each pixel of the 5 x 5 meets 2 channels of 2 x 2 weights; 10 x 10 x 4 places see 27 weights.
    assert rows["up"].macs == 2 * 6 * 5 * 5 * 2 * 2 * 2
    assert rows["deep"].macs == 2 * 5 * 4 * 10 * 10 * 27
    lstm = torch.cat([w.flatten() for n, w in network.recurrent.named_parameters() if "weight" in n])
    assert rows["recurrent"].sparsity == pytest.approx(float((lstm == 0).double().mean()))
    assert rows["recurrent"].macs == 0
    assert all(row.share_of_peak > 0 for row in rows.values() if row.macs)


def test_a_benchmark_on_a_noisy_machine_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = explorer.compile(small_network(), X)
    ticks = iter(range(10_000))
    # Calls that take 1, 2, 3 or 4 seconds in turn.
    monkeypatch.setattr("time.perf_counter", lambda: (n := next(ticks)) // 2 + (n % 2) * (1 + n // 2 % 4))
    with pytest.warns(EngineWarning, match="noisy"):
        assert engine.benchmark(X, repeats=40).is_noisy
    assert engine.benchmark(X, repeats=40, warn=False).is_noisy


def test_the_number_of_threads_can_be_left_to_the_engine() -> None:
    network = small_network()
    engine = explorer.compile(network, X, threads="auto")
    assert engine.threads >= 1
    with torch.no_grad():
        assert relative_error(engine(X), network(X)) < 1e-5
    with pytest.raises(EngineError, match="'auto'"):
        explorer.compile(network, X, threads="many")  # type: ignore[arg-type]


def test_a_compiled_network_keeps_no_weights_but_the_packed_ones() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(64, 256, 1), nn.ReLU(), nn.Conv2d(256, 64, 1)).eval()
    for layer in (network[0], network[2]):
        layer.weight.data[torch.rand_like(layer.weight) < 0.9] = 0
    x = torch.randn(1, 64, 8, 8)
    engine = explorer.compile(network, x)
    with torch.no_grad():
        wanted = network(x)
        for parameter in network.parameters():
            parameter.zero_()  # what the module does later is no business of the compiled network
    assert relative_error(engine(x), wanted) < 1e-5
    nonzeros = 2 * 64 * 256 // 10
    activations = 4 * 8 * 8 * (64 + 256 + 64)
    assert engine.n_bytes < 1.3 * 8 * nonzeros + 4 * activations  # small planes have wide guards


def test_weights_that_torch_reads_are_kept_once_and_counted() -> None:
    network = nn.Sequential(nn.Conv2d(4, 32, 1), nn.ConvTranspose2d(32, 128, 4)).eval()
    x = torch.randn(1, 4, 6, 6)
    engine = explorer.compile(network, x)
    for _ in range(2):
        weight_bytes = 4 * 32 * 128 * 4 * 4
        native = engine._network.plan.memory.n_bytes + engine._network.steps.memory.n_bytes
        assert engine.n_bytes - native == pytest.approx(weight_bytes + x.nbytes, abs=4 * (128 + 1))
        engine.update_weights(network)


def test_of_a_large_batch_the_example_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("explorer.inference.execution._CACHED_BYTES", 1)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)).eval()
    x = torch.randn(16, 3, 20, 20)
    engine = explorer.compile(network, x)
    assert engine._network.plan.images == 1
    native = engine._network.plan.memory.n_bytes + engine._network.steps.memory.n_bytes
    assert engine.n_bytes - native == pytest.approx(x[:2].nbytes, abs=100)
    engine.update_weights(network)
    for n in (16, 1, 2, 3):
        with torch.no_grad():
            assert relative_error(engine(x[:n]), network(x[:n])) < 1e-5


def test_memory_that_is_left_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("explorer.inference.memory._map", lambda n_bytes: np.zeros(n_bytes, np.uint8))
    memory = Memory()
    sizes = [3 << 20, 3 << 20, 1 << 19, 1 << 19, 1 << 19, 1 << 19]
    arrays = [memory.zeros(size, np.uint8) for size in sizes]
    for number, array in enumerate(arrays, 1):
        array[:] = number
    assert all((array == number).all() for number, array in enumerate(arrays, 1))
    assert sum(chunk.nbytes for chunk in memory._chunks) == memory.n_bytes == sum(sizes)


def test_torchs_part_of_a_network_reads_weights_of_its_own() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 8), nn.PReLU(8), nn.Linear(8, 3)).eval()
    x = torch.randn(4, 6)
    engine = explorer.compile(network, x)
    assert engine.fallbacks
    with torch.no_grad():
        wanted = network(x)
        network[1].weight.fill_(7.0)
        assert relative_error(engine(x), wanted) < 1e-5
        engine.update_weights(network)
        assert relative_error(engine(x), network(x)) < 1e-5


class TwoOutputs(nn.Module):
    """Two inputs, two outputs in a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 8, 3, padding=1), nn.Conv2d(3, 8, 1)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
        z = torch.relu(self.a(x) + self.b(y))
        return {"image": z, "mean": z.mean((2, 3))}


@pytest.mark.parametrize(("threads", "division"), [(1, None), (2, "images apart"), (2, "image by image")])
def test_a_large_batch_goes_through_the_network_a_few_images_at_a_time(
    threads: int, division: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("explorer.inference.execution._CACHED_BYTES", 1)
    monkeypatch.setenv("EXPLORER_CACHE", str(tmp_path))
    torch.manual_seed(0)
    network = TwoOutputs().eval()
    x, y = torch.randn(7, 2, 9, 11), torch.randn(7, 3, 9, 11)
    whole, engine = (
        explorer.compile(network, (x[:1], y[:1])),
        explorer.compile(network, (x, y), threads=threads),
    )
    assert engine.batch_size == 7
    if division is not None:
        # Whichever was faster here is remembered; both must be right.
        assert engine.division is not None
        assert choice_cache().get(engine.division) in ("images apart", "image by image")
        choice_cache().put({engine.division: division})
        engine = explorer.compile(network, (x, y), threads=threads)
    assert engine._network.plan.images == (2 if division == "images apart" else 1)
    for n in (7, 1, 2, 3, 6, 7):
        got = engine(x[:n], y[:n])
        with torch.no_grad():
            wanted = network(x[:n], y[:n])
        assert got.keys() == wanted.keys()
        assert all(relative_error(got[k], wanted[k]) < 1e-5 for k in wanted)
    # Buffers for as many images as there are threads at most, not for seven.
    assert engine._network.plan.memory.n_bytes < 3 * whole._network.plan.memory.n_bytes
    one = {row.name: row for row in whole.profile(x[:1], y[:1], repeats=3)}
    for row in engine.profile(x, y, repeats=3):
        assert row.macs == 7 * one[row.name].macs
        assert row.ms > 0 or row.kind == "call"
    with pytest.raises(EngineError, match=r"compiled for \(7, 2, 9, 11\)"):
        engine(torch.randn(8, 2, 9, 11), torch.randn(8, 3, 9, 11))
    doubled = copy.deepcopy(network)
    doubled.a.weight.data *= 2
    engine.update_weights(doubled)
    with torch.no_grad():
        assert relative_error(engine(x, y)["image"], doubled(x, y)["image"]) < 1e-5


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("pooled", [False, True])
def test_a_large_batch_of_one_input_takes_the_short_way_and_gives_the_same(
    stride: int, pooled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("explorer.inference.execution._CACHED_BYTES", 1)
    torch.manual_seed(0)
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)] if pooled else []
    network = nn.Sequential(nn.Conv2d(3, 8, 3, stride, 1), nn.ReLU(), nn.Conv2d(8, 8, 1), *head).eval()
    x = torch.randn(6, 3, 17, 40)
    engine = explorer.compile(network, x, threads=2)
    assert engine._network.plan.images < 6
    assert engine._network.straight is not None
    before = x.clone()
    for batch in (x, x[:4], x[:3], x[:1], x.to(memory_format=torch.channels_last), x.flip(0), x[::2]):
        with torch.no_grad():
            wanted = network(batch)
        got = engine(batch)
        assert got.shape == wanted.shape
        assert got.is_contiguous()
        assert relative_error(got, wanted) < 1e-5
    # What a call returned is the caller's: the next call leaves it alone.
    first = engine(x)
    kept = first.clone()
    engine(torch.randn_like(x))
    assert torch.equal(first, kept)
    assert torch.equal(x, before)
    with pytest.raises(EngineError, match=r"compiled for \(6, 3, 17, 40\)"):
        engine(torch.randn(8, 3, 17, 40))


class Classifier(nn.Module):
    """Convolutions, perhaps one that looks at the pooled image (squeeze and excitation), and a head of two linear layers."""

    def __init__(self, *, flat: bool = False, excited: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.flat = nn.Conv2d(3, 24, 3, 2, 1), nn.Conv2d(24, 24, 1), flat
        self.excite = nn.Conv2d(24, 24, 1) if excited else None
        self.c, self.d = nn.Linear(24 * (9 * 20 if flat else 1), 150), nn.Linear(150, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.b(torch.relu(self.a(x))))
        if self.excite is not None:
            x = x * torch.sigmoid(self.excite(x.mean((2, 3), keepdim=True)))
        return self.d(torch.relu(self.c(x.flatten(1) if self.flat else x.mean((2, 3)))))


@pytest.mark.parametrize("isa", ["avx512", "avx2"])
@pytest.mark.parametrize("mode", ["dense", "sparse"])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("flat", "excited"), [(False, False), (True, False), (False, True)])
def test_the_head_takes_the_images_of_all_turns_at_once(
    isa: str, mode: Mode, threads: int, flat: bool, excited: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_by(isa, monkeypatch)
    monkeypatch.setattr("explorer.inference.execution._CACHED_BYTES", 1)
    torch.manual_seed(0)
    network, other = (pruned(Classifier(flat=flat, excited=excited), 0.6) for _ in range(2))
    x = torch.randn(11, 3, 17, 40)
    engine = explorer.compile(network, x, threads=threads, sparse=mode)
    plan = engine._network.plan
    assert plan.images < 11
    assert len(plan.native) - plan.head == 2
    for module in (network, other):
        engine.update_weights(module)
        for n in (11, 10, 1, 4, 7, 3, 11):
            with torch.no_grad():
                wanted = module(x[:n])
            assert relative_error(engine(x[:n]), wanted) < 1e-5
            # The long way, and by a copy of images that no kernel reads where they are.
            assert relative_error(engine(x[:n].clone().requires_grad_()), wanted) < 1e-5
            assert relative_error(engine(x[:n].to(memory_format=torch.channels_last)), wanted) < 1e-5
    rows = {row.name: row for row in engine.profile(x, repeats=3)}
    one = {row.name: row for row in engine.profile(x[:1], repeats=3)}
    # Of the head too: ten more images are so many more of the values that it reads and writes.
    assert rows["d"].n_bytes - one["d"].n_bytes == 10 * 4 * (150 + 7)
    assert rows["d"].macs == 11 * 150 * 7
    assert rows["b"].macs == 11 * 24 * 24 * 9 * 20
    assert all(row.ms >= 0 for row in rows.values())


def native_calls(engine: SparseModule, x: Tensor) -> list[str]:
    """The functions of the driver that one call of a network enters, by this thread."""
    assert engine._network._runner is not None
    state, entered = engine._network._runner._state, []
    functions = {name: one for name, one in vars(state).items() if isinstance(one, ctypes._CFuncPtr)}  # type: ignore[attr-defined]
    assert len(functions) > 1

    def noted(name: str) -> Callable[..., None]:
        def call(*arguments: Any) -> None:
            if threading.current_thread() is threading.main_thread():
                entered.append(name)
            functions[name](*arguments)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in functions:
            patch.setattr(state, name, noted(name))
        engine(x)
    return entered


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("make", [architectures.FashionResNet, lambda: architectures.mobilenet_v1(10, 1)])
def test_an_inference_is_one_native_call(make: Callable[[], nn.Module], threads: int) -> None:
    torch.manual_seed(0)
    network, x = pruned(make(), 0.8).eval(), torch.randn(4, 1, 64, 64)
    engine = explorer.compile(network, x, threads=threads)
    assert engine.fallbacks == ()
    wide = torch.zeros(4, 1, 64, 128)
    wide[..., ::2] = x
    engine(x[:1])  # finds out, once, what fewer images are
    for some in (x, x[:1], x[:3], wide[..., ::2]):
        assert len(native_calls(engine, some)) == 1
        with torch.no_grad():
            assert relative_error(engine(some), network(some)) < 1e-5


@pytest.mark.parametrize("threads", [1, 2])
def test_a_batch_in_turns_is_one_native_call_and_one_for_its_head(
    threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("explorer.inference.execution._CACHED_BYTES", 1)
    torch.manual_seed(0)
    network, x = pruned(Classifier(), 0.6), torch.randn(8, 3, 16, 64)
    engine = explorer.compile(network, x, threads=threads)
    images = engine._network.plan.images
    assert images < 8
    engine(x[:1])
    # The first layer reads the images where they are.
    assert native_calls(engine, x) == ["run_turns", "run"]
    assert len(native_calls(engine, x[:images])) == 1


@pytest.mark.parametrize("pooled", [False, True])
def test_answers_are_float32_on_the_cpu_whatever_the_program_has_for_defaults(
    pooled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("explorer.inference.execution._CACHED_BYTES", 1)
    torch.manual_seed(0)
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)] if pooled else []
    network, x = nn.Sequential(nn.Conv2d(3, 8, 3, 2), *head).eval(), torch.randn(4, 3, 17, 17)
    engine = explorer.compile(network, x)
    with torch.no_grad():
        wanted = network(x)
    try:
        torch.set_default_dtype(torch.float64)
        torch.set_default_device("meta")
        got = [engine(x[:n]) for n in (4, 1, 2)]
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    for answer in got:
        assert answer.dtype == torch.float32
        assert answer.device.type == "cpu"
        assert relative_error(answer, wanted[: len(answer)]) < 1e-5


def test_a_vector_that_the_body_reads_too_is_not_left_for_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("explorer.inference.execution._CACHED_BYTES", 1)
    torch.manual_seed(0)

    class Shared(nn.Module):
        """Both the image and the answer depend on the pooled image."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 3), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.relu(self.a(x))
            pooled = x.mean((2, 3))
            return self.b(pooled) + (x * pooled[:, :, None, None].sigmoid()).mean((2, 3))

    network, x = Shared().eval(), torch.randn(5, 3, 12, 12)
    engine = explorer.compile(network, x)
    for n in (5, 2, 1):
        with torch.no_grad():
            assert relative_error(engine(x[:n]), network(x[:n])) < 1e-5


@pytest.mark.parametrize("direct", [False, True])
def test_an_interrupt_between_two_turns_leaves_nothing_moved(
    direct: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("explorer.inference.execution._CACHED_BYTES", 1)
    torch.manual_seed(0)
    network, x = Classifier().eval(), torch.randn(5, 3, 17, 40)
    engine = explorer.compile(network, x)
    runner, calls = engine._network._runner, []
    assert runner is not None
    run = type(runner).run

    def interrupted(self: Any, first: int, last: int) -> None:
        calls.append((first, last))
        if len(calls) == 3:
            raise KeyboardInterrupt
        run(self, first, last)

    # Channels last: copied image by image. With gradients: the long way.
    batch = x.to(memory_format=torch.channels_last) if direct else x.clone().requires_grad_()
    with monkeypatch.context() as patched:
        patched.setattr(type(runner), "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine(batch)
    with torch.no_grad():
        for n in (5, 1, 5, 2):
            assert relative_error(engine(x[:n]), network(x[:n])) < 1e-5


def test_a_batch_whose_images_depend_on_each_other_is_not_taken_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("explorer.inference.execution._CACHED_BYTES", 1)

    class Centred(nn.Module):
        """Subtracts the mean of the batch."""

        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(2, 4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.conv(x)
            return y - y.mean(0, keepdim=True)

    network, x = Centred().eval(), torch.randn(5, 2, 8, 8)
    with torch.no_grad():
        assert relative_error(explorer.compile(network, x)(x), network(x)) < 1e-5


@pytest.mark.parametrize(("faster", "images"), [("image by image", 1), ("images apart", 2)])
def test_the_faster_division_of_a_batch_is_taken_and_remembered(
    faster: str, images: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("explorer.inference.execution._CACHED_BYTES", 1)
    monkeypatch.setenv("EXPLORER_CACHE", str(tmp_path))
    timed = {
        name: SimpleNamespace(latency_ms=0.0 if name == faster else 1.0)
        for name in ("image by image", "images apart")
    }
    monkeypatch.setattr(
        "explorer.inference.compilation.compare_latency",
        lambda pair, **_: {name: timed[name] for name in pair},
    )
    network, x = small_network(), torch.randn(5, 2, 12, 12)
    for _ in range(2):  # the second time without timing
        engine = explorer.compile(network, x, threads=2)
        assert engine._network.plan.images == images
        assert engine.division is not None
        assert choice_cache().get(engine.division) == faster
        with torch.no_grad():
            assert relative_error(engine(x), network(x)) < 1e-5
        monkeypatch.setattr("explorer.inference.compilation.compare_latency", None)


def test_compiling_tells_what_it_took() -> None:
    net, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()).eval(), torch.randn(1, 3, 9, 9)
    start = time.perf_counter()
    times = explorer.compile(net, x).compile_times
    assert times.capture_s > 0
    assert times.rest_s > 0
    assert times.capture_s + times.rest_s <= time.perf_counter() - start


# ---- results


def straight_engine() -> tuple[SparseModule, Tensor, Tensor]:
    """An engine whose calls take the short way, an input, and the answer to it."""
    module = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, bias=False), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    ).eval()
    x = torch.randn(1, 3, 21, 64)
    engine = explorer.compile(module, x, threads=1)
    assert engine._network.straight is not None
    with torch.no_grad():
        return engine, x, module(x)


def test_each_answer_has_memory_of_its_own() -> None:
    engine, x, wanted = straight_engine()
    answers = [engine(x * n) for n in range(100)]
    assert len({answer.data_ptr() for answer in answers}) == 100
    for n, answer in enumerate(answers):
        torch.testing.assert_close(answer, n * wanted)


def test_answers_do_not_depend_on_the_mode_in_which_others_were_asked_for() -> None:
    engine, x, wanted = straight_engine()
    with torch.inference_mode():
        engine(x)
    weight = torch.ones(8, requires_grad=True)
    for _ in range(40):
        answer = engine(x)
        assert not answer.is_inference()
    (answer @ weight).sum().backward()
    torch.testing.assert_close(weight.grad, wanted[0])


def test_a_mode_without_memory_is_an_error_and_leaves_nothing_behind() -> None:
    engine, x, wanted = straight_engine()
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(EngineError, match="FakeTensor"):
        engine(x)
    for _ in range(40):
        torch.testing.assert_close(engine(x), wanted)
