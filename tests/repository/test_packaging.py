"""pyproject.toml and the requirements files name the same packages, and the wheel has all files of the package."""

import shutil
import subprocess
import sys
import tomllib
import zipfile

import pytest
from packaging.requirements import Requirement
from stages import REPO

PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))
EXTRAS = PROJECT["project"]["optional-dependencies"]


def pinned(name: str) -> dict[str, str]:
    """The versions in a requirements file by package, or "" for a package without a version."""
    lines = [line.strip() for line in (REPO / name).read_text(encoding="utf-8").splitlines()]
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {requirement.name: str(requirement.specifier).removeprefix("==") for requirement in requirements}


@pytest.mark.parametrize(("file", "engine"), [("requirements.txt", "gpu"), ("requirements-cpu.txt", "cpu")])
def test_requirements_pin_what_the_project_needs_and_nothing_else(file, engine):
    needed = [Requirement(line) for line in (*PROJECT["project"]["dependencies"], *EXTRAS[engine], *EXTRAS["cluster"], *EXTRAS["grpo"], *EXTRAS["factbook"], *EXTRAS["dev"])]
    pins = pinned(file)
    assert pins.keys() == {requirement.name for requirement in needed}
    assert not [requirement.name for requirement in needed if pins[requirement.name] not in requirement.specifier]


def test_the_trainer_is_pinned_as_its_group_says():
    group = [Requirement(line) for line in PROJECT["dependency-groups"]["train"]]
    assert pinned("requirements-train.txt") == {requirement.name: str(requirement.specifier).removeprefix("==") for requirement in group}


def test_a_wheel_holds_every_module_and_the_files_of_the_report(tmp_path):
    source = tmp_path / "source"  # a build leaves files in the source folder
    shutil.copytree(REPO / "dynamicrag", source / "dynamicrag")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPO / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path, source]
    subprocess.run(command, check=True, cwd=tmp_path)
    [wheel] = tmp_path.glob("*.whl")
    packed = set(zipfile.ZipFile(wheel).namelist())
    wanted = {str(path.relative_to(REPO)) for path in (REPO / "dynamicrag").rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert wanted <= packed
