"""Tests check the places, keys and values that a message names, never its words. conftest.py has at(), naming(), names() and logged() for this."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

PROSE = re.compile(r"\b[a-z]+ [a-z]+ [a-z]+\b")
OUR_ERRORS = re.compile(r"\b(UserError|RowError)\b")
OUR_MESSAGES = re.compile(r"caplog\.text|\.stderr|\bstr\((error|raised)\.value\)|\[.error.\]|\.err|\bsaid|message")


def asserted(source: str) -> Iterator[tuple[int, str]]:
    """The line and the text of each literal with which a test matches an error or searches a message."""
    for node in ast.walk(ast.parse(source)):
        literal, where = None, ""
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if node.func.attr == "raises" and node.args and OUR_ERRORS.search(ast.unparse(node.args[0])):
                literal = next((keyword.value for keyword in node.keywords if keyword.arg == "match"), None)
                where = ".err"
            elif node.func.attr in ("startswith", "endswith", "count") and node.args:
                literal, where = node.args[0], ast.unparse(node.func.value)
        elif isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.In | ast.NotIn | ast.Eq):
            literal, where = node.left, ast.unparse(node.comparators[0])
        if isinstance(literal, ast.Constant | ast.JoinedStr) and OUR_MESSAGES.search(where):
            yield node.lineno, ast.unparse(literal)


def test_no_test_holds_to_the_words_of_a_message():
    files = sorted(Path(__file__).parents[1].rglob("*.py"))
    assert [(path.name, line, text) for path in files for line, text in asserted(path.read_text(encoding="utf-8")) if PROSE.search(text)] == []


def test_such_an_assertion_is_found():
    lines = [
        'with pytest.raises(UserError, match=r"a\\.tsv: is not a file"): pass', 'assert "2 of 3 rows are missing here" in caplog.text',
        'assert f"{name}: there is no such file" not in done.stderr', 'assert str(error.value).startswith("a.tsv: was not found here")',
    ]
    assert sorted(line for line, text in asserted("\n".join(lines)) if PROSE.search(text)) == [1, 2, 3, 4]
