"""Why this exists: a speed-up is worth what it is measured against, so anyone can measure this engine beside the alternatives on their machine."""

from __future__ import annotations

from explorer.bench.engines import EngineTiming, time_engines

__all__ = ["EngineTiming", "time_engines"]
