"""LLaMA-Factory cuts no conversation of the stages' rows, and no system prompt is lost without a warning."""

import json
import os
import random
import subprocess
from pathlib import Path

import pytest
import yaml
from chat_tokenizers import CASES, FAMILIES, TRAIN_PYTHON, facts_of, save_tokenizer
from conftest import at, logged, naming, write_jsonl
from stages import REPO
from stubs import make_text

import construct_dpo
import construct_generator_sft
import process_training_data
import reranker_sequence
from dynamicrag.files.jsonio import read_json
from dynamicrag.llm import training_rows
from dynamicrag.llm.prompts import Prompts
from dynamicrag.llm.recipe import LengthOptions, check_columns, resolve_length_flags
from dynamicrag.llm.templates import PromptTokenizer
from dynamicrag.llm.training_rows import TrainingWindow, load_window
from dynamicrag.models.chat_templates import read_template
from dynamicrag.rows.identifiers import parse_ids
from dynamicrag.rows.manifest import read_manifest
from dynamicrag.stage import UserError, options_from

RECIPE = "recipes/llama3_8b/sft.yaml"
SFT, DPO = REPO / RECIPE, REPO / "recipes/llama3_8b/dpo.yaml"
BC, GENERATOR = "training_data/reranker_bc_training.json", "training_data/generator_sft_training.json"
PAIRS = [f"training_data/llama3_8b_{role}_dpo.json" for role in ("reranker", "generator")]
DOCS = 40
SETS = {"reranker_bc": BC, "generator_sft": GENERATOR, "llama3_8b_reranker_dpo": PAIRS[0], "llama3_8b_generator_dpo": PAIRS[1]}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def documents(number: int, words: int, relevant: set[int]) -> list[dict]:
    rng = random.Random(number)
    return [
        {"id": f"d{number}_{n}", "title": f"Title {n}", "text": make_text(rng, words, words), "score": 1 - n / 100,
         "rerank_score": 0.9 - n / 100 if n in relevant else 0.1, "rerank_label": "true" if n in relevant else "false"}
        for n in range(1, DOCS + 1)
    ]


def long_rows(count: int = 8, words: int = 60) -> list[dict]:
    """Questions with 40 documents. The relevant ones are at different depths: in every fourth row they are all early, in every fourth row there are none."""
    deep = [{1, 30}, {2, 3}, set(), {n for n in range(1, DOCS + 1) if n % 3}]
    return [
        {"id": f"nq_{n}", "question": f"which river is number {n}?", "answers": [f"answer {n}"], "docs": documents(n, words, deep[n % 4])}
        for n in range(count)
    ]


def rewarded(row: dict, number: int) -> dict:
    """A row with trajectories. One of them names the 35th document if the number is odd."""
    lists = [[1, 2], [3], list(range(1, 15)), [35] if number % 2 else []]
    return {
        **row, "docs_shown": DOCS, "id_lists": lists, "responses": [f"answer {number}", "bad", "worse " * 50, "worst"],
        "response_scores": [0.9, 0.4, 0.3, 0.1], "score_terms": [{"em": 1.0}, {"em": 0.0}, {"em": 0.0}, {"em": 0.0}],
    }


def write_sets(rows: list[dict], *flags: str) -> None:
    """Write every set of training rows with the stages."""
    write_jsonl(Path("rows.jsonl"), rows)
    process_training_data.main(["--input_file", "rows.jsonl", "--max_rows", "8", "--overwrite"])
    reranker_sequence.main(["--overwrite", *flags])
    labelled = [process_training_data.label(row, DOCS) for row in rows]
    write_jsonl(Path("labelled.jsonl"), labelled)
    construct_generator_sft.main(["--input_file", "labelled.jsonl", "--max_docs", "40", "--overwrite", *flags])
    write_jsonl(Path("training_data/llama3_8b_output_dpo.jsonl"), [rewarded(row, n) for n, row in enumerate(labelled)])
    construct_dpo.main(["--overwrite", *flags])


def read(path: str) -> list[dict]:
    return [row for _, row in read_json(path)]


def shown(row: dict) -> int:
    """How many documents a training row of the reranker shows."""
    return row["instruction"].count("] Title ")


