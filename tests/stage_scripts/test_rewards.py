"""dynamicrag/reward/terms.py and reward_trajectories.py: the five terms of a trajectory's reward."""

import json
import shutil
import statistics
from pathlib import Path

import pytest
from conftest import at, logged, names, naming
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import reward_trajectories
from dynamicrag.evaluation.metrics import rouge_l
from dynamicrag.files.jsonio import read_json
from dynamicrag.llm.prompts import Prompts
from dynamicrag.reward.bertscore import BertScore
from dynamicrag.reward.judge import JudgeUsage
from dynamicrag.reward.terms import TERMS, combine, correctness, length_term, parse_weights
from dynamicrag.rows.manifest import read_manifest
from dynamicrag.stage import UserError

FIVE = TERMS[:5]  # the published ones
EQUAL = dict.fromkeys(FIVE, 0.2)


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
    ["", "em", "em=", "em=x", "=1", "emm=1", "em=-1", "em=0", "em=0,bert=0", "em=1,,bert=1", "em=nan", "em=inf", "em=1,em=2", "em:1", "em=1;bert=1", "boundary=1", "boundary=1,em=0"],
)
def test_weights_that_make_no_sense_are_refused(text):
    with pytest.raises(UserError, match=at("--weights")):
        parse_weights(text)


@pytest.mark.parametrize(
    ("terms", "weights", "reward"),
    [
        (dict.fromkeys(FIVE, 1.0), EQUAL, 1.0), (dict.fromkeys(FIVE, 0.0), EQUAL, 0.0),
        ({"em": 1.0, "bert": 0.5, "rouge": 0.5, "length": 0.25}, EQUAL, 2.25 / 4),  # without a judge the weights are rescaled
        ({"em": 1.0, "length": 0.5}, {"em": 3.0, "length": 1.0}, 3.5 / 4),  # weights need not sum to one
        ({"em": 1.0, "rouge": 0.0}, {"em": 0.2}, 1.0),  # terms without a weight do not count
    ],
)
def test_a_reward_is_the_weighted_mean_of_the_terms_there_are(terms, weights, reward):
    assert combine(terms, weights) == pytest.approx(reward)


def test_weights_of_terms_that_were_not_computed_are_an_error():
    with pytest.raises(UserError, match=at("--weights")):
        combine({"em": 1.0}, {"judge": 1.0})


@given(
    terms=st.dictionaries(st.sampled_from(FIVE), st.floats(0, 1), min_size=1),
    weights=st.dictionaries(st.sampled_from(FIVE), st.floats(0.01, 100), min_size=5, max_size=5),
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
    return BertScore(str(encoder_dir), None, "cpu", batch_tokens=60)


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
    assert BertScore(str(encoder_dir), None, "cpu", batch_tokens=1).score(PAIRS) == pytest.approx(scores, abs=1e-5)
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


def test_a_layer_without_a_baseline_is_named(encoder_dir, monkeypatch):
    Path("one-layer.tsv").write_text("LAYER,P,R,F\n0,0.3,0.3,0.3\n")
    monkeypatch.setattr("dynamicrag.reward.bertscore._baseline_path", lambda model: Path("one-layer.tsv"))
    with pytest.raises(UserError, match=at("--bert_layer 2", "one-layer")):
        BertScore(str(encoder_dir), 2, "cpu", "one-layer")


@pytest.mark.parametrize(("model", "layer"), [("missing/model", None), ("{encoder}", 99)])
def test_a_bert_model_that_is_missing_or_has_no_such_layer_is_an_error(model, layer, encoder_dir):
    with pytest.raises(UserError, match="--bert_model"):
        BertScore(model.format(encoder=encoder_dir), layer, "cpu")


def test_similarities_below_zero_do_not_depend_on_the_padding_beside_them(bert):
    """The package pads with a similarity of 0, which is larger than a negative one."""
    import torch

    opposite, long = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.6, 0.8]] * 9)
    embedded = {
        "a": (opposite, torch.ones(1)), "b": (-opposite, torch.ones(1)), "c": (long, torch.ones(9) / 9), "d": (long, torch.ones(9) / 9)
    }
    alone, beside = bert._f1([("a", "b")], embedded), bert._f1([("a", "b"), ("c", "d")], embedded)
    assert alone == [-1.0] and beside == [-1.0, pytest.approx(1.0)]


