"""Makes the bundled subset from the full Fashion-MNIST; kept so that anybody can make it anew and compare.

Run ``python -m explorer.data.demo.build``. The choice of images is fixed by `explorer.data.split`, and the file holds no time stamps:
the same zlib makes the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from explorer.data.fashion_mnist import CLASSES, SHA256, find_folder, read_split
from explorer.data.split import SPLIT_SEED, demo_split

__all__ = ["build", "main"]


def _sha256(array: NDArray[np.generic]) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def build(source: Path, out: Path) -> Path:
    """Write ``fashion.npz`` and ``fashion.json``.

    Parameters
    ----------
    source : Path
        Folder of the four original files.
    out : Path
        Existing folder.

    Returns
    -------
    Path
        Of the npz file.
    """
    train_images, train_labels = read_split(source, "train")
    test_images, test_labels = read_split(source, "test")
    split = demo_split(train_labels, test_labels)
    arrays: dict[str, NDArray[np.generic]] = {}
    parts = (
        ("train", train_images, train_labels, split.train),
        ("validation", train_images, train_labels, split.validation),
        ("test", test_images, test_labels, split.test),
    )
    for part, images, labels, index in parts:
        arrays[f"{part}_images"] = images[index]
        arrays[f"{part}_labels"] = labels[index]
        arrays[f"{part}_index"] = index.astype(np.int32)
    path = out / "fashion.npz"
    np.savez_compressed(path, **arrays)  # type: ignore[arg-type]  # numpy's stub takes the arrays for its option allow_pickle
    provenance = {
        "name": "fashion",
        "source": "Fashion-MNIST, https://github.com/zalandoresearch/fashion-mnist, arXiv:1708.07747",
        "licence": "MIT, Copyright 2017 Zalando SE (see LICENSE-fashion-mnist.txt)",
        "command": "python -m explorer.data.demo.build",
        "split_seed": SPLIT_SEED,
        "classes": list(CLASSES),
        "images": {part: len(index) for part, _, _, index in parts},
        "images_per_class": {part: len(index) // len(CLASSES) for part, _, _, index in parts},
        "held_out": "the validation images are not among those that demo:fashion-resnet was trained on",
        "source_sha256": SHA256,
        "array_sha256": {name: _sha256(array) for name, array in arrays.items()},
    }
    (out / "fashion.json").write_text(json.dumps(provenance, indent=2) + "\n", encoding="utf-8")
    return path


def main(argv: list[str] | None = None) -> None:
    """Find the full data, write the subset, say how large it is."""
    parser = argparse.ArgumentParser(
        prog="python -m explorer.data.demo.build", description="Make the bundled images."
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).parent,
        help="folder to write to (default: the bundled demo)",
    )
    parser.add_argument("--root", type=Path, default=None, help="folder of the Fashion-MNIST files")
    parser.add_argument("--download", action="store_true", help="download Fashion-MNIST when it is not found")
    args = parser.parse_args(argv)
    path = build(find_folder(args.root, download=args.download), args.out)
    print(f"wrote {path}, {path.stat().st_size / 1e6:.1f} MB")  # noqa: T201 - a script


if __name__ == "__main__":
    main()
