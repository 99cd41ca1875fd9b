"""What can go wrong, by name: every error that the user can act on is an `ExplorerError`.

A message says what was passed, what is accepted, and what to do next. Anything else that escapes is a bug of ours.
"""

from __future__ import annotations


class ExplorerError(Exception):
    """Base of all errors that this package raises on purpose."""


class ModelError(ExplorerError):
    """The model cannot be loaded, run or pruned as it was given."""


class DataError(ExplorerError):
    """The data cannot be loaded, or do not fit the model."""


class EngineError(ExplorerError):
    """The sparse CPU engine cannot capture, compile or run what it was given."""


class EngineWarning(UserWarning):
    """The sparse CPU engine works, but not as fast as one would expect of it; the message says why."""


class DistributionError(ExplorerError):
    """A sparsity distribution names an unknown layer, or a value that is out of range."""


class InfeasibleTarget(DistributionError):
    """No distribution within the bounds reaches the target; the message names the nearest one that is reachable."""


class RunError(ExplorerError):
    """A pruning run cannot start or cannot go on."""


class FormatError(ExplorerError):
    """A file is not what it should be."""