def test_more_tokens_than_a_block_change_nothing(bert, monkeypatch):
    scores = bert.score(PAIRS)
    monkeypatch.setattr("dynamicrag.reward.bertscore.BLOCK_TOKENS", 5)
    assert bert.score(PAIRS) == pytest.approx(scores, abs=1e-5)


@given(st.lists(st.tuples(st.text(max_size=30), st.lists(st.text(max_size=30), max_size=3)), max_size=6), st.randoms())
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_bertscore_of_any_text_lies_between_0_and_1_and_does_not_depend_on_order(bert, pairs, rng):
    scores = bert.score(pairs)
    assert all(0 <= score <= 1 for score in scores)
    order = rng.sample(range(len(pairs)), len(pairs))
    assert bert.score([pairs[position] for position in order]) == pytest.approx([scores[position] for position in order], abs=1e-5)


def test_a_baseline_of_the_package_becomes_0(encoder_dir, bert):
    folder = Path(shutil.copytree(encoder_dir, "distilroberta-base"))  # bert-score has a baseline of that name
    plain, rescaled = bert.score(PAIRS), BertScore(str(folder), 2, "cpu")
    base = rescaled.baseline
    assert 0.3 < base < 0.9
    assert rescaled.score(PAIRS) == pytest.approx([max((score - base) / (1 - base), 0) for score in plain], abs=1e-5)
    assert min(rescaled.score(PAIRS)) == 0 < min(score for score in plain if score)
    assert BertScore(str(folder), 2, "cpu", "none").score(PAIRS) == pytest.approx(plain, abs=1e-5)
    assert BertScore(str(encoder_dir), 2, "cpu", "distilroberta-base").score(PAIRS) == pytest.approx(rescaled.score(PAIRS), abs=1e-5)
    with pytest.raises(UserError, match="--bert_baseline nonsense"):
        BertScore(str(encoder_dir), None, "cpu", "nonsense")


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


def test_each_trajectory_has_its_own_terms_and_reward():
    rows = reward(ROWS, "--weights", "em=1,length=1")
    terms = rows[0]["score_terms"]
    assert [term["length"] for term in terms] == [1 / 3, 1.0, 0.5, 1.0]
    assert [term["em"] for term in terms] == [1, 1, 0, 0]
    assert terms[3]["rouge"] == 0
    assert rows[0]["response_scores"] == pytest.approx([4 / 6, 1.0, 0.25, 0.5])
    assert rows[1]["response_scores"] == rows[1]["score_terms"] == []
    assert rows[2]["score_terms"][0]["em"] == 0, "an answer is scored against its own question"
    assert "bert" not in terms[0]


def test_equal_answers_from_different_documents_differ_by_length():
    scores = reward(ROWS, "--weights", "em=.5,rouge=.4,length=.1")[0]["response_scores"]
    assert scores[1] > scores[0]


def test_without_a_judge_the_other_weights_are_rescaled_and_it_says_so(caplog, encoder_dir):
    rows = reward(ROWS, "--bert_model", str(encoder_dir), "--device", "cpu")
    assert logged(caplog, "--judge-base-url") == 1
    terms = rows[0]["score_terms"][0]
    assert set(terms) == set(FIVE) - {"judge"}
    assert rows[0]["response_scores"][0] == pytest.approx(sum(terms.values()) / 4)
    assert all(0 <= value <= 1 for row in rows for term in row["score_terms"] for value in term.values())


def test_the_encoder_is_loaded_once_and_asked_once_a_chunk(monkeypatch, encoder_dir):
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


def test_an_interrupted_run_continues_to_the_same_bytes(monkeypatch, encoder_dir):
    flags = ["--bert_model", str(encoder_dir), "--device", "cpu", "--chunk_size", "1"]
    reward(ROWS, *flags)
    whole, real, chunks = Path("out.jsonl").read_bytes(), reward_trajectories.terms_of_answers, []

    def dies_on_the_second(*args):
        chunks.append(None)
        if len(chunks) == 2:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(reward_trajectories, "terms_of_answers", dies_on_the_second)
    with pytest.raises(KeyboardInterrupt):
        reward(ROWS, *flags)
    reward_trajectories.main(["--input_file", "in.jsonl", "--output_file", "out.jsonl", *flags])
    assert len(chunks) == 4 and Path("out.jsonl").read_bytes() == whole


