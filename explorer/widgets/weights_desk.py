"""Weights that are brought to the page: sent by it piece by piece, or picked from a folder of the server.

A file that comes in goes to a temporary file, and is opened only when all of it is there. What was on the page before stays within reach: `back` brings it again
with everything that was measured.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import traitlets as t

from explorer.errors import ExplorerError, FormatError
from explorer.widgets.documents import told_bytes
from explorer.widgets.sharing import model_key
from explorer.widgets.texts import phrase

if TYPE_CHECKING:
    from explorer.widgets.state import ExplorerState

MOST_BYTES = 10**9
"""Largest file that a page sends; larger ones are picked from a folder of the server."""

FOLDER_VARIABLE = "SPARSITY_EXPLORER_WEIGHTS_FOLDER"
"""Names the folder of the server for the kernels of the app, see `sparsity-explorer app --weights-folder`."""

SUFFIX = ".safetensors"

_NOT_PLAIN = re.compile(r"[^\w. ()+-]|^\.+")
_LONGEST_NAME = 80


@dataclass(frozen=True, slots=True)
class ServerFile:
    """A file of weights in the server's folder; `modified` in seconds since 1970."""

    name: str
    size: int
    modified: float


class IncomingFile:
    """A file that arrives in pieces, in order.

    Parameters
    ----------
    folder : path
        Where it is kept.
    name : str
        What the sender calls it, a plain name.
    size : int
        Bytes in all.
    """

    def __init__(self, folder: Path, name: str, size: int) -> None:
        self.name, self.size, self.received = name, size, 0
        # In a folder of its own under the name that the user knows, which errors tell.
        self.path = Path(tempfile.mkdtemp(dir=folder)) / name
        self._file = self.path.open("wb")

    @property
    def is_complete(self) -> bool:
        """Whether all of it is there."""
        return self.received == self.size

    def add(self, offset: int, piece: bytes) -> None:
        """Append the piece that begins at `offset`.

        Raises
        ------
        FormatError
            If it is not the next one, or is longer than what is missing.
        """
        if offset != self.received or len(piece) > self.size - self.received or not piece:
            raise FormatError(phrase("weights.out_of_order", name=self.name))
        self._file.write(piece)
        self.received += len(piece)
        if self.is_complete:
            self._file.close()

    def discard(self) -> None:
        """Remove it."""
        self._file.close()
        remove(self.path)


def remove(path: Path) -> None:
    """Remove a file that came in, and the folder that it has to itself."""
    shutil.rmtree(path.parent, ignore_errors=True)


@dataclass(frozen=True, slots=True)
class _Former:
    """What was on the page before other weights came."""

    study: Any
    key: int
    distribution: Any
    origin: str
    current: str
    runs: tuple[Any, ...]
    run: Any


