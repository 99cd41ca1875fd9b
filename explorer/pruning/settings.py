"""The choices that make a run, as one value: what is written into a recipe is what makes the run again.

Invariant: the same settings, model, data, number of training threads and precision give the same weights, bit for bit.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from explorer.errors import RunError

PRECISIONS = ("auto", "float32", "bfloat16")


@dataclass(frozen=True, slots=True)
class RunSettings:
    """How to prune and train.

    Parameters
    ----------
    method : str
        Name of a pruning method, see `explorer.pruning.methods.METHODS`.
    epochs : float
        Passes over the training data, above 0; a fraction of an epoch is allowed.
    batch_size : int
        Samples a step, at least 1; a smaller data set makes smaller batches.
    learning_rate : float
        Peak learning rate, above 0; it falls to 0 along a half cosine.
    momentum : float
        Nesterov momentum of stochastic gradient descent, in [0, 1).
    weight_decay : float
        L2 penalty on all parameters, at least 0.
    stabilise : float
        Share of the steps before the first weight is removed, in [0, 1).
    ramp : float
        Share of the steps during which sparsity grows, in [0, 1]; the rest of the run fine-tunes.
    update_every : int
        Steps from one selection of the masks to the next, at least 1.
    distillation : float
        Weight in [0, 1] of the dense network's outputs in the loss; the rest is the labels' cross-entropy. With 1, labels are not
        used: the dense network has seen more than a short run on little data shows again. On a narrower version of the demo, 87 % sparse,
        that gave 0.928 to 0.930 on the 10,000 test images where labels alone gave 0.921 to 0.923. A model that is yet to learn its
        task needs 0.
    temperature : float
        Temperature of the distilled outputs, above 0.
    seed : int
        Seed of the data order, the augmentation and dropout.
    threads : int or None
        Training threads of torch; None leaves torch's own setting.
    precision : {"auto", "float32", "bfloat16"}
        Arithmetic of convolutions and matrix products in training; weights, their updates and all evaluations are float32. "auto" is
        bfloat16 on a CPU with instructions for it (AMX, AVX512_BF16), where a step of the demo takes 0.6 of its time, and float32
        elsewhere.
    evaluate_every : int or None
        Steps from one evaluation to the next; None evaluates after each epoch.
    n_validation : int or None
        Validation samples of an evaluation during the run; None takes up to 1,000.

    Raises
    ------
    RunError
        If a value is out of its range.
    """

    method: str = "gmp"
    epochs: float = 5
    batch_size: int = 128
    learning_rate: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 1e-4
    stabilise: float = 0.05
    ramp: float = 0.25
    update_every: int = 20
    distillation: float = 1.0
    temperature: float = 4.0
    seed: int = 0
    threads: int | None = None
    precision: str = "auto"
    evaluate_every: int | None = None
    n_validation: int | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise RunError(f"{field.name} is {value}; give a finite number.")
        self._require("epochs", self.epochs > 0, "a number above 0")
        self._require("batch_size", self.batch_size >= 1, "at least 1")
        self._require("learning_rate", self.learning_rate > 0, "a number above 0")
        self._require("momentum", 0 <= self.momentum < 1, "a number in [0, 1)")
        self._require("weight_decay", self.weight_decay >= 0, "0 or more")
        self._require("stabilise", 0 <= self.stabilise < 1, "a share in [0, 1)")
        self._require("ramp", 0 <= self.ramp <= 1, "a share in [0, 1]")
        self._require("update_every", self.update_every >= 1, "at least 1 step")
        self._require("distillation", 0 <= self.distillation <= 1, "a weight in [0, 1]")
        self._require("temperature", self.temperature > 0, "a number above 0")
        self._require("precision", self.precision in PRECISIONS, f"one of {', '.join(PRECISIONS)}")
        for name in ("threads", "evaluate_every", "n_validation"):
            value = getattr(self, name)
            self._require(name, value is None or value >= 1, "at least 1, or nothing for the default")
        if self.stabilise + self.ramp > 1:
            raise RunError(
                f"stabilise {self.stabilise} and ramp {self.ramp} are shares of one run and add up to more than 1; lower one of them."
            )

    def _require(self, name: str, fine: bool, accepted: str) -> None:
        if not fine:
            raise RunError(f"{name} is {getattr(self, name)!r}; give {accepted}.")
