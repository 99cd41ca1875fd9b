"""`python -m explorer.bench`, which is `make bench`: what this engine does on this machine, as a table.

`engines` (the default) times one network in every engine; `prediction` compares predicted with measured speed-ups of many distributions.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from explorer.bench import prediction
from explorer.bench.engines import machine, table, time_engines
from explorer.bench.foreign import FOREIGN, parse
from explorer.bench.networks import NETWORKS, load_network
from explorer.errors import ExplorerError
from explorer.study import Study


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; 0 when it is done, 1 when an engine fails."""
    parser = argparse.ArgumentParser(
        prog="python -m explorer.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", nargs="?", choices=("engines", "prediction"), default="engines")
    parser.add_argument(
        "--model",
        default="demo:fashion-resnet",
        help=f"the demo, or one of {', '.join(NETWORKS)} with random weights (default: %(default)s)",
    )
    parser.add_argument("--data", default="demo:fashion", help="for `prediction` (default: %(default)s)")
    parser.add_argument(
        "--sparsity", type=float, nargs="+", default=[0.8, 0.9, 0.95], metavar="S", help="fractions in [0, 1)"
    )
    parser.add_argument("--threads", type=int, default=1, help="threads of every engine (default: 1)")
    parser.add_argument("--batch-size", type=int, default=1, help="samples in one call (default: 1)")
    parser.add_argument(
        "--engine",
        nargs="+",
        default=[],
        metavar="NAME=PYTHON",
        help=f"also time these engines, each in a process of the Python that has it installed: {', '.join(FOREIGN)}",
    )
    options = parser.parse_args(arguments)
    if options.threads < 1 or options.batch_size < 1 or not all(0 <= s < 1 for s in options.sparsity):
        parser.error("--threads and --batch-size are at least 1, --sparsity is a fraction from 0 to below 1")
    torch.set_num_threads(options.threads)
    try:
        if options.what == "prediction":
            return _prediction(options)
        model, network = load_network(options.model)
        example = model.example_input[:1].repeat(options.batch_size, *[1] * (model.example_input.dim() - 1))
        print(f"{model.name} on {machine()}")
        print(
            f"{options.threads} thread(s), batch {options.batch_size}; pruned by magnitude: {network.rule};"
        )
        print(
            "median of alternating turns, ± half the distance between the quartiles; speed-up over the fastest dense one."
        )
        timings = time_engines(
            model,
            example,
            sparsities=options.sparsity,
            threads=options.threads,
            foreign=[parse(text) for text in options.engine],
            layers=network.pruned(model.layers),
        )
        print(table(list(timings)))
    except ExplorerError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    return 0


def _prediction(options: argparse.Namespace) -> int:
    if options.model in NETWORKS:
        print(
            f"Error: {options.model} comes without data, on which the solved distributions depend; use the demo.",
            file=sys.stderr,
        )
        return 1
    study = Study(options.model, options.data, threads=options.threads, batch_size=options.batch_size)
    print(f"{study.model.name} on {machine()}")
    print(
        f"{options.threads} thread(s), batch {options.batch_size}; speed-ups over the fastest dense run, in turn with it"
    )
    print(prediction.table(list(prediction.check_predictions(study))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
