"""The reranker: scores equal those of one document at a time, whatever the batch, the length or the interruption."""

import random

import numpy as np
import pytest
from conftest import make_text, read_jsonl, write_jsonl

import reranker
from dynamicrag.monot5 import CrossEncoder, MonoT5, load_reranker
from dynamicrag.stage import UserError

PAIRS = [(make_text(random.Random(number), 2, 9) + "?", f"Title {number} " + make_text(random.Random(-number), 0, 45)) for number in range(40)]
LONG = "river " * 170_000  # 1 MB


def load(folder, max_length=96):
    return load_reranker(str(folder), "cpu", "float32", max_length)


def plain_monot5(folder, question, document):
    """The prompt as a whole, on its own."""
    import torch
    from transformers import AutoTokenizer, T5ForConditionalGeneration

    tokenizer, model = AutoTokenizer.from_pretrained(folder), T5ForConditionalGeneration.from_pretrained(folder)
    tokens = tokenizer(f"Query: {question} Document: {document} Relevant:", return_tensors="pt")
    with torch.no_grad():
        logits = model(**tokens, decoder_input_ids=torch.tensor([[model.config.decoder_start_token_id]])).logits[0, 0]
    vocab = tokenizer.get_vocab()
    true, false = logits[vocab["▁true"]].item(), logits[vocab["▁false"]].item()
    return 1 / (1 + np.exp(false - true))


def plain_cross_encoder(folder, question, document):
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        logits = model(**tokenizer(question, document, return_tensors="pt")).logits[0].double().numpy()
    return 1 / (1 + np.exp(-logits[0])) if len(logits) == 1 else np.exp(logits[1]) / np.exp(logits).sum()


# ---------------------------------------------------------------- scores


@pytest.fixture(params=["monot5", "one label", "two labels"])
def checkpoint(request, monot5_dir, cross_encoder_dirs):
    """Folder and plain reference of every kind of reranker."""
    if request.param == "monot5":
        return monot5_dir, plain_monot5
    return cross_encoder_dirs[1 if request.param == "one label" else 2], plain_cross_encoder


def test_scores_equal_one_at_a_time(checkpoint):
    folder, plain = checkpoint
    scores = load(folder, 512).score(PAIRS, batch_tokens=700)
    np.testing.assert_allclose(scores, [plain(folder, *pair) for pair in PAIRS], atol=1e-4)
    assert scores.std() > 0.01, "the tiny model tells documents apart"


def test_batch_order_and_size_do_not_matter(checkpoint):
    model = load(checkpoint[0])
    scores = model.score(PAIRS, batch_tokens=700)
    order = random.Random(0).sample(range(len(PAIRS)), len(PAIRS))
    for tokens in (1, 200, 100_000):
        shuffled = model.score([PAIRS[position] for position in order], batch_tokens=tokens)
        np.testing.assert_allclose(shuffled, scores[order], atol=1e-4)
    assert model.score([]).shape == (0,)


def test_the_kind_is_told_by_the_configuration(monot5_dir, cross_encoder_dirs, encoder_dir, tmp_path):
    assert isinstance(load(monot5_dir), MonoT5) and isinstance(load(cross_encoder_dirs[1]), CrossEncoder)
    with pytest.raises(UserError, match="is no reranker"):
        load(encoder_dir)
    with pytest.raises(UserError, match="cannot be loaded as a reranker"):
        load(tmp_path)


def test_true_and_false_are_the_tokens_of_t5(monot5_dir, tmp_path):
    from transformers import AutoTokenizer

    model, vocab = load(monot5_dir), AutoTokenizer.from_pretrained(monot5_dir).get_vocab()
    assert model.true_false == [vocab["▁true"], vocab["▁false"]]
    model.tokenizer = lambda text, **_: {"input_ids": [5, 6]}
    with pytest.raises(UserError, match="'true' as the tokens"):
        model._one_token("true")


def test_relevant_survives_a_long_document(monot5_dir):
    model = load(monot5_dir)
    whole = model.tokenizer("Query: oil? Document: Title river Relevant:")["input_ids"]
    ending = model.tokenizer("Relevant:")["input_ids"]
    texts = ["Title river", LONG, "x" * 1_000_000, make_text(random.Random(1), 60, 60), ""]
    tokens = [tokens for tokens, _ in model.tokenize([("oil?", text) for text in texts])]
    assert tokens[0] == whole
    for long in tokens[1:4]:
        assert len(long) == 96 and long[-len(ending) :] == ending and ending[-1] == model.tokenizer.eos_token_id
        assert model.tokenizer.decode(long).startswith("Query: oil? Document:")
    assert tokens[4] == model.tokenizer("Query: oil? Document: Relevant:")["input_ids"]


