from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from explorer.widgets.publisher import DirectScheduler, HomeThread, LoopScheduler, Publisher


class HeldScheduler:
    """Keeps the calls until the test lets them go."""

    def __init__(self) -> None:
        self.calls: list[tuple[float, Callable[[], None]]] = []

    def __call__(self, delay: float, call: Callable[[], None]) -> None:
        self.calls.append((delay, call))

    def go(self) -> None:
        calls, self.calls = self.calls, []
        for _, call in calls:
            call()


def test_only_the_latest_news_of_a_slot_is_delivered() -> None:
    scheduler, seen = HeldScheduler(), []
    publisher = Publisher(scheduler, interval=0.1)
    for i in range(1000):
        publisher.post("a", lambda i=i: seen.append(i))
    assert len(scheduler.calls) == 1
    scheduler.go()
    assert seen == [999]


def test_slots_are_delivered_in_the_order_of_their_latest_posting() -> None:
    scheduler, seen = HeldScheduler(), []
    publisher = Publisher(scheduler)
    for name in ("end", "progress", "curves", "end"):
        publisher.post(name, lambda name=name: seen.append(name))
    scheduler.go()
    assert seen == ["progress", "curves", "end"]


def test_a_second_delivery_waits_for_the_interval() -> None:
    scheduler = HeldScheduler()
    publisher = Publisher(scheduler, interval=60)
    publisher.post("a", lambda: None)
    assert scheduler.calls[0][0] <= 0
    scheduler.go()
    publisher.post("a", lambda: None)
    assert 59 < scheduler.calls[0][0] <= 60


def test_news_posted_while_delivering_are_not_lost() -> None:
    seen: list[str] = []
    publisher = Publisher(DirectScheduler())
    publisher.post("a", lambda: (seen.append("a"), publisher.post("b", lambda: seen.append("b"))))
    assert seen == ["a", "b"]


def test_a_call_that_fails_does_not_keep_the_others_from_being_delivered() -> None:
    scheduler, seen = HeldScheduler(), []
    publisher = Publisher(scheduler)
    publisher.post("broken", lambda: 1 / 0)
    publisher.post("end", lambda: seen.append("end"))
    with pytest.raises(ZeroDivisionError):
        scheduler.go()
    assert seen == ["end"]


def test_posts_of_a_worker_arrive_in_the_thread_of_the_loop_at_ten_hertz() -> None:
    async def scenario() -> tuple[list[int], set[str]]:
        seen: list[int] = []
        threads: set[str] = set()
        arrived = asyncio.Event()
        publisher = Publisher(LoopScheduler(asyncio.get_running_loop()), interval=0.05)

        def deliver(i: int) -> None:
            seen.append(i)
            threads.add(threading.current_thread().name)
            if i == 4999:
                arrived.set()

        def work() -> None:
            for i in range(5000):
                publisher.post("a", lambda i=i: deliver(i))

        worker = threading.Thread(target=work, name="worker")
        worker.start()
        await asyncio.wait_for(arrived.wait(), 10)
        worker.join()
        return seen, threads

    # In a thread of its own: a browser test may have left a loop running in this one.
    with ThreadPoolExecutor(1, thread_name_prefix="loop") as executor:
        seen, threads = executor.submit(lambda: asyncio.run(scenario())).result()
    assert seen[-1] == 4999
    assert threads == {"loop_0"}
    assert len(seen) < 200


def test_calls_from_other_threads_come_home_in_order() -> None:
    seen: list[tuple[int, int]] = []

    async def main() -> int:
        home = HomeThread(LoopScheduler(asyncio.get_running_loop()))
        home.bring(lambda: seen.append((0, threading.get_ident())))
        assert len(seen) == 1  # at once

        def elsewhere() -> None:
            for i in range(1, 500):
                home.bring(lambda i=i: seen.append((i, threading.get_ident())))

        await asyncio.to_thread(elsewhere)
        await asyncio.sleep(0)
        return threading.get_ident()

    # In a thread of its own: the browser of other tests leaves a loop running in this one.
    with ThreadPoolExecutor(1) as executor:
        here = executor.submit(lambda: asyncio.run(main())).result()
    assert seen == [(i, here) for i in range(500)]
