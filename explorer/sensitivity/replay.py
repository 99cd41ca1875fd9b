"""Runs a network again without computing what cannot have changed.

When only layer L of a network is altered, every module that finishes before L starts gives the output that it gave before. This file
records those outputs once, for each batch, and hands them out in later passes, so that only the part of the network from L on is
computed. It works on any module, branching ones too, because it follows the calls that really happened and not a graph.

Calls are numbered in the order in which they begin. Call i covers the numbers [i, i + span) of itself and of the calls within it, so it is
over before call p begins exactly if i + span <= p.

Most of these outputs are only ever read by a call that is left out as well: a convolution's by the normalisation after it. Every operation of a trial pass is watched, so
it is known which call reads which output; what nothing reads is not kept, and a tensor of the same shape that takes no memory stands for it. Of ResNet-50 that is a
third.

Two things could make a recorded output wrong, and neither is taken on trust:

- An in-place operation may write into an output after it was recorded. Such outputs are found by their version counters in a trial pass;
  they are copied when recorded and when handed out.
- A weight may be used without a call of its module (a functional call, an alias), or a module may keep something for itself besides its output.
  So whoever shortens passes tries it on a few images (`explorer.sensitivity.scan`), and runs in full the layers for which it fails.

The module is changed (its forwards are wrapped): give a private copy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["PrefixReplay"]


@dataclass(slots=True)
class _Call:
    """One call of one module in the recorded pass."""

    module: nn.Module
    span: int = 1
    is_tensor: bool = False
    overwritten: bool = False
    read_until: int = 0
    """Its output is read by calls that end before this number: a pass from there on does not need it."""


class _Enough(BaseException):
    """Ends a pass; no forward is to catch it."""


class _Reads(TorchDispatchMode):
    """Notes which call reads the output of which other, by watching every operation."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self.open: list[int] = []
        self.readers: dict[int, set[int]] = {}
        self._makers: dict[int, list[int]] = {}
        self._alive: list[Tensor] = []  # an object's number is its own only while it lives

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.read((args, kwargs))
        return func(*args, **kwargs)

    def read(self, values: Any) -> None:
        """Note that the innermost open call reads these tensors."""
        for value in tree_leaves(values):
            for maker in self._makers.get(id(value), ()) if isinstance(value, Tensor) else ():
                self.readers.setdefault(maker, set()).add(self.open[-1] if self.open else 0)

    def made(self, call: int, output: Tensor) -> None:
        """Note that a call's output is this tensor."""
        self._alive.append(output)
        self._makers.setdefault(id(output), []).append(call)


