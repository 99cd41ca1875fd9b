"""The hand-written JavaScript and CSS, put together without a bundler.

A widget's module is one file of `static/` behind the shared ones that it uses; its style sheet stands behind the shared theme. They
are read once, when the widget's class is made, and travel to the page with the widget: nothing is fetched from anywhere.
"""

from __future__ import annotations

import re
from functools import cache
from importlib.resources import files

_COMMENT = re.compile(r"//.*|/\*[^*]*(\*(?!/)[^*]*)*\*/")
"""A line that is nothing but a comment: they travel with each widget that shares a source, and there are a dozen."""


@cache
def _text(name: str) -> str:
    return _lean(files("explorer.widgets").joinpath("static", name).read_text(encoding="utf-8"))


def _lean(text: str) -> str:
    """Return a source without indentation and without lines that are a comment; the numbers of its lines stay, for whoever debugs it in a page."""
    lines = (line.strip() for line in text.splitlines())
    return "\n".join("" if _COMMENT.fullmatch(line) else line for line in lines)


def module(name: str, *shared: str) -> str:
    """Return the ES module `name`, with `dom.js` and the `shared` modules in front of it."""
    return "\n".join(_text(f"{part}.js") for part in ("dom", *shared, name))


def style(name: str) -> str:
    """Return the style sheet `name`, with the theme in front of it."""
    return f"{_text('theme.css')}\n{_text(f'{name}.css')}"
