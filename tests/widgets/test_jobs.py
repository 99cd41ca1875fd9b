from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from explorer.widgets.jobs import InlineExecutor, JobRunner
from explorer.widgets.publisher import DirectScheduler, Publisher


def test_the_result_of_a_job_is_reported() -> None:
    results: list[int] = []
    runner = JobRunner(InlineExecutor(), Publisher(DirectScheduler()))
    runner.start(lambda _stop: 42, results.append, pytest.fail)
    assert results == [42]
    assert not runner.running


def test_what_a_job_raises_is_reported_and_the_next_job_can_start() -> None:
    errors: list[BaseException] = []
    runner = JobRunner(InlineExecutor(), Publisher(DirectScheduler()))
    runner.start(lambda _stop: 1 / 0, pytest.fail, errors.append)
    assert isinstance(errors[0], ZeroDivisionError)
    runner.start(lambda _stop: None, lambda _: None, pytest.fail)


def test_a_second_job_is_refused_while_one_runs_and_stop_ends_the_first() -> None:
    ended = threading.Event()
    with ThreadPoolExecutor(1) as executor:
        runner = JobRunner(executor, Publisher(DirectScheduler()))
        runner.start(
            lambda stop: stop.wait(30), lambda stopped: ended.set() if stopped else None, pytest.fail
        )
        with pytest.raises(RuntimeError, match="already"):
            runner.start(lambda _stop: None, lambda _: None, pytest.fail)
        runner.stop()
        assert ended.wait(10)
