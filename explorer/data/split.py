"""Which images of Fashion-MNIST the demo uses for what: one fixed answer, shared by the training script and by the bundled subset.

Invariant: the 2,000 validation images are never seen in training, neither of the dense network nor of a pruning run.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["SPLIT_SEED", "DemoSplit", "demo_split"]

SPLIT_SEED = 2017


@dataclass(frozen=True, slots=True)
class DemoSplit:
    """Ascending indices, int64: the first three into the file of 60,000 images, the last into that of 10,000.

    ``dense`` are the 58,000 that the demo network is trained on; ``train`` (8,000, a subset of ``dense``), ``validation`` (2,000)
    and ``test`` (all 10,000) are bundled. A part of the test images would not do: on one draw of 2,000 the dense network was 0.6 points
    better than on all, by chance, and pruned networks seemed to lose that much more.
    """

    dense: NDArray[np.int64]
    train: NDArray[np.int64]
    validation: NDArray[np.int64]
    test: NDArray[np.int64]


def demo_split(
    train_labels: NDArray[np.uint8], test_labels: NDArray[np.uint8], *, seed: int = SPLIT_SEED
) -> DemoSplit:
    """Draw the class-balanced training and validation parts of the demo.

    Parameters
    ----------
    train_labels : ndarray, (60000,) uint8
    test_labels : ndarray, (10000,) uint8
    seed : int

    Returns
    -------
    DemoSplit
    """
    # RandomState and not Generator: numpy promises never to change the stream of the former.
    random = np.random.RandomState(seed)
    train, validation = [], []
    for label in range(10):
        drawn = random.permutation(np.flatnonzero(train_labels == label))
        validation.append(drawn[:200])
        train.append(drawn[200:1000])
        # A draw that nothing uses any more; without it the later classes would fall otherwise than when the network was trained.
        random.permutation(np.flatnonzero(test_labels == label))
    held_out = np.sort(np.concatenate(validation)).astype(np.int64)
    dense = np.setdiff1d(np.arange(len(train_labels)), held_out).astype(np.int64)
    return DemoSplit(
        dense=dense,
        train=np.sort(np.concatenate(train)).astype(np.int64),
        validation=held_out,
        test=np.arange(len(test_labels), dtype=np.int64),
    )
