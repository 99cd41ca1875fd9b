"""Which pixel each tap of a convolution reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Taps:
    """The taps of a filter, row by row, at stride one: of a strided convolution, in the phases of its input (see lower.py).

    Attributes
    ----------
    phase : (taps,) int64
        Which of the phases.
    row, column : (taps,) int64
        From a pixel of the result to the pixel that is read.
    phases : int
    """

    phase: NDArray[np.int64]
    row: NDArray[np.int64]
    column: NDArray[np.int64]
    phases: int

    @classmethod
    def of(cls, attributes: Mapping[str, Any], size: tuple[int, ...]) -> Taps:
        """Of a convolution with such attributes (see `explorer.inference.graph`) and a filter of such a size, rows and columns or columns only; a linear layer has none."""
        stride, padding, dilation = (
            np.array(attributes.get(name, (n, n)))
            for name, n in (("stride", 1), ("padding", 0), ("dilation", 1))
        )
        phases = attributes.get("phases", ((0, 0),))
        steps = np.stack(np.meshgrid(*(np.arange(n) for n in (1, *size)[-2:]), indexing="ij"), -1).reshape(
            -1, 2
        )
        away = steps * dilation - padding
        phase = np.array([phases.index(tuple(left)) for left in (away % stride).tolist()])
        row, column = (away // stride).T
        return cls(phase, row, column, len(phases))

    def shifts(self, pitch: int) -> NDArray[np.int64]:
        """Elements from a pixel to what each tap reads, in planes of this pitch."""
        return self.row * pitch + self.column

    def planes(self, channels: int) -> NDArray[np.int64]:
        """The plane that each tap of each of so many channels reads: (channels, taps)."""
        return np.arange(channels)[:, None] * self.phases + self.phase

    def reach_over(self, x_columns: int, y_columns: int, pitch: int) -> bool:
        """Whether some tap of a pixel reads a pixel of the row before or after, in planes of this pitch: what it should find there is a zero.

        `x_columns`, `y_columns`: pixels in a row of the operand (or of its phases), and of the result.
        """
        before, after = int(self.column.min()), int(self.column.max())
        return pitch + before < x_columns or y_columns - 1 + after >= pitch
