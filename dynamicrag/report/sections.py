"""What the page consists of."""

import re
from dataclasses import dataclass, field

from dynamicrag.report.drawing import Picture


@dataclass
class Table:
    """Cells are text; the first column names the line."""

    caption: str
    header: list[str]
    rows: list[list[str]]
    note: str = ""

    def numeric_columns(self) -> list[int]:
        """The columns of numbers, which stand to the right."""
        return [column for column in range(1, len(self.header)) if all(row[column][:1].isdigit() or not row[column] for row in self.rows)]


@dataclass
class Section:
    """A part of the page; `missing` says in a line what could not be shown and what makes it."""

    anchor: str
    title: str
    text: str = ""
    tables: list[Table] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    missing: str = ""


def slug(name: str) -> str:
    """A name as part of a file name."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-.") or "set"

