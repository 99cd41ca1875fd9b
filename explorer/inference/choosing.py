"""Which kernel computes each layer, and in which order large layers run: decided by measuring them inside the whole network.

Every candidate runs in the whole network, all layers at once, and each layer keeps the one that was fastest *there* (times of a layer alone mislead: its data
would be in the cache). Answers are remembered, see choices.py.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from explorer.inference.choices import choice_cache
from explorer.inference.execution import Execution
from explorer.inference.explanation import read as read_times
from explorer.inference.explanation import written as written_times
from explorer.inference.larger_kernels import Larger, Weighed, larger_kernels
from explorer.inference.pairs import in_pairs
from explorer.inference.plan import Choice
from explorer.inference.timing import torch_threads

if TYPE_CHECKING:
    # What generates or runs machine code needs llvmlite: imported where it is used, so that a machine without it runs through torch.
    from explorer.inference.steps import Steps

_PASSES, _REPEATS = 3, 5
"""How often the candidates take turns, and the runs of one turn."""
_PASSES_S = 0.12
"""Seconds after which two passes are enough."""
_MOST_PASSES, _CALM = 8, 1.1
"""While the second fastest times of a network's steps add up to more than `_CALM` of the fastest ones, something else is running, and there may be layers that it slowed down each
time: then there are more passes, up to the first number. What is found is remembered, and one bad moment would be paid for ever after."""
_ORDER_TURNS, _MOST_ORDER_TURNS, _ORDERS_S = 2, 20, 0.06
"""Runs in each order: so many at least, and at most where they are short, until so many seconds are over; more than the first number also while something else is running, as above. (With a quarter of
the seconds, two threads of a busy machine took the slower order of MobileNetV1 in two of five compilations.)"""
_WAITS_FOR_NOBODY = 0.97
"""What the fastest run of threads that go alone is taken to be worth. Where threads wait for each other in each layer, whatever slows one of them down slows all, of which the fastest runs show little:
ResNet-50 with 16 images, layer by layer, had turns of 98 ms and a median of 109 (Zen 4, beside other work)."""
_TURN_S = 0.015
"""Seconds after which a turn has been long enough: a large network runs but once a turn, after a run that warms the caches."""


def choose(network: Execution, example: tuple[Any, ...]) -> None:
    """Take the kernel of each layer that was fastest before, or time the candidates inside the network."""
    if not network.plan.native:
        return
    from explorer.inference.orders import LAYERS
    from explorer.inference.steps import build_steps

    layers = network.plan.layers(network.graph)
    network.densities = densities = {i: network.density(i) for i in layers}
    larger = _larger_kernels(network, example)
    about = {
        i: {
            "paired": in_pairs(network.weight(i)),
            "code": i in larger.code,
            "winograd": i in larger.winograd,
        }
        for i in layers
    }
    candidates = {
        i: network.plan.candidates(network.graph, i, network.mode, densities[i], **about[i]) for i in layers
    }
    cache = choice_cache()
    questions = {
        i: network.plan.question(network.graph, i, densities[i], **about[i])
        for i, several in candidates.items()
        if len(several) > 1 and network.mode == "auto"
    }
    network.tried = {i: (len(several), {}) for i, several in candidates.items()}
    for i, question in questions.items():
        answer = cache.get(question)
        known = [c for c in candidates[i] if c.label == answer]
        if known:
            network.tried[i][1].update(read_times(cache.get(_times_of(question))))
        candidates[i] = known or candidates[i]
    packed: dict[tuple[str, Choice], Any] = {}
    network.choices = {i: c[0] for i, c in candidates.items()}
    if any(len(several) > 1 for several in candidates.values()):
        _time_candidates(network, example, candidates, packed)
        answers = {question: network.choices[i].label for i, question in questions.items()}
        times = {_times_of(question): written_times(network.tried[i][1]) for i, question in questions.items()}
        cache.put(answers | times)
    # Where whole layers are known to be faster nothing is cut into bands, which takes time too.
    question = f"fastest order {network.mode} {network.plan.network(network.graph, network.densities)}"
    other_orders = cache.get(question) != LAYERS
    network.install(
        build_steps(network.plan, network.graph, network.choices, packed, other_orders=other_orders)
    )
    _find_order(network, example, question)


def _times_of(question: str) -> str:
    """Where the times of a question's candidates are remembered, beside the answer."""
    return f"ms of {question}"


def keep(network: Execution) -> None:
    """Pack the weights that the network has by now for the kernels that its layers have."""
    if not network.plan.native:
        return
    from explorer.inference.orders import LAYERS
    from explorer.inference.steps import build_steps

    network.densities = {i: network.density(i) for i in network.choices}
    order = LAYERS if network.steps is None else network.steps.order
    steps = build_steps(network.plan, network.graph, network.choices, other_orders=order != LAYERS)
    network.install(steps)
    network.use_order(steps, order if order in steps.chains else LAYERS)


