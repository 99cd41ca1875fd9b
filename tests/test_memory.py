"""Freed memory, by the kernel's own count of pages that it had to hand out, each time in a process that has done nothing else."""

from __future__ import annotations

import platform
import subprocess
import sys
import textwrap

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has the switches")

HELPERS = """
import ctypes, resource, threading
from pathlib import Path
from explorer.memory import pages_kept

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes = [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
BLOCK = 48 << 20
PAGES = BLOCK // resource.getpagesize()

def use():
    block = libc.malloc(BLOCK)
    # A byte of each page is enough for the system to hand it out; not a library's fill, which may ask for huge pages.
    array = (ctypes.c_char * BLOCK).from_address(block)
    for at in range(0, BLOCK, resource.getpagesize()):
        array[at] = b"x"
    libc.free(block)

def faults(n_blocks=4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(n_blocks):
        use()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

if "[always]" in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text():
    PAGES //= 512
"""


def run(code: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", HELPERS + textwrap.dedent(code)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_kept_pages_are_handed_out_once() -> None:
    run("""
        assert faults() >= 3 * PAGES, "by default each block is new"
        with pages_kept():
            use()
            assert faults() < PAGES // 2
    """)


def test_memory_goes_back_when_the_last_context_ends() -> None:
    run("""
        with pages_kept():
            with pages_kept():
                use()
            assert faults(1) < PAGES // 2, "the outer one still keeps it"
            held = resident()
        assert resident() < held - BLOCK // 2
    """)


def test_an_error_and_other_threads_leave_nothing_switched() -> None:
    run("""
        def work():
            with pages_kept():
                use()

        try:
            with pages_kept():
                raise ValueError
        except ValueError:
            pass
        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        before = resident()
        use()
        assert resident() < before + BLOCK // 2, "what is freed goes back"
    """)
