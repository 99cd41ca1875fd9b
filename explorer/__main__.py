"""Lets `python -m explorer` be the same as `sparsity-explorer`, also where scripts are not on the path."""

from __future__ import annotations

import sys

from explorer.cli import main

if __name__ == "__main__":
    sys.exit(main())
