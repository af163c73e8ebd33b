"""evaluate.py on many rows with documents: memory grows with the scores, not with the file."""

import os
import random
import subprocess
import sys
from pathlib import Path

import orjson
import pytest
from stages import REPO

# VmHWM is the peak of this program alone; ru_maxrss would include the process from which it was forked.
PROGRAM = "import sys, evaluate; evaluate.main(sys.argv[1:]); print('peak', next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"


def write_results(path: Path, count: int) -> None:
    """Write rows with five documents of a hundred words, 3.5 KB per row."""
    rng = random.Random(1)
    words = ["".join(rng.choices("abcdefghij", k=6)) for _ in range(1000)]
    texts = [orjson.dumps(" ".join(rng.choices(words, k=100))) for _ in range(200)]
    with path.open("wb") as file:
        file.write(b"[\n" if path.suffix == ".json" else b"")
        for number in range(count):
            docs = b",".join(b'{"id":"%d-%d","title":"","text":%s,"score":1.5}' % (number, doc, rng.choice(texts)) for doc in range(5))
            file.write(
                b'{"id":"q%d","question":"?","answers":["gold"],"gold_docs":["%d-0"],"id_list":[1],"final_docs":["%d-0"],"response":"gold",'
                b'"usage":{"calls":2},"docs":[%s]}%s\n' % (number, number, number, docs, b"," if path.suffix == ".json" and number < count - 1 else b"")
            )
        file.write(b"]\n" if path.suffix == ".json" else b"")


def peak_bytes(path: Path) -> int:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, "--metric", "match", "--results_file", str(path)], env={**os.environ, "PYTHONPATH": str(REPO)},
        capture_output=True, text=True, timeout=120, check=True,
    )
    return int(done.stdout.split("peak ")[1]) * 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_memory_does_not_grow_with_the_documents_of_the_rows(suffix, tmp_path):
    """With ten times the rows there are 18,000 more scores and 63 MB more of documents, which would need twice as much memory."""
    few, many = tmp_path / f"few.{suffix}", tmp_path / f"many.{suffix}"
    write_results(few, 2000), write_results(many, 20_000)
    assert many.stat().st_size > 60 << 20
    assert peak_bytes(many) - peak_bytes(few) < 25 << 20
