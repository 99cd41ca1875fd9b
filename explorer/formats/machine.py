"""On what a latency was measured: a time without its machine says nothing."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import numpy as np
import torch

import explorer


def machine() -> dict[str, str | int]:
    """Return processor, cores, system and versions of this machine, ready for JSON."""
    return {
        "cpu": _cpu_name(),
        "cores": _usable_cores(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "sparsity_explorer": explorer.__version__,
    }


def _cpu_name() -> str:
    # On Linux `platform.processor` is empty or repeats the architecture; the kernel knows the name.
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("model name", "Model"):
                return value.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _usable_cores() -> int:
    # A container may have fewer than the machine.
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1
