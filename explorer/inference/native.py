"""From LLVM IR to machine code on the user's own CPU, and the cache that makes the second time quick.

Object code is cached on disk by the text of the kernel generators, the kernel's signature, the CPU's name and features and llvmlite's
version. An entry carries the SHA-256 of its key and content; one that does not match (cut short, altered, foreign), or that another user can have
written, is compiled again. The folder is held below `CACHE_LIMIT_BYTES`: what has not been used for longest goes first.

Without llvmlite, or on a CPU without AVX2 or NEON, there is no machine code worth making: the instruction set is then called "torch", and torch runs
everything.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import stat
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np

from explorer.errors import EngineError
from explorer.folders import cache_root, held_below
from explorer.inference import fork
from explorer.inference.interrupts import uninterrupted

try:
    import llvmlite
    import llvmlite.binding as llvm

    NO_LLVM = ""
except (ImportError, OSError) as _error:  # OSError: the package is there, but its library cannot be loaded
    NO_LLVM = f"llvmlite cannot be imported ({_error})"

CACHE_LIMIT_BYTES = 256 << 20
"""Object code of some ten thousand kernels."""

ISA_VARIABLE = "EXPLORER_ISA"


@dataclass(frozen=True, slots=True)
class Isa:
    """What the kernel generators must know of a CPU.

    Attributes
    ----------
    name : str
        "avx512", "avx2", "neon", "generic", or "torch": no machine code at all.
    lanes : int
        Values in one vector register.
    registers : int
        Vector registers.
    cpu, features : str
        As LLVM wants them. The features are passed beside the name, since LLVM knows some virtual CPUs by a wrong name.
    precision : str
        "fp32", or "fp16": activations, weights and sums of planes are float16.
    """

    name: str
    lanes: int
    registers: int
    cpu: str
    features: str
    precision: str = "fp32"

    @property
    def element_bytes(self) -> int:
        """Bytes of one value in planes."""
        return 2 if self.precision == "fp16" else 4

    @property
    def width(self) -> int:
        """Bytes of one vector register."""
        return self.lanes * self.element_bytes

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of values in planes."""
        return np.dtype(f"f{self.element_bytes}")

    @property
    def computes_natively(self) -> bool:
        """Whether the CPU has instructions for this precision, see `half_isa`."""
        return self.precision == "fp32" or f"+{_HALF_FEATURES.get(self.name)}" in self.features.split(",")

    @property
    def single(self) -> Isa:
        """The same CPU, computing in float32."""
        return replace(self, lanes=self.width // 4, precision="fp32")


@cache
def _initialise() -> None:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    llvm.initialize_native_asmparser()


@cache
def host_isa(override: str | None = None) -> Isa:
    """The CPU this process runs on, or a narrower one that it can also run.

    Parameters
    ----------
    override : str, optional
        "avx512", "avx2", "neon" or "generic": generate code for this instead (to test one generator's code for several CPUs). "torch": none.

    Raises
    ------
    EngineError
        When this CPU cannot run what was asked for.
    """
    torch_only = Isa("torch", 1, 0, "", "")
    if override == "torch" or (NO_LLVM and override is None):
        return torch_only
    if NO_LLVM:
        raise EngineError(
            f"{override!r} code was asked for, but {NO_LLVM}. Install llvmlite, or unset {ISA_VARIABLE} to run through torch."
        )
    _initialise()
    features = dict(llvm.get_host_cpu_features())
    flat, cpu = llvm.get_host_cpu_features().flatten(), llvm.get_host_cpu_name()
    possible: dict[str, Isa] = {}
    if features.get("avx512f") and features.get("avx512vl"):
        possible["avx512"] = Isa("avx512", 16, 32, cpu, flat)
    if features.get("avx2") and features.get("fma"):
        narrow = {k: v and not k.startswith(("avx512", "avx10", "amx")) for k, v in features.items()}
        flags = ",".join(("+" if on else "-") + k for k, on in sorted(narrow.items()))
        possible["avx2"] = Isa("avx2", 8, 16, "haswell", flags)
    if llvm.get_process_triple().startswith(("aarch64", "arm64")):
        half = "" if "fullfp16" in features or not _has_arm_half() else ",+fullfp16"
        possible["neon"] = Isa("neon", 4, 32, cpu, flat + half)
    # Four lanes without FMA lose against torch: "generic" is for tests, and nobody's first choice.
    wanted = override or next(iter(possible), "torch")
    possible["generic"] = Isa("generic", 4, 16, cpu, flat) if possible else Isa("generic", 4, 16, "", "")
    possible["torch"] = torch_only
    if wanted not in possible:
        raise EngineError(
            f"This CPU ({cpu}) cannot run {wanted!r} code. It can run: {', '.join(possible)}. Unset {ISA_VARIABLE} to use the widest."
        )
    return possible[wanted]


_AT_HWCAP, _HWCAP_ASIMDHP = 16, 1 << 10


def _has_arm_half() -> bool:
    """Whether Linux says that this ARM computes in float16; LLVM does not look for it there, as it does on macOS."""
    getauxval = getattr(ctypes.CDLL(None), "getauxval", None) if sys.platform == "linux" else None
    if getauxval is None:
        return False
    getauxval.restype, getauxval.argtypes = ctypes.c_ulong, [ctypes.c_ulong]
    return bool(getauxval(_AT_HWCAP) & _HWCAP_ASIMDHP)


_HALF_FEATURES = {"avx512": "avx512fp16", "neon": "fullfp16"}


def half_isa(isa: Isa, *, emulated: bool = False) -> Isa | None:
    """The same CPU computing in float16, with twice as many values in a register; None for a CPU without such arithmetic.

    Parameters
    ----------
    isa : Isa
    emulated : bool
        Also for a CPU without: LLVM then converts to float32 and back around each operation, which is slow, and right (for tests).
    """
    half = replace(isa, lanes=2 * isa.lanes, precision="fp16")
    return half if half.computes_natively or emulated else None


def why_torch() -> str | None:
    """Why this machine gets torch instead of machine code, unless the user asked for it; None when it gets machine code."""
    if os.environ.get(ISA_VARIABLE) or host_isa().name != "torch":
        return None
    return NO_LLVM or f"this CPU ({llvm.get_host_cpu_name()}) has neither AVX2 with FMA nor NEON"


def current_isa() -> Isa:
    """`host_isa`, narrowed by the environment variable EXPLORER_ISA when it is set."""
    return host_isa(os.environ.get(ISA_VARIABLE) or None)


@cache
def l1_bytes() -> int:
    """Bytes of the level 1 data cache of one core; 32 KiB, the smallest of its time, when the system does not tell."""
    return _cache_bytes("1", "l1dcachesize") or 32 << 10


@cache
def l2_bytes() -> int:
    """Bytes of the level 2 cache of one core; 512 KiB when the system does not tell."""
    return _cache_bytes("2", "l2cachesize") or 512 << 10


def _cache_bytes(level: str, darwin_name: str) -> int:
    """Bytes of a core's data cache, 0 when unknown."""
    if sys.platform == "darwin":
        import ctypes

        size, length = ctypes.c_int64(0), ctypes.c_size_t(8)
        libc = ctypes.CDLL(None)
        for name in (f"hw.perflevel0.{darwin_name}", f"hw.{darwin_name}"):
            if libc.sysctlbyname(name.encode(), ctypes.byref(size), ctypes.byref(length), None, 0) == 0:
                return int(size.value)
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            here, kind, size_text = (
                (index / name).read_text(encoding="ascii").strip() for name in ("level", "type", "size")
            )
        except OSError:
            continue
        if here == level and kind in ("Data", "Unified") and size_text.endswith("K"):
            return int(size_text[:-1]) << 10
    return 0


def cache_folder() -> Path | None:
    """Where object code is kept; None when the user switched the cache off (EXPLORER_CACHE=off) or has no home."""
    root = cache_root()
    return None if root is None else root / "kernels"


GENERATED_WITH = ("activations.py", "layout.py", "native.py", "winograd.py")
"""What the generators import from this folder, and write into the code beyond what names a kernel."""


@cache
def generator_version() -> str:
    """A digest that changes when any generator's text or llvmlite does."""
    here = Path(__file__).parent
    digest = hashlib.sha256(f"llvmlite {llvmlite.__version__} {llvm.get_process_triple()}".encode())
    for source in sorted([*(here / name for name in GENERATED_WITH), *(here / "kernels").glob("*.py")]):
        digest.update(source.read_bytes())
    return digest.hexdigest()


def _at_once(path: str, flags: int) -> int:
    """Open what may be no file: a pipe would wait for who writes to it."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _is_ours(status: os.stat_result) -> bool:
    """Whether this is a file that only this user, or the system's, can have written: who writes an entry, with its seal, decides what this process runs."""
    if not stat.S_ISREG(status.st_mode):
        return False
    if os.name != "posix":
        return True
    return status.st_uid in (0, os.geteuid()) and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def read_own(path: Path) -> bytes | None:
    """What is in a file that nobody else can have written; None for any other, for what is no file, and for what cannot be read."""
    try:
        with open(path, "rb", opener=_at_once) as file:
            return file.read() if _is_ours(os.fstat(file.fileno())) else None
    except OSError:
        return None


class _ObjectFile:
    """One cached object: SHA-256 (32 bytes) of its key and the object code, then the object code.

    A cache is a convenience: whatever is wrong with it (cut short, another kernel's, a folder in its place, no permission, a full disk) costs some
    compile time, and nothing else.
    """

    def __init__(self, key: str) -> None:
        folder = cache_folder()
        self.key = key
        self.path = folder / f"{key}.o" if folder is not None else None

    def _seal(self, code: bytes) -> bytes:
        # With the key: a whole and valid object of another kernel or CPU, under this name, is as foreign as garbage.
        return hashlib.sha256(self.key.encode() + code).digest()

    def read(self) -> bytes | None:
        content = read_own(self.path) if self.path is not None else None
        if self.path is None or content is None:
            return None
        code = content[32:]
        if not code or self._seal(code) != content[:32]:
            return None
        with contextlib.suppress(OSError):
            os.utime(self.path)  # what is in use stays, see `held_below`
        return code

    def write(self, code: bytes) -> None:
        if self.path is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=self.path.parent, suffix=".tmp")
        except OSError:
            return
        unfinished = Path(name)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(self._seal(code) + code)
            unfinished.replace(self.path)
        except OSError:
            with contextlib.suppress(OSError):
                unfinished.unlink()
        _prune_once(self.path.parent)


