"""Whether an engine computes what torch does: each sample of a batch, and each in its place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from explorer.bench.foreign import TOLERANCE
from explorer.errors import EngineError

__all__ = ["check_output"]

_FAINT = 0.01
"""A sample whose output is this much smaller than the largest of its batch is compared with the latter: its own may be rounding alone."""

_NEARER = 0.8
"""Another sample's output is taken for the one that was meant when it is this much nearer. By chance, rounding does not lead so far towards one of them."""


def check_output(
    name: str, output: Any, expected: Tensor, *, accepted: float = TOLERANCE, n_samples: int = 1
) -> float:
    """Compare an engine's output with torch's.

    Parameters
    ----------
    name : str
        Of the engine.
    output : Tensor or array
    expected : Tensor
        What torch gives.
    accepted : float
        The largest difference that is accepted.
    n_samples : int
        In the batch. Where that is the outputs' first size, each sample is compared by itself.

    Returns
    -------
    float
        The largest difference, relative to the largest entry of torch's output of that sample, or to a hundredth of the whole batch's, whichever is larger.

    Raises
    ------
    EngineError
        If the shape is another one, the difference is not accepted, or a sample's output is nearer to what torch gives for another sample.
    """
    given = torch.as_tensor(output)
    if given.shape != expected.shape:
        raise _another(name, f"its shape is {tuple(given.shape)}, {tuple(expected.shape)} is right")
    rows = n_samples if expected.dim() > 0 and len(expected) == n_samples else 1
    given, right = (one.reshape(rows, -1).double() for one in (given, expected))
    largest = right.abs().amax(1)
    scale = largest.clamp(min=max(_FAINT * float(largest.max()), 1e-12))
    difference = float(((given - right).abs().amax(1) / scale).max())
    if not difference <= accepted:  # also when it is not a number
        raise _another(name, f"relative difference {difference:.2g}, {accepted:g} is accepted")
    distances = torch.cdist(given, right, compute_mode="donot_use_mm_for_euclid_dist")
    mixed_up = (distances < _NEARER * distances.diagonal()[:, None]).nonzero()
    if len(mixed_up):
        sample, other = mixed_up[0].tolist()
        raise _another(name, f"that of sample {sample} is nearer to torch's of sample {other}")
    return difference


def _another(name: str, how: str) -> EngineError:
    return EngineError(
        f"{name} gives another output than torch: {how}. Its time would mean nothing; please report this with the network."
    )
