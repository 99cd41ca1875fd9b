"""Every sentence of the page, by name: what a reader sees stands in one file per language, and code says only which sentence it is.

`en.json` has them all. Another language is a file of the same form beside it, or in a folder that `SPARSITY_EXPLORER_TEXTS` names, and
is chosen by `SPARSITY_EXPLORER_LANGUAGE`; a sentence that it lacks is shown in English. Python asks for a sentence with `phrase`; in
`static/*.js` the same word stands, and `explorer.widgets.assets` puts the sentence in its place before a module travels to the page.
Invariant: no sentence with a gap reaches a reader. A name that is not in the file, or a placeholder without a value, is an error.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from explorer.errors import ExplorerError

__all__ = ["ENGLISH", "Sentence", "Texts", "current", "fill", "phrase", "placeholders", "read_texts"]

ENGLISH = "en"
"""The language that has all sentences."""

COUNT = "count"
"""The placeholder whose number chooses the form of a sentence that has several."""

OTHER = "other"
"""The form that each such sentence has; the others are named as the Unicode project names them: zero, one, two, few, many."""

FORMS = frozenset({"zero", "one", "two", "few", "many", OTHER})

Sentence = str | Mapping[str, str]
"""One text, or one for each plural form."""

_FOLDER = Path(__file__).parent
_PLACEHOLDER = re.compile(r"\{(\w+)\}")
_LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z0-9]{2,8})*")


@dataclass(frozen=True, slots=True)
class Texts:
    """The sentences of one language.

    Parameters
    ----------
    language : str
        A tag such as "de" or "pt-BR".
    sentences : mapping of str to Sentence
        By key, as in "equalizer.lock_tip".
    """

    language: str
    sentences: Mapping[str, Sentence]

    def phrase(self, key: str, /, **values: Any) -> str:
        """Return a sentence with its placeholders filled in, see `phrase`."""
        return fill(self.sentence(key), key, values, self.language)

    def sentence(self, key: str) -> Sentence:
        """Return a sentence as it stands in the file.

        Raises
        ------
        KeyError
            If there is none of that key: a mistake in the code.
        """
        if key not in self.sentences:
            raise KeyError(f"There is no text {key!r}; add it to {_FOLDER / 'en.json'}.")
        return self.sentences[key]


def phrase(key: str, /, **values: Any) -> str:
    """Return a sentence in the chosen language.

    Parameters
    ----------
    key : str
        Its place in `en.json`: the keys from the outside in, with dots between.
    **values
        What stands at its placeholders. Where the sentence has plural forms, `count` is the number that chooses one.

    Raises
    ------
    KeyError
        If there is no such sentence, or the values are not those of its placeholders: a mistake in the code.

    Examples
    --------
    >>> phrase("common.epochs", count=1, epochs="1"), phrase("common.epochs", count=2.5, epochs="2.5")
    ('1 epoch', '2.5 epochs')
    """
    return current().phrase(key, **values)


@cache
def current() -> Texts:
    """Return the texts that the environment asks for; read once, because they have travelled to the page by then."""
    language = os.environ.get("SPARSITY_EXPLORER_LANGUAGE", "").strip() or ENGLISH
    folder = os.environ.get("SPARSITY_EXPLORER_TEXTS", "").strip()
    return read_texts(language, Path(folder).expanduser() if folder else _FOLDER)


def read_texts(language: str, folder: Path = _FOLDER) -> Texts:
    """Read the texts of a language; what it lacks is taken from English.

    Parameters
    ----------
    language : str
        A tag such as "de"; the file is of that name.
    folder : Path
        Where the file of the language is. English always comes with the package.

    Raises
    ------
    ExplorerError
        If there is no such file or language, or the file is not of the form of `en.json`: the message names file and key.

    Examples
    --------
    >>> read_texts("en").phrase("notice.stop")
    'Stop'
    """
    english = _flat(_load(_FOLDER / f"{ENGLISH}.json"), _FOLDER / f"{ENGLISH}.json")
    if language == ENGLISH:
        return Texts(ENGLISH, english)
    path = folder / f"{language}.json"
    if not _LANGUAGE.fullmatch(language) or not path.is_file():
        known = sorted({ENGLISH, *(found.stem for found in folder.glob("*.json"))})
        raise ExplorerError(
            f"There are no texts for the language {language!r} in {folder}; there are {', '.join(known)}. "
            "Set SPARSITY_EXPLORER_LANGUAGE to one of them, or SPARSITY_EXPLORER_TEXTS to the folder that has the file."
        )
    _plural_form(language)
    translated = _flat(_load(path), path)
    for key, sentence in translated.items():
        _check(key, sentence, english, path)
    return Texts(language, {**english, **translated})


def placeholders(sentence: Sentence) -> frozenset[str]:
    """Return the names of the values that a sentence is filled with; `count` among them where it has plural forms.

    Examples
    --------
    >>> sorted(placeholders("{layer} at {sparsity}"))
    ['layer', 'sparsity']
    """
    if isinstance(sentence, str):
        return frozenset(_PLACEHOLDER.findall(sentence))
    return frozenset({COUNT}).union(*(_PLACEHOLDER.findall(form) for form in sentence.values()))


def fill(sentence: Sentence, key: str, values: Mapping[str, Any], language: str) -> str:
    """Return a sentence with its placeholders filled in; the form is that of `values["count"]` in the language."""
    if placeholders(sentence) - values.keys():
        missing = ", ".join(sorted(placeholders(sentence) - values.keys()))
        raise KeyError(f"The text {key!r} was not given {missing}.")
    if isinstance(sentence, str):
        form = sentence
    else:
        form = sentence.get(_plural_form(language)(values[COUNT]), sentence[OTHER])
    return _PLACEHOLDER.sub(lambda found: str(values[found[1]]), form)


@cache
def _plural_form(language: str) -> Callable[[float], str]:
    """Return which plural form a number takes in a language."""
    if language == ENGLISH:
        return lambda number: "one" if number == 1 else OTHER
    # The rules of all languages; imported late, because English needs none of them.
    from babel import Locale, UnknownLocaleError

    try:
        return Locale(language.split("-", maxsplit=1)[0]).plural_form
    except UnknownLocaleError:
        raise ExplorerError(
            f"{language!r} is no language whose plural forms are known; name the file by a tag such as de or pt-BR."
        ) from None


def _check(key: str, sentence: Sentence, english: Mapping[str, Sentence], path: Path) -> None:
    """Refuse a translated sentence that no code could fill in."""
    if key not in english:
        raise ExplorerError(f"{path}: {key} is not among the English texts; correct the key, or take it out.")
    wrong = placeholders(sentence) - placeholders(english[key])
    if wrong:
        names = ", ".join(f"{{{name}}}" for name in sorted(placeholders(english[key]))) or "none"
        raise ExplorerError(
            f"{path}: {key} has the placeholder {', '.join(f'{{{name}}}' for name in sorted(wrong))}, "
            f"which the English text does not have; there it has {names}."
        )


def _load(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ExplorerError(f"{path} cannot be read as JSON in UTF-8: {error}. Correct the file.") from error


def _flat(tree: Any, path: Path) -> dict[str, Sentence]:
    """Return the sentences of a file by key."""
    if not isinstance(tree, dict):
        raise ExplorerError(f"{path} has to hold one object, as en.json does.")
    return dict(_walk(tree, "", path))


def _walk(tree: Mapping[str, Any], above: str, path: Path) -> Iterator[tuple[str, Sentence]]:
    for name, value in tree.items():
        key = f"{above}.{name}" if above else name
        if isinstance(value, str):
            yield key, value
        elif not isinstance(value, dict):
            raise ExplorerError(
                f"{path}: {key} is {value!r}; give a text in quotes, or an object of such texts."
            )
        elif OTHER in value and FORMS.issuperset(value):
            if not all(isinstance(form, str) for form in value.values()):
                raise ExplorerError(f"{path}: {key} has a plural form that is no text; give each in quotes.")
            yield key, value
        else:
            yield from _walk(value, key, path)
