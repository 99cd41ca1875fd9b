"""What is computed element by element, against its numpy twin: every operand, with gaps or without, on planes and on vectors."""

from __future__ import annotations

import ctypes
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from explorer.inference import native
from explorer.inference.activations import LARGEST_ERROR, Activation
from explorer.inference.kernels import pointwise
from explorer.inference.memory import Memory, address
from explorer.inference.step_builder import bits
from tests.inference.test_kernels import SOME_ISA

PARAMETERS = {"leaky_relu": (0.1,), "elu": (0.7, 1.3, 1.1)}


@given(
    isa=SOME_ISA,
    images=st.integers(1, 3),
    channels=st.integers(1, 7),
    vectors=st.integers(1, 4),
    channels_per_job=st.integers(1, 3),
    operand=st.sampled_from(["", "add", "mul"]),
    one_value=st.booleans(),
    affine=st.booleans(),
    across=st.booleans(),
    kind=st.sampled_from([None, *LARGEST_ERROR]),
    bounds=st.sampled_from([(-math.inf, math.inf), (0.0, math.inf), (0.0, 6.0), (-0.5, 0.5)]),
    masked=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=150, deadline=None)
def test_the_kernel_computes_what_its_twin_does(
    isa: str,
    images: int,
    channels: int,
    vectors: int,
    channels_per_job: int,
    operand: str,
    one_value: bool,
    affine: bool,
    across: bool,
    kind: str | None,
    bounds: tuple[float, float],
    masked: bool,
    seed: int,
) -> None:
    cpu, generator, memory = native.host_isa(isa), np.random.default_rng(seed), Memory()
    plane, one_value, masked = vectors * cpu.lanes, one_value and not across, masked and not across
    # Features lie across the lanes of vectors: what the kernel is told is one channel.
    shape = (images, plane) if across else (images, channels, plane)

    def some(*size: int) -> np.ndarray:
        array = memory.zeros(math.prod(size))
        array[:] = 2 * generator.standard_normal(array.size)
        return array.reshape(size)

    x, out, other = some(*shape), some(*shape), some(*shape[: 2 if one_value else 3])
    scale, shift = some(shape[1]), some(shape[1])
    mask = generator.random(plane) < 0.7
    integers = memory.zeros(plane, np.int32)
    integers[:] = -mask.astype(np.int32)
    jobs = 1 if across else -(-channels // channels_per_job)
    row = pointwise.ARGUMENTS.filled(
        **{name: address(array) for name, array in (("x", x), ("other", other), ("out", out))},
        **{f"{name}_image": array[0].nbytes for name, array in (("x", x), ("other", other), ("out", out))},
        **({} if across else {f"{n}_plane": a[0, 0].nbytes for n, a in (("x", x), ("other", other), ("out", out))}),
        low=bits(bounds[0]),
        high=bits(bounds[1]),
        jobs=jobs,
        channels=1 if across else channels,
        channels_per_job=1 if across else channels_per_job,
        vectors=vectors,
        scale=address(scale),
        shift=address(shift),
        mask=address(integers),
    )  # fmt: skip
    activation = Activation(kind, PARAMETERS.get(kind, ())) if kind else None
    kernel = pointwise.PointwiseKernel(
        operand,
        one_value=one_value and operand != "",
        affine=affine,
        across=across,
        activation=activation,
        masked=masked,
    )
    wanted = pointwise.reference(
        x,
        other if operand else None,
        operand=operand,
        scale=scale if affine else None,
        shift=shift if affine else None,
        low=bounds[0],
        high=bounds[1],
        activation=activation,
        mask=mask if masked else None,
    )
    code = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p])(
        native.machine_code(cpu, kernel)
    )
    for job in range(images * jobs):
        code(address(row), job, None)
    assert wanted.dtype == np.float32
    if (
        affine or activation
    ):  # the kernel rounds a product and a sum once; activations are as exact as they say
        np.testing.assert_allclose(out, wanted, rtol=1e-5, atol=1e-5)
    else:
        np.testing.assert_array_equal(out, wanted)


@pytest.mark.parametrize("kind", [None, "silu"])
def test_the_twin_is_numpys(kind: str | None) -> None:
    """The twin, spelled out for one pixel."""
    x, other = np.float32([[[2.0]]]), np.float32([[3.0]])
    how: dict[str, Any] = {"scale": np.float32([0.5]), "shift": np.float32([-1.0])}
    activation = Activation(kind) if kind else None
    got = pointwise.reference(x, other, operand="mul", high=1.5, activation=activation, **how)
    assert got.shape == (1, 1, 1)
    assert got[0, 0, 0] == pytest.approx(2 / (1 + math.exp(-2)) if kind else 1.5)
