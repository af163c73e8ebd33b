"""docs/released_checkpoints.md: the form of a released checkpoint's prompts, with words of our own, and the settings it is asked with."""

import re
import shlex
import subprocess

import pytest
import yaml
from chat_tokenizers import byte_level
from conftest import at, naming
from pages import code, page, table
from prompt_rows import DOCS, ROW
from stages import REPO
from stubs import LLAMA3_TOKENS, StubEngine
from transformers import PreTrainedTokenizerFast

import inference
from dynamicrag.llm.options import CallOptions
from dynamicrag.llm.prompts import Prompts
from dynamicrag.llm.requests import RequestBuilder
from dynamicrag.llm.templates import PromptTokenizer
from dynamicrag.stage import UserError, options_from

SKELETON = REPO / "configs/released_8b_prompts.yaml"
WORDS = {
    "system": "S", "user": "U {question}\n{documents}", "document": "{n}: {title} = {text}", "user_without_documents": "{instruction} {question} 0",
}


def filled(**changes) -> dict:
    """The file of the page, every open text filled in with a word of ours."""
    given = yaml.safe_load(SKELETON.read_text(encoding="utf-8"))
    for name, parts in given.items():
        for part, text in parts.items():
            if isinstance(text, dict):
                parts[part] = f"I-{part}" if name == "instructions" else WORDS[part]
    given["generator"] |= {"user": "{instruction}\n{question}\n{documents}"} | changes
    given["reranker"] |= changes
    return given


@pytest.fixture
def caller(tmp_path):
    def make(**changes) -> RequestBuilder:
        (tmp_path / "p.yaml").write_text(yaml.safe_dump(filled(**changes)), encoding="utf-8")
        flags = ["--prompts", str(tmp_path / "p.yaml"), *settings_of("ENGINE_FLAGS")]
        return RequestBuilder(StubEngine(), options_from(inference.parse_args(flags), CallOptions))

    return make


def settings_of(variable: str) -> list[str]:
    command = f'CUDA_VISIBLE_DEVICES="" source scripts/common.sh configs/released_8b.env; echo "${variable}"'
    done = subprocess.run(["bash", "-c", command], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return shlex.split(done.stdout)


def open_texts() -> set[str]:
    given = yaml.safe_load(SKELETON.read_text(encoding="utf-8"))
    return {f"{name}.{part}" for name, parts in given.items() for part, text in parts.items() if isinstance(text, dict)}


def test_the_file_is_refused_by_the_name_of_every_text_that_is_not_filled_in(tmp_path):
    with pytest.raises(UserError, match=at("configs/released_8b_prompts.yaml")) as refused:
        Prompts(str(SKELETON))
    assert all(re.search(naming(name), str(refused.value)) for name in open_texts()) and len(open_texts()) == 16
    half = filled()
    half["generator"]["system"] = {"from": "the book"}
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(half))
    with pytest.raises(UserError, match=at("p.yaml", "generator.system", "the book")) as refused:
        Prompts(str(tmp_path / "p.yaml"))
    assert "reranker.user" not in str(refused.value)


def test_the_page_says_where_every_open_text_stands():
    described = {key.replace("*", part) for cell, *_ in table(page("docs/released_checkpoints.md"), "key |") for key in code(cell) for part in filled()["instructions"]}
    assert described == open_texts()


def test_the_form_of_the_prompts_is_that_of_the_page(caller):
    asked = caller()
    selection = asked.select(ROW, DOCS[:2])
    assert selection.messages == [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "U Which {river} is longest?\n1: Nile = A river.\n2: {question} {0} = braces {} {{x}} %s \\n"},
    ], "one newline between documents"
    answer = asked.answer(ROW, [DOCS[1], DOCS[0]]).messages[1]["content"]
    assert answer.startswith("I-nq\nWhich {river}") and answer.endswith("\n2: {question} {0} = braces {} {{x}} %s \\n\n1: Nile = A river."), "original numbers"
    assert asked.answer(ROW, []).messages[1]["content"] == "I-nq Which {river} is longest? 0"
    assert asked.prompts.instruction({"dataset": "arc"}) == "I-arc"


def test_the_system_text_may_stand_in_the_users_turn(caller):
    """The form of the published DPO rows, token for token in LLaMA-3's format."""
    [turn] = caller(system=None, user="S\nU {question}\n{documents}").select(ROW, DOCS[:1]).messages
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level([*LLAMA3_TOKENS], LLAMA3_TOKENS[0]), bos_token=LLAMA3_TOKENS[0])
    prompts = PromptTokenizer(tokenizer, (REPO / "template/llama3.jinja").read_text(encoding="utf-8"))
    assert prompts.tokenizer.decode(prompts.ids([turn])) == (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nS\nU Which {river} is longest?\n1: Nile = A river.<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def test_selections_are_sampled_freely_and_answers_are_greedy(caller):
    asked = caller()
    selection, answer = asked.select(ROW, DOCS), asked.answer(ROW, DOCS)
    assert (selection.temperature, selection.max_tokens, selection.pattern) == (0.4, 100, None)
    assert (answer.temperature, answer.max_tokens) == (0.0, 200)
    assert settings_of("N_DOCS_SHOWN $RELEASED $TEMPLATE") == ["40", "models/DynamicRAG-8B", "template/llama3.jinja"]


def test_the_table_of_settings_has_the_values_of_the_file():
    asked = inference.parse_args(settings_of("ENGINE_FLAGS"))
    values = {name.lstrip("-"): value for cell, value, _ in table(page("docs/released_checkpoints.md"), "setting |") for name in code(cell)}
    assert (values["selection-temperature"], values["constrain-ids"]) == (str(asked.selection_temperature), asked.constrain_ids)
    assert values["answer-max-tokens"] == f"{asked.selection_max_tokens}, {asked.answer_max_tokens}"
