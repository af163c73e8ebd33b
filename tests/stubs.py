"""Stand-ins for models, engines and servers, which several test modules use.

The models are tiny and have random weights. They run through the same code as real models; only their results are noise.
"""

import json
import random
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from dynamicrag.llm.completion import Completion

# ---------------------------------------------------------------- texts

WORDS = (
    "river mountain country population export import capital border area climate oil gas farming religion language "
    "president court election which of the longest has true false Query Document Relevant Title : ?"
).split()
LETTERS = "abcdefghijklmnopqrstuvwxyzéü0123456789"


def make_text(rng: random.Random, least: int = 3, most: int = 40) -> str:
    return " ".join(rng.choices(WORDS[:18], k=rng.randint(least, most)))


def documents(count: int, prefix: str = "d", **more) -> list[dict]:
    return [
        {"id": f"{prefix}{n}", "title": f"{prefix}{n}", "text": f"text {n}", "score": 1.0 - n / 1000, **more}
        for n in range(1, count + 1)
    ]


def question(number: int = 1, docs: int | list[dict] = 5, **more) -> dict:
    docs = documents(docs) if isinstance(docs, int) else docs
    return {"id": f"q{number}", "question": f"what is {number}?", "answers": ["a"], "docs": docs, **more}


# ---------------------------------------------------------------- models

LLAMA3_TOKENS = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
CHATML_TOKENS = ("<|endoftext|>", "<|pad|>", "<|im_start|>", "<|unused|>", "<|im_end|>")


def make_tiny_llama(folder: Path, special: tuple[str, ...] = LLAMA3_TOKENS) -> None:
    """A Llama of width 128 with random weights, and a byte-level tokenizer with its template's special tokens."""
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    raw = ByteLevelBPETokenizer()
    rng = random.Random(0)
    texts = [f"[{n}] Title {n}\n{make_text(rng)} [{n}], " for n in range(300)]
    raw.train_from_iterator(texts, vocab_size=700, special_tokens=list(special), show_progress=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw._tokenizer, bos_token=special[0], eos_token=special[4], pad_token=special[1]
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=8192, bos_token_id=0, eos_token_id=4, pad_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _bert_tokenizer():
    from transformers import BertTokenizer

    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(str.lower, WORDS), *LETTERS, *(f"##{c}" for c in LETTERS)]
    vocab = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    return BertTokenizer(vocab=vocab, do_lower_case=True)


def _bert_config(vocab_size: int, **changes):
    from transformers import BertConfig

    return BertConfig(
        vocab_size=vocab_size, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=128, initializer_range=0.5, **changes,
    )


def make_tiny_encoder(folder: Path, seed: int = 1) -> None:
    """A BERT of width 32."""
    import torch
    from transformers import BertModel

    tokenizer = _bert_tokenizer()
    torch.manual_seed(seed)
    BertModel(_bert_config(len(tokenizer))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_tiny_cross_encoder(folder: Path, labels: int) -> None:
    """A BERT classifier of width 32 with one label or with two."""
    import torch
    from transformers import BertForSequenceClassification

    tokenizer = _bert_tokenizer()
    torch.manual_seed(2)
    BertForSequenceClassification(_bert_config(len(tokenizer), num_labels=labels)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_tiny_monot5(folder: Path) -> None:
    """A T5 of width 32, with a unigram vocabulary trained on WORDS."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import T5Config, T5ForConditionalGeneration, T5Tokenizer

    raw = Tokenizer(models.Unigram())
    raw.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", initial_alphabet=list(LETTERS)
    )
    raw.train_from_iterator([" ".join(WORDS)] * 50, trainer)
    vocab = dict(json.loads(raw.to_str())["model"]["vocab"])
    vocab = list({**vocab, "▁true": -2.0, "▁false": -2.0}.items())  # single tokens, as in every T5
    tokenizer = T5Tokenizer(vocab=vocab, extra_ids=0)
    torch.manual_seed(3)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, decoder_start_token_id=0,
        initializer_factor=3.0,
    )
    T5ForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# ---------------------------------------------------------------- an engine

SHOWN = re.compile(r"^\[(\d+)\] (.*)$", re.MULTILINE)


class StubEngine:
    """An LLM that answers every request with `reply(request, kind, titles)`. `kind` is the prompt with which the request was built.

    A prompt of more than `window` documents does not fit.
    """

    def __init__(self, reply=None, window: int = 10**6):
        self.reply = reply or (lambda request, kind, titles: "None")
        self.window = window
        self.batches: list[list] = []

    @staticmethod
    def kind(request) -> str:
        system = request.messages[0]["content"]
        return "select" if "choose" in system else "judge" if "judge" in system else "answer"

    @staticmethod
    def titles(messages) -> list[str]:
        return [title for _, title in SHOWN.findall(messages[-1]["content"])]

    def fits(self, messages, max_tokens: int) -> bool:
        return len(self.titles(messages)) <= self.window

    def complete(self, requests):
        self.batches.append(requests)
        assert len(self.batches) < 100, "it goes on for ever"
        completions = []
        for request in requests:
            kind, titles = self.kind(request), self.titles(request.messages)
            texts = self.reply(request, kind, titles)
            texts = [texts] * request.n if isinstance(texts, str) else texts
            completions.append(Completion(texts, prompt_tokens=100 + len(titles), generated_tokens=len(texts)))
        return completions


class ShortWindow(StubEngine):
    """A window of 200,000 characters."""

    def fits(self, messages, max_tokens: int) -> bool:
        return sum(len(message["content"]) for message in messages) < 200_000


def select_and_answer(request, kind: str, titles: list[str]) -> str:
    """A reply of StubEngine that selects the second document and the first one."""
    return {"select": "[2], [1]" if len(titles) > 1 else "[1]" if titles else "None", "judge": "Yes"}.get(kind, "an answer")


# ---------------------------------------------------------------- a server


class StubServer(ThreadingHTTPServer):
    """A server on this machine that answers each POST with `answer(request, body)`: status, content and, if any, headers.

    The request has `path` and `headers`, the body is read from JSON. Content is bytes or becomes JSON. If the answer is None, the
    connection is closed without a reply. A `handler` replaces `answer`. The server listens from the start until `close()`.
    """

    daemon_threads = True
    request_queue_size = 512

    def __init__(self, answer: Callable[[BaseHTTPRequestHandler, dict], tuple | None] | None = None, handler: type[BaseHTTPRequestHandler] | None = None):
        self.answer, self.lock = answer, threading.Lock()
        super().__init__(("127.0.0.1", 0), handler or _StubHandler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def handle_error(self, request, client_address) -> None:
        pass  # a client that was killed

    def close(self) -> None:
        self.shutdown()
        self.server_close()


class _StubHandler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        answer = self.server.answer(self, json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        if answer is None:
            self.connection.close()
            return
        status, content, *headers = answer
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers[0] if headers else {}), "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_) -> None:
        pass


def chat_completion(*texts: object, model: str = "m", finish: str = "stop", message: dict | None = None, **other) -> dict:
    """The reply of a chat endpoint, with a choice per text. `message` and `other` are further keys of each message and of the reply."""
    choices = [
        {"index": index, "finish_reason": finish, "message": {"role": "assistant", "content": text, **(message or {})}} for index, text in enumerate(texts)
    ]
    return {"id": "x", "object": "chat.completion", "created": 0, "model": model, "choices": choices, **other}
