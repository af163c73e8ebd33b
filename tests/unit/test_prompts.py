"""dynamicrag/llm/prompts.py: the words of the prompts, which are the same in training, sampling and inference."""

import re

import pytest
from prompt_rows import DOCS, ROW
from stubs import StubEngine

import construct_dpo
import construct_generator_sft
import inference
import process_training_data
import reranker_sequence
from dynamicrag.llm.options import CallOptions
from dynamicrag.llm.prompt_texts import DEFAULT_PROMPTS, PLACEHOLDERS
from dynamicrag.llm.prompts import Prompts, training_row
from dynamicrag.llm.requests import RequestBuilder
from dynamicrag.rows.identifiers import Notation, ids_pattern
from dynamicrag.rows.tasks import task_of
from dynamicrag.stage import UserError, options_from


def user(messages) -> str:
    return messages[1]["content"]


def test_each_prompt_is_a_system_and_a_user_turn():
    prompts = Prompts()
    for messages in (
        prompts.reranker("q", DOCS), prompts.pointwise("q", DOCS[0]), prompts.generator("q", DOCS, "i"), prompts.generator("q", [], "i"),
        prompts.judge("q", ["a"], "r"),
    ):
        assert [message["role"] for message in messages] == ["system", "user"]
        assert all(message["content"] == message["content"].strip() and message["content"] for message in messages)


def test_documents_are_numbered_blocks_with_title_and_text_in_the_order_given():
    text = user(Prompts().reranker("Which?", DOCS[::-1]))
    assert re.findall(r"^\[(\d)\] (.*)$", text, re.MULTILINE) == [("1", "São Tomé"), ("2", "{question} {0}"), ("3", "Nile")]
    assert "[3] Nile\nA river. [3]" in text
    text = user(Prompts().generator("Which?", DOCS[::-1], "Be brief."))
    assert re.findall(r"^\[(\d)\] (.*)$", text, re.MULTILINE) == [("1", "São Tomé"), ("2", "{question} {0}"), ("3", "Nile")]
    assert text.endswith("Which?\nBe brief.")


def test_braces_and_backslashes_are_text():
    for text in (user(Prompts().reranker(ROW["question"], DOCS)), user(Prompts().generator(ROW["question"], DOCS, "{i}"))):
        assert "braces {} {{x}} %s \\n" in text
        assert "{question} {0}" in text
        assert "Which {river} is longest?" in text
    assert "{x} of {question}" in user(Prompts().judge("{question}", ["{x}"], "{x} of {question}"))


def test_a_question_without_documents_does_not_mention_any():
    assert user(Prompts().generator("Which?", [], "Be brief.")) == "Question: Which?\nBe brief."


def test_the_judge_sees_every_reference_and_the_answer():
    text = user(Prompts().judge("Which?", ["Nile", "Amazon"], "the Congo"))
    assert all(part in text for part in ("Which?", "Nile; Amazon", "the Congo"))


def test_every_placeholder_is_known_and_used():
    for (name, part), fields in PLACEHOLDERS.items():
        used = set(re.findall(r"\{(\w+)\}", DEFAULT_PROMPTS[name][part]))
        assert used <= fields
        assert used == fields - ({"n"} if name == "pointwise" else set())


# ---------------------------------------------------------------- other words


