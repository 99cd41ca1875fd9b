"""The benchmark is only worth its table if all contestants run the same network, and are held to it."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn

from explorer.bench import engines, networks
from explorer.bench.foreign import HALF_TOLERANCE
from explorer.errors import EngineError
from explorer.inference import compilation, native
from explorer.masks import n_zeros
from explorer.models import LoadedModel, architectures, load_model


@pytest.fixture(scope="module")
def small() -> LoadedModel:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 64, 5),
    )
    return load_model(net, torch.randn(1, 3, 8, 8))


def test_the_pruned_copy_is_exactly_as_sparse_as_asked_and_leaves_the_model_alone(small: LoadedModel) -> None:
    before = {name: weight.clone() for name, weight in small.module.state_dict().items()}
    pruned = engines.pruned_copy(small, 0.9)
    zeros = {
        name: int((weight == 0).sum())
        for name, weight in pruned.state_dict().items()
        if name.endswith("weight")
    }
    assert zeros == {"0.weight": 0, "2.weight": n_zeros(8 * 16 * 9, 0.9), "5.weight": 0}
    assert all(torch.equal(weight, before[name]) for name, weight in small.module.state_dict().items())


def test_a_copy_pruned_in_pairs_has_as_many_zeros_in_equal_places(small: LoadedModel) -> None:
    copied = engines.pruned_copy(small, 0.9, pairs=True)
    weight = copied[2].weight
    assert n_zeros(weight.numel(), 0.9) <= int((weight == 0).sum()) <= n_zeros(weight.numel(), 0.9) + 1
    assert torch.equal(weight[::2] == 0, weight[1::2] == 0)
    odd = load_model(
        nn.Sequential(nn.Conv2d(1, 3, 1), nn.Conv2d(3, 5, 1), nn.Conv2d(5, 2, 1)), torch.ones(1, 1, 2, 2)
    )
    assert int((engines.pruned_copy(odd, 0.5, pairs=True)[1].weight == 0).sum()) == n_zeros(15, 0.5)


def test_outputs_of_a_calibrated_network_depend_on_its_first_layer() -> None:
    """Random, then pruned: without calibration a mistake in the first layer would be lost among the last layer's biases."""
    torch.manual_seed(0)
    model = load_model(architectures.mobilenet_v1(), torch.randn(1, 3, 64, 64))

    def change(module: nn.Module) -> float:
        with torch.no_grad():
            right = module(model.example_input)
            module.stem[0].weight[:16] *= 1.5
            return float((module(model.example_input) - right).abs().max() / right.abs().max())

    layers = networks.NETWORKS["mobilenet_v1"].pruned(model.layers)
    plain, calibrated = (engines.pruned_copy(model, 0.9, layers) for _ in range(2))
    engines.calibrate(calibrated, model.example_input)
    assert not any(part.training for part in calibrated.modules())
    assert change(plain) < engines.TOLERANCE < 0.05 < change(calibrated)


@pytest.mark.parametrize("sparsity", [0.0, 0.9])
@pytest.mark.usefixtures("short_turns")
def test_every_engine_is_timed_and_the_fastest_dense_one_is_the_measure(
    small: LoadedModel, sparsity: float
) -> None:
    compared = engines.time_engines(
        small, small.example_input, sparsity=sparsity, seconds=0.2, torch_compile=False
    )
    here = {one.contestant: one for one in compared.timings}
    assert {"torch eager", "engine dense", engines.SPARSE} <= here.keys()
    assert {one.sparsity for one in here.values()} == {sparsity}
    assert (engines.SPARSE_PAIRS in here) is (sparsity > 0)
    dense = [one for name, one in here.items() if not name.startswith(engines.SPARSE)]
    best = min(one.benchmark.latency_ms for one in dense)
    assert max(one.speedup for one in dense) == 1.0
    assert here[engines.SPARSE].speedup == pytest.approx(best / here[engines.SPARSE].benchmark.latency_ms)
    for one in here.values():
        assert one.accepted == (
            HALF_TOLERANCE if one.contestant == engines.SPARSE_HALF else engines.TOLERANCE
        )
        assert one.difference is not None
        assert 0 <= one.difference <= one.accepted
    assert compared.versions["torch"] == torch.__version__
    assert not any(one.failed for one in compared.absences)


