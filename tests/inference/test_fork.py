"""Locks that a forked child does not find held, and a fork that waits for nobody who waits for it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system knows no fork")

_BEGIN = """
import os, sys, threading, time
from explorer.inference import fork
outer, inner, third = fork.EngineLock(), fork.EngineLock(), fork.EngineLock()
entered, forking = threading.Event(), threading.Event()

def forks():
    start = time.monotonic()
    child = os.fork()
    if not child:
        for lock in (outer, inner, third):
            assert lock.lock.acquire(timeout=5), "held by a thread that is not there"
            lock.lock.release()
        with outer.inside(), inner.inside():
            os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    return time.monotonic() - start
"""


def run(program: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _BEGIN + program], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr


def test_who_is_inside_may_take_another_lock_while_a_fork_waits() -> None:
    run("""
def inside():
    with outer.inside():
        entered.set()
        while not fork._is_closed:
            time.sleep(0.001)
        time.sleep(0.05)
        with inner.inside():
            pass

thread = threading.Thread(target=inside)
thread.start()
entered.wait()
assert forks() >= 0.05, "did not wait"
assert forks() < 5
thread.join(5)
assert not thread.is_alive()
""")


def test_who_comes_while_a_fork_waits_stays_outside_until_it_is_over() -> None:
    run("""
left = []

def inside():
    with outer.inside():
        entered.set()
        time.sleep(0.1)
        left.append("inside")

def comes():
    entered.wait()
    while not fork._is_closed:
        time.sleep(0.001)
    with third.inside():
        left.append("came")

threads = [threading.Thread(target=target) for target in (inside, comes)]
for thread in threads:
    thread.start()
entered.wait()
forks()
for thread in threads:
    thread.join(5)
assert left == ["inside", "came"], left
""")


def test_a_lock_that_is_held_too_long_is_renewed_in_the_child_only() -> None:
    run("""
fork._PATIENCE_S = 0.05
leave = threading.Event()

def inside():
    with outer.inside():
        entered.set()
        leave.wait()

thread = threading.Thread(target=inside)
thread.start()
entered.wait()
lock = outer.lock
assert forks() < 5
assert outer.lock is lock and not outer.lock.acquire(blocking=False)
leave.set()
thread.join(5)
assert outer.lock.acquire(blocking=False)
""")


def test_who_forks_may_hold_locks() -> None:
    run("""
child = None
with outer.inside():
    child = os.fork()
    if not child:
        with inner.inside():
            pass
if not child:
    with outer.inside():
        os._exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
""")
