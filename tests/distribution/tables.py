"""A made-up network's layers and tables, with latencies that add up exactly."""

from __future__ import annotations

import numpy as np

from explorer.models import PrunableLayer
from explorer.sensitivity import DEFAULT_LEVELS, SensitivityPoint, SensitivityTable

SIZES = {"stem": 500, "a": 20_000, "b": 40_000, "c": 80_000, "d": 80_000, "fc": 2_000}
LAYERS = tuple(PrunableLayer(name, "conv2d", (n, 1, 1, 1), n, n * 50) for name, n in SIZES.items())
FIXED_MS = 0.3
DENSE_MS = dict(zip(SIZES, (0.4, 1.0, 1.5, 2.0, 1.2, 0.1), strict=True))
HARM = dict(zip(SIZES, (20.0, 2.0, 0.5, 0.1, 0.3, 1.0), strict=True))


def layer_ms(name: str, sparsity: float) -> float:
    return DENSE_MS[name] * min(1.0, 0.05 + (1 - sparsity) / 0.6)


def a_table(*, noise_ms: float = 0.0, latency: bool = True, **metadata: float) -> SensitivityTable:
    rng = np.random.default_rng(0)
    points = []
    for s in (0.0, *DEFAULT_LEVELS):
        for name in SIZES:
            harm = HARM[name] * s**4
            points += [
                SensitivityPoint(name, s, "kl", harm, std_error=0.1 * harm),
                SensitivityPoint(name, s, "loss", 0.25 + harm, std_error=0.01),
                SensitivityPoint(name, s, "accuracy", 0.92 - 0.02 * harm, std_error=0.01),
                SensitivityPoint(name, s, "removed_energy", s**3),
                SensitivityPoint(name, s, "fisher", 0.1 * harm, std_error=0.02 * harm),
            ]
            if latency:
                points.append(SensitivityPoint(name, s, "latency_ms", layer_ms(name, s)))
        if latency:
            whole = (
                FIXED_MS + sum(layer_ms(name, s) for name in SIZES) + noise_ms * float(rng.standard_normal())
            )
            points.append(SensitivityPoint("", s, "latency_ms", whole))
    return SensitivityTable.from_points(points, metadata=metadata)
