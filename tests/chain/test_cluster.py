"""The parts of a file on the nodes of a Ray cluster. Four nodes on this machine with pretended GPUs, stand-ins and tiny models.

`FULL=1` kills nodes, drivers, stages and heads in each stage, twenty times.
"""

import os
import random
import shutil
import signal
import subprocess
import time
import uuid
from pathlib import Path

import pytest
from conftest import make_text, names, read_jsonl, write_jsonl
from freeze_server import Server
from machines import table
from ray_cluster import TAG, RayCluster, locked_files, tagged, wait_for
from stand_in import ROWS

REPO = Path(__file__).parents[2]


class Copying:
    """The stand-in on the parts of sixteen rows, by the function `sharded` of the scripts."""

    def __init__(self, folder: Path, environment: dict[str, str]):
        self.folder, self.orders, self.output = folder, folder / "orders", folder / "out.jsonl"
        self.orders.mkdir()
        write_jsonl(folder / "in.jsonl", ROWS)
        self.tag = uuid.uuid4().hex
        self.environment = {**environment, TAG: self.tag, "ORDERS": str(self.orders), "PYTHONPATH": f"{REPO}/tests:{REPO}"}

    def start(self, **more: str) -> subprocess.Popen:
        command = f"source scripts/common.sh; sharded {self.folder}/in.jsonl {self.output} python -m stand_in '{{in}}' '{{out}}'"
        return subprocess.Popen(["bash", "-c", command], cwd=REPO, env={**self.environment, **more}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                text=True, start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))

    def run(self, **more: str) -> tuple[int, str]:
        process = self.start(**more)
        said = process.communicate(timeout=120)[1]
        return process.returncode, said

    def tries(self) -> list[tuple[str, str]]:
        return [tuple(line.split()) for line in (self.orders / "tries").read_text().splitlines()]

    def partial(self) -> list[Path]:
        return [path for path in Path(f"{self.output}.parts").glob("*.partial") if path.stat().st_size]

    def finished(self) -> list[Path]:
        return [path for path in Path(f"{self.output}.parts").glob("out_*.jsonl") if not path.name.endswith(".partial")]


@pytest.fixture(scope="module")
def cluster():
    with RayCluster(3) as started:
        yield started


@pytest.fixture
def copying(machine, tmp_path, cluster) -> Copying:
    return Copying(tmp_path, machine(**cluster.environment))


@pytest.mark.slow
@pytest.mark.parametrize("dies", [False, pytest.param(True, marks=pytest.mark.full)])
def test_parts_survive_a_crash_and_the_death_of_a_node_and_only_what_is_missing_is_done_again(copying, cluster, dies):
    """One engine crashes, one part has wrong input, and with FULL=1 a node dies; then the same command again."""
    for order in ("crash_1", "wrong_2", "hold"):
        (copying.orders / order).touch()
    process = copying.start(PARTS_PER_GPU="2")
    wait_for(lambda: len(copying.partial()) >= 3)
    if dies:
        cluster.do("kill 0")
    (copying.orders / "hold").unlink()
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 1 and not copying.output.exists(), said
    assert said.count("error:") == said.count("error: part 2 ") == 1 and names(said, f"{copying.output}.parts/2.log"), said
    tries = [part for part, _ in copying.tries()]
    assert tries.count("2") == 1 and tries.count("1") >= 2 and set(tries) == {*"012345"} and len(tries) >= 7 + dies
    assert len(copying.finished()) == 5
    wait_for(lambda: not tagged(copying.tag) and not locked_files(copying.folder), 10)
    (copying.orders / "wrong_2").unlink()
    (copying.orders / "tries").unlink()
    made = {path: path.stat().st_mtime_ns for path in copying.finished()}
    status, said = copying.run()
    assert status == 0, said
    assert {path: path.stat().st_mtime_ns for path in made} == made
    assert {gpus for _, gpus in copying.tries()} == {"0"} and len(copying.tries()) == 6
    assert [row["id"] for row in read_jsonl(copying.output)] == [row["id"] for row in ROWS]