@pytest.mark.parametrize(
    ("yaml", "check"),
    [
        ("reranker: {system: 'S {{1}}'}", lambda p: p.reranker("q", DOCS)[0]["content"] == "S {1}"),
        ("reranker: {user: '{documents}|{question}'}", lambda p: user(p.reranker("q", [])) == "|q"),
        ("reranker: {document: '<{n}>{text}'}", lambda p: user(p.reranker("q", DOCS)).count("<2>braces") == 1),
        ("generator: {user_without_documents: 'closed {question}'}", lambda p: user(p.generator("q", [], "i")) == "closed q"),
        ("judge: {user: 'only {response}'}", lambda p: user(p.judge("q", ["a"], "r")) == "only r"),
        ('reranker: {separator: "\\n"}', lambda p: "A river. [1]\n[2] {question}" in user(p.reranker("q", DOCS))),
        ('generator: {separator: " {{--}} "}', lambda p: "A river. {--} [2] {question}" in user(p.generator("q", DOCS, "i"))),
        ("generator: {numbers: original}", lambda p: "[3] Nile" in user(p.generator("q", DOCS[:2], "i", [3, 1])) and "[1] {question}" in user(p.generator("q", DOCS[:2], "i", [3, 1]))),
        ("reranker: {prefix: 'Needed: {{'}", lambda p: p.reranker("q", DOCS)[2:] == [{"role": "assistant", "content": "Needed: {"}]),
        ("generator: {prefix: '<think>\\n\\n</think>'}", lambda p: p.generator("q", [], "i")[-1]["role"] == "assistant" and p.reranker("q", DOCS)[-1]["role"] == "user"),
        ("generator: {stop: '<|eot_id|>'}", lambda p: p.stop("generator") == ("<|eot_id|>",)),
        (r'reranker: {stop: ["\n", " ]"]}', lambda p: p.stop("reranker") == ("\n", " ]")),
        ("reranker: {user: '{question} {documents}', document: 'D{n} {text}', identifier: 'D{n}', identifier_separator: ' > ', none: '-'}", lambda p: p.notation == Notation("D{n}", " > ", "-")),
        ("reranker: {system: null}", lambda p: [message["role"] for message in p.reranker("q", DOCS)] == ["user"]),
        ("instructions: {nq: 'One word.'}", lambda p: (p.instruction({"dataset": "nq"}), p.instruction({"dataset": "fever"})) == ("One word.", task_of("fever").instruction)),
    ],
)
def test_a_prompts_file_changes_what_it_names_and_nothing_else(tmp_path, yaml, check):
    path = tmp_path / "p.yaml"
    path.write_text(yaml)
    prompts = Prompts(str(path))
    assert check(prompts)
    assert prompts.pointwise("q", DOCS[0]) == Prompts().pointwise("q", DOCS[0])
    assert not check(Prompts()), "the defaults are not changed for the next one"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"reranker: [", ""), (b"\xff\xfe\x00", ""), (None, ""),
        (b"", ""), (b"just text", ""), (b"reranker: text", ""), (b"[1]", ""),
        (b"ranker: {user: x}", r"ranker\.user: .*reranker\.system"),
        (b"reranker: {usr: x}", r"reranker\.usr: "), (b"reranker: {user: 5}", r"reranker\.user: "),
        (b"reranker: {user: '{docs}'}", r"reranker\.user: .*\{docs\}"),
        (b"reranker: {user: '{}'}", r"reranker\.user: .*\{\}"),
        (b"reranker: {user: '{question.x}'}", r"reranker\.user: "),
        (b"reranker: {user: '{question!x}'}", r"reranker\.user"), (b"reranker: {user: '{question:5d}'}", r"reranker\.user"),
        (b"reranker: {user: '{question:{documents}}'}", r"reranker\.user"),
        (b"reranker: {user: 'a { b'}", r"reranker\.user: "), (b"reranker: {system: '{question}'}", r"reranker\.system: .*\{question\}"),
        (b"reranker: {user: 'none'}", r"reranker\.user: .*\{documents\}"), (b"reranker: {user: '{documents}'}", r"reranker\.user: .*\{question\}"),
        (b"generator: {user: '{question}'}", r"generator\.user: .*\{documents\}"), (b"generator: {user_without_documents: x}", r"generator\.user_without_documents: .*\{question\}"),
        (b"pointwise: {document: '{title}'}", r"pointwise\.document: .*\{text\}"), (b"judge: {user: x}", r"judge\.user: .*\{response\}"),
        (b"reranker: {separator: ''}", r"reranker\.separator: "), (b"generator: {numbers: old}", r"generator\.numbers: .*\bnew\b.*\boriginal\b"),
        (b"instructions: {nq: 5}", r"instructions\.nq: "), (b"instructions: [nq]", ""), (b"generator: {user: null}", r"generator\.user: "),
        (b"reranker: {identifier: 'D'}", r"reranker\.identifier"), (b"reranker: {identifier: '{n}{n}', user: '{question} {documents}'}", r"reranker\.identifier"),
        (b"reranker: {identifier: 'D{n}'}", r"reranker\.user"), (b"reranker: {user: '{question} {documents}', identifier: 'D{n}'}", r"reranker\.document: .*'D1'"), (b"reranker: {none: '-'}", r"reranker\.user"), (b"reranker: {identifier_separator: ''}", r"reranker\.identifier_separator"),
        (b"reranker: {user: '{question} {documents}', none: '[1]'}", r"reranker\.identifier"), (b"reranker: {identifier: null}", r"reranker\.identifier"),
        (b"reranker: {prefix: ''}", r"reranker\.prefix"), (b"generator: {prefix: '<|im_end|>'}", r"generator\.prefix"), (b"judge: {prefix: 'a'}", r"judge\.prefix"),
        (b"generator: {stop: ''}", r"generator\.stop"), (b"generator: {stop: [a, 5]}", r"generator\.stop"), (b"generator: {stop: {a: b}}", r"generator\.stop"),
        (b"reranker: {user: {from: a book}}", r"reranker\.user: .*a book"), (b"instructions: {nq: {from: a book}}", r"instructions\.nq: .*a book"),
        (b"reranker: {system: {from: a}, user: x}\ngenerator: {stop: {from: b}}", r"reranker\.system: .*generator\.stop"),
        (b"1: {user: x}", r"1\.user: "), (b"reranker: {system: ''}", r"reranker\.system: "),
    ],
)
def test_a_mistake_in_a_prompts_file_is_named(tmp_path, content, says):
    path = tmp_path / "p.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=rf"/p\.yaml: {says}"):
        Prompts(str(path))


# ---------------------------------------------------------------- the same bytes everywhere


