"""The engine's edges: which checkpoint a name means, templates, and OpenAI-compatible servers. vLLM itself: test_chain.py."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from dynamicrag.engine import ApiEngine, Request, read_template, resolve_model
from dynamicrag.stage import UserError


def checkpoint(folder):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")


def test_a_training_folder_stands_for_its_newest_stage(tmp_path):
    model = tmp_path / "DynamicRAG_tiny"
    checkpoint(model / "sft")
    assert resolve_model(str(model)) == str(model / "sft")
    (model / "dpo").mkdir()  # DPO has begun
    assert resolve_model(str(model)) == str(model / "sft")
    (model / "dpo/config.json").write_text("{}")
    assert resolve_model(str(model)) == str(model / "dpo")
    assert resolve_model(str(model / "sft")) == str(model / "sft")


@pytest.mark.parametrize("name", ["DynamicRAG_never_trained", "/no/such/folder", "./none"])
def test_a_model_that_is_not_there_is_named_with_what_makes_it(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="llamafactory-cli train"):
        resolve_model(name)


def test_anything_else_is_a_hub_name():
    assert resolve_model("meta-llama/Meta-Llama-3-8B") == "meta-llama/Meta-Llama-3-8B"


def test_a_broken_template_is_named_with_its_line(tmp_path):
    path = tmp_path / "broken.jinja"
    path.write_text("{{ bos_token }}\n{% for %}")
    with pytest.raises(UserError, match=r"broken.jinja:2: not a Jinja template"):
        read_template(str(path))
    with pytest.raises(UserError, match="cannot be read"):
        read_template(str(tmp_path / "absent.jinja"))


@pytest.fixture
def server():
    """Answers every prompt with its seed, once for each sample asked for, or one only where it is told to ignore n."""
    received = []

    class Handler(BaseHTTPRequestHandler):
        ignore_n = False

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            received.append(body)
            n = 1 if Handler.ignore_n else body["n"]
            choices = [
                {"index": i, "finish_reason": "stop", "message": {"role": "assistant", "content": f" {body['seed']} "}}
                for i in range(n)
            ]
            reply = {
                "id": "x", "object": "chat.completion", "created": 0, "model": body["model"], "choices": choices,
                "usage": {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10},
            }
            data = json.dumps(reply).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{listening.server_port}/v1", received, Handler
    listening.shutdown()


def ask(seed: int, **more) -> Request:
    return Request([{"role": "user", "content": "hello"}], seed=seed, max_tokens=5, **more)


def test_a_server_gets_every_setting_and_answers_come_back_in_order(server):
    url, received, _ = server
    completions = ApiEngine(url, "some-model").complete([ask(seed, n=2, pattern="None") for seed in range(20)])
    assert [completion.texts for completion in completions] == [[str(seed)] * 2 for seed in range(20)]
    assert completions[0].prompt_tokens == 7 and completions[0].generated_tokens == 3
    assert {body["model"] for body in received} == {"some-model"}
    assert received[0]["max_tokens"] == 5 and received[0]["structured_outputs"] == {"regex": "None"}


def test_a_server_that_ignores_n_ends_the_run(server):
    url, _, handler = server
    handler.ignore_n = True
    with pytest.raises(UserError, match="does not support n"):
        ApiEngine(url, "some-model").complete([ask(1, n=8)])


def test_a_server_that_is_not_there_ends_the_run_with_its_address(monkeypatch):
    monkeypatch.setattr("dynamicrag.engine.API_RETRIES", 0)
    with pytest.raises(UserError, match=r"127\.0\.0\.1:9"):
        ApiEngine("http://127.0.0.1:9/v1", "some-model").complete([ask(1)])
