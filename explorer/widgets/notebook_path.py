"""Why this exists: the app is a notebook, and it lies in another place in a checkout than in an installed copy.

In a checkout it is `notebooks/explorer.ipynb`, beside the package, where people look for notebooks; the wheel carries the same file inside
this folder (`[tool.hatch.build.targets.wheel.sources]` in pyproject.toml).
"""

from __future__ import annotations

from pathlib import Path

from explorer.errors import FormatError

_NAME = "explorer.ipynb"


def app_notebook() -> Path:
    """Return the path of the notebook that is the app, in a checkout or in an installed copy.

    Returns
    -------
    Path
        An existing file.

    Raises
    ------
    FormatError
        If neither place has it: the installation is incomplete.
    """
    here = Path(__file__).resolve().parent
    places = (here / "notebooks" / _NAME, here.parents[1] / "notebooks" / _NAME)
    for place in places:
        if place.is_file():
            return place
    raise FormatError(
        f"The notebook of the app is in neither of {', '.join(map(str, places))}: this copy of sparsity-explorer is incomplete. "
        "Install it again, with its extra: pip install 'sparsity-explorer[app]'."
    )
