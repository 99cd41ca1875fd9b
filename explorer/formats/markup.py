"""HTML that is made of elements, never of pasted text: whatever is no `Markup` is escaped, so a layer's name cannot become a tag."""

from __future__ import annotations

import html
from typing import Any


class Markup(str):
    """Text that is HTML already; only `element` and `joined` make it of anything else."""

    __slots__ = ()


Child = str | float | int | None


def element(name: str, *children: Child, **attributes: Any) -> Markup:
    """Return an HTML or SVG element.

    Parameters
    ----------
    name : str
        Of the element.
    *children : str or number or None
        Texts are escaped, `Markup` is taken as it is, None is left out.
    **attributes
        None and False are left out, True gives an empty attribute. ``class_`` is ``class``, and an underscore elsewhere is a hyphen.

    Examples
    --------
    >>> print(element("td", "a < b", class_="num", aria_label='"x"'))
    <td class="num" aria-label="&quot;x&quot;">a &lt; b</td>
    >>> print(element("tr", element("td", 1), None))
    <tr><td>1</td></tr>
    """
    given = "".join(
        f" {key.rstrip('_').replace('_', '-')}" + ("" if value is True else f'="{html.escape(str(value))}"')
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    return Markup(f"<{name}{given}>{joined(*children)}</{name}>")


def joined(*children: Child) -> Markup:
    """Return children after one another, texts escaped."""
    return Markup(
        "".join(
            child if isinstance(child, Markup) else html.escape(str(child))
            for child in children
            if child is not None
        )
    )
