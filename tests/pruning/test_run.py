from __future__ import annotations

import itertools
import math
import threading
import time
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from explorer.data import LoadedData, load_data
from explorer.errors import DistributionError, RunError
from explorer.masks import n_zeros
from explorer.models import LoadedModel, load_model
from explorer.pruning import (
    CubicSchedule,
    DoneEvent,
    EvalEvent,
    LatencyEvent,
    MaskEvent,
    PruningRun,
    RunEvent,
    RunResult,
    StepEvent,
    evaluate,
)

ASKED = {"conv1": 0.5, "conv2": 0.9, "fc": 0.333}


def a_run(model: LoadedModel, data: LoadedData, **options: Any) -> PruningRun:
    return PruningRun(
        model,
        data,
        options.pop("distribution", ASKED),
        **(
            {"epochs": 5, "batch_size": 32, "update_every": 3, "learning_rate": 0.1, "distillation": 0.0}
            | options
        ),
    )


def steps_of(events: list[RunEvent]) -> list[StepEvent]:
    return [event for event in events if isinstance(event, StepEvent)]


def same_weights(first: nn.Module, second: nn.Module) -> bool:
    ours, theirs = first.state_dict(), second.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_run_reaches_exactly_the_asked_sparsity_and_learns(
    tiny_model: LoadedModel, tiny_data: LoadedData
) -> None:
    before = {name: value.clone() for name, value in tiny_model.module.state_dict().items()}
    run = a_run(tiny_model, tiny_data)
    events = list(run)
    result = run.result

    for layer in tiny_model.layers:
        weight = result.module.get_submodule(layer.name).weight
        assert isinstance(weight, Tensor)
        expected = n_zeros(layer.n_params, ASKED[layer.name])
        assert int((weight == 0).sum()) == expected
        assert result.achieved[layer.name] == (expected, layer.n_params)
        assert torch.equal(weight != 0, result.masks[layer.name])
        assert weight.is_contiguous()
        assert not bool(torch.signbit(weight[weight == 0]).any()), "zeros are plain zeros, not negative ones"
    zeros = sum(zeros for zeros, _ in result.achieved.values())
    assert result.sparsity == zeros / sum(layer.n_params for layer in tiny_model.layers)
    assert result.accuracy > 0.9
    assert not result.stopped
    assert result.failure is None
    assert isinstance(events[-1], DoneEvent)
    assert events[-1].result is result
    assert all(torch.equal(before[name], value) for name, value in tiny_model.module.state_dict().items()), (
        "the caller's model is left alone"
    )


def test_the_final_accuracies_are_those_of_dense_and_pruned_network_on_test_data(
    tiny_model: LoadedModel, tiny_data: LoadedData
) -> None:
    result = a_run(tiny_model, tiny_data, epochs=1).finish()
    assert result.measured_on == "validation"
    assert result.accuracy == evaluate(result.module, *tiny_data.validation_tensors()).accuracy

    test = (tiny_data.train_tensors()[0][:77], tiny_data.train_tensors()[1][:77])
    with_test = load_data(tiny_data.train_tensors(), tiny_data.validation_tensors(), test=test)
    result = a_run(tiny_model, with_test, epochs=1).finish()
    assert result.measured_on == "test"
    assert result.n_evaluated == 77
    assert result.accuracy == pytest.approx(evaluate(result.module, *test).accuracy, abs=1 / 77)
    assert result.dense_accuracy == evaluate(tiny_model.module, *test).accuracy


def test_sparsity_follows_the_schedule_of_every_layer_and_never_falls(
    tiny_model: LoadedModel, tiny_data: LoadedData
) -> None:
    run = a_run(tiny_model, tiny_data, stabilise=0.2, ramp=0.5, update_every=4)
    total = run.total_steps
    assert total == 40
    schedules = {name: CubicSchedule(0.0, sparsity, 8, 28, 4) for name, sparsity in ASKED.items()}
    sizes = {layer.name: layer.n_params for layer in tiny_model.layers}
    due = 0
    for event in run:
        if not isinstance(event, StepEvent):
            continue
        # The step number `event.step` was made with the masks that were due before it.
        at = event.step - 1
        if schedules["fc"].is_update(at):
            due = sum(n_zeros(sizes[name], schedule.sparsity_at(at)) for name, schedule in schedules.items())
        assert event.sparsity == due / sum(sizes.values())
        live = run.result
        assert sum(zeros for zeros, _ in live.achieved.values()) == due
        expected_phase = "stabilise" if at < 8 else "prune" if at <= 28 else "fine-tune"
        assert event.phase == expected_phase
    assert due == sum(n_zeros(sizes[name], sparsity) for name, sparsity in ASKED.items())