class WeightsDesk(t.HasTraits):
    """Brings weights of the architecture on the page.

    Parameters
    ----------
    state : ExplorerState
    folder : path, optional
        Files of the server that may be picked; by default what `FOLDER_VARIABLE` names.
    """

    current = t.Unicode("")
    """Name of the file whose weights are on the page; empty for those that the model came with."""
    name = t.Unicode("")
    """Name of the file that is being sent, or waits to be opened."""
    received = t.Int(0)
    """Bytes of it that are there."""
    size = t.Int(0)
    """Bytes of it in all."""
    is_waiting = t.Bool(False)
    """Whether all of it is there and it is not open: something else was going on."""
    former = t.Instance(_Former, allow_none=True, default_value=None)
    """What was on the page before, as long as it can be brought back."""
    files = t.Tuple()
    """Tuple of `ServerFile`, by name."""

    def __init__(self, state: ExplorerState, folder: str | os.PathLike[str] | None = None) -> None:
        super().__init__()
        self._state = weakref.ref(state)
        found = folder if folder is not None else os.environ.get(FOLDER_VARIABLE)
        self.folder = Path(found) if found else None
        self._incoming: IncomingFile | None = None
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._mine: Any = state.study
        self.list_files()
        state.observe(self._study_changed, names=["study"])

    @property
    def state(self) -> ExplorerState:
        """The state of the page."""
        state = self._state()
        assert state is not None
        return state

    @property
    def can_return(self) -> bool:
        """Whether what was on the page before can be brought back."""
        return self.former is not None

    # What the page sends

    def begin(self, name: str, size: int) -> None:
        """Make ready for a file; one that was on its way is forgotten.

        Raises
        ------
        ExplorerError
            If nothing can be opened now, or the file is too large.
        """
        self.state.idle_study()
        self.cancel()
        name = _plain(name)
        if size > MOST_BYTES or size < 1:
            raise FormatError(
                phrase("weights.too_large", name=name, size=told_bytes(size), limit=told_bytes(MOST_BYTES))
            )
        if self._temporary is None:
            self._temporary = _temporary_folder()
        free = shutil.disk_usage(self._temporary.name).free
        # It is read into memory too, but memory has a limit and an error of its own.
        if size > free:
            raise ExplorerError(
                phrase("weights.no_room", name=name, size=told_bytes(size), free=told_bytes(free))
            )
        self._incoming = IncomingFile(Path(self._temporary.name), name, size)
        self.name, self.size, self.received = name, size, 0

    def add(self, offset: int, piece: bytes) -> int:
        """Take the next piece, and return how many bytes are there; the last one opens the file, if nothing else goes on."""
        incoming = self._incoming
        if incoming is None:
            raise FormatError(phrase("weights.none_on_its_way"))
        try:
            incoming.add(offset, piece)
        except (OSError, FormatError):
            self.cancel()
            raise
        self.received = incoming.received
        if incoming.is_complete:
            self.is_waiting = True
            if not self.state.job.busy:
                self.open()
        return incoming.received

    def cancel(self) -> None:
        """Forget the file that is on its way or waits."""
        if self._incoming is not None:
            self._incoming.discard()
        self._incoming = None
        self.name, self.size, self.received, self.is_waiting = "", 0, 0, False

    def open(self) -> None:
        """Put the weights of the file that waits on the page."""
        incoming = self._incoming
        if incoming is None or not incoming.is_complete:
            raise FormatError(phrase("weights.none_on_its_way"))
        self.state.idle_study()
        # From here on the file is the worker's.
        self._incoming = None
        self.cancel()
        self._show(incoming.path, incoming.name, passing=True)

    # What the server has

    def list_files(self) -> None:
        """Look at the folder of the server again."""
        found = []
        for path in sorted(self.folder.glob(f"*{SUFFIX}")) if self.folder is not None else []:
            # Others may take files away, or the right to look, at any moment.
            with contextlib.suppress(OSError):
                if self._is_inside(path):
                    about = path.stat()
                    found.append(ServerFile(path.name, about.st_size, about.st_mtime))
        self.files = tuple(found)

    def pick(self, name: str) -> None:
        """Put the weights of a file of the server on the page.

        Raises
        ------
        FormatError
            If the folder has no such file.
        """
        self.list_files()
        if self.folder is None or name not in {file.name for file in self.files}:
            raise FormatError(phrase("weights.not_there", name=name))
        self._show(self.folder / name, name)

    def _is_inside(self, path: Path) -> bool:
        """Whether it is a file of the folder itself, and no link to somewhere else."""
        assert self.folder is not None
        return path.is_file() and path.resolve().parent == self.folder.resolve()

    # Showing them

    def back(self) -> None:
        """Bring back what was on the page before, with everything that was measured of it."""
        former = self.former
        if former is None:
            return
        state = self.state
        state.idle_study()
        self.former, self._mine = None, former.study
        state.adopt_again(former.study, former.key, former.distribution, former.origin)
        state.runs, state.run = former.runs, former.run
        self.current = former.current

    def _show(self, path: Path, name: str, *, passing: bool = False) -> None:
        """Open a file; one that is `passing` is removed then, whether it fits or not."""
        state = self.state
        before = state.idle_study()
        former = _Former(
            before, state.key, state.distribution, state.origin, self.current, state.runs, state.run
        )
        called = f"{before.model.name.removesuffix(_addition(self.current))}{_addition(name)}"

        def make() -> Any:
            try:
                return before.with_weights(path, name=called)
            finally:
                if passing:
                    remove(path)

        def finished(study: Any) -> None:
            self.former, self._mine = former, study
            state.adopt_again(study, model_key(str(former.key), name))
            self.current = name

        state.make_study(phrase("job.weights", name=name), make, finished)

    def _study_changed(self, _change: object) -> None:
        """Forget what belonged to another model."""
        if self.state.study is not self._mine:
            self.former, self._mine = None, self.state.study
            self.current = ""


def _addition(name: str) -> str:
    """What the name of a file adds to that of the model; nothing for the model's own weights."""
    return f" · {name}" if name else ""


def _plain(name: str) -> str:
    """What is kept of a name that came from a page: no path, nothing that cannot be read, and not too long."""
    return _NOT_PLAIN.sub("_", name.replace("\\", "/").rpartition("/")[2])[-_LONGEST_NAME:] or SUFFIX


def _is_running(process: int) -> bool:
    """Whether there is such a process; True where that cannot be asked without harm."""
    if os.name != "posix":
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _temporary_folder() -> tempfile.TemporaryDirectory[str]:
    """A folder for what comes in. A kernel may be ended at any moment: what others left, whose process is gone, is removed."""
    prefix = "sparsity-explorer-weights-"
    for left in Path(tempfile.gettempdir()).glob(f"{prefix}*-*"):
        owner = left.name.removeprefix(prefix).partition("-")[0]
        if owner.isdigit() and not _is_running(int(owner)):
            shutil.rmtree(left, ignore_errors=True)
    return tempfile.TemporaryDirectory(prefix=f"{prefix}{os.getpid()}-")
