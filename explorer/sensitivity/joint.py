"""Measures what pruning many layers at once does to the outputs, nothing being trained: what curves of single layers can only add up."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from explorer.memory import pages_kept
from explorer.models import PrunableLayer
from explorer.sensitivity.material import LabelledData, take_material
from explorer.sensitivity.points import check_levels
from explorer.sensitivity.scan import Scan

__all__ = ["JointLoss", "JointScan", "measure_joint"]


@dataclass(frozen=True, slots=True)
class JointLoss:
    """What a network gives when all its layers are pruned at once.

    Attributes
    ----------
    values : dict of str to float
        "kl", and with labels "loss" and "accuracy".
    std_errors : dict of str to float or None
        Over images.
    n_removed : int
        Non-zero weights that were removed.
    """

    values: dict[str, float]
    std_errors: dict[str, float | None]
    n_removed: int


class JointScan:
    """A private copy of a network that is pruned to one distribution after the other; between two it is as it was.

    Parameters
    ----------
    module : nn.Module
        A classifier, as for `measure_loss`. Not changed; a copy is.
    data : LoadedData or (inputs, labels)
    layers : iterable of str or PrunableLayer, optional
        Those that distributions name; all by default.
    n_images : int
        As for `measure_loss`: with the same number, the same images.
    refresh_batchnorm : bool
        Measure with BatchNorm statistics estimated anew, on the images on which `measure_loss` measures refreshed curves.
    stop : threading.Event, optional
        When set, what is being measured ends before the next batch and gives None.

    Raises
    ------
    DataError, ModelError
        As `measure_loss`.
    """

    def __init__(
        self,
        module: nn.Module,
        data: LabelledData | tuple[Tensor, Tensor | None],
        layers: Iterable[str | PrunableLayer] | None = None,
        *,
        n_images: int = 500,
        refresh_batchnorm: bool = False,
        stop: threading.Event | None = None,
    ) -> None:
        material = take_material(module, data, n_images, layers)
        self._names = {alias: layer.name for layer in material.layers for alias in (layer.name, *layer.tied)}
        self._scan = Scan(material, stop)
        self._scan.prepare()
        self._refreshed = refresh_batchnorm and self._scan.has_batchnorm

    def measure(self, distribution: Mapping[str, float]) -> JointLoss | None:
        """Prune as a distribution says, measure, restore; None when stopped.

        Raises
        ------
        DistributionError
            A sparsity outside [0, 1).
        """
        check_levels([*distribution.values(), 0.5])
        by_name = {self._names[name]: level for name, level in distribution.items()}
        with pages_kept():
            if self._scan.record(self._scan.batches(refreshed=self._refreshed)) is None:
                return None
            cell = self._scan.measure_joint(by_name, refreshed=self._refreshed)
        if cell is None:
            return None
        return JointLoss(
            {kind: one.value for kind, one in cell.values.items()},
            {kind: one.std_error for kind, one in cell.values.items()},
            cell.n_removed,
        )


def measure_joint(
    module: nn.Module,
    data: LabelledData | tuple[Tensor, Tensor | None],
    distribution: Mapping[str, float],
    *,
    n_images: int = 500,
    refresh_batchnorm: bool = False,
    stop: threading.Event | None = None,
) -> JointLoss | None:
    """Prune all layers at once, as one distribution says; see `JointScan`.

    Parameters
    ----------
    module : nn.Module
    data : LoadedData or (inputs, labels)
    distribution : mapping of str to float
        Sparsity in [0, 1) by layer; layers that are not named stay as they are.
    n_images : int
    refresh_batchnorm : bool
    stop : threading.Event, optional

    Raises
    ------
    DataError, ModelError
        As `measure_loss`.
    DistributionError
        A sparsity outside [0, 1).
    """
    check_levels([*distribution.values(), 0.5])
    scan = JointScan(
        module,
        data,
        list(distribution) or None,
        n_images=n_images,
        refresh_batchnorm=refresh_batchnorm,
        stop=stop,
    )
    return scan.measure(distribution)
