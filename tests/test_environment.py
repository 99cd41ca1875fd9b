"""Three files say what this project runs on: pyproject.toml what may work, constraints.txt what is tested, environment.yml the same for conda."""

from __future__ import annotations

import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
ENVIRONMENT = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))

# Where conda-forge calls a package otherwise than pip does.
PIP_NAME = {"pytorch-cpu": "torch", "pytorch": "torch"}


def requirements(*extras: str) -> dict[str, SpecifierSet]:
    """Return what pyproject.toml asks for, by canonical name, with these extras."""
    lines = [
        *PROJECT["dependencies"],
        *(line for extra in extras for line in PROJECT["optional-dependencies"][extra]),
    ]
    parsed = [Requirement(line) for line in lines]
    return {canonicalize_name(one.name): one.specifier for one in parsed}


def conda_requirements() -> dict[str, SpecifierSet]:
    found = {}
    for line in ENVIRONMENT["dependencies"]:
        if isinstance(line, str):
            match = re.fullmatch(r"([A-Za-z0-9_.-]+?)\s*((?:[<>=!~].*)?)", line)
            assert match, line
            name, spec = match.groups()
            # conda's `python=3.12` means any 3.12
            spec = re.sub(r"^=(?!=)(.*)$", r"==\1.*", spec)
            found[canonicalize_name(PIP_NAME.get(name, name))] = SpecifierSet(spec)
    return found


def pins() -> dict[str, Version]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line.strip() and not line.startswith("#")]
    return {canonicalize_name(name): Version(version) for name, version in pairs}


def test_conda_and_pyproject_ask_for_the_same_versions() -> None:
    wanted = requirements("app")
    conda = conda_requirements()
    shared = conda.keys() - {"python", "pip"}
    assert shared <= wanted.keys(), "environment.yml names a package that pyproject.toml does not ask for"
    assert {name: conda[name] for name in shared} == {name: wanted[name] for name in shared}


def test_conda_installs_this_package_with_the_app_by_pip() -> None:
    by_pip = [line["pip"] for line in ENVIRONMENT["dependencies"] if isinstance(line, dict)]
    assert by_pip == [["-e .[app]"]]
    assert ENVIRONMENT["name"] == PROJECT["name"]


def test_conda_takes_torch_in_its_cpu_build() -> None:
    assert any(
        isinstance(line, str) and line.startswith("pytorch-cpu") for line in ENVIRONMENT["dependencies"]
    )


def test_conda_s_python_is_one_that_pyproject_accepts() -> None:
    minor = str(conda_requirements()["python"]).removeprefix("==").removesuffix(".*")
    assert Version(minor) in SpecifierSet(PROJECT["requires-python"])
    assert f"Programming Language :: Python :: {minor}" in PROJECT["classifiers"]


def test_every_requirement_is_pinned_to_a_version_that_it_accepts() -> None:
    pinned = pins()
    for name, accepted in requirements("app", "test", "bench").items():
        assert name in pinned, f"constraints.txt does not pin {name}"
        assert accepted.contains(pinned[name], prereleases=True), (
            f"{name}: {pinned[name]} is not in {accepted}"
        )


def test_torch_is_pinned_without_naming_a_build() -> None:
    torch = pins()["torch"]
    assert torch.local is None
    assert torch > Version("2.10"), "torch.load of 2.10 and older has known holes"


def test_the_tests_run_with_the_pinned_versions() -> None:
    pinned = pins()
    wrong = {}
    for name in requirements("app", "test"):
        installed = Version(metadata.version(name))
        if Version(installed.public) != pinned[name]:
            wrong[name] = f"{installed} is installed, {pinned[name]} pinned"
    if wrong and not (ROOT / ".venv" / ".set-up").exists():
        pytest.skip(f"not the environment that make sets up: {wrong}")
    assert wrong == {}


def test_the_version_stands_in_one_place() -> None:
    import explorer

    assert metadata.version("sparsity-explorer") == explorer.__version__
    assert "version" in PROJECT["dynamic"]
