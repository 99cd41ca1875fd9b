"""Why this exists: a speed-up is worth what it is measured against, so anyone can measure this engine beside the alternatives on their machine.

Names are loaded when they are first used: the command line asks this room for its options on every start, and must not load torch for that.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from explorer.bench.engines import Comparison, EngineTiming, time_engines

__all__ = ["Comparison", "EngineTiming", "time_engines"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from explorer.bench import engines

        return getattr(engines, name)
    raise AttributeError(f"module 'explorer.bench' has no attribute {name!r}")
