"""From LLVM IR to machine code on the user's own CPU, and the cache that makes the second time quick.

Object code is cached on disk by the text of the kernel generators, the kernel's signature, the CPU's name and features and llvmlite's
version. An entry carries the SHA-256 of its content; one that does not match (cut short, altered, foreign) is compiled again.
"""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import llvmlite
import llvmlite.binding as llvm

from explorer.errors import EngineError

ISA_VARIABLE = "EXPLORER_ISA"


@dataclass(frozen=True, slots=True)
class Isa:
    """What the kernel generators must know of a CPU.

    Attributes
    ----------
    name : str
        "avx512", "avx2", "neon" or "generic".
    lanes : int
        float32 values in one vector register.
    registers : int
        Vector registers.
    cpu, features : str
        As LLVM wants them. The features are passed beside the name, since LLVM knows some virtual CPUs by a wrong name.
    """

    name: str
    lanes: int
    registers: int
    cpu: str
    features: str


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
        "avx512", "avx2", "neon" or "generic": generate code for this instead (to test one generator's code for several CPUs).

    Raises
    ------
    EngineError
        When this CPU cannot run what was asked for.
    """
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
        possible["neon"] = Isa("neon", 4, 32, cpu, flat)
    possible["generic"] = Isa("generic", 4, 16, "", "") if not possible else Isa("generic", 4, 16, cpu, flat)
    wanted = override or next(iter(possible))
    if wanted not in possible:
        raise EngineError(
            f"This CPU ({cpu}) cannot run {wanted!r} code. It can run: {', '.join(possible)}. Unset {ISA_VARIABLE} to use the widest."
        )
    return possible[wanted]


def current_isa() -> Isa:
    """`host_isa`, narrowed by the environment variable EXPLORER_ISA when it is set."""
    return host_isa(os.environ.get(ISA_VARIABLE) or None)


@cache
def l1_bytes() -> int:
    """Bytes of the level 1 data cache of one core; 32 KiB, the smallest of its time, when the system does not tell."""
    if sys.platform == "darwin":
        import ctypes

        size, length = ctypes.c_int64(0), ctypes.c_size_t(8)
        libc = ctypes.CDLL(None)
        for name in (b"hw.perflevel0.l1dcachesize", b"hw.l1dcachesize"):
            if libc.sysctlbyname(name, ctypes.byref(size), ctypes.byref(length), None, 0) == 0:
                return int(size.value)
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            level, kind, size_text = (
                (index / name).read_text(encoding="ascii").strip() for name in ("level", "type", "size")
            )
        except OSError:
            continue
        if level == "1" and kind in ("Data", "Unified") and size_text.endswith("K"):
            return int(size_text[:-1]) << 10
    return 32 << 10


def cache_folder() -> Path | None:
    """Where object code is kept; None when the user switched the cache off (EXPLORER_CACHE=off)."""
    setting = os.environ.get("EXPLORER_CACHE")
    if setting == "off":
        return None
    if setting:
        return Path(setting) / "kernels"
    if sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    elif sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "sparsity-explorer" / "kernels"


@cache
def generator_version() -> str:
    """A digest that changes when any generator's text or llvmlite does."""
    digest = hashlib.sha256(f"llvmlite {llvmlite.__version__} {llvm.get_process_triple()}".encode())
    for source in sorted([Path(__file__), *(Path(__file__).parent / "kernels").glob("*.py")]):
        digest.update(source.read_bytes())
    return digest.hexdigest()


class _ObjectFile:
    """One cached object: 32 bytes of SHA-256, then the object code."""

    def __init__(self, key: str) -> None:
        folder = cache_folder()
        self.path = folder / f"{key}.o" if folder is not None else None

    def read(self) -> bytes | None:
        if self.path is None:
            return None
        try:
            content = self.path.read_bytes()
        except OSError:
            return None
        code = content[32:]
        return code if code and hashlib.sha256(code).digest() == content[:32] else None

    def write(self, code: bytes) -> None:
        if self.path is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=self.path.parent)
            with os.fdopen(handle, "wb") as file:
                file.write(hashlib.sha256(code).digest() + code)
            Path(name).replace(self.path)
        except OSError:
            # A full or read-only disk costs the next process some compile time, nothing else.
            return


_lock = threading.Lock()
_loaded: dict[str, tuple[int, Any]] = {}


def machine_code(isa: Isa, signature: str, build: Callable[[], tuple[Any, str]]) -> int:
    """The address of a native function.

    Parameters
    ----------
    isa : Isa
        The CPU to generate for.
    signature : str
        Names the kernel and all its parameters; equal signatures mean equal code.
    build : callable
        Returns the llvmlite IR module and the symbol wanted. Called only when no cached object fits.

    Returns
    -------
    int
        Address; it stays valid as long as the process lives.
    """
    text = f"{generator_version()} {isa} {signature}"
    key = hashlib.sha256(text.encode()).hexdigest()
    with _lock:
        if key in _loaded:
            return _loaded[key][0]
        _initialise()
        cached = _ObjectFile(key)
        machine = llvm.Target.from_default_triple().create_target_machine(
            cpu=isa.cpu, features=isa.features, opt=3, jit=True
        )
        symbol = "kernel"
        code = cached.read()
        if code is None:
            code = _emit(machine, build, symbol)
            cached.write(code)
        engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
        engine.add_object_file(llvm.ObjectFileRef.from_data(code))
        engine.finalize_object()
        address = int(engine.get_function_address(symbol))
        if not address:
            raise EngineError(
                f"The kernel {signature!r} was compiled but could not be loaded. Please report this."
            )
        _loaded[key] = (address, engine)
        return address


def _emit(machine: Any, build: Callable[[], tuple[Any, str]], symbol: str) -> bytes:
    module, name = build()
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