def test_weights_that_are_gone_stay_gone(tiny_model: LoadedModel, tiny_data: LoadedData) -> None:
    run = a_run(tiny_model, tiny_data)
    masks: list[dict[str, Tensor]] = [dict(run.result.masks) for event in run if isinstance(event, StepEvent)]
    for earlier, later in itertools.pairwise(masks):
        for name in ASKED:
            assert not bool((later[name] & ~earlier[name]).any())


def test_masked_weights_and_their_momentum_are_zero_after_every_step(
    tiny_model: LoadedModel, tiny_data: LoadedData
) -> None:
    run = a_run(tiny_model, tiny_data)
    for event in run:
        if not isinstance(event, StepEvent):
            continue
        for name, mask in run._held.masks.items():
            weight = run._weights[name]
            assert int(torch.count_nonzero(weight[~mask])) == 0
            momentum = run._optimizer.state[weight]["momentum_buffer"]
            assert int(torch.count_nonzero(momentum[~mask])) == 0
            assert bool((momentum[mask] != 0).any())


def test_the_learning_rate_falls_along_a_half_cosine(tiny_model: LoadedModel, tiny_data: LoadedData) -> None:
    steps = steps_of(list(a_run(tiny_model, tiny_data, learning_rate=0.08)))
    total = steps[0].total_steps
    for event in steps:
        expected = 0.04 * (1 + math.cos(math.pi * (event.step - 1) / total))
        assert event.learning_rate == pytest.approx(expected, abs=1e-12)
    assert [event.step for event in steps] == list(range(1, total + 1))


def test_zeros_that_the_weights_already_have_are_the_initial_sparsity(
    tiny_model: LoadedModel, tiny_data: LoadedData
) -> None:
    weight = tiny_model.module.get_submodule("conv2").weight
    assert isinstance(weight, Tensor)
    gone = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < 0.6
    with torch.no_grad():
        weight[gone] = 0.0
    run = a_run(tiny_model, tiny_data, distribution={"conv2": 0.8}, stabilise=0.5)
    assert run.result.achieved["conv2"] == (int(gone.sum()), weight.numel())
    first = next(event for event in run if isinstance(event, StepEvent))
    assert first.sparsity == int(gone.sum()) / weight.numel()
    result = run.finish()
    assert not bool(result.masks["conv2"][gone].any())
    assert result.achieved["conv2"][0] == n_zeros(weight.numel(), 0.8)


def test_a_layer_that_is_sparser_than_asked_lets_weights_back_in(
    tiny_model: LoadedModel, tiny_data: LoadedData
) -> None:
    weight = tiny_model.module.get_submodule("conv2").weight
    assert isinstance(weight, Tensor)
    with torch.no_grad():
        weight.zero_()
    result = a_run(tiny_model, tiny_data, distribution={"conv2": 0.25}).finish()
    kept = result.masks["conv2"]
    assert int((~kept).sum()) == n_zeros(weight.numel(), 0.25)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_run_learns_in_either_precision_and_says_which_it_was(
    tiny_model: LoadedModel, tiny_data: LoadedData, precision: str
) -> None:
    result = a_run(tiny_model, tiny_data, precision=precision).finish()
    assert result.settings.precision == precision
    assert result.accuracy > 0.9
    assert all(value.dtype != torch.bfloat16 for value in result.module.state_dict().values())
    assert a_run(tiny_model, tiny_data).settings.precision in ("float32", "bfloat16")
    with pytest.raises(RunError, match="precision is 'half'; give one of auto, float32, bfloat16"):
        a_run(tiny_model, tiny_data, precision="half")


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(tiny_data: LoadedData) -> None:
    # Dropout draws from torch's global generator, which a run must not depend on, nor disturb.
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.3), nn.Linear(32, 4)
    )
    model = load_model(network, torch.zeros(1, 1, 8, 8))

    def weights(seed: int, noise: int) -> RunResult:
        torch.manual_seed(noise)
        before = torch.get_rng_state()
        result = a_run(model, tiny_data, distribution={"1": 0.8}, seed=seed).finish()
        assert torch.equal(before, torch.get_rng_state())
        return result

    first, again, other = weights(3, 10), weights(3, 11), weights(4, 10)
    assert same_weights(first.module, again.module)
    assert first.accuracy == again.accuracy
    assert not same_weights(first.module, other.module)


