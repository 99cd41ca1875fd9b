"""Freed memory, by the kernel's own count of pages that it had to hand out."""

from __future__ import annotations

import platform
import threading
from pathlib import Path

import pytest
import torch

from explorer.memory import pages_kept

resource = pytest.importorskip("resource")
pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has the switches")

BLOCK = 48 << 20
PAGES = BLOCK // resource.getpagesize()


def faults(n_blocks: int = 8) -> int:
    """Ask for a block, write to it and free it, again and again; return the pages that the system handed out."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(n_blocks):
        torch.empty(BLOCK, dtype=torch.uint8).fill_(1)
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_minflt) - before


def resident() -> int:
    """Bytes of memory that the process has now."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * resource.getpagesize()


@pytest.fixture(autouse=True)
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the system backs large blocks with huge pages there are few faults to count."""
    if "[always]" in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text(encoding="ascii"):
        pytest.skip("huge pages are always used")


def test_kept_pages_are_handed_out_once() -> None:
    with pages_kept():
        faults(16)  # until blocks that are rounded up differently have found their places
        assert faults() < PAGES
    assert faults() >= 7 * PAGES


def test_memory_goes_back_when_the_last_context_ends() -> None:
    with pages_kept():
        with pages_kept():
            torch.empty(BLOCK, dtype=torch.uint8).fill_(1)
        assert faults(1) < PAGES // 2, "the outer one still keeps it"
        held = resident()
    assert resident() < held - BLOCK // 2


def test_an_error_and_other_threads_leave_nothing_switched() -> None:
    def work() -> None:
        with pages_kept():
            torch.empty(BLOCK, dtype=torch.uint8).fill_(1)

    with pytest.raises(ValueError, match="stop"), pages_kept():
        raise ValueError("stop")
    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults() >= 7 * PAGES