def _larger_kernels(network: Execution, example: tuple[Any, ...]) -> Larger:
    """The layers whose kernels may need more memory than others."""
    from explorer.inference.step_builder import block_bytes

    layers = {}
    for i, share in network.densities.items():
        # Dense kernels do not ask which weights are zero.
        density = 1.0 if network.mode == "dense" else share
        size, can = network.weight(i).size, network.plan.may_be_code(network.graph, i)
        vectors = network.plan.vectors_of(network.graph.operations[i])
        winograd = network.plan.may_be_winograd(network.graph, i, density)
        short = network.plan.has_short_offsets(network.graph, i, block_bytes())
        half = network.isa.precision == "fp16"
        layers[i] = Weighed(size, round(density * size), vectors, can, winograd, short, half)
    example_bytes = sum(value.nbytes for value in example if isinstance(value, Tensor))
    return larger_kernels(layers, network.plan.memory.n_bytes, example_bytes)


def _time_candidates(
    network: Execution,
    example: tuple[Any, ...],
    candidates: Mapping[int, list[Choice]],
    packed: dict[tuple[str, Choice], Any],
) -> None:
    from explorer.inference.steps import build_steps

    rounds = max(len(several) for several in candidates.values())
    # A layer with fewer candidates keeps its first while the others try on.
    tried = [{i: c[turn] if turn < len(c) else c[0] for i, c in candidates.items()} for turn in range(rounds)]
    steps = [
        build_steps(network.plan, network.graph, choices, packed, other_orders=False) for choices in tried
    ]
    # The rounds take turns, so that a moment in which the machine is slow falls on all of them.
    start = time.perf_counter()
    passes: list[NDArray[np.float64]] = []  # (rounds, steps) each
    while len(passes) < _MOST_PASSES:
        # The times of a large network vary less.
        enough = 2 if time.perf_counter() - start > _PASSES_S else _PASSES
        if len(passes) >= enough and _is_calm(passes):
            break
        these_ms = []
        for these in steps:
            network.install(these)
            these_ms.append(_step_times(network, example))
        passes.append(np.array(these_ms))
    fastest = np.min(passes, axis=0)
    for step, index in enumerate(network.plan.native):
        several = candidates.get(index, [])
        if len(several) > 1:
            network.tried[index][1].update(
                zip((c.label for c in several), np.round(fastest[:, step], 6).tolist(), strict=False)
            )
        if several:
            network.choices[index] = tried[int(np.argmin(fastest[:, step]))][index]


def _is_calm(passes: list[NDArray[np.float64]]) -> bool:
    """Whether what was timed in each pass was, all together, as short as it can be more than once."""
    fastest, second = np.sort(passes, axis=0)[:2]
    return bool(second.sum() <= _CALM * fastest.sum())


def _step_times(network: Execution, example: tuple[Any, ...]) -> NDArray[np.float64]:
    """The fastest of a few runs of each step, in milliseconds (noise only ever adds)."""
    runs = []
    inputs, images = _of_a_turn(network, example)
    with torch_threads(network.torch_threads), torch.no_grad():
        start = time.perf_counter()
        for turn in range(_REPEATS + 1):
            network.run_together(inputs, images, [])
            if turn > 0:
                runs.append(network.cycles)
            if turn > 0 and time.perf_counter() - start > _TURN_S:
                break
    from explorer.inference.threads import cycles_per_ms

    fastest: NDArray[np.int64] = np.min(runs, axis=0)
    return fastest / cycles_per_ms(network.isa)


def _find_order(network: Execution, example: tuple[Any, ...], question: str) -> None:
    """Run the network in the order that is the fastest: it depends on caches, and on who else uses them, more than anything that is known here.

    The answer is remembered under `question`.
    """
    steps = network.steps
    if steps is None or len(steps.chains) == 1:
        return
    answer = choice_cache().get(question)
    if answer is None or answer not in steps.chains:
        answer = _fastest_order(network, example, steps)
        choice_cache().put({question: answer})
    network.use_order(steps, answer)


def _fastest_order(network: Execution, example: tuple[Any, ...], steps: Steps) -> str:
    from explorer.inference.orders import ALONE, ALONE_BY_BANDS

    orders = tuple(steps.chains)
    inputs, images = _of_a_turn(network, example)
    turns: list[NDArray[np.float64]] = []  # seconds of each order
    start = time.perf_counter()
    with torch_threads(network.torch_threads), torch.no_grad():
        while (
            len(turns) < _ORDER_TURNS
            or (len(turns) < _MOST_PASSES and not _is_calm(turns))
            or (len(turns) < _MOST_ORDER_TURNS and time.perf_counter() - start < _ORDERS_S)
        ):
            turns.append(np.array([_seconds(network, inputs, images, steps, name) for name in orders]))
    fastest = np.min(turns, axis=0)
    fastest[[name in (ALONE, ALONE_BY_BANDS) for name in orders]] *= _WAITS_FOR_NOBODY
    return orders[int(np.argmin(fastest))]


def _seconds(network: Execution, inputs: tuple[Any, ...], images: int, steps: Steps, order: str) -> float:
    """What one run takes in this order."""
    network.use_order(steps, order)
    begin = time.perf_counter()
    network.run_together(inputs, images)
    return time.perf_counter() - begin


def _of_a_turn(network: Execution, example: tuple[Any, ...]) -> tuple[tuple[Any, ...], int]:
    """As much of the example input as goes through together, and how many images that is. Some of those that go side by side may be the same."""
    images = network.plan.images
    if network.at_once is None:
        return example, images
    return tuple(value[torch.arange(images) % len(value)] for value in example), images