def test_long_questions_leave_room_for_the_document(checkpoint):
    model = load(checkpoint[0])
    (tokens, _), (other, _) = model.tokenize([(LONG, "oil"), (LONG, "gas")])
    assert len(tokens) <= 96 and tokens != other
    assert 0 <= model.score([(LONG, LONG)])[0] <= 1


def test_a_cross_encoder_cuts_only_the_document(cross_encoder_dirs):
    model = load(cross_encoder_dirs[1])
    question = make_text(random.Random(2), 48, 48)  # half the window, the most a question may take
    (tokens, types), = model.tokenize([(question, LONG)])
    assert len(tokens) == len(types) == 96 and sum(types) == 96 - 50
    assert model.tokenizer.decode(tokens[1:49]) == question


# ---------------------------------------------------------------- the stage


@pytest.fixture
def retrieved(tmp_path):
    """13 questions with 0 to 6 documents."""
    return write_jsonl(tmp_path / "in.jsonl", [
        {"id": f"q{number}", "question": PAIRS[number][0], "extra": number, "ctxs": [
            {"id": f"d{position}", "title": f"Title {position}", "text": PAIRS[number + position][1], "score": float(-position)}
            for position in range(number % 7)
        ]} for number in range(13)
    ])


def run(folder, source, output, *flags):
    reranker.main([
        "--model_name_or_path", str(folder), "--input_file", str(source), "--output_file", str(output), "--dtype", "float32",
        "--device", "cpu", *map(str, flags),
    ])
    return read_jsonl(output)


def test_every_document_is_judged(checkpoint, retrieved, tmp_path):
    folder, plain = checkpoint
    rows = run(folder, retrieved, tmp_path / "new" / "out.jsonl")
    labels = set()
    for row, given in zip(rows, read_jsonl(retrieved), strict=True):
        assert row["extra"] == given["extra"] and "ctxs" not in row
        for doc, before in zip(row["docs"], given["ctxs"], strict=True):
            assert {key: doc[key] for key in before} == before
            assert abs(doc["rerank_score"] - plain(folder, row["question"], f"{doc['title']} {doc['text']}")) < 1e-4
            assert doc["rerank_label"] == ("true" if doc["rerank_score"] > 0.5 else "false")
            labels.add(doc["rerank_label"])
    assert labels <= {"true", "false"} and labels


def test_the_title_is_part_of_the_input(monot5_dir, tmp_path):
    docs = [{"id": "a", "title": "river", "text": "oil"}, {"id": "b", "title": "gas", "text": "oil"}]
    source = write_jsonl(tmp_path / "in.jsonl", [{"id": "q", "question": "oil?", "docs": docs}])
    (row,) = run(monot5_dir, source, tmp_path / "out.jsonl")
    assert row["docs"][0]["rerank_score"] != row["docs"][1]["rerank_score"]


def rows_with(*counts):
    return [{"id": str(number), "question": "q", "docs": [{"id": f"{number}.{n}", "title": "", "text": "t"} for n in range(count)]}
            for number, count in enumerate(counts)]


def test_labels_and_sorting():
    values = [0.5, 0.25, 0.5000001, 0.25, 1.0]
    (empty, row), shown = reranker.rerank(rows_with(0, 5), lambda pairs: values, None, False), []
    assert empty["docs"] == [] and [doc["rerank_label"] for doc in row["docs"]] == ["false", "false", "true", "false", "true"]
    (_, row) = reranker.rerank(rows_with(0, 5), lambda pairs: values, None, True)
    assert [doc["id"] for doc in row["docs"]] == ["1.4", "1.2", "1.0", "1.1", "1.3"], "ties keep the retriever's order"
    rows = reranker.rerank(rows_with(4, 2), lambda pairs: shown.extend(pairs) or [0.1, 0.2, 0.3, 0.4, 0.6], 3, True)
    assert len(shown) == 5 and [[doc["id"] for doc in row["docs"]] for row in rows] == [["0.2", "0.1", "0.0"], ["1.1", "1.0"]]


@pytest.mark.parametrize("value", [float("nan"), 1.5, -0.1])
def test_a_score_that_is_no_probability_is_an_error(value):
    with pytest.raises(UserError, match=r"question '0' and document '0\.0'"):
        reranker.rerank(rows_with(1), lambda pairs: [value], None, False)


