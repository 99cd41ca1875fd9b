"""The 2 x 1 pattern: two neighbouring output channels whose nonzeros stand in the same places.

What one load of an operand costs then serves two weights, and half as many offsets are read. Pruners make such weights by scoring the two together, see
`explorer.masks.magnitude_mask`; the engine recognises them in the weights, whoever made them.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_LARGEST_UNION = 0.6
"""Places at which either channel of a pair has a weight / weights that are not zero. Half is a perfect pattern; two channels of unstructured zeros at 90 %
have 0.95. Where one of the two has a zero it is multiplied like a weight."""

_SAMPLE = 8
"""Pairs that are looked at first: most layers are not of this pattern, and are not searched to the end."""


def in_pairs(weight: NDArray[np.float32]) -> bool:
    """Whether output channels 0 and 1, 2 and 3, and so on, are zero in (nearly) the same places.

    Parameters
    ----------
    weight : (M, ...) float32
    """
    channels = len(weight)
    if channels % 2 or not channels:
        return False
    together = weight.reshape(channels // 2, 2, -1)
    step = max(1, len(together) // _SAMPLE)
    return _overlap(together[::step]) and _overlap(together)


def _overlap(pairs: NDArray[np.float32]) -> bool:
    nonzero = pairs != 0
    union = np.count_nonzero(nonzero[:, 0] | nonzero[:, 1])
    return bool(0 < union <= _LARGEST_UNION * np.count_nonzero(nonzero))
