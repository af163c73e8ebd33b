"""The package's rooms: each is entered from those above it alone, so that a part can be read without the others."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "dynamicrag"
# From the ground up. A room may import the rooms before it, and dynamicrag.stage.
ROOMS = ["files", "rows", "models", "search", "llm", "evaluation", "reward", "report"]
MODULES = sorted(PACKAGE.rglob("*.py"))
MAX_LINES = 260


def rooms_of_imports(path: Path) -> set[str]:
    """The rooms that a module imports, wherever in it the import stands."""
    imported = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: a relative import"
            imported += [f"{node.module}.{name.name}" for name in node.names] if node.module == "dynamicrag" else [node.module]
        elif isinstance(node, ast.Import):
            imported += [name.name for name in node.names]
    return {name.split(".")[1] for name in imported if name.startswith("dynamicrag.")} - {"stage"}


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
