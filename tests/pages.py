"""The pages of the documentation, and the tables on them."""

import re

from stages import REPO


def page(path: str) -> str:
    return (REPO / path).read_text(encoding="utf-8")


def table(text: str, header: str) -> list[list[str]]:
    """The cells of the table whose first line begins with `header`."""
    after = text.split(f"\n| {header}", 1)[1]
    body = after.split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip()[1:-1])] for line in body]


def code(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)
