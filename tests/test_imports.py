"""The house holds together by its arrows: who may import whom, what is loaded when, and how files from outside are read."""

from __future__ import annotations

import ast
import importlib
import json
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import pytest

import explorer

PACKAGE = Path(explorer.__file__).parent
ROOT = PACKAGE.parent

# What each room (a folder, or a module at the top) may import besides itself and the floor that all of them stand on.
# The engine stands on two of its planks alone, so that it could leave as a package of its own.
FLOOR = {"atomic", "errors", "folders", "history", "masks", "memory"}
STEPS = {"models", "data", "inference", "sensitivity", "distribution", "pruning", "formats"}
MAY_IMPORT = {
    "errors": set(),
    "atomic": {"errors"},
    "folders": set(),
    "history": {"errors"},
    "masks": {"errors"},
    "memory": set(),
    "inference": {"errors", "folders"},
    "models": FLOOR,
    "data": FLOOR | {"models"},
    "sensitivity": FLOOR | {"models", "data", "inference"},
    "distribution": FLOOR | {"models", "sensitivity"},
    "pruning": FLOOR | {"models", "data", "inference", "sensitivity", "distribution"},
    "formats": FLOOR | {"models", "data", "sensitivity", "distribution", "pruning"},
    "plots": FLOOR | {"models", "inference", "sensitivity", "distribution", "pruning"},
    "study": FLOOR | STEPS,
    "bench": FLOOR | STEPS | {"study"},
    "cli": FLOOR | STEPS | {"study", "bench", "plots"},
    "widgets": FLOOR | STEPS | {"study", "plots"},
    "__main__": {"cli", "errors"},
}

# The command that opens the app needs to know where the notebook lies; it imports that when it is given, not before.
MAY_IMPORT_LATE = {"cli": {"widgets"}}

# Programs that are run by hand and that nothing imports: they make what a room ships, with what other rooms know.
PROGRAMS = {"explorer.models.demo.train": {"data"}}


@cache
def sources() -> tuple[tuple[str, Path, ast.Module], ...]:
    """Return room, path and syntax tree of every module but the top-level `__init__`, whose lazy names point everywhere."""
    paths = [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]
    return tuple(
        (
            path.relative_to(PACKAGE).parts[0].removesuffix(".py"),
            path,
            ast.parse(path.read_text(encoding="utf-8")),
        )
        for path in paths
    )


def imported_modules(node: ast.AST, path: Path) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        module = node.module or ""
        if node.level:
            parts = ["explorer", *path.relative_to(PACKAGE).parts[:-1]]
            module = ".".join([*parts[: len(parts) - node.level + 1], *filter(None, [module])])
        if module == "explorer":
            return [explorer._HOME.get(alias.name, f"explorer.{alias.name}") for alias in node.names]
        return [module]
    return []