@pytest.mark.slow
def test_a_node_that_ends_every_part_at_once_does_not_get_the_same_part_again(copying):
    (copying.orders / "broken_node1").touch()
    status, said = copying.run(PARTS_PER_GPU="2")
    assert status == 0, said
    assert 1 <= said.count("try 2 of ") <= 6 and "try 3 of " not in said, said
    assert [row["id"] for row in read_jsonl(copying.output)] == [row["id"] for row in ROWS]


@pytest.mark.slow
def test_an_interrupted_script_leaves_nothing_on_the_nodes(copying):
    """Ctrl-C in a terminal goes to the script and to the program that has the nodes."""
    (copying.orders / "hold").touch()
    process = copying.start()
    wait_for(copying.partial)
    os.killpg(process.pid, signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and not tagged(copying.tag) and not locked_files(copying.folder)
    assert len([line for line in said.splitlines() if line.strip()]) == 3, f"the parts of the file, how many there are, and that it was interrupted: {said}"


@pytest.mark.slow
def test_a_part_that_no_node_can_take_is_refused_and_the_plan_asks_the_cluster(machine, cluster):
    plan = {per_part: subprocess.run(["bash", "scripts/plan.sh"], cwd=REPO, capture_output=True, text=True, timeout=60,
                                     env=machine(**cluster.environment, GPUS_PER_SHARD=per_part, PARTS_PER_GPU="2")) for per_part in "12"}
    alive = 2 if os.environ.get("FULL") else 3  # a test above kills a node
    assert plan["1"].returncode == 0 and table(plan["1"].stdout)["02_retrieve.sh"][:3:2] == [str(alive), str(2 * alive)], plan["1"].stderr
    assert plan["2"].returncode == 2 and names(plan["2"].stderr, "GPUS_PER_SHARD", 1) and len(plan["2"].stderr.splitlines()) == 1


@pytest.mark.parametrize(("environment", "named"), [
    ({"RAY_ADDRESS": "127.0.0.1:9"}, "RAY_ADDRESS"), ({"RAY_ADDRESS": "head"}, "RAY_ADDRESS"), ({"RAY_ADDRESS": "127.0.0.1:9", "PYTHONPATH": "{no_ray}"}, "pip"),
])
def test_a_cluster_that_cannot_be_used_is_refused_in_one_line(machine, tmp_path, environment, named):
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray/__init__.py").write_text("raise ImportError")
    environment = {name: value.format(no_ray=tmp_path) for name, value in environment.items()}
    began = time.monotonic()
    done = subprocess.run(["bash", "scripts/plan.sh"], cwd=REPO, env=machine(LAUNCHER="ray", **environment), capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and names(done.stderr, named), done.stderr
    assert time.monotonic() - began < 30


@pytest.mark.full
@pytest.mark.slow
@pytest.mark.parametrize("hidden", ["the shared folder", "the project"])
def test_a_node_that_differs_is_named_before_any_work(machine, tmp_path, hidden):
    """On the nodes another folder is mounted over the shared one, or over a folder of the project."""
    copying = Copying(tmp_path, machine(NUM_SHARDS="2"))
    parts, others = Path(f"{copying.output}.parts"), tmp_path / "others"
    for folder in (parts, others):
        folder.mkdir()
    mount = f'mount --bind {others} {parts if hidden == "the shared folder" else REPO / "template"} && exec "$@"'
    within = ("unshare", "--mount", "bash", "-c", mount, "bash")
    if subprocess.run([*within, "true"], capture_output=True).returncode:
        pytest.skip("this user may not mount")
    with RayCluster(2, within=within) as others:
        status, said = copying.run(**others.environment)
    assert status == 2 and names(said, hidden), said
    assert said.count("error:") == 2 and not (copying.orders / "tries").exists()


# ---------------------------------------------------------------- the kills of FULL=1

SCRIPTS = {"embedding": "01_embed", "retrieval": "02_retrieve", "reranking": "03_rerank", "sampling": "06_sample", "inference": "infer_all"}
STAGES = {"embedding": "generate_passage_embeddings.py", "retrieval": "retriever.py", "reranking": "reranker.py", "sampling": "sampling_dpo_trajectories.py",
          "inference": "inference.py"}
KINDS = ("stage", "driver", "node", "head")


class SlowServer(Server):
    def reply(self, body: dict) -> tuple[int, dict]:
        time.sleep(0.1)
        return super().reply(body)


class Run:
    """A run of one script in a folder that has what the script reads."""

    def __init__(self, name: str, work: Path, machine, settings: dict[str, str]):
        self.name, self.work, self.tag = name, work, uuid.uuid4().hex
        self.environment = machine(**{**settings, "WORK": str(work), "EMBEDDINGS": str(work / "embeddings"), "TRAIN_QUESTIONS": str(work / "questions.jsonl"),
                                      "EVAL_QUESTIONS": str(work / "test.jsonl"), TAG: self.tag})

    def start(self, **launcher: str) -> subprocess.Popen:
        script = [f"scripts/{SCRIPTS[self.name]}.sh", "configs/llama3_8b.env", *([str(self.work.parent / "model")] if self.name == "inference" else [])]
        return subprocess.Popen(["bash", *script], cwd=REPO, env={**self.environment, **launcher}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                start_new_session=True)

    def finish(self, process: subprocess.Popen) -> None:
        said = process.communicate(timeout=600)[0]
        assert process.returncode == 0, said[-3000:]

    def begun(self) -> list[Path]:
        return [path for path in self.work.rglob("*.partial") if path.stat().st_size]

    def outputs(self) -> dict[str, bytes]:
        """All files but manifests and logs."""
        return {str(path.relative_to(self.work)): path.read_bytes() for path in sorted(self.work.rglob("*"))
                if path.is_file() and not path.name.endswith((".manifest.json", ".log", ".lock", ".done")) and ".store" not in str(path)}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, encoder_dir, monot5_dir, warm):
    """Inputs of the first stage, settings, and a folder in which the parts have been made by LAUNCHER=local."""
    folder = tmp_path_factory.mktemp("kills")
    write_jsonl(folder / "passages.jsonl", [{"id": f"p{n}", "title": f"T{n % 9}", "text": make_text(random.Random(n))} for n in range(9_000)])
    (folder / "model").mkdir()
    (folder / "model/config.json").write_text("{}")
    server = SlowServer()
    settings = {
        "PASSAGES": str(folder / "passages.jsonl"), "RETRIEVER": str(encoder_dir), "RERANKER": str(monot5_dir), "NUM_SHARDS": "4", "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(REPO), "SEARCH_FLAGS": "--questions_per_pass 4", "N_DOCS_RETRIEVED": "8", "N_DOCS_SHOWN": "5", "POLICY": str(folder / "model"),
        "ENGINE_FLAGS": f"--api-base {server.url} --chunk-size 4", "SAMPLE_FLAGS": "--num-samples 2", "SELECTORS": "none dynamic", "HF_HUB_OFFLINE": "1",
        # A stage is forked; its caller, which is killed in its place, has its command line. The programs of the cluster are started as they are.
        "BASH_FUNC_python%%": f'() {{ if [[ $1 == scripts/* ]]; then command python "$@"; else {warm.python} "$@"; fi\n}}',
    }
    yield folder, settings
    server.shutdown()


def copied(reference: Path, work: Path, name: str) -> None:
    """Give `work` what the stage `name` reads."""
    reads = {"embedding": (), "retrieval": ("embeddings",), "reranking": ("output",), "sampling": ("training_data",), "inference": ("eval_data",)}
    work.mkdir()
    for what in (*reads[name], "questions.jsonl", "test.jsonl"):
        (shutil.copytree if (reference / what).is_dir() else shutil.copy)(reference / what, work / what)
    if name == "reranking":
        for path in work.glob("output/*_rerank.jsonl*"):
            (shutil.rmtree if path.is_dir() else Path.unlink)(path)


def made_here(prepared, machine, name: str) -> dict[str, bytes]:
    """Run the stages up to `name` with LAUNCHER=local in the folder `reference`, unless they have run. Returns the outputs of `name`."""
    folder, settings = prepared
    reference = folder / "reference"
    if not reference.exists():
        reference.mkdir()
        for asked, count in (("questions", 400), ("test", 80)):
            write_jsonl(reference / f"{asked}.jsonl", [{"id": f"{asked}_{n}", "dataset": "nq", "question": make_text(random.Random(n), 3, 9), "answers": ["x"]} for n in range(count)])
    outputs = {}
    for stage in SCRIPTS:
        local = Run(stage, reference, machine, settings)
        done = reference / f"{stage}.done"
        if not done.exists():
            before = local.outputs().keys()
            local.finish(local.start())
            done.write_text("\n".join(sorted(local.outputs().keys() - before)))
            if stage == "reranking":
                label = ["process_training_data.py", "--n_docs", "5", "--max_rows", "40", "--input_file", reference / "output/retrieval_data_rerank.jsonl",
                         "--sequence_file", reference / "training_data/sequence.jsonl", "--normal_file", reference / "training_data/all.jsonl"]
                subprocess.run([REPO / ".venv/bin/python", *label], cwd=REPO, check=True, capture_output=True, env={**os.environ, "PYTHONPATH": str(REPO)})
                write_jsonl(reference / "training_data/training_data_dpo.jsonl", read_jsonl(reference / "training_data/all.jsonl")[:100])
        outputs = {path: (reference / path).read_bytes() for path in done.read_text().splitlines()}
        if stage == name:
            break
    return outputs


@pytest.mark.full
@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_whatever_is_killed_in_a_stage_the_bytes_are_those_of_one_machine(prepared, machine, name):
    """Prints a line per kill."""
    folder, settings = prepared
    wanted = made_here(prepared, machine, name)
    cluster = RayCluster(4)
    try:
        for kind in KINDS:
            run = Run(name, folder / f"{name}_{kind}", machine, settings)
            copied(folder / "reference", run.work, name)
            cluster = kill(run, kind, cluster)
            made = run.outputs()
            assert wanted and {path: made.get(path) for path in wanted} == wanted, f"{name}, {kind}"
            wait_for(lambda run=run: not tagged(run.tag) and not locked_files(run.work), 10)
            shutil.rmtree(run.work)
    finally:
        cluster.close()


def kill(run: Run, kind: str, cluster: RayCluster) -> RayCluster:
    """Kill something in the middle of a run, and finish it. Returns the cluster, or a new one after the death of the head."""
    rng = random.Random(f"{run.name} {kind}")
    process = run.start(**cluster.environment)
    wait_for(lambda: len(run.begun()) > 1 or process.poll() is not None, 120)
    time.sleep(rng.random() / 2)
    assert process.poll() is None, process.communicate()[0][-3000:]
    sizes = {path.name: path.stat().st_size for path in run.begun()}
    finished = {path: path.stat().st_mtime_ns for path in run.work.rglob("*.manifest.json") if ".partial." not in path.name}
    began = time.monotonic()
    if kind in ("stage", "driver"):
        program = STAGES[run.name] if kind == "stage" else "scripts/launch.py"
        os.kill(rng.choice(wait_for(lambda: [number for number, command in tagged(run.tag).items() if program in command and command.startswith(("python", "/")) and "part.py" not in command])), signal.SIGKILL)
    else:
        cluster.do(f"kill {rng.randrange(4)}" if kind == "node" else "head")
    if kind in ("stage", "node"):
        run.finish(process)
        outcome = "it ran again; same command"
    else:
        said = process.communicate(timeout=120)[0]
        assert process.returncode not in (0, None), said[-3000:]
        wait_for(lambda: not tagged(run.tag) and not locked_files(run.work), 60)
        outcome = f"status {process.returncode}, all ended after {time.monotonic() - began:.1f} s; continued"
        if kind == "head":
            cluster.close()
            cluster = RayCluster(4)
        run.finish(run.start(**cluster.environment))
    assert {path: path.stat().st_mtime_ns for path in finished} == finished, "what was finished was made again"
    print(f"| {run.name} | {kind} | {len(sizes)} parts begun, {sum(sizes.values())} bytes | {outcome} ({time.monotonic() - began:.0f} s) |", flush=True)
    return cluster