@pytest.fixture(scope="module")
def llama3(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer") / "llama3"
    save_tokenizer("llama3", folder)
    return folder


def lengths(flags: list[str]) -> LengthOptions:
    return options_from(reranker_sequence.parse_args(flags), LengthOptions)


def count_by(folder: Path) -> list[str]:
    return ["--tokenizer", str(folder), "--template", str(REPO / "template/llama3.jinja")]


# ---------------------------------------------------------------- what fits


def test_a_row_loses_as_many_documents_as_it_must_and_no_more(llama3):
    write_sets(long_rows(), *count_by(llama3))
    window = load_window(lengths(count_by(llama3)))
    assert window.cutoff_len == yaml.safe_load(SFT.read_text())["cutoff_len"] == 8192
    by_question = {row["question"]: row for row in long_rows()}
    for made in read(BC):
        row = by_question[made["instruction"].split("\n")[0].removeprefix("Question: ")]
        kept = shown(made)
        assert 0 < kept < DOCS
        assert max(parse_ids(made["output"], DOCS).ids, default=0) <= kept
        answer = window.answer_tokens(made["output"])
        assert window.fits(Prompts().reranker(row["question"], row["docs"][:kept]), answer)
        assert not window.fits(Prompts().reranker(row["question"], row["docs"][: kept + 1]), answer)


def test_prompt_answer_and_end_token_count_to_the_last_token(llama3):
    """A window of exactly the row's length keeps all documents, and one token less loses a document. The longer of two answers counts."""
    prompts = PromptTokenizer(training_rows.load_tokenizer(str(llama3))[0], read_template(str(REPO / "template/llama3.jinja")))
    docs, answers = documents(1, 5, set())[:6], ("[1]", "[1], [2], [3]")

    def build(some: list[dict]) -> list[dict]:
        return Prompts().reranker("which river?", some)

    whole = [*build(docs), {"role": "assistant", "content": answers[1]}]
    rendered = prompts.tokenizer.apply_chat_template(whole, chat_template=prompts.chat_template, tokenize=False)
    length = len(prompts.tokenizer.encode(rendered, add_special_tokens=False))
    assert TrainingWindow(length, prompts).documents(build, docs, *answers) == docs
    assert TrainingWindow(length - 1, prompts).documents(build, docs, *answers) == docs[:5]
    assert TrainingWindow(length - 1, prompts).documents(build, docs, answers[0]) == docs
    assert TrainingWindow(30, prompts).documents(build, docs, *answers) is None


@pytest.mark.parametrize("how", ["counted", "estimated"])
def test_a_target_that_names_a_removed_document_is_left_out_and_counted(llama3, how):
    flags = count_by(llama3) if how == "counted" else ["--cutoff_len", "3000"]
    write_sets(long_rows(), *flags)
    expert = read("training_data/retrieval_data_rerank_sequence.jsonl")
    counts = read_manifest(BC)["counts"]
    assert counts["examples"] + counts["left_out"] == len(expert) and counts["left_out"] > 0 and counts["shortened"] == counts["examples"] > 0
    assert len(read(BC)) == counts["examples"]
    counts = read_manifest(PAIRS[0])["counts"]
    assert counts["left_out"] >= 4, "the pair whose rejected side names the 35th document"
    assert not [pair for pair in read(PAIRS[0]) if "[35]" in pair["rejected"]] and counts["reranker_pairs"] == 4
    assert read_manifest(GENERATOR)["counts"]["shortened"] > 0


def test_rows_that_fit_are_the_same_whatever_their_length_is_counted_by(llama3):
    written = []
    for flags in (count_by(llama3), [], ["--cutoff_len", "100000"]):
        write_sets(long_rows(8, 3), *flags)
        written.append([Path(path).read_bytes() for path in SETS.values()])
        assert [read_manifest(path)["counts"][key] for path in SETS.values() for key in ("shortened", "left_out")] == [0] * 8
    assert written[0] == written[1] == written[2]


def conversation(questions: int) -> dict:
    """A training row of several questions about the same documents, as in the Factbook's warm-up."""
    first = Prompts().reranker("which river?", documents(1, 60, set())[:12])
    further = [[f"which country has number {n}? " * 20, f"[{n}]"] for n in range(1, questions)]
    turns = [[first[1]["content"], "[1]"], *further]
    return {"instruction": turns[-1][0], "input": "", "output": turns[-1][1], "system": first[0]["content"], "history": turns[:-1]}


def test_a_conversation_loses_its_last_questions(llama3):
    window = load_window(lengths(count_by(llama3)))
    row, removed, _ = window.conversation(conversation(60))
    kept = len(row["history"]) + 1
    assert 1 < kept < 60 and removed == 60 - kept
    assert row == conversation(kept)
    assert window.conversation(conversation(kept)) == (conversation(kept), 0, {})
    assert TrainingWindow(50).conversation(conversation(2)).row is None
    assert TrainingWindow().conversation(conversation(60)) == (conversation(60), 0, {})


def test_a_set_of_which_nothing_fits_is_an_error_and_no_file(llama3):
    write_jsonl(Path("rows.jsonl"), long_rows(3))
    process_training_data.main(["--input_file", "rows.jsonl", "--max_rows", "3"])
    with pytest.raises(UserError, match=at("training_data/retrieval_data_rerank_sequence.jsonl", 3, "cutoff_len 40")):
        reranker_sequence.main(["--cutoff_len", "40"])
    assert not Path(BC).exists()


# ---------------------------------------------------------------- where the length comes from


def test_without_a_tokenizer_lengths_are_estimated_and_it_is_said_once_with_the_flag(caplog):
    write_jsonl(Path("rows.jsonl"), long_rows(4, 5))
    process_training_data.main(["--input_file", "rows.jsonl", "--max_rows", "4"])
    reranker_sequence.main([])
    assert logged(caplog, "--tokenizer", 8192) == 1


@pytest.mark.parametrize(
    ("recipe", "flags", "cutoff_len"),
    [
        ("cutoff_len: 777", {}, 777), ("cutoff_len: 777", {"cutoff_len": 99}, 99), ("template: llama3", {}, None),
        ("cutoff_len: 777\nmodel_name_or_path: no/model", {}, 777), ("cutoff_len: 777\nmodel_name_or_path: .. a name?", {}, UserError),
        ("cutoff_len: many", {}, UserError), ("- 1", {}, UserError), ("cutoff_len: 5", {"cutoff_len": 0}, UserError),
        ("cutoff_len: 777\nmodel_name_or_path: /no/such/folder", {}, UserError), (None, {}, UserError),
        ("cutoff_len: 777\nmodel_name_or_path: r.yaml", {}, UserError), ("cutoff_len: &a 1", {}, 1), ("cutoff_len: !!python/name:os.x", {}, UserError),
    ],
)
def test_the_recipe_says_how_long_a_row_may_be_and_flags_override_it(recipe, flags, cutoff_len, caplog):
    if recipe is not None:
        Path("r.yaml").write_text(recipe)
    if cutoff_len is UserError:
        with pytest.raises(UserError):
            load_window(LengthOptions("r.yaml", **flags))
        return
    assert load_window(LengthOptions("r.yaml", **flags)).cutoff_len == cutoff_len
    assert logged(caplog) == logged(caplog, *(("r.yaml", "--cutoff_len") if cutoff_len is None else (cutoff_len, "--tokenizer"))) == 1


def test_the_hub_is_asked_once_and_quickly(monkeypatch, caplog):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert load_window(LengthOptions(RECIPE)).unit == "characters"
    assert logged(caplog, "http://127.0.0.1:9", "--tokenizer") == 1


def test_another_tokenizer_or_cutoff_len_is_another_set_and_another_learning_rate_is_not(llama3):
    args = reranker_sequence.parse_args([*count_by(llama3)])
    assert {str(REPO / "template/llama3.jinja"), str(llama3 / "tokenizer.json")} <= set(resolve_length_flags(args))
    assert (args.cutoff_len, args.tokenizer) == (8192, str(llama3))
    write_jsonl(Path("rows.jsonl"), long_rows(4, 5))
    process_training_data.main(["--input_file", "rows.jsonl", "--max_rows", "4"])
    Path("r.yaml").write_text("cutoff_len: 8192\nlearning_rate: 1.0e-5\n")
    reranker_sequence.main(["--train_recipe", "r.yaml"])
    Path("r.yaml").write_text("cutoff_len: 8192\nlearning_rate: 2.0e-5\n")
    reranker_sequence.main(["--train_recipe", "r.yaml"])
    Path("r.yaml").write_text("cutoff_len: 4096\n")
    with pytest.raises(UserError, match=naming("arguments", "cutoff_len")):
        reranker_sequence.main(["--train_recipe", "r.yaml"])


def test_an_estimate_is_near_what_a_tokenizer_counts_and_never_of_nothing():
    assert TrainingWindow(10).fits([], 0) is False
    assert training_rows.estimated_tokens("x" * 35) == 10
    assert training_rows.estimated_tokens("東京" * 10) == 20


# ---------------------------------------------------------------- the columns


PUBLISHED = {"prompt": "instruction", "query": "input", "response": "output"}


@pytest.mark.parametrize(
    ("entry", "warned"),
    [
        ({"columns": {**PUBLISHED, "system": "system"}}, False), ({"columns": PUBLISHED}, True), ({}, True), (None, True),
        ({"columns": {**PUBLISHED, "system": "input"}}, True),
    ],
)
def test_an_entry_that_would_lose_the_system_prompt_is_named(entry, warned, caplog):
    caplog.set_level("INFO")
    Path("recipes").mkdir()
    info = {"alpaca": {"file_name": "a.json"}, **({"mine": {"file_name": "../training_data/bc.json", **entry}} if entry is not None else {})}
    Path("recipes/dataset_info.json").write_text(json.dumps(info))
    check_columns(RECIPE, "somewhere/bc.json")
    [said] = caplog.records
    assert (said.levelname == "WARNING") is warned
    assert '"system": "system"' in said.getMessage() and (entry is None or "mine" in said.getMessage())


@pytest.mark.parametrize("content", ["[1]", "{", '{"a": 1}', '{"a": {"file_name": "bc.json", "columns": []}}'])
def test_a_dataset_info_that_is_none_is_named(content):
    Path("recipes").mkdir()
    Path("recipes/dataset_info.json").write_text(content)
    with pytest.raises(UserError, match=r"recipes/dataset_info\.json"):
        check_columns(RECIPE, "bc.json")


def test_every_set_says_how_its_system_prompt_is_trained(caplog):
    caplog.set_level("INFO")
    write_sets(long_rows(4, 3))
    for name, path in SETS.items():
        assert [record for record in caplog.records if path in record.getMessage() and f" {name}" in record.getMessage()]


def test_published_recipes_differ_from_ours_in_batch_and_names_alone():
    for ours, published, batch in ((SFT, "llama8b", (2, 2)), (DPO, "llama8b_dpo", (1, 4))):
        recipe, theirs = yaml.safe_load(ours.read_text()), yaml.safe_load((REPO / f"examples/train_full/{published}.yaml").read_text())
        assert (theirs.pop("per_device_train_batch_size"), theirs.pop("gradient_accumulation_steps")) == batch
        assert batch[0] * batch[1] * 8 == 32
        names = theirs.pop("dataset").split(",")
        info = json.loads((REPO / "recipes/dataset_info.json").read_text())
        assert [info[name] for name in names] == [info[name] for name in recipe["dataset"].split(",")]
        assert theirs == {key: value for key, value in recipe.items() if key not in ("dataset", "per_device_train_batch_size", "gradient_accumulation_steps")}
    assert {"alpaca_data", "llama3_generator_dpo", "llama3_reranker_dpo"} <= info.keys() and info["alpaca_data"] == info["alpaca"]


# ---------------------------------------------------------------- the real trainer's tokens

# In .venv-train. Arguments: cases.json (name -> [template, settings, tokenizer folder, recipe]), sets.json (name -> rows), output.
WITH_LLAMAFACTORY = """
import json, sys, yaml
from llamafactory.data.converter import AlpacaDatasetConverter
from llamafactory.data.parser import get_dataset_list
from llamafactory.data.processor.pairwise import PairwiseDatasetProcessor
from llamafactory.data.processor.supervised import SupervisedDatasetProcessor
from llamafactory.data.template import get_template_and_fix_tokenizer
from llamafactory.hparams import DataArguments
from transformers import AutoTokenizer

cases, sets, info = (json.load(open(path)) for path in sys.argv[1:4])
output = sys.argv[4]
encoded = {}
for case, (template, settings, folder, recipe) in cases.items():
    tokenizer = AutoTokenizer.from_pretrained(folder, use_fast=True, padding_side="right")
    for limit in ("recipe", "none"):
        cutoff_len = yaml.safe_load(open(recipe))["cutoff_len"] if limit == "recipe" else 1000000
        arguments = DataArguments(template=template, cutoff_len=cutoff_len, **settings)
        chat = get_template_and_fix_tokenizer(tokenizer, arguments)
        for name, rows in sets[case].items():
            attributes, = get_dataset_list([name], info)
            kind = PairwiseDatasetProcessor if attributes.ranking else SupervisedDatasetProcessor
            examples = {}
            for row in map(AlpacaDatasetConverter(attributes, arguments), rows):
                for key, value in row.items():
                    examples.setdefault(key, []).append(value)
            made = kind(chat, tokenizer, None, arguments).preprocess_dataset(examples)
            encoded.setdefault(case, {}).setdefault(name, {})[limit] = {key: made[key] for key in made if key.endswith(("input_ids", "labels"))}
json.dump(encoded, open(output, "w"))
"""


@pytest.mark.slow
def test_the_trainer_cuts_no_row_at_the_recipes_cutoff_len_and_trains_the_system_prompt(tmp_path, warm):
    """LLaMA-Factory's own processors run with the recipe's cutoff_len, for every chat template, on published entries too."""
    if not TRAIN_PYTHON.is_file():
        pytest.skip("no .venv-train; scripts/setup.sh makes it")
    info = json.loads((REPO / "recipes/dataset_info.json").read_text())
    published = {f"{name}_published": {**info[name], "columns": {key: column for key, column in info[name]["columns"].items() if key != "system"}} for name in SETS}
    cases, sets = {}, {}
    for name, template in CASES.items():
        if name == "smollm2_real" or (name in FAMILIES and name != "qwen3_8b"):
            continue  # these are longest by no other tokens than the others
        save_tokenizer(name, tmp_path / name)
        cases[name] = [template, facts_of(name).get("settings", {}) if name in FAMILIES else {}, str(tmp_path / name), str(SFT)]
        write_sets(long_rows(8), "--tokenizer", str(tmp_path / name), "--template", str(REPO / f"template/{template}.jinja"))
        sets[name] = {f"{entry}{form}": read(path) for entry, path in SETS.items() for form in ("", "_published")}
        flags = ["--tokenizer", str(tmp_path / name), "--template", str(REPO / f"template/{template}.jinja")]
        sets[name]["factbook_warm_up"] = [load_window(lengths(flags)).conversation(conversation(80)).row]
    for path, content in (("cases.json", cases), ("sets.json", sets), ("info.json", {**info, **published})):
        Path(path).write_text(json.dumps(content))
    environment = {**os.environ, "DISABLE_VERSION_CHECK": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("PYTHONPATH", None)
    files = ["cases.json", "sets.json", "info.json", "encoded.json"]
    done = subprocess.run([warm.trainer_python, "-c", WITH_LLAMAFACTORY, *files], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    encoded = json.loads(Path("encoded.json").read_text())
    for name, (template, _, folder, _) in cases.items():
        prompts = PromptTokenizer(training_rows.load_tokenizer(folder)[0], read_template(str(REPO / f"template/{template}.jinja")))
        assert encoded[name]["factbook_warm_up"]["recipe"] == encoded[name]["factbook_warm_up"]["none"], name
        for entry in SETS:
            of_recipe, whole = encoded[name][entry]["recipe"], encoded[name][entry]["none"]
            assert of_recipe == whole, (name, entry)
            longest = max(len(ids) for key, rows in of_recipe.items() if key.endswith("input_ids") for ids in rows)
            assert longest <= 8192 and (longest > 7000 or entry == "llama3_8b_generator_dpo"), "the window is used"
            [ids_of] = [key for key in whole if key.endswith("input_ids") and "rejected" not in key]
            for row, ids, lost in zip(sets[name][entry], whole[ids_of], encoded[name][f"{entry}_published"]["none"][ids_of], strict=True):
                messages = [{"role": "system", "content": row["system"]}, {"role": "user", "content": row["instruction"]}]
                assert ids[: len(prompts.ids(messages))] == prompts.ids(messages)
                assert lost != ids, "an entry without the column loses the system prompt: check_columns says so"
