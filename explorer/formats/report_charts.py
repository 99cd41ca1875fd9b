"""The charts of a report: plain SVG that needs no script, takes its colours from the page's style sheet, and prints.

Each chart has a name that a screen reader says; the numbers themselves stand in a table beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from explorer.formats.markup import Child, Markup, element

Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Axis:
    """From values to a place between 0 and 1.

    Parameters
    ----------
    low, high : float
        The values at 0 and 1; above 0 on a logarithmic axis.
    logarithmic : bool
    """

    low: float
    high: float
    logarithmic: bool = False

    def place(self, value: float) -> float:
        """Return where `value` lies; what is outside is put at the end that it is beyond.

        Examples
        --------
        >>> Axis(0.0, 4.0).place(1.0), Axis(0.01, 1.0, logarithmic=True).place(0.1), Axis(0, 1).place(7)
        (0.25, 0.5, 1.0)
        """
        low, high = self.low, self.high
        if self.logarithmic:
            low, high, value = math.log10(low), math.log10(high), math.log10(max(value, low))
        return min(1.0, max(0.0, (value - low) / (high - low))) if high > low else 0.5

    def ticks(self, wanted: int) -> list[float]:
        """Return round values within the axis, about `wanted` of them: decades on a logarithmic one.

        Examples
        --------
        >>> Axis(0.0, 5.0).ticks(5), Axis(0.87, 0.93).ticks(3)
        ([0.0, 1.0, 2.0, 3.0, 4.0, 5.0], [0.88, 0.9, 0.92])
        """
        if self.logarithmic:
            first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
            step = max(1, math.ceil((last - first + 1) / wanted))
            return [10.0**power for power in range(first, last + 1, step)]
        width = _round_step((self.high - self.low) / max(1, wanted))
        first, last = math.ceil(self.low / width - 1e-9), math.floor(self.high / width + 1e-9)
        return [float(f"{number * width:.9g}") for number in range(first, last + 1)]


def _round_step(rough: float) -> float:
    if rough <= 0.0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(rough))
    return min((power * factor for factor in (1, 2, 5, 10)), key=lambda step: abs(step - rough))


@dataclass(frozen=True, slots=True)
class Frame:
    """A chart's size in pixels, and the room that is kept around the lines."""

    width: float
    height: float
    left: float
    right: float = 10.0
    top: float = 8.0
    bottom: float = 22.0

    def x(self, place: float) -> float:
        return self.left + place * (self.width - self.left - self.right)

    def y(self, place: float) -> float:
        return self.height - self.bottom - place * (self.height - self.top - self.bottom)


@dataclass(frozen=True, slots=True)
class Line:
    """A curve with what is known of its points' spread.

    Parameters
    ----------
    points : sequence of (x, y)
    spread : sequence of (low, high), optional
        One pair a point, drawn as a bar through it.
    dots : bool
        Mark each point.
    """

    points: Sequence[Point]
    spread: Sequence[Point] = ()
    dots: bool = True


def chart(
    title: str,
    x: Axis,
    y: Axis,
    lines: Iterable[Line],
    frame: Frame,
    *,
    x_words: Callable[[float], str],
    y_words: Callable[[float], str],
    x_ticks: int = 5,
    y_ticks: int = 4,
    level: tuple[float, str] | None = None,
    mark: tuple[float, str] | None = None,
) -> Markup:
    """Return one chart.

    Parameters
    ----------
    title : str
        What a screen reader says of it.
    x, y : Axis
    lines : iterable of Line
    frame : Frame
    x_words, y_words : callable
        From a tick's value to its label.
    level, mark : (float, str), optional
        A dashed line across at a value of y, or up at a value of x, with its label.
    """
    heights = [(_n(frame.y(y.place(tick))), y_words(tick)) for tick in y.ticks(y_ticks)]
    across = "".join(f"M{_n(frame.left)} {height}H{_n(frame.width - frame.right)}" for height, _ in heights)
    # Alignment and colour come from the style sheet by class: with hundreds of charts, each attribute counts.
    parts: list[Child] = [
        element("path", class_="g", d=across),
        element(
            "g", *(element("text", words, x=_n(frame.left - 5), y=at) for at, words in heights), class_="y"
        ),
        element(
            "g",
            *(
                element("text", x_words(tick), x=_n(frame.x(x.place(tick))), y=_n(frame.height - 6))
                for tick in x.ticks(x_ticks)
            ),
            class_="x",
        ),
    ]
    if level is not None:
        value, words = level
        at = frame.y(y.place(value))
        parts.append(
            element("path", class_="d", d=f"M{_n(frame.left)} {_n(at)}H{_n(frame.width - frame.right)}")
        )
        parts.append(
            element(
                "text",
                words,
                class_="h",
                x=_n(frame.width - frame.right - 2),
                y=_n(at - 4 if at > frame.top + 14 else at + 13),
                text_anchor="end",
            )
        )
    if mark is not None:
        value, words = mark
        at = frame.x(x.place(value))
        parts.append(
            element(
                "path",
                element("title", words),
                class_="m",
                d=f"M{_n(at)} {_n(frame.top)}V{_n(frame.height - frame.bottom)}",
            )
        )
    for line in lines:
        places = [(frame.x(x.place(a)), frame.y(y.place(b))) for a, b in line.points]
        if line.spread:
            bars = "".join(
                f"M{_n(at)} {_n(frame.y(y.place(low)))}V{_n(frame.y(y.place(high)))}"
                for (at, _), (low, high) in zip(places, line.spread, strict=True)
                if high > low
            )
            parts.append(element("path", class_="s", d=bars) if bars else None)
        route = " ".join(f"{_n(a)},{_n(b)}" for a, b in places)
        parts.append(element("polyline", class_="l", points=route))
        if line.dots:
            # One path for all dots: a line of no length with round ends.
            parts.append(element("path", class_="o", d="".join(f"M{_n(a)} {_n(b)}h0" for a, b in places)))
    return element(
        "svg",
        *parts,
        role="img",
        aria_label=title,
        viewBox=f"0 0 {_n(frame.width)} {_n(frame.height)}",
    )


def bar(share: float, tick: float | None, words: str) -> Markup:
    """Return a horizontal bar that fills `share` of its cell, with a tick at another share."""
    return element(
        "svg",
        element("rect", class_="t", width="100%"),
        element("rect", class_="f", width=f"{100 * share:.2f}%"),
        None
        if tick is None
        else element("line", class_="a", x1=f"{100 * tick:.2f}%", x2=f"{100 * tick:.2f}%", y1=-2, y2=12),
        class_="bar",
        role="img",
        aria_label=words,
    )


def _n(value: float) -> str:
    """Return a coordinate with a tenth of a pixel, and no zeros behind."""
    return f"{value:.1f}".rstrip("0").rstrip(".")
