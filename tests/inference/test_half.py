"""Networks in float16: emulated where the CPU cannot compute with it, with tolerances of float16's own rounding; and what `compare` says of it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import nn

import explorer
from explorer.errors import EngineError, EngineWarning
from explorer.inference import compilation, native, plan, straight
from explorer.inference.activations import LARGEST_ERROR
from explorer.inference.larger_kernels import has_programs
from explorer.inference.module import SparseModule
from explorer.inference.pack import weight_words
from explorer.models import architectures
from tests.inference.graphs import conv_graph, preferring, relative_error, without_limit
from tests.inference.test_activations import TORCH
from tests.inference.test_attention_masks import Given
from tests.inference.test_kernels import convolutions
from tests.inference.test_networks import pruned, randomised

ROUNDING = 2.0**-11
"""Of one float16 operation, relative to its result."""
SMALLEST = 2.0**-24
"""Below it nothing is left of a number."""

_HALF = native.half_isa(native.current_isa())
RUNS_PROGRAMS = _HALF is not None and has_programs(_HALF)


@pytest.fixture(autouse=True, scope="module")
def _emulated() -> Iterator[None]:
    if native.current_isa().name == "torch":
        pytest.skip("no machine code on this machine")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compilation, "half_isa", partial(native.half_isa, emulated=True))
        yield


def half(network: nn.Module, *inputs: torch.Tensor, **options: Any) -> SparseModule:
    torch.manual_seed(0)
    compiled = explorer.compile(network.eval(), inputs, precision="fp16", **options)
    assert compiled.precision == "fp16"
    return compiled


def check_convolution(case: dict[str, Any]) -> None:
    """The error of a sum of n float16 products is at most about n roundings of the sum of their magnitudes (Higham 2002, section 3.1)."""
    generator = torch.Generator().manual_seed(case["seed"])
    shape = (case["images"], case["channels"], *case["size"])
    per_group = case["channels"] // case["groups"]
    weight = torch.randn(case["outputs"], per_group, *case["kernel"], generator=generator)
    weight[torch.rand(weight.shape, generator=generator) < case["sparsity"]] = 0
    bias = torch.randn(case["outputs"], generator=generator) if case["bias"] else None
    attributes = {k: case[k] for k in ("stride", "padding", "dilation", "groups")}
    graph = conv_graph(shape, weight, bias, residual=case["residual"], **attributes)
    inputs = [torch.randn(shape, generator=generator)]

    def convolved(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None) -> torch.Tensor:
        wide = None if b is None else b.double()
        return torch.nn.functional.conv2d(x.double(), w.double(), wide, *attributes.values())

    wanted = convolved(inputs[0], weight, bias)
    magnitude = convolved(inputs[0].abs(), weight.abs(), None if bias is None else bias.abs())
    if case["residual"]:
        inputs.append(torch.randn(wanted.shape, generator=generator))
        wanted, magnitude = wanted + inputs[1], magnitude + inputs[1].abs()
    if case["activation"] is not None:
        graph.operations[0].attributes |= dict(zip(("low", "high"), case["activation"], strict=True))
        wanted = wanted.clamp(*case["activation"])
    isa = native.half_isa(native.current_isa(), emulated=True)
    got = SparseModule(graph, tuple(inputs), case["threads"], case["mode"], isa)(*inputs)
    assert got.dtype == torch.float32
    # Each product, each sum, and the two operands are rounded.
    roundings = per_group * weight[0, 0].numel() + 6
    allowed = roundings * (ROUNDING * magnitude + SMALLEST)
    assert ((got.double() - wanted).abs() <= allowed).all()


@given(case=convolutions())
@settings(max_examples=70, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_convolution_is_as_exact_as_float16_sums_are(case: dict[str, Any]) -> None:
    check_convolution(case)


@pytest.mark.skipif(not RUNS_PROGRAMS, reason="this CPU has no float16 programs")
@given(case=convolutions())
@settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
def test_any_convolution_as_a_program_too(monkeypatch: pytest.MonkeyPatch, case: dict[str, Any]) -> None:
    monkeypatch.setattr(plan.Plan, "candidates", preferring(lambda choice: choice.code))
    monkeypatch.setattr("explorer.inference.choosing.larger_kernels", without_limit)
    check_convolution(case | {"mode": "sparse"})


@pytest.mark.parametrize("kind", TORCH)
def test_activations_are_computed_in_float32_and_rounded_once(kind: str) -> None:
    class Both(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return TORCH[kind](torch.nn.functional.max_pool2d(x, 1))

    x = (3 * torch.randn(2, 3, 13, 11)).half().float()
    got, wanted = half(Both(), x)(x), TORCH[kind](x.double())
    # In float32, GELU is exact relative to its argument, not to what is left of a very negative one.
    in_float32 = LARGEST_ERROR[kind] * x.abs() / 2 if kind == "gelu" else 0
    assert ((got - wanted).abs() <= 1.01 * ROUNDING * wanted.abs() + SMALLEST + in_float32).all()


class Mixture(nn.Module):
    """Every kernel that images meet: strides of three widths, branches, pools, gates, slices, an operator that torch runs, and what follows pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 5, 2, 2)
        self.far = nn.Conv2d(24, 8, 5, 5, 2)
        self.depth = nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.down = nn.Conv2d(24, 24, 3, 2, 1, groups=24)
        self.left, self.right = nn.Conv2d(24, 16, 1), nn.Conv2d(24, 20, 3, padding=1)
        self.gate_in, self.gate_out = nn.Conv2d(36, 9, 1), nn.Conv2d(9, 36, 1)
        self.norm = nn.BatchNorm2d(36)
        self.out, self.flat = nn.Linear(36, 10), nn.Linear(8 * 2 * 3, 7)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = torch.relu(self.stem(x))
        far = torch.relu(self.far(y))
        y = torch.nn.functional.hardswish(self.depth(y)) + y
        y = torch.nn.functional.max_pool2d(self.down(y), 3, 1, 1)
        y = torch.cat([self.left(y), torch.sin(self.right(y))], 1)
        gate = torch.sigmoid(self.gate_out(torch.relu(self.gate_in(y.mean((2, 3), keepdim=True)))))
        y = self.norm(y * gate)
        pooled = torch.nn.functional.adaptive_avg_pool2d(far, (2, 3)).flatten(1)
        averaged = torch.nn.functional.avg_pool2d(y, 3, 2, 1)
        return self.out(averaged.mean((2, 3))), self.flat(pooled), y[:, 4:20], far