@pytest.fixture(params=["default", "file"])
def prompts_file(request, tmp_path):
    if request.param == "default":
        return None
    path = tmp_path / "p.yaml"
    path.write_text(
        "reranker: {system: 'RS', user: '{documents}/{question}', document: '({n}) {title}: {text}', identifier: '({n})', none: '-'}\n"
        "generator: {system: 'GS', user: '{question}/{documents}/{instruction}', separator: ' | ', numbers: original}\n"
        "instructions: {nq: 'One word.'}\n"
    )
    return str(path)


def caller(prompts_file) -> RequestBuilder:
    return RequestBuilder(StubEngine(), CallOptions(prompts=prompts_file))


def turns(row: dict) -> list[dict]:
    """The messages that LLaMA-Factory makes of a row's columns."""
    return [{"role": "system", "content": row["system"]}, {"role": "user", "content": "\n".join(filter(None, [row["instruction"], row["input"]]))}]


def first_pair(make, row: dict, prompts: Prompts) -> dict:
    """The first training row of a question."""
    return next(made for made, _ in make([row], prompts, construct_dpo.parse_args([])))


def test_the_reranker_is_trained_on_what_it_is_asked(prompts_file):
    prompts = Prompts(prompts_file)
    labelled = process_training_data.label(ROW, 2)
    for n in (2, 3):
        asked = caller(prompts_file).select(ROW, DOCS[:n]).messages
        if n == 2:
            assert turns(reranker_sequence.sft_row({**labelled, "sequence": [1]}, prompts)) == asked
        assert turns(first_pair(construct_dpo.reranker_rows, {**ROW, "docs_shown": n}, prompts)) == asked


def test_the_generator_is_trained_on_what_it_is_asked(prompts_file):
    prompts = Prompts(prompts_file)
    labelled = process_training_data.label(ROW, 3)
    best_first = caller(prompts_file).answer(ROW, [DOCS[0], DOCS[2]]).messages
    assert turns(construct_generator_sft.sft_row(labelled, prompts, 14)) == best_first
    chosen = caller(prompts_file).answer(ROW, [DOCS[2], DOCS[0]]).messages
    assert turns(first_pair(construct_dpo.generator_rows, ROW, prompts)) == chosen
    nothing = caller(prompts_file).answer(ROW, []).messages
    assert turns(construct_generator_sft.sft_row({**labelled, "true_id": []}, prompts, 14)) == nothing
    assert turns(first_pair(construct_dpo.generator_rows, {**ROW, "id_lists": [[], [2]]}, prompts)) == nothing


@pytest.mark.parametrize(("setting", "place"), [("system: null", "system: null"), ("prefix: 'Needed:'", "prefix")])
def test_nothing_is_trained_that_the_trainers_rows_cannot_express(tmp_path, setting, place):
    """If there is no system prompt, LLaMA-Factory adds its own."""
    (tmp_path / "p.yaml").write_text(f"reranker: {{{setting}}}")
    with pytest.raises(UserError, match=place):
        training_row(Prompts(str(tmp_path / "p.yaml")).reranker("q", DOCS), output="None")


def test_targets_and_constraints_have_the_files_notation(prompts_file):
    notation = Prompts(prompts_file).notation
    asked = caller(prompts_file).select(ROW, DOCS)
    assert asked.pattern == ids_pattern(3, notation)
    labelled = process_training_data.label(ROW, 2)
    assert reranker_sequence.sft_row({**labelled, "sequence": [1]}, Prompts(prompts_file))["output"] == notation.write([1])
    pair = first_pair(construct_dpo.reranker_rows, ROW, Prompts(prompts_file))
    assert (pair["chosen"], pair["rejected"]) == (notation.write([3, 1]), notation.write([2]))


def test_stop_strings_go_with_every_request_of_their_prompt(tmp_path):
    (tmp_path / "p.yaml").write_text("reranker: {stop: a}\ngenerator: {stop: [b, c]}\npointwise: {stop: d}")
    asked = caller(str(tmp_path / "p.yaml"))
    assert (asked.select(ROW, DOCS).stop, asked.answer(ROW, DOCS).stop, asked.judge_document(ROW, DOCS[0]).stop) == (("a",), ("b", "c"), ("d",))
    assert caller(None).select(ROW, DOCS).stop == ()


@pytest.mark.parametrize(("flags", "temperature"), [([], 0.0), (["--selection-temperature", "0.4"], 0.4)])
def test_selections_are_greedy_unless_asked_otherwise(flags, temperature):
    asked = RequestBuilder(StubEngine(), options_from(inference.parse_args(flags), CallOptions))
    assert asked.select(ROW, DOCS).temperature == temperature and asked.select(ROW, DOCS, temperature=0.0).temperature == 0.0
    assert asked.answer(ROW, DOCS).temperature == 0.0


@pytest.mark.parametrize("targets", [{"output": "None"}, {"chosen": "[1]", "rejected": "[2]"}])
def test_a_training_row_has_the_columns_dataset_info_maps_and_no_other(targets):
    row = training_row(Prompts().reranker("q", DOCS), **targets)
    assert row == {"instruction": user(Prompts().reranker("q", DOCS)), "input": "", "system": DEFAULT_PROMPTS["reranker"]["system"], **targets}