def test_a_failing_scorer_ends_the_run_and_writes_nothing(monkeypatch, encoder_dir):
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
def test_half_a_judge_is_refused(flags, capsys):
    with pytest.raises(SystemExit):
        reward(ROWS, *flags)
    assert names(capsys.readouterr().err, "--judge-base-url", "--judge-model")


def test_a_judge_that_weighs_nothing_is_not_paid_for():
    with pytest.raises(UserError, match=naming("--judge-model", "--weights", "judge=...")):
        reward(ROWS, "--weights", "em=1", "--judge-model", "m", "--judge-base-url", "http://localhost:1/v1")


def test_a_judge_is_asked_once_for_each_distinct_answer(monkeypatch):
    asked = []

    class Judge:
        def __init__(self, *args):
            self.usage = JudgeUsage()

        def grade(self, answers):
            asked.extend(answers)
            return [0.1 * number for number in range(1, len(answers) + 1)]

    monkeypatch.setattr(reward_trajectories, "Judge", Judge)
    rows = reward(ROWS, "--weights", "em=1,judge=1", "--judge-model", "m", "--judge-base-url", "http://localhost:1/v1")
    assert [term["judge"] for term in rows[0]["score_terms"]] == pytest.approx([0.1, 0.1, 0.2, 0.3])
    assert rows[2]["score_terms"][0]["judge"] == pytest.approx(0.4)
    assert rows[0]["response_scores"][0] == pytest.approx(0.55)
    assert asked[0] == ("q1", Prompts().judge("what?", ["river 1"], "river 1"))
    assert len(asked) == 4


# ---------------------------------------------------------------- length, re-weighting, summary


def test_brevity_may_be_that_of_the_response():
    rows = [{**ROWS[0], "response_tokens": [3, 3, 1, 0]}]
    assert [term["length"] for term in reward(rows, "--weights", "em=1", "--length-of", "response")[0]["score_terms"]] == [0.25, 0.25, 0.5, 1]
    for tokens in (None, [-1, 0, 0, 0], [True, 0, 0, 0], [1.5, 0, 0, 0], [1]):
        with pytest.raises(UserError, match=r"in\.jsonl:1: key 'response_tokens'"):
            reward([{**ROWS[0], "response_tokens": tokens}], "--weights", "em=1", "--length-of", "response")


def reweight(*flags: str) -> list[dict]:
    reward_trajectories.main(["--input_file", "out.jsonl", "--output_file", "again.jsonl", "--overwrite", "--reweight", *flags])
    return [row for _, row in read_json("again.jsonl")]


WEIGHTS = ["em=1", "em=.2,bert=.2,rouge=.2,length=.2,judge=.2", "rouge=.5,length=2", "bert=1,em=0", "length=1"]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_reweighting_is_the_same_as_computing_anew(weights, encoder_dir, monkeypatch):
    flags = ["--bert_model", str(encoder_dir), "--device", "cpu"]
    rewarded = reward(ROWS, *flags, "--weights", weights)
    reward(ROWS, *flags)
    for name in ("BertScore", "Judge", "rouge_l", "correctness"):
        monkeypatch.setattr(reward_trajectories, name, None)  # no term is computed
    again = reweight("--weights", weights)
    assert [row["response_scores"] for row in again] == [pytest.approx(row["response_scores"], abs=1e-6) for row in rewarded]


@given(
    terms=st.lists(st.fixed_dictionaries(dict.fromkeys(("em", "bert", "rouge"), st.floats(0, 1))), min_size=1, max_size=8),
    ids=st.data(), weights=st.fixed_dictionaries(dict.fromkeys(("em", "bert", "rouge", "length"), st.floats(0.01, 1))), rng=st.randoms(),
)
def test_permuting_the_trajectories_of_a_row_permutes_its_rewards(terms, ids, weights, rng):
    row = {"id_lists": [ids.draw(st.lists(st.integers(1, 9), max_size=4)) for _ in terms]}
    terms = reward_trajectories.with_length(row, terms, "documents")
    scores = reward_trajectories.rewarded(row, terms, weights)["response_scores"]
    assert all(0 <= score <= 1 for score in scores)
    order = rng.sample(range(len(terms)), len(terms))
    permuted = reward_trajectories.rewarded(
        {"id_lists": [row["id_lists"][t] for t in order]}, [terms[t] for t in order], weights
    )
    assert permuted["response_scores"] == [scores[t] for t in order]


