"""Trains the demo network and writes its weights and their provenance; kept so that nobody has to believe a binary file.

Run ``python -m explorer.models.demo.train`` to make ``fashion-resnet.safetensors`` and ``fashion-resnet.json`` anew: SGD with
Nesterov momentum, warm-up and cosine learning rate, random flip and a shift of one pixel. The images are the 60,000 training images of
Fashion-MNIST but the 2,000 that `explorer.data.split` holds out; the 10,000 test images are looked at once, at the end.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from explorer.data.augment import flip_and_shift
from explorer.data.fashion_mnist import find_folder, normalise, read_split
from explorer.data.split import SPLIT_SEED, demo_split
from explorer.memory import pages_kept
from explorer.models.architectures.fashion import FashionResNet
from explorer.models.memory_format import training_memory_format

__all__ = ["learning_rate_at", "main", "train"]

NAME = "fashion-resnet"


def learning_rate_at(step: int, total_steps: int, peak: float, warmup: float) -> float:
    """Learning rate of one step: linear from near 0 to `peak` over the share `warmup` of the run, then half a cosine to 0.

    >>> [round(learning_rate_at(step, 10, 0.2, 0.2), 3) for step in (0, 1, 5, 9)]
    [0.1, 0.2, 0.138, 0.008]
    """
    warmup_steps = max(1, round(total_steps * warmup))
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return peak * 0.5 * (1.0 + math.cos(math.pi * progress))


@torch.inference_mode()
def _accuracy(model: nn.Module, inputs: Tensor, labels: Tensor) -> float:
    model.eval()
    right = sum(
        int((model(x).argmax(1) == y).sum())
        for x, y in zip(inputs.split(500), labels.split(500), strict=True)
    )
    return right / len(labels)


def train(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    validation: tuple[Tensor, Tensor],
    *,
    epochs: int,
    batch_size: int,
    peak_learning_rate: float,
    weight_decay: float,
    warmup: float,
    seed: int,
    checkpoint: Path,
) -> float:
    """Train in place, print one line an epoch, and leave the weights at `checkpoint` after each epoch.

    Parameters
    ----------
    model : nn.Module
    inputs : Tensor, (N, 1, 28, 28) float32
    labels : Tensor, (N,) int64
    validation : tuple of Tensor
        Held-out inputs and labels; shown, and used for nothing else.
    epochs, batch_size : int
    peak_learning_rate, weight_decay : float
    warmup : float
        Share of the run in which the learning rate grows.
    seed : int
        Of the order of the images and of their augmentation.
    checkpoint : Path

    Returns
    -------
    float
        Accuracy on the validation images after the last epoch.
    """
    generator = torch.Generator().manual_seed(seed)
    memory_format = training_memory_format(model, inputs)
    model.to(memory_format=memory_format)  # type: ignore[call-overload]  # missing in torch's stub
    # Biases and batch-norm gains are not decayed: they are few, and shrinking them only slows the fit.
    decayed = [p for p in model.parameters() if p.ndim > 1]
    free = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]
    optimiser = torch.optim.SGD(groups, lr=peak_learning_rate, momentum=0.9, nesterov=True)
    n_batches = len(labels) // batch_size
    total_steps, step, accuracy = epochs * n_batches, 0, 0.0
    for epoch in range(epochs):
        model.train()
        order = torch.randperm(len(labels), generator=generator)
        started, sum_loss = time.perf_counter(), 0.0
        for i in range(n_batches):
            chosen = order[i * batch_size : (i + 1) * batch_size]
            x = flip_and_shift(inputs[chosen], generator).contiguous(memory_format=memory_format)
            for group in optimiser.param_groups:
                group["lr"] = learning_rate_at(step, total_steps, peak_learning_rate, warmup)
            loss = functional.cross_entropy(model(x), labels[chosen])
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            sum_loss += loss.item()
            step += 1
        seconds = time.perf_counter() - started
        accuracy = _accuracy(model, *validation)
        save_weights(model, checkpoint)
        print(
            f"epoch {epoch + 1:2d}/{epochs}  loss {sum_loss / n_batches:.4f}  held-out accuracy {accuracy:.4f}  "
            f"{seconds:.0f} s, {1e3 * seconds / (n_batches * batch_size):.2f} s / 1,000 images",
            flush=True,
        )
    return accuracy


def save_weights(model: nn.Module, path: Path) -> None:
    """Write the state dict as safetensors under a temporary name first, so that a reader never meets half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {name: value.detach().contiguous().clone() for name, value in model.state_dict().items()}
    partial = path.with_suffix(".part")
    # One entry only: safetensors writes several in random order, and the same weights should make the same file.
    save_file(state, partial, metadata={"format": "pt"})
    partial.chmod(0o644)  # safetensors lets nobody else read what it writes
    partial.replace(path)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m explorer.models.demo.train", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).parent,
        help="folder to write to (default: the bundled demo)",
    )
    parser.add_argument("--root", type=Path, default=None, help="folder of the Fashion-MNIST files")
    parser.add_argument("--download", action="store_true", help="download Fashion-MNIST when it is not found")
    parser.add_argument(
        "--widths", type=int, nargs=3, default=(64, 128, 256), help="channels of the three stages"
    )
    parser.add_argument("--depth", type=int, default=1, help="blocks of a stage")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=0.2, help="peak, reached after the warm-up")
    parser.add_argument("--weight-decay", type=float, default=5e-4)
    parser.add_argument(
        "--warmup", type=float, default=0.15, help="share of the run in which the learning rate grows"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Train, evaluate, write weights and provenance."""
    args = _arguments(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    folder = find_folder(args.root, download=args.download)
    train_images, train_labels = read_split(folder, "train")
    test_images, test_labels = read_split(folder, "test")
    split = demo_split(train_labels, test_labels)
    held_out = (
        normalise(train_images[split.validation]),
        torch.from_numpy(train_labels[split.validation]).long(),
    )

    model = FashionResNet(tuple(args.widths), depth=args.depth)
    weights = args.out / f"{NAME}.safetensors"
    with pages_kept():
        validation_accuracy = train(
            model,
            normalise(train_images[split.dense]),
            torch.from_numpy(train_labels[split.dense]).long(),
            held_out,
            epochs=args.epochs,
            batch_size=args.batch_size,
            peak_learning_rate=args.learning_rate,
            weight_decay=args.weight_decay,
            warmup=args.warmup,
            seed=args.seed,
            checkpoint=weights,
        )
    inputs, labels = normalise(test_images), torch.from_numpy(test_labels).long()
    provenance = {
        "name": NAME,
        "architecture": "explorer.models.architectures.fashion.FashionResNet",
        "widths": list(args.widths),
        "depth": args.depth,
        "n_params": sum(p.numel() for p in model.parameters()),
        "command": (
            f"python -m explorer.models.demo.train --widths {' '.join(map(str, args.widths))} --depth {args.depth} --epochs {args.epochs} --batch-size {args.batch_size} "
            f"--learning-rate {args.learning_rate} --weight-decay {args.weight_decay} --warmup {args.warmup} "
            f"--seed {args.seed} --threads {args.threads}"
        ),
        "recipe": {
            "optimiser": "SGD, Nesterov momentum 0.9; weight decay on convolution and linear weights only",
            "loss": "cross-entropy",
            "learning_rate": "linear warm-up, then cosine to 0",
            "augmentation": "horizontal flip, shift by up to 1 pixel, drawn per image",
            "epochs": args.epochs,
            "batch_size": args.batch_size,
            "seed": args.seed,
            "split_seed": SPLIT_SEED,
        },
        "training_data": "60,000 training images of Fashion-MNIST without the 2,000 held-out validation images",
        "accuracy_validation_2000": validation_accuracy,
        "accuracy_test_10000": _accuracy(model, inputs, labels),
        "threads": args.threads,
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "licence": "Apache-2.0 (weights); Fashion-MNIST, Copyright 2017 Zalando SE, MIT (training images)",
    }
    (args.out / f"{NAME}.json").write_text(json.dumps(provenance, indent=2) + "\n", encoding="utf-8")
    print(f"test accuracy {provenance['accuracy_test_10000']:.4f} on 10,000 images; wrote {weights}")


if __name__ == "__main__":
    main()