@pytest.mark.usefixtures("short_turns", "without_onnxruntime")
def test_with_patience_the_probe_is_timed_around_every_turn(small: LoadedModel) -> None:
    compared = engines.time_engines(
        small, small.example_input, sparsity=0.5, seconds=0.1, torch_compile=False, patience_s=0.5
    )
    turns = sum(one.benchmark.repeats for one in compared.timings)
    assert len(compared.probe.before_ms) == len(compared.probe.after_ms) == turns > 20


@pytest.mark.parametrize("can", [True, False])
@pytest.mark.usefixtures("short_turns", "without_onnxruntime")
def test_float16_takes_part_where_the_cpu_computes_with_it(
    small: LoadedModel, monkeypatch: pytest.MonkeyPatch, can: bool
) -> None:
    if native.current_isa().name == "torch":
        pytest.skip("no machine code on this machine")
    half = partial(native.half_isa, emulated=True) if can else lambda _: None
    monkeypatch.setattr(compilation, "half_isa", half)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compared = engines.time_engines(
            small, small.example_input, sparsity=0.5, seconds=0.1, torch_compile=False
        )
    timed = {one.contestant: one.benchmark.precision for one in compared.timings}
    absent = [one for one in compared.absences if one.contestant == engines.SPARSE_HALF]
    assert timed[engines.SPARSE] == "fp32"
    assert timed.get(engines.SPARSE_HALF) == ("fp16" if can else None)
    assert [one.failed for one in absent] == ([] if can else [False])
    best = min(one.benchmark.latency_ms for one in compared.timings if one.speedup == 1.0)
    for one in compared.timings:
        assert one.speedup == pytest.approx(best / one.benchmark.latency_ms)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.usefixtures("short_turns", "without_onnxruntime")
