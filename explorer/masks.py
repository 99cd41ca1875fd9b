"""Which weights stay: the one place where a sparsity becomes an exact number of zeros and a mask.

The sensitivity scan, the pruning run and the predictions must agree to the last weight, so all of them count and
choose here. Invariants: never fewer zeros than asked, never a whole layer, and the same mask for the same scores on
every machine, because ties are broken by position and not by the whim of a selection algorithm.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from explorer.errors import DistributionError, ModelError

# A product such as 0.07 * 100 = 7.000000000000001 must not cost an eighth zero.
_ROUNDING_SLACK = 1e-9


def n_zeros(numel: int, sparsity: float) -> int:
    """Count the zeros that a layer of `numel` weights has at `sparsity`.

    The count is ``min(numel - 1, ceil(sparsity * numel - 1e-9))``: at least what was asked, but one weight always
    stays, since a layer of zeros cuts the network in two.

    Parameters
    ----------
    numel : int
        Number of weights, at least 1.
    sparsity : float
        Fraction in [0, 1).

    Returns
    -------
    int
        Number of zeros, in [0, numel - 1].

    Raises
    ------
    DistributionError
        If `sparsity` is outside [0, 1) or `numel` is below 1.

    Examples
    --------
    >>> n_zeros(100, 0.07), n_zeros(10, 0.81), n_zeros(10, 0.999), n_zeros(1, 0.5)
    (7, 9, 9, 0)
    """
    if numel < 1:
        raise DistributionError(f"A layer needs at least one weight to be pruned; got numel={numel}.")
    if not 0.0 <= sparsity < 1.0:  # also refuses NaN
        raise DistributionError(
            f"Sparsity is the fraction of zeros, in [0, 1); got {sparsity!r}. Write 90 % as 0.9; 1 would remove the layer."
        )
    return min(numel - 1, max(0, math.ceil(sparsity * numel - _ROUNDING_SLACK)))


def keep_mask(scores: Tensor, zeros: int) -> Tensor:
    """Mark the weights to keep: all but the `zeros` lowest scores.

    Many weights can share the score at the threshold (quantised weights, or the zeros of an earlier pruning).
    Comparing with the threshold would then remove all or none of them and miss the count; of equal scores, those with
    the lower flat index go first.

    Parameters
    ----------
    scores : Tensor
        Any shape, any real dtype; a higher score is more worth keeping. No NaN.
    zeros : int
        How many to remove, in [0, scores.numel()].

    Returns
    -------
    Tensor
        Same shape, bool, True = kept; exactly `zeros` entries are False.

    Raises
    ------
    ModelError
        If a score is NaN: there is no order then.
    DistributionError
        If `zeros` is out of range.

    Examples
    --------
    >>> keep_mask(torch.tensor([1.0, 1.0, 3.0, 1.0]), 2)
    tensor([False, False,  True,  True])
    """
    if not 0 <= zeros <= scores.numel():
        raise DistributionError(
            f"Cannot remove {zeros} of {scores.numel()} weights; the count must lie between the two."
        )
    flat = scores.detach().reshape(-1)
    if bool(torch.isnan(flat).any()):
        raise ModelError(
            f"Scores of shape {tuple(scores.shape)} hold NaN, so they cannot be ranked. "
            "Load weights that are finite, or lower the learning rate if training produced them."
        )
    if zeros == 0:
        return torch.ones(scores.shape, dtype=torch.bool, device=scores.device)
    if flat.dtype in (torch.float16, torch.bfloat16):
        flat = flat.float()  # exact, and selection is not implemented for half precision everywhere
    threshold = torch.kthvalue(flat, zeros).values
    keep = flat > threshold
    tied = torch.nonzero(flat == threshold).reshape(-1)
    n_below = flat.numel() - int(keep.sum()) - tied.numel()
    keep[tied[zeros - n_below :]] = True
    return keep.reshape(scores.shape)


def magnitude_mask(weight: Tensor, sparsity: float) -> Tensor:
    """Keep the largest magnitudes of one layer.

    Weights that are zero already have the lowest score, so they count first: a layer that is sparser than asked loses
    nothing.

    Parameters
    ----------
    weight : Tensor
        Any shape, floating point.
    sparsity : float
        Fraction in [0, 1).

    Returns
    -------
    Tensor
        Same shape, bool, True = kept; exactly ``n_zeros(weight.numel(), sparsity)`` entries are False.

    Raises
    ------
    DistributionError
        If `sparsity` is outside [0, 1).
    ModelError
        If a weight is NaN.

    Examples
    --------
    >>> magnitude_mask(torch.tensor([[0.1, -2.0], [0.0, 0.3]]), 0.5)
    tensor([[False,  True],
            [False,  True]])
    """
    return keep_mask(weight.detach().abs(), n_zeros(weight.numel(), sparsity))


def channel_mask(weights: Sequence[Tensor], sparsity: float) -> Tensor:
    """Keep the strongest output channels of layers that share them.

    A channel's strength is the sum over layers of its filter's squared norm, each as a share of the layer's mean: Li, Kadav, Durdanovic, Samet and Graf, "Pruning filters
    for efficient ConvNets" (2017), rank filters by their norm; that layers of a group count alike is the rule of Fang, Ma, Song, Mi and Wang, "DepGraph" (2023).

    Parameters
    ----------
    weights : sequence of Tensor
        ``(C, ...)`` floating point each, with the same C.
    sparsity : float
        Fraction of channels to remove, in [0, 1).

    Returns
    -------
    Tensor
        (C,) bool, True = kept; exactly ``n_zeros(C, sparsity)`` entries are False, so that one channel always stays.

    Raises
    ------
    DistributionError
        If `sparsity` is outside [0, 1), or the layers differ in their channels.
    ModelError
        If a weight is NaN.

    Examples
    --------
    >>> channel_mask([torch.tensor([[3.0], [0.1], [2.0]]), torch.tensor([[0.1], [0.1], [2.0]])], 0.5)
    tensor([False, False,  True])
    """
    if not weights or len({len(weight) for weight in weights}) != 1:
        raise DistributionError(
            f"Layers that share channels have the same number of them; got {[len(weight) for weight in weights]}."
        )
    strength = torch.zeros(len(weights[0]), dtype=torch.float64, device=weights[0].device)
    for weight in weights:
        squares = weight.detach().double().reshape(len(weight), -1).square().sum(1)
        mean = squares.mean()
        strength += squares / mean if mean != 0 else squares
    return keep_mask(strength, n_zeros(len(strength), sparsity))


def pair_mask(weight: Tensor, sparsity: float) -> Tensor:
    """Keep the largest pairs of weights: output channels 0 and 1, 2 and 3, and so on, get zeros in the same places.

    The engine reads an operand once for both weights of a pair, see `explorer.inference.pairs`. A pair's score is the sum of its squares: what removing
    it takes from the squared weights.

    Parameters
    ----------
    weight : Tensor
        (M, ...) floating point, M even.
    sparsity : float
        Fraction in [0, 1).

    Returns
    -------
    Tensor
        Same shape, bool, True = kept; at least ``n_zeros(weight.numel(), sparsity)`` entries are False, at most one more, and one pair always stays.

    Raises
    ------
    DistributionError
        If `sparsity` is outside [0, 1), or M is odd.
    ModelError
        If a weight is NaN.

    Examples
    --------
    >>> pair_mask(torch.tensor([[0.1, -2.0], [3.0, 0.3]]), 0.5)
    tensor([[ True, False],
            [ True, False]])
    """
    if weight.dim() == 0 or weight.shape[0] % 2 or not weight.numel():
        raise DistributionError(
            f"A weight of shape {tuple(weight.shape)} has no pairs of output channels; their number must be even. Prune this layer weight by weight."
        )
    pairs = weight.detach().reshape(weight.shape[0] // 2, 2, -1)
    wide = pairs.double() if pairs.dtype == torch.float64 else pairs.float()
    zeros = min(-(-n_zeros(weight.numel(), sparsity) // 2), weight.numel() // 2 - 1)
    kept = keep_mask(wide.square().sum(1), zeros)
    return kept[:, None].expand(pairs.shape).reshape(weight.shape)