def rooms_imported(nodes: Iterable[ast.AST], path: Path) -> set[str]:
    names = [name for node in nodes for name in imported_modules(node, path)]
    rooms = {name.split(".")[1] for name in names if name.startswith("explorer.")}
    return rooms - {"__version__"}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def at_import(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes that no function holds: what runs at import."""
    if not isinstance(tree, ast.FunctionDef | ast.AsyncFunctionDef):
        yield tree
        for child in ast.iter_child_nodes(tree):
            yield from at_import(child)


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_arrows_between_the_rooms_point_forward() -> None:
    wrong = []
    for room, path, tree in sources():
        assert room in MAY_IMPORT, (
            f"{path.relative_to(ROOT)}: give the new room '{room}' its line in MAY_IMPORT"
        )
        allowed = {room} | MAY_IMPORT[room] | PROGRAMS.get(module_name(path), set())
        first = rooms_imported(at_import(tree), path) - allowed
        late = rooms_imported(ast.walk(tree), path) - allowed - MAY_IMPORT_LATE.get(room, set())
        wrong += [f"{path.relative_to(ROOT)} imports explorer.{other}" for other in sorted(first | late)]
    assert wrong == []


def test_nothing_imports_the_programs() -> None:
    imported = {
        name
        for _, path, tree in sources()
        for node in ast.walk(tree)
        for name in imported_modules(node, path)
    }
    assert not imported & PROGRAMS.keys()
    assert all((ROOT / f"{name.replace('.', '/')}.py").is_file() for name in PROGRAMS)


def test_the_rules_themselves_have_no_circle() -> None:
    order: list[str] = []
    rules = {room: set(others) for room, others in MAY_IMPORT.items()}
    while rules:
        free = sorted(room for room, others in rules.items() if others <= set(order))
        assert free, f"these rooms may import each other in a circle: {sorted(rules)}"
        order += free
        rules = {room: others for room, others in rules.items() if room not in free}
    assert order[-1] in {"__main__", "widgets"}


def test_importing_explorer_alone_loads_nothing_heavy() -> None:
    loaded = set(json.loads(run_python("import explorer, json, sys; print(json.dumps(sorted(sys.modules)))")))
    assert not loaded & {"torch", "numpy", "llvmlite", "pandas", "ipywidgets", "plotly", "anywidget", "voila"}


def test_settings_schedule_and_events_of_a_run_load_no_torch_and_every_name_is_found() -> None:
    program = """
import sys
from explorer import pruning
pruning.RunSettings(), pruning.CubicSchedule, pruning.StepEvent
print("torch" in sys.modules, all(getattr(pruning, name) is not None for name in pruning.__all__))
"""
    assert run_python(program).split() == ["False", "True"]


def test_every_room_but_the_widgets_loads_neither_ipywidgets_nor_plotly() -> None:
    rooms = [
        module.name
        for module in pkgutil.walk_packages([str(PACKAGE)], prefix="explorer.")
        if not module.name.startswith("explorer.widgets") and not module.name.endswith("__main__")
    ]
    assert len(rooms) > 20
    code = f"import importlib, json, sys\nfor name in {rooms!r}: importlib.import_module(name)\nprint(json.dumps(sorted(sys.modules)))"
    loaded = set(json.loads(run_python(code)))
    assert set(rooms) <= loaded
    assert not loaded & {"ipywidgets", "plotly", "anywidget", "voila", "IPython", "pandas"}


def test_the_code_generator_is_loaded_by_the_engine_alone() -> None:
    code = "import explorer.study, explorer.cli, json, sys; print(json.dumps(sorted(sys.modules)))"
    loaded = set(json.loads(run_python(code)))
    assert "explorer.study" in loaded
    assert "llvmlite" not in loaded


@pytest.mark.parametrize("name", sorted(explorer.__all__))
def test_every_public_name_is_there(name: str) -> None:
    if name == "SensitivityExplorer":
        pytest.importorskip("ipywidgets")
    assert getattr(explorer, name) is not None
    assert name in dir(explorer)


def test_what_the_readme_names_is_there_when_explorer_alone_is_imported() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    named = sorted(set(re.findall(r"\bexplorer\.[a-z_]+\.[A-Za-z_]+", readme)))
    assert {"explorer.plots.roofline", "explorer.masks.pair_mask"} <= {*named}
    # One process, in which explorer is imported anew for each name: torch, which takes seconds, is loaded once.
    code = f"""
import sys
for name in {named!r}:
    for loaded in [module for module in sys.modules if module.split(".")[0] == "explorer"]:
        del sys.modules[loaded]
    import explorer
    assert eval(name) is not None, name
"""
    run_python(code)


def test_an_unknown_public_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Sutdy'"):
        explorer.Sutdy  # noqa: B018
    assert importlib.import_module("explorer") is explorer


def test_every_torch_load_asks_for_weights_only() -> None:
    careless = []
    for _, path, tree in sources():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                flag = [ast.unparse(k.value) for k in node.keywords if k.arg == "weights_only"]
                if flag != ["True"]:
                    careless.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert careless == []


def unsafe_calls(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield line and name of every call that runs, or may run, what it reads."""
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    safe = {"yaml.SafeLoader"}
    safe |= {one.name for one in classes if [ast.unparse(base) for base in one.bases] == ["yaml.SafeLoader"]}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            arguments = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if name in {"eval", "exec", "yaml.unsafe_load", "yaml.full_load"}:
                yield node.lineno, name
            if name == "yaml.load" and arguments.get("Loader") not in safe:
                yield node.lineno, name
            if name in {"np.load", "numpy.load"} and arguments.get("allow_pickle", "False") != "False":
                yield node.lineno, f"{name} with pickles"


# A scan's process writes for its own workers, to a file that no other user can open, what a pool of processes would pickle anyway, only once and not for every cell.
MAY_PICKLE = {Path("explorer/sensitivity/tasks.py")}


def test_no_module_unpickles_or_evaluates_what_it_reads() -> None:
    found = []
    for _, path, tree in sources():
        where = path.relative_to(ROOT)
        found += [f"{where}:{line} {name}" for line, name in unsafe_calls(tree)]
        for node in ast.walk(tree):
            picklers = {"pickle", "dill", "cloudpickle", "joblib"} & set(imported_modules(node, path))
            found += [f"{where} imports {name}" for name in sorted(picklers) if where not in MAY_PICKLE]
    assert found == []


@pytest.mark.parametrize(
    ("code", "caught"),
    [
        ("yaml.load(text, Loader=yaml.Loader)", True),
        ("yaml.load(text, Loader=yaml.SafeLoader)", False),
        ("class Strict(yaml.SafeLoader): ...\nyaml.load(text, Loader=Strict)", False),
        ("class Lax(yaml.Loader): ...\nyaml.load(text, Loader=Lax)", True),
        ("eval(schedule)", True),
        ("model.eval()", False),
        ("np.load(path, allow_pickle=True)", True),
        ("np.load(path, allow_pickle=False)", False),
    ],
)
def test_the_check_for_unsafe_calls_tells_them_from_safe_ones(code: str, caught: bool) -> None:
    assert bool(list(unsafe_calls(ast.parse(code)))) is caught


def tracked_text_files() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    names = [name for name in listed.stdout.split("\0") if name]
    binary = {".safetensors", ".npz", ".png", ".gif", ".gz", ".webp", ".ico"}
    return [ROOT / name for name in names if Path(name).suffix not in binary and (ROOT / name).is_file()]


def test_no_file_names_a_path_of_one_machine() -> None:
    pattern = re.compile(r"(?<![\w.:/*}])/(?:" + "work|home|Users|root|mnt" + r")/[\w.-]+")
    found = []
    for path in tracked_text_files():
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            found += [f"{path.relative_to(ROOT)}:{number} {hit}" for hit in pattern.findall(line)]
    assert found == []