class PrefixReplay:
    """Record a module's calls, then run it from a chosen call on.

    Parameters
    ----------
    module : nn.Module
        A private copy, in eval mode; its forwards get wrapped.
    memory_limit : int
        Bytes that recorded outputs may take; batches that do not fit are run in full.
    """

    def __init__(self, module: nn.Module, memory_limit: int) -> None:
        self._module = module
        self._memory_limit = memory_limit
        self._calls: list[_Call] = []
        self._needed: frozenset[int] = frozenset()
        self._skipped: frozenset[int] = frozenset()
        self._stores: dict[int, dict[int, Tensor]] = {}
        self._sizes: dict[int, int] = {}
        self._position = 0
        self._observe: Callable[[int, Any], None] | None = None
        self._before: Callable[[int], None] | None = None
        self._store: dict[int, Tensor] | None = None
        self._until = 0
        self._reads: _Reads | None = None
        self.largest_output = 0
        """Bytes of the largest output of any call in the trial pass."""
        for child in module.modules():
            if not isinstance(child, torch.jit.ScriptModule):
                self._wrap(child)

    def _wrap(self, module: nn.Module) -> None:
        original = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            index = self._position
            self._position += 1
            if self._store is not None and index in self._store:
                call = self._calls[index]
                if index + call.span <= self._until:
                    self._position = index + call.span
                    recorded = self._store[index]
                    return recorded.clone() if call.overwritten else recorded
            reads = self._reads
            if reads is not None:
                self._calls.append(_Call(module))
                reads.open.append(index)
            if self._before is not None:
                self._before(index)
            output = original(*args, **kwargs)
            if reads is not None:
                self._calls[index].span = self._position - index
                self._calls[index].is_tensor = isinstance(output, Tensor)
                reads.read(output)  # what is handed on was made by a call within this one
                reads.open.pop()
                if isinstance(output, Tensor):
                    reads.made(index, output)
            if self._observe is not None:
                self._observe(index, output)
            return output

        module.forward = forward

    def _run(self, inputs: Tensor) -> Any:
        self._position = 0
        return self._module(inputs)

    def trace(self, inputs: Tensor) -> Any:
        """Run a few images to learn the calls and which outputs are overwritten later; returns the output."""
        seen: list[tuple[int, Tensor, int]] = []

        def observe(index: int, output: Any) -> None:
            if isinstance(output, Tensor):
                seen.append((index, output, output._version))  # noqa: SLF001 - torch documents it as the way to see in-place writes

        self._calls = []
        self._reads, self._observe = _Reads(), observe
        try:
            with torch.no_grad(), self._reads:  # inference tensors have no version counter
                result = self._run(inputs)
            for maker, readers in self._reads.readers.items():
                self._calls[maker].read_until = max(reader + self._calls[reader].span for reader in readers)
            # The network's own output goes to the caller.
            for call in self._calls:
                if call.module is self._module:
                    call.read_until = len(self._calls) + 1
        finally:
            self._reads, self._observe = None, None
        for index, output, version in seen:
            self._calls[index].overwritten = output._version != version  # noqa: SLF001
        self.largest_output = max((output.nbytes for _, output, _ in seen), default=0)
        return result

    def first_use(self, weight: Tensor) -> int:
        """Return the number of the first call that can see `weight`; 0 (the network itself) when in doubt.

        Every module that holds the weight counts, also under another name. A holder that is never called is used by its parent (as
        attention uses its projections), so the parent's call counts.
        """
        storage = weight.untyped_storage().data_ptr()
        starts: dict[int, int] = {}
        for number in range(len(self._calls) - 1, -1, -1):
            starts[id(self._calls[number].module)] = number
        first = len(self._calls)
        for name, module in self._module.named_modules(remove_duplicate=False):
            if not any(p.untyped_storage().data_ptr() == storage for p in module.parameters(recurse=False)):
                continue
            path = name
            while id(self._module.get_submodule(path)) not in starts and path:
                path = path.rpartition(".")[0]
            first = min(first, starts.get(id(self._module.get_submodule(path)), 0))
        return first

    def modules_from(self, start: int) -> list[nn.Module]:
        """Return the modules whose first call is number `start` or later."""
        before = {id(call.module) for call in self._calls[:start]}
        later = {id(call.module): call.module for call in self._calls[start:]}
        return [module for key, module in later.items() if key not in before]

    def choose(self, starts: Sequence[int]) -> None:
        """Keep only outputs that a pass from one of these calls on can ask for."""
        needed: set[int] = set()
        skipped: set[int] = set()
        for start in starts:
            index = 0
            while index < start:
                call = self._calls[index]
                if call.is_tensor and index + call.span <= start:
                    (needed if call.read_until > start else skipped).add(index)
                    index += call.span
                else:
                    index += 1
        self._needed, self._skipped = frozenset(needed), frozenset(skipped - needed)

    def record(self, key: int, inputs: Tensor) -> Any:
        """Run a batch in full and keep the chosen outputs under `key` if memory allows; returns the output."""
        store: dict[int, Tensor] = {}
        storages: dict[int, int] = {}

        def observe(index: int, output: Any) -> None:
            if index in self._needed and isinstance(output, Tensor):
                kept = output.clone() if self._calls[index].overwritten else output
                store[index] = kept
                memory = kept.untyped_storage()
                storages[memory.data_ptr()] = memory.nbytes()
            elif index in self._skipped and isinstance(output, Tensor):
                store[index] = _stand_in(output)

        used = sum(self._sizes.values())
        room = used < self._memory_limit
        self._observe = observe if room else None
        try:
            result = self._run(inputs)
        finally:
            self._observe = None
        size = sum(storages.values())
        if room and used + size <= self._memory_limit:
            self._stores[key] = store
            self._sizes[key] = size
        return result

    def forget(self, key: int) -> None:
        """Drop what was kept under `key`."""
        self._stores.pop(key, None)
        self._sizes.pop(key, None)

    def run_watched(self, inputs: Tensor, before: Callable[[int], None]) -> Any:
        """Run in full, and call `before` with the number of each call as it begins."""
        self._before = before
        try:
            return self._run(inputs)
        finally:
            self._before = None

    def repeats(
        self, start: int, end: int, key: int, inputs: Tensor, same: Callable[[Any, Any], bool]
    ) -> bool:
        """Tell whether the calls from `start` to before `end`, after a shortened way to them, give again what was kept of them under `key`.

        Where each stretch from one start to the next does, every shortened pass gives what a full one gives.

        Parameters
        ----------
        start, end : int
            Numbers of calls.
        key : int
            What `record` was given.
        inputs : Tensor
            The batch of `key`.
        same : callable
            Compares an output with the one that was kept.
        """
        kept = self._stores.get(key)
        if kept is None:
            return False
        is_same = True

        def observe(index: int, output: Any) -> None:
            nonlocal is_same
            if index in self._needed:
                is_same = is_same and same(kept[index], output)

        def before(index: int) -> None:
            if index >= end:
                raise _Enough

        self._observe, self._before = observe, before
        try:
            self.run_from(start, key, inputs)
        except _Enough:
            pass
        finally:
            self._observe = self._before = None
        return is_same

    def run_from(self, start: int, key: int, inputs: Tensor) -> Any:
        """Run a batch, computing only from call number `start` on where its earlier outputs were kept."""
        self._store, self._until = self._stores.get(key), start
        try:
            return self._run(inputs)
        finally:
            self._store = None

    def size(self, key: int) -> int | None:
        """Return the bytes that are kept under `key`, None when nothing is."""
        return self._sizes.get(key)


def _stand_in(output: Tensor) -> Tensor:
    """Return a tensor of this shape that takes no memory: of NaN where there is such a thing, so that a proof fails where it is read after all."""
    nothing = float("nan") if output.is_floating_point() or output.is_complex() else 0
    return torch.full((), nothing, dtype=output.dtype, device=output.device).expand(output.shape)
