"""Brings labelled data in: training, validation and test parts, as plain tensors when asked.

Invariant: the same call gives the same samples in the same order.
"""

from __future__ import annotations

from explorer.data.augment import flip_and_shift
from explorer.data.compatible import check_compatible
from explorer.data.load import LoadedData, load_data

__all__ = ["LoadedData", "check_compatible", "flip_and_shift", "load_data"]
