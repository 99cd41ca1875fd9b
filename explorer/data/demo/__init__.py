"""The bundled images: a fixed, class-balanced part of Fashion-MNIST, so that the demo needs no network.

``fashion.npz`` holds uint8 images, labels and their positions in the original files; ``fashion.json`` says where they come from;
``build.py`` is the script that made both.
"""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from explorer.errors import DataError

__all__ = ["PARTS", "read_demo"]

PARTS = ("train", "validation", "test")
_PATH = Path(__file__).parent / "fashion.npz"


def read_demo(path: Path = _PATH) -> dict[str, NDArray[np.generic]]:
    """Read the bundled arrays.

    Parameters
    ----------
    path : Path

    Returns
    -------
    dict
        For each part of `PARTS`: ``{part}_images (N, 28, 28) uint8``, ``{part}_labels (N,) uint8``, and ``{part}_index (N,) int32``,
        the positions in the original file (60,000 for train and validation, 10,000 for test).

    Raises
    ------
    DataError
        When the bundled file is missing or damaged.
    """
    wanted = [f"{part}_{field}" for part in PARTS for field in ("images", "labels", "index")]
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in wanted}
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(
            f"the demo images {path} cannot be used ({error}); install the package again, or make them with "
            "'python -m explorer.data.demo.build'."
        ) from error
