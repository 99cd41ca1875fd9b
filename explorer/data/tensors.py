"""Turns what people hold their data in (datasets, loaders, arrays) into plain tensors, and says clearly when that cannot work.

Everything downstream works on ``inputs (N, ...)`` and ``labels (N,) int64``: fast, and the same images in the same order each time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence, Sized
from itertools import islice
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, default_collate

from explorer.errors import DataError

__all__ = [
    "MAX_BYTES",
    "Pair",
    "Source",
    "as_pair",
    "check_pair",
    "materialise",
    "n_samples",
    "subset_indices",
]

Pair: TypeAlias = tuple[Tensor, Tensor]
Source: TypeAlias = "Dataset[Any] | DataLoader[Any]"

MAX_BYTES = 2 * 1024**3  # of inputs kept in memory

_CONVERT = "labels must be class indices 0, 1, 2, ... as whole numbers, one a sample"


def _tensor(value: Any, what: str) -> Any:
    """Turn a numpy array into a tensor, whatever its byte order, strides and flags; leave anything else."""
    if not isinstance(value, np.ndarray):
        return value
    try:
        native = np.require(value, value.dtype.newbyteorder("="), ["C", "W"])
        return torch.from_numpy(native)
    except TypeError as error:
        raise DataError(f"the {what} data have an array of {value.dtype}; numbers are needed.") from error


def as_pair(inputs: Any, labels: Any, what: str) -> Pair:
    """Convert arrays or tensors to ``(inputs float32 or int64, labels int64)`` and check them.

    Parameters
    ----------
    inputs : array or Tensor, (N, ...)
        Floating point, normalised as the model expects; or whole numbers of at least 32 bits (token ids), which stay whole.
    labels : array or Tensor, (N,)
        Class indices.
    what : str
        Name of the part ("train", ...) for messages.

    Returns
    -------
    tuple of Tensor
    """
    x, y = _tensor(inputs, what), _tensor(labels, what)
    if not isinstance(x, Tensor) or not isinstance(y, Tensor):
        wrong = x if not isinstance(x, Tensor) else y
        raise DataError(
            f"the {what} data have a {type(wrong).__name__} where a tensor or a numpy array is needed."
        )
    x, y = x.detach(), y.detach()
    if x.dtype in (torch.uint8, torch.int8, torch.bool):
        raise DataError(
            f"the {what} inputs are {x.dtype}, not scaled; pass floating point inputs normalised as in the model's training, "
            "e.g. (x.float() / 255 - mean) / std."
        )
    if x.is_complex():
        raise DataError(f"the {what} inputs are {x.dtype}; real numbers are needed.")
    x = x.float() if x.is_floating_point() else x.long()
    if y.ndim == 2 and y.shape[1] > 1:
        raise DataError(
            f"the {what} labels have shape {tuple(y.shape)}; {_CONVERT}. One-hot labels become so with labels.argmax(1)."
        )
    if y.ndim == 2:
        y = y.squeeze(1)
    if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        raise DataError(f"the {what} labels are {y.dtype}; {_CONVERT}.")
    y = y.long()
    check_pair((x, y), what)
    return x, y


def check_pair(pair: Pair, what: str) -> None:
    """Refuse empty data, inputs and labels of different number, NaN or infinite inputs, and negative labels.

    Parameters
    ----------
    pair : tuple of Tensor
    what : str

    Raises
    ------
    DataError
    """
    x, y = pair
    if x.ndim == 0 or len(x) == 0:
        raise DataError(f"the {what} data are empty; at least one sample is needed.")
    if y.ndim != 1 or len(y) != len(x):
        raise DataError(
            f"the {what} data have inputs {tuple(x.shape)} and labels {tuple(y.shape)}; one label a sample is needed."
        )
    if x.is_floating_point():
        finite = torch.isfinite(x)
        if not bool(finite.all()):
            rows = int((~finite).flatten(1).any(1).sum()) if x.ndim > 1 else int((~finite).sum())
            raise DataError(
                f"{rows} of {len(x)} {what} inputs hold NaN or infinite values; remove or repair these samples."
            )
    lowest = int(y.min())
    if lowest < 0:
        raise DataError(f"a {what} label is {lowest}; {_CONVERT}.")


def n_samples(source: Source) -> int | None:
    """Return the number of samples, or None when the source cannot tell (a stream)."""
    dataset = source.dataset if isinstance(source, DataLoader) else source
    if isinstance(dataset, Sized) and not isinstance(dataset, IterableDataset):
        return len(dataset)
    return None


def subset_indices(n: int, limit: int | None) -> Tensor:
    """Choose `limit` of `n` positions: always the same ones, spread over the data, and growing with `limit`.

    Data sets are often sorted by class, so the first few would be of one class.

    Parameters
    ----------
    n : int
    limit : int or None
        None for all.

    Returns
    -------
    Tensor, (min(n, limit),) int64
        Ascending.

    Examples
    --------
    >>> subset_indices(5, None).tolist()
    [0, 1, 2, 3, 4]
    >>> set(subset_indices(100, 10).tolist()) <= set(subset_indices(100, 20).tolist())
    True
    """
    if limit is None or limit >= n:
        return torch.arange(n)
    return torch.randperm(n, generator=torch.Generator().manual_seed(0))[:limit].sort().values


def materialise(source: Source, what: str, limit: int | None = None, *, max_bytes: int = MAX_BYTES) -> Pair:
    """Read a dataset or loader into two tensors.

    A loader is read through its dataset and its own collate function, in the dataset's order and to its end, whatever its sampler
    and `drop_last`; a stream (`IterableDataset`) in the order in which it comes.

    Parameters
    ----------
    source : Dataset or DataLoader
    what : str
        Name of the part for messages.
    limit : int, optional
        Read only so many samples (see `subset_indices`; of a stream the first ones).
    max_bytes : int
        Refuse more inputs than this.

    Returns
    -------
    inputs : Tensor, (N, ...) float32 or int64
    labels : Tensor, (N,) int64

    Raises
    ------
    DataError
        When a sample cannot be read or is not an (input, label) pair, or the whole is too large or unusable.
    """
    dataset = source.dataset if isinstance(source, DataLoader) else source
    if isinstance(dataset, TensorDataset):
        if len(dataset.tensors) != 2:
            raise DataError(
                f"the {what} TensorDataset has {len(dataset.tensors)} tensors; (inputs, labels) are needed."
            )
        x, y = dataset.tensors
        if limit is not None and limit < len(x) and len(x) == len(y):
            chosen = subset_indices(len(x), limit)
            x, y = x[chosen], y[chosen]
        return as_pair(x, y, what)
    batches: list[Pair] = []
    total = 0
    n = n_samples(source)
    expected = None if n is None else min(n, limit or n)
    count = 0
    for inputs, labels in _batches(source, what, limit):
        x, y = as_pair(inputs, labels, what)
        if batches and x.shape[1:] != batches[0][0].shape[1:]:
            raise DataError(
                f"the {what} inputs differ in shape: {tuple(batches[0][0].shape[1:])} and {tuple(x.shape[1:])}. "
                "Bring them to one size in the dataset's transform."
            )
        bytes_each = x.element_size() * x[0].numel()
        total += bytes_each * len(x)
        count += len(x)
        too_large = max(total, bytes_each * (expected or 0))
        if too_large > max_bytes:
            raise DataError(
                f"the {what} inputs take {too_large / 1024**3:.1f} GiB or more, and {max_bytes / 1024**3:.1f} GiB is the most that is held in "
                f"memory: pass fewer samples, e.g. torch.utils.data.Subset(dataset, range({max(1, max_bytes // bytes_each)})), or smaller ones."
            )
        batches.append((x, y))
        if limit is not None and count >= limit:
            break
    if not batches:
        raise DataError(f"the {what} data are empty; at least one sample is needed.")
    inputs = torch.cat([x for x, _ in batches])[:limit]
    labels = torch.cat([y for _, y in batches])[:limit]
    check_pair((inputs, labels), what)
    return inputs, labels


def _batches(source: Source, what: str, limit: int | None) -> Iterator[tuple[Any, Any]]:
    """Yield collated (inputs, labels) batches."""
    dataset = source.dataset if isinstance(source, DataLoader) else source
    streams: Iterable[Any]
    n = n_samples(source)
    if n is None:
        streams = source if isinstance(source, DataLoader) else DataLoader(dataset, batch_size=64)
    else:
        collate = source.collate_fn if isinstance(source, DataLoader) else default_collate
        streams = (collate(samples) for samples in _chunks(dataset, subset_indices(n, limit).tolist(), 64))
    iterator = iter(streams)
    while True:
        try:
            batch = next(iterator)
        except StopIteration:
            return
        except Exception as error:
            raise DataError(
                f"reading the {what} data failed: {type(error).__name__}: {error}. Each sample must be an (input, label) pair of tensors "
                "of one shape; images need a transform to tensors."
            ) from error
        if not isinstance(batch, Sequence) or isinstance(batch, str) or len(batch) < 2:
            raise DataError(
                f"a sample of the {what} data is a {type(batch).__name__}; an (input, label) pair is needed. "
                "Wrap the dataset in one whose __getitem__ returns that."
            )
        yield batch[0], batch[1]


def _chunks(dataset: Dataset[Any], indices: list[int], size: int) -> Iterator[list[Any]]:
    remaining = iter(indices)
    while chunk := list(islice(remaining, size)):
        yield [dataset[index] for index in chunk]
