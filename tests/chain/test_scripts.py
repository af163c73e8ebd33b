"""The numbered scripts: shards that add up to one run, failures that are named, predecessors that are missed."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import at, make_text, names, read_jsonl, write_jsonl
from stages import row

from dynamicrag.rows.tasks import derive_dataset, name_of_file
from dynamicrag.stage import UserError

REPO = Path(__file__).parents[2]
SCRIPTS = sorted(path for folder in ("scripts", "experiments") for path in (REPO / folder).glob("*.sh"))


@pytest.fixture
def settings(tmp_path, encoder_dir, monot5_dir, corpus_tsv) -> Path:
    """A settings file like configs/*.env, for tiny models in a folder of its own."""
    import random

    rng = random.Random(3)
    rows = [{"id": f"nq_{n}", "question": make_text(rng, 3, 8), "answers": ["oil"]} for n in range(9)]
    questions = write_jsonl(tmp_path / "train.jsonl", rows)
    test = write_jsonl(tmp_path / "test.jsonl", rows[:3])
    published = (REPO / "configs/llama3_8b.env").read_text(encoding="utf-8")
    path = tmp_path / "tiny.env"
    path.write_text(
        f"WORK={tmp_path}/run MODEL=smollm2_135m PASSAGES={corpus_tsv} EMBEDDINGS={tmp_path}/embeddings\n"
        f"RETRIEVER={encoder_dir} RERANKER={monot5_dir} TRAIN_QUESTIONS={questions} EVAL_QUESTIONS=${{EVAL_QUESTIONS-{test}}}\n"
        f"N_DOCS_RETRIEVED=6 N_DOCS_SHOWN=5\n{published}", encoding="utf-8",
    )
    return path


def bash(script: str, settings: Path, **environment) -> subprocess.CompletedProcess:
    rounds = ["2"] if script == "iterate.sh" else []
    return subprocess.run(
        ["bash", script if "/" in script else f"scripts/{script}", *rounds, str(settings)], cwd=REPO, env={**os.environ, **environment},
        capture_output=True, text=True, timeout=300,
    )


def run_to_reranking(settings: Path, **environment) -> None:
    for script in ("01_embed.sh", "02_retrieve.sh", "03_rerank.sh"):
        done = bash(script, settings, **environment)
        assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_two_shards_give_what_one_run_gives(settings, tmp_path, warm):
    run_to_reranking(settings, **warm.environment, NUM_SHARDS="1", RETRIEVER_FLAGS="--dtype float32")
    whole = read_jsonl(tmp_path / "run/output/retrieval_data_rerank.jsonl")
    assert (tmp_path / "run/eval_data/test.jsonl").exists()
    shutil.rmtree(tmp_path / "run")
    shutil.rmtree(tmp_path / "embeddings")
    run_to_reranking(settings, **warm.environment, NUM_SHARDS="2", RETRIEVER_FLAGS="--dtype float32", EVAL_QUESTIONS="")
    sharded = read_jsonl(tmp_path / "run/output/retrieval_data_rerank.jsonl")
    assert [row["id"] for row in sharded] == [row["id"] for row in whole]
    for one, other in zip(whole, sharded, strict=True):
        scores, again = ({doc["id"]: doc["score"] for doc in row["docs"]} for row in (one, other))
        # other batches round otherwise, in the last digit: documents of nearly one score may change places
        assert list(again.values()) == pytest.approx(list(scores.values()), rel=1e-3)
        assert len(scores.keys() & again.keys()) >= len(scores) - 1
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "run/output").glob("*.jsonl")}
    assert made and bash("03_rerank.sh", settings, **warm.environment, NUM_SHARDS="2", EVAL_QUESTIONS="").returncode == 0
    assert {path: path.stat().st_mtime_ns for path in made} == made
    assert bash("04_training_data.sh", settings, **warm.environment).returncode == 0
    assert (tmp_path / "run/training_data/reranker_bc_training.json").exists()


@pytest.mark.slow
def test_failed_worker_is_named_with_its_log_and_fails_the_script(settings, tmp_path, warm):
    docs = [{"id": f"d{n}", "title": "", "text": "x", "score": -n} for n in range(6)]
    (tmp_path / "run/output").mkdir(parents=True)
    for name in ("data", "test"):
        write_jsonl(tmp_path / f"run/output/retrieval_{name}.jsonl", [{"id": f"q{n}", "question": "what?", "answers": ["x"], "docs": docs} for n in range(4)])
    broken = settings.with_name("broken.env")
    broken.write_text(f"RERANKER={tmp_path}/no-such-model\n" + settings.read_text().replace("RERANKER=/", "UNUSED=/"))
    done = bash("03_rerank.sh", broken, **warm.environment, NUM_SHARDS="2")
    assert done.returncode != 0
    logs = re.findall(r"[^\s*]+\.log\b", done.stderr)  # not the pattern of all logs
    assert len(logs) == 2 and "no-such-model" in Path(logs[0]).read_text()
    assert not (tmp_path / "run/output/retrieval_data_rerank.jsonl").exists()


@pytest.mark.parametrize(("script", "maker"), [
    ("02_retrieve.sh", "scripts/01_embed.sh"), ("03_rerank.sh", "scripts/02_retrieve.sh"),
    ("04_training_data.sh", "scripts/03_rerank.sh"), ("05_sft.sh", "scripts/04_training_data.sh"),
    ("06_sample.sh", "scripts/05_sft.sh"), ("07_reward.sh", "scripts/06_sample.sh"), ("08_dpo.sh", "scripts/07_reward.sh"),
    ("09_infer.sh", "scripts/05_sft.sh"), ("10_evaluate.sh", "scripts/09_infer.sh"), ("iterate.sh", "scripts/05_sft.sh"),
    ("infer_all.sh", "scripts/05_sft.sh"), ("11_top_n.sh", "scripts/05_sft.sh"), ("experiments/oracle.sh", "scripts/03_rerank.sh"),
    ("experiments/ablation.sh", "scripts/demo.sh"), ("experiments/baselines.sh", "scripts/03_rerank.sh"),
])
def test_missing_predecessor_is_named_with_the_script_that_makes_it(settings, tmp_path, script, maker):
    done = bash(script, settings, WORK=str(tmp_path / "run"))
    assert done.returncode == 2
    assert maker in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_wrong_setting_is_named_before_work_is_asked_for_that_it_may_not_need(settings, tmp_path):
    done = bash("02_retrieve.sh", settings, SEARCH_FLAGS="--index bm52")
    assert done.returncode == 2 and "--index bm52" in done.stderr and "01_embed" not in done.stderr
    model = tmp_path / "run/DynamicRAG_smollm2_135m"
    for stage in ("sft", "ablated"):
        (model / stage).mkdir(parents=True)
        (model / stage / "config.json").write_text("{}")
    done = bash("09_infer.sh", settings, STAGES="ablated stf")
    assert done.returncode == 2 and f"{model}/stf" in done.stderr and len(done.stderr.splitlines()) == 1


def test_answers_of_any_model_are_evaluated_and_none_of_another_set(settings, tmp_path):
    docs = [{"id": "d1", "title": "", "text": "x", "score": 1.0}]
    row = {"id": "q", "dataset": "nq", "question": "what?", "answers": ["x"], "docs": docs, "gold_docs": ["d1"]}
    for folder in ("eval_data", "results"):
        (tmp_path / "run" / folder).mkdir(parents=True)
    for name in ("test", "test_oracle"):
        write_jsonl(tmp_path / f"run/eval_data/{name}.jsonl", [row])
    for name in ("test_other_model_dynamic", "test_dpo_dynamic", "test_other_model_top1", "test_oracle_sft_dynamic", "test_sft_dynamic_of_9"):
        (tmp_path / f"run/results/{name}.json").write_text(json.dumps([{**row, "response": "x", "id_list": [1]}]))
    done = bash("10_evaluate.sh", settings, SELECTORS="dynamic top:1")
    assert done.returncode == 0, done.stderr
    scored = json.loads((tmp_path / "run/results/test.metrics.json").read_text())["results"]
    assert list(scored) == ["test_dpo_dynamic", "test_other_model_dynamic", "test_other_model_top1"]


@pytest.mark.slow
def test_one_worker_of_eight_fails_is_named_and_is_all_that_runs_again(settings, tmp_path):
    """reranker.py with the scores of runs, one a part: that of part 3 is missing at first."""
    docs = [{"id": "d1", "title": "", "text": "x"}, {"id": "d2", "title": "", "text": "y"}]
    questions = write_jsonl(tmp_path / "in.jsonl", [{"id": f"q{n}", "question": "what?", "docs": docs} for n in range(16)])
    (tmp_path / "out.jsonl.parts/in").mkdir(parents=True)
    runs = [tmp_path / f"out.jsonl.parts/in/split_{part}.json.run" for part in range(8)]
    for part, run in enumerate(runs):
        if part != 3:
            run.write_text("".join(f"q{n} Q0 d2 1 0.9 r\n" for n in (2 * part, 2 * part + 1)))

    def rerank() -> subprocess.CompletedProcess:
        command = "python reranker.py --run '{in}.run' --input_file '{in}' --output_file '{out}'"
        return subprocess.run(["bash", "-c", f"source scripts/common.sh {settings}; sharded {questions} {tmp_path}/out.jsonl {command}"],
                              cwd=REPO, capture_output=True, text=True, env={**os.environ, "NUM_SHARDS": "8"})

    failed = rerank()
    assert failed.returncode == 1 and failed.stderr.count("error:") == 1 and names(failed.stderr, "error: part 3", f"{tmp_path}/out.jsonl.parts/3.log")
    assert "split_3.json.run" in (tmp_path / "out.jsonl.parts/3.log").read_text()
    finished = {path: path.stat().st_mtime_ns for path in (tmp_path / "out.jsonl.parts").glob("out_*.jsonl")}
    assert len(finished) == 7 and not (tmp_path / "out.jsonl").exists()
    runs[3].write_text("q6 Q0 d2 1 0.9 r\nq7 Q0 d2 1 0.9 r\n")
    done = rerank()
    assert done.returncode == 0, done.stderr
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    rows = read_jsonl(tmp_path / "out.jsonl")
    assert [row["id"] for row in rows] == [f"q{n}" for n in range(16)] and all(row["docs"][1]["rerank_label"] == "true" for row in rows)


def test_shellcheck_finds_nothing():
    # The analysis of the flow of data takes half of the time. The hook of .pre-commit-config.yaml runs it.
    done = subprocess.run([Path(sys.executable).with_name("shellcheck"), "-x", "--extended-analysis=false", *SCRIPTS], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def setting_of_the_demo(*names: str, **environment: str) -> list[str]:
    command = "set -euo pipefail; source configs/demo.env; printf '%s\\n' " + " ".join(f'"${name}"' for name in names)
    plain = {key: value for key, value in os.environ.items() if key not in names}
    done = subprocess.run(["bash", "-c", command], cwd=REPO, env={**plain, **environment}, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


@pytest.mark.parametrize(("labels", "expert"), [({}, True), ({"LABELS": "gold"}, True), ({"LABELS": "reranker"}, False)])
def test_the_gold_selection_is_a_sample_only_with_gold_labels(labels, expert):
    clone, sample = setting_of_the_demo("EXPERT_FLAGS", "SAMPLE_FLAGS", **labels)
    assert f"--labels {labels.get('LABELS', 'gold')} " in clone and ("--include-expert" in sample) == expert and "--seed 42" in sample


def test_a_size_of_the_demo_can_be_set_and_held_out_questions_replace_dev_questions():
    assert setting_of_the_demo("TEST_SIZE", "TRAIN_SIZE", TEST_SIZE="7") == ["7", "300"]
    work = {"WORK": "w", "DEMO_SIZE": "standard"}
    names = ("EVAL_QUESTIONS", "DEV_QUESTIONS", "SPLIT_FLAGS")
    assert setting_of_the_demo(*names[::2], **work) == ["w/questions/test.jsonl", "--sft_size 500 --dpo_size 300 --dev_size 60 --seed 42"]
    assert setting_of_the_demo(*names, **work, HELD_OUT_SIZE="9") == [
        "w/questions/test.jsonl w/questions/dev.jsonl", "w/eval_data/dev.jsonl", "--sft_size 500 --dpo_size 300 --dev_size 0 --seed 42",
    ]


def test_the_evidence_run_asks_new_questions_and_repeats_no_finished_seed(tmp_path):
    """With stand-ins for the scripts that it starts, each of which writes its environment, and for Python, which writes its arguments."""
    (tmp_path / "experiments").mkdir()
    shutil.copy(REPO / "experiments/evidence.sh", tmp_path / "experiments")
    log = tmp_path / "log"
    for name in ("scripts/demo.sh", "experiments/baselines.sh", "experiments/oracle.sh", ".venv/bin/python"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            f'#!/bin/bash\necho "{name} $* | $LABELS $DEMO_SIZE $HELD_OUT_SIZE $SEED | ${{EVAL_QUESTIONS:-}} |$EXCLUDE" >>{log}\n'
            'previous=""; for word; do\n'
            '  case $previous in --output_file) mkdir -p "$(dirname "$word")"; echo {} >"$word";; esac\n'
            '  case $previous in --output_dir) mkdir -p "$word"; touch "$word/reranker.jsonl";; esac\n'
            '  previous=$word; done\n'
        )
        path.chmod(0o755)

    def run(**environment: str) -> list[str]:
        log.write_text("")
        plain = {key: value for key, value in os.environ.items() if key not in ("LABELS", "EVIDENCE", "SEEDS")}
        subprocess.run(["bash", "experiments/evidence.sh"], cwd=tmp_path, env={**plain, **environment}, check=True, capture_output=True)
        return log.read_text().splitlines()

    calls = run(SEEDS="1 2")
    used = "".join(f" runs/evidence_reranker/used_{size}/test.jsonl" for size in (50, 160, 500))
    assert [call for call in calls if call.startswith("scripts/demo.sh")] == [f"scripts/demo.sh  | reranker evidence 240 {seed} |  |{used}" for seed in (1, 2)]
    assert f"experiments/oracle.sh configs/demo.env | reranker evidence 240 1 | runs/evidence_reranker/seed_1/questions/test.jsonl |{used}" in calls
    assert sum("evidence_seed.py" in call and "--labels reranker" in call for call in calls) == 2 and "seed_1.json runs/evidence_reranker/seed_2.json" in calls[-1]
    (tmp_path / "runs/evidence_reranker/seed_2.json").unlink()
    again = run(SEEDS="1 2")
    assert [call.split(" | ")[1] for call in again if call.startswith("scripts/demo.sh")] == ["reranker evidence 240 2"]
    assert not any("questions.py" in call for call in again)
    assert any("--labels gold --output_file runs/evidence_gold/seed_1.json" in call for call in run(SEEDS="1", LABELS="gold"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_script_stops_at_the_first_error(script):
    text = script.read_text(encoding="utf-8")
    started = text.startswith("#!/usr/bin/env bash\n")  # the others are sourced
    assert os.access(script, os.X_OK) == started
    assert not started or "set -euo pipefail" in text or re.search(r'^source "\$\(dirname "\$0"\)(/\.\./scripts)?/common\.sh"', text, re.MULTILINE)
    assert subprocess.run(["bash", "-n", script]).returncode == 0


@pytest.mark.parametrize("script", sorted((REPO / "experiments").glob("*.py")), ids=lambda path: path.name)
def test_an_experiment_starts_in_any_folder_from_the_installed_package(script, tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([sys.executable, script, "--help"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "sys.path" not in script.read_text(encoding="utf-8")


def test_training_is_done_once_continues_and_refuses_other_data(settings, tmp_path):
    """With a stand-in for llamafactory-cli that fails until it is let go; test_chain.py runs the real one."""
    data = tmp_path / "run/training_data"
    data.mkdir(parents=True)
    for name in ("reranker_bc_training.json", "generator_sft_training.json"):
        (data / name).write_text("[]\n")
    trainer = tmp_path / "llamafactory-cli"
    trainer.write_text(
        '#!/bin/sh\necho "$@" >>"$LOG"\n[ -f "$LOG.go" ] || exit 1\n'
        'for word; do case $word in output_dir=*) echo "{}" >"${word#*=}/config.json";; esac; done\n'
    )
    trainer.chmod(0o755)
    log = tmp_path / "calls"
    environment = {"LLAMAFACTORY": str(trainer), "LOG": str(log)}
    folder = tmp_path / "run/DynamicRAG_smollm2_135m/sft"

    assert bash("05_sft.sh", settings, **environment).returncode != 0
    assert (folder / "training_on.sha256").exists()
    Path(f"{log}.go").touch()
    assert bash("05_sft.sh", settings, **environment).returncode == 0
    again = bash("05_sft.sh", settings, **environment)
    assert again.returncode == 0 and str(folder) in again.stderr
    calls = log.read_text().splitlines()
    assert len(calls) == 2 and f"output_dir={folder}" in calls[0] and f"dataset_dir={tmp_path}/run/recipes" in calls[0]

    pairs = data / "pairs.json"
    pairs.write_text("[]\n")
    train = f"source scripts/common.sh {settings}; train dpo"
    trained = [
        subprocess.run(["bash", "-c", f"{train} {recipe} {pairs} -- learning_rate=1"], cwd=REPO, env={**os.environ, **environment}, capture_output=True, text=True)
        for recipe in ("dpo", "dpo", "simpo", "other")
    ]
    assert [done.returncode for done in trained] == [0, 0, 2, 2], trained
    assert len(log.read_text().splitlines()) == 3, "the second is trained already"
    dpo = str(folder.with_name("dpo"))
    assert names(trained[1].stderr, dpo) and names(trained[2].stderr, f"error: {dpo}") and re.search(at("other.yaml", "DPO_RECIPE"), trained[3].stderr)

    on_gpu = f"{train}_on_gpu dpo {pairs} -- learning_rate=1"
    done = subprocess.run(["bash", "-c", on_gpu], cwd=REPO, env={**os.environ, **environment, "CUDA_VISIBLE_DEVICES": "0"}, capture_output=True)
    on_cpu, on_gpu = log.read_text().splitlines()[-2:]
    assert done.returncode == 0 and "use_cpu=false" in on_gpu and "use_cpu" not in on_cpu
    assert on_gpu.index("use_cpu=false") < on_gpu.index("learning_rate=1")  # what is asked for comes last, and wins

    base = tmp_path / "base"
    base.mkdir()
    (base / "trainer_state.json").write_text("1")
    again = bash("05_sft.sh", settings, **environment, BASE_MODEL=str(base), WORK=str(tmp_path / "run"))
    assert again.returncode == 2 and f"error: {folder}: " in again.stderr

    (data / "generator_sft_training.json").write_text("[1]\n")
    refused = bash("05_sft.sh", settings, **environment)
    assert refused.returncode == 2 and f"error: {folder}: " in refused.stderr


@pytest.mark.parametrize(("recipe", "roles", "sets"), [
    ("kto", "reranker", ["reranker_kto"]), ("best_of_n", "generator", ["generator_best_of_n"]), ("kto", "reranker generator", ["reranker_kto", "generator_kto"]),
    ("simpo", "generator", ["generator_dpo"]),
])
def test_the_recipe_chooses_the_rows_and_the_roles_the_model(settings, tmp_path, recipe, roles, sets):
    """With a stand-in for llamafactory-cli, which writes down its command line."""
    trainer, policy, data = tmp_path / "llamafactory-cli", tmp_path / "run/DynamicRAG_smollm2_135m/sft", tmp_path / "run/training_data"
    trainer.write_text('#!/bin/sh\necho "$@" >"$LOG"\n')
    trainer.chmod(0o755)
    policy.mkdir(parents=True)
    (policy / "config.json").write_text("{}")
    data.mkdir()
    write_jsonl(data / "smollm2_135m_output_dpo.jsonl", [row(n) for n in range(1, 4)])
    done = bash("08_dpo.sh", settings, LLAMAFACTORY=str(trainer), LOG=str(tmp_path / "call"), DPO_RECIPE=recipe, ROLES=roles, PAIR_FLAGS="--pair-by set")
    assert done.returncode == 0, done.stderr
    call = (tmp_path / "call").read_text().split()
    one = "" if " " in roles else f"_{roles}"
    assert call[1] == f"recipes/smollm2_135m/{recipe}.yaml" and f"output_dir={policy.with_name('dpo')}{one}" in call and f"model_name_or_path={policy}" in call
    assert [word for word in call if word.startswith("dataset=")] == ([f"dataset=smollm2_135m_{sets[0]}"] if one else [])
    written = {path.stem for path in data.glob("*.json") if not path.name.endswith("manifest.json")}
    assert {f"smollm2_135m_{name}" for name in sets} <= written and (recipe == "simpo" or len(written) == len(sets))
    info = json.loads((tmp_path / "run/recipes/dataset_info.json").read_text())
    assert all((tmp_path / "run/recipes" / info[f"smollm2_135m_{name}"]["file_name"]).is_file() for name in sets)
    refused = bash("08_dpo.sh", settings, ROLES="selector")
    assert refused.returncode == 2 and "ROLES=" in refused.stderr and len(refused.stderr.splitlines()) == 1


def test_a_tracker_is_told_of_training_and_stays_offline(settings, tmp_path):
    """With a stand-in for llamafactory-cli, and one for the Python beside it, which has the package or not."""
    data = tmp_path / "run/training_data"
    data.mkdir(parents=True)
    for name in ("reranker_bc_training.json", "generator_sft_training.json"):
        (data / name).write_text("[]\n")
    environment = {"LLAMAFACTORY": str(tmp_path / "bin/llamafactory-cli"), "LOG": str(tmp_path / "calls")}
    stand_ins = {
        "llamafactory-cli": 'echo "$@" >>"$LOG"; env >"$LOG.env"\nfor word; do case $word in output_dir=*) echo "{}" >"${word#*=}/config.json";; esac; done\n',
        "python": '[ -f "$LOG.installed" ]\n',
    }
    (tmp_path / "bin").mkdir()
    for name, text in stand_ins.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{text}")
        (tmp_path / "bin" / name).chmod(0o755)

    refused = [bash("05_sft.sh", settings, **environment, REPORT_TO=name) for name in ("wandb", "no_tracker")]
    assert [done.returncode for done in refused] == [2, 2] and not (tmp_path / "calls").exists()
    assert names(refused[0].stderr, "REPORT_TO=wandb", f"{tmp_path}/bin/python -m pip install wandb") and names(refused[1].stderr, "REPORT_TO=no_tracker", "mlflow")
    (tmp_path / "calls.installed").touch()
    assert bash("05_sft.sh", settings, **environment, REPORT_TO="wandb").returncode == 0
    assert bash("05_sft.sh", settings, **environment).returncode == 0, "another tracker is no other training"
    [call] = (tmp_path / "calls").read_text().splitlines()
    assert {"report_to=wandb", "run_name=smollm2_135m_sft"} <= set(call.split())
    told = dict(line.split("=", 1) for line in (tmp_path / "calls.env").read_text().splitlines() if "=" in line)
    logs = f"{tmp_path}/run/tracking"
    assert told["WANDB_MODE"] == "offline" and told["MLFLOW_TRACKING_URI"] == f"sqlite:///{logs}/mlflow.db" and told["TENSORBOARD_LOGGING_DIR"] == f"{logs}/smollm2_135m_sft"

    for file in ("calls", "run/DynamicRAG_smollm2_135m"):
        (tmp_path / file).rename(tmp_path / f"{file}.first")
    assert bash("05_sft.sh", settings, **environment).returncode == 0
    assert "report_to" not in (tmp_path / "calls").read_text()


# ---------------------------------------------------------------- rounds


@pytest.fixture
def rounds_module(monkeypatch):
    monkeypatch.syspath_prepend(str(REPO / "scripts"))
    return importlib.import_module("rounds")


def make_round(folder: Path, number: int, score: float, unfinished: str = "") -> None:
    """The files of a round that the table is made of."""
    stages = {
        "results/training_data_dpo_sampling.json": {"k_mean": 1.5, "distinct_selections": 3.0},
        "training_data/m_output_dpo.jsonl": {"reward": {"mean": 0.5}, "em": {"mean": 0.25}},
        "training_data/m_reranker_dpo.json": {"all": {"pairs": 7, "k chosen": 1.0, "k rejected": 2.0, "shorter": 0.5, "gold in chosen": None}},
    }
    for name, summary in stages.items():
        path = folder / f"{number}/{name}.manifest.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        if number and name != unfinished:
            path.write_text(json.dumps({"summary": summary}))
    dev = {"score": score, "low": score - 5, "high": score + 5, "documents": 1.2, "none_share": 0.1}
    (folder / f"{number}/results/dev.metrics.json").write_text(json.dumps({"results": {"dev": dev}}))


@pytest.mark.parametrize(("scores", "best"), [([30.0], 0), ([30.0, 31.0], 1), ([30.0, 31.0, 31.0], 1), ([30.0, 29.0, 29.5], 0), ([1, 2, 3], 2)])
def test_the_best_round_is_the_earliest_of_the_highest_score(rounds_module, tmp_path, scores, best):
    for number, score in enumerate([*scores, 99.0]):  # a later round of an earlier, longer run does not count
        make_round(tmp_path, number, score)
    rounds_module.main(["--rounds_dir", str(tmp_path), "--last", str(len(scores) - 1), "--model", "m"])
    assert (tmp_path / "best").read_text() == str(best)
    lines = (tmp_path / "rounds.md").read_text().splitlines()
    assert len(lines) == 2 + len(scores) and "(best)" in lines[2 + best]
    figures = json.loads((tmp_path / "rounds.json").read_text())
    assert figures["best"] == best and [one["dev"]["score"] for one in figures["rounds"]] == scores
    if len(scores) > 1:
        assert [cell.strip() for cell in lines[3].split("|")][9:12] == ["0.500", "0.250", "7"]


@pytest.mark.parametrize("kind", ["best_of_n", "kto"])
def test_a_round_of_another_trainer_has_no_figures_of_pairs(rounds_module, tmp_path, kind):
    for number in (0, 1):
        make_round(tmp_path, number, 30.0 + number, unfinished="training_data/m_reranker_dpo.json")
    (tmp_path / f"1/training_data/m_reranker_{kind}.json.manifest.json").write_text(json.dumps({"counts": {"reranker_rows": 3}}))
    rounds_module.main(["--rounds_dir", str(tmp_path), "--last", "1", "--model", "m"])
    assert [cell.strip() for cell in (tmp_path / "rounds.md").read_text().splitlines()[3].split("|")][9:12] == ["0.500", "0.250", ""]


def test_a_round_sampled_in_shards_is_summarised_from_its_rows(rounds_module, tmp_path):
    make_round(tmp_path, 0, 1.0)
    make_round(tmp_path, 1, 2.0)
    sampled = tmp_path / "1/results/training_data_dpo_sampling.json"
    Path(f"{sampled}.manifest.json").write_text("{}")  # as aggregate.py's has no summary of what was sampled
    row = {"id": "q", "question": "?", "docs_shown": 3, "id_lists": [[1, 2], []], "selections": ["[1], [2]", "None"], "responses": ["a", "b"],
           "from_expert": [False, False], "invalid_selections": []}
    sampled.write_text(json.dumps([row]))
    rounds_module.main(["--rounds_dir", str(tmp_path), "--last", "1", "--model", "m"])
    assert json.loads((tmp_path / "rounds.json").read_text())["rounds"][1]["sampling"]["k_mean"] == 1.0


def test_a_round_that_is_not_finished_is_named(rounds_module, tmp_path):
    make_round(tmp_path, 0, 1.0)
    make_round(tmp_path, 1, 2.0, "training_data/m_output_dpo.jsonl")
    with pytest.raises(UserError, match=at("1/training_data/m_output_dpo.jsonl")):
        rounds_module.main(["--rounds_dir", str(tmp_path), "--last", "1", "--model", "m"])


@pytest.mark.parametrize("rounds", ["", "0", "two", "-1"])
def test_a_number_of_rounds_is_asked_for(rounds):
    done = subprocess.run(["bash", "scripts/iterate.sh", rounds], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 2 and "usage" in done.stderr


# ---------------------------------------------------------------- settings and evaluation sets


def sourced(command: str, settings: Path, **environment) -> subprocess.CompletedProcess:
    return subprocess.run(["bash", "-c", f"source scripts/common.sh {settings}; {command}"], cwd=REPO, env={**os.environ, **environment},
                          capture_output=True, text=True)


def test_settings_may_have_the_line_ends_of_windows(settings):
    expected = sourced('declare -p MODEL WORK SELECTORS SETS', settings)
    settings.write_bytes(settings.read_bytes().replace(b"\n", b"\r\n"))
    done = sourced('declare -p MODEL WORK SELECTORS SETS', settings)
    assert done.returncode == 0 and done.stdout == expected.stdout and "\r" not in done.stdout


@pytest.mark.parametrize(("questions", "files"), [("a/test.jsonl b/test.json", ""), ("a/test.jsonl", "b/test.jsonl"), ("", "a/x.jsonl b/x.jsonl")])
def test_two_evaluation_sets_of_one_name_are_refused_before_any_work(settings, questions, files):
    settings.write_text(settings.read_text().replace("EVAL_QUESTIONS=/", "UNUSED=/"))
    done = sourced("echo started", settings, EVAL_QUESTIONS=questions, EVAL_FILES=files)
    assert done.returncode == 2 and "started" not in done.stdout and len(done.stderr.splitlines()) == 1
    assert all(path in done.stderr for path in (questions + " " + files).split())


def test_the_name_advised_for_a_set_called_as_another_keeps_its_data_set(settings):
    """FlashRAG's nq/test.jsonl says by its folder alone what it is."""
    settings.write_text(settings.read_text().replace("EVAL_QUESTIONS=/", "UNUSED=/"))
    done = sourced("echo started", settings, EVAL_QUESTIONS="flash/nq/test.jsonl flash/triviaqa/test.jsonl")
    [advised] = re.findall(r"\S+_test\.jsonl", done.stderr)
    assert Path(advised).parent == Path("flash/triviaqa") and derive_dataset("test_0", name_of_file(advised)) == "triviaqa"


def test_evaluation_sets_with_and_without_documents_are_one_list(settings):
    settings.write_text(settings.read_text().replace("EVAL_QUESTIONS=/", "UNUSED=/"))
    done = sourced('printf "%s\\n" "${SETS[@]}"', settings, EVAL_QUESTIONS="q/nq.jsonl q/fever.json", EVAL_FILES="eval/asqa.json")
    assert done.stdout.split() == ["nq=q/nq.jsonl", "fever=q/fever.json", "asqa=eval/asqa.json"], done.stderr
    assert sourced('echo "${#SETS[@]}"', settings, EVAL_QUESTIONS="").stdout.split() == ["0"]


@pytest.mark.parametrize("missing", ["PASSAGES", "TRAIN_QUESTIONS", "EVAL_QUESTIONS", "EVAL_FILES"])
@pytest.mark.parametrize("script", ["01_embed.sh", "02_retrieve.sh"])
def test_a_missing_input_of_any_stage_is_named_before_the_first_one_starts(settings, tmp_path, missing, script):
    settings.write_text(re.sub(rf"\b{missing}=\S+", f"{missing}={tmp_path}/absent.jsonl", settings.read_text(), count=1))
    done = bash(script, settings)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and f"{tmp_path}/absent.jsonl" in done.stderr
    assert not (tmp_path / "run").exists() and not (tmp_path / "embeddings").exists()


def test_rows_are_fitted_into_what_the_recipe_will_train(settings):
    def flags(*words: str) -> list[str]:
        done = sourced(f'fit_to {" ".join(words)}; printf "%s\\n" "${{FIT_FLAGS[@]}}"', settings, TEMPLATE="template/smollm2.jinja")
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    fixed = ["--train_recipe", "recipes/smollm2_135m/sft.yaml", "--tokenizer", "models/m", "--template", "template/smollm2.jinja", "--cutoff_len"]
    assert flags("sft", "models/m") == [*fixed, "2048"]
    assert flags("sft", "models/m", "seed=1", "cutoff_len=512") == [*fixed, "512"]
