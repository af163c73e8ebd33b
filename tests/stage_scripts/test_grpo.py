"""grpo_selector.py: the selector is trained by GRPO against a frozen generator. TRL trains a tiny model; a stub server is the generator."""

import contextlib
import json
import random
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import at, logged, names, read_jsonl, write_jsonl
from hypothesis import given
from hypothesis import strategies as st
from stages import REPO
from stubs import StubEngine, StubServer, chat_completion, make_tiny_llama

import grpo_selector
import inference
from dynamicrag.evaluation.answers import score_question
from dynamicrag.llm.completion import Completion, refused
from dynamicrag.llm.frozen import FrozenEngine
from dynamicrag.llm.options import CallOptions
from dynamicrag.llm.policy import PolicyEngine
from dynamicrag.llm.requests import RequestBuilder, read_selection
from dynamicrag.llm.templates import load_prompts
from dynamicrag.reward.grpo import Groups, GrpoOptions, last_checkpoint, schedule
from dynamicrag.rows.identifiers import format_ids, ids_pattern
from dynamicrag.rows.manifest import read_manifest
from dynamicrag.stage import UserError

TEMPLATE = str(REPO / "template/llama3.jinja")


@pytest.fixture(scope="module")
def selector(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("selector")
    make_tiny_llama(folder)
    return folder


@pytest.fixture(scope="module")
def policy(selector) -> PolicyEngine:
    from transformers import AutoModelForCausalLM

    engine = PolicyEngine(load_prompts(str(selector), TEMPLATE), 8192)
    model = AutoModelForCausalLM.from_pretrained(selector)
    engine.unwrapped = lambda: contextlib.nullcontext(model)
    return engine


def make_rows(count: int, first: int = 0) -> list[dict]:
    """Questions with three documents, one of which has the answer."""
    rng = random.Random(first)
    return [
        {"id": f"q{n}", "dataset": "nq", "question": f"which river is number {n}?", "answers": ["Nile"],
         "docs": [{"id": f"d{n}_{m}", "title": f"River {m}", "text": "the Nile" if m == right else "oil"} for m in range(1, 4)]}
        for n, right in ((first + n, rng.randint(1, 3)) for n in range(count))
    ]


def from_documents(text: str) -> str:
    return "Nile" if "the Nile" in text else "oil"


# ---------------------------------------------------------------- the reward


class Writes:
    """An engine whose selections are given texts."""

    def __init__(self, policy: PolicyEngine, texts: list[str], cut_off: list[bool]):
        self.policy, self.given, self.fits = policy, list(zip(texts, cut_off, strict=True)), policy.fits

    def ids(self, text: str, cut_off: bool) -> list[int]:
        return self.policy.prompts.tokenizer.encode(text, add_special_tokens=False) + [self.policy.end] * (not cut_off)

    def complete(self, requests):
        return [self.policy.completion(request, [self.ids(*given)]) for request, given in zip(requests, self.given, strict=True)]


selection = st.one_of(
    st.lists(st.integers(1, 9), max_size=6).map(format_ids), st.sampled_from(["None", "", "[2], [1", "[3], [3]", "[1]-[3]", "prose", "Needed: [2]", "[9]"]),
)


@given(texts=st.lists(selection, min_size=4, max_size=4), cut_off=st.lists(st.booleans(), min_size=4, max_size=4), cost=st.sampled_from([0.0, 0.05]))
def test_the_reward_of_a_selection_is_what_inference_and_evaluation_give_for_it(policy, texts, cut_off, cost):
    rows = [make_rows(1, number)[0] for number in (1, 1, 2, 2)]
    rows[1], rows[3] = {**rows[0]}, {**rows[2]}
    asked: list[list] = []

    def generator() -> RequestBuilder:
        engine = StubEngine(lambda request, kind, titles: from_documents(request.messages[-1]["content"]))
        asked.append(engine.batches)
        return RequestBuilder(engine, CallOptions())

    args = grpo_selector.parse_args(["--topn", "3"])
    chooser = RequestBuilder(policy, CallOptions())
    engine = Writes(policy, texts, cut_off)
    # As a user gets them: inference.py answers each row, evaluate.py scores it
    answering, expected = generator(), []
    for row, text, cut in zip(rows, texts, cut_off, strict=True):
        one = RequestBuilder(Writes(policy, [text], [cut]), CallOptions())
        [answered] = inference.answer_rows([row], (one, answering), "dynamic", 3, "q.jsonl")
        expected.append((score_question(answered, None, "dataset", "q.jsonl").score, len(answered.get("id_list", []))))
    # As GRPO gets them: two groups of two samples
    frozen = generator()
    options = GrpoOptions(num_samples=2, document_cost=cost)
    groups = Groups([rows[0], rows[2]], [row["docs"] for row in (rows[0], rows[2])], chooser, policy, lambda some, by: grpo_selector.score_by_answers(some, by, frozen, args), options)
    rewards = groups.reward([row["id"] for row in rows], [engine.ids(*given) for given in engine.given])
    for group in (slice(0, 2), slice(2, 4)):
        equal = len({score for score, _ in expected[group]}) == 1
        assert rewards[group] == ([None, None] if equal else [pytest.approx(score - cost * k) for score, k in expected[group]])
    one_by_one, batch = ([request for requests in batches for request in requests] for batches in asked)
    assert one_by_one == batch, "the generator gets the same prompts and seeds"


def test_equal_requests_are_answered_once_in_this_run_and_in_the_next(tmp_path):
    engine = StubEngine(lambda request, kind, titles: " ".join(titles))
    row = make_rows(1)[0]
    builder = RequestBuilder(FrozenEngine(engine, tmp_path / "answers", "m"), CallOptions())
    sets = (row["docs"][:1], row["docs"][:2], row["docs"][:1], row["docs"][1::-1])
    in_order = RequestBuilder(engine, CallOptions(answer_order="retrieval"))
    assert in_order.answer(row, sets[3]) == in_order.answer(row, sets[1]) == builder.answer(row, sets[1]) != builder.answer(row, sets[3])
    asked = [builder.answer(row, docs) for docs in sets]
    first = builder.ask(asked)
    assert [len(batch) for batch in engine.batches] == [3] and first[0] == first[2]
    again = FrozenEngine(StubEngine(), tmp_path / "answers", "m")
    assert again.complete(asked) == first
    assert vars(again.usage) == {"calls": 3, "prompt_tokens": sum(c.prompt_tokens for c in (first[0], first[1], first[3])), "generated_tokens": 3}

    class Refuses(StubEngine):
        def complete(self, requests):
            return [refused(request, "busy") for request in requests]

    other = [replace(asked[0], seed=1)]
    assert not FrozenEngine(Refuses(), tmp_path / "answers", "m").complete(other)[0].answered
    assert FrozenEngine(engine, tmp_path / "answers", "m").complete(other)[0].answered, "a refusal is not kept"
    assert FrozenEngine(engine, tmp_path / "answers", "another").complete(asked[:1]) == [Completion([first[0].texts[0]], 101, 1)] and len(engine.batches) == 3


# ---------------------------------------------------------------- the policy


def test_samples_are_constrained_as_in_the_engines_and_share_their_prompt(policy):
    import torch

    row, builder = make_rows(1)[0], RequestBuilder(policy, CallOptions())
    torch.manual_seed(1)
    [sampled] = builder.ask([builder.select(row, row["docs"], n=64, temperature=1.0)])
    assert len(sampled.texts) == 64 and len(set(sampled.texts)) > 3
    for number, text in enumerate(sampled.texts):
        assert re.fullmatch(ids_pattern(3), text) and read_selection(sampled, number, 3, builder.prompts.notation).valid
    assert sampled.prompt_tokens == len(policy.prompts.ids(builder.select(row, row["docs"]).messages))
    free = replace(builder.select(row, row["docs"]), pattern=None, max_tokens=9)
    ids = torch.tensor([policy.prompts.ids(free.messages)])
    with policy.unwrapped() as model:
        plain = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=9, eos_token_id=policy.end, pad_token_id=policy.end)
    assert policy.sample([free]) == [[plain[0, ids.shape[1] :].tolist()]], "the prompt that is shared gives the tokens of the whole prompt"
    tight = PolicyEngine(policy.prompts, 50)
    tight.unwrapped = policy.unwrapped
    assert not tight.complete([free])[0].answered


