"""dynamicrag/rewards.py and reward_trajectories.py: the five terms of a trajectory's reward."""

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import reward_trajectories
from dynamicrag.jsonio import read_json
from dynamicrag.prompts import Prompts
from dynamicrag.rewards import TERMS, BertScore, combine, correctness, length_term, parse_weights
from dynamicrag.stage import UserError

EQUAL = dict.fromkeys(TERMS, 0.2)


# ---------------------------------------------------------------- weights


@pytest.mark.parametrize(
    ("text", "weights"),
    [
        ("em=1", {"em": 1.0}), ("em=.2,bert=.2,rouge=.2,length=.2,judge=.2", EQUAL), (" em = 1 , length = 3", {"em": 1.0, "length": 3.0}),
        ("em=1,bert=0", {"em": 1.0, "bert": 0.0}),
    ],
)
def test_weights_are_read(text, weights):
    assert parse_weights(text) == weights


@pytest.mark.parametrize(
    "text",
    ["", "em", "em=", "em=x", "=1", "emm=1", "em=-1", "em=0", "em=0,bert=0", "em=1,,bert=1", "em=nan", "em=inf", "em=1,em=2", "em:1", "em=1;bert=1"],
)
def test_weights_that_make_no_sense_are_refused(text):
    with pytest.raises(UserError, match="--weights"):
        parse_weights(text)


@pytest.mark.parametrize(
    ("terms", "weights", "reward"),
    [
        (dict.fromkeys(TERMS, 1.0), EQUAL, 1.0), (dict.fromkeys(TERMS, 0.0), EQUAL, 0.0),
        ({"em": 1.0, "bert": 0.5, "rouge": 0.5, "length": 0.25}, EQUAL, 2.25 / 4),  # no judge: rescaled
        ({"em": 1.0, "length": 0.5}, {"em": 3.0, "length": 1.0}, 3.5 / 4),  # weights need not sum to one
        ({"em": 1.0, "rouge": 0.0}, {"em": 0.2}, 1.0),  # terms without a weight do not count
    ],
)
def test_a_reward_is_the_weighted_mean_of_the_terms_there_are(terms, weights, reward):
    assert combine(terms, weights) == pytest.approx(reward)


def test_weights_of_terms_that_were_not_computed_are_an_error():
    with pytest.raises(UserError, match="none of the weighted terms"):
        combine({"em": 1.0}, {"judge": 1.0})


@given(
    terms=st.dictionaries(st.sampled_from(TERMS), st.floats(0, 1), min_size=1),
    weights=st.dictionaries(st.sampled_from(TERMS), st.floats(0.01, 100), min_size=5, max_size=5),
)
def test_a_reward_lies_between_its_terms(terms, weights):
    assert min(terms.values()) - 1e-9 <= combine(terms, weights) <= max(terms.values()) + 1e-9


# ---------------------------------------------------------------- terms


@pytest.mark.parametrize(("k", "term"), [(0, 1.0), (1, 0.5), (2, 1 / 3), (14, 1 / 15)])
def test_the_length_term_is_one_over_one_plus_k(k, term):
    assert length_term(k) == term


@pytest.mark.parametrize(
    ("response", "row", "how", "em"),
    [
        ("Paris", {"answers": ["x", "paris"]}, "exact", 1), ("It is Paris.", {"answers": ["Paris"]}, "exact", 0),
        ("It is Paris.", {"answers": ["Paris"]}, "contains", 1), ("", {"answers": ["Paris"]}, "exact", 0), ("", {"answers": ["Paris"]}, "contains", 0),
        ("SUPPORTS.", {"dataset": "fever", "answers": ["SUPPORTS"]}, "exact", 1), ("not SUPPORTS", {"dataset": "fever", "answers": ["SUPPORTS"]}, "contains", 0),
        ("", {"answers": ["", "Paris"]}, "exact", 0),
        ("one", {"dataset": "asqa", "answers": ["one", "two"], "qa_pairs": [{"short_answers": ["one"]}, {"short_answers": ["two"]}]}, "exact", 0.5),
        ("one", {"dataset": "asqa", "answers": ["one"], "qa_pairs": [{"short_answers": ["one"]}, {"short_answers": [""]}, {"short_answers": []}]}, "exact", 1),
        ("one", {"dataset": "asqa", "answers": ["one"]}, "exact", 1),
    ],
)
def test_the_em_term_is_the_data_sets_own_notion_of_right(response, row, how, em):
    assert correctness(response, row, how) == em


