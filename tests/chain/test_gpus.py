"""The scripts on machines with no GPU, one, four and eight: who works on what, and how training starts. Stand-ins for every program."""

import glob
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import make_tiny_llama, names, read_jsonl, write_jsonl
from machines import program, table
from stand_in import ROWS

REPO = Path(__file__).parents[2]
RECIPES = sorted(path for path in (REPO / "recipes").glob("*/*.yaml") if path.parent.name != "models")


def bash(command: str, environment: dict[str, str]) -> subprocess.CompletedProcess:
    """A command after `source scripts/common.sh`."""
    return subprocess.run(["bash", "-c", f"source scripts/common.sh; {command}"], cwd=REPO, env=environment, capture_output=True, text=True, timeout=600)


# ---------------------------------------------------------------- GPUs


@pytest.mark.parametrize(("listed", "visible", "gpus", "workers"), [
    (None, None, "", 1), (1, None, "0", 1), (8, None, "0 1 2 3 4 5 6 7", 8),
    (4, "", "", 1), (4, "-1", "", 1), (4, "NoDevFiles", "", 1), (4, "2,-1,3", "2", 1), (4, "2,3", "2 3", 2), (4, "0, 1", "0 1", 2),
    (4, "GPU-8932f937,GPU-11aa", "GPU-8932f937 GPU-11aa", 2), (4, "MIG-3f/1/0", "MIG-3f/1/0", 1),
])
def test_gpus_are_those_that_cuda_would_see(machine, listed, visible, gpus, workers):
    environment = machine(listed, **({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}))
    done = bash('echo "${GPUS[*]}|$WORKERS|$NUM_SHARDS|$(gpus_of 0)|$CUDA_DEVICE_ORDER"', environment)
    assert done.stdout.strip() == f"{gpus}|{workers}|{workers}|{gpus.split(' ')[0]}|PCI_BUS_ID", done.stderr


def test_what_nvidia_smi_says_when_it_fails_is_no_gpu(machine, tmp_path):
    environment = machine()
    program(tmp_path / "bin/nvidia-smi", "echo \"NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.\"\nexit 9")
    assert bash('echo "${#GPUS[@]}"', environment).stdout.strip() == "0"


@pytest.mark.parametrize(("flags", "per_shard", "size", "gpus"), [
    ("", None, "1", "0"), ("", "2", "2", "0,1"), ("--max-model-len 4096", "4", "4", "0,1,2,3"), ("--tensor-parallel-size 2", None, "2", "0,1"),
    ("--tensor_parallel_size=2", None, "2", "0,1"), ("--tensor-parallel-size 2 --dtype auto", "4", "2", "0,1,2,3"),
])
def test_an_engine_uses_all_gpus_of_its_worker(machine, flags, per_shard, size, gpus):
    environment = machine(8, ENGINE_FLAGS=flags, **({"GPUS_PER_SHARD": per_shard} if per_shard else {}))
    done = bash('echo "$ENGINE_FLAGS|$(gpus_of 0)"', environment)
    engine, worker = done.stdout.strip().split("|")
    assert re.findall(r"--tensor[-_]parallel[-_]size[ =](\d+)", engine) == [size] and worker == gpus and engine.strip().startswith(flags)


@pytest.mark.parametrize("wrong", [
    {"GPUS_PER_SHARD": "16"}, {"GPUS_PER_SHARD": "0"}, {"NUM_SHARDS": "0"}, {"SHARDS": "1"}, {"SHARDS": "4", "NUM_SHARDS": "4"}, {"SHARDS": "x", "NUM_SHARDS": "4"},
    {"CUDA_VISIBLE_DEVICES": "0,0"}, {"CUDA_VISIBLE_DEVICES": "1,GPU-ab, GPU-ab"},
])
def test_numbers_that_do_not_fit_the_machine_are_refused(machine, wrong):
    done = bash("echo on", machine(8, **wrong))
    assert done.returncode == 2 and not done.stdout
    assert len(done.stderr.splitlines()) == 1 and next(iter(wrong)) in done.stderr


# ---------------------------------------------------------------- parts and workers


@pytest.fixture
def questions(tmp_path) -> Path:
    return write_jsonl(tmp_path / "in.jsonl", ROWS)


# A stage of a moment that notes which GPU it has, and how many others run beside it.
WORK = r"""
work() { # PART OUTPUT
    local mine; mine=$LOGS/$(basename "$1")
    echo "${CUDA_VISIBLE_DEVICES:-}" >"$mine.running"
    sleep 0.3
    { cat "$LOGS"/*.running 2>/dev/null || true; } | sort | tr '\n' ' ' >"$mine.beside"
    echo "${CUDA_VISIBLE_DEVICES:-}" >"$mine.gpu"
    rm "$mine.running"
    [[ -z ${FAILS:-} || $1 != *$FAILS* ]] || return 1
    python -m stand_in "$1" "$2"
}
"""


@pytest.fixture
def sharded(machine, questions, tmp_path):
    """sharded(gpus) runs the stage on the parts of the questions."""
    (tmp_path / "logs").mkdir()

    def run(gpus: int | None, **environment) -> subprocess.CompletedProcess:
        environment = machine(gpus, LOGS=str(tmp_path / "logs"), PYTHONPATH=f"{REPO}/tests:{REPO}", **environment)
        return bash(f"{WORK} sharded {questions} {tmp_path}/out.jsonl work '{{in}}' '{{out}}'", environment)

    return run


