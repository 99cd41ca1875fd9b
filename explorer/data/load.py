"""Brings labelled data in: the bundled demo, full Fashion-MNIST, or the user's own datasets, loaders and arrays."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from explorer.data.augment import flip_and_shift
from explorer.data.demo import read_demo
from explorer.data.fashion_mnist import CLASSES, find_folder, normalise, read_split
from explorer.data.split import demo_split
from explorer.data.tensors import Pair, Source, as_pair, materialise, n_samples
from explorer.errors import DataError

__all__ = ["Augment", "LoadedData", "load_data"]

Augment = Callable[[Tensor, Generator], Tensor]
_Part = Literal["train", "validation", "test"]


@dataclass(frozen=True, eq=False)  # tensors have no one answer to ==
class LoadedData:
    """Labelled data in three parts.

    Attributes
    ----------
    name : str
    train : Dataset or DataLoader
        For pruning runs.
    validation : Dataset or DataLoader
        For sensitivity and for the evaluations inside a run.
    test : Dataset, DataLoader or None
        For the final figures only; when there is none, they come from the validation data, and that is said.
    classes : tuple of str
        Names in label order; empty when not known.
    augment : callable or None
        Random change of a batch of inputs, drawn from a generator, for training.
    """

    name: str
    train: Source
    validation: Source
    test: Source | None = None
    classes: tuple[str, ...] = ()
    augment: Augment | None = None
    _cache: dict[str, Pair] = field(default_factory=dict, repr=False)

    def train_tensors(self) -> Pair:
        """Return all training data as ``(inputs (N, ...) float32, labels (N,) int64)``; read once, then kept.

        A random transform inside the dataset is drawn once by this; use `augment` for changes that differ each epoch.
        """
        return self._tensors("train", None)

    def validation_tensors(self, limit: int | None = None) -> Pair:
        """Return the validation data, or `limit` of them: always the same, spread over the data, growing with `limit`."""
        return self._tensors("validation", limit)

    def test_tensors(self, limit: int | None = None) -> Pair:
        """Return the test data.

        Raises
        ------
        DataError
            When there are none.
        """
        return self._tensors("test", limit)

    def _tensors(self, part: _Part, limit: int | None) -> Pair:
        source: Source | None = getattr(self, part)
        if source is None:
            raise DataError(
                f"{self.name!r} has no test data; pass test=... to load_data, or use the validation data and say so."
            )
        if limit is not None and limit < 1:
            raise DataError(
                f"limit is {limit}; a whole number of samples, 1 or more, or None for all is accepted."
            )
        n = n_samples(source)
        key = part if limit is None or (n is not None and limit >= n) else f"{part}:{limit}"
        if key not in self._cache:
            self._cache[key] = materialise(source, part, None if key == part else limit)
        return self._cache[key]


_ACCEPTED = (
    "accepted are 'demo:fashion', 'fashion-mnist', or a pair (train, validation), each a torch Dataset, a DataLoader or a pair of "
    "tensors (inputs, labels)"
)


def load_data(
    source: Any,
    validation: Any = None,
    *,
    test: Any = None,
    root: str | Path | None = None,
    download: bool = False,
    name: str | None = None,
    classes: Sequence[str] | None = None,
    augment: Augment | None = None,
) -> LoadedData:
    """Load labelled data.

    Parameters
    ----------
    source : str, pair, Dataset, DataLoader or LoadedData
        "demo:fashion" (bundled: 8,000 training, 2,000 validation and all 10,000 test images); "fashion-mnist" (58,000, the same 2,000,
        and 10,000); ``(train, validation)``; or the training data alone, with `validation` beside it. Each part is a dataset of
        (input, label), a loader, or ``(inputs, labels)`` as tensors or arrays. Inputs are normalised as the model expects them.
    validation : Dataset, DataLoader or pair, optional
    test : Dataset, DataLoader or pair, optional
    root : str or Path, optional
        Folder of Fashion-MNIST.
    download : bool
        Download Fashion-MNIST when it is not found.
    name : str, optional
    classes : sequence of str, optional
        Names in label order; default: the dataset's attribute `classes`, if it has one.
    augment : callable, optional
        ``(inputs, generator) -> inputs``, applied to training batches.

    Returns
    -------
    LoadedData

    Raises
    ------
    DataError
        When the source is unknown, there are no validation data, or data given as tensors are unusable.

    Examples
    --------
    >>> data = load_data("demo:fashion")
    >>> inputs, labels = data.validation_tensors(limit=500)
    >>> inputs.shape, labels.shape, data.classes[0]
    (torch.Size([500, 1, 28, 28]), torch.Size([500]), 'T-shirt/top')
    """
    if isinstance(source, LoadedData):
        return source
    if isinstance(source, str):
        if validation is not None:
            raise DataError(f"{source!r} has validation data of its own; leave validation out.")
        return _by_name(source, root, download=download)
    if root is not None or download:
        raise DataError("root and download belong to 'fashion-mnist'; leave them out for data of your own.")
    if validation is None:
        train, validation = _split_pair(source)
    else:
        train = source
    train_part, validation_part = _as_source(train, "train"), _as_source(validation, "validation")
    test_part = None if test is None else _as_source(test, "test")
    return LoadedData(
        name=name or _name_of(train_part),
        train=train_part,
        validation=validation_part,
        test=test_part,
        classes=tuple(classes) if classes is not None else _classes_of(train_part, validation_part),
        augment=augment,
    )


def _vary(images: Tensor, generator: Generator) -> Tensor:
    """Flip, and shift by up to two pixels.

    A run of a few epochs sees little data and learns from the dense network's outputs, which exist for any image: two pixels led to better
    networks than one.
    """
    return flip_and_shift(images, generator, shift=2)


def _dataset(images: NDArray[np.generic], labels: NDArray[np.generic]) -> TensorDataset:
    return TensorDataset(normalise(images), torch.from_numpy(labels).long())


def _by_name(source: str, root: str | Path | None, *, download: bool) -> LoadedData:
    if source == "demo:fashion":
        demo = read_demo()
        train, validation, test = (
            _dataset(demo[f"{part}_images"], demo[f"{part}_labels"])
            for part in ("train", "validation", "test")
        )
    elif source == "fashion-mnist":
        folder = find_folder(root, download=download)
        images, labels = read_split(folder, "train")
        test_images, test_labels = read_split(folder, "test")
        split = demo_split(labels, test_labels)
        train = _dataset(images[split.dense], labels[split.dense])
        validation = _dataset(images[split.validation], labels[split.validation])
        test = _dataset(test_images, test_labels)
    else:
        close = difflib.get_close_matches(source, ("demo:fashion", "fashion-mnist"), n=1, cutoff=0.6)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise DataError(f"there are no data called {source!r}; {_ACCEPTED}.{hint}")
    return LoadedData(source, train, validation, test, CLASSES, _vary)


def _is_array(value: Any) -> bool:
    return isinstance(value, Tensor | np.ndarray)


def _split_pair(source: Any) -> tuple[Any, Any]:
    if not isinstance(source, tuple | list):
        if isinstance(source, Dataset | DataLoader):
            raise DataError(
                "training data were passed without validation data: pass load_data(train, validation). "
                "torch.utils.data.random_split(dataset, [0.9, 0.1]) makes both from one."
            )
        raise DataError(f"cannot load data from {type(source).__name__}; {_ACCEPTED}.")
    if len(source) != 2:
        raise DataError(f"cannot load data from {len(source)} parts; {_ACCEPTED}. Test data go into test=...")
    if _is_array(source[0]) and _is_array(source[1]):
        raise DataError(
            "one pair of tensors was passed, which is training data without validation data: "
            "pass load_data((inputs, labels), (validation_inputs, validation_labels))."
        )
    return source[0], source[1]


def _as_source(part: Any, what: str) -> Source:
    if isinstance(part, tuple | list) and len(part) == 2 and _is_array(part[0]):
        return TensorDataset(*as_pair(part[0], part[1], what))
    if not isinstance(part, Dataset | DataLoader) and not (
        hasattr(part, "__getitem__") and hasattr(part, "__len__")
    ):
        raise DataError(f"cannot load {what} data from {type(part).__name__}; {_ACCEPTED}.")
    if isinstance(part, str | dict):
        raise DataError(f"cannot load {what} data from {type(part).__name__}; {_ACCEPTED}.")
    source: Source = part
    if n_samples(source) == 0:
        raise DataError(f"the {what} data are empty; at least one sample is needed.")
    return source


def _underlying(source: Source) -> Any:
    dataset: Any = source.dataset if isinstance(source, DataLoader) else source
    while not hasattr(dataset, "classes") and hasattr(dataset, "dataset"):  # Subset and its like
        dataset = dataset.dataset
    return dataset


def _name_of(source: Source) -> str:
    dataset = _underlying(source)
    return "data" if isinstance(dataset, TensorDataset | list | tuple) else type(dataset).__name__


def _classes_of(*sources: Source) -> tuple[str, ...]:
    """Names that the dataset states; for plain tensors, the numbers."""
    for source in sources:
        classes = getattr(_underlying(source), "classes", None)
        if isinstance(classes, list | tuple) and classes:
            return tuple(str(label) for label in classes)
    highest = -1
    for source in sources:
        dataset = _underlying(source)
        if not isinstance(dataset, TensorDataset) or len(dataset.tensors) != 2:
            return ()
        highest = max(highest, int(dataset.tensors[1].max()))
    return tuple(str(label) for label in range(highest + 1))
