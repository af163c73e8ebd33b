"""The parts of a file on the nodes of a Ray cluster. Four nodes on this machine with pretended GPUs, stand-ins and tiny models.

`FULL=1` kills nodes, drivers, stages and heads in each stage, twenty times.
"""

import os
import signal
import subprocess
import uuid
from pathlib import Path

import pytest
from conftest import names, read_jsonl, write_jsonl
from machines import table
from ray_cluster import TAG, RayCluster, locked_files, tagged, wait_for

REPO = Path(__file__).parents[2]
# A stage that copies rows. In the folder ORDERS, `crash_N` ends the first try of part N, `wrong_N` ends every try as wrong input
# does, and `hold` makes all parts wait after their first row until it is removed.
STAND_IN = """
import os, sys, time
from pathlib import Path
from dynamicrag import stage
from dynamicrag.rows.output import Output
from dynamicrag.rows.records import read_rows

def main():
    parser = stage.ArgumentParser("")
    parser.add_argument("read")
    parser.add_argument("written")
    stage.add_common_flags(parser)
    args = parser.parse_args()
    part, orders = Path(args.read).stem.removeprefix("split_"), Path(os.environ["ORDERS"])
    with open(orders / "tries", "a") as file:
        print(part, os.environ.get("CUDA_VISIBLE_DEVICES"), file=file)
    if (orders / f"wrong_{part}").exists():
        raise stage.UserError("the input is wrong")
    output = Output(vars(args), [args.written], [args.read])
    if not output.finished:
        for chunk in output.chunks(read_rows(args.read), 1):
            output.write(chunk)
            if (orders / f"crash_{part}").exists():
                (orders / f"crash_{part}").unlink()
                os._exit(1)
            while (orders / "hold").exists():
                time.sleep(0.05)
        output.finish()

stage.run(main)
"""


class Copying:
    """The stand-in on the parts of sixteen rows, by the function `sharded` of the scripts."""

    def __init__(self, folder: Path, environment: dict[str, str]):
        self.folder, self.orders, self.output = folder, folder / "orders", folder / "out.jsonl"
        self.orders.mkdir()
        (folder / "stand_in.py").write_text(STAND_IN)
        write_jsonl(folder / "in.jsonl", [{"id": f"q{n}", "question": "what?", "docs": [{"id": "d1", "title": "", "text": "x"}]} for n in range(16)])
        self.tag = uuid.uuid4().hex
        self.environment = {**environment, TAG: self.tag, "ORDERS": str(self.orders), "PYTHONPATH": f"{folder}:{REPO}"}

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
def test_parts_survive_the_death_of_a_node_and_only_what_is_missing_is_done_again(copying, cluster):
    """A node dies, one engine crashes, one part has wrong input; then the same command again."""
    for order in ("crash_1", "wrong_2", "hold"):
        (copying.orders / order).touch()
    process = copying.start(PARTS_PER_GPU="2")
    wait_for(lambda: len(copying.partial()) >= 3)
    cluster.do("kill 0")
    (copying.orders / "hold").unlink()
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 1 and not copying.output.exists(), said
    assert said.count("error:") == said.count("error: part 2 ") == 1 and names(said, f"{copying.output}.parts/2.log"), said
    tries = [part for part, _ in copying.tries()]
    assert tries.count("2") == 1 and tries.count("1") >= 2 and set(tries) == {*"012345"} and len(tries) >= 8
    assert len(copying.finished()) == 5 and not tagged(copying.tag) and not locked_files(copying.folder)
    (copying.orders / "wrong_2").unlink()
    (copying.orders / "tries").unlink()
    made = {path: path.stat().st_mtime_ns for path in copying.finished()}
    status, said = copying.run()
    assert status == 0, said
    assert {path: path.stat().st_mtime_ns for path in made} == made
    assert {gpus for _, gpus in copying.tries()} == {"0"} and len(copying.tries()) == 6
    assert [row["id"] for row in read_jsonl(copying.output)] == [f"q{n}" for n in range(16)]