def test_as_many_parts_run_at_once_as_there_are_workers_each_on_its_own_gpus(sharded, tmp_path):
    done = sharded(4, NUM_SHARDS="8")
    assert done.returncode == 0, done.stderr
    beside = [path.read_text().split() for path in (tmp_path / "logs").glob("*.beside")]
    assert len(beside) == 8 and max(map(len, beside)) == 4
    assert all(len(set(gpus)) == len(gpus) for gpus in beside), "two parts on one GPU"
    assert [row["id"] for row in read_jsonl(tmp_path / "out.jsonl")] == [row["id"] for row in ROWS]


@pytest.mark.slow
def test_parts_that_are_there_are_finished_on_any_number_of_gpus(sharded, tmp_path):
    failed = sharded(8, FAILS="split_3")
    assert failed.returncode == 1 and failed.stderr.count("error: part 3 ") == failed.stderr.count("error:") == 1
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "out.jsonl.parts").glob("out_*.jsonl")}
    assert len(made) == 7
    done = sharded(2)
    assert done.returncode == 0, done.stderr
    assert {path: path.stat().st_mtime_ns for path in made} == made
    gpus = {path.read_text().strip() for path in (tmp_path / "logs").glob("*.gpu")}
    assert gpus == {"0", "1"}
    assert len(read_jsonl(tmp_path / "out.jsonl")) == 16
    assert sharded(None).returncode == 0 and not (tmp_path / "out.jsonl.parts/out_8.jsonl").exists()


def test_a_file_begun_as_a_whole_is_finished_as_a_whole(sharded, tmp_path):
    assert sharded(1).returncode == 0
    made = (tmp_path / "out.jsonl").stat().st_mtime_ns
    assert sharded(8).returncode == 0 and (tmp_path / "out.jsonl").stat().st_mtime_ns == made and not (tmp_path / "out.jsonl.parts").exists()


@pytest.mark.slow
def test_machines_share_the_parts_and_one_puts_them_together(sharded, tmp_path):
    for shards, here in {"0 1 2 3": 4, "4 5 6 7": 8}.items():
        missing = sharded(4, NUM_SHARDS="8", JOIN_ONLY="1")
        assert missing.returncode == 2 and {int(n) for n in re.findall(r"out_(\d)\.jsonl", missing.stderr)} == {*range(here - 4, 8)}
        done = sharded(4, NUM_SHARDS="8", SHARDS=shards)
        assert done.returncode == 0, done.stderr
        assert len(list((tmp_path / "out.jsonl.parts").glob("out_?.jsonl"))) == here and not (tmp_path / "out.jsonl").exists()
    refused = sharded(4, NUM_SHARDS="4", SHARDS="0 1")
    assert refused.returncode == 2 and "NUM_SHARDS=8" in refused.stderr
    for log in (tmp_path / "logs").glob("*"):
        log.unlink()
    assert sharded(4, NUM_SHARDS="8", JOIN_ONLY="1", SHARDS="1").returncode == 2
    done = sharded(4, JOIN_ONLY="1")
    assert done.returncode == 0 and [row["id"] for row in read_jsonl(tmp_path / "out.jsonl")] == [row["id"] for row in ROWS]
    assert not list((tmp_path / "logs").iterdir()), "a part was made again"
    assert sharded(4).returncode == 0


def test_embedding_shards_are_finished_in_their_number_on_the_workers_there_are(machine, tmp_path):
    program(tmp_path / "python", f'echo "$CUDA_VISIBLE_DEVICES $*" >>{tmp_path}/calls; [[ "$*" != *"--shard_id ${{FAILS:-none}} "* ]]')
    passages, embeddings = tmp_path / "passages.tsv", tmp_path / "embeddings"
    passages.touch()
    questions = {name: str(passages) for name in ("PASSAGES", "TRAIN_QUESTIONS", "EVAL_QUESTIONS")}
    python = {"BASH_FUNC_python%%": f'() {{ {tmp_path}/python "$@"\n}}', **questions, "EMBEDDINGS": str(embeddings), "HOME": str(tmp_path)}

    def embed(gpus: int | None, **environment) -> tuple[subprocess.CompletedProcess, list[tuple[str, str, str]]]:
        (tmp_path / "calls").unlink(missing_ok=True)
        done = subprocess.run(["bash", "scripts/01_embed.sh"], cwd=REPO, env=machine(gpus, **python, **environment), capture_output=True, text=True)
        calls = [re.search(r"^(\S*) .*--shard_id (\d+) --num_shards (\d+)", line).groups() for line in (tmp_path / "calls").read_text().splitlines()]
        return done, sorted(calls, key=lambda call: int(call[1]))

    assert embed(1)[1] == [("", "0", "1")]
    assert {call[1:] for call in embed(4)[1]} == {(str(n), "4") for n in range(4)}
    embeddings.mkdir()
    (embeddings / "passages_03.npy.partial.manifest.json").write_text(json.dumps({"arguments": {"num_shards": 8, "shard_id": 3}}, separators=(",", ":")))
    done, calls = embed(2, FAILS="3")
    assert [call[1:] for call in calls] == [(str(n), "8") for n in range(8)] and {call[0] for call in calls} == {"0", "1"}
    assert done.returncode == 1 and done.stderr.count("error: part 3 ") == 1 and "run/logs/embed_3.log" in done.stderr
    assert [call[1] for call in embed(2, NUM_SHARDS="8", SHARDS="6 7")[1]] == ["6", "7"]
    (embeddings / "passages_07.npy.manifest.json").write_text("{}")
    (tmp_path / "calls").touch()
    refused = subprocess.run(["bash", "scripts/01_embed.sh"], cwd=REPO, env=machine(2, **python, JOIN_ONLY="1"), capture_output=True, text=True)
    assert refused.returncode == 2 and names(refused.stderr, "passages_03.npy") and "passages_07" not in refused.stderr


