"""`python -m explorer.bench`, which is `make bench`: the same as `sparsity-explorer bench`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from explorer.bench.command import FAILED, add_options, run
from explorer.errors import ExplorerError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit codes are those of `explorer.bench.command.run`, and 2 for an error before it."""
    parser = argparse.ArgumentParser(
        prog="python -m explorer.bench", description="Time this engine beside the alternatives."
    )
    add_options(parser)
    parsed = parser.parse_args(arguments)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded, see `explorer.cli.main`
    try:
        return run(parsed)
    except ExplorerError as error:
        print(f"Error: {error}", file=sys.stderr)
        return FAILED


if __name__ == "__main__":
    sys.exit(main())
