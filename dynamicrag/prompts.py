"""Every prompt of the project, once. Training rows, sampling and inference all call these functions, so that what a
model is trained on and what it is asked later are the same bytes.

A checkpoint trained on other words brings them in a YAML file with the keys of DEFAULT_PROMPTS (`--prompts FILE`).
"""

import re
import string
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from dynamicrag.records import Doc
from dynamicrag.stage import UserError

Messages = list[dict[str, str]]

DEFAULT_PROMPTS: dict[str, dict[str, str]] = {
    "reranker": {
        "system": "You choose the documents that are needed to answer a question.",
        "user": (
            "Question: {question}\n\n{documents}\n\n"
            "Which documents are needed to answer the question: {question}\n"
            "Write their identifiers, the most important first, as in [2], [1]. Write None if no document is needed."
        ),
        # The identifier stands on both sides of the text: a small model copies it more reliably from the near side.
        "document": "[{n}] {title}\n{text} [{n}]",
    },
    "pointwise": {
        "system": "You judge whether a document is needed to answer a question.",
        "user": "Question: {question}\n\n{documents}\n\nIs this document needed to answer the question? Write Yes or No.",
        "document": "{title}\n{text}",
    },
    "generator": {
        "system": "You answer questions, using the documents where they help.",
        "user": "{documents}\n\nQuestion: {question}\n{instruction}",
        "user_without_documents": "Question: {question}\n{instruction}",
        "document": "[{n}] {title}\n{text}",
    },
    "judge": {
        "system": "You grade answers strictly and fairly.",
        "user": (
            "Question: {question}\nReference answers: {answers}\nAnswer to grade: {response}\n\n"
            "Give 0 to 20 points for each of: correctness against the reference, completeness, relevance to the question, "
            "absence of unsupported claims, clarity. Reply with a JSON object with the integer keys "
            "correctness, completeness, relevance, support, clarity."
        ),
    },
}
# What chat templates mark turns with. A tokenizer reads these in a document as it reads them from the template, so that a
# document could end its turn and begin another; with a space after the first character they are nothing but text.
TURN_MARKERS = re.compile(r"<(?=\||/?s>|<?/?SYS>>)|\[(?=/?INST\])")
MOST_PROMPTS_BYTES, MOST_LEVELS = 1 << 20, 10
PLACEHOLDERS = {
    ("reranker", "user"): {"question", "documents"},
    ("reranker", "document"): {"n", "title", "text"},
    ("pointwise", "user"): {"question", "documents"},
    ("pointwise", "document"): {"n", "title", "text"},
    ("generator", "user"): {"question", "documents", "instruction"},
    ("generator", "user_without_documents"): {"question", "instruction"},
    ("generator", "document"): {"n", "title", "text"},
    ("judge", "user"): {"question", "answers", "response"},
}


def add_prompts_flag(parser: ArgumentParser) -> None:
    parser.add_argument("--prompts", metavar="FILE", help="YAML file of other prompts; keys as in dynamicrag/prompts.py")


def as_text(text: str) -> str:
    """A text in which no tokenizer finds a marker of template/*.jinja: `<|im_end|>` is `< |im_end|>`, all else unchanged."""
    return TURN_MARKERS.sub(r"\g<0> ", text)