@pytest.mark.parametrize(
    ("row", "response", "em"),
    [
        ({"dataset": "ARC-Challenge", "answers": ["A"]}, "A plant needs light", 0), ({"dataset": "arc", "answers": ["A"]}, "the answer is (A)", 1),
        ({"dataset": "arc", "answers": ["2"], "choices": ["wood", "iron"]}, "iron", 1), ({"dataset": "FEVER", "answers": ["NOT ENOUGH INFO"]}, "NEI", 1),
        ({"dataset": "my own", "answers": ["x and y"], "qa_pairs": [{"short_answers": ["x"]}, {"short_answers": ["y"]}]}, "it is x", 0.5),
        ({"dataset": "nq", "answers": ["it's"]}, "It’s", 1),
    ],
)
def test_the_em_term_is_the_metric_of_evaluation_for_labels_and_readings(row, response, em):
    assert correctness(response, row, "exact") == em


def test_the_rouge_term_reads_any_script():
    rows = [{"id": str(n), "question": "q", "answers": [text], "responses": [text, "no"]} for n, text in enumerate(["北京是中国的首都。", "Москва", "กรุงเทพ", "Paris"])]
    terms = reward_trajectories.terms_of_answers(rows, None, None, None, "exact")
    assert [[one["rouge"] for one in of_row] for of_row in terms] == [[1, 0]] * 4


@given(response=st.text(max_size=40), answers=st.lists(st.text(max_size=40).filter(str.strip), min_size=1, max_size=3), how=st.sampled_from(["exact", "contains"]))
def test_every_term_of_any_answer_lies_between_0_and_1(response, answers, how):
    assert 0 <= correctness(response, {"answers": answers}, how) <= 1
    assert 0 <= rouge_l(response, answers) <= 1


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        ([{"em": 1.0, "bert": 1.0, "length": 1.0}], at("out.jsonl: row q3", "score_terms", "rouge")), ([{"em": 1.0, "bert": 1.2}], at("out.jsonl:3: key 'score_terms[0].bert'")),
        ([{"em": 1.0, "bert": 1.0, "rouge": 1.0, "length": 1.0, "judge": 0.5}], at("out.jsonl: row q3", "score_terms", "judge")),
    ],
)
def test_terms_that_cannot_be_reweighted_are_refused(broken, says, encoder_dir):
    reward(ROWS, "--bert_model", str(encoder_dir), "--device", "cpu")
    rows = [row for _, row in read_json("out.jsonl")]
    rows[2]["score_terms"] = broken
    Path("out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=says):
        reweight()


def test_reweighting_keeps_brevity_as_it_was_measured():
    rows = [{**ROWS[0], "response_tokens": [3, 3, 1, 0]}]
    scores = reward(rows, "--weights", "em=1,length=1", "--length-of", "response")[0]["response_scores"]
    assert reweight("--weights", "em=1,length=1")[0]["response_scores"] == scores


@pytest.mark.parametrize("flags", [["--answer-match", "contains"], ["--length-of", "response"], ["--judge-model", "m", "--judge-base-url", "http://x/v1"]])
def test_reweighting_computes_no_term(flags, capsys):
    with pytest.raises(SystemExit):
        reweight(*flags)
    assert names(capsys.readouterr().err, "--reweight")


def test_the_summary_says_what_goes_with_correctness_and_with_k(caplog):
    caplog.set_level("INFO")
    reward(ROWS, "--weights", "em=1,length=1")
    manifest = read_manifest("out.jsonl")
    assert manifest["counts"]["trajectories"] == 5
    summary = manifest["summary"]
    em, k = [1, 1, 0, 0, 0], [2, 0, 1, 0, 1]
    assert summary["em"] == {"mean": pytest.approx(0.4), "spread": pytest.approx(statistics.pstdev(em)),
                             "correlation_with_em": pytest.approx(1), "correlation_with_k": pytest.approx(statistics.correlation(em, k), abs=1e-6)}
    assert summary["k"]["mean"] == pytest.approx(0.8)
    assert summary["length"]["correlation_with_k"] == pytest.approx(statistics.correlation([1 / (1 + n) for n in k], k), abs=1e-6)
    assert "| em " in caplog.text and "| length " in caplog.text
    reward(ROWS[2:], "--weights", "em=1")
    assert read_manifest("out.jsonl")["summary"]["em"]["correlation_with_k"] is None
    reward(ROWS[1:2], "--weights", "em=1")
    assert read_manifest("out.jsonl")["counts"]["trajectories"] == 0
