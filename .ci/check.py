"""Why this exists: `make check` runs every checker, also after one has failed, and says in one line each what it found."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
NOTEBOOKS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "notebooks").glob("*.ipynb"))

CHECKS: dict[str, list[str]] = {
    "lint (ruff check)": ["ruff", "check", "--output-format", "concise", "."],
    "format (ruff format)": ["ruff", "format", "--check", "--output-format", "concise", "."],
    "types (mypy)": ["mypy", "--no-error-summary"],
    "spelling (codespell)": ["codespell"],
    "notebooks hold no outputs (nbstripout)": ["nbstripout", "--verify", "--keep-id", *NOTEBOOKS],
}


def main() -> int:
    """Run the checks; the exit code is the number of those that failed."""
    failed = 0
    for title, (program, *arguments) in CHECKS.items():
        start = time.monotonic()
        done = subprocess.run(  # noqa: S603 - the programs are those of this environment, named above
            [str(BIN / program), *arguments],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
            stdin=subprocess.DEVNULL,
        )
        verdict = "ok" if done.returncode == 0 else "FAILED"
        print(f"{title:<40} {verdict:<6} {time.monotonic() - start:5.1f} s", flush=True)
        if done.returncode:
            failed += 1
            print(done.stdout + done.stderr, flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
