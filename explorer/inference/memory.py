"""Memory that native code may use, or be written to: aligned, on huge pages where the system offers them, alive as long as its owner.

Measured on ResNet-50 prototypes: weights on ordinary pages cost about 10 % more time than on huge ones (TLB misses of the weight stream).
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import sys
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from explorer.errors import EngineError

_CHUNK = 4 << 20
_HUGE = 2 << 20


class Memory:
    """Takes from the first large chunk that has room left, gives nothing back, and frees all when it is dropped."""

    def __init__(self) -> None:
        self._chunks: list[NDArray[np.uint8]] = []
        self._taken: list[int] = []  # bytes of each chunk
        self.n_bytes = 0
        self._code: _CodeMemory | None = None

    def zeros(self, size: int, dtype: DTypeLike = np.float32, align: int = 64) -> NDArray[Any]:
        """A zeroed array of `size` elements, starting on a multiple of `align` bytes."""
        dtype = np.dtype(dtype)
        wanted = max(size * dtype.itemsize, 1)
        for i, chunk in enumerate(self._chunks):
            start = -(-self._taken[i] // align) * align
            if start + wanted <= len(chunk):
                break
        else:
            i, start, chunk = len(self._chunks), 0, _map(max(_CHUNK, wanted))
            self._chunks.append(chunk)
            self._taken.append(0)
        self._taken[i] = start + wanted
        self.n_bytes += wanted
        return chunk[start : start + size * dtype.itemsize].view(dtype)

    def put(self, array: NDArray[Any], align: int = 64) -> int:
        """Copy `array` here; its address."""
        mine = self.zeros(array.size, array.dtype, align)
        mine[:] = array.reshape(-1)
        return address(mine)

    def trim(self) -> None:
        """Give back what a huge page holds beyond the last array: the system counts all of a page as soon as one byte of it is used.

        More can be taken later, on small pages.
        """
        for chunk, taken in zip(self._chunks, self._taken, strict=True):
            _advise(chunk[taken // _HUGE * _HUGE :], "MADV_NOHUGEPAGE")
            _advise(chunk[-(-taken // mmap.PAGESIZE) * mmap.PAGESIZE :], "MADV_DONTNEED")

    def put_code(self, code: NDArray[np.uint8]) -> int:
        """Copy machine code here, or data that stands among it; its address. It can be run after `seal`."""
        if self._code is None:
            self._code = _CodeMemory()
        self.n_bytes += code.nbytes
        return self._code.put(code)

    def seal(self) -> None:
        """Give back what is left over, and make the machine code runnable, and no longer writable. More can be put here, and sealed, later.

        Raises
        ------
        EngineError
            When the system forbids it, see `can_run_code`.
        """
        self.trim()
        if self._code is not None:
            self._code.trim()
            self._code.make_runnable()


class _CodeMemory(Memory):
    def make_runnable(self) -> None:
        for chunk in self._chunks:
            _make_runnable(chunk)
        self._taken = [len(chunk) for chunk in self._chunks]  # what follows goes to other pages


def _advise(pages: NDArray[np.uint8], advice: str) -> None:
    """Tell Linux what becomes of whole pages. Where it does not listen, as without huge pages, they stay as they are."""
    madvise = getattr(ctypes.CDLL(None), "madvise", None) if sys.platform == "linux" else None
    if madvise is not None and len(pages):
        madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        madvise(address(pages), len(pages), getattr(mmap, advice))


def _make_runnable(chunk: NDArray[np.uint8]) -> None:
    size = len(chunk) // mmap.PAGESIZE * mmap.PAGESIZE
    # On Windows and elsewhere memory is made runnable by other means, which nobody could try.
    protect = getattr(ctypes.CDLL(None, use_errno=True), "mprotect", None) if os.name == "posix" else None
    if protect is None:
        raise EngineError("This system has no mprotect, by which memory is made runnable.")
    protect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    if protect(address(chunk), size, mmap.PROT_READ | mmap.PROT_EXEC):
        why = os.strerror(ctypes.get_errno())
        raise EngineError(f"This system does not let memory be made runnable ({why}).")


@cache
def can_run_code() -> bool:
    """Whether this system lets a process run code that it has written, as hardened ones do not."""
    memory = Memory()
    memory.put_code(np.zeros(1, np.uint8))
    try:
        memory.seal()
    except EngineError:
        return False
    return True


def address(array: NDArray[Any]) -> int:
    """The address of the first element."""
    return int(array.ctypes.data)


def _map(n_bytes: int) -> NDArray[np.uint8]:
    """At least `n_bytes` zeroed bytes that start on a huge page."""
    size = -(-n_bytes // _HUGE) * _HUGE + _HUGE
    if hasattr(mmap, "MAP_PRIVATE"):
        # Python's default is shared memory: a forked child would write into its parent's activations, and huge pages are another matter there.
        region = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    else:
        region = mmap.mmap(-1, size)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages: slower, not wrong
            region.madvise(mmap.MADV_HUGEPAGE)
    whole = np.frombuffer(region, np.uint8)
    skip = -whole.ctypes.data % _HUGE
    return whole[skip:]
