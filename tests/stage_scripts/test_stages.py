"""What all stages have in common: flags, imports, and the refusal of bad input."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import names
from running import refused
from stages import (
    ALONE,
    DOCS,
    LLM_STAGES,
    MODEL,
    REPO,
    SCORERS,
    STAGES,
    TOOLS,
    TRAINERS,
    flags_of,
    of_kind,
    page_commands,
    row,
)

from dynamicrag.llm.options import CallOptions, EngineOptions
from dynamicrag.stage import options_from

HEAVY = ("torch", "vllm", "transformers", "faiss", "datasets", "spacy", "numpy", "openai", "bert_score")
WRITERS = [name for name in ALONE if name not in (*SCORERS, "split_data")]  # split_data reads its input before it makes the folder
GOOD = json.dumps(row())
BROKEN = {
    "a line that is not JSON": (f"{GOOD}\n{{broken\n", ":2: "),
    "a missing question": (json.dumps(row(question=None)), ":1: key 'question'"),
    "an empty question": (json.dumps(row(question=" ")), ":1: key 'question'"),
    "an id used twice": (f"{GOOD}\n\n{GOOD}\n", ":3: key 'id'"),
    "no id": (json.dumps(row(id=None)), ":1: key 'id'"),
    "a row that is no object": (f"{GOOD}\n[1]\n", ":2: key '(the whole row)'"),
    "an empty file": ("", ": "),
    "documents that are no list": (json.dumps(row(docs={"x": DOCS})), ":1: key 'docs'"),
    "a score that is no number": (json.dumps(row(docs=[{**DOCS[0], "score": "high"}, *DOCS[1:]])), ":1: key 'docs[0].score'"),
}


def run(name: str, *flags: str, cwd: Path | None = None) -> subprocess.CompletedProcess:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, REPO / f"{name}.py", *flags], cwd=cwd, env=environment, capture_output=True, text=True, timeout=60
    )


def test_every_script_at_the_root_is_registered():
    assert sorted([*STAGES, *TOOLS, *TRAINERS]) == sorted(path.stem for path in REPO.glob("*.py"))


@pytest.mark.parametrize("name", STAGES)
def test_the_registered_flags_are_those_of_the_stage(name):
    """The stage understands both command lines, and their flags name {rows} and files in {out}."""
    parse, stage = load(name).parse_args, STAGES[name]
    assert stage.outputs and stage.input in stage.inputs
    for full in (False, True):
        flags = flags_of(name, Path("good"), Path("out"), Path("rows"), full=full)
        given = vars(parse(flags)).values()
        assert "rows" in given or ["rows"] in given
        assert len([value for value in given if str(value).startswith("out/")]) >= len(stage.outputs)
    parse(stage.tiny.split())


def test_every_stage_has_a_command_that_the_chain_runs():
    assert {command.split()[1] for command in page_commands() if command.startswith("python ")} == {f"{name}.py" for name in STAGES}


@pytest.mark.parametrize("name", [*STAGES, *TOOLS, *TRAINERS])
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
    assert ("--seed" in done.stdout) == (name not in TOOLS)
    for flag in ("--overwrite", "--on-error"):
        assert (flag in done.stdout) == (name not in (*TOOLS, *SCORERS))
    assert min(seconds) < 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", [*STAGES, *TOOLS, *TRAINERS])
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
        f"sys.path.insert(0, {str(REPO)!r})\n"
        "found = {}\n"
        f"for name in {[*STAGES, *TOOLS, *TRAINERS]!r}:\n"
        "    module = importlib.import_module(name)\n"
        f"    found[name] = [heavy for heavy in {HEAVY!r} if heavy in sys.modules]\n"
        "    assert callable(module.main) and callable(module.parse_args), name\n"
        "print(json.dumps(found))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert json.loads(done.stdout) == {name: [] for name in (*STAGES, *TOOLS, *TRAINERS)}
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
    for flag in (STAGES[name].input, *STAGES[name].outputs):
        words = re.split("[_-]", flag[2:])
        dashes, underscores = (module.parse_args([*STAGES[name].flags.split(), f"--{mark.join(words)}", "a_b-c"]) for mark in "-_")
        assert dashes == underscores and "a_b-c" in str(vars(dashes))


@pytest.mark.parametrize(("name", "flag", "wrong", "right"), [
    ("retriever", "--index", ["bm52", "BM25", "flat bm52", "IVF16,SQ9", "IVF"], ["flat", "bm25", "flat bm25", "IVF16,SQ8", "RR768,IVF16384,RaBitQfs", "PQ7"]),
    *((name, "--device", ["cudda", "gpu", "cuda:x", "CPU"], ["auto", "cpu", "cuda", "cuda:1"])
      for name in of_kind(MODEL)),
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


@pytest.mark.parametrize("name", LLM_STAGES)
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


@pytest.mark.parametrize(("name", "problem"), [
    (name, problem) for name in ALONE for problem in BROKEN
    if (name, problem) != ("evaluate", "an id used twice")  # evaluate.py counts the first row: test_evaluate.py
])
def test_bad_input_is_named_by_file_line_and_key_before_a_model_is_loaded(name, problem, here):
    content, says = BROKEN[problem]
    Path("in.jsonl").write_text(content)
    message = refused(name, "in.jsonl")
    assert message.startswith(f"in.jsonl{says}")
    assert "\n" not in message
    assert "missing/model" not in message
    written = {path.name for path in here.rglob("*") if path.is_file()} - {"in.jsonl", "llama3.jinja"}
    assert not [file for file in written if file.endswith((".json", ".jsonl")) and not file.endswith(".manifest.json")]


@pytest.mark.parametrize("name", ALONE)
def test_a_missing_input_is_named(name, here):
    assert "nowhere.jsonl" in refused(name, "nowhere.jsonl")


@pytest.mark.parametrize("name", ALONE)
def test_on_the_command_line_bad_input_is_one_line_and_status_2(name, here):
    Path("in.jsonl").write_text(f"{GOOD}\n{{broken\n")
    done = run(name, STAGES[name].input, "in.jsonl", *([STAGES[name].model, "missing/model"] if STAGES[name].model else []), cwd=here)
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if "error" in line]
    assert len(errors) == 1
    assert errors[0].startswith("error: in.jsonl:2: ")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", WRITERS)
def test_a_folder_that_cannot_be_made_fails_before_the_input_is_read(name, here):
    Path("file").write_text("in the way")
    Path("in.jsonl").write_text("{broken")
    for flag in STAGES[name].outputs:
        assert refused(name, "in.jsonl", flag, "file/out.jsonl").startswith("file: ")


@pytest.mark.parametrize("name", ["construct_dpo", "construct_generator_sft", "process_training_data", "reranker_sequence", "split_for_sft_dpo"])
def test_bad_rows_may_be_set_aside_and_a_finished_run_is_not_repeated(name, here, caplog):
    rows = [json.dumps(row(n)) for n in range(4)]
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
    rows = [json.dumps(row(n)) for n in range(4)]
    Path("in.jsonl").write_text("\n".join(rows))
    load(name).main(["--input_file", "in.jsonl"])
    assert names(refused(name, "in.jsonl", "--seed", "5"), "arguments", "seed", 5)
    Path("in.jsonl").write_text("\n".join(rows[:3]))
    assert names(refused(name, "in.jsonl"), "inputs", "in.jsonl")