@cache
def _prune_once(folder: Path) -> None:
    """Each process that compiles looks once: one scan of thousands of files per kernel would cost more than it saves."""
    held_below(folder, CACHE_LIMIT_BYTES, (".o", ".tmp"))


_lock = fork.EngineLock()
_loaded: dict[str, tuple[int, Any]] = {}


class Kernel(Protocol):
    """Names a native function and all that its code depends on besides the CPU: equal texts (``repr``) mean equal code."""

    def build(self, isa: Isa) -> tuple[Any, str]:
        """The llvmlite IR module and the symbol wanted. Called only when no cached object fits."""


def machine_code(isa: Isa, kernel: Kernel) -> int:
    """The address of a native function.

    Parameters
    ----------
    isa : Isa
        The CPU to generate for.
    kernel : Kernel

    Returns
    -------
    int
        Address; it stays valid as long as the process lives.
    """
    key = _key(isa, kernel)
    there = _loaded.get(key)
    if there is not None:
        return there[0]  # without waiting for what another thread compiles
    with _lock.inside():
        if key not in _loaded:
            with uninterrupted():
                _load(isa, kernel, key)
        return _loaded[key][0]


def _load(isa: Isa, kernel: Kernel, key: str) -> None:
    """Make a kernel's machine code, or find it on disk, and keep it in `_loaded`."""
    _initialise()
    cached = _ObjectFile(key)
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=isa.cpu, features=isa.features, opt=3, jit=True
    )
    symbol = "kernel"
    code = cached.read()
    if code is None:
        code = _emit(machine, kernel.build(isa), symbol)
        cached.write(code)
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    address = int(engine.get_function_address(symbol))
    if not address:
        raise EngineError(f"The kernel {kernel!r} was compiled but could not be loaded. Please report this.")
    _loaded[key] = (address, engine)