# Answers of a model that names the first document for most questions, and writes no selection for some.
STUB_INFERENCE = """
import sys
import time
from pathlib import Path
from stubs import StubEngine
from dynamicrag.llm import requests
from dynamicrag import stage
script = Path(sys.argv[1]).stem
sys.argv = sys.argv[1:]
def reply(request, kind, titles):
    question = request.messages[-1]["content"]
    return "answer" if kind == "answer" else "no selection" if "odd 1" in question else "[1]"
def load(engine, calls, both=True):
    with open("LOADS", "a") as file:
        print(script, file=file)
    return (requests.RequestBuilder(StubEngine(reply), calls),) * 2
module = __import__(script)
module.load_builders = load
stage.run(module.main)
"""


@pytest.fixture
def results(machine, tmp_path):
    """results(GPUS, VALUES, SET...) answers two evaluation sets; returns the files of the results by name."""
    (tmp_path / "stub_inference.py").write_text(STUB_INFERENCE.replace("LOADS", str(tmp_path / "loads")))
    rows = [
        {"id": f"q{n}", "dataset": "nq", "question": f"what is {'odd' if n % 3 == 1 else 'even'} {n}?", "answers": ["x"],
         "docs": [{"id": f"d{m}", "title": f"t{m}", "text": f"text {m}", "rerank_score": 1 / m, "rerank_label": "true"} for m in range(1, 5)]}
        for n in range(7)
    ]
    (tmp_path / "run/eval_data").mkdir(parents=True)
    for name, asked in {"nq": rows, "few": rows[2:5]}.items():
        write_jsonl(tmp_path / f"run/eval_data/{name}.jsonl", asked)
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    python = f'() {{ if [[ $1 == *inference.py ]]; then command python {tmp_path}/stub_inference.py "$@"; else command python "$@"; fi\n}}'

    def run(gpus: int, command: str) -> dict[str, str]:
        environment = machine(gpus, PYTHONPATH=f"{REPO}:{REPO}/tests", **{"BASH_FUNC_python%%": python})
        done = bash(f'run=$WORK/results model={tmp_path}/model; cd {REPO}; set -- "$WORK"/eval_data/{{nq,few}}.jsonl; {command}', environment)
        assert done.returncode == 0, done.stderr
        (tmp_path / "said").write_text(done.stderr)
        return {path.name: path.read_text() for path in sorted((tmp_path / "run/results").glob("*.json"))}

    return run


INFER = 'infer "$model" "$run/{input}_sft_{selector}.json" "top:2 dynamic" 2 "$@"'
WINDOWS = 'answer top_inference.py "$model" "$run/{input}_sft_windows{topn}.json" topn 3 --max-context-window 2 -- "$2"'


def test_questions_are_divided_among_workers_that_load_the_model_once_and_results_are_those_of_one(results, tmp_path):
    whole = results(1, f"{INFER}; {WINDOWS}")
    assert len(json.loads(whole["nq_sft_dynamic.json"])) == 6 and len(json.loads(whole["nq_sft_dynamic_remain.json"])) == 1
    assert (tmp_path / "loads").read_text().split() == ["inference", "top_inference"]
    os.rename(tmp_path / "run/results", tmp_path / "whole")
    (tmp_path / "loads").unlink()
    divided = results(2, f"{INFER}; {WINDOWS}")
    loads = (tmp_path / "loads").read_text().split()
    assert loads == ["inference"] * 2 + ["top_inference"] * 2
    timed = {name for name in whole if name.endswith(".manifest.json")}
    assert divided.keys() == whole.keys() and {name: divided[name] for name in divided.keys() - timed} == {name: whole[name] for name in whole.keys() - timed}
    for name in timed:
        one, other = json.loads(whole[name]), json.loads(divided[name])
        assert other["counts"].pop("shards") == 2 and one.pop("seconds") is not None and other.pop("seconds") is not None
        assert other == one, "the report, and a later run of one worker, tell results by their manifests"


def test_answers_of_all_parts_are_joined_without_asking_and_missing_ones_are_named(results, machine, tmp_path):
    whole = results(2, f"NUM_SHARDS=2; {WINDOWS}")
    for path in (tmp_path / "run/results").glob("few_*.json*"):
        path.unlink()
    (tmp_path / "loads").unlink()
    joined = results(1, f"JOIN_ONLY=1; {WINDOWS}")
    assert joined["few_sft_windows3.json"] == whole["few_sft_windows3.json"] and not (tmp_path / "loads").exists()
    (tmp_path / "run/results/parts/few_sft_windows3.1.json.manifest.json").unlink()
    refused = bash(f'run=$WORK/results model={tmp_path}/model; JOIN_ONLY=1; set -- x "$WORK/eval_data/few.jsonl"; {WINDOWS}', machine(1))
    assert refused.returncode == 2 and names(refused.stderr, "few_sft_windows3.1.json") and "windows3.0" not in refused.stderr


def test_the_logs_that_are_named_are_there_under_names_without_placeholders(results, tmp_path):
    results(2, f"{INFER}; {WINDOWS}")
    named = re.findall(r"\S+\*\.log", (tmp_path / "said").read_text())
    assert len(set(named)) == 2 and not [path for path in named if "{" in path]
    assert all(len(glob.glob(path)) == 2 for path in named)


