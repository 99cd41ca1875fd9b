"""What each step of a network costs inside it, as rows of a profile."""

from __future__ import annotations

import time
from collections.abc import Callable
from math import prod
from typing import Any

import numpy as np

from explorer.inference.execution import Execution
from explorer.inference.graph import Operation, base_name
from explorer.inference.plan import ImportSegment, TorchSegment
from explorer.inference.timing import LayerTiming

_WARM_CALLS = 3


def layer_timings(
    network: Execution, call: Callable[[], object], inputs: tuple[Any, ...], images: int, repeats: int
) -> tuple[LayerTiming, ...]:
    """Medians over `repeats` of `call`, which is what its caller does with these inputs of so many images; see `SparseModule.profile`."""
    cycles, seconds, wholes = [], [], []
    # A call that enters native code once leaves behind what each step took. Where more has to be timed, which takes time too, it is timed in runs beside the calls.
    enters_once = network.straight is not None and images <= network.plan.images
    segments = [s for s in network.plan.segments if not (enters_once and isinstance(s, ImportSegment))]
    for i in range(repeats + _WARM_CALLS):
        times: list[float] = []
        network.forget_cycles()
        start = time.perf_counter()
        call()
        whole = time.perf_counter() - start
        if enters_once:
            network.keep_cycles()
        else:
            network.run(inputs, images, times)
        if i >= _WARM_CALLS:
            cycles.append(network.cycles)
            seconds.append(times)
            wholes.append(whole)
    step_ms, peak_gflops = np.zeros(0), 0.0
    if network.plan.native:
        from explorer.inference.peak import peak_of
        from explorer.inference.threads import cycles_per_ms

        peak_gflops = peak_of(network.isa, network.threads).gflops
        step_ms = np.median(cycles, axis=0) / cycles_per_ms(network.isa)
    segment_ms = np.zeros(1) if enters_once else np.median(seconds, axis=0) * 1e3
    rows = []
    for segment, ms in zip(segments, segment_ms, strict=True):
        if isinstance(segment, TorchSegment):
            rows.append(_torch_row(network, segment.operation, float(ms), images, peak_gflops))
        elif isinstance(segment, ImportSegment):
            rows.append(LayerTiming(segment.value, "copy", float(ms), "copy", 0.0, 0, False))
        else:
            rows += [
                _native_row(network, step, float(step_ms[step]), images, peak_gflops)
                for step in range(segment.first, segment.last)
            ]
    # So that the parts make up the whole.
    rest = float(np.median(wholes)) * 1e3 - sum(row.ms for row in rows)
    rows.append(LayerTiming("call", "call", max(rest, 0.0), "python", 0.0, 0, False))
    return tuple(rows)


def _torch_row(network: Execution, o: Operation, ms: float, images: int, peak_gflops: float) -> LayerTiming:
    c, shapes = network.graph.constants, network.graph.shapes
    names = {n: network.captured.parameter_names.get(n, "").rpartition(".")[2] for n in o.references()}
    weights = [c[n] for n, name in names.items() if "weight" in name and c[n].dim() > 1]
    zeros, elements = (
        sum(int(count) for count in counts)
        for counts in ([(w == 0).sum() for w in weights], [w.numel() for w in weights])
    )
    operator, macs = base_name(o.target), 0
    if len(weights) == 1 and operator.startswith(("conv", "linear")) and o.output in shapes:
        # Transposed, each pixel that is read meets the weights of its channel; else each that is written.
        each = o.references()[0] if "transpose" in operator else o.output
        macs = prod(shapes[each]) * images // network.plan.images * prod(weights[0].shape[1:])
    return LayerTiming(
        o.name or "model",
        operator_name(o.target),
        ms,
        "torch",
        zeros / max(elements, 1),
        macs,
        macs > 0,
        0,
        peak_gflops if network.isa.precision == "fp32" else 0.0,  # that of float16 says nothing about torch
    )


def _native_row(network: Execution, step: int, ms: float, images: int, peak_gflops: float) -> LayerTiming:
    assert network.steps is not None
    index = network.plan.native[step]
    o, shapes = network.graph.operations[index], network.graph.shapes
    sparsity, macs = 0.0, 0
    prunable = o.kind in ("conv", "linear")
    if prunable:
        sparsity = 1 - network.densities[index]
        outputs = prod(shapes[o.output]) * images // network.room(o.output)
        macs = outputs * prod(shapes[o.weight or ""][1:])
    places = {*network.plan.operands(o), o.output}
    layouts = {place: network.plan.places[place].layout for place in places}
    touched = sum(
        layout.n_bytes * images // (network.room(place) * getattr(layout, "abreast", 1))
        for place, layout in layouts.items()
    )
    return LayerTiming(
        o.name or "model",
        o.kind,
        ms,
        network.steps.labels[step],
        sparsity,
        macs,
        prunable,
        network.steps.table_bytes[step] + touched,
        peak_gflops,
        network.isa.precision,
        network.threads,
    )


def operator_name(target: Any) -> str:
    """An operator as torch names it, without its library."""
    return str(target).removeprefix("aten.")
