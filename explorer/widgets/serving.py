"""How the app is served: one file of settings, and limits that keep several users from taking the machine from each other.

The settings that never change are in `jupyter/config/voila.json`, which is the only configuration that the server reads. Its reasons:

- `Voila.ip`: this machine alone, unless the command is told otherwise. `port_retries` is 0 because a server on another port than was
  asked for is not found. `open_browser` is off because the command opens the browser, at the address with the token. The page that asks
  for a token is ours, see `token_page.py`; nobody may set a password on it for those who come later.
- `Voila.tornado_settings`: one upload is one message; the 10 MB of the default close the connection without a word. A connection is asked
  every 5 s whether it still stands, and given up after three times: a machine that was switched off says no good-bye.
- `VoilaConfiguration`: our page, which no address may change, and no traceback on it.
- `UserKernels`: see `user_kernels.py`. Every 5 s it looks for kernels whose page has gone; 30 s are enough for a connection that was lost
  to be found again, 50 s for a page to be drawn on a slow machine, and both together with the 5 s are less than a minute. Jupyter's own
  culling of idle kernels stays on behind it.
- `KernelRestarter.restart_limit`: a kernel that was killed is not started again, since an empty one could answer nothing that is on the
  page; the page is told, and its place is free.

What depends on the machine or on the user's wish comes with the command line, which stands above the file.
"""

from __future__ import annotations

import ipaddress
import math
import os
import secrets
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from explorer.errors import ExplorerError
from explorer.widgets.page_template import with_template
from explorer.widgets.weights_desk import FOLDER_VARIABLE

CONFIG = Path(__file__).parent / "jupyter" / "config"
"""Folder of the configuration."""

GB = 10**9
LEAST_GB = 2.0
"""Memory that a page needs to work in: its kernel with torch and the demo takes 0.5 GB, in a run up to 1.5 (docs/results/app.txt)."""
MOST_USERS = 8
"""Most users by default: more than that is for somebody to decide who knows the machine."""
_SHARE = 0.8  # of the memory; the rest is for the system and the server

_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")


@dataclass(frozen=True, slots=True)
class UserLimits:
    """What one user may take, and how many there may be.

    Attributes
    ----------
    max_users : int
        Pages at once, each with a kernel of its own; at least 1.
    threads : int or None
        CPUs that a user's kernel may use; None for all.
    memory_gb : float or None
        Memory that a user's kernel may ask for, in GB of 10^9 bytes; None for no limit.
    """

    max_users: int
    threads: int | None
    memory_gb: float | None


def can_limit_memory() -> bool:
    """Return whether this system lets the server limit the memory of a kernel, which Linux does."""
    if sys.platform != "linux":
        return False
    import resource

    return hasattr(resource, "prlimit")


def machine_memory_gb() -> float | None:
    """Return the memory in GB that this machine, or the container around this process, has; None where it is not told."""
    try:
        found = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None
    try:
        allowed = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
    except OSError:
        allowed = "max"
    return min(found, int(allowed) if allowed.isdigit() else found) / GB


