"""`python -m explorer.bench`, which is `make bench`: time one network in every engine on this machine and print the table."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from explorer.bench.engines import machine, table, time_engines
from explorer.errors import ExplorerError
from explorer.models import LoadedModel, architectures, load_model

NETWORKS = ("resnet18", "resnet50", "mobilenet_v2", "vgg11")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; 0 when it is done, 1 when an engine fails."""
    parser = argparse.ArgumentParser(prog="python -m explorer.bench", description=__doc__)
    parser.add_argument(
        "--model",
        default="demo:fashion-resnet",
        help=f"the demo, or one of {', '.join(NETWORKS)} with random weights at 224 x 224 (default: %(default)s)",
    )
    parser.add_argument(
        "--sparsity", type=float, nargs="+", default=[0.8, 0.9, 0.95], metavar="S", help="fractions in [0, 1)"
    )
    parser.add_argument("--threads", type=int, default=1, help="threads of every engine (default: 1)")
    parser.add_argument("--batch-size", type=int, default=1, help="samples in one call (default: 1)")
    options = parser.parse_args(arguments)
    if options.threads < 1 or options.batch_size < 1 or not all(0 <= s < 1 for s in options.sparsity):
        parser.error("--threads and --batch-size are at least 1, --sparsity is a fraction from 0 to below 1")
    try:
        model = _load(options.model)
        example = model.example_input[:1].repeat(options.batch_size, *[1] * (model.example_input.dim() - 1))
        print(f"{model.name} on {machine()}")
        print(
            f"{options.threads} thread(s), batch {options.batch_size}; pruned by magnitude, first and last layer dense;"
        )
        print(
            "median of alternating turns, ± half the distance between the quartiles; speed-up over the fastest dense one."
        )
        print(table(list(time_engines(model, example, sparsities=options.sparsity, threads=options.threads))))
    except ExplorerError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    return 0


def _load(name: str) -> LoadedModel:
    if name in NETWORKS:
        torch.manual_seed(0)
        return load_model(getattr(architectures, name)(), torch.randn(1, 3, 224, 224), name=name)
    return load_model(name)


if __name__ == "__main__":
    sys.exit(main())
