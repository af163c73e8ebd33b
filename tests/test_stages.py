"""What every top-level stage script has in common: flags, imports, and how it refuses bad input."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import SCORERS, TOOLS, names

from dynamicrag.llm.options import CallOptions, EngineOptions
from dynamicrag.stage import options_from

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py"))
STAGES = [name for name in SCRIPTS if name not in TOOLS]
HEAVY = ("torch", "vllm", "transformers", "faiss", "datasets", "spacy", "numpy", "openai", "bert_score")

# A broken row goes in here: the flag of the input file, and flags without which the stage stops earlier.
MODELS = ["--model_name_or_path", "missing/model"]
INPUTS = {
    "construct_dpo": ("--input_file", []),
    "construct_generator_sft": ("--input_file", []),
    "evaluate": ("--results_file", []),
    "evaluate_retrieval": ("--results_file", []),
    "inference": ("--input_json", ["--llm-model", "missing/model"]),
    "process_training_data": ("--input_file", []),
    "reranker": ("--input_file", MODELS),
    "reranker_sequence": ("--input_file", []),
    "reward_trajectories": ("--input_file", ["--bert_model", "missing/model"]),
    "sampling_dpo_trajectories": ("--input_json", ["--llm-model", "missing/model"]),
    "split_data": ("--input_file", []),
    "split_for_sft_dpo": ("--input_file", []),
    "top_inference": ("--input_json", ["--llm-model", "missing/model"]),
}
# A row every stage accepts.
ROW = {
    "id": "q1", "question": "what?", "answers": ["gold"], "response": "gold", "docs_shown": 1,
    "docs": [{"id": "d", "title": "t", "text": "x", "score": 1.0, "rerank_score": 0.9, "rerank_label": "true"}],
    "true_id": [1], "false_id": [], "true_count": 1, "sequence": [1], "sequence_length": 1,
    "id_lists": [[1], []], "responses": ["gold", "bad"], "response_scores": [1.0, 0.1], "score_terms": [{"em": 1.0}, {"em": 0.0}],
}
GOOD = json.dumps(ROW)
BROKEN = {
    "a line that is not JSON": (f"{GOOD}\n{{broken\n", ":2: "),
    "a missing question": (GOOD.replace('"question": "what?", ', ""), ":1: key 'question'"),
    "an empty question": (GOOD.replace("what?", " "), ":1: key 'question'"),
    "an id used twice": (f"{GOOD}\n\n{GOOD}\n", ":3: key 'id'"),
    "no id": (GOOD.replace('"id": "q1", ', ""), ":1: key 'id'"),
    "a row that is no object": (f"{GOOD}\n[1]\n", ":2: key '(the whole row)'"),
    "an empty file": ("", ": "),
    "documents that are no list": (GOOD.replace('"docs": [', '"docs": {"x": [').replace('"true"}]', '"true"}]}'), ":1: key 'docs'"),
    "a score that is no number": (GOOD.replace('"score": 1.0', '"score": "high"'), ":1: key 'docs[0].score'"),
}


def run(name: str, *flags: str, cwd: Path | None = None) -> subprocess.CompletedProcess:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, ROOT / f"{name}.py", *flags], cwd=cwd, env=environment, capture_output=True, text=True, timeout=60
    )


def test_every_stage_is_here():
    """The others read indexes, corpora, whole sets of shards and a hub: test_retrieval.py, test_io.py and test_prepare_data.py."""
    assert set(INPUTS) == set(STAGES) - {"aggregate", "retriever", "generate_passage_embeddings", "prepare_data"}


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_answers_within_a_second_and_says_what_the_stage_is_for(name, tmp_path):
    seconds = []
    for _ in range(2):
        begin = time.monotonic()
        done = run(name, "--help", cwd=tmp_path)
        seconds.append(time.monotonic() - begin)
        if seconds[-1] < 1:
            break
    assert done.returncode == 0
    assert f"python {name}.py" in done.stdout, "one command to copy"
    assert ("--seed" in done.stdout) == (name in STAGES)
    for flag in ("--overwrite", "--on-error"):
        assert (flag in done.stdout) == (name in STAGES and name not in SCORERS)
    assert min(seconds) < 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_says_at_most_one_default_a_flag_and_none_that_is_no_value(name, capsys):
    with pytest.raises(SystemExit):
        load(name).parse_args(["--help"])
    text = capsys.readouterr().out
    flags = [" ".join(flag.split()) for flag in text.split("\n  -")]
    assert len(flags) > 3 and not re.findall(r"--[\w-]*_\w*", text), "one spelling in one help"
    assert not [flag for flag in flags if flag.count("(default") > 1 or "default: None" in flag]


def test_importing_a_stage_imports_nothing_heavy_and_does_nothing(tmp_path):
    program = (
        "import importlib, json, sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "found = {}\n"
        f"for name in {SCRIPTS!r}:\n"
        "    module = importlib.import_module(name)\n"
        f"    found[name] = [heavy for heavy in {HEAVY!r} if heavy in sys.modules]\n"
        "    assert callable(module.main) and callable(module.parse_args), name\n"
        "print(json.dumps(found))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert json.loads(done.stdout) == {name: [] for name in SCRIPTS}
    assert not list(tmp_path.iterdir())


def load(name: str):
    return __import__(name)


@pytest.mark.parametrize("name", STAGES)
def test_abbreviated_flags_are_refused_and_both_spellings_mean_the_same(name, capsys):
    module = load(name)
    for flags in (["--overw"], ["--see", "1"], ["--on-err", "skip"], ["--no_such_flag"]):
        with pytest.raises(SystemExit) as stopped:
            module.parse_args(flags)
        assert stopped.value.code == 2
        assert flags[0] in capsys.readouterr().err.splitlines()[-1]
    if name not in SCORERS:
        assert module.parse_args(["--on-error", "skip"]) == module.parse_args(["--on_error=skip"])
        assert module.parse_args(["--on-error=skip"]).on_error == "skip"
    if name in INPUTS:
        flag = INPUTS[name][0]
        assert module.parse_args([flag, "a_b-c"]) == module.parse_args([flag.replace("_", "-"), "a_b-c"])


@pytest.mark.parametrize(("name", "flag", "wrong", "right"), [
    ("retriever", "--index", ["bm52", "BM25", "flat bm52", "IVF16,SQ9", "IVF"], ["flat", "bm25", "flat bm25", "IVF16,SQ8", "RR768,IVF16384,RaBitQfs", "PQ7"]),
    *((name, "--device", ["cudda", "gpu", "cuda:x", "CPU"], ["auto", "cpu", "cuda", "cuda:1"])
      for name in ("retriever", "generate_passage_embeddings", "reranker", "reward_trajectories")),
    ("inference", "--selector", ["best", "top:0", "dynamic all monot"], ["dynamic", "top:3", "none monot5"]),
    ("construct_dpo", "--pairs", ["worst-best", "top-bottom"], ["all", "top-bottom:2"]),
])
def test_a_value_outside_a_closed_set_is_refused_with_the_flag_and_the_choices(name, flag, wrong, right, capsys):
    for value in wrong:
        with pytest.raises(SystemExit) as stopped:
            load(name).parse_args([flag, *value.split()])
        said = capsys.readouterr().err.splitlines()[-1]
        assert stopped.value.code == 2
        assert flag in said and value.split()[-1] in said and right[0] in said
    for value in right:
        assert load(name).parse_args([flag, *value.split()])


@pytest.mark.parametrize("name", ["inference", "top_inference", "sampling_dpo_trajectories"])
def test_input_json_and_input_jsonl_are_one_flag(name):
    module = load(name)
    for kind in ("input", "output"):
        assert module.parse_args([f"--{kind}-json", "x"]) == module.parse_args([f"--{kind}_jsonl", "x"])
    assert module.parse_args(["--input-jsonl", "x"]).input_json in ("x", ["x"])


@pytest.mark.parametrize("name", ["inference", "top_inference", "sampling_dpo_trajectories"])
def test_options_have_the_defaults_of_their_flags(name):
    args = load(name).parse_args([])
    assert options_from(args, CallOptions) == CallOptions() and options_from(args, EngineOptions) == EngineOptions(args.llm_model)
    assert options_from(load(name).parse_args(["--seed", "7"]), CallOptions).seed == 7


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("template").mkdir()
    Path("template/llama3.jinja").write_text("x")
    return tmp_path


def refused(name: str, path: str, *flags: str) -> str:
    """The message with which a stage refuses a file, in this process."""
    from dynamicrag.stage import UserError

    flag, more = INPUTS[name]
    with pytest.raises(UserError) as error:
        load(name).main([flag, path, *more, *flags])
    return str(error.value)


@pytest.mark.parametrize(("name", "problem"), [
    (name, problem) for name in INPUTS for problem in BROKEN
    if (name, problem) != ("evaluate", "an id used twice")  # it counts the first: test_evaluate.py
])
def test_bad_input_is_named_by_file_line_and_key_before_a_model_is_loaded(name, problem, here):  # behaviour 31
    content, says = BROKEN[problem]
    Path("in.jsonl").write_text(content)
    message = refused(name, "in.jsonl")
    assert message.startswith(f"in.jsonl{says}")
    assert "\n" not in message
    assert "missing/model" not in message
    written = {path.name for path in here.rglob("*") if path.is_file()} - {"in.jsonl", "llama3.jinja"}
    assert not [file for file in written if file.endswith((".json", ".jsonl")) and not file.endswith(".manifest.json")]


@pytest.mark.parametrize("name", INPUTS)
def test_a_missing_input_is_named(name, here):
    assert "nowhere.jsonl" in refused(name, "nowhere.jsonl")


@pytest.mark.parametrize("name", INPUTS)
def test_on_the_command_line_bad_input_is_one_line_and_status_2(name, here):  # behaviour 31
    flag, more = INPUTS[name]
    Path("in.jsonl").write_text(f"{GOOD}\n{{broken\n")
    done = run(name, flag, "in.jsonl", *more, cwd=here)
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if "error" in line]
    assert len(errors) == 1
    assert errors[0].startswith("error: in.jsonl:2: ")
    assert "Traceback" not in done.stderr


WRITERS = {
    "construct_dpo": ["--reranker_file", "--generator_file"], "construct_generator_sft": ["--output_file"], "inference": ["--output_json"],
    "process_training_data": ["--sequence_file", "--normal_file"], "reranker": ["--output_file"], "reranker_sequence": ["--output_file"],
    "reward_trajectories": ["--output_file"], "sampling_dpo_trajectories": ["--output_json"], "split_for_sft_dpo": ["--sft_file", "--dpo_file"],
    "top_inference": ["--output_json"],
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_folder_that_cannot_be_made_fails_before_the_input_is_read(name, here):  # behaviour 5
    Path("file").write_text("in the way")
    Path("in.jsonl").write_text("{broken")
    for flag in WRITERS[name]:
        assert refused(name, "in.jsonl", flag, "file/out.jsonl").startswith("file: ")


@pytest.mark.parametrize("name", ["construct_dpo", "construct_generator_sft", "process_training_data", "reranker_sequence", "split_for_sft_dpo"])
def test_bad_rows_may_be_set_aside_and_a_finished_run_is_not_repeated(name, here, caplog):  # behaviours 2, 31
    rows = [json.dumps({**ROW, "id": f"q{n}"}) for n in range(4)]
    Path("in.jsonl").write_text("\n".join([*rows[:2], '{"id": "bad"}', *rows[2:]]))
    flags = ["--input_file", "in.jsonl", "--on-error", "skip"]
    load(name).main(flags)
    outputs = {path: path.read_bytes() for path in here.rglob("*") if path.is_file()}
    [rejected] = [json.loads(path.read_text()) for path in here.rglob("*.rejected.jsonl")]
    assert (rejected["line"], rejected["row"]) == (3, {"id": "bad"})
    [manifest] = {path.read_bytes() for path in here.rglob("*.manifest.json")}
    assert json.loads(manifest)["counts"]["rejected"] == 1
    load(name).main(flags)
    assert {path: path.read_bytes() for path in here.rglob("*") if path.is_file()} == outputs
    load(name).main([*flags, "--overwrite"])
    after = {path: path.read_bytes() for path in here.rglob("*") if path.is_file() and "manifest" not in path.name}
    assert after == {path: content for path, content in outputs.items() if "manifest" not in path.name}


@pytest.mark.parametrize("name", ["construct_dpo", "process_training_data", "split_for_sft_dpo"])
def test_other_arguments_or_input_over_a_finished_output_are_refused(name, here):
    rows = [json.dumps({**ROW, "id": f"q{n}"}) for n in range(4)]
    Path("in.jsonl").write_text("\n".join(rows))
    load(name).main(["--input_file", "in.jsonl"])
    assert names(refused(name, "in.jsonl", "--seed", "5"), "arguments", "seed", 5)
    Path("in.jsonl").write_text("\n".join(rows[:3]))
    assert names(refused(name, "in.jsonl"), "inputs", "in.jsonl")