def test_scores_of_another_reranker(retrieved, tmp_path, caplog):
    def run_file(**scores):
        path = tmp_path / "other.trec"
        path.write_text("".join(f"q2 Q0 {doc} 1 {score} other\n" for doc, score in scores.items()))
        return "--run", path

    rows = run("no model", retrieved, tmp_path / "a.jsonl", *run_file(d1=0.75, elsewhere=1), "--sort")
    assert [(doc["id"], doc["rerank_score"], doc["rerank_label"]) for doc in rows[2]["docs"]] == [("d1", 0.75, "true"), ("d0", 0.0, "false")]
    assert all(doc["rerank_score"] == 0 for row in rows[3:] for doc in row["docs"])
    assert "other.trec: 12 of 13 questions have no ranking in it; their documents score 0" in caplog.text
    (tmp_path / "others.trec").write_text("x Q0 d0 1 0.5 other\n")
    with pytest.raises(UserError, match=r"others\.trec: has none of the 13 questions of .*in\.jsonl; it is a run of others"):
        run("no model", retrieved, tmp_path / "d.jsonl", "--run", tmp_path / "others.trec")
    assert not list(tmp_path.glob("d.jsonl*")), "refused before the first question"
    with pytest.raises(UserError, match=r"gives 1\.5 for question 'q2' and document 'd0'.*--logits"):
        run("no model", retrieved, tmp_path / "b.jsonl", *run_file(d0=1.5))
    rows = run("no model", retrieved, tmp_path / "c.jsonl", *run_file(d0=1.5, d1=-2, elsewhere=-10000), "--logits")
    assert [doc["rerank_score"] for doc in rows[2]["docs"]] == pytest.approx([1 / (1 + np.exp(-1.5)), 1 / (1 + np.exp(2))])


def test_labels_of_another_reranker_are_replaced_and_it_is_said(retrieved, tmp_path, caplog):
    """Published training data has labels without scores: judged again, both are ours."""
    (tmp_path / "r.trec").write_text("".join(f"{row['id']} Q0 {doc['id']} 1 0.9 x\n" for row in read_jsonl(retrieved) for doc in row["ctxs"]))
    labelled = tmp_path / "labelled.jsonl"
    write_jsonl(labelled, [{**row, "ctxs": [{**doc, "rerank_label": "false"} for doc in row["ctxs"]]} for row in read_jsonl(retrieved)])
    run("no model", retrieved, tmp_path / "a.jsonl", "--run", tmp_path / "r.trec")
    assert "already" not in caplog.text
    rows = run("no model", labelled, tmp_path / "b.jsonl", "--run", tmp_path / "r.trec")
    assert {(doc["rerank_score"], doc["rerank_label"]) for row in rows for doc in row["docs"]} == {(0.9, "true")}
    assert "labelled.jsonl" in caplog.text and "is replaced" in caplog.text


def test_a_run_of_a_few_questions_continues_where_it_has_none(retrieved, tmp_path, monkeypatch):
    """What is asked is whether it has any of the file, not any of those that are left."""
    monkeypatch.setattr(reranker, "QUESTIONS_A_CHUNK", 4)
    (tmp_path / "other.trec").write_text("q2 Q0 d1 1 0.75 other\n")
    flags = ("--run", tmp_path / "other.trec")
    run("no model", retrieved, tmp_path / "whole.jsonl", *flags)
    rerank = reranker.rerank

    def fail_later(rows, *rest):
        if rows[0]["id"] == "q4":
            raise KeyboardInterrupt
        return rerank(rows, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(reranker, "rerank", fail_later)
        run("no model", retrieved, tmp_path / "torn.jsonl", *flags)
    assert len(read_jsonl(tmp_path / "torn.jsonl.partial")) == 4
    run("no model", retrieved, tmp_path / "torn.jsonl", *flags)
    assert (tmp_path / "torn.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_reranking_interrupted(monot5_dir, retrieved, tmp_path, monkeypatch):
    monkeypatch.setattr(reranker, "QUESTIONS_A_CHUNK", 4)
    run(monot5_dir, retrieved, tmp_path / "whole.jsonl")
    score, calls = MonoT5.score_tokens, []

    def fail_later(self, *given):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(1)
        return score(self, *given)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(MonoT5, "score_tokens", fail_later)
        run(monot5_dir, retrieved, tmp_path / "torn.jsonl")
    with (tmp_path / "torn.jsonl.partial").open("ab") as file:
        file.write(b'{"id": "torn')
    calls.clear()
    with monkeypatch.context() as patch:
        patch.setattr(MonoT5, "score_tokens", lambda self, *given: (calls.append(1), score(self, *given))[1])
        run(monot5_dir, retrieved, tmp_path / "torn.jsonl")
    assert len(calls) == 2, "two of four chunks were kept"
    assert (tmp_path / "torn.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_rows_without_documents_are_named(monot5_dir, tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", [{"id": "q", "question": "oil?"}])
    with pytest.raises(UserError, match=r"in\.jsonl:1: key 'docs'"):
        run(monot5_dir, source, tmp_path / "out.jsonl")


def test_no_gpu_is_said(monot5_dir, retrieved, tmp_path, caplog):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    reranker.main(["--model_name_or_path", str(monot5_dir), "--input_file", str(retrieved), "--output_file",
                   str(tmp_path / "out.jsonl"), "--device", "cuda"])
    assert "no GPU here; running on the CPU" in caplog.text and len(read_jsonl(tmp_path / "out.jsonl")) == 13
