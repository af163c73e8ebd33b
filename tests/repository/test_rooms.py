"""The rooms of the package: a room imports only the rooms below it, so that it can be read without the others."""

import re

import pytest
from rooms import ROOMS, rooms_of_imports
from stages import REPO

PACKAGE = REPO / "dynamicrag"
MODULES = sorted(PACKAGE.rglob("*.py"))
MAX_LINES = 260


def test_the_package_is_its_rooms():
    assert {path.name for path in PACKAGE.iterdir() if path.name != "__pycache__"} == {"__init__.py", "stage.py", *ROOMS}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_nothing_from_a_room_above_its_own(path):
    room = path.relative_to(PACKAGE).parts[0]
    allowed = ROOMS[: ROOMS.index(room) + 1] if room in ROOMS else []
    assert rooms_of_imports(path) <= set(allowed)


@pytest.mark.parametrize("path", [*MODULES, *sorted(PACKAGE.parent.glob("*.py"))], ids=lambda path: str(path.relative_to(PACKAGE.parent)))
def test_a_module_or_stage_is_short_enough_to_be_read_at_once(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LINES


@pytest.mark.parametrize("path", sorted((REPO / "tests").rglob("*.py")), ids=lambda path: str(path.relative_to(REPO / "tests")))
def test_no_module_imports_a_test_module(path):
    """Code that several test modules use is in a module of its own. Programs within strings count too."""
    assert re.findall(r"^\s*(?:from|import) +test_\w+.*", path.read_text(encoding="utf-8"), re.MULTILINE) == []