def test_torch_compile_is_a_contestant_and_computes_the_pruned_network(small: LoadedModel) -> None:
    compared = engines.time_engines(small, small.example_input, sparsity=0.9, seconds=0.1)
    assert [one for one in compared.absences if one.contestant == engines.COMPILED] == []
    assert engines.COMPILED in [one.contestant for one in compared.timings]
    pruned = engines.pruned_copy(small, 0.9)
    call = engines._torch_compile(pruned, small.example_input, 1)
    with torch.inference_mode():
        torch.testing.assert_close(call(), pruned(small.example_input), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("short_turns", "without_onnxruntime")
def test_torch_compile_that_cannot_run_is_left_out_with_its_reason(
    small: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_compiler(*_: object) -> None:
        raise RuntimeError("No working C++ compiler found\nSet CXX")

    monkeypatch.setattr(engines, "_torch_compile", without_compiler)
    compared = engines.time_engines(small, small.example_input, sparsity=0.5, seconds=0.1)
    left_out = next(one for one in compared.absences if one.contestant == engines.COMPILED)
    assert left_out == engines.Absence(
        engines.COMPILED, "RuntimeError: No working C++ compiler found", failed=False
    )
    assert engines.SPARSE in [one.contestant for one in compared.timings]


class Untraceable(nn.Module):
    """Torch's eager mode and torch.export run it, its tracer does not."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.jit.is_tracing():
            raise RuntimeError("this cannot be traced\nand here is why")
        return self.layers(x)


@pytest.mark.usefixtures("short_turns", "without_onnxruntime")
def test_torch_jit_that_cannot_trace_the_network_is_named_with_its_reason() -> None:
    model = load_model(Untraceable().eval(), torch.randn(1, 8))
    compared = engines.time_engines(
        model, model.example_input, sparsity=0.5, seconds=0.1, torch_compile=False
    )
    (said,) = (one for one in compared.absences if one.contestant == "torch jit")
    assert said == engines.Absence("torch jit", "RuntimeError: this cannot be traced", failed=True)
    timed = {one.contestant for one in compared.timings}
    assert {"torch eager", "engine dense", engines.SPARSE} <= timed
    assert "torch jit" not in timed


@pytest.mark.usefixtures("short_turns", "without_onnxruntime")
def test_a_network_in_pairs_that_this_engine_cannot_take_does_not_end_the_run(
    small: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_pairs: list[nn.Module] = []
    pruned_copy, compile_module = engines.pruned_copy, engines.compile_module

    def pruned(*given: object, pairs: bool = False) -> nn.Module:
        copied = pruned_copy(*given, pairs=pairs)
        in_pairs.extend([copied] * pairs)
        return copied

    def compiled(module: nn.Module, *given: object, **options: object) -> object:
        if module in in_pairs:
            raise EngineError("no such pairs")
        return compile_module(module, *given, **options)

    monkeypatch.setattr(engines, "pruned_copy", pruned)
    monkeypatch.setattr(engines, "compile_module", compiled)
    compared = engines.time_engines(
        small, small.example_input, sparsity=0.5, seconds=0.1, torch_compile=False
    )
    assert engines.Absence(engines.SPARSE_PAIRS, "no such pairs", failed=True) in compared.absences
    timed = {one.contestant for one in compared.timings}
    assert {"torch eager", engines.SPARSE} <= timed
    assert engines.SPARSE_PAIRS not in timed


def test_onnxruntime_gives_torch_s_numbers(small: LoadedModel) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    call = engines._onnxruntime(small.module, small.example_input, 1)
    with torch.no_grad():
        torch.testing.assert_close(call(), small.module(small.example_input), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("short_turns", "without_onnxruntime")
def test_an_engine_with_another_output_is_not_timed_but_named(
    small: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = engines.pruned_copy(small, 0.5)

    def contestants(*_: object, **__: object) -> dict[str, Callable[[], torch.Tensor]]:
        return {
            "right": lambda: right(small.example_input) * 1.0005,
            "liar": lambda: torch.zeros(1, 5),
            "shapeless": lambda: torch.zeros(5),
        }

    monkeypatch.setattr(engines, "dense_contestants", contestants)
    compared = engines.time_engines(
        small, small.example_input, sparsity=0.5, seconds=0.1, torch_compile=False
    )
    said = {one.contestant: one.reason for one in compared.absences if one.failed}
    assert said.keys() == {"liar", "shapeless"}
    assert "liar gives another output than torch: relative difference" in said["liar"]
    assert "its shape is (5,), (1, 5) is right" in said["shapeless"]
    differences = {one.contestant: one.difference for one in compared.timings}
    assert {"right", engines.SPARSE} <= differences.keys()
    assert differences["right"] == pytest.approx(5e-4, rel=0.01)


@pytest.mark.usefixtures("short_turns")
def test_a_network_that_this_engine_cannot_take_is_a_result_too(
    small: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise EngineError("no such operator")

    monkeypatch.setattr(engines, "compile_module", refuse)
    compared = engines.time_engines(small, small.example_input, sparsity=0.5, seconds=0.1)
    assert compared.timings == ()
    assert compared.absences == (engines.Absence(engines.ALL, "no such operator", failed=True),)


@pytest.mark.usefixtures("short_turns", "without_onnxruntime")
def test_an_engine_that_mixes_up_samples_or_leaves_them_out_is_not_timed(
    small: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = networks.example_batch(small, 4)
    with torch.inference_mode():
        right = engines.pruned_copy(small, 0.5)(x)
    wrong = {
        "mixed": right[[0, 2, 1, 3]],
        "first only": right[:1].repeat(4, 1),
        "without last": torch.cat([right[:3], torch.zeros(1, 5)]),
    }

    def contestants(*_: object, **__: object) -> dict[str, Callable[[], torch.Tensor]]:
        return {"right": lambda: right} | {
            name: lambda output=output: output for name, output in wrong.items()
        }

    monkeypatch.setattr(engines, "dense_contestants", contestants)
    compared = engines.time_engines(small, x, sparsity=0.5, seconds=0.1, torch_compile=False)
    assert {one.contestant for one in compared.absences if one.failed} == wrong.keys()
    assert {"right", engines.SPARSE} <= {one.contestant for one in compared.timings}
