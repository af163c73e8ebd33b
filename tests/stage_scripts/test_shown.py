"""Every stage has the same number of documents: the labelled documents are shown, or the error names both numbers."""

from pathlib import Path

import pytest
from conftest import at, write_jsonl
from stubs import question

import inference
from dynamicrag.rows.shown import labelled_documents
from dynamicrag.stage import UserError


@pytest.mark.parametrize(
    ("row", "labelled"),
    [({}, None), ({"true_id": [1]}, None), ({"true_id": [1], "false_id": [2, 3]}, 3), ({"true_id": [], "false_id": []}, 0), ({"true_id": 1, "false_id": []}, None)],
)
def test_how_many_documents_a_row_was_labelled_over(row, labelled):
    assert labelled_documents(row) == labelled


@pytest.mark.parametrize(("flags", "refused"), [
    (["--topn", "2"], False), ([], True), (["--topn", "3"], True), (["--topn", "1"], True), (["--topn", "3", "--selector", "top:3", "none"], False),
])
def test_questions_held_out_are_asked_as_they_were_labelled(here, flags, refused):
    """2 of 5 documents were labelled. Selectors without training take any number."""
    write_jsonl(Path("dev.jsonl"), [question(n, true_id=[2], false_id=[1]) for n in (1, 2)])
    arguments = ["--input-json", "dev.jsonl", "--output-json", "r_{selector}.json", "--template", "t.jinja", *flags]
    if not refused:
        inference.main(arguments)
        return
    number = flags[1] if flags else "40"
    with pytest.raises(UserError, match=at("dev.jsonl: row q1", f"--topn {number}", "--topn 2", f"--n_docs {number}")):
        inference.main(arguments)
    assert here == [], "no model was loaded"