# ---------------------------------------------------------------- BERTScore


PAIRS = [
    ("river " * 500, ["mountain " * 400]),  # longer than the encoder's positions
    ("river mountain country", ["river mountain country"]), ("river", ["oil gas farming", "river area"]), ("", ["river"]), (" ", ["river"]),
    ("oil gas", ["", "oil"]), ("president court election which of the longest", ["climate"]), ("river", ["river area", "oil gas farming"]),
]


@pytest.fixture(scope="module")
def bert(encoder_dir):
    return BertScore(str(encoder_dir), None, "cpu", batch_size=3)


def test_bertscore_lies_between_0_and_1_and_an_empty_response_scores_0(bert):
    scores = bert.score(PAIRS)
    assert all(0 <= score <= 1 for score in scores)
    assert scores[1] == pytest.approx(1, abs=1e-5)
    assert scores[3] == scores[4] == 0
    assert 0 < scores[2] < 1


def test_bertscore_takes_the_best_gold_answer(bert):
    both, first, second = bert.score([("river", ["oil gas farming", "river area"]), ("river", ["oil gas farming"]), ("river", ["river area"])])
    assert first != pytest.approx(second, abs=1e-4)
    assert both == max(first, second)


def test_bertscore_depends_neither_on_the_batch_nor_on_the_order(bert, encoder_dir):
    scores = bert.score(PAIRS)
    assert bert.score(PAIRS[::-1])[::-1] == pytest.approx(scores, abs=1e-5)
    assert [bert.score([pair])[0] for pair in PAIRS] == pytest.approx(scores, abs=1e-5)
    assert BertScore(str(encoder_dir), None, "cpu", batch_size=1).score(PAIRS) == pytest.approx(scores, abs=1e-5)
    assert scores[2] == scores[7]


def test_bertscore_agrees_with_the_package(bert, encoder_dir):
    import bert_score

    settings = Path(shutil.copytree(encoder_dir, "encoder")) / "tokenizer_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "model_max_length": 128}))
    _, _, f1 = bert_score.score(["river area"], ["oil gas farming"], model_type="./encoder", num_layers=2, device="cpu")
    assert bert.score([("river area", ["oil gas farming"])]) == [pytest.approx(float(f1[0]), abs=1e-5)]


def test_bertscore_uses_the_layer_it_is_given(bert, encoder_dir):
    pair = [("river area", ["oil gas farming"])]
    assert BertScore(str(encoder_dir), 1, "cpu").score(pair) != pytest.approx(bert.score(pair), abs=1e-4)


def test_bertscore_of_nothing(bert):
    assert bert.score([]) == []
    assert bert.score([("x", [])]) == [0.0]


@pytest.mark.parametrize(("model", "layer"), [("missing/model", None), ("{encoder}", 99)])
def test_a_bert_model_that_is_missing_or_has_no_such_layer_is_an_error(model, layer, encoder_dir):  # behaviour 18
    with pytest.raises(UserError, match="--bert_model"):
        BertScore(model.format(encoder=encoder_dir), layer, "cpu")


# ---------------------------------------------------------------- the stage


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def make_row(number: int, trajectories: list[tuple[list[int], str]], **more) -> dict:
    docs = [{"id": f"d{n}", "title": "", "text": "t"} for n in range(1, 6)]
    return {
        "id": f"q{number}", "question": "what?", "answers": [f"river {number}"], "docs": docs, "docs_shown": 5,
        "id_lists": [ids for ids, _ in trajectories], "responses": [response for _, response in trajectories], **more,
    }


