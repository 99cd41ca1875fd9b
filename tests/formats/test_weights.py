from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from explorer.atomic import write_atomically
from explorer.errors import FormatError
from explorer.formats import load_weights, read_weights, save_weights


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 3))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.register_buffer("nothing", torch.empty(0))
        self.register_buffer("neither", torch.empty(0))


def test_loading_gives_back_every_bit(tmp_path: Path) -> None:
    saved, loaded = network(0), network(1)
    with torch.no_grad():
        saved.get_parameter("0.weight")[0] = 0.0
    size = save_weights(saved, tmp_path / "w.safetensors", {"model": "tiny"})
    assert size == (tmp_path / "w.safetensors").stat().st_size
    load_weights(loaded, tmp_path / "w.safetensors")
    ours, theirs = saved.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(
        torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in ours
    )
    # Any other reader of safetensors sees the same.
    plain = safetensors.torch.load_file(tmp_path / "w.safetensors")
    assert all(torch.equal(plain[name], ours[name]) for name in ours)


def test_tied_weights_are_stored_once_and_come_back_under_both_names(tmp_path: Path) -> None:
    module = Tied()
    save_weights(module, tmp_path / "w.safetensors")
    assert "second.weight" not in safetensors.torch.load_file(tmp_path / "w.safetensors")
    found = read_weights(tmp_path / "w.safetensors")
    assert set(found) == set(module.state_dict())
    assert torch.equal(found["second.weight"], module.first.weight)
    other = Tied()
    load_weights(other, tmp_path / "w.safetensors")
    assert other.second.weight is other.first.weight
    assert torch.equal(other.first.weight, module.first.weight)


def test_weights_in_channels_last_are_saved_like_any_others(tmp_path: Path) -> None:
    module = network()
    expected = {name: value.clone() for name, value in module.state_dict().items()}
    save_weights(module.to(memory_format=torch.channels_last), tmp_path / "w.safetensors")  # type: ignore[call-overload]
    assert all(
        torch.equal(value, expected[name]) for name, value in read_weights(tmp_path / "w.safetensors").items()
    )


def test_a_file_of_another_network_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    save_weights(nn.Sequential(nn.Linear(3, 3)), tmp_path / "w.safetensors")
    module = network()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(FormatError, match=r"missing 1\.weight.* and 1 more, unexpected nothing"):
        load_weights(module, tmp_path / "w.safetensors")
    with pytest.raises(
        FormatError, match=r"'0\.weight' has shape \(3, 3\) .* and \(3, 4\) in this Sequential"
    ):
        load_weights(nn.Sequential(nn.Linear(4, 3)), tmp_path / "w.safetensors")
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())


@pytest.mark.parametrize("damage", ["cut", "text", "empty", "huge header"])
def test_what_is_no_safetensors_file_is_refused(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "w.safetensors"
    save_weights(network(), path)
    content = path.read_bytes()
    path.write_bytes(
        {"cut": content[:-5], "text": b"hello", "empty": b"", "huge header": b"\xff" * 8 + content[8:]}[
            damage
        ]
    )
    with pytest.raises(FormatError, match="is empty" if damage == "empty" else "is not a safetensors file"):
        read_weights(path)
    with pytest.raises(FormatError, match="There is no file"):
        read_weights(tmp_path / "none.safetensors")


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "file"
    write_atomically(target, b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(FormatError, match="No space left on device"):
        write_atomically(target, b"new")
    assert target.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    with pytest.raises(FormatError, match="folder exists"):
        write_atomically(tmp_path / "no" / "file", b"new")


def test_a_file_of_torch_save_is_not_opened_and_the_error_says_how_to_convert_it(tmp_path: Path) -> None:
    module = network()
    for options in ({}, {"_use_new_zipfile_serialization": False}):
        torch.save(module.state_dict(), tmp_path / "w.pth", **options)
        with pytest.raises(FormatError, match="can run any program") as refused:
            read_weights(tmp_path / "w.pth")
        # What it says works as it stands.
        command = str(refused.value).partition("convert it first: ")[2]
        script = f"import os, torch, safetensors.torch\nos.chdir({str(tmp_path)!r})\n{command}"
        subprocess.run([sys.executable, "-c", script], check=True)
        again = network()
        load_weights(again, tmp_path / "w.safetensors")
        assert all(torch.equal(a, b) for a, b in zip(again.parameters(), module.parameters(), strict=True))
        (tmp_path / "w.safetensors").unlink()


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused_and_change_nothing(tmp_path: Path, wrong: float) -> None:
    broken, module = network(), network()
    first = next(iter(broken.parameters()))
    first.data.view(-1)[:2] = wrong
    save_weights(broken, tmp_path / "w.safetensors")
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(FormatError, match=r"has 2 of \d+ values that are NaN or infinite"):
        load_weights(module, tmp_path / "w.safetensors")
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())


def altered(path: Path, **tensors: torch.Tensor) -> Path:
    state = {name: value.clone() for name, value in network().state_dict().items()}
    state.update({name.replace("__", "."): value for name, value in tensors.items()})
    safetensors.torch.save_file(state, path)
    return path


@pytest.mark.parametrize(
    ("tensors", "why"),
    [
        (
            {"0__bias": torch.ones(4, dtype=torch.int8)},
            r"'0\.bias' is int8 .* and float32 in this Sequential",
        ),
        (
            {"0__bias": torch.full((4,), 1e300, dtype=torch.float64)},
            "has 4 of 4 values that are NaN or infinite",
        ),
        ({"1__running_var": -torch.ones(4)}, "is a variance and has negative values"),
    ],
)
def test_numbers_that_the_network_cannot_use_are_refused(
    tmp_path: Path, tensors: dict[str, torch.Tensor], why: str
) -> None:
    module = network(3)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(FormatError, match=why):
        load_weights(module, altered(tmp_path / "w.safetensors", **tensors))
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())


def test_other_kinds_of_floats_and_files_without_the_count_of_batches_fit(tmp_path: Path) -> None:
    saved, module = network(), network(3)
    state = {
        n: t.half() if t.is_floating_point() else t
        for n, t in saved.state_dict().items()
        if "num_batches" not in n
    }
    safetensors.torch.save_file(state, tmp_path / "w.safetensors")
    load_weights(module, tmp_path / "w.safetensors")
    assert module[0].weight.dtype == torch.float32
    assert torch.equal(module[0].weight, saved[0].weight.half().float())


def test_a_file_from_inside_data_parallel_is_told_how_to_be_saved(tmp_path: Path) -> None:
    state = {f"module.{name}": value for name, value in network().state_dict().items()}
    safetensors.torch.save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(FormatError, match=r"Save its \.module\.state_dict\(\) instead"):
        load_weights(network(), tmp_path / "w.safetensors")


def test_no_length_of_the_header_is_mistaken_for_a_pickle(tmp_path: Path) -> None:
    """Headers of 640, 896 and more bytes begin with the bytes of a pickle; 19,280 with those of a zip archive."""
    path = tmp_path / "w.safetensors"
    for padding in (*range(0, 1500, 8), *range(19_000, 19_400, 8)):
        safetensors.torch.save_file({"a": torch.ones(3)}, path, metadata={"note": "x" * padding})
        assert torch.equal(read_weights(path)["a"], torch.ones(3))
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(FormatError, match="is not a safetensors file"):
            read_weights(path)