def test_results_begun_by_one_worker_are_finished_by_one(results, tmp_path):
    whole = results(1, WINDOWS)
    assert results(4, WINDOWS) == whole and (tmp_path / "loads").read_text().split() == ["top_inference"]
    assert not (tmp_path / "run/results/parts").exists()


def test_answers_of_parts_that_do_not_belong_together_are_refused(results, tmp_path, monkeypatch):
    import aggregate
    from dynamicrag.stage import UserError

    results(2, WINDOWS)
    parts, questions, name = tmp_path / "run/results/parts", tmp_path / "run/eval_data/few.jsonl", "few_sft_windows3"
    monkeypatch.chdir(REPO)

    def join() -> None:
        aggregate.main(["--questions", str(questions), "--splits_dir", f"{parts}/split/few", "--input_files", f"{parts}/{name}.[0-9]*.json",
                        "--output_file", str(tmp_path / "joined.json")])

    def change(key: str, **new) -> str:
        manifest = json.loads((parts / f"{name}.1.json.manifest.json").read_text())
        manifest[key] |= new
        return json.dumps(manifest)

    for place, path, content in [
        ("few_sft_windows3.1.json", parts / f"{name}.1.json.manifest.json", change("arguments", max_context_window=9)),
        ("few_sft_windows3.1.json", parts / f"{name}.1.json.manifest.json", change("inputs", **{"template/llama3.jinja": "0"})),
        ("few_sft_windows3.", parts / f"{name}.1.json.manifest.json", change("counts", rows=9)),
        ("few_sft_windows3.1.json", parts / f"{name}.1.json.manifest.json", None),
        ("few_sft_windows3_remain.1.json", parts / f"{name}_remain.1.json", None),
        ("split/few", parts / "split/few/split_0.json.manifest.json", None),
        ("split/few", questions, questions.read_text() + "\n"),
    ]:
        kept = path.read_text()
        path.unlink()
        if content is not None:
            path.write_text(content)
        with pytest.raises(UserError, match=re.escape(place)):
            join()
        assert not (tmp_path / "joined.json.manifest.json").exists()
        path.write_text(kept)
        for left in tmp_path.glob("joined*"):
            left.unlink()
    join()
    assert (tmp_path / "joined.json").read_text() == (tmp_path / f"run/results/{name}.json").read_text()


# ---------------------------------------------------------------- training


@pytest.fixture
def training(machine, tmp_path):
    """training(GPUS, "RECIPE KEY=VALUE...") trains with a stand-in for LLaMA-Factory; what it was started with, or the refusal."""
    (tmp_path / "rows.json").write_text("[]")
    stand_in = f"""
        echo "$*" >>{tmp_path}/calls
        [[ $1 != export ]] || exit 0
        {{
            echo "by=$0"
            echo "CUDA_VISIBLE_DEVICES=${{CUDA_VISIBLE_DEVICES-unset}}"
            printf '%s\\n' "$@"
        }} >{tmp_path}/started
        [[ ! -f {tmp_path}/fails ]]"""
    trainer = program(tmp_path / "trainer/bin/llamafactory-cli", stand_in)
    program(tmp_path / "trainer/bin/torchrun", stand_in)
    program(tmp_path / "trainer/bin/python", f"""
        echo "$*" >>{tmp_path}/meetings  # of scripts/meet.py, which names the checkpoint
        [[ ! -f {tmp_path}/checkpoint ]] || cat {tmp_path}/checkpoint""")

    def run(gpus: int | None, asked: str, **environment) -> dict[str, str] | str:
        recipe, _, words = asked.partition(" ")
        (tmp_path / "started").unlink(missing_ok=True)
        command = f"train sft {recipe} {tmp_path}/rows.json -- {words}"
        done = bash(command, machine(gpus, LLAMAFACTORY=str(trainer), **environment))
        if done.returncode == 2:
            assert not (tmp_path / "started").exists()
            return done.stderr
        started = (tmp_path / "started").read_text().splitlines() if (tmp_path / "started").exists() else []
        flags = {name: value for name, value in itertools.pairwise(started) if name.startswith("--")}
        return dict(line.partition("=")[::2] for line in started) | flags  # the last of a key wins, as with LLaMA-Factory

    return run


@pytest.mark.parametrize("recipe", ["sft", "sft_lora"])
def test_training_finds_the_torchrun_of_its_own_environment(training, tmp_path, recipe):
    assert training(8, recipe, TRAIN_GPUS="8")["by"] == f"{tmp_path}/trainer/bin/torchrun"


@pytest.mark.parametrize(("gpus", "asked", "environment", "devices", "accumulation", "torchrun"), [
    (8, "sft", {}, "0,1,2,3,4,5,6,7", "4", "8"), (4, "sft", {}, "0,1,2,3", "8", "4"), (1, "sft", {}, "0", "32", "1"),
    (8, "sft", {"TRAIN_GPUS": "2"}, "0,1", "16", "2"), (8, "sft", {"CUDA_VISIBLE_DEVICES": "GPU-a,GPU-b"}, "GPU-a,GPU-b", "16", "2"),
    (8, "sft per_device_train_batch_size=2", {}, "0,1,2,3,4,5,6,7", "2", "8"), (3, "sft gradient_accumulation_steps=5", {}, "0,1,2", "5", "3"),
    (8, "sft deepspeed=null", {}, "0", "32", None), (8, "sft_lora", {}, "0", "32", None), (8, "sft_lora", {"TRAIN_GPUS": "all"}, "0,1,2,3,4,5,6,7", "4", "8"),
    (None, "sft deepspeed=null", {}, "unset", "32", None), (8, "sft", {"NPROC_PER_NODE": "4"}, "0,1,2,3,4,5,6,7", "8", "4"),
])
def test_the_total_batch_is_that_of_the_recipe_on_any_number_of_gpus(training, gpus, asked, environment, devices, accumulation, torchrun):
    started = training(gpus, asked, **environment)
    assert (started["CUDA_VISIBLE_DEVICES"], started["gradient_accumulation_steps"], started.get("--nproc-per-node")) == (devices, accumulation, torchrun)
    assert Path(started["by"]).name == ("torchrun" if torchrun else "llamafactory-cli")