def usable_cores() -> int:
    """Return the number of CPUs that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def limits_for(
    max_users: int | None,
    threads: int | None,
    memory_gb: float | None,
    *,
    machine_gb: float | None,
    cores: int,
    limits_memory: bool,
) -> UserLimits:
    """Return what each user gets, filling in what was not asked for.

    Parameters
    ----------
    max_users, threads, memory_gb
        As in `UserLimits`; None to have it chosen.
    machine_gb : float or None
        Memory of the machine in GB, None when it is not known.
    cores : int
        CPUs of the machine.
    limits_memory : bool
        Whether a limit on memory can be enforced.

    Raises
    ------
    ExplorerError
        If a limit cannot be kept, or is too small to work in.

    Examples
    --------
    >>> limits_for(None, None, None, machine_gb=24.0, cores=2, limits_memory=True)
    UserLimits(max_users=4, threads=None, memory_gb=4.8)
    """
    if memory_gb is not None and not limits_memory:
        raise ExplorerError(
            "--memory-per-user needs Linux: this system does not let the server limit the memory of a kernel. "
            "Leave it out, and set --max-users so that all fit."
        )
    if memory_gb is not None and not LEAST_GB <= memory_gb < math.inf:
        raise ExplorerError(
            f"--memory-per-user is {memory_gb:g} GB; a page with torch and the demo needs {LEAST_GB:g} GB, give at least that."
        )
    if threads is not None and threads > cores:
        raise ExplorerError(
            f"--threads-per-user is {threads}, and there are {cores} CPUs; give at most that."
        )
    if max_users is None:
        each = LEAST_GB if memory_gb is None else memory_gb
        by_memory = MOST_USERS if machine_gb is None else int(_SHARE * machine_gb / each)
        # A user who thinks leaves the CPU to another: two share one well.
        max_users = max(1, min(by_memory, 2 * cores, MOST_USERS))
    if memory_gb is None and machine_gb is not None and limits_memory:
        memory_gb = max(LEAST_GB, math.floor(10 * _SHARE * machine_gb / max_users) / 10)
    return UserLimits(max_users, threads, memory_gb)


def describe(limits: UserLimits) -> str:
    """Return the limits as a sentence.

    Examples
    --------
    >>> describe(UserLimits(4, 1, 4.8))
    'Up to 4 users at once, each with 1 thread and 4.8 GB of memory.'
    """
    users = "1 user" if limits.max_users == 1 else f"{limits.max_users} users at once"
    threads = "all CPUs" if limits.threads is None else f"{limits.threads} thread{'s' * (limits.threads > 1)}"
    memory = (
        "memory that this system cannot limit"
        if limits.memory_gb is None
        else f"{limits.memory_gb:g} GB of memory"
    )
    return f"Up to {users}, {'' if limits.max_users == 1 else 'each '}with {threads} and {memory}."


def is_loopback(host: str) -> bool:
    """Return whether `host` names this machine to itself alone.

    Examples
    --------
    >>> is_loopback("localhost"), is_loopback("::1"), is_loopback("0.0.0.0")
    (True, True, False)
    """
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def checked_token(host: str, token: str | None) -> str:
    """Return the token that pages must bring: `token`, a new one where it is empty, and none (an empty text) where it is None.

    Raises
    ------
    ExplorerError
        If others could reach the app without a token, or if the token cannot stand in an address.
    """
    if token is None:
        if not is_loopback(host):
            raise ExplorerError(
                f"--host {host} lets others open the app, which runs code on this machine; add --token, so that only those with the "
                "address can. Connections are not encrypted: use it in a network that you trust, or behind a proxy that encrypts."
            )
        return ""
    if not token:
        return secrets.token_urlsafe(24)
    if len(token) < 8 or not all(c.isascii() and (c.isalnum() or c in "-_.~") for c in token):
        raise ExplorerError(
            "The token must have at least 8 letters, digits, or - _ . ~; give another one, or --token alone for a random one."
        )
    return token


def address(host: str, port: int, token: str) -> str:
    """Return the address of the app for a browser on this machine.

    Examples
    --------
    >>> address("::1", 8866, "")
    'http://[::1]:8866/'
    """
    if host in ("0.0.0.0", "::", ""):  # noqa: S104 - compared, not bound
        import socket

        host = socket.gethostname()
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{port}/{f'?token={token}' if token else ''}"


def server_command(
    notebook: Path,
    port: int,
    *,
    host: str = "127.0.0.1",
    limits: UserLimits | None = None,
    token: bool = False,
) -> list[str]:
    """Return the command that serves `notebook`; run it in `server_environment`.

    Parameters
    ----------
    notebook : Path
    port : int
    host : str
        Address to listen on.
    limits : UserLimits, optional
        Without them, as many users as come.
    token : bool
        Whether pages must bring a token; the environment has it, since every user of the machine can read a command.
    """
    command = [
        sys.executable,
        "-m",
        "voila",
        str(notebook),
        f"--Voila.config_file_paths={CONFIG}",
        f"--Voila.ip={host}",
        f"--Voila.port={port}",
    ]
    if token:
        command.append("--Voila.auto_token=True")
    if limits is not None:
        command.append(f"--UserKernels.max_users={limits.max_users}")
        if limits.threads is not None:
            command.append(f"--UserKernels.threads={limits.threads}")
        if limits.memory_gb is not None:
            command.append(f"--UserKernels.memory_gb={limits.memory_gb}")
    return command


def server_environment(
    environment: Mapping[str, str], token: str = "", weights_folder: str | None = None
) -> dict[str, str]:
    """Return `environment` with what the server needs: the folder of the page's template, the token, and the folder of weights.

    Raises
    ------
    ExplorerError
        If the folder of weights is none.
    """
    served = with_template(environment)
    if weights_folder is not None:
        # Kernels have a working folder of their own.
        folder = Path(weights_folder).resolve()
        if not folder.is_dir():
            raise ExplorerError(
                f"There is no folder {weights_folder}; name one that holds safetensors files."
            )
        served[FOLDER_VARIABLE] = str(folder)
    for name in ("JUPYTER_TOKEN", "JUPYTER_TOKEN_FILE"):
        served.pop(name, None)
    return {**served, "JUPYTER_TOKEN": token} if token else served


def kernel_environment(environment: Mapping[str, str], threads: int | None) -> dict[str, str]:
    """Return the environment of a user's kernel: as many threads as it may use, and without the token of all users.

    Examples
    --------
    >>> kernel_environment({"JUPYTER_TOKEN": "secret"}, 1)["OMP_NUM_THREADS"]
    '1'
    """
    kept = {name: value for name, value in environment.items() if not name.startswith("JUPYTER_TOKEN")}
    return kept if threads is None else {**kept, **dict.fromkeys(_THREAD_VARIABLES, str(threads))}
