from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from explorer.data import LoadedData, load_data, tensors
from explorer.data.tensors import materialise, subset_indices
from explorer.errors import DataError

X = torch.arange(200 * 6, dtype=torch.float32).reshape(200, 2, 3)
Y = torch.arange(200) // 50  # sorted by class, as many folders are


class Samples(Dataset):
    """A map-style dataset that counts how often it is read."""

    classes = ("a", "b", "c", "d")

    def __init__(self, n: int = 200) -> None:
        self.n = n
        self.reads = 0

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int):
        self.reads += 1
        return X[index], int(Y[index])


class Stream(IterableDataset):
    def __iter__(self):
        yield from zip(X, Y, strict=True)


def doubled(samples):
    x, y = zip(*samples, strict=True)
    return 2 * torch.stack(x), torch.tensor(y)


@pytest.mark.parametrize(
    "source",
    [
        (X, Y),
        (X.numpy(), Y.numpy()),
        (X.double(), Y.int()),
        (X.numpy().astype(">f4")[::-1][::-1], np.broadcast_to(Y.numpy().astype(np.uint8), (200,))),
        (X, Y[:, None]),
        TensorDataset(X, Y),
        Samples(),
        Subset(Samples(), range(200)),
        DataLoader(Samples(), batch_size=7),
        DataLoader(TensorDataset(X, Y), batch_size=64, shuffle=True, drop_last=True),
        Stream(),
        DataLoader(Stream(), batch_size=9),
        [(x.numpy(), np.int64(y)) for x, y in zip(X, Y, strict=True)],
    ],
    ids=lambda source: type(source).__name__,
)
def test_every_way_to_hold_data_gives_all_samples_in_their_own_order(source):
    inputs, labels = load_data(source, (X, Y)).train_tensors()
    assert torch.equal(inputs, X)
    assert torch.equal(labels, Y)
    assert inputs.dtype == torch.float32
    assert labels.dtype == torch.int64


def test_a_loader_keeps_its_own_collate_function():
    inputs, _ = load_data(DataLoader(Samples(), collate_fn=doubled), (X, Y)).train_tensors()
    assert torch.equal(inputs, 2 * X)


def test_token_ids_stay_whole_numbers():
    inputs, _ = load_data(
        (torch.ones(5, 4, dtype=torch.int32), torch.zeros(5).long()), (X, Y)
    ).train_tensors()
    assert inputs.dtype == torch.int64


def test_data_are_read_once_and_a_limit_reads_no_more_than_it_needs():
    dataset = Samples()
    data = load_data((X, Y), dataset)
    data.validation_tensors(limit=20)
    assert dataset.reads == 20
    data.validation_tensors(limit=20)
    assert dataset.reads == 20
    assert data.validation_tensors() is data.validation_tensors(limit=200)
    assert dataset.reads == 220


@pytest.mark.parametrize("make", [lambda: (X, Y), Samples, lambda: DataLoader(Samples(), batch_size=16)])
def test_a_limit_takes_the_same_samples_each_time_from_all_classes_and_larger_ones_contain_smaller_ones(make):
    small, labels = load_data((X, Y), make()).validation_tensors(limit=20)
    large, _ = load_data((X, Y), make()).validation_tensors(limit=60)
    assert len(small) == 20
    assert set(labels.tolist()) == {0, 1, 2, 3}
    assert {row[0, 0].item() for row in small} < {row[0, 0].item() for row in large}
    assert torch.equal(small, X[subset_indices(200, 20)])


def test_a_limit_on_a_stream_takes_its_first_samples():
    inputs, labels = load_data((X, Y), Stream()).validation_tensors(limit=70)
    assert torch.equal(inputs, X[:70])
    assert torch.equal(labels, Y[:70])


def test_class_names_come_from_the_dataset_or_are_numbers():
    assert load_data(Subset(Samples(), range(9)), (X, Y)).classes == ("a", "b", "c", "d")
    assert load_data((X, Y), (X, Y)).classes == ("0", "1", "2", "3")
    assert load_data((X, Y), (X, Y), classes=["w", "x", "y", "z"]).classes == ("w", "x", "y", "z")
    assert load_data(Stream(), (X, Y)).classes == ()


