"""The LLM of tests/freeze.py: an OpenAI-compatible server that answers by a hash and keeps its requests.

An answer depends on the made-up names in the prompt and their order, on the form of the request and on the number of the sample.
It does not depend on the words around the names. So a changed word of a prompt changes the requests, but no later file.
"""

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from freeze_inputs import NAME, NAMES, TOO_LONG, make_questions

SELECTION_TOKENS = 99  # shows that a request without a constraint asks for a selection
ASKED_TOO_LONG = f"the river {TOO_LONG} end"
CRITERIA = ("correctness", "completeness", "relevance", "support", "clarity")
UNREADABLE = ("I would read the second one.", "", "[77]", "<think>[1] may do")
OTHER_FORMS = ("[1], [2], [2]", "2, 1", "Doc 3", "[3] > [1]", "[1]-[3]", "<think>[4]?</think> [2]", "None", "[2], [90]", "[1, 3]")


def gold_of(question: dict) -> str:
    """A right answer, as a text."""
    for key in ("answers", "golden_answers", "answer", "answerKey", "output"):
        if isinstance(value := question.get(key), dict):
            return value["value"]
        if value:
            return value if isinstance(value, str) else value[0]
    return "; ".join(pair["short_answers"][0] for pair in question.get("qa_pairs", [])) or "nothing"


class Server(ThreadingHTTPServer):
    """Listens at `url` from the start. take() returns the sorted requests since the last take()."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self):
        self._asked: list[str] = []
        self._lock = threading.Lock()
        self._gold = {question["question"]: gold_of(question) for question in make_questions()}
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def take(self) -> list[str]:
        """The bodies of the requests as JSON with sorted keys, sorted."""
        with self._lock:
            asked, self._asked = sorted(self._asked), []
        return asked

    def reply(self, body: dict) -> tuple[int, dict]:
        """Status and reply to the body of a request."""
        with self._lock:
            self._asked.append(json.dumps(body, sort_keys=True, ensure_ascii=False))
        text = body["messages"][-1]["content"]
        if ASKED_TOO_LONG in text:
            return 400, {"error": {"message": "maximum context length is 10 tokens", "type": "invalid_request_error", "code": "context_length_exceeded"}}
        names = NAME.findall(text)
        pattern = (body.get("structured_outputs") or {}).get("regex", "")
        form = "grades" if "response_format" in body else "verdict" if "Yes" in pattern else "selection" if pattern else "free"
        form = "other selection" if form == "free" and body["max_tokens"] == SELECTION_TOKENS else form
        choices, generated = [], 0
        for sample in range(body.get("n", 1)):
            draw = _draw(form, sample, *names)
            content, finish = self._text(form, draw, pattern, text)
            generated += 1 + len(NAME.findall(content))
            choices.append({"index": sample, "message": {"role": "assistant", "content": content}, "finish_reason": finish})
        usage = {"prompt_tokens": 10 + len(names), "completion_tokens": generated, "total_tokens": 10 + len(names) + generated}
        return 200, {"id": "1", "object": "chat.completion", "created": 1, "model": body["model"], "choices": choices, "usage": usage}

    def _text(self, form: str, draw: int, pattern: str, text: str) -> tuple[str, str]:
        """A text and how it ended."""
        if form == "grades":
            return json.dumps({name: draw // 21**place % 21 for place, name in enumerate(CRITERIA)}), "stop"
        if form == "verdict":
            return ("Yes" if draw % 3 == 0 else "No"), "stop"
        if form == "selection":
            shown = max(map(int, re.findall(r"\d+(?=[|)])", pattern)), default=0)
            chosen = [1 + draw // 50**place % shown for place in range(1, 1 + min(draw % 5, shown))]  # no more than the pattern allows
            return ", ".join(f"[{number}]" for number in chosen) or "None", "stop"
        if form == "other selection":
            return (UNREADABLE[draw // 4 % len(UNREADABLE)], "length") if draw % 4 == 0 else (OTHER_FORMS[draw // 4 % len(OTHER_FORMS)], "stop")
        gold = next((gold for question, gold in self._gold.items() if question in text), "nothing")
        other = NAMES[draw // 12 % len(NAMES)]
        said = (gold, gold, f"It is {gold}.", f"{gold} and {other}", other, other, f"<think>{other}?</think> {gold}", f"The answer: {other}", "I do not know.", "SUPPORTS", "A")
        return (said[draw % 12], "stop") if draw % 12 < len(said) else (f"<think>{other}", "length")


def _draw(*parts: object) -> int:
    """A large number that depends on the parts."""
    return int.from_bytes(hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()[:8], "big")


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        status, reply = self.server.reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        data = json.dumps(reply).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass
