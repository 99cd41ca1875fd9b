"""Runs networks with every native buffer beside a page that nobody may touch: an access out of bounds ends the process.

    python -m tests.inference.guarded end all       each buffer ends where a forbidden page begins
    python -m tests.inference.guarded end in-turns avx512:fp32 avx2:fp32 generic:fp32
                                                    each network by the first of these, and by one of the others in turn
    python -m tests.inference.guarded start conv    each buffer begins where a forbidden page ends; only networks with "conv" in their name
    python -m tests.inference.guarded end all avx2:fp32 avx512:fp16
                                                    for these instruction sets and precisions; float16 is emulated where the CPU cannot compute with it

What lies between a buffer and the end of its page is filled with a pattern that is checked after the runs, and that reads as NaN.
Prefetches past the end are harmless, and stay so here: they never fault.

Every kernel that a network could have is tried in it, and every order of its steps is run; with "all" and "in-turns", no kernel may be left out.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from torch import nn

import explorer
from explorer.errors import EngineError
from explorer.inference import (
    choosing,
    compilation,
    execution,
    layout,
    native,
    plan,
    rows_apart,
    sparse_code,
    sparse_rows,
)
from explorer.inference.choices import ChoiceCache
from explorer.inference.kernels import registers
from explorer.inference.kernels.builder import Record
from explorer.inference.larger_kernels import has_programs
from explorer.inference.memory import Memory
from explorer.inference.orders import LAYERS
from explorer.inference.peak import peak_of
from explorer.inference.plan import Choice, Plan
from tests.inference.graphs import kernel_classes, without_limit
from tests.inference.test_abreast import Stages
from tests.inference.test_attention_masks import Biased, Masked
from tests.inference.test_kernels import Rearranged
from tests.inference.test_rearrange import TO_TOKENS, AndBack, Patches
from tests.inference.test_tiles import Bottlenecks, Feedforward, Separable
from tests.inference.test_tokens import Chunks, Own, Separate, SpelledOut

PATTERN = 0xFF
"""In each byte: four of them are a NaN."""

_FORBIDDEN = 0  # PROT_NONE


class Guards:
    """Takes the place of `Memory.zeros`, and of the tables of kernels that pack weights: one mapping per buffer, with a forbidden page on either side."""

    def __init__(self, side: str) -> None:
        self.side = side
        self.slack: list[NDArray[np.uint8]] = []
        self.protect = ctypes.CDLL(None, use_errno=True).mprotect
        self.protect.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int

    def install(self) -> None:
        def zeros(memory: Memory, size: int, dtype: DTypeLike = np.float32, align: int = 64) -> NDArray[Any]:
            # Vectors want multiples of 64 bytes: at the end, up to 63 bytes of slack remain.
            inside = self.region(size * np.dtype(dtype).itemsize, 64)
            memory._chunks.append(inside[0])
            memory.n_bytes += inside[1].nbytes
            return inside[1].view(dtype)

        Memory.zeros = zeros  # type: ignore[method-assign]
        Memory.trim = lambda _: None  # type: ignore[method-assign]
        sparse_rows.run_kernel = sparse_code.run_kernel = self.run_kernel

    def run_kernel(
        self, kernel: native.Kernel, record: Record, isa: native.Isa, tables: Mapping[str, NDArray[Any]], **numbers: int
    ) -> None:  # fmt: skip
        """In the place of `sparse_rows.run_kernel`: with copies of the tables beside forbidden pages."""
        inside = {}
        for name, table in tables.items():
            inside[name] = self.region(table.nbytes, table.itemsize)[1].view(table.dtype).reshape(table.shape)
            inside[name][...] = table
        _run_kernel(kernel, record, isa, inside, **numbers)
        for name, table in tables.items():
            if table.flags.writeable:
                table[...] = inside[name]

    def region(self, wanted: int, align: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Whole pages between forbidden ones, and so many bytes of them, which begin at a multiple of `align`."""
        page = mmap.PAGESIZE
        middle = -(-max(wanted, 1) // page) * page
        region = np.frombuffer(mmap.mmap(-1, middle + 2 * page), np.uint8)
        first = region.ctypes.data
        for at in (first, first + page + middle):
            assert self.protect(at, page, _FORBIDDEN) == 0, ctypes.get_errno()
        inside = region[page : page + middle]
        start = 0 if self.side == "start" else (middle - wanted) // align * align
        for slack in (inside[:start], inside[start + wanted :]):
            slack[:] = PATTERN
            self.slack.append(slack)
        return inside, inside[start : start + wanted]

    def check(self, kept: int = 0) -> None:
        """Nothing was written around the buffers. The first `kept` of what lies there is looked at again next time."""
        assert all((slack == PATTERN).all() for slack in self.slack), "native code wrote past a buffer"
        del self.slack[kept:]


class Residual(nn.Module):
    """Both paths of a residual block, with a stride or without."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.a = nn.Conv2d(channels, channels, 3, stride, 1)
        self.b = nn.Conv2d(channels, channels, 3, 1, 1)
        self.short = nn.Conv2d(channels, channels, 1, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.b(torch.relu(self.a(x))) + self.short(x))


class Tokens(nn.Module):
    """Linear layers over tokens, and an addition that no convolution takes along."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(11, 37), nn.Linear(37, 11)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.b(torch.relu(self.a(x))) + x)


class Pointwise(nn.Module):
    """Additions and clamps on images and on vectors that nothing else can take along."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(3, 5, 1)
        self.c, self.d = nn.Linear(5, 19), nn.Linear(5, 19)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y, z = self.a(x), self.b(x)
        v = y.mean((2, 3))
        p, q = self.c(v), self.d(v)
        return y, z, torch.relu(y + z), p, q, torch.relu(p + q), torch.relu(y)


class Filters(nn.Module):
    """Channels filtered each on its own, by windows of several sizes, strides and dilations."""

    def __init__(self) -> None:
        super().__init__()
        self.all = nn.ModuleList(
            nn.Conv2d(6, 6, size, stride, dilation * (size // 2), dilation, groups=6)
            for size, stride, dilation in ((3, 1, 1), (3, 2, 1), (5, 1, 1), (5, 2, 1), (7, 1, 1), (7, 2, 1), (3, 1, 2), (3, 3, 1))
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(one(x) for one in self.all)


class Gated(nn.Module):
    """Smooth activations, a gate for each channel, and a norm that no convolution takes along."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.into, self.out = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 4, 1), nn.Conv2d(4, 6, 1)
        self.norm = nn.BatchNorm2d(6)
        nn.init.normal_(self.norm.bias)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = nn.functional.hardswish(self.a(x))
        gate = torch.sigmoid(self.out(torch.relu(self.into(y.mean((2, 3), keepdim=True)))))
        y = y * gate
        return self.norm(y), y, nn.functional.gelu(y) * y


class Branches(nn.Module):
    """Channels of several layers side by side, some of them twice, and ranges of them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (
            nn.Conv2d(3, 5, 3, padding=1),
            nn.Conv2d(3, 4, 1),
            nn.Conv2d(8, 6, 3, padding=1),
        )

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y, z = torch.relu(self.a(x)), self.b(x)
        joined = torch.cat([y, z, nn.functional.max_pool2d(z, 3, 1, 1), y], 1)
        return self.c(joined[:, 3:11]), joined


class Classifier(nn.Module):
    """What follows the last convolution."""

    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__()
        self.conv, self.classify = nn.Conv2d(3, channels, 1), nn.Linear(channels, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classify(torch.relu(self.conv(x)).mean((2, 3)))


def cases() -> Iterator[tuple[str, Callable[[], nn.Module], tuple[int, ...]]]:
    """Name, network and shape of the input: every kernel, on sizes that fit no vector and some that do."""
    for size in ((1, 1), (4, 4), (5, 9), (15, 15), (3, 67), (16, 16), (31, 14)):
        yield f"conv 3x3 {size}", lambda: nn.Conv2d(5, 23, 3, padding=1), (2, 5, *size)
        yield f"conv 1x1 {size}", lambda: nn.Conv2d(19, 40, 1), (2, 19, *size)
        yield f"conv pairs {size}", lambda: nn.Conv2d(5, 24, 3, padding=1), (2, 5, *size)
        yield f"conv pairs 1x1 {size}", lambda: nn.Conv2d(19, 40, 1), (2, 19, *size)
        yield f"conv stride {size}", lambda: nn.Conv2d(3, 6, 3, 2, 1), (2, 3, *size)
        yield f"conv grouped {size}", lambda: nn.Conv2d(6, 6, 3, padding=1, groups=3), (2, 6, *size)
        yield f"residual {size}", lambda: Residual(4, 1), (2, 4, *size)
        yield f"residual stride {size}", lambda: Residual(4, 2), (1, 4, *size)
        yield f"pointwise {size}", Pointwise, (2, 3, *size)
        yield f"pool plane {size}", lambda: nn.AdaptiveAvgPool2d(1), (2, 5, *size)
        yield f"pool max {size}", lambda: nn.MaxPool2d(3, 2, 1), (2, 3, *size)
        yield f"upsample {size}", lambda: nn.Upsample(scale_factor=2), (2, 3, *size)
        yield (
            f"padded {size}",
            lambda: nn.Sequential(nn.ZeroPad2d((0, 2, 0, 1)), nn.Conv2d(3, 4, 3, padding=1)),
            (2, 3, *size),
        )
        yield f"pool max same {size}", lambda: nn.MaxPool2d(3, 1, 1), (2, 3, *size)
        yield f"pool max dilated {size}", lambda: nn.MaxPool2d(2, 1, 1, dilation=2), (2, 3, *size)
        yield f"pool average {size}", lambda: nn.AvgPool2d(3, 2, 1), (2, 3, *size)
        yield f"pool adaptive {size}", lambda: nn.AdaptiveAvgPool2d((2, 3)), (2, 5, *size)
        yield f"upsample columns {size}", lambda: nn.Upsample(scale_factor=(1, 4)), (2, 3, *size)
        yield f"gated {size}", Gated, (2, 3, *size)
        yield f"branches {size}", Branches, (2, 3, *size)
        yield f"ranges {size}", lambda: Rearranged([(0, 3), (2, 3), (1, 2), (4, 5)]), (2, 5, *size)
        yield (
            f"flat {size}",
            lambda s=size: nn.Sequential(
                nn.Conv2d(3, 4, 3, padding=1), nn.Flatten(), nn.Linear(4 * prod(s), 7)
            ),
            (2, 3, *size),
        )
        yield f"classifier {size}", lambda: Classifier(40, 37), (16, 3, *size)
    for size in ((1, 1), (5, 9), (15, 15), (3, 67), (16, 16), (31, 14), (7, 112)):
        yield f"depthwise {size}", Filters, (2, 6, *size)
    # One image, which threads share.
    for size, padding in (
        ((5, 9), 1),
        ((16, 16), 0),
        ((31, 14), 2),
        ((32, 31), 1),
        ((28, 28), 1),
        ((64, 64), 1),
    ):
        yield f"separable {padding} {size}", lambda p=padding: Separable(20, 3, p), (1, 3, *size)
    for kernel, padding, stride, dilation in (
        ((5, 5), (2, 2), (3, 3), 1), ((7, 7), (3, 3), (4, 4), 1), ((1, 5), (0, 4), (1, 2), 2), ((7, 1), (6, 0), (2, 1), 2),
        ((3, 3), (4, 4), (1, 1), 3), ((2, 4), (0, 0), (5, 5), 1), ((3, 3), (0, 0), (1, 6), 1), ((5, 5), (4, 4), (1, 1), 1),
    ):  # fmt: skip
        for size in ((13, 17), (29, 64), (14, 33)):
            yield (
                f"conv {kernel} {padding} {stride} {dilation} {size}",
                lambda k=kernel, p=padding, s=stride, d=dilation: nn.Conv2d(3, 9, k, s, p, d),
                (2, 3, *size),
            )
    # Images that are read where the caller has them.
    for stride, size in ((2, (7, 32)), (2, (6, 64)), (4, (9, 64)), (3, (4, 96))):
        yield (
            f"conv borrowed {stride} {size}",
            lambda s=stride: nn.Conv2d(3, 6, 2 * s - 1, s, s - 1),
            (2, 3, *size),
        )
    # Four rows at a time: of the last ones some are not there.
    for size in ((9, 16), (18, 57), (3, 112)):
        yield f"conv rows {size}", lambda: nn.Conv2d(3, 9, (3, 5), padding=(2, 3)), (2, 3, *size)
        yield f"conv rows stride {size}", lambda: nn.Conv2d(3, 9, 7, 2, 3), (2, 3, 2 * size[0], 2 * size[1])
    # Many input channels: several K blocks, and parts of the channels for two threads.
    yield "conv deep", lambda: nn.Conv2d(300, 70, 3, padding=1), (1, 300, 9, 7)
    yield "conv deep 1x1", lambda: nn.Conv2d(900, 70, 1), (1, 900, 13, 11)
    for stride in (3, 4):
        yield f"pool max stride {stride}", lambda s=stride: nn.MaxPool2d(5, s, 2), (1, 2, 23, 70)
    for features, outputs in ((1, 1), (7, 130), (100, 17), (64, 64)):
        yield (
            f"linear {features} {outputs}",
            lambda f=features, o=outputs: nn.Linear(f, o),
            (3, features),
        )
    for images in (9, 16, 20):
        yield f"linear of {images}", lambda: nn.Linear(50, 20), (images, 50)
    for tokens in (1, 7, 16, 50):
        yield f"tokens {tokens}", Tokens, (2, tokens, 11)
        yield f"layer norm {tokens}", lambda: nn.LayerNorm(11), (2, tokens, 11)
        yield f"attention joint {tokens}", lambda: Chunks(24, 3), (2, tokens, 24)
        yield f"attention separate {tokens}", lambda: Separate(10, 2), (2, tokens, 10)
        yield f"attention by products {tokens}", lambda: SpelledOut("queries scaled"), (2, tokens, 24)
        yield f"attention with a mask {tokens}", lambda: Masked("causal"), (2, tokens, 24)
        yield f"attention with a bias {tokens}", lambda t=tokens: Biased(t), (2, tokens, 24)
        yield f"attention turned {tokens}", lambda: Own((2, 6), "residual", batch_first=True), (2, tokens, 12)
    for size in ((2, 2), (5, 9), (7, 30), (16, 16)):
        yield f"tokens of pixels {size}", lambda: AndBack(19, TO_TOKENS["permuted"]), (2, 2, *size)
        patches = 2 * size[0], 2 * size[1]
        yield f"patches {size}", lambda s=size: Patches(prod(s), 1, 2, "all", 9), (2, 3, *patches)
    for size in ((8, 15), (32, 31)):
        yield f"tiles {size}", lambda: Bottlenecks(16, 8), (1, 3, *size)
    for tokens in (100, 128):
        yield f"tiles {tokens}", lambda: Feedforward(24, 40), (1, tokens, 24)
    # Late layers take several images side by side, where their rows are short enough for the vectors of this CPU.
    for columns in (1, 3, 7):
        yield f"turns {columns}", lambda: Stages(2, 24, 20), (8, 3, 8 * columns, 8 * columns)
    yield "line", lambda: nn.Sequential(nn.Conv1d(3, 8, 5, 2, 2), nn.ReLU(), nn.Conv1d(8, 4, 3)), (2, 3, 41)


def made(
    name: str, build: Callable[[], nn.Module], shape: tuple[int, ...]
) -> tuple[nn.Module, torch.Tensor, Any] | None:
    """A network with zeros among its weights, its input beside a forbidden page, and what torch answers; None where the image is smaller than the window."""
    torch.manual_seed(0)
    network = build().eval()
    x = torch.from_numpy(Memory().zeros(prod(shape))).reshape(shape).copy_(torch.randn(shape))
    for parameter in network.parameters():
        parameter.data *= torch.rand_like(parameter) > (0.85 if name.startswith("turns") else 0.6)
        if "pairs" in name and parameter.dim() > 1:
            parameter.data[1::2] *= parameter.data[::2] != 0
            parameter.data[::2] *= parameter.data[1::2] != 0
    try:
        with torch.no_grad():
            return network, x, network(x)
    except RuntimeError:
        return None


def check(
    name: str, network: nn.Module, x: torch.Tensor, wanted: Any, guards: Guards, precision: str, kept: int
) -> int:
    """Run one network, sparse and dense, on one thread and on two, in each order; how many engines ran."""
    tolerance, shape = 1e-4 if precision == "fp32" else 2e-2, x.shape
    execution._CACHED_BYTES = 1 if name.startswith("turns") else _CACHED_BYTES
    ran = 0
    for mode, threads in (("sparse", 1), ("dense", 1), ("auto", 2)):
        engine = explorer.compile(network, x, sparse=mode, threads=threads, precision=precision)
        assert engine.precision == precision
        assert engine.fallbacks == (), (name, engine.fallbacks)
        is_vector = shape[2:] == (1, 1)  # one pixel
        if "pairs" in name and mode != "dense" and not is_vector:
            assert "pairs" in str(engine.choices), (name, engine.choices)
        elif mode == "sparse" and name.startswith("conv") and "grouped" not in name and not is_vector:
            assert has_programs(engine._network.isa) == ("code" in str(engine.choices)), (
                name,
                engine.choices,
            )
        assert (
            "rows" not in name or mode != "dense" or precision == "fp16" or "winograd" in str(engine.choices)
        )
        borrows = any(place.cell is not None for place in engine._network.plan.places.values())
        assert borrows or "borrowed" not in name or (precision == "fp16" and engine.isa != "avx512")
        steps = engine._network.steps
        for order in steps.chains if steps is not None else (LAYERS,):
            if steps is not None:
                engine._network.use_order(steps, order)
            for images in {1, shape[0]}:
                got = engine(x[:images])
                for a, b in zip(*((v if isinstance(v, tuple) else (v,)) for v in (got, wanted)), strict=True):
                    assert torch.allclose(a, b[:images], rtol=tolerance, atol=tolerance), (
                        name,
                        mode,
                        threads,
                        order,
                        images,
                    )
        guards.check(kept)
        ran += 1
    return ran


def candidates(*args: Any, **options: Any) -> list[Choice]:
    """In the place of `Plan.candidates`: pairs where there are any; programs in sparse mode, and Winograd's filtering or other kernels in the other modes."""
    several, mode = _offered(*args, **options), args[3]
    winograd = Choice(True, "winograd")
    for wanted in (
        lambda c: c.pairs,
        lambda c: mode == "dense" and c == winograd,
        lambda c: c.code == (mode == "sparse"),
    ):
        if any(map(wanted, several)):
            return list(filter(wanted, several))
    return several


_offered = Plan.candidates
_run_kernel = sparse_rows.run_kernel
_CACHED_BYTES = execution._CACHED_BYTES

COMPILED: dict[str, set[type]] = {}
"""Kernels whose machine code was asked for, by what was about to call it, for each way."""


def left_out(isa: native.Isa) -> dict[str, str]:
    """Kernels that no network has here, and why."""
    found: dict[str, str] = {}
    if not registers.has_partners(layout.MAX_TILE, isa):
        why = "two output channels at once need more registers"
        found |= dict.fromkeys(("MatchRowsKernel", "PlaceRowsKernel"), why)
    if not has_programs(isa):
        found |= dict.fromkeys(("OrderColumnsKernel", "WriteProgramsKernel"), "programs are AVX-512's")
    if isa.precision == "fp16":
        found["WinogradKernel"] = "float16 would lose too much"
    return found


def no_kernel_is_left_out(way: str) -> None:
    name, _, precision = way.partition(":")
    isa = native.host_isa(name)
    isa = native.half_isa(isa, emulated=True) if precision == "fp16" else isa
    assert isa is not None
    peak_of(isa)  # which no network has
    missing = {kernel.__name__ for kernel in kernel_classes() if kernel not in COMPILED[way]}
    assert missing == {*left_out(isa)}, (way, missing, left_out(isa))


IN_TURNS = "in-turns"


def ways_of(number: int, pattern: str, ways: Sequence[str]) -> Sequence[str]:
    """By which of `ways` a network is run, of which there were so many before it."""
    first, *others = ways
    return [first, others[number % len(others)]] if pattern == IN_TURNS and others else ways


def main(side: str, pattern: str, *ways: str) -> None:
    """Run all networks whose name holds `pattern` ("all" and "in-turns": every one), for each instruction set and precision, as in "avx2:fp32"."""
    ways = ways or (f"{native.current_isa().name}:fp32",)
    compilation.half_isa = partial(native.half_isa, emulated=True)  # type: ignore[assignment]
    Plan.candidates = candidates  # type: ignore[method-assign]
    choosing.larger_kernels = without_limit
    # In mode "auto" rows have no gaps between them.
    layout.worth_masks = lambda *_: True  # type: ignore[assignment]
    Plan._may_mask = lambda self, _, o: self._mode == "auto" and o.attributes["groups"] == 1  # type: ignore[method-assign]
    plan.l2_bytes = lambda: 0  # type: ignore[assignment]  # band by band where one thread has an image to itself
    # torch takes most of the time: once for each network will do, whatever runs it.
    compilation.capture = lru_cache(maxsize=1)(compilation.capture)  # type: ignore[assignment,attr-defined]
    rows_apart._LEAST_VECTORS = 1
    # What was fastest in another run is not known here: each kernel is tried, and each order made ready. How long they take does not matter.
    for part in (choosing, compilation, execution):
        part.choice_cache = lambda: ChoiceCache(None)
    choosing._MOST_PASSES = choosing._REPEATS = 1
    choosing._find_order = lambda *_: None  # type: ignore[assignment]
    # Only what is needed is compiled.
    compilation.code_ahead = lambda *_, **__: contextlib.nullcontext()  # type: ignore[assignment]
    make_key = native._key

    def key(isa: native.Isa, kernel: native.Kernel) -> str:
        COMPILED[way].add(type(kernel))
        return make_key(isa, kernel)

    native._key = key
    guards = Guards(side)
    guards.install()
    torch.set_num_threads(1)
    ran = dict.fromkeys(ways, 0)
    COMPILED.update((way, set()) for way in ways)
    every = pattern in ("all", IN_TURNS)
    for number, (name, build, shape) in enumerate(cases()):
        if not every and pattern not in name:
            continue
        guards.slack.clear()
        case = made(name, build, shape)
        kept = len(guards.slack)
        for way in ways_of(number, pattern, ways) if case else ():
            sys.stdout.write(f"{name}, {way}\n")
            sys.stdout.flush()  # the last line of a process that crashes says where
            isa, _, precision = way.partition(":")
            os.environ[native.ISA_VARIABLE] = isa
            try:
                ran[way] += check(name, *case, guards, precision, kept)
            except EngineError as error:
                raise SystemExit(f"{name}, {way}: {error}") from error
    for way in ways:
        assert ran[way], f"no network has {pattern!r} in its name"
        if every:
            no_kernel_is_left_out(way)
        sys.stdout.write(f"{ran[way]} engines of {way} ran within their buffers\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
