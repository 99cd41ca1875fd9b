"""The sources that travel to the page: all that a module needs, and nothing of the shared ones that it does not."""

from __future__ import annotations

import re
from importlib.resources import files

import pytest

from explorer.widgets import assets
from explorer.widgets.base import StateView
from explorer.widgets.sensitivity_explorer import SensitivityExplorer
from explorer.widgets.state import ExplorerState
from tests.widgets.fake_study import FakeStudy

SHARED = (
    "dom",
    "link",
    "chart",
    "rows",
    "predict",
    "arrange",
    "kept",
    "files",
    "safetensors",
    "lifeline",
    "address",
)
DECLARED = r"^(?:async )?(?:function\*?|const|let|class) (\w+)"


def views() -> list[StateView]:
    page = SensitivityExplorer(ExplorerState(FakeStudy()))
    return [part for part in page.children[0].children if isinstance(part, StateView)]


def shared_names() -> set[str]:
    folder = files("explorer.widgets").joinpath("static")
    sources = [folder.joinpath(f"{name}.js").read_text(encoding="utf-8") for name in SHARED]
    return {name for source in sources for name in re.findall(DECLARED, source, re.MULTILINE)}


def test_what_a_module_speaks_of_is_declared_in_it_and_what_it_does_not_is_not() -> None:
    names = shared_names()
    assert {"make", "phrase", "between", "readShapes"} <= names
    for view in views():
        source = view._esm.replace("`", " ")
        # What is called, and constants, outside of comments and texts: other words may be local names.
        code = re.sub(r"//.*|\"(?:[^\"\\\n]|\\.)*\"", "", source)
        spoken = {*re.findall(r"(?<![\w.])(\w+)\(", code), *re.findall(r"\b[A-Z][A-Z_]+\b", code)} & names
        declared = {name for name in re.findall(DECLARED, source, re.MULTILINE) if name in names}
        assert spoken <= declared, (type(view).__name__, spoken - declared)
        # Sentences without values stand in place of their calls of `phrase`.
        once = {name for name in declared - {"phrase"} if len(re.findall(rf"\b{name}\b", source)) == 1}
        assert once == set(), (type(view).__name__, once)


def test_unused_declarations_stay_at_home_with_what_only_they_use() -> None:
    shared = "// head\nconst a = 1;\nfunction b() {\n  return a + c();\n}\n/** About c. */\nfunction c() {}\nasync function d() {}\nlet e = d;\n"
    assert assets._used(shared, "b();") == (
        "// head\nconst a = 1;\nfunction b() {\n  return a + c();\n}\n/** About c. */\nfunction c() {}\n\n\n"
    )
    assert assets._used(shared, "// b\nnothing();") == "// head\n" + 8 * "\n"
    assert "async function d" in assets._used(shared, "e.f")


@pytest.mark.parametrize(
    ("source", "lean"),
    [
        ("  a; // stays\n  // goes\n", "a; // stays\n"),
        ("/* goes */\n/** goes\n * too */\nb;\n", "\n\n\nb;"),
        ('c = "/* stays";\n d = 2; /* stays */\n', 'c = "/* stays";\nd = 2; /* stays */'),
        ("url = 'http://x';\n", "url = 'http://x';"),
    ],
)
def test_sources_travel_without_comments_and_keep_the_numbers_of_their_lines(source: str, lean: str) -> None:
    assert assets._lean(source) == lean
    assert assets._lean(source).count("\n") >= source.rstrip("\n").count("\n")
