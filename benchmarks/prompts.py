"""Measure the speed of tokenizing prompts, compared with a tokenizer without a cache that handles one prompt at a time.

A prompt is tokenised when its documents are chosen and again when it is sent. The stages cache the tokens of recent
prompts and tokenise several prompts in parallel. Only the tokenizer and the chat template run. Documents are passages
of 100 words from the CIA World Factbook.

    python benchmarks/prompts.py                 after python examples/factbook/models.py --output_dir models
"""

import argparse
import os
import random
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import measure

from dynamicrag.llm.options import CallOptions
from dynamicrag.llm.requests import RequestBuilder
from dynamicrag.llm.templates import PromptTokenizer, in_threads, load_prompts
from dynamicrag.models.chat_templates import Messages
from dynamicrag.rows.row import Row
from dynamicrag.search.corpus import read_passages
from dynamicrag.stage import ArgumentParser

sys.path.insert(0, str(measure.REPOSITORY / "examples" / "factbook"))
WINDOW = 8192


class Tokenizing:
    """An engine that only tokenises."""

    def __init__(self, prompts: PromptTokenizer):
        self.prompts = prompts

    def ids(self, messages: Messages) -> list[int]:
        return self.prompts.ids(messages)

    def fits(self, messages: Messages, max_tokens: int) -> bool:
        return len(self.ids(messages)) + max_tokens <= WINDOW


class EachTimeAgain(Tokenizing):
    """The same engine without a cache."""

    def ids(self, messages: Messages) -> list[int]:
        return self.prompts.tokenizer.encode(self.prompts.render(messages), add_special_tokens=False)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    parser.add_argument("--model", default="models/smollm2-135m", help="folder of a tokenizer")
    parser.add_argument("--template", default="template/smollm2.jinja")
    parser.add_argument("--questions", type=int, default=60)
    parser.add_argument("--topn", type=int, default=40, help="documents per question")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output_file", help="JSON file to which the results are added")
    return parser.parse_args(argv)


def made_rows(questions: int, topn: int) -> list[Row]:
    import corpus

    with tempfile.TemporaryDirectory() as folder:
        corpus.main(["--output_file", f"{folder}/passages.jsonl", "--max_words", "100"])
        passages = list(read_passages(Path(folder) / "passages.jsonl"))
    rng = random.Random(0)
    return [
        {"id": f"q{number}", "question": "which country has the longest border?", "dataset": "nq",
         "docs": [{"id": doc_id, "title": title, "text": text} for doc_id, title, text in rng.sample(passages, topn)]}
        for number in range(questions)
    ]


def main() -> None:
    args = parse_args()
    rows = made_rows(args.questions, args.topn)
    prompts = load_prompts(args.model, args.template)

    def request(builder: RequestBuilder, row: Row) -> Messages:
        return builder.select(row, builder.shown(row["question"], row["docs"])).messages

    def again() -> float:
        builder = RequestBuilder(EachTimeAgain(prompts), CallOptions())
        for messages in [request(builder, row) for row in rows]:
            builder.engine.ids(messages)
        return len(rows)

    def kept() -> float:
        builder = RequestBuilder(Tokenizing(PromptTokenizer(prompts.tokenizer, prompts.chat_template)), CallOptions())
        messages = in_threads(lambda row: request(builder, row), rows)
        in_threads(builder.engine.ids, messages)
        return len(rows)

    systems = {"each time, one after the other": again, "kept, on all cores": kept}
    seconds = measure.in_turns(systems, args.rounds)
    slow = seconds["each time, one after the other"]
    tokens = sum(len(prompts.ids(request(RequestBuilder(Tokenizing(prompts), CallOptions()), row))) for row in rows) // len(rows)
    lines = [[name, f"{1 / s:.1f}", f"{slow / s:.2f}"] for name, s in seconds.items()]
    title = f"Prompts of {tokens} tokens, {len(rows)} questions, {len(os.sched_getaffinity(0))} cores"
    measure.report(title, ["", "prompts/s", "to each time"], lines, {name: 1 / s for name, s in seconds.items()}, args.output_file)


if __name__ == "__main__":
    main()
