"""Activations: their accuracy over all of float32, and where they stand in networks."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from explorer.inference import native
from explorer.inference.activations import LARGEST_ERROR, Activation
from explorer.inference.kernels import pointwise
from explorer.inference.memory import Memory, address
from tests.inference.test_kernels import ISAS, runnable

PARAMETERS = {"leaky_relu": (0.01,), "elu": (0.7, 1.3, 1.1)}
TORCH = {
    "sigmoid": torch.nn.functional.sigmoid,
    "hard_sigmoid": torch.nn.functional.hardsigmoid,
    "hard_swish": torch.nn.functional.hardswish,
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "tanh": torch.nn.functional.tanh,
    "leaky_relu": lambda x: torch.nn.functional.leaky_relu(x, 0.01),
    "elu": lambda x: torch.ops.aten.elu(x, 0.7, 1.3, 1.1),
}


def activation(kind: str) -> Activation:
    return Activation(kind, PARAMETERS.get(kind, ()))


def apply(kind: str, x: NDArray[np.float32], isa: str | None = None) -> NDArray[np.float32]:
    """The native function on each element of x."""
    cpu = native.host_isa(isa)
    kernel = pointwise.PointwiseKernel(across=True, activation=activation(kind))
    memory, vectors = Memory(), -(-x.size // cpu.lanes)
    data, out = memory.zeros(vectors * cpu.lanes), memory.zeros(vectors * cpu.lanes)
    data[: x.size] = x
    fields = {
        "x": address(data),
        "out": address(out),
        "jobs": 1,
        "channels": 1,
        "channels_per_job": 1,
        "vectors": vectors,
    }
    row = np.array([fields.get(name, 0) for name in pointwise.ARGUMENTS.fields], np.int64)
    code = native.machine_code(cpu, kernel)
    ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p)(code)(address(row), 0, None)
    return out[: x.size].copy()


def sample() -> NDArray[np.float32]:
    """All magnitudes of float32, and more of those where the functions bend."""
    generator = np.random.default_rng(0)
    any_bits = generator.integers(0, 2**32, 200_000, np.uint32).view(np.float32)
    bends = np.concatenate([generator.normal(0, s, 200_000) for s in (0.5, 3, 30)]).astype(np.float32)
    return np.concatenate([any_bits[np.isfinite(any_bits)], bends, np.float32([0.0, -0.0, 3, -3, 20, -20])])


def error(kind: str, got: NDArray[np.float32], x: NDArray[np.float32]) -> float:
    with np.errstate(all="ignore"):
        wanted = activation(kind).reference(x)
        fits = np.abs(wanted) < 3e38  # what float32 holds
    smallest = 1e-3 if kind == "gelu_tanh" else 1e-28
    difference = np.abs(got - wanted)[fits]
    scale = np.abs(x.astype(np.float64)) / 2 if kind == "gelu" else np.abs(wanted)
    return float((difference / np.maximum(scale[fits], smallest)).max())


def test_gelu_is_within_two_and_a_half_roundings_of_the_truth() -> None:
    """Of its argument, below 1 of 1. torch's own is not the same on all CPUs, on some further from the truth, on others nearer."""
    x = np.linspace(-8, 8, 400_001, dtype=np.float32)
    error = np.abs(apply("gelu", x) - activation("gelu").reference(x))
    assert np.all(error <= 2.5 * np.spacing(np.maximum(np.abs(x), np.float32(1))))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", LARGEST_ERROR)
def test_an_activation_is_as_accurate_as_it_says_over_all_of_float32(kind: str, isa: str) -> None:
    if not runnable(isa):
        pytest.skip(f"this CPU does not run {isa}")
    x = sample()
    assert error(kind, apply(kind, x, isa), x) <= LARGEST_ERROR[kind]


@pytest.mark.parametrize("kind", LARGEST_ERROR)
def test_the_numpy_twin_of_an_activation_is_torchs(kind: str) -> None:
    x = torch.linspace(-30, 30, 10_001, dtype=torch.float64)
    np.testing.assert_allclose(
        activation(kind).reference(x.numpy()), TORCH[kind](x).numpy(), rtol=1e-9, atol=1e-15
    )


@pytest.mark.parametrize("kind", LARGEST_ERROR)
def test_infinities_and_nan_come_out_as_in_torch(kind: str) -> None:
    x = torch.tensor([torch.inf, -torch.inf, torch.nan])
    got, wanted = apply(kind, x.numpy()), TORCH[kind](x).numpy()
    if kind == "gelu":  # torch's own depends on the library that it was built with: NaN, or infinity
        wanted = np.float32([np.inf, got[1], np.nan])
    np.testing.assert_allclose(got, wanted, rtol=1e-6)


@pytest.mark.parametrize(
    ("triple", "lanes", "cpu", "features", "registers"),
    [
        ("aarch64-unknown-linux-gnu", 4, "cortex-a76", "+neon", ".4s"),
        ("x86_64-unknown-linux-gnu", 8, "haswell", "", "ymm"),
    ],
)
@pytest.mark.parametrize("kind", LARGEST_ERROR)
def test_an_activation_is_vector_code_without_calls_on_other_cpus_too(
    kind: str, triple: str, lanes: int, cpu: str, features: str, registers: str
) -> None:
    isa = native.Isa("test", lanes, 32 if lanes == 4 else 16, cpu, features)
    kernel = pointwise.PointwiseKernel("mul", affine=True, activation=activation(kind), masked=True)
    lines = native.assembly(isa, kernel.build(isa)[0], triple).splitlines()
    multiplied = [line for line in lines if "fmul" in line or "vmulps" in line]
    assert multiplied
    assert all(registers in line for line in multiplied)
    assert not [line for line in lines if line.split()[:1] in (["bl"], ["callq"], ["call"])]
