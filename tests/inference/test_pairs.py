"""Weights whose nonzeros stand in the same places in neighbouring output channels: recognised, run two channels at a time, and as exact as any."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import explorer
from explorer.inference import compilation, native
from explorer.inference.module import SparseModule
from explorer.inference.pairs import in_pairs
from explorer.inference.plan import Plan
from explorer.inference.sparse_rows import SparseWeights
from explorer.masks import magnitude_mask, pair_mask
from tests.inference.graphs import conv_graph, preferring, relative_error, usual_size
from tests.inference.test_kernels import (
    CPUS,
    ISAS,
    TOLERANCE,
    convolutions,
    innermost_loops,
    run_by,
)
from tests.inference.test_partners import needs_code


def in_pattern(weight: torch.Tensor, sparsity: float, seed: int = 0) -> torch.Tensor:
    """Zeros in the same random places of output channels 0 and 1, 2 and 3, ..."""
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(len(weight) // 2, *weight.shape[1:], generator=generator) >= sparsity
    kept.reshape(-1)[0] = True
    return weight * kept.repeat_interleave(2, 0)


@pytest.fixture(scope="module", autouse=True)
def _pairs_where_offered() -> Iterator[None]:
    """Small layers may be faster channel by channel; these tests are about pairs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Plan, "candidates", preferring(lambda choice: choice.pairs))
        yield


def kernel_of(layer: nn.Module, x: torch.Tensor, **options: Any) -> str:
    return next(iter(explorer.compile(layer.eval(), x, sparse="sparse", **options).choices.values()))