@pytest.mark.parametrize("threads", [1, 2])
def test_every_kernel_agrees_with_torch(threads: int) -> None:
    torch.manual_seed(1)
    network, x = randomised(Mixture()), torch.randn(3, 3, 53, 71)
    compiled = half(network, x, threads=threads)
    assert [name.split(": ")[1] for name in compiled.fallbacks] == ["sin.default"]
    for got, wanted in zip(compiled(x), network(x), strict=True):
        assert got.dtype == torch.float32
        assert relative_error(got, wanted) < 20 * ROUNDING


def test_tokens_agree_with_torch() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(48, 4, 96, activation="gelu", batch_first=True).eval()

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.key, self.value = (nn.Linear(48, 48) for _ in range(3))
            self.one, self.two = layer.linear1, layer.linear2
            self.norm = nn.LayerNorm(48)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            heads = (m(x).unflatten(-1, (4, 12)).transpose(1, 2) for m in (self.query, self.key, self.value))
            y = torch.nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
            return self.norm(x + self.two(torch.nn.functional.gelu(self.one(y))))

    network, x = Encoder().eval(), torch.randn(2, 37, 48)
    compiled = half(network, x)
    assert compiled.fallbacks == ()
    assert relative_error(compiled(x), network(x)) < 4 * ROUNDING


@pytest.mark.parametrize("lowest", [float("-inf"), float(np.finfo(np.float32).min)])
def test_masks_are_added_as_float32(lowest: float) -> None:
    torch.manual_seed(0)
    network, x = Given().eval(), torch.randn(2, 37, 24)
    mask = torch.randn(2, 1, 37, 37)
    mask[:, :, :, 20:] = lowest
    compiled = half(network, x, mask)
    assert not any("attention" in name for name in compiled.fallbacks)
    assert relative_error(compiled(x, mask), network(x, mask)) < 4 * ROUNDING


@pytest.mark.parametrize("sparsity", [0.0, 0.9])
def test_a_network_takes_smaller_batches_and_new_weights(sparsity: float) -> None:
    torch.manual_seed(0)
    network = pruned(randomised(architectures.resnet18(num_classes=10)), sparsity)
    x = torch.randn(4, 3, 64, 64)
    full, compiled = explorer.compile(network, x), half(network, x)
    wanted = network(x)
    amplified = relative_error(full(x), wanted) / 2.0**-24
    for images in (4, 1, 3):
        assert relative_error(compiled(x[:images]), wanted[:images]) < 2 * amplified * ROUNDING
    with torch.no_grad():
        for parameter in network.parameters():
            parameter *= 1.01
    compiled.update_weights(network)
    assert relative_error(compiled(x), network(x)) < 2 * amplified * ROUNDING
    assert relative_error(compiled(x), wanted) > 0.01
    assert compiled.compare(x).precision == "fp16"


def test_activations_take_half_the_room() -> None:
    network, x = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()).eval(), torch.randn(1, 8, 128, 128)
    # Beside the example, which is float32 in both.
    full, compiled = (
        engine.n_bytes - x.nbytes for engine in (explorer.compile(network, x), half(network, x))
    )
    assert 0.45 * full < compiled < 0.55 * full


def test_weights_stand_twice_in_four_bytes() -> None:
    weights = np.array([[1.0, -2.5], [65504.0, 6e-8]], np.float32)
    single, pair = (native.Isa("test", 16, 32, "", "", p) for p in ("fp32", "fp16"))
    np.testing.assert_array_equal(weight_words(weights, single).view(np.float32), weights)
    halves = weight_words(weights, pair).view(np.float16).reshape(2, 2, 2)
    np.testing.assert_array_equal(halves[..., 0], weights.astype(np.float16))
    np.testing.assert_array_equal(halves[..., 0], halves[..., 1])