# ---------------------------------------------------------------- training


def test_every_epoch_has_another_order_and_whole_steps():
    ids = [f"q{n}" for n in range(10)]
    order = schedule(ids, GrpoOptions(epochs=2.5, questions_per_step=4, seed=1))
    assert len(order) == 8 + 8 + 4 and len(set(order[:8])) == len(set(order[8:16])) == 8 and order[:8] != order[8:16]
    assert order == schedule(ids, GrpoOptions(epochs=2.5, questions_per_step=4, seed=1)) != schedule(ids, GrpoOptions(epochs=2.5, questions_per_step=4, seed=2))

FLAGS = (
    f"--input_file train.jsonl --output_dir out --llm-model m --reranker-template {TEMPLATE} --topn 3 --questions_per_step 3 "
    "--num-samples 4 --rows_per_pass 6 --epochs 2 --eval_steps 2 --learning_rate 1e-3 --seed 3"
)


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A generator that is right if it reads the right document, in a folder with questions."""
    monkeypatch.chdir(tmp_path)
    write_jsonl(Path("train.jsonl"), make_rows(6))
    write_jsonl(Path("dev.jsonl"), make_rows(2, 100))
    asked: Counter[str] = Counter()

    def answer(request, body):
        asked[json.dumps(body["messages"])] += 1
        return 200, chat_completion(from_documents(body["messages"][-1]["content"]), usage={"prompt_tokens": 50, "completion_tokens": 2, "total_tokens": 52})

    stub = StubServer(answer)
    stub.asked = asked
    yield stub
    stub.close()


def train(server, selector: Path, *flags: str) -> None:
    grpo_selector.main([*FLAGS.split(), "--api-base", server.url, "--reranker-model", str(selector), *flags])


def weights(folder: Path) -> dict:
    from safetensors.torch import load_file

    return load_file(Path(folder) / "model.safetensors")


@pytest.mark.slow
def test_an_interrupted_training_continues_to_the_same_model_and_pays_for_no_answer_twice(server, selector, monkeypatch):
    """From a start to the finished model; then again, interrupted in the third of four steps."""
    train(server, selector, "--output_dir", "whole")
    counts = read_manifest("whole/grpo.jsonl")["counts"]
    assert max(server.asked.values()) == 1 and counts["answers"] == len(server.asked) > 8
    assert (counts["generator_prompt_tokens"], counts["generator_generated_tokens"]) == (50 * counts["answers"], 2 * counts["answers"])
    assert counts["steps"] == 4 and counts["groups"] == 12 and 0 <= counts["left_out"] < 12 and counts["selector_tokens"] > 48 * 50
    assert {path.name for path in Path("whole").iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json", "grpo.jsonl", "grpo.jsonl.manifest.json"}
    assert not Path("whole/checkpoints").exists() and not Path("whole/answers.partial.completions.jsonl").exists()

    before, real, steps = sum(server.asked.values()), Groups.reward, []

    def dies_in_the_third_step(self, *given, **more):
        steps.append(None)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return real(self, *given, **more)

    monkeypatch.setattr(Groups, "reward", dies_in_the_third_step)
    with pytest.raises(KeyboardInterrupt):
        train(server, selector)
    assert Path(last_checkpoint(Path("out/checkpoints"))).name == "checkpoint-2" and not Path("out/grpo.jsonl").exists()
    train(server, selector)
    assert len(steps) == 5 and sum(server.asked.values()) == 2 * before and max(server.asked.values()) == 2
    one, other = weights("whole"), weights("out")
    assert all(one[name].equal(other[name]) for name in one)
    assert one.keys() == weights(selector).keys() and not all(one[name].equal(value) for name, value in weights(selector).items())
    train(server, selector)
    assert len(steps) == 5, "a finished training is not repeated"
    with pytest.raises(UserError, match=at("out/grpo.jsonl", "beta")):
        train(server, selector, "--beta", "0.5")


@pytest.mark.slow
def test_the_best_model_is_kept_or_the_one_at_the_start(server, selector, monkeypatch, caplog):
    """Scores on held-out questions are given: the second evaluation is the best of the first run, and none is in the second."""
    given: list[float] = []

    def scored(rows, chooser, generator, args, real=grpo_selector.score_by_answers):
        values = real(rows, chooser, generator, args)
        if rows[0]["id"] != "q100":
            return values
        score = given.pop(0)
        return [value._replace(score=score) for value in values]

    monkeypatch.setattr(grpo_selector, "score_by_answers", scored)
    for scores, best in (([0.1, 0.9, 0.2], 2), ([0.5, 0.5, 0.4], 0)):
        given[:] = scores
        train(server, selector, "--dev_file", "dev.jsonl", "--lora_rank", "4", "--output_dir", f"best_{best}")
        summary, rows = read_manifest(f"best_{best}/grpo.jsonl")["summary"], read_jsonl(f"best_{best}/grpo.jsonl")
        assert {row["step"]: row["eval_score"] for row in rows if "eval_score" in row} == dict(zip((0, 2, 4), scores, strict=True))
        assert (summary["start_score"], summary["best_score"], summary["best_step"]) == (scores[0], max(scores), best)
        same = all(weights(f"best_{best}")[name].float().equal(value.float()) for name, value in weights(selector).items())
        assert same == (best == 0), "the adapter is merged"
        assert weights(f"best_{best}").keys() == weights(selector).keys()
    assert logged(caplog, "best_0") == 1


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["dapo", "grpo"])
def test_no_pass_is_spent_on_groups_that_are_left_out(server, selector, monkeypatch, loss):
    """No answer to the first four questions is right. The gradient is that of all rows: at the start, KL is zero."""
    from trl.trainer.grpo_trainer import GRPOTrainer

    rows = [{**row, "answers": ["Amazon"]} if n < 4 else row for n, row in enumerate(make_rows(6))]
    write_jsonl(Path("train.jsonl"), rows)
    passed, real = [], GRPOTrainer._compute_loss

    def counted(self, model, inputs):
        passed.append(inputs["advantages"].tolist())
        return real(self, model, inputs)

    monkeypatch.setattr(GRPOTrainer, "_compute_loss", counted)
    flags = ["--questions_per_step", "6", "--rows_per_pass", "8", "--max_steps", "1", "--loss_type", loss]
    train(server, selector, *flags, "--output_dir", "some")
    left_out = read_manifest("some/grpo.jsonl")["counts"]["left_out"]
    assert 4 <= left_out < 6 and all(advantage for of_pass in passed for advantage in of_pass) and 0 < sum(map(len, passed)) <= 4 * (6 - left_out)

    def passes_all(*given, make=grpo_selector.make_trainer):
        trainer = make(*given)
        del type(trainer).compute_loss
        return trainer

    monkeypatch.setattr(grpo_selector, "make_trainer", passes_all)
    passed.clear()
    train(server, selector, *flags, "--output_dir", "all")
    assert sum(map(len, passed)) == 24
    [one, other] = ([row for row in read_jsonl(f"{folder}/grpo.jsonl") if "grad_norm" in row] for folder in ("some", "all"))
    assert one[0]["grad_norm"] == pytest.approx(other[0]["grad_norm"], rel=1e-4) and one[0]["grad_norm"] > 0


@pytest.mark.slow
def test_the_likelihood_of_the_gold_answer_is_a_reward_without_decoding(server, selector):
    grpo_selector.main([*FLAGS.split(), "--llm-model", str(selector), "--template", TEMPLATE, "--reward", "likelihood", "--max_steps", "1"])
    counts = read_manifest("out/grpo.jsonl")["counts"]
    assert server.asked == {} and counts["steps"] == 1 and 0 < counts["likelihoods"] <= 12 and counts["generator_generated_tokens"] == 0
    [step] = [row for row in read_jsonl("out/grpo.jsonl") if "left_out" in row]
    assert step["left_out"] < 3 and 0 < step["reward"] < 1


@pytest.mark.parametrize(("flags", "key"), [
    ("--rows_per_pass 5", "--rows-per-pass"), ("--beta 0", "--beta"), ("--num-samples 1", "--num-samples"), ("--reward likelihood", "--reward"), ("--patience 0", "--patience"),
])
def test_flags_without_sense_are_refused(flags, key, capsys):
    with pytest.raises(SystemExit):
        grpo_selector.parse_args([*FLAGS.split(), "--api-base", "http://localhost:1/v1", "--reranker-model", "x", *flags.split()])
    assert names(capsys.readouterr().err.replace("_", "-"), key)


def test_too_few_questions_are_named_before_a_model_is_loaded(server, selector):
    with pytest.raises(UserError, match=at("train.jsonl", 6)):
        train(server, selector, "--questions_per_step", "9")
    rewarded = [{**row, "score_terms": [{"em": float(n == 3)}, {"em": 0.0}]} for n, row in enumerate(make_rows(6))]
    write_jsonl(Path("train.jsonl"), rewarded)
    with pytest.raises(UserError, match=at("train.jsonl", 1)):
        train(server, selector, "--keep-mean", "0.01,0.99")
    write_jsonl(Path("train.jsonl"), [{**row, "answers": None} for row in make_rows(6)])
    with pytest.raises(UserError, match=at("train.jsonl:1: key 'answers'")):
        train(server, selector)
    assert server.asked == {}