@given(case=convolutions(), unbalanced=st.booleans())
@settings(max_examples=70, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_convolution_in_pairs_equals_torch(case: dict, unbalanced: bool) -> None:
    generator = torch.Generator().manual_seed(case["seed"])
    shape, outputs = (case["images"], case["channels"], *case["size"]), 2 * case["outputs"]
    sparsity = max(case["sparsity"], 0.5)
    in_group = case["channels"] // case["groups"]
    weight = in_pattern(
        torch.randn(outputs, in_group, *case["kernel"], generator=generator), sparsity, case["seed"]
    )
    if unbalanced:  # one channel of a pair lacks a few of the other's weights
        weight[0] *= torch.rand(weight[0].shape, generator=generator) > 0.1
    bias = torch.randn(outputs, generator=generator) if case["bias"] else None
    attributes = {k: case[k] for k in ("stride", "padding", "dilation", "groups")}
    graph = conv_graph(shape, weight, bias, residual=case["residual"], **attributes)
    inputs = [torch.randn(shape, generator=generator)]
    wide = None if bias is None else bias.double()
    wanted = torch.nn.functional.conv2d(inputs[0].double(), weight.double(), wide, *attributes.values())
    if case["residual"]:
        inputs.append(torch.randn(wanted.shape, generator=generator))
        wanted = wanted + inputs[1]
    if case["activation"] is not None:
        graph.operations[0].attributes |= dict(zip(("low", "high"), case["activation"], strict=True))
        wanted = wanted.clamp(*case["activation"])
    engine = SparseModule(graph, tuple(inputs), case["threads"], "sparse")
    if engine.isa != "torch" and in_pairs(weight.numpy()) and wanted[0, 0].numel() > 1:
        assert "sparse pairs" in engine.choices["conv"]
    for _ in range(2):  # a residual must not be added to in its own place
        assert (
            relative_error(engine(*inputs), wanted, usual_size(inputs[0], weight, **attributes)) < TOLERANCE
        )


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    ("size", "kernel", "stride"),
    [((14, 14), 3, 1), ((4, 4), 3, 1), ((7, 7), 1, 1), ((28, 28), 1, 2), ((9, 33), 5, 1), ((56, 56), 1, 1)],
)
def test_every_instruction_set_runs_pairs_with_a_residual_in_place(
    isa: str, size: tuple[int, int], kernel: int, stride: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_by(isa, monkeypatch)
    torch.manual_seed(0)

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(6, 70, kernel, stride, kernel // 2)
            self.b = nn.Conv2d(6, 70, 1, stride)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(self.a(x) + self.b(x))

    network, x = Residual().eval(), torch.randn(2, 6, *size)
    for layer in (network.a, network.b):
        layer.weight.data = in_pattern(layer.weight.data, 0.6)
    engine = explorer.compile(network, x, sparse="sparse", threads=2)
    assert all("pairs" in choice for choice in engine.choices.values())
    with torch.no_grad():
        wanted = network(x)
    for _ in range(3):
        assert relative_error(engine(x), wanted) < TOLERANCE


def test_float16_runs_pairs_too(monkeypatch: pytest.MonkeyPatch) -> None:
    if native.current_isa().name == "torch":
        pytest.skip("no machine code on this machine")
    monkeypatch.setattr(compilation, "half_isa", partial(native.half_isa, emulated=True))
    torch.manual_seed(0)
    layer, x = nn.Conv2d(16, 32, 3, padding=1).eval(), torch.randn(1, 16, 14, 14)
    layer.weight.data = in_pattern(layer.weight.data, 0.9)
    engine = explorer.compile(layer, x, sparse="sparse", precision="fp16")
    assert "sparse pairs" in str(engine.choices)
    assert engine.compare(x).relative_l2 < 2e-3


def test_tokens_run_in_pairs_and_vectors_channel_by_channel() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(48, 64)
    layer.weight.data = pair_mask(layer.weight.data, 0.9) * layer.weight.data
    tokens, vectors = torch.randn(2, 30, 48), torch.randn(3, 48)
    assert kernel_of(layer, tokens) == "sparse pairs"
    assert kernel_of(layer, vectors) == "sparse"
    for x in (tokens, vectors):
        assert relative_error(explorer.compile(layer, x)(x), layer(x).detach()) < TOLERANCE


def test_what_is_in_pairs_and_what_is_not() -> None:
    weight = torch.randn(64, 32, 3, 3, generator=torch.Generator().manual_seed(0))

    def found(changed: torch.Tensor) -> bool:
        return in_pairs(changed.numpy())

    pairs = pair_mask(weight, 0.9) * weight
    assert found(pairs)
    assert found(in_pattern(weight[:2], 0.9))
    assert not found(magnitude_mask(weight, 0.9) * weight)
    assert not found(pairs[1:-1])  # the partners are no longer side by side
    assert not found(pairs[1:])  # an odd number
    assert not found(torch.zeros(4, 4))
    assert not found(torch.zeros(0, 4))
    half_lost = pairs.clone()
    half_lost[::2] *= torch.rand(pairs[::2].shape, generator=torch.Generator().manual_seed(1)) > 0.2
    assert found(half_lost)  # 5 of 9 places hold a single weight at most: still worth it
    only_at_first = pairs.clone()
    only_at_first[16:] = (magnitude_mask(weight, 0.9) * weight)[16:]
    assert not found(only_at_first)


@pytest.mark.parametrize(("outputs", "groups", "pairs"), [(8, 2, True), (6, 2, False), (8, 8, False)])
def test_pairs_are_found_in_groups_that_they_do_not_straddle(outputs: int, groups: int, pairs: bool) -> None:
    layer, x = nn.Conv2d(8 * outputs, outputs, 3, groups=groups), torch.randn(1, 8 * outputs, 9, 9)
    layer.weight.data = in_pattern(layer.weight.data, 0.5)
    assert ("pairs" in kernel_of(layer, x)) is pairs
    assert relative_error(explorer.compile(layer, x, sparse="sparse")(x), layer(x).detach()) < TOLERANCE


def test_new_weights_of_another_pattern_are_right_with_and_without_a_new_choice() -> None:
    torch.manual_seed(0)
    layer, x = nn.Conv2d(16, 32, 3, padding=1).eval(), torch.randn(1, 16, 14, 14)
    dense = layer.weight.data.clone()
    layer.weight.data = in_pattern(dense, 0.9)
    engine = explorer.compile(layer, x, sparse="sparse")
    assert "pairs" in str(engine.choices)
    for choose in (False, True):
        layer.weight.data = magnitude_mask(dense, 0.8) * dense
        engine.update_weights(layer, choose=choose)
        assert ("pairs" in str(engine.choices)) is not choose
        assert relative_error(engine(x), layer(x).detach()) < TOLERANCE
    layer.weight.data = in_pattern(dense, 0.9)
    engine.update_weights(layer)
    assert "pairs" in str(engine.choices)
    assert relative_error(engine(x), layer(x).detach()) < TOLERANCE


@needs_code
def test_rows_of_pairs_hold_the_weights_of_both_channels_and_their_gains() -> None:
    generator = np.random.default_rng(0)
    weight = generator.standard_normal((10, 7)).astype(np.float32)
    weight[generator.random(weight.shape) < 0.5] = 0
    gain = generator.standard_normal(10)
    rebuilt = np.zeros((10, 7))
    pairs = SparseWeights.of(weight, native.current_isa(), gain, channels=2)
    assert pairs.shape == (5, 7)
    row = np.repeat(np.arange(5), np.diff(pairs.starts))
    for channel in range(2):
        rebuilt[2 * row + channel, pairs.columns] = pairs.values[:, channel]
    np.testing.assert_allclose(rebuilt, weight * gain[:, None], rtol=1e-6)
    assert len(row) == np.count_nonzero(weight.reshape(5, 2, 7).any(1))


@pytest.mark.parametrize("cpu", ["avx512", "avx2", "avx512 fp16"])
def test_an_operand_is_loaded_once_for_both_channels(cpu: str) -> None:
    from explorer.inference.kernels.conv import ConvKernel

    isa, triple, instruction, register = CPUS[cpu]
    kernel = ConvKernel(4, pairs=True)
    loops = innermost_loops(native.assembly(isa, kernel.build(isa)[0], triple))
    hot = [loop for loop in loops if any(instruction in line for line in loop)]
    assert hot
    for loop in hot:  # two nonzeros at a time
        fmas = [line for line in loop if instruction in line]
        loads = [line for line in loop if f"%{register}" in line and "(%" in line and "broadcast" not in line]
        broadcasts = [line for line in loop if "broadcast" in line]
        assert (len(fmas), len(loads), len(broadcasts)) == (16, 8, 4)


def test_the_answer_of_a_timing_is_remembered_for_the_pattern_too() -> None:
    weight = torch.ones(8, 3, 3, 3)
    graph = conv_graph((1, 3, 9, 9), weight, None, stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=1)
    plan = Plan(graph, native.Isa("avx512", 16, 32, "", ""), 1)
    questions = {plan.question(graph, 0, 0.1, paired=paired) for paired in (True, False)}
    assert len(questions) == 2
    wide, narrow = (
        {c.label for c in Plan(graph, isa, 1).candidates(graph, 0, "auto", 0.1, paired=True)}
        for isa in (native.Isa("avx512", 16, 32, "", ""), native.Isa("avx2", 8, 16, "", ""))
    )
    assert wide == narrow == {"sparse pairs, shift", "sparse pairs"}
