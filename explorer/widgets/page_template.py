"""The page that Voila puts around the app: its own template, found through an environment variable.

Voila's template links an icon font on another host. The app does not need it, must not ask anything of another host, and would wait
for it where there is no network.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

TEMPLATE = "explorer"
"""Name of the template, for `--VoilaConfiguration.template`."""


def with_template(environment: Mapping[str, str]) -> dict[str, str]:
    """Return `environment` with the folder of the template on Jupyter's search path.

    Examples
    --------
    >>> with_template({"JUPYTER_PATH": "/mine"})["JUPYTER_PATH"].split(os.pathsep)[1]
    '/mine'
    """
    places = [str(Path(__file__).parent / "jupyter"), environment.get("JUPYTER_PATH", "")]
    return {**environment, "JUPYTER_PATH": os.pathsep.join(place for place in places if place)}
