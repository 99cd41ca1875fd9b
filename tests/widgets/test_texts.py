"""What a reader sees stands in one file: no code asks it for what it does not have, it has nothing that no code asks for, and another language takes its place."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from explorer.errors import ExplorerError
from explorer.widgets import assets
from explorer.widgets.texts import ENGLISH, Texts, phrase, placeholders, read_texts

WIDGETS = Path(assets.__file__).parent
TEXTS = read_texts(ENGLISH)

Use = tuple[str, str, frozenset[str]]
"""Where a sentence is used, its key, and the names of the values that it is given."""


def uses_in_python(path: Path) -> Iterator[Use]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "phrase":
            where = f"{path.name}:{node.lineno}"
            (key,) = node.args
            assert isinstance(key, ast.Constant) and isinstance(key.value, str), (
                f"{where}: the key is worked out"
            )
            names = [keyword.arg for keyword in node.keywords]
            assert None not in names, f"{where}: the values are not named here"
            yield where, key.value, frozenset(name for name in names if name is not None)


def uses_in_script(path: Path) -> Iterator[Use]:
    source = assets._lean(path.read_text(encoding="utf-8"))
    assets.keys_of(source)
    for found in re.finditer(r'(?<!function )\bphrase\("([^"]+)"', source):
        where = f"{path.name}:{source.count(chr(10), 0, found.start()) + 1}"
        rest = source[found.end() :]
        if rest.startswith(")"):
            yield where, found[1], frozenset()
            continue
        assert rest.startswith(", { "), f"{where}: the values are not named here"
        yield where, found[1], frozenset(names_of_object(rest[2:]))


def names_of_object(source: str) -> Iterator[str]:
    """Return the names in the JavaScript object that `source` begins with."""
    depth, name = 0, ""
    for part in re.findall(r'"(?:[^"\\]|\\.)*"|`[^`]*`|\w+|\S', source):
        if part in "{[(":
            depth += 1
        elif part in "}])":
            depth -= 1
        elif depth == 1 and not name and part.isidentifier():
            name = part
            yield name
        elif depth == 1 and part == ",":
            name = ""
        if depth == 0:
            return


def all_uses() -> list[Use]:
    found = [use for path in sorted(WIDGETS.rglob("*.py")) for use in uses_in_python(path)]
    return found + [use for path in sorted((WIDGETS / "static").glob("*.js")) for use in uses_in_script(path)]


def test_code_and_file_agree_on_every_sentence_and_its_placeholders() -> None:
    uses = all_uses()
    assert len(uses) > 500
    unknown = [(where, key) for where, key, _ in uses if key not in TEXTS.sentences]
    assert unknown == []
    unused = set(TEXTS.sentences) - {key for _, key, _ in uses}
    assert unused == set()
    differ = [
        (where, key, sorted(names), sorted(placeholders(TEXTS.sentences[key])))
        for where, key, names in uses
        if names != placeholders(TEXTS.sentences[key])
    ]
    assert differ == []


def test_no_sentence_is_empty_or_has_a_stray_space_or_brace() -> None:
    for key, sentence in TEXTS.sentences.items():
        for text in [sentence] if isinstance(sentence, str) else sentence.values():
            assert text == text.strip() != "", key
            assert "{" not in re.sub(r"\{\w+\}", "", text), key
        assert isinstance(sentence, str) or sentence.keys() == {"one", "other"}, key


def test_scripts_hold_no_sentences_of_their_own() -> None:
    for path in sorted((WIDGETS / "static").glob("*.js")):
        for line in assets._lean(path.read_text(encoding="utf-8")).splitlines():
            # An error of a module is for whoever writes it.
            code = re.sub(r"//.*|throw .*", "", line)
            for literal in re.findall(r'"[^"]*"|`[^`]*`', code):
                own = re.sub(r"\$\{.*?\}|\b(se|data)-[\w -]+|color-mix\(in oklab", "", literal)
                assert not re.search(r"[A-Za-z]{3,} [a-z]{2,}", own), f"{path.name}: {literal}"


def test_values_take_their_places_and_numbers_choose_the_form() -> None:
    assert phrase("compare.here_from", origin="solved") == "on the page, solved"
    assert [phrase("common.layers", count=n) for n in (0, 1, 2)] == ["0 layers", "1 layer", "2 layers"]
    # What a value brings along is not filled in again.
    assert phrase("compare.kept", name="{name}") == "kept: {name}"


def test_a_sentence_that_is_not_there_or_has_a_gap_is_an_error() -> None:
    with pytest.raises(KeyError, match=r"no text 'compare.nowhere'"):
        phrase("compare.nowhere")
    with pytest.raises(KeyError, match=r"'common.layers' was not given count"):
        phrase("common.layers")


def test_a_module_travels_with_the_sentences_that_it_uses_and_no_others() -> None:
    source = assets.module("notice")
    assert source.startswith('const LANGUAGE = "en";')
    assert '"Dismiss"' in source and "notice.dismiss" not in source
    assert TEXTS.sentences["equalizer.lock_tip"] not in source
    forms = json.dumps(TEXTS.sentences["common.epochs"])
    assert f"phrase({forms}, {{ count: epoch" in assets.module("mask_view")
    with pytest.raises(KeyError, match=r"notice\.nothing"):
        assets.worded('say(phrase("notice.nothing"))', TEXTS)
    with pytest.raises(ValueError, match=r"gives the text 'common\.layers' no values; it has count"):
        assets.worded('say(phrase("common.layers"))', TEXTS)
    with pytest.raises(ValueError, match="no literal"):
        assets.worded("say(phrase(`notice.${name}`))", TEXTS)


def write(folder: Path, language: str, content: Any) -> Path:
    path = folder / f"{language}.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def test_another_language_takes_the_place_of_english_where_it_has_the_sentence(tmp_path: Path) -> None:
    layers = {
        "one": "{count} warstwa",
        "few": "{count} warstwy",
        "many": "{count} warstw",
        "other": "{count} warstwy",
    }
    write(tmp_path, "pl", {"notice": {"stop": "Zatrzymaj"}, "common": {"layers": layers}})
    polish = read_texts("pl", tmp_path)
    assert polish.phrase("notice.stop") == "Zatrzymaj"
    assert polish.phrase("notice.pause") == "Pause"
    assert [polish.phrase("common.layers", count=n) for n in (1, 3, 5, 22)] == [
        "1 warstwa", "3 warstwy", "5 warstw", "22 warstwy",
    ]  # fmt: skip
    assert assets.worded('button(phrase("notice.stop"), act)', polish) == 'button("Zatrzymaj", act)'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"notice": {"run_stopped": "Lauf {nummer}"}},
            r"de\.json: notice\.run_stopped .*\{nummer\}.* has \{number\}",
        ),
        ({"notice": {"stop": "Halt {count}"}}, r"de\.json: notice\.stop .*\{count\}.* has none"),
        ({"notice": {"halt": "Halt"}}, r"de\.json: notice\.halt is not among the English texts"),
        ({"notice": {"stop": 3}}, r"de\.json: notice\.stop is 3; give a text in quotes"),
        ({"common": {"layers": {"one": "eine", "other": 2}}}, r"de\.json: common\.layers has a plural form"),
        ([], r"de\.json has to hold one object"),
    ],
)
def test_a_translation_that_cannot_be_filled_in_is_refused_by_file_and_key(
    tmp_path: Path, content: Any, message: str
) -> None:
    write(tmp_path, "de", content)
    with pytest.raises(ExplorerError, match=message):
        read_texts("de", tmp_path)


def test_a_language_without_a_file_is_refused_with_those_that_there_are(tmp_path: Path) -> None:
    write(tmp_path, "de", {})
    with pytest.raises(ExplorerError, match=r"no texts for the language 'fr' in .*; there are de, en\. Set"):
        read_texts("fr", tmp_path)
    with pytest.raises(ExplorerError, match=r"no texts for the language '\.\./de'"):
        read_texts("../de", tmp_path)
    write(tmp_path, "qqq", {})
    with pytest.raises(ExplorerError, match="'qqq' is no language"):
        read_texts("qqq", tmp_path)
    (tmp_path / "de.json").write_text("{", encoding="utf-8")
    with pytest.raises(ExplorerError, match=r"de\.json cannot be read as JSON"):
        read_texts("de", tmp_path)


def test_the_environment_chooses_language_and_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from explorer.widgets.texts import current

    write(tmp_path, "de", {"notice": {"stop": "Halt"}})
    monkeypatch.setenv("SPARSITY_EXPLORER_LANGUAGE", "de")
    monkeypatch.setenv("SPARSITY_EXPLORER_TEXTS", str(tmp_path))
    # Not `current` itself, which keeps what it has read.
    found: Texts = current.__wrapped__()
    assert (found.language, found.phrase("notice.stop")) == ("de", "Halt")
    monkeypatch.delenv("SPARSITY_EXPLORER_LANGUAGE")
    assert current.__wrapped__() == TEXTS
