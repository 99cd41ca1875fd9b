"""The hand-written JavaScript and CSS, put together without a bundler.

A widget's module is one file of `static/` behind the shared ones that it uses; its style sheet stands behind the shared theme. They
are read once, when the widget's class is made, and travel to the page with the widget: nothing is fetched from anywhere.
"""

from __future__ import annotations

from functools import cache
from importlib.resources import files


@cache
def _text(name: str) -> str:
    return files("explorer.widgets").joinpath("static", name).read_text(encoding="utf-8")


def module(name: str, *shared: str) -> str:
    """Return the ES module `name`, with `dom.js` and the `shared` modules in front of it."""
    return "\n".join(_text(f"{part}.js") for part in ("dom", *shared, name))


def style(name: str) -> str:
    """Return the style sheet `name`, with the theme in front of it."""
    return f"{_text('theme.css')}\n{_text(f'{name}.css')}"