def reward(rows: list[dict], *flags: str) -> list[dict]:
    Path("in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    reward_trajectories.main(["--input_file", "in.jsonl", "--output_file", "out.jsonl", "--overwrite", *flags])
    return [row for _, row in read_json("out.jsonl")]


ROWS = [make_row(1, [([1, 2], "river 1"), ([], "river 1"), ([3], "oil"), ([], "")]), make_row(2, []), make_row(3, [([1], "river 1")])]


def test_each_trajectory_has_its_own_terms_and_reward():  # behaviour 16
    rows = reward(ROWS, "--weights", "em=1,length=1")
    terms = rows[0]["score_terms"]
    assert [term["length"] for term in terms] == [1 / 3, 1.0, 0.5, 1.0]
    assert [term["em"] for term in terms] == [1, 1, 0, 0]
    assert terms[3]["rouge"] == 0
    assert rows[0]["response_scores"] == pytest.approx([4 / 6, 1.0, 0.25, 0.5])
    assert rows[1]["response_scores"] == rows[1]["score_terms"] == []
    assert rows[2]["score_terms"][0]["em"] == 0, "an answer is scored against its own question"
    assert "bert" not in terms[0]


def test_equal_answers_from_different_documents_differ_by_length():  # behaviour 17
    scores = reward(ROWS, "--weights", "em=.5,rouge=.4,length=.1")[0]["response_scores"]
    assert scores[1] > scores[0]


def test_without_a_judge_the_other_weights_are_rescaled_and_it_says_so(caplog, encoder_dir):
    rows = reward(ROWS, "--bert_model", str(encoder_dir), "--device", "cpu")
    assert "no judge" in caplog.text
    terms = rows[0]["score_terms"][0]
    assert set(terms) == set(TERMS) - {"judge"}
    assert rows[0]["response_scores"][0] == pytest.approx(sum(terms.values()) / 4)
    assert all(0 <= value <= 1 for row in rows for term in row["score_terms"] for value in term.values())


def test_the_encoder_is_loaded_once_and_asked_once_a_chunk(monkeypatch, encoder_dir):  # behaviour 18
    calls = []

    class Counting(BertScore):
        def __init__(self, *args):
            calls.append("load")
            super().__init__(*args)

        def score(self, pairs):
            calls.append(len(pairs))
            return super().score(pairs)

    monkeypatch.setattr(reward_trajectories, "BertScore", Counting)
    reward(ROWS, "--bert_model", str(encoder_dir), "--device", "cpu", "--chunk_size", "2")
    assert calls == ["load", 3, 1]


def test_chunks_change_nothing(encoder_dir):
    flags = ["--bert_model", str(encoder_dir), "--device", "cpu"]
    whole, cut = reward(ROWS, *flags), reward(ROWS, *flags, "--chunk_size", "1")
    for one, two in zip(whole, cut, strict=True):
        assert one["response_scores"] == pytest.approx(two["response_scores"], abs=1e-5)


def test_a_failing_scorer_ends_the_run_and_writes_nothing(monkeypatch, encoder_dir):  # behaviour 18
    def fails(self, pairs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(BertScore, "score", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        reward(ROWS, "--bert_model", str(encoder_dir), "--device", "cpu")
    assert not Path("out.jsonl").exists()


@pytest.mark.parametrize(
    ("broken", "key"),
    [
        ({"responses": ["a"]}, "responses"), ({"answers": []}, "answers"), ({"answers": [" "]}, "answers"), ({"id_lists": None}, "id_lists"),
        ({"id_lists": [[9]], "responses": ["a"]}, r"id_lists\[0\]"), ({"responses": [None, "a", "b", "c"]}, "responses"),
    ],
)
def test_a_broken_row_is_named_before_anything_is_loaded_or_set_aside(broken, key):
    rows = [ROWS[0], {**ROWS[0], "id": "bad", **broken}]
    with pytest.raises(UserError, match=rf"in\.jsonl:2: key '{key}'"):
        reward(rows, "--bert_model", "missing/model")
    assert [row["id"] for row in reward(rows, "--weights", "em=1", "--on_error", "skip")] == ["q1"]
    assert len(Path("out.jsonl.rejected.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize("flags", [["--judge-model", "m"], ["--judge-base-url", "http://localhost:1"]])
def test_half_a_judge_is_refused(flags):
    with pytest.raises(UserError, match="belong together"):
        reward(ROWS, *flags)


def test_a_judge_is_asked_once_for_each_distinct_answer(monkeypatch):
    asked = []

    class Judge:
        def __init__(self, *args):
            self.calls = 0

        def grade(self, prompts):
            asked.extend(prompts)
            return [0.1 * number for number in range(1, len(prompts) + 1)]

    monkeypatch.setattr(reward_trajectories, "Judge", Judge)
    rows = reward(ROWS, "--weights", "em=1,judge=1", "--judge-model", "m", "--judge-base-url", "http://localhost:1/v1")
    assert [term["judge"] for term in rows[0]["score_terms"]] == pytest.approx([0.1, 0.1, 0.2, 0.3])
    assert rows[2]["score_terms"][0]["judge"] == pytest.approx(0.4)
    assert rows[0]["response_scores"][0] == pytest.approx(0.55)
    assert asked[0] == Prompts().judge("what?", ["river 1"], "river 1")
    assert len(asked) == 4
