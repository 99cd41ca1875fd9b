"""Weights as safetensors: plain tensors with names, nothing that could run when a file is opened.

The layout is dense: pruned weights are stored as zeros, so that any tool that knows safetensors reads the file. Invariant: saving and
loading gives the same state dict, bit for bit, and tied weights are stored once.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from explorer.atomic import write_atomically
from explorer.errors import FormatError

_ALIASES = "sparsity-explorer.tied"

_WRAPPER, _UNREAD = "module.", "num_batches_tracked"

_PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
"""How a file of torch.save begins: a zip archive, or a bare pickle."""


def save_weights(
    module: nn.Module, path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None
) -> int:
    """Save the state dict of `module` and return the size of the file in bytes.

    Parameters
    ----------
    module : nn.Module
        Its parameters and buffers are saved under their own names.
    path : path
        File to write; the folder must exist.
    metadata : mapping of str to str, optional
        Said in the file's header.

    Raises
    ------
    FormatError
        If the file cannot be written.
    """
    stored: dict[str, Tensor] = {}
    first_name: dict[tuple[int, int, tuple[int, ...], tuple[int, ...]], str] = {}
    aliases: dict[str, str] = {}
    for name, tensor in module.state_dict().items():
        place = (tensor.data_ptr(), tensor.storage_offset(), tuple(tensor.shape), tuple(tensor.stride()))
        # An empty tensor has no address of its own, and shares it with every other one.
        if tensor.numel() and place in first_name:
            aliases[name] = first_name[place]
            continue
        first_name.setdefault(place, name)
        # A copy also for views into one storage, which safetensors refuses to write.
        stored[name] = tensor.clone().contiguous()
    header = dict(metadata or {})
    if aliases:
        header[_ALIASES] = json.dumps(aliases)
    content = safetensors.torch.save(stored, metadata=header or None)
    write_atomically(path, content)
    return len(content)


def read_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read a state dict that `save_weights` or any other safetensors writer made.

    Raises
    ------
    FormatError
        If there is no such file, or it is not safetensors.
    """
    source = Path(path)
    if not source.is_file():
        raise FormatError(f"There is no file {source}; pass a safetensors file.")
    if source.stat().st_size == 0:
        raise FormatError(f"{source} is empty; save it again.")
    try:
        with safetensors.safe_open(str(source), framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (safetensors.SafetensorError, OSError) as error:
        _refuse_pickle(source)
        raise FormatError(
            f"{source} is not a safetensors file ({error}); it may be cut short. Save it again."
        ) from error
    try:
        aliases = json.loads(header.get(_ALIASES, "{}"))
        tensors |= {alias: tensors[name] for alias, name in aliases.items()}
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise FormatError(f"The list of tied weights in {source} is damaged; save the file again.") from error
    return tensors


def weights_digest(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file in hexadecimal digits: by which a recipe knows the weights that it is for.

    Raises
    ------
    FormatError
        If the file cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with Path(path).open("rb") as file:
            while piece := file.read(1 << 20):
                digest.update(piece)
    except OSError as error:
        raise FormatError(f"Cannot read {path}: {error}.") from error
    return digest.hexdigest()


def load_weights(module: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load a file into `module`, whose tensors must have the names and shapes in the file.

    Raises
    ------
    FormatError
        If the file cannot be read, names, shapes or kinds of numbers differ, or values are NaN, infinite, or a negative variance; the module is then unchanged.
    """
    found = read_weights(path)
    expected = module.state_dict()
    # A count that old files do not have, and that nothing here reads.
    found = {n: t for n, t in expected.items() if n.endswith(_UNREAD)} | found
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected]
    if found and all(name.startswith(_WRAPPER) for name in found if not name.endswith(_UNREAD)):
        raise FormatError(
            f"Every name in {path} begins with {_WRAPPER!r}: it was saved from a model inside DataParallel. Save its .module.state_dict() instead."
        )
    if missing or unexpected:
        raise FormatError(
            f"{path} does not belong to this {type(module).__name__}: missing {_some(missing)}, unexpected {_some(unexpected)}. "
            "Load the file into the architecture that it was saved from."
        )
    for name, tensor in expected.items():
        if tensor.shape != found[name].shape:
            raise FormatError(
                f"{name!r} has shape {tuple(found[name].shape)} in {path} and {tuple(tensor.shape)} in this {type(module).__name__}; "
                "load the file into the architecture that it was saved from."
            )
    for name, tensor in expected.items():
        if tensor.is_floating_point() != found[name].is_floating_point():
            raise FormatError(
                f"{name!r} is {_dtype(found[name])} in {path} and {_dtype(tensor)} in this {type(module).__name__}; quantised weights cannot be loaded. "
                "Save the weights in float32 or float16."
            )
    # As the module will hold them: what fits float64 may be infinite in float32.
    found = {name: found[name].to(tensor.dtype) for name, tensor in expected.items()}
    _refuse_no_numbers(found, path)
    module.load_state_dict(found)


def _refuse_pickle(path: Path) -> None:
    """Say of a file that is no safetensors file, and begins like one of torch.save, why it is not opened: a pickle can run anything."""
    with path.open("rb") as file:
        begin = file.read(9)
    if begin.startswith(_PICKLES) and begin[8:9] != b"{":
        raise FormatError(
            f"{path.name} was made by torch.save, and opening such a file can run any program; it was not opened. If you trust it, convert it first: "
            f"safetensors.torch.save_file(torch.load({path.name!r}, map_location='cpu', weights_only=True), {path.stem + '.safetensors'!r})"
        )


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _refuse_no_numbers(tensors: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            continue
        if name.endswith("running_var") and bool((tensor < 0).any()):
            raise FormatError(
                f"{name!r} in {path} is a variance and has negative values; save the file again."
            )
        wrong = int((~torch.isfinite(tensor)).sum())
        if wrong:
            raise FormatError(
                f"{name!r} in {path} has {wrong} of {tensor.numel()} values that are NaN or infinite; the training that made the file went wrong. "
                "Load a file of an earlier step."
            )


def _some(names: list[str]) -> str:
    if not names:
        return "nothing"
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
