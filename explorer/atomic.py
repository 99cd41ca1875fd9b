"""Write a file completely or not at all: whoever opens it, or whatever interrupts us, never meets half of it."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

from explorer.errors import FormatError


def write_atomically(path: str | os.PathLike[str], content: bytes) -> None:
    """Write `content` to `path` by way of a temporary file beside it, which then takes its place.

    Parameters
    ----------
    path : path
        Its folder must exist; a file of that name is replaced.
    content : bytes
        The whole file.

    Raises
    ------
    FormatError
        If the folder does not exist or cannot be written to.
    """
    target = Path(path)
    # In the same folder, because a rename is atomic within one file system only.
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.part")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except OSError as error:
        raise FormatError(
            f"Cannot write {target}: {error.strerror or error}. Check that the folder exists and has room."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
