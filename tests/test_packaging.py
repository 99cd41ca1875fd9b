"""What leaves as a wheel: everything that the package needs at run time, nothing else, and it works far from the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

from explorer.errors import FormatError
from explorer.widgets import notebook_path

ROOT = Path(__file__).resolve().parents[1]


def run(*command: str | Path, cwd: Path) -> str:
    environment = {
        name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "VIRTUAL_ENV"}
    }
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=False, cwd=cwd, env=environment
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    # Not isolated: with the pinned build tools of this environment, and without a network.
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def contents(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the wheel into a new environment, which borrows the dependencies of this one; return its Python."""
    folder = tmp_path_factory.mktemp("installed")
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    run(
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        wheel,
        cwd=folder,
    )
    purelib = Path(
        run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip()
    )
    # A path named in a .pth comes after the environment's own packages, and its own .pth files (the editable install) are not read.
    (purelib / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    return python


def test_the_wheel_carries_every_module_and_every_file_beside_them(contents: set[str]) -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "explorer"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    tracked = {name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()}
    assert len(tracked) > 30
    assert tracked - contents == set()


@pytest.mark.parametrize(
    ("folder", "ending"),
    [
        ("explorer/widgets/static/", ".js"),
        ("explorer/widgets/static/", ".css"),
        ("explorer/models/demo/", ".safetensors"),
        ("explorer/models/demo/", ".json"),
        ("explorer/data/demo/", ""),
        ("explorer/", "py.typed"),
        ("explorer/widgets/notebooks/", "explorer.ipynb"),
    ],
)
def test_the_wheel_carries_what_is_not_python(contents: set[str], folder: str, ending: str) -> None:
    found = [
        name
        for name in contents
        if name.startswith(folder) and name.endswith(ending) and not name.endswith(".py")
    ]
    assert found, f"no {folder}*{ending} in the wheel"


def test_the_wheel_carries_nothing_else(contents: set[str]) -> None:
    strays = {name for name in contents if name.split("/")[0] != "explorer" and ".dist-info/" not in name}
    assert strays == set()
    assert not [name for name in contents if "__pycache__" in name or ".ipynb_checkpoints" in name]


def test_the_wheel_says_what_it_is(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        about = Parser().parsestr(archive.read(name).decode())
        assert [entry for entry in archive.namelist() if entry.endswith(".dist-info/licenses/LICENSE")]
    assert about["Name"] == "sparsity-explorer"
    assert about["License-Expression"] == "Apache-2.0"
    assert set(about.get_all("Provides-Extra")) == {"app", "bench", "cluster", "models", "tables", "test"}


def test_the_wheel_is_small_enough_for_a_slow_line(wheel: Path) -> None:
    assert wheel.stat().st_size < 25e6


@pytest.mark.slow
def test_the_installed_command_works_away_from_the_checkout(installed: Path, tmp_path: Path) -> None:
    said = run(installed.with_name("sparsity-explorer"), "--help", cwd=tmp_path)
    for command in ("inspect", "sensitivity", "prune", "app"):
        assert command in said


@pytest.mark.slow
def test_the_installed_copy_loads_its_own_demo(installed: Path, tmp_path: Path) -> None:
    said = run(
        installed,
        "-c",
        "import explorer, torch\n"
        "from explorer.widgets.notebook_path import app_notebook\n"
        "model = explorer.load_model('demo:fashion-resnet')\n"
        "data = explorer.load_data('demo:fashion')\n"
        "inputs, labels = data.test_tensors()\n"
        "with torch.no_grad():\n"
        "    right = (model.module(inputs[:200]).argmax(1) == labels[:200]).float().mean().item()\n"
        "print(explorer.__file__, app_notebook(), right, sep='\\n')\n",
        cwd=tmp_path,
    )
    package, notebook, right = said.splitlines()
    home = installed.parents[1].resolve()
    assert Path(package).resolve().is_relative_to(home)
    assert Path(notebook).resolve().is_relative_to(home)
    assert float(right) > 0.85


def test_the_checkout_s_notebook_is_the_app() -> None:
    assert notebook_path.app_notebook() == ROOT / "notebooks" / "explorer.ipynb"


def test_an_incomplete_installation_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lost = tmp_path / "explorer" / "widgets" / "notebook_path.py"
    monkeypatch.setattr(notebook_path, "__file__", str(lost))
    with pytest.raises(FormatError, match="incomplete"):
        notebook_path.app_notebook()
