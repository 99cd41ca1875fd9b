"""The hand-written JavaScript and CSS, put together without a bundler.

A widget's module is one file of `static/` behind the shared ones that it uses; its style sheet stands behind the shared theme. They
are read once, when the widget's class is made, and travel to the page with the widget: nothing is fetched from anywhere.

Where a module says ``phrase("equalizer.lock_tip")`` the page gets the sentence itself, in the chosen language: no module carries sentences
that it does not use, and a key that does not exist is found here, before there is a page.
"""

from __future__ import annotations

import json
import re
from functools import cache
from importlib.resources import files
from itertools import pairwise

from explorer.widgets.texts import Texts, current, placeholders

_REMARK = re.compile(r"^[ \t]*/\*[^*]*(?:\*(?!/)[^*]*)*\*/[ \t]*$", re.MULTILINE)
"""A comment of any number of lines that has them to itself."""

_COMMENT = re.compile(r"//.*")
"""A line that is nothing but a comment: they travel with each widget that shares a source, and there are a dozen."""


_PHRASE = re.compile(r"""(?<!function )\bphrase\((?:"([^"]*)"(\))?)?""")
"""Where a module uses a sentence: its key, and the end of the call where no values follow."""


_DECLARED = re.compile(r"^(?:(?:async )?function\*?|const|let|class) (\w+)", re.MULTILINE)
"""The name that a shared source declares, at the beginning of a line."""

_WORD = re.compile(r"\w+")


@cache
def _raw(name: str) -> str:
    return files("explorer.widgets").joinpath("static", name).read_text(encoding="utf-8")


@cache
def _text(name: str) -> str:
    return _lean(_raw(name))


def _used(shared: str, users: str) -> str:
    """Return a shared source without the declarations that neither `users` nor those that stay speak of; the lines of the others keep their numbers.

    A word that stands anywhere in them counts, so that rather too much stays than too little.
    """
    begins = [found.start() for found in _DECLARED.finditer(shared)]
    head, *pieces = (shared[a:b] for a, b in pairwise([0, *begins, len(shared)]))
    declared = [_DECLARED.match(piece) for piece in pieces]
    names = [found[1] if found else "" for found in declared]
    words = [set(_WORD.findall(_lean(piece))) for piece in pieces]
    wanted = set(_WORD.findall(_lean(users))) | set(_WORD.findall(_lean(head)))
    kept: set[int] = set()
    while more := {i for i, name in enumerate(names) if name in wanted} - kept:
        kept |= more
        wanted = wanted.union(*(words[i] for i in more))
    return head + "".join(piece if i in kept else "\n" * piece.count("\n") for i, piece in enumerate(pieces))


def _lean(text: str) -> str:
    """Return a source without indentation and without lines that are a comment; the numbers of its lines stay, for whoever debugs it in a page."""
    text = _REMARK.sub(lambda found: "\n" * found[0].count("\n"), text)
    lines = (line.strip() for line in text.splitlines())
    return "\n".join("" if _COMMENT.fullmatch(line) else line for line in lines)


def keys_of(source: str) -> list[str]:
    """Return the keys of the sentences that the source of a module uses.

    Raises
    ------
    ValueError
        If one is worked out while the page runs; then nobody could tell which sentences have to travel.
    """
    keys = [found[1] or "" for found in _PHRASE.finditer(source)]
    if "" in keys:
        raise ValueError('A module asks for a sentence by a key that is no literal; write phrase("...").')
    return keys


def worded(source: str, texts: Texts) -> str:
    """Return the source of a module with its sentences in place of their keys; one without placeholders stands there by itself.

    Raises
    ------
    KeyError
        If there is no such sentence.
    ValueError
        If a key is worked out, or a sentence with placeholders is given no values.
    """
    keys_of(source)
    return _PHRASE.sub(lambda found: _sentence(found[1], bool(found[2]), texts), source)


def _sentence(key: str, is_whole: bool, texts: Texts) -> str:
    """Return what stands in a module for ``phrase("key")`` when it `is_whole`, else for its beginning up to the key."""
    sentence = texts.sentence(key)
    literal = json.dumps(sentence, ensure_ascii=False)
    if not is_whole:
        return f"phrase({literal}"
    if placeholders(sentence):
        raise ValueError(
            f"A module gives the text {key!r} no values; it has {', '.join(sorted(placeholders(sentence)))}."
        )
    return literal


def module(name: str, *shared: str) -> str:
    """Return the ES module `name`, with what it uses of `dom.js` and the `shared` modules in front of it, in the chosen language."""
    own = _raw(f"{name}.js")
    source = _lean("\n".join([_used("\n".join(_raw(f"{part}.js") for part in ("dom", *shared)), own), own]))
    # In the first line, which is a comment: the numbers of the others stay.
    return f"const LANGUAGE = {json.dumps(current().language)};{worded(source, current())}"


def style(name: str, *, themed: bool = True) -> str:
    """Return the style sheet `name`, with the theme in front of it.

    A widget that never stands alone need not bring the theme, which is not `themed` then; its rules must hold whichever sheet comes first, and begin with `.se`.
    """
    own = _text(f"{name}.css")
    return f"{_text('theme.css')}\n{own}" if themed else own
