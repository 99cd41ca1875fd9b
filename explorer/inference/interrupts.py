"""Lets Ctrl-C wait while others' code runs that an interrupt in the middle would leave damaged.

Python raises KeyboardInterrupt between any two statements of the main thread. torch.export changes what all of torch is and has, and the module's parameters, while it
runs; llvmlite holds its one lock by a context manager in Python. Interrupted at a bad moment, torch could then do nothing more in this process, and who
asks LLVM from another thread would wait for ever.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Let Ctrl-C wait for the end, which should not be further away than a second or two. Only who presses it twice does not wait."""
    handler = signal.getsignal(signal.SIGINT)
    # Python runs handlers in the main thread only.
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    waiting: list[tuple[int, FrameType | None]] = []

    def wait(number: int, frame: FrameType | None) -> None:
        waiting.append((number, frame))
        if len(waiting) > 1:
            handler(number, frame)

    signal.signal(signal.SIGINT, wait)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if len(waiting) == 1:
            handler(*waiting[0])
