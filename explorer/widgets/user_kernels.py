"""The kernels of the app's users: no more than there is room for, none without its page, none beyond its share of the machine.

Voila starts a kernel for every page. It learns that a page was closed from a message that may never come (a crash, a lost network), and
Jupyter's culling waits until a kernel is idle, which one in the middle of a run is not. So connections are what counts here: a kernel
whose page was away for `absent_seconds` is ended, whatever it does. Named by `multi_kernel_manager_class` in `jupyter/config/voila.json`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from typing import Any

import traitlets as t
from jupyter_core.utils import ensure_async
from jupyter_server.services.kernels.kernelmanager import AsyncMappingKernelManager
from tornado.web import HTTPError

from explorer.widgets.serving import GB, can_limit_memory, kernel_environment

_LOOK_EVERY = 0.1


class ServerFull(HTTPError):
    """All places are taken; the page for it is `503.html` among the templates."""

    def __init__(self, n_users: int, reload_seconds: int) -> None:
        super().__init__(503, "All %d places are taken.", n_users, reason="All places are taken")
        self.n_users = n_users
        self.reload_seconds = reload_seconds


class UserKernels(AsyncMappingKernelManager):
    """Kernels of the app, one to each page."""

    max_users = t.Int(0, help="Most kernels at once; 0 for as many as are asked for.").tag(config=True)
    threads = t.Int(0, help="CPUs that a kernel may use; 0 for all.").tag(config=True)
    memory_gb = t.Float(
        0.0, help="Memory that a kernel may ask for, in GB of 10^9 bytes; 0 for no limit."
    ).tag(config=True)
    absent_seconds = t.Float(30.0, help="A kernel whose page was away for so long is ended.").tag(config=True)
    arrival_seconds = t.Float(50.0, help="A kernel whose page has not come within so long is ended.").tag(
        config=True
    )
    yield_seconds = t.Float(
        3.0, help="So long a new page waits for a place: one that is reloaded gives up its own just then."
    ).tag(config=True)
    reload_seconds = t.Int(10, help="So often the page of a full server tries again.").tag(config=True)

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._starting = 0
        # When each kernel was first seen without a page, and which have had one.
        self._absent_since: dict[str, float] = {}
        self._visited: set[str] = set()
        self._cpus: dict[str, set[int]] = {}

    @property
    def n_users(self) -> int:
        """Kernels that run or are about to."""
        return len(self._kernels) + self._starting

    async def start_kernel(self, **kwargs: Any) -> str:  # type: ignore[override]
        """Start a kernel within its limits, or raise `ServerFull`."""
        await self._wait_for_a_place()
        self._starting += 1
        try:
            kwargs["env"] = kernel_environment(kwargs.get("env") or os.environ, self.threads or None)
            kernel_id: str = await super().start_kernel(**kwargs)
        finally:
            self._starting -= 1
        self._absent_since[kernel_id] = time.monotonic()
        self._limit(kernel_id)
        return kernel_id

    async def _wait_for_a_place(self) -> None:
        end = time.monotonic() + self.yield_seconds
        while 0 < self.max_users <= self.n_users:
            gone = [kernel_id for kernel_id in self._absent_since if kernel_id in self._visited]
            if gone:
                # Its page may be in a tunnel, but somebody else is here.
                longest = min(gone, key=self._absent_since.__getitem__)
                self.log.info("Kernel %s is without its page and makes room.", longest)
                await self._end(longest)
            elif time.monotonic() < end:
                await asyncio.sleep(_LOOK_EVERY)
            else:
                raise ServerFull(self.n_users, self.reload_seconds)

    def _limit(self, kernel_id: str) -> None:
        """Keep a kernel that has just begun, and all that it will start, within its memory and on its CPUs."""
        pid = getattr(self.get_kernel(kernel_id).provisioner, "pid", None)
        if pid is None:
            return
        if self.memory_gb and can_limit_memory():
            import resource

            most = int(self.memory_gb * GB)
            # Data and not address space: torch maps gigabytes of files that it never reads.
            resource.prlimit(pid, resource.RLIMIT_DATA, (most, most))
        if self.threads and hasattr(os, "sched_setaffinity"):
            self._cpus[kernel_id] = chosen = self._least_used_cpus(os.sched_getaffinity(0))
            os.sched_setaffinity(pid, chosen)

    def _least_used_cpus(self, usable: set[int]) -> set[int]:
        """Return `threads` of the usable CPUs, those that the fewest users are on."""
        taken = [cpu for cpus in self._cpus.values() for cpu in cpus]
        return set(sorted(usable, key=lambda cpu: (taken.count(cpu), cpu))[: self.threads])

    def notify_connect(self, kernel_id: str) -> None:
        """Note that a page has come."""
        super().notify_connect(kernel_id)
        self._visited.add(kernel_id)
        self._absent_since.pop(kernel_id, None)

    def notify_disconnect(self, kernel_id: str) -> None:
        """Note that a page has gone, for good or for a moment."""
        super().notify_disconnect(kernel_id)
        if self._kernel_connections.get(kernel_id) == 0:
            self._absent_since[kernel_id] = time.monotonic()

    async def shutdown_kernel(self, kernel_id: str, now: bool = False, restart: bool = False) -> None:  # type: ignore[override]  # noqa: ARG002 - always now
        """End a kernel at once: nothing is left to save, and one that is in a long step would be waited for."""
        await ensure_async(super().shutdown_kernel(kernel_id, now=True, restart=restart))

    def remove_kernel(self, kernel_id: str) -> Any:
        """Forget a kernel that has ended."""
        self._absent_since.pop(kernel_id, None)
        self._visited.discard(kernel_id)
        self._cpus.pop(kernel_id, None)
        return super().remove_kernel(kernel_id)

    async def cull_kernel_if_idle(self, kernel_id: str) -> None:
        """End a kernel whose page has gone, also in the middle of a run."""
        since = self._absent_since.get(kernel_id)
        patience = self.absent_seconds if kernel_id in self._visited else self.arrival_seconds
        if since is not None and time.monotonic() - since > patience:
            self.log.info("Kernel %s was without a page for %g s and is ended.", kernel_id, patience)
            await self._end(kernel_id)
        elif kernel_id in self:
            await super().cull_kernel_if_idle(kernel_id)

    async def _end(self, kernel_id: str) -> None:
        self._absent_since.pop(kernel_id, None)
        # The message of the page that was closed may be doing it already.
        with contextlib.suppress(KeyError, HTTPError):
            await self.shutdown_kernel(kernel_id)
