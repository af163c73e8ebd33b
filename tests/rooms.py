"""The rooms of the package, and the rooms that a module imports."""

import ast
from pathlib import Path

# A room may import the rooms before it, and dynamicrag.stage.
ROOMS = ["files", "rows", "models", "search", "llm", "evaluation", "reward", "report"]


def rooms_of_imports(path: Path) -> set[str]:
    """The rooms that a module imports, at its top or within a function."""
    imported = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: a relative import"
            imported += [f"{node.module}.{name.name}" for name in node.names] if node.module == "dynamicrag" else [node.module]
        elif isinstance(node, ast.Import):
            imported += [name.name for name in node.names]
    return {name.split(".")[1] for name in imported if name.startswith("dynamicrag.")} - {"stage"}