def test_masks_are_told_when_they_are_selected_and_stay_as_they_were_told(
    tiny_model: LoadedModel, tiny_data: LoadedData
) -> None:
    run = a_run(tiny_model, tiny_data)
    told: list[MaskEvent] = []
    copies: list[dict[str, Tensor]] = []
    schedule = CubicSchedule(0.0, ASKED["conv2"], run._method._begin, run._method._end, 3)  # type: ignore[attr-defined]
    for event in run:
        if isinstance(event, MaskEvent):
            assert event.step == run.step
            told.append(event)
            copies.append({name: mask.clone() for name, mask in event.masks.items()})
    selected = [step + 1 for step in range(run.total_steps) if schedule.is_update(step)]
    assert [event.step for event in told] == [0, *selected]
    for event, copy in zip(told, copies, strict=True):
        for name, mask in event.masks.items():
            assert torch.equal(mask, copy[name])
            assert event.zeros[name] == int((~mask).sum())
    assert told[0].zeros == dict.fromkeys(ASKED, 0)
    for name, mask in run.result.masks.items():
        assert torch.equal(told[-1].masks[name], mask)


def test_stop_ends_before_the_next_step_and_leaves_a_usable_masked_network(
    tiny_model: LoadedModel, tiny_data: LoadedData
) -> None:
    run = a_run(tiny_model, tiny_data)
    for event in run:
        if isinstance(event, StepEvent) and event.step == 10:
            run.stop()
    result = run.result
    assert run.state == "stopped"
    assert result.stopped
    assert result.step == 10
    assert result.accuracy == evaluate(result.module, *tiny_data.validation_tensors()).accuracy
    for name, mask in result.masks.items():
        weight = result.module.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        assert int(torch.count_nonzero(weight[~mask])) == 0
    assert 0.0 < result.sparsity < a_run(tiny_model, tiny_data).finish().sparsity


def test_a_run_that_is_stopped_before_it_starts_returns_the_dense_network(
    tiny_model: LoadedModel, tiny_data: LoadedData
) -> None:
    run = a_run(tiny_model, tiny_data)
    assert math.isnan(run.result.accuracy)
    run.stop()
    result = run.finish()
    assert result.stopped
    assert result.step == 0
    assert same_weights(result.module, tiny_model.module)
    assert result.accuracy == result.dense_accuracy


def test_iterating_may_be_broken_off_and_taken_up_again(
    tiny_model: LoadedModel, tiny_data: LoadedData
) -> None:
    run = a_run(tiny_model, tiny_data)
    for event in run:
        if isinstance(event, StepEvent) and event.step == 7:
            break
    assert run.step == 7
    assert same_weights(run.finish().module, a_run(tiny_model, tiny_data).finish().module)


def test_pause_holds_the_worker_resume_lets_it_go_on_and_result_can_be_taken_meanwhile(
    tiny_model: LoadedModel, tiny_data: LoadedData
) -> None:
    run = a_run(tiny_model, tiny_data, epochs=10)
    started, held = threading.Event(), threading.Event()
    events: list[RunEvent] = []

    def work() -> None:
        for event in run:
            events.append(event)
            if isinstance(event, StepEvent) and event.step == 5:
                started.set()
                held.wait(30)

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    assert started.wait(30)
    run.pause()
    assert run.state == "paused"
    held.set()
    worker.join(0.2)
    assert worker.is_alive()
    assert run.step == 5
    assert run.result.step == 5
    run.resume()
    worker.join(60)
    assert run.state == "finished"
    assert len(steps_of(events)) == run.total_steps
    assert same_weights(run.result.module, a_run(tiny_model, tiny_data, epochs=10).finish().module)