def test_a_weight_that_float16_cannot_hold_is_named_and_the_old_weights_stay() -> None:
    network, x = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)).eval(), torch.randn(1, 2, 6, 6)
    compiled = half(network, x)
    before = compiled(x)
    nn.init.constant_(network[1].weight, 1e6)
    with pytest.raises(EngineError, match=r"0 has a weight.*batch norm.*65504.*precision='fp32'"):
        compiled.update_weights(network)
    assert torch.equal(compiled(x), before)
    with pytest.raises(EngineError, match="65504"):
        half(network, x)
    assert relative_error(explorer.compile(network, x)(x), network(x)) < 1e-5
    # What follows pooling is float32, and may hold more.
    linear = nn.Linear(3, 2).eval()
    with torch.no_grad():
        linear.weight.fill_(1e5)
    assert relative_error(half(linear, torch.ones(1, 3))(torch.ones(1, 3)), linear(torch.ones(1, 3))) < 1e-6


def test_too_large_activations_become_infinite_as_documented() -> None:
    network, x = nn.Conv2d(1, 1, 1, bias=False).eval(), torch.full((1, 1, 2, 2), 1000.0)
    with torch.no_grad():
        network.weight.fill_(100.0)
    assert torch.isinf(half(network, x)(x)).all()


def test_a_cpu_without_float16_arithmetic_computes_in_float32_and_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compilation, "half_isa", lambda _: None)
    network, x = nn.Conv2d(2, 3, 3).eval(), torch.randn(1, 2, 6, 6)
    with pytest.warns(EngineWarning, match="does not compute in float16"):
        compiled = explorer.compile(network, x, precision="fp16")
    assert compiled.precision == "fp32"
    assert compiled.compare(x).relative_l2 < 1e-6
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        explorer.compile(network, x)


def test_only_cpus_with_the_instructions_are_taken_for_such() -> None:
    plain = native.Isa("avx512", 16, 32, "znver4", "+avx512f,-avx512fp16")
    assert native.half_isa(plain) is None
    found = native.half_isa(native.Isa("avx512", 16, 32, "sapphirerapids", "+avx512f,+avx512fp16"))
    assert found is not None
    assert (found.lanes, found.width, found.element_bytes, found.single.lanes) == (32, 64, 2, 16)
    arm = native.half_isa(native.Isa("neon", 4, 32, "neoverse-n1", "+neon,+fullfp16"))
    assert arm is not None
    assert arm.lanes == 8
    assert native.half_isa(native.Isa("avx2", 8, 16, "haswell", "+avx2,+f16c")) is None


@pytest.mark.parametrize(
    ("system", "capabilities", "has_it"),
    [
        ("linux", 0x119FFF, True),  # what a Neoverse N1 has
        ("linux", 0x8FF, False),  # a Cortex-A72
        ("darwin", 0x119FFF, False),  # there LLVM itself looks
    ],
)
def test_linux_is_asked_whether_an_arm_computes_in_half_precision(
    system: str, capabilities: int, has_it: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def getauxval(kind: int) -> int:
        return {16: capabilities}[kind]

    with monkeypatch.context() as patch:
        patch.setattr("sys.platform", system)
        patch.setattr("ctypes.CDLL", lambda _: SimpleNamespace(getauxval=getauxval))
        patch.setattr("llvmlite.binding.get_process_triple", lambda: "aarch64-unknown-linux-gnu")
        patch.setattr("llvmlite.binding.get_host_cpu_features", Features)
        isa = native.host_isa.__wrapped__()
    assert isa.name == "neon"
    assert (native.half_isa(isa) is not None) == has_it


class Features(dict[str, bool]):
    """What LLVM says of such a CPU."""

    def __init__(self) -> None:
        super().__init__(neon=True)

    def flatten(self) -> str:
        return "+neon"


@pytest.mark.parametrize("precision", ["bf16", "half", 16, None])
def test_another_precision_is_an_error(precision: Any) -> None:
    with pytest.raises(EngineError, match="'fp32' or 'fp16'"):
        explorer.compile(nn.Linear(2, 2), torch.zeros(1, 2), precision=precision)


def test_a_profile_and_a_benchmark_name_the_precision() -> None:
    network, x = nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU()), torch.randn(1, 8, 12, 12)
    compiled = half(network, x)
    assert compiled.benchmark(x, repeats=3, warn=False).precision == "fp16"
    rows = compiled.profile(x, repeats=2)
    assert {row.precision for row in rows if row.macs} == {"fp16"}
    assert "fp16" in repr(compiled)


@pytest.mark.parametrize("shape", [(3,), (40_000,), (2, 3, 224, 224), (1, 1, 7), (5, 33_000), (3, 0)])
def test_an_input_is_copied_in_small_pieces_that_make_up_the_whole(shape: tuple[int, ...]) -> None:
    x = torch.arange(float(np.prod(shape))).reshape(shape)
    copied = torch.full(shape, -1.0)
    for at in straight._pieces(shape):
        assert x[at].numel() <= straight._GRAIN
        copied[at].copy_(x[at])
    assert torch.equal(copied, x)
