"""serve.py as a process: the real engine gives the replies of inference.py, and the real clients of docs/serving.md get their objects.

FULL=1, because the engine starts twice, and the clients are installed in an environment of their own. CLIENTS_PYTHON names the Python of such an
environment, if there is one already.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import venv
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import read_jsonl, write_jsonl
from pages import page
from served import Client, served, until
from stages import REPO
from stubs import StubEngine, make_text, make_tiny_llama

pytestmark = [pytest.mark.slow, pytest.mark.full]

CLIENTS = ("litellm", "cohere", "langchain-cohere", "cohere-haystack", "openai")
EXAMPLES = {block.split("\n", 1)[0]: block for block in re.findall(r"```python\n(.*?)```", page("docs/serving.md"), re.DOTALL)}


def rows(count: int) -> list[dict]:
    import random

    rng = random.Random(1)
    return [
        {"id": f"q{number}", "question": f"{make_text(rng, 4, 9)} {number}?", "dataset": "nq",
         "docs": [{"id": f"d{n}", "title": f"Title {n}", "text": make_text(rng)} for n in range(number % 7 + 1)]}
        for number in range(count)
    ]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("served") / "model"
    make_tiny_llama(folder)
    return folder


def test_the_engine_replies_as_inference_to_many_clients_and_ends_after_its_work(model, tmp_path):
    """Three questions have more documents than a window."""
    asked = rows(60)
    write_jsonl(tmp_path / "q.jsonl", asked)
    flags = ["--llm-model", str(model), "--template", "template/llama3.jinja", "--max-model-len", "2048", "--dtype", "float32", "--answer-max-tokens", "12"]
    environment = {**os.environ, "PYTHONPATH": str(REPO), "SERVE_API_KEY": "sk-canary-1", "TQDM_DISABLE": "1"}
    for script, more in (("inference", []), ("top_inference", ["--max-context-window", "3"])):
        command = [sys.executable, f"{script}.py", *flags, *more, "--input-json", str(tmp_path / "q.jsonl"), "--output-json", str(tmp_path / f"{script}.jsonl")]
        subprocess.run(command, cwd=REPO, env=environment, check=True, capture_output=True)
    made = {script: {row["id"]: row for path in tmp_path.glob(f"{script}*.jsonl") for row in read_jsonl(path)} for script in ("inference", "top_inference")}
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen([sys.executable, "serve.py", *flags, "--port", "0", "--window", "3"], cwd=REPO, env=environment, stderr=log, start_new_session=True)
    try:
        until(lambda: re.search(r" at http://\S+", (tmp_path / "log").read_text()) or server.poll() is not None, 300)
        client = Client(re.search(r" at (http://\S+)", (tmp_path / "log").read_text())[1], None, None)

        def ask(row: dict) -> dict:
            body = {"id": row["id"], "question": row["question"], "dataset": "nq", "documents": row["docs"]}
            status, reply, _ = client.send("/v1/answer", body, Authorization="Bearer sk-canary-1")
            return {"final_docs": [doc["id"] for doc in reply["chosen"]], "response": reply["answer"]} if status == 200 else {"status": status}

        with ThreadPoolExecutor(16) as pool:
            replies = dict(zip((row["id"] for row in asked), pool.map(ask, asked), strict=True))
        for row in asked:
            expected = made["inference" if len(row["docs"]) <= 3 else "top_inference"][row["id"]]
            wanted = {"status": 502} if "error" in expected else {key: expected[key] for key in ("final_docs", "response")}
            assert replies[row["id"]] == wanted
        assert sum("response" in reply for reply in replies.values()) > 30
        with ThreadPoolExecutor(4) as pool:
            last = [pool.submit(ask, row) for row in asked[:4]]
            until(lambda: "at_work 0.0" not in client.send("/metrics", Authorization="Bearer sk-canary-1")[1] or all(one.done() for one in last))
            os.killpg(server.pid, signal.SIGINT)  # Ctrl-C, which reaches the engine's process too
            assert [one.result() for one in last] == [replies[row["id"]] for row in asked[:4]]
        assert server.wait(60) == 0
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
    log = (tmp_path / "log").read_text()
    assert "sk-canary-1" not in log and "Traceback" not in log


@pytest.fixture(scope="module")
def clients_python(tmp_path_factory) -> str:
    """The Python of an environment with the clients."""
    if given := os.environ.get("CLIENTS_PYTHON"):
        return given
    folder = tmp_path_factory.mktemp("clients")
    venv.create(folder, with_pip=True)
    subprocess.run([folder / "bin/pip", "install", "--quiet", *CLIENTS], check=True, capture_output=True)
    return str(folder / "bin/python")


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize("keys", [(), (b"sk-canary-1",)])
def test_an_example_of_the_page_gets_its_objects(name, keys, clients_python):
    """The model chooses the last document and the first; the documents of the examples are three."""
    engine = StubEngine(lambda request, kind, titles: f"[{len(titles)}], [1]" if kind == "select" else "the Nile")
    with served(engine, keys=keys) as client:
        program = EXAMPLES[name].replace("http://127.0.0.1:8000", client.url)
        if keys:
            program = program.replace('"none"', '"sk-canary-1"')
        environment = {**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True", "HAYSTACK_TELEMETRY_ENABLED": "False", "PYTHONPATH": ""}
        done = subprocess.run([clients_python, "-W", "ignore", "-c", program], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        if "openai" in name:
            assert done.stdout == "2 The Nile is a river in Africa.\n0 Carmen is an opera by Bizet.\nthe Nile"
        else:
            assert done.stdout == "2 1.0\n0 0.75\n"
        wrong = subprocess.run([clients_python, "-W", "ignore", "-c", program.replace("sk-canary-1", "wrong")], capture_output=True, text=True, env=environment) if keys else None
        assert wrong is None or (wrong.returncode == 1 and json.dumps("sk-canary-1") not in wrong.stderr)