def test_stop_wakes_a_paused_run(tiny_model: LoadedModel, tiny_data: LoadedData) -> None:
    run = a_run(tiny_model, tiny_data)
    run.pause()
    worker = threading.Thread(target=run.finish, daemon=True)
    worker.start()
    run.stop()
    worker.join(30)
    assert run.state == "stopped"


def test_a_loss_that_is_no_number_raises_and_keeps_the_last_good_weights(tiny_data: LoadedData) -> None:
    class Bursts(nn.Module):
        """Gives nan in training from the 13th batch on."""

        def __init__(self) -> None:
            super().__init__()
            self.flat, self.fc, self.calls = nn.Flatten(), nn.Linear(64, 4), 0

        def forward(self, x: Tensor) -> Tensor:
            scores: Tensor = self.fc(self.flat(x))
            self.calls += self.training
            return scores * (float("nan") if self.calls > 12 else 1.0)

    model = load_model(Bursts(), torch.zeros(1, 1, 8, 8))
    run = a_run(model, tiny_data, distribution={"fc": 0.9}, update_every=5, stabilise=0.0, ramp=0.2)
    with pytest.raises(RunError, match=r"nan after 12 steps .*Lower learning_rate.*after 10 steps") as caught:
        run.finish()
    assert run.state == "failed"
    result = run.result
    assert result.failure == str(caught.value)
    assert result.stopped
    assert result.step == 10
    # The oracle: the same run, stopped where the failed one was last known to be good.
    twin = a_run(model, tiny_data, distribution={"fc": 0.9}, update_every=5, stabilise=0.0, ramp=0.2)
    for event in twin:
        if isinstance(event, StepEvent) and event.step == 10:
            twin.stop()
    assert same_weights(result.module, twin.result.module)
    assert result.achieved["fc"] == (n_zeros(256, 0.9), 256)


def test_a_learning_rate_that_is_far_too_high_is_reported_and_leaves_finite_weights(
    tiny_model: LoadedModel, tiny_data: LoadedData
) -> None:
    run = a_run(tiny_model, tiny_data, learning_rate=1e30)
    with pytest.raises(RunError, match="Lower learning_rate, for instance to 1e"):
        run.finish()
    assert all(bool(torch.isfinite(value).all()) for value in run.result.module.state_dict().values())


def test_events_come_in_order_and_latency_is_measured_while_nothing_trains(
    tiny_model: LoadedModel, tiny_data: LoadedData
) -> None:
    @dataclass
    class Timed:
        latency_ms: float
        spread_ms: float
        dense_ms: float

    seen: list[float] = []

    def measure(module: nn.Module) -> Timed:
        assert not module.training
        weight = module.get_submodule("conv2").weight
        assert isinstance(weight, Tensor)
        seen.append(float((weight == 0).float().mean()))
        return Timed(2.0 - seen[-1], 0.1, 3.0)

    run = a_run(tiny_model, tiny_data, measure_latency=measure, evaluate_every=16)
    events = list(run)
    evaluations = [event for event in events if isinstance(event, EvalEvent)]
    latencies = [event for event in events if isinstance(event, LatencyEvent)]
    assert [event.step for event in evaluations] == [0, 16, 32, 40] == [event.step for event in latencies]
    assert run.n_evaluations == len(evaluations)
    assert tuple(evaluations) == run.result.evaluations
    for event, sparsity in zip(latencies, seen, strict=True):
        assert event.latency_ms == 2.0 - sparsity
        assert event.dense_ms == 3.0
        assert event.speedup == pytest.approx(3.0 / (2.0 - sparsity))
    assert seen[0] == 0.0
    assert seen[-1] == pytest.approx(0.9, abs=1e-3)
    for earlier, later in itertools.pairwise(steps_of(events)):
        assert later.step == earlier.step + 1
    assert steps_of(events)[-1].seconds_left >= 0.0


def test_batch_norm_statistics_follow_the_pruned_network(
    tiny_model: LoadedModel, tiny_data: LoadedData
) -> None:
    # Pruning at the last step but one leaves a single batch to follow; the statistics must have moved all the same.
    result = a_run(tiny_model, tiny_data).finish()
    x, _ = tiny_data.train_tensors()
    with torch.no_grad():
        before_norm = result.module.get_submodule("conv1")(x)
    norm = result.module.get_submodule("bn")
    assert isinstance(norm, nn.BatchNorm2d)
    assert isinstance(norm.running_mean, Tensor)
    torch.testing.assert_close(norm.running_mean, before_norm.mean((0, 2, 3)), atol=0.05, rtol=0.2)