def test_names_and_parts_are_kept():
    data = load_data(((X, Y), Samples()), test=(X[:9], Y[:9]))
    assert data.name == "data"
    assert load_data(Samples(), (X, Y)).name == "Samples"
    assert load_data(Samples(), (X, Y), name="mine").name == "mine"
    assert len(data.test_tensors()[0]) == 9
    assert isinstance(data, LoadedData)
    assert load_data(data) is data


def test_data_that_would_fill_the_memory_are_refused_before_they_are_read(monkeypatch):
    dataset = Samples()
    with pytest.raises(DataError, match=r"Subset\(dataset, range\(83\)\)"):
        materialise(dataset, "train", max_bytes=2000)
    assert dataset.reads <= 64
    assert len(materialise(dataset, "train", 83, max_bytes=2000)[0]) == 83
    monkeypatch.setattr(tensors, "MAX_BYTES", 1)
    assert len(load_data((X, Y), (X, Y)).train_tensors()[0]) == 200  # tensors are in memory already


class Broken(Samples):
    def __getitem__(self, index: int):
        raise OSError("cannot open 17.jpg")


class Single(Samples):
    def __getitem__(self, index: int):
        return X[index]


class Ragged(Samples):
    def __getitem__(self, index: int):
        return torch.zeros(1 + index // 64), 0


class Pictures(Samples):
    def __getitem__(self, index: int):
        return object(), 0


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (Broken(), "cannot open 17.jpg"),
        (Single(), "pair is needed"),
        (Ragged(), "differ in shape"),
        (Pictures(), "images need a transform to tensors"),
        (TensorDataset(X, Y, Y), "has 3 tensors"),
        (TensorDataset(X.where(X > 11, torch.nan), Y), "2 of 200 train inputs hold NaN"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_samples_that_cannot_be_used_are_refused_when_they_are_read(source, message):
    with pytest.raises(DataError, match=message):
        load_data(source, (X, Y)).train_tensors()


def test_test_data_that_are_not_there_are_not_made_up():
    with pytest.raises(DataError, match="has no test data"):
        load_data((X, Y), (X, Y)).test_tensors()
    with pytest.raises(DataError, match="limit is 0"):
        load_data((X, Y), (X, Y)).validation_tensors(limit=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("demo:fashon",), "Did you mean 'demo:fashion'"),
        (("imagenet",), "accepted are 'demo:fashion', 'fashion-mnist'"),
        (("demo:fashion", (X, Y)), "validation data of its own"),
        ((Samples(),), r"load_data\(train, validation\)"),
        (((X, Y),), "training data without validation data"),
        ((42,), "cannot load data from int"),
        (((Samples(), Samples(), Samples()),), r"from 3 parts.*test="),
        ((Samples(), 42), "cannot load validation data from int"),
        ((Samples(), {}), "cannot load validation data from dict"),
        ((Samples(), Samples(0)), "validation data are empty"),
        (((X[:0], Y[:0]), (X, Y)), "train data are empty"),
        (((X, Y[:9]), (X, Y)), "one label a sample"),
        (((X.byte(), Y), (X, Y)), "not scaled"),
        (((X, Y.float()), (X, Y)), "labels are torch.float32"),
        (((X, torch.eye(4)[Y]), (X, Y)), r"labels\.argmax\(1\)"),
        (((X, Y - 1), (X, Y)), "a train label is -1"),
        (((X.where(X != 7, torch.inf), Y), (X, Y)), "1 of 200 train inputs hold NaN or infinite"),
        (((X, "labels"), (X, Y)), "train data have a str"),
        (((X, np.array(["cat"] * 200)), (X, Y)), "numbers are needed"),
    ],
)
def test_data_that_cannot_be_loaded_are_refused_with_the_reason(arguments, message):
    with pytest.raises(DataError, match=message):
        load_data(*arguments)


def test_options_of_fashion_mnist_are_refused_elsewhere(tmp_path):
    with pytest.raises(DataError, match="belong to 'fashion-mnist'"):
        load_data((X, Y), (X, Y), root=tmp_path)
