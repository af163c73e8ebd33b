"""scripts/reproduce.sh: the forecast and its arithmetic, what is started in which order, and a whole experiment on tiny models."""

import importlib
import json
import os
import re
import subprocess
from pathlib import Path
from types import ModuleType

import pytest
from conftest import at, logged, make_tiny_llama, naming, read_jsonl, write_jsonl
from local_hub import LocalHub
from machines import program, table
from stages import REPO
from stubs import StubEngine

import inference
from dynamicrag.llm.model_files import PROMPTS
from dynamicrag.llm.options import CallOptions
from dynamicrag.llm.requests import RequestBuilder
from dynamicrag.stage import UserError, options_from

NINE = "nq triviaqa popqa hotpotqa 2wikimqa fever eli5 asqa arc_challenge".split()


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(REPO / "scripts"))
    return importlib.import_module


def row(number: int, dataset: str = "nq", docs: int = 4, **of_docs) -> dict:
    shown = [{"id": f"d{n}", "title": f"t{n}", "text": f"river {n} " * n, **of_docs} for n in range(1, docs + 1)]
    return {"id": f"{dataset}_{number}", "dataset": dataset, "question": f"how long is river {number}?", "answers": ["1 km"], "docs": shown}


def prepared(folder: Path, **rows: list[dict]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, of_set in rows.items():
        write_jsonl(folder / f"dynamicrag_{name}.jsonl", of_set)
    return folder


# ---------------------------------------------------------------- arithmetic


def test_hours_are_operations_and_tokens_by_their_rates(scripts):
    costs: ModuleType = scripts("forecast_costs")
    rates = costs.Rates(parameters=1e9, flops=1e12, generated=100, reranked=10, scored=5)
    assert rates.generating(read=3.6e6, written=0) == pytest.approx(2e9 * 3.6e6 / 1e12 / 3600) == pytest.approx(2)
    assert rates.generating(read=0, written=360_000) == pytest.approx(1)
    hour = 3600 * 1e12 / 1e9  # operations of a parameter
    assert rates.training(hour, adapters=False) == pytest.approx(8) and rates.training(hour, adapters=True) == pytest.approx(6)
    assert rates.training(hour, adapters=False, reference=True) == pytest.approx(10)
    reranked = costs.reranking("r", rows=3600, documents=50, size=7, parts=1, rates=rates)
    assert (reranked.hours, reranked.kept) == (5, 7)
    answered = costs.answering("a", rows=10, read=100, written=36, size=1000, selectors=3, parts=4, rates=rates)
    assert (answered.read, answered.written, answered.kept) == (1000, 360, 7000), "the parts, theirs of three results, and the three"
    assert answered.hours == pytest.approx(360 / 100 / 3600 + 1000 * 2e9 / 1e12 / 3600)


@pytest.mark.parametrize(("pairs", "per_question", "reranker", "limits"), [
    ("best-worst", None, None, (50, 50)), ("all", None, None, (50 * 28, 50)), ("top-bottom:2", None, None, (200, 50)), ("top-bottom:2", 3, None, (150, 50)),
    ("all", None, 40, (40, 50)), ("top-bottom:9", None, None, (50 * 28, 50)),
])
def test_pairs_are_at_most_those_of_the_flags(scripts, pairs, per_question, reranker, limits):
    assert scripts("forecast_costs").pair_limits(pairs, 8, 50, per_question, reranker, None) == limits


def test_every_stage_of_training_has_its_tokens_and_bytes(scripts):
    costs = scripts("forecast_costs")
    rates = costs.Rates(parameters=1e9, flops=1e12, generated=100, reranked=10, scored=5)
    means = costs.Means(documents=50, bytes=100, selecting=1000, selection=10, answering=200, answer=30, taught=220)
    plan = costs.Plan(rows=100, labelled=False, expert=20, sft=50, dpo=30, samples=8, prefills=1, reranker_pairs=30, generator_pairs=30, parts=1,
                      sft_epochs=3, dpo_epochs=1, sft_adapters=False, dpo_adapters=True, reference=True)
    stages = {cost.stage: cost for cost in costs.training(plan, means, rates)}
    assert {name: cost.rows for name, cost in stages.items()} == {"03_rerank": 100, "04_training_data": 100, "05_sft": 70, "06_sample": 30, "07_reward": 30, "08_dpo": 60}
    assert stages["05_sft"].trained == 3 * (20 * 1010 + 50 * 220)
    assert (stages["06_sample"].read, stages["06_sample"].written) == (30 * (1000 + 8 * 200), 30 * 8 * 40)
    assert stages["07_reward"].hours == pytest.approx(30 * 8 / 5 / 3600)
    assert stages["08_dpo"].trained == 2 * 30 * (1010 + 230)
    assert stages["08_dpo"].hours == pytest.approx(stages["08_dpo"].trained * 8 * 1e9 / 1e12 / 3600)
    assert (stages["05_sft"].kept, stages["05_sft"].meanwhile, stages["08_dpo"].meanwhile) == (2e9, 32e9, 0)
    labelled = [cost.stage for cost in costs.training(costs.Plan(**{**vars(plan), "labelled": True}), means, rates)]
    assert labelled == [*stages][1:]
    whole = costs.total(stages.values())
    kept = [cost.kept for cost in stages.values()]
    assert whole.kept == sum(kept) and whole.kept + whole.meanwhile == sum(kept[:3]) + 32e9, "the disk is fullest during SFT"


# ---------------------------------------------------------------- rows and lengths


def test_all_rows_are_counted_and_a_sample_of_them_is_kept(scripts, tmp_path):
    rows = scripts("forecast_rows")
    path = str(prepared(tmp_path, nq=[row(n, docs=1) for n in range(2000)]) / "dynamicrag_nq.jsonl")
    file = rows.Counted(path, 100, 1)
    numbers = [int(one["id"].removeprefix("nq_")) for one in file.sample]
    assert file.rows == 2000 and file.bytes == Path(path).stat().st_size and len(set(numbers)) == 100
    assert 700 < sum(numbers) / 100 < 1300, "from the whole file"
    assert [one["id"] for one in rows.Counted(path, 100, 1).sample] == [one["id"] for one in file.sample]
    assert [one["id"] for one in rows.Counted(path, 100, 2).sample] != [one["id"] for one in file.sample]


@pytest.mark.parametrize(("name", "content", "named"), [
    ("nq", [row(1), row(2, "popqa")], ("popqa_2", "popqa", "nq")), ("arc_challenge", [row(1)], ("nq_1", "nq", "arc")), ("nq", [{"id": "nq_1", "question": "q"}], ("docs",)),
])
def test_rows_that_are_not_those_of_the_set_are_named(scripts, tmp_path, name, content, named):
    path = prepared(tmp_path, **{name: content}) / f"dynamicrag_{name}.jsonl"
    with pytest.raises(UserError, match=naming(*named)) as refused:
        scripts("forecast_rows").Counted(str(path), 10, 1)
    assert str(refused.value).startswith(str(path))


def test_names_of_prepared_files_are_names_of_data_sets(scripts, tmp_path):
    for name in NINE:
        path = prepared(tmp_path, **{name: [row(1, name)]}) / f"dynamicrag_{name}.jsonl"
        assert scripts("forecast_rows").Counted(str(path), 10, 1).rows == 1


@pytest.mark.parametrize("selector", ["none", "all", "top:2", "dynamic", "pointwise"])
def test_the_tokens_forecast_are_those_that_inference_sends(scripts, selector):
    """A model that chooses as many documents as assumed, and answers with as many tokens as allowed, reads exactly so much."""
    asked = inference.parse_args(["--llm-model", "./nowhere", "--topn", "3", "--selector", selector])
    lengths = scripts("forecast_rows").Lengths(asked, docs_chosen=2)

    def reply(request, kind, titles):
        return {"select": "[1], [2]", "judge": "Yes" if titles in (["t1"], ["t2"]) else "No"}.get(kind, "answer")

    engine = StubEngine(reply)
    engine.titles = lambda messages: re.findall(r"^(?:\[\d+\] )?(t\d)$", messages[-1]["content"], re.MULTILINE)
    questions = [row(1), row(2, docs=1)]
    caller = RequestBuilder(engine, options_from(asked, CallOptions))
    inference.answer_rows(questions, (caller, caller), selector, asked.topn, "q.jsonl")
    requests = [request for batch in engine.batches for request in batch]
    sent = sum(lengths.window.prompt_tokens(request.messages) for request in requests)
    forecast = [lengths.question(question, selector) for question in questions]
    assert sum(read for read, _ in forecast) == sent > 0
    answers = sum(request.max_tokens for request in requests if StubEngine.kind(request) == "answer")
    selections = {"dynamic": lengths.selection * 2, "pointwise": 2 * 4}.get(selector, 0)
    assert sum(written for _, written in forecast) == answers + selections


# ---------------------------------------------------------------- the command


def forecast_of(scripts, capsys, *argv: str) -> dict[str, list[str]]:
    scripts("forecast").main([*argv])
    return table(capsys.readouterr().out)


def test_the_forecast_of_sets_has_a_line_per_set_and_says_what_is_a_guess(scripts, tmp_path, capsys, caplog):
    folder = prepared(tmp_path, nq=[row(n) for n in range(30)], popqa=[row(n, "popqa") for n in range(10)])
    files = [str(folder / f"dynamicrag_{name}.jsonl") for name in ("nq", "popqa")]
    asked = ["--", "--llm-model", "./nowhere", "--selector", "none", "dynamic", "--input-json", *files]
    lines = forecast_of(scripts, capsys, "answer", "--gpus", "2", "--rerank", "--flops", "1e12", *asked)
    assert [lines[f"{stage} dynamicrag_{name}"][0] for stage in ("rerank", "answer") for name in ("nq", "popqa")] == ["30", "10"] * 2
    assert lines["--flops"][0] == "1,000,000,000,000" and lines["--flops"][2] != lines["--generated_per_second"][2]
    assert "guess" in lines["--generated_per_second"][2] and "docs/scale.md" in lines["--reranked_per_second"][2]
    scale = (REPO / "docs/scale.md").read_text(encoding="utf-8")
    assert f"{lines['--reranked_per_second'][0]} documents/s" in scale and f"{lines['--scored_per_second'][0]} pairs/s" in scale
    assert forecast_of(scripts, capsys, "answer", "--disk", str(tmp_path / "absent/run"), *asked) and not logged(caplog, "WORK")


def test_a_disk_that_will_be_full_is_warned_of_and_a_model_that_is_there_is_counted(scripts, tmp_path, capsys, caplog, monkeypatch):
    folder = prepared(tmp_path, training=[row(n, rerank_label="true") for n in range(50)])
    (tmp_path / "model").mkdir()
    (tmp_path / "model/model.safetensors").write_bytes(b"0" * 2000)
    asked = ["--", "--llm-model", str(tmp_path / "model"), "--input-jsonl", str(folder / "dynamicrag_training.jsonl")]
    lines = forecast_of(scripts, capsys, "train", "--disk", str(tmp_path), *asked)
    assert lines["--parameters"][0] == "1,000" and [lines[stage][0] for stage in ("05_sft", "06_sample")] == ["34", "16"] and "03_rerank" not in lines
    assert not logged(caplog, "WORK")
    forecast_of(scripts, capsys, "train", "--parameters", "1e13", "--disk", str(tmp_path), "--split_flags=--sft_size 30 --dpo_size 2", *asked)
    assert logged(caplog, "WORK") == 1


def reproduce(*words: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(["bash", "scripts/reproduce.sh", *words], cwd=REPO, env=environment, capture_output=True, text=True, timeout=600)


def test_a_dry_run_prints_the_forecast_and_writes_nothing(machine, tmp_path):
    folder = prepared(tmp_path / "prepared", nq=[row(n) for n in range(25)])
    done = reproduce("nq", "configs/llama3_8b.env", "--dry_run", **machine(2, PREPARED=str(folder), RELEASED="/nowhere/DynamicRAG-8B"))
    assert done.returncode == 0, done.stderr
    lines = table(done.stdout)
    assert lines["answer dynamicrag_nq"][0] == "25" and not (tmp_path / "run").exists()
    assert re.search(naming("PROMPTS", "/nowhere/DynamicRAG-8B"), done.stderr)


@pytest.fixture
def hub():
    """A hub that has the nine evaluation files and the training file in their published forms, with five rows each."""
    def published(name: str) -> list[dict]:
        ctxs = [{"title": f"River {n}", "text": f"The river {n} is {n}0 km long."} for n in range(1, 5)]
        return [{"id": f"{name}_{n}", "question": f"how long is river {n}?", "answers": ["A"], "ctxs": ctxs} for n in range(5)]

    def lines(rows: list[dict]) -> bytes:
        return b"".join(json.dumps(one).encode() + b"\n" for one in rows)

    readings = {"qa_pairs": [{"question": "the upper?", "short_answers": ["30 km"]}], "answer": "30 km"}
    asqa = [{**readings, "sample_id": one["id"], "question": one["question"], "docs": one["ctxs"]} for one in published("asqa")]
    files = {f"{name}.jsonl": lines(published(name)) for name in NINE if name != "asqa"}
    with LocalHub() as started:
        started.add("gasolsun/DynamicRAG-Eval-Data", {**files, "asqa_eval_gtr_top100.json": json.dumps(asqa).encode()}, "dataset")
        started.add("gasolsun/DynamicRAG_Training_Data_150k", {"train.jsonl": lines(published("nq"))}, "dataset")
        yield started


def test_the_files_of_the_hub_are_those_that_are_reproduced(hub, machine, tmp_path):
    environment = machine(None, PREPARED=str(tmp_path / "prepared"), PREPARE_FLAGS="--limit 3", **hub.environment(tmp_path / "cache"))
    subprocess.run(["bash", "scripts/00_prepare.sh"], cwd=REPO, env=environment, check=True, capture_output=True)
    for words, counted in ((["all"], {f"answer dynamicrag_{name}": "3" for name in NINE}), (["train"], {"03_rerank": "3", "06_sample": "1"})):
        done = reproduce(*words, "--dry_run", **environment, BASE_MODEL="/nowhere")
        assert done.returncode == 0, done.stderr
        lines = table(done.stdout)
        assert {stage: lines[stage][0] for stage in counted} == counted
        assert re.search(naming("dynamicrag_asqa" if words == ["all"] else "dynamicrag_training", "--limit"), done.stderr)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("words", "named"), [
    (["all"], ("dynamicrag_triviaqa.jsonl", "python prepare_data.py --name dynamicrag_triviaqa dynamicrag_popqa")),
    (["train"], ("dynamicrag_training.jsonl", "python prepare_data.py --name dynamicrag_training")),
    (["nq", "train"], ("arc_challenge",)), ([], ("arc_challenge",)), (["musique"], ("musique", "arc_challenge")), (["nq", "a.env", "b.env"], ("arc_challenge",)),
    (["nq", "--dryrun"], ("--dryrun", "--dry_run")),
    (["nq", "absent.env"], ("absent.env",)), (["nq", "configs/demo.env"], ("EVAL_QUESTIONS", "configs/demo.env")),
])
def test_what_cannot_be_reproduced_is_said_in_one_line(machine, tmp_path, words, named):
    folder = prepared(tmp_path / "prepared", nq=[row(1)])
    done = reproduce(*words, **machine(None, PREPARED=str(folder)))
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and not (tmp_path / "run").exists()
    assert all(name in done.stderr for name in named)


# A stand-in for every stage: it notes the command and makes the files that its flags name.
STAND_IN = """
import sys
from pathlib import Path
script, *words = sys.argv[1:]
if "forecast" not in script:
    open("LOG", "a").write(" ".join([Path(script).stem, *words]) + "\\n")
flags, values = {}, []
for word in words:
    if word.startswith("--"):
        values = flags.setdefault(word.replace("-", "_").strip("_"), [])
    else:
        values.append(word)
made = [path for name, paths in flags.items() if name in ("output_file", "sequence_file", "normal_file", "sft_file", "dpo_file", "reranker_file", "generator_file") for path in paths]
if "inference" in script:
    made += [flags["output_json"][0].format(input=Path(path).stem, selector=name.replace(":", "")) for path in flags["input_json"] for name in flags["selector"]]
elif "sampling" in script:
    made += flags["output_json"]
for path in made:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    if not Path(path).is_symlink():
        Path(path).write_text("[]")
"""


@pytest.fixture
def stand_ins(machine, tmp_path):
    """The environment of a machine whose stages and trainer are stand-ins; their commands are in tmp_path/log."""
    (tmp_path / "stand_in.py").write_text(STAND_IN.replace("LOG", str(tmp_path / "log")))
    trainer = program(tmp_path / "llamafactory-cli", f"""
        echo "trainer $*" >>{tmp_path}/log
        [[ ! -f {tmp_path}/fails ]] || exit 1
        for word; do case $word in output_dir=*) echo '{{}}' >"${{word#*=}}/config.json"; esac; done""")
    python = f'() {{ /usr/bin/env python3 {tmp_path}/stand_in.py "$@"\n}}'
    return machine(None, PREPARED=str(tmp_path / "prepared"), LLAMAFACTORY=str(trainer), MODEL="smollm2_135m", TEMPLATE="template/smollm2.jinja",
                   BASE_MODEL="base", **{"BASH_FUNC_python%%": python})


def log_of(folder: Path) -> list[str]:
    lines = (folder / "log").read_text().splitlines()
    (folder / "log").unlink()
    return lines


def test_sets_are_answered_by_the_released_model_from_the_prepared_rows_and_put_in_one_table(stand_ins, tmp_path):
    folder = prepared(tmp_path / "prepared", nq=[row(1)], popqa=[row(1, "popqa")])
    model = tmp_path / "Released"
    released = {**stand_ins, "RELEASED": str(model)}
    missing = reproduce("nq", **released)
    assert missing.returncode == 2 and re.search(naming(str(model), "Released", "models/Released"), missing.stderr) and not (tmp_path / "run").exists()
    model.mkdir()
    (model / "config.json").write_text("{}")
    done = reproduce("nq", "popqa", **released)
    assert done.returncode == 0, done.stderr
    (tmp_path / "file").touch()
    unwritable = reproduce("nq", **{**released, "WORK": str(tmp_path / "file/run")})
    assert unwritable.returncode == 2 and re.search(f"(?m)^error: {tmp_path}/file/run/eval_data: .*WORK", unwritable.stderr)
    assert re.search(naming("PROMPTS"), done.stderr)
    asked, *evaluated, combined = log_of(tmp_path)
    assert asked.startswith("inference ") and f"--llm-model {model} " in asked and asked.endswith("--selector none top:5 dynamic")
    assert [line.split()[0] for line in evaluated] == ["evaluate_retrieval", "evaluate"] * 2 and "dynamicrag_popqa_Released_top5.json" in evaluated[3]
    assert combined == f"all_sets --results_dir {tmp_path}/run/results --sets dynamicrag_nq dynamicrag_popqa"
    for name in ("nq", "popqa"):
        assert (tmp_path / f"run/eval_data/dynamicrag_{name}.jsonl").resolve() == folder / f"dynamicrag_{name}.jsonl"
    assert reproduce("nq", **released, SELECTORS="monot5 dynamic").returncode == 0
    reranked = log_of(tmp_path)[0]
    (model / PROMPTS).touch()
    assert not re.search(naming("PROMPTS"), reproduce("nq", "--dry_run", **released).stderr), "it brings its own"
    assert reranked.startswith("reranker ") and f"--input_file {folder}/dynamicrag_nq.jsonl" in reranked
    assert read_jsonl(folder / "dynamicrag_nq.jsonl") == [row(1)] and not (tmp_path / "run/eval_data/dynamicrag_nq.jsonl").is_symlink(), "never through the link"
    in_the_way = reproduce("nq", **released)
    assert in_the_way.returncode == 2 and f"error: {tmp_path}/run/eval_data/dynamicrag_nq.jsonl " in in_the_way.stderr


def test_training_begins_where_the_prepared_rows_are_and_continues(stand_ins, tmp_path):
    folder = prepared(tmp_path / "prepared", training=[row(1)])
    (tmp_path / "fails").touch()
    failed = reproduce("train", **stand_ins)
    stages = [line.split()[0] for line in log_of(tmp_path)]
    assert failed.returncode != 0 and stages == ["reranker", "process_training_data", "reranker_sequence", "split_for_sft_dpo", "construct_generator_sft", "trainer"]
    assert (tmp_path / "run/output/retrieval_data.jsonl").resolve() == folder / "dynamicrag_training.jsonl"
    (tmp_path / "fails").unlink()
    done = reproduce("train", **stand_ins)
    assert done.returncode == 0, done.stderr
    after = ["trainer", "sampling_dpo_trajectories", "reward_trajectories", "construct_dpo", "trainer"]
    assert [line.split()[0] for line in log_of(tmp_path)] == [*stages[:-1], *after] and f"{tmp_path}/run/DynamicRAG_smollm2_135m/dpo" in done.stderr
    assert reproduce("train", **stand_ins).returncode == 0 and not [line for line in log_of(tmp_path) if line.startswith("trainer")]

    prepared(folder, training=[row(1, rerank_label="true")])
    labelled = {**stand_ins, "WORK": str(tmp_path / "other")}
    assert reproduce("train", **labelled).returncode == 0
    assert log_of(tmp_path)[0].startswith("process_training_data ")
    assert (tmp_path / "other/output/retrieval_data_rerank.jsonl").resolve() == folder / "dynamicrag_training.jsonl"


def test_the_table_of_all_sets_has_a_mean_where_every_set_is_and_the_published_number(scripts, tmp_path, capsys):
    def summary(score: float, **more) -> dict:
        return {"score": score, "low": score - 1, "high": score + 1, "metric": "em", "documents": 2.0, **more}

    for name, systems in {"nq": {"m_dynamic": summary(40.0), "m_none": summary(30.0)}, "popqa": {"m_dynamic": summary(50.0, documents=4.0)}}.items():
        results = {f"dynamicrag_{name}_{system}": figures for system, figures in systems.items()}
        (tmp_path / f"dynamicrag_{name}.metrics.json").write_text(json.dumps({"results": results}))
    module = scripts("all_sets")
    module.main(["--results_dir", str(tmp_path), "--sets", "dynamicrag_nq", "dynamicrag_popqa"])
    lines = table((tmp_path / "all_sets.md").read_text())
    assert lines["m_dynamic"] == ["40.0 (39.0 to 41.0)", "50.0 (49.0 to 51.0)", "45.0", "3.00"] and lines["m_none"] == ["30.0 (29.0 to 31.0)", "", "", ""]
    assert next(cells for name, cells in lines.items() if name.startswith("published"))[:3] == ["48.4", "", ""]
    (tmp_path / "dynamicrag_nq.metrics.json").unlink()
    with pytest.raises(UserError, match=at("dynamicrag_nq.metrics.json")):
        module.main(["--results_dir", str(tmp_path), "--sets", "dynamicrag_nq"])


@pytest.mark.slow
def test_two_sets_are_reproduced_by_the_real_engine(machine, tmp_path):
    folder = prepared(tmp_path / "prepared", nq=[row(n) for n in range(4)], arc_challenge=[
        {**row(n, "arc"), "question": "Which is a metal?\nA: iron\nB: wood", "answers": ["A"]} for n in range(3)
    ])
    make_tiny_llama(tmp_path / "Tiny")
    environment = machine(None, PREPARED=str(folder), RELEASED=str(tmp_path / "Tiny"), SELECTORS="none dynamic", VLLM_CPU_KVCACHE_SPACE="1",
                          ENGINE_FLAGS="--max-model-len 1024 --answer-max-tokens 4", TOKENIZERS_PARALLELISM="false")
    done = reproduce("nq", "arc_challenge", **environment)
    assert done.returncode == 0, done.stderr
    lines = table((tmp_path / "run/results/all_sets.md").read_text())
    assert {"Tiny_none", "Tiny_dynamic"} < set(lines) and all(cell for cell in lines["Tiny_dynamic"])
    answered = {name: json.loads((tmp_path / f"run/results/dynamicrag_{name}_Tiny_dynamic.json").read_text()) for name in ("nq", "arc_challenge")}
    assert [len(rows) for rows in answered.values()] == [4, 3]
    assert os.path.islink(tmp_path / "run/eval_data/dynamicrag_nq.jsonl")