def test_distillation_pulls_towards_the_dense_outputs(tiny_model: LoadedModel, tiny_data: LoadedData) -> None:
    # Only the dense outputs are learnt from, so the labels, which are made wrong here, cannot be what is learnt.
    dense = a_run(tiny_model, tiny_data, distribution={}, epochs=10).finish().module
    inputs, labels = tiny_data.train_tensors()
    wrong = load_data((inputs, (labels + 1) % 4), tiny_data.validation_tensors())
    model = load_model(dense, torch.zeros(1, 1, 8, 8))
    result = a_run(model, wrong, distillation=1.0).finish()
    assert result.accuracy > 0.9


def test_training_threads_are_set_for_the_step_only_and_written_down(
    tiny_model: LoadedModel, tiny_data: LoadedData
) -> None:
    before = torch.get_num_threads()
    run = a_run(tiny_model, tiny_data, threads=before + 1, epochs=1)
    for _ in run:
        assert torch.get_num_threads() == before
    assert run.result.settings.threads == before + 1
    assert a_run(tiny_model, tiny_data).settings.threads == before


def test_an_interrupt_leaves_a_usable_result(tiny_model: LoadedModel, tiny_data: LoadedData) -> None:
    class Interrupts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.calls = nn.Linear(64, 4), 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += self.training
            if self.calls > 20:
                raise KeyboardInterrupt
            scores: Tensor = self.fc(x.flatten(1))
            return scores

    run = a_run(load_model(Interrupts(), torch.zeros(1, 1, 8, 8)), tiny_data, distribution={"fc": 0.75})
    with pytest.raises(KeyboardInterrupt):
        run.finish()
    assert run.state == "stopped"
    assert run.result.stopped
    assert run.result.step == 20
    assert run.result.achieved["fc"] == (192, 256)


@pytest.mark.parametrize(
    ("distribution", "options", "error", "words"),
    [
        (
            {"conv9": 0.5},
            {},
            DistributionError,
            "'conv9', which cannot be pruned; layers are conv1, conv2, fc",
        ),
        ({"fc": 1.0}, {}, DistributionError, "'fc' has sparsity 1.0"),
        ({"fc": float("nan")}, {}, DistributionError, "'fc' has sparsity nan"),
        (ASKED, {"epoch": 3}, RunError, "no option 'epoch'.*options are method, epochs"),
        (ASKED, {"method": "magic"}, RunError, "no pruning method 'magic'; choose one of gmp"),
        (ASKED, {"learning_rate": -1.0}, RunError, "learning_rate is -1.0; give a number above 0"),
        (ASKED, {"learning_rate": math.inf}, RunError, "learning_rate is inf"),
        (ASKED, {"epochs": 0}, RunError, "epochs is 0"),
        (ASKED, {"stabilise": 0.7, "ramp": 0.4}, RunError, "add up to more than 1"),
        (ASKED, {"batch_size": 0}, RunError, "batch_size is 0"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_starts(
    tiny_model: LoadedModel,
    tiny_data: LoadedData,
    distribution: dict[str, float],
    options: dict[str, Any],
    error: type[Exception],
    words: str,
) -> None:
    with pytest.raises(error, match=words):
        a_run(tiny_model, tiny_data, distribution=distribution, **options)


def test_a_run_of_one_step_prunes_and_trains_once(tiny_model: LoadedModel, tiny_data: LoadedData) -> None:
    run = a_run(tiny_model, tiny_data, epochs=0.01)
    assert run.total_steps == 1
    result = run.finish()
    assert {name: zeros for name, (zeros, _) in result.achieved.items()} == {
        layer.name: n_zeros(layer.n_params, ASKED[layer.name]) for layer in tiny_model.layers
    }


def test_pauses_and_the_consumer_are_not_counted_as_time_of_the_run(
    tiny_model: LoadedModel, tiny_data: LoadedData
) -> None:
    run = a_run(tiny_model, tiny_data, epochs=0.5)
    for event in run:
        if isinstance(event, StepEvent):
            time.sleep(0.25)
    assert run.result.seconds < 0.25 * run.total_steps