def test_a_recipe_without_deepspeed_takes_one_gpu_and_its_own_batch(training):
    started = training(8, "warm_up", MODEL="smollm2_135m")
    assert (started["CUDA_VISIBLE_DEVICES"], started["gradient_accumulation_steps"], started["use_cpu"]) == ("0", "2", "false")


@pytest.mark.parametrize(("gpus", "asked", "environment", "named"), [
    (3, "sft", {}, (32, 3, "TRAIN_GPUS")), (8, "sft per_device_train_batch_size=3", {}, (32, 8, 3)),
    (8, "sft", {"TRAIN_GPUS": "16"}, ("TRAIN_GPUS", 8)), (8, "sft", {"TRAIN_GPUS": "some"}, ("TRAIN_GPUS",)), (8, "sfx", {}, ("sfx.yaml",)), (None, "sft", {}, ("DeepSpeed", "GPU")),
    (8, "sft", {"NNODES": "2"}, ("NODE_RANK", "MASTER_ADDR", "MASTER_PORT")), (8, "sft", {"NNODES": "2", "MASTER_ADDR": "a", "NODE_RANK": "0"}, ("MASTER_PORT",)),
    (8, "sft", {"NNODES": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1", "NODE_RANK": "2"}, ("NODE_RANK", 2)), (8, "sft", {"NODE_RANK": "1"}, ("NODE_RANK", "NNODES")),
    (8, "sft", {"NNODES": "two"}, ("NNODES", "two")), (8, "sft", {"NODE_SECONDS": "0"}, ("NODE_SECONDS", 0)), (8, "sft", {"MIN_NNODES": "1"}, ("MIN_NNODES", "MAX_RESTARTS")),
])
def test_a_batch_that_cannot_be_divided_is_refused_in_one_line(training, gpus, asked, environment, named):
    refused = training(gpus, asked, **environment)
    assert isinstance(refused, str) and len(refused.splitlines()) == 1 and names(refused, *named)


MACHINES = {"NNODES": "2", "MASTER_ADDR": "first", "MASTER_PORT": "29500"}


def test_machines_train_together_and_the_first_keeps_the_books(training, tmp_path):
    folder = tmp_path / "run/DynamicRAG_llama3_8b/sft"
    alone = training(8, "sft", **MACHINES, NODE_RANK="1", NODE_SECONDS="1")
    assert isinstance(alone, str) and names(alone.splitlines()[-1], folder, "NODE_SECONDS") and not folder.exists()
    (tmp_path / "fails").touch()
    training(8, "sft", **MACHINES, NODE_RANK="0")  # it leaves its records, as while it trains
    (tmp_path / "fails").unlink()
    kept = {path.name: (path.stat().st_mtime_ns, path.read_text()) for path in folder.iterdir()}
    started = training(8, "sft", **MACHINES, NODE_RANK="1")
    flags = {"--nnodes": "2", "--node-rank": "1", "--nproc-per-node": "8", "--master-addr": "first", "--master-port": "29500"}
    assert flags.items() <= started.items() and started["gradient_accumulation_steps"] == "2" and "resume_from_checkpoint" not in started
    meetings = (tmp_path / "meetings").read_text().splitlines()
    assert [re.findall(r"--(node|nodes|address|port) (\S+)", line) for line in meetings] == [
        [("node", node), ("nodes", "2"), ("address", "first"), ("port", "29500")] for node in "01"
    ]
    assert all(f"--folder {folder} " in line and line.endswith(" processes=16") for line in meetings)
    assert {path.name: (path.stat().st_mtime_ns, path.read_text()) for path in folder.iterdir()} == kept
    (tmp_path / "checkpoint").write_text("its/checkpoint-3\n")
    started = training(8, "sft", **MACHINES, NODE_RANK="0")
    assert (started["--node-rank"], started["resume_from_checkpoint"]) == ("0", "its/checkpoint-3") and (folder / "trained_on.sha256").exists()
    assert training(8, "sft", **MACHINES, NODE_RANK="1") == {}


def test_a_machine_with_other_data_or_settings_than_the_first_is_refused(training, tmp_path):
    (tmp_path / "fails").touch()
    training(8, "sft", **MACHINES, NODE_RANK="0")
    for change in ("sft learning_rate=1", "rows"):
        if change == "rows":
            (tmp_path / "rows.json").write_text("[1]")
        refused = training(8, "sft" if change == "rows" else change, **MACHINES, NODE_RANK="1")
        assert isinstance(refused, str) and len(refused.splitlines()) == 1 and names(refused, "sft", 0, 1)


def test_a_failed_training_is_started_again_as_often_as_asked_from_the_last_whole_checkpoint(training, tmp_path):
    output = tmp_path / "run/DynamicRAG_llama3_8b/sft"
    (tmp_path / "fails").touch()
    for number, state in ((9, "{}\n"), (10, '{\n  "glo'), (11, None)):  # the trainer writes the state last
        (output / f"checkpoint-{number}").mkdir(parents=True)
        if state:
            (output / f"checkpoint-{number}/trainer_state.json").write_text(state)
    training(8, "sft", MAX_RESTARTS="2")
    assert len((tmp_path / "calls").read_text().splitlines()) == 3
    assert [path.name for path in output.glob("checkpoint-*")] == ["checkpoint-9"]


@pytest.mark.parametrize("gpus", [1, 8])
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_the_trainer_ends_with_its_script_and_so_does_the_lock(training, machine, tmp_path, gpus, number, status):
    recipe = "sft" if gpus > 1 else "sft_lora"
    for name in ("llamafactory-cli", "torchrun"):
        program(tmp_path / "trainer/bin" / name, f"echo $$ >{tmp_path}/pid; exec sleep 60")
    environment = machine(gpus, LLAMAFACTORY=f"{tmp_path}/trainer/bin/llamafactory-cli")
    script = subprocess.Popen(["bash", "-c", f"source scripts/common.sh; train sft {recipe} {tmp_path}/rows.json --"], cwd=REPO, env=environment, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 20
    while not ((tmp_path / "pid").exists() and (tmp_path / "pid").read_text()) and time.monotonic() < until:
        time.sleep(0.05)
    script.send_signal(number)
    assert script.wait(timeout=20) == status
    trainer = Path("/proc", (tmp_path / "pid").read_text().strip())
    while trainer.exists() and time.monotonic() < until:
        time.sleep(0.05)
    assert not trainer.exists()
    held = subprocess.run(["flock", "--nonblock", tmp_path / "run/DynamicRAG_llama3_8b/sft.0.lock", "true"])
    assert held.returncode == 0


def test_a_second_start_of_a_training_is_told_who_is_at_it(training, machine, tmp_path):
    folder = tmp_path / "run/DynamicRAG_llama3_8b"
    folder.mkdir(parents=True)
    holder = subprocess.Popen(["bash", "-c", f"source scripts/common.sh; hold {folder}/sft.0.lock {folder}/sft; echo held; read -r"], cwd=REPO, env=machine(8),
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    refused = training(8, "sft")
    assert isinstance(refused, str) and names(refused, holder.pid) and len(refused.splitlines()) == 1
    holder.communicate("\n", timeout=10)
    assert training(8, "sft")["--nproc-per-node"] == "8" and (folder / "sft/trained_on.sha256").exists()


@pytest.mark.parametrize(("seconds", "waits"), [("20", True), ("0", False)])
def test_a_start_waits_for_the_ending_programs_of_a_killed_training(training, machine, tmp_path, seconds, waits):
    folder = tmp_path / "run/DynamicRAG_llama3_8b"
    folder.mkdir(parents=True)
    killed = subprocess.Popen(["bash", "-c", f"source scripts/common.sh; hold {folder}/sft.0.lock {folder}/sft; sleep 3 & echo $!; kill -9 $$"], cwd=REPO,
                              env=machine(8), stdout=subprocess.PIPE, text=True)
    program_left = int(killed.stdout.readline())
    assert killed.wait(10) == -9
    started = training(8, "sft", ENDING_SECONDS=seconds)
    if waits:
        assert started["--nproc-per-node"] == "8"
    else:
        assert isinstance(started, str) and names(started, killed.pid, "sft.0.lock")
        os.kill(program_left, signal.SIGKILL)


def test_training_without_locks_is_refused(training, tmp_path):
    program(tmp_path / "bin/flock", "exit 71")  # as for ENOSYS, of Lustre without -o flock
    refused = training(8, "sft")
    assert isinstance(refused, str) and names(refused, "sft.0.lock", "flock") and len(refused.splitlines()) == 1


def test_a_zero_checkpoint_is_continued_by_as_many_processes_alone(training, tmp_path):
    (tmp_path / "fails").touch()
    training(8, "sft")
    output = tmp_path / "run/DynamicRAG_llama3_8b/sft"
    assert training(4, "sft"), "there is no checkpoint yet"
    training(8, "sft")
    (output / "checkpoint-20").mkdir()
    refused = training(4, "sft")
    assert isinstance(refused, str) and names(refused, 8, "checkpoint-*")
    (tmp_path / "fails").unlink()
    assert training(8, "sft")["--nproc-per-node"] == "8" and not list(output.glob("checkpoint-*"))
    assert training(3, "sft") == training(None, "sft") == {}, "a finished model asks nothing of the machine"


def test_an_adapter_is_merged_into_an_ordinary_checkpoint_once_it_is_trained(training, tmp_path):
    (tmp_path / "fails").touch()
    training(1, "sft_qlora model_name_or_path=base")
    folder = tmp_path / "run/DynamicRAG_llama3_8b/sft"
    assert f"output_dir={folder}/adapter" in (tmp_path / "calls").read_text() and not (folder / "trained_on.sha256").exists()
    (tmp_path / "fails").unlink()
    (tmp_path / "calls").unlink()
    training(1, "sft_qlora model_name_or_path=base")
    trained, merged = (tmp_path / "calls").read_text().splitlines()
    assert trained.startswith("train ") and merged == (
        f"export --model_name_or_path base --adapter_name_or_path {folder}/adapter --template llama3 --finetuning_type lora --export_dir {folder} --export_device cpu"
    )
    assert (folder / "trained_on.sha256").exists()


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_recipe_accumulates_its_total_batch_on_the_gpus_it_is_written_for(recipe):
    text = recipe.read_text(encoding="utf-8")
    total, per_device, accumulated = (
        int(re.search(rf"^{key}: (\d+)", text, re.MULTILINE)[1]) for key in ("# total_batch", "per_device_train_batch_size", "gradient_accumulation_steps")
    )
    gpus = 8 if "\ndeepspeed: " in text else 1
    assert total == per_device * accumulated * gpus
    assert recipe.parent.name in ("smollm2_135m", "qwen25_coder_05b") or (total, "\nsave_steps: 0.2 " in text) == (32, True)


@pytest.mark.slow
def test_an_adapter_is_trained_and_merged_by_the_real_trainer_and_dpo_goes_on_from_it(machine, tmp_path, warm):
    import torch
    from safetensors.torch import load_file

    base, run = tmp_path / "base", tmp_path / "run"
    make_tiny_llama(base)
    (run / "training_data").mkdir(parents=True)
    row = {"instruction": "Question: what?", "input": "", "system": "Choose."}
    for name, more in {"reranker_bc_training": {"output": "[1]"}, "generator_sft_training": {"output": "x"}, "llama3_8b_reranker_dpo": {"chosen": "[1]", "rejected": "[2]"},
                       "llama3_8b_generator_dpo": {"chosen": "x", "rejected": "y z"}}.items():
        (run / f"training_data/{name}.json").write_text(json.dumps([{**row, **more}] * 2))
    words = "use_cpu=true preprocessing_num_workers=1 disable_gradient_checkpointing=true gradient_accumulation_steps=1 learning_rate=0.01 plot_loss=false max_steps=2"
    data, folders = run / "training_data/reranker_bc_training.json", {"base": base, "sft": run / "DynamicRAG_llama3_8b/sft", "dpo": run / "DynamicRAG_llama3_8b/dpo"}
    for stage, recipe, model in (("sft", "sft_lora", base), ("dpo", "dpo_lora", folders["sft"])):
        done = bash(f"train {stage} {recipe} {data} -- model_name_or_path={model} {words}", machine(**warm.environment))
        assert done.returncode == 0, done.stderr[-3000:]
        assert {path.name for path in folders[stage].iterdir()} >= {"config.json", "trained_on.sha256", "trainer_state.json", "tokenizer_config.json", "adapter"}
        assert (folders[stage] / "adapter/adapter_config.json").exists() and not list(folders[stage].rglob("checkpoint-*"))
    weights = {name: load_file(folder / "model.safetensors") for name, folder in folders.items()}
    changed = "model.layers.0.mlp.up_proj.weight"
    assert weights["base"].keys() == weights["sft"].keys() == weights["dpo"].keys()
    for before, after in (("base", "sft"), ("sft", "dpo")):
        assert not torch.equal(weights[before][changed].bfloat16(), weights[after][changed].bfloat16())


# ---------------------------------------------------------------- the plan


@pytest.mark.parametrize(("gpus", "environment", "worker", "sft"), [
    # workers, GPUs of the first, parts, tensor parallel size; GPUs, processes, per device, accumulation, total, DeepSpeed, torchrun
    (1, {}, ["1", "0", "1", "1"], ["0", "1", "1", "32", "32", "yes", "1"]),
    (4, {}, ["4", "0", "4", "1"], ["0,1,2,3", "4", "1", "8", "32", "yes", "1"]),
    (8, {}, ["8", "0", "8", "1"], ["0,1,2,3,4,5,6,7", "8", "1", "4", "32", "yes", "1"]),
    (8, {"CUDA_VISIBLE_DEVICES": "", "MODEL": "smollm2_135m"}, ["1", "CPU", "1", "1"], ["CPU", "1", "1", "4", "4", "no", "0"]),
    (8, {"NUM_SHARDS": "1"}, ["1", "0,1,2,3,4,5,6,7", "1", "1"], ["0,1,2,3,4,5,6,7", "8", "1", "4", "32", "yes", "1"]),
    (8, {"CUDA_VISIBLE_DEVICES": "3"}, ["1", "3", "1", "1"], ["3", "1", "1", "32", "32", "yes", "1"]),
    (8, {"CUDA_VISIBLE_DEVICES": "0,1,2,3", "NUM_SHARDS": "8"}, ["4", "0", "8", "1"], ["0,1,2,3", "4", "1", "8", "32", "yes", "1"]),
    (8, {"CUDA_VISIBLE_DEVICES": "GPU-a,GPU-b"}, ["2", "GPU-a", "2", "1"], ["GPU-a,GPU-b", "2", "1", "16", "32", "yes", "1"]),
    (8, {"GPUS_PER_SHARD": "2", "SFT_RECIPE": "sft_lora"}, ["4", "0,1", "4", "2"], ["0", "1", "1", "32", "32", "no", "0"]),
    (8, {"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, ["8", "0", "8", "1"], ["0,1,2,3,4,5,6,7", "16", "1", "2", "32", "yes", "1"]),
])
def test_the_plan_says_what_would_start_and_starts_nothing(machine, tmp_path, gpus, environment, worker, sft):
    done = subprocess.run(["bash", "scripts/plan.sh"], cwd=REPO, env=machine(gpus, **environment), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    plan = table(done.stdout)
    assert plan["06_sample.sh"] == worker and plan["05_sft.sh"][1:] == sft
    assert plan["03_rerank.sh"] == [*worker[:3], "-"] and not (tmp_path / "run").exists()
    assert {name for name in plan if re.match(r"\d\d_", name)} == {path.name for path in (REPO / "scripts").glob("[01][0-9]_*.sh")}


def test_the_plan_refuses_what_training_refuses_and_shows_the_parts_that_are_there(machine, tmp_path):
    folder = tmp_path / "run/output/retrieval_data_rerank.jsonl.parts/in"
    folder.mkdir(parents=True)
    (folder / "split_0.json.manifest.json").write_text('{\n  "arguments": {\n    "num_splits": 8\n}}')
    done = subprocess.run(["bash", "scripts/plan.sh"], cwd=REPO, env=machine(3), capture_output=True, text=True)
    assert done.returncode == 0 and table(done.stdout)["03_rerank.sh"][:3] == ["3", "0", "8"]
    assert names(table(done.stdout)["05_sft.sh"][1], 3)


# ---------------------------------------------------------------- setup


@pytest.fixture
def setup(tmp_path):
    """setup(COMMAND) calls a function of scripts/setup.sh on a machine with the programs that are in tmp_path/bin alone."""
    for name in ("bash", "dirname", "grep", "sed"):
        program(tmp_path / "bin" / name, f'exec /bin/{name} "$@"')
    (tmp_path / "include/python3.11").mkdir(parents=True)

    def run(command: str, **environment) -> subprocess.CompletedProcess:
        program(tmp_path / "bin/python3.11", f"echo {tmp_path}/include/python3.11")
        return subprocess.run(["/bin/bash", "-c", f"source scripts/setup.sh; {command}"], cwd=REPO, capture_output=True, text=True,
                              env={"PATH": str(tmp_path / "bin"), **environment})

    return run


def test_what_a_machine_with_a_gpu_lacks_is_named_before_anything_is_installed(setup, tmp_path):
    program(tmp_path / "bin/nvidia-smi", "echo 550.54.15; echo 550.54.15")
    lacking = setup("check_machine python3.11; echo on")
    assert lacking.returncode == 2 and not lacking.stdout
    assert [word for line, word in zip(lacking.stderr.splitlines(), ("gcc", "python3.11-dev", "580"), strict=True) if word not in line] == []
    program(tmp_path / "bin/gcc", "")
    (tmp_path / "include/python3.11/Python.h").touch()
    assert len(setup("check_machine python3.11").stderr.splitlines()) == 1
    assert setup("check_machine python3.11", IGNORE_DRIVER="1").returncode == 0
    program(tmp_path / "bin/nvidia-smi", "echo 580.65.06")
    done = setup("check_machine python3.11; echo on")
    assert (done.returncode, done.stdout, done.stderr) == (0, "on\n", "")
    program(tmp_path / "bin/nvidia-smi", "echo NVIDIA-SMI has failed; exit 9")
    done = setup("check_machine python3.11; prove /nowhere; echo on")
    assert done.stdout == "on\n" and len(done.stderr.splitlines()) == 1 and "nvidia-smi" in done.stderr


def test_an_environment_whose_torch_has_no_gpu_is_not_called_ready(setup, tmp_path):
    program(tmp_path / "bin/nvidia-smi", "echo 580.65.06")
    program(tmp_path / "bin/python", f'exec {REPO}/.venv/bin/python "$@"')
    import torch

    done = setup(f"prove {tmp_path}; echo on", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2 and torch.__version__ in done.stderr and "580.65.06" in done.stderr and len(done.stderr.splitlines()) == 1
    program(tmp_path / "bin/python", "exit 0")
    assert setup(f"prove {tmp_path}; echo on").stdout == "on\n"


def test_an_empty_line_is_no_part_that_has_ended(machine, tmp_path):
    work = f'work() {{ echo >&"$ended"; sleep 0.2; echo "$1" >>{tmp_path}/done; }}'
    done = subprocess.run(["bash", "-c", f"source scripts/common.sh; {work}; in_pool work {tmp_path}/log. 0 1 2"], cwd=REPO, env=machine(2),
                          capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert sorted((tmp_path / "done").read_text().split()) == ["0", "1", "2"]


@pytest.mark.parametrize(("sent", "to_all", "status"), [(signal.SIGINT, True, 130), (signal.SIGINT, False, 130), (signal.SIGTERM, False, 143)])
def test_an_interrupted_script_leaves_no_worker_behind(machine, tmp_path, sent, to_all, status):
    """Ctrl-C in a terminal goes to every process of the foreground group, a signal of a cluster's to the script alone."""
    pids = tmp_path / "pids"
    pids.mkdir()
    work = f'work() {{ {sys.executable} -c "import os, time; open(\'{pids}/\' + str(os.getpid()), \'w\'); time.sleep(60)"; }}'
    script = subprocess.Popen(["bash", "-c", f"source scripts/common.sh; {work}; in_pool work {tmp_path}/log. 0 1 2 3"], cwd=REPO, env=machine(2),
                              start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                              # Where the tests run in the background, SIGINT is ignored, and bash cannot change that.
                              preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    deadline = time.monotonic() + 30
    while len(list(pids.iterdir())) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    began = time.monotonic()
    (os.killpg if to_all else os.kill)(script.pid, sent)
    _, said = script.communicate(timeout=30)
    assert script.returncode == status and time.monotonic() - began < 10
    assert len(said.splitlines()) == 2, "how many parts there are, and that it was interrupted"
    states = [Path(f"/proc/{path.name}/stat") for path in pids.iterdir()]
    assert len(states) == 2 and not [state for state in states if state.exists() and state.read_text().split()[2] != "Z"]
