"""Answers of the frozen generator to sets of documents, each generated once.

The documents of a set are shown in the order of the question's list, so that equal sets have the same prompt and the same
answer. A difference between two systems is therefore a difference of their choices. The store is a JSONL file: its first
line names the generator, every other line is one answer. It is appended after each batch, so that an interruption loses
at most one batch.
"""

import gc
import os
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import orjson

from dynamicrag.files.jsonio import dump_line
from dynamicrag.llm.options import CallOptions, EngineOptions
from dynamicrag.llm.requests import RequestBuilder, load_builders
from dynamicrag.rows.manifest import fingerprint
from dynamicrag.rows.row import Row
from dynamicrag.stage import UserError, log

BATCH = 512  # answers between two writes
Set = tuple[int, ...]  # 1-based positions in the question's list, ascending
Key = tuple[str, tuple[str, ...]]  # question id, ids of the documents in the order of the list


class Answer(NamedTuple):
    """An answer and its cost in tokens. The response is empty if the generator gave none."""

    response: str
    prompt_tokens: int
    generated_tokens: int


def add_store_flags(parser: ArgumentParser) -> None:
    """Add the flags of a script that asks the store."""
    group = parser.add_argument_group("answers")
    group.add_argument("--store", required=True, help="file of the answers; missing ones are generated and appended")
    group.add_argument("--generator", required=True, help="checkpoint of the generator")
    group.add_argument("--template", default="auto", help="its chat template")
    group.add_argument("--prompts", help="YAML file of its prompts")
    group.add_argument("--max_model_len", type=int, default=2048, help="its window in tokens")


def open_store(args: Namespace) -> "AnswerStore":
    return AnswerStore(args.store, args.generator, args.template, args.prompts, args.max_model_len)


class AnswerStore:
    """The answers of one generator with one wording of the prompt. The model is loaded when an answer is missing."""

    def __init__(self, path: str, generator: str, template: str = "auto", prompts: str | None = None, max_model_len: int = 2048):
        """Raises UserError if the file holds answers of another generator."""
        self.path = Path(path)
        self._engine = EngineOptions(llm_model=generator, template=template, max_model_len=max_model_len)
        self._calls = CallOptions(prompts=prompts)
        self._builder: RequestBuilder | None = None
        files = [file for file in (generator, template, prompts) if file and Path(file).exists()]
        self._generator = " ".join(fingerprint(file)[:16] for file in files)
        self._answers = self._read()

    def _read(self) -> dict[Key, Answer]:
        """Read the answers. The last line may be incomplete; it is removed."""
        if not self.path.is_file():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_bytes(dump_line({"generator": self._generator}))
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            os.truncate(self.path, len(whole))
        first, *lines = map(orjson.loads, whole.splitlines())
        if first.get("generator") != self._generator:
            raise UserError(f"{self.path}: holds answers of another generator or other prompts; move it away")
        return {(line["id"], tuple(line["docs"])): Answer(line["response"], line["prompt_tokens"], line["generated_tokens"]) for line in lines}

    def answers(self, wanted: Iterable[tuple[Row, Set]]) -> list[Answer]:
        """Return the answers to the rows' questions from sets of their documents. Missing ones are generated."""
        wanted = [(row, tuple(sorted(positions))) for row, positions in wanted]
        keys = [_key(row, positions) for row, positions in wanted]
        missing = {key: pair for key, pair in zip(keys, wanted, strict=True) if key not in self._answers}
        if missing:
            self._generate(missing)
        return [self._answers[key] for key in keys]

    def close(self) -> None:
        """Free the model's memory. The answers stay."""
        self._builder = None
        gc.collect()

    def _generate(self, missing: dict[Key, tuple[Row, Set]]) -> None:
        from tqdm import tqdm

        # The sets of a question follow each other in lexical order, so that vLLM computes a common beginning once.
        places = {row_id: number for number, row_id in enumerate(dict.fromkeys(row_id for row_id, _ in missing))}
        keys = sorted(missing, key=lambda key: (places[key[0]], missing[key][1]))
        builder = self._builder = self._builder or load_builders(self._engine, self._calls, both=False)[1]
        tokens = 0
        with tqdm(total=len(keys), unit="answer", desc=self.path.stem) as progress, self.path.open("ab") as file:
            for start in range(0, len(keys), BATCH):
                batch = keys[start : start + BATCH]
                rows = [missing[key] for key in batch]
                completions = builder.ask([builder.answer(row, [row["docs"][position - 1] for position in positions]) for row, positions in rows])
                for key, completion in zip(batch, completions, strict=True):
                    text = "" if completion.reason("answer") else completion.texts[0]
                    answer = Answer(text, completion.prompt_tokens or 0, completion.generated_tokens or 0)
                    self._answers[key] = answer
                    tokens += answer.prompt_tokens + answer.generated_tokens
                    file.write(dump_line({"id": key[0], "docs": key[1], **answer._asdict()}))
                file.flush()
                os.fsync(file.fileno())
                progress.update(len(batch))
        log.info("%s: generated %d answers, %d tokens read and written", self.path, len(keys), tokens)


def _key(row: Row, positions: Sequence[int]) -> Key:
    return row["id"], tuple(row["docs"][position - 1]["id"] for position in positions)