def _key(isa: Isa, kernel: Kernel) -> str:
    return hashlib.sha256(f"{generator_version()} {isa} {kernel!r}".encode()).hexdigest()


class Emitter:
    """Makes machine code on a thread of its own, while the caller packs weights: LLVM needs no interpreter. For ``with``, which waits for it."""

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def code(self, isa: Isa, kernel: Kernel) -> Callable[[], int]:
        """As `machine_code`, but what is returned waits for the address when it is called, and raises what went wrong."""
        there = _loaded.get(_key(isa, kernel))
        if there is not None:
            return lambda: there[0]
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, "explorer-emitter")
        return self._pool.submit(machine_code, isa, kernel).result


def _emit(machine: Any, built: tuple[Any, str], symbol: str) -> bytes:
    module, name = built
    module.globals[name].name = symbol
    text = str(module)
    parsed = llvm.parse_assembly(text)
    parsed.triple = llvm.get_process_triple()
    parsed.data_layout = str(machine.target_data)
    parsed.verify()
    # No optimisation pipeline: the generators write what they mean, and code generation alone is 4 x quicker.
    return bytes(machine.emit_object(parsed))


def assembly(isa: Isa, module: Any, triple: str | None = None) -> str:
    """The assembly text of an IR module, for tests that look at the hot loop (also for CPUs other than this one)."""
    _initialise()
    if triple is None:
        target, triple = llvm.Target.from_default_triple(), llvm.get_process_triple()
    else:
        llvm.initialize_all_targets()
        llvm.initialize_all_asmprinters()
        target = llvm.Target.from_triple(triple)
    machine = target.create_target_machine(cpu=isa.cpu, features=isa.features, opt=3, jit=False)
    parsed = llvm.parse_assembly(str(module))
    parsed.triple, parsed.data_layout = triple, str(machine.target_data)
    parsed.verify()
    return str(machine.emit_assembly(parsed))