class Prompts:
    """The prompts in use: the project's own, or those of a YAML file over them."""

    def __init__(self, path: str | None = None):
        """Raises UserError for a file that is not plain YAML, an unknown key, a placeholder the prompt does not have, or a turn marker."""
        self._texts = {name: dict(parts) for name, parts in DEFAULT_PROMPTS.items()}
        if path is not None:
            self._override(Path(path))

    def _override(self, path: Path) -> None:
        given = _read_yaml(path)
        if not isinstance(given, dict) or not all(isinstance(parts, dict) for parts in given.values()):
            raise UserError(f"{path}: expected a mapping of {', '.join(DEFAULT_PROMPTS)}, each with its texts")
        for name, parts in given.items():
            for part, text in parts.items():
                where = f"{path}: {name}.{part}"
                if part not in self._texts.get(name, {}):
                    raise UserError(f"{where}: no such prompt; there are {', '.join(_names())}")
                if not isinstance(text, str) or not text.strip():
                    # LLaMA-Factory would put a system prompt of its own in the place of an empty one.
                    raise UserError(f"{where}: expected a text that is not empty")
                if marker := TURN_MARKERS.search(text):
                    found = text[marker.start() : marker.start() + 20]
                    raise UserError(f"{where}: {found!r} begins with what a chat template marks turns with; a prompt is the text between")
                try:
                    fields = [field for field in string.Formatter().parse(text) if field[1] is not None]
                except ValueError as error:
                    raise UserError(f"{where}: {error}; a literal brace is written twice") from error
                known = PLACEHOLDERS.get((name, part), set())
                for _, field, form, conversion in fields:
                    if field not in known or form or conversion:
                        known_names = ", ".join(f"{{{placeholder}}}" for placeholder in sorted(known)) or "none"
                        raise UserError(f"{where}: unknown placeholder {{{field}}}; there are {known_names}, without format")
                self._texts[name][part] = text

    def reranker(self, question: str, docs: Sequence[Doc]) -> Messages:
        """Asks for the identifiers of the documents needed, out of all `docs`, numbered from 1.

        The form that the prompt names and that models are trained to write is `[2], [1]`, or `None`. Which other forms count
        in an answer says selection.parse_ids: lists such as `[2, 1]`, `2, 1`, `Doc 2`, `[2] > [1]`, `[1]-[3]`, and nothing in prose.
        """
        return self._messages("reranker", "user", question=question, documents=self._documents("reranker", docs))

    def pointwise(self, question: str, doc: Doc) -> Messages:
        """Asks whether one document is needed. The answer has to begin with Yes or No."""
        return self._messages("pointwise", "user", question=question, documents=self._documents("pointwise", [doc]))

    def generator(self, question: str, docs: Sequence[Doc], instruction: str) -> Messages:
        """Asks for the answer from `docs`, numbered from 1 in the order given, or from no document."""
        if not docs:
            return self._messages("generator", "user_without_documents", question=question, instruction=instruction)
        documents = self._documents("generator", docs)
        return self._messages("generator", "user", question=question, documents=documents, instruction=instruction)

    def judge(self, question: str, answers: Sequence[str], response: str) -> Messages:
        """Asks for five grades of 0 to 20 points."""
        return self._messages("judge", "user", question=question, answers="; ".join(answers), response=response)

    def _documents(self, name: str, docs: Sequence[Doc]) -> str:
        block = self._texts[name]["document"]
        return "\n\n".join(block.format(n=n, title=doc["title"], text=doc["text"]) for n, doc in enumerate(docs, start=1))

    def _messages(self, name: str, user: str, **fields: str) -> Messages:
        return [
            {"role": "system", "content": self._texts[name]["system"].format()},
            {"role": "user", "content": as_text(self._texts[name][user].format(**fields))},
        ]


def _read_yaml(path: Path) -> object:
    """A YAML file without aliases, which a few lines of can make unfold to any size, and without tags, which name types."""
    import yaml

    try:
        with path.open("rb") as file:
            text = file.read(MOST_PROMPTS_BYTES + 1).decode()
        if len(text) > MOST_PROMPTS_BYTES:
            raise ValueError("it is larger than 1 MB")
        depth = 0
        for token in yaml.scan(text):
            kind = type(token).__name__
            depth += kind.endswith("StartToken") - kind.endswith("EndToken")
            if kind in ("AliasToken", "TagToken") or depth > MOST_LEVELS:
                what = "aliases (*name) and tags (!name) have no place in it" if depth <= MOST_LEVELS else "it is nested too deep"
                raise ValueError(f"line {token.start_mark.line + 1}: {what}")
        return yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{path}: not a readable YAML file of prompts: {error}") from error


def _names() -> list[str]:
    return [f"{name}.{part}" for name, parts in DEFAULT_PROMPTS.items() for part in parts]


def training_row(messages: Messages, **targets: str) -> dict[str, str]:
    """A LLaMA-Factory row: the user turn is the instruction, the system prompt has its own column, input is empty.

    `targets` is output=... for SFT, or chosen=... and rejected=... for DPO.
    """
    system, user = messages
    answers = {name: as_text(target) for name, target in targets.items()}
    return {"instruction": user["content"], "input": "", **answers, "system": system["content"]}
