r"""The prompts of the project, from its own texts (prompt_texts.py) or those of a file.

Training rows, sampling and inference all use these functions, so that a model is trained and queried with identical
text.

A checkpoint that was trained with other prompts comes with a YAML file that has the keys of DEFAULT_PROMPTS (`--prompts
FILE`). Besides texts, the file can set the separator between documents; the numbers in the answering prompt (`numbers:
original` for the positions among all retrieved documents); no system prompt (`system: null`); the beginning of the
model's answer (`prefix`) and the texts that end it (`stop`); instructions per data set; and another notation of
selections (`identifier`, `identifier_separator`, `none`):

    reranker: {user: "...", document: "D{n} {text}", identifier: "D{n}", identifier_separator: " > ", stop: "\n"}
    generator: {system: null, separator: "\n", numbers: original, prefix: "Answer:", stop: ["\n\n", "Question:"]}
    instructions: {nq: Answer in one word.}

A file for a checkpoint whose words may not be shared with it has `{from: PLACE}` for each such text. It is refused, by
the name of every such text, until they are filled in.

A prefix is not part of the parsed output. `prefix` and `system: null` are for inference with a checkpoint that was
trained that way; LLaMA-Factory's rows cannot express them.
"""

import re
import string
from argparse import _ActionsContainer
from collections.abc import Mapping, Sequence
from pathlib import Path

from dynamicrag.llm.prompt_texts import DEFAULT_PROMPTS, NUMBERS, PLACEHOLDERS, REQUIRED
from dynamicrag.models.chat_templates import Messages
from dynamicrag.rows.identifiers import DEFAULT_NOTATION, Notation
from dynamicrag.rows.row import Doc
from dynamicrag.rows.tasks import dataset_named, task_of_row
from dynamicrag.stage import UserError

# Markers of turns in chat templates. A tokenizer treats them in a document like those of the template, so that a
# document could end its turn and begin another. With a space after the first character they are plain text.
TURN_MARKERS = re.compile(r"<(?=\||\uff5c|/?s>|<?/?SYS>>|(?:start|end)_of_turn>)|\[(?=/?(?:INST|SYSTEM_PROMPT)\])")
MAX_PROMPTS_BYTES, MAX_LEVELS = 1 << 20, 10


def add_prompts_flag(group: _ActionsContainer) -> None:
    """Add --prompts to a parser or one of its groups."""
    group.add_argument("--prompts", metavar="FILE",
                       help="YAML file with other prompts; its keys are in dynamicrag/llm/prompt_texts.py")


def as_text(text: str) -> str:
    """Make the turn markers of template/*.jinja plain text: `<|im_end|>` becomes `< |im_end|>`.

    Other text is unchanged.
    """
    return TURN_MARKERS.sub(r"\g<0> ", text)


class Prompts:
    """The prompts in use: the defaults, overridden by those of a YAML file."""

    def __init__(self, path: str | None = None):
        """Raises UserError for a file that is not plain YAML, an unknown key, a wrong placeholder or a turn marker."""
        self._texts = {name: dict(parts) for name, parts in DEFAULT_PROMPTS.items()}
        self._instructions: dict[str, str] = {}
        self._notation = DEFAULT_NOTATION
        if path is not None:
            self._override(Path(path))

    def _override(self, path: Path) -> None:
        given = read_yaml(path, "prompts")
        if not isinstance(given, dict) or not all(isinstance(parts, dict) for parts in given.values()):
            raise UserError(f"{path}: expected a mapping with keys from {', '.join(DEFAULT_PROMPTS)}, each with its "
                            "texts")
        _refuse_unfilled(path, given)
        for dataset, text in given.pop("instructions", {}).items():
            self._instructions[dataset_named(str(dataset)) or str(dataset)] = self._checked(f"{path}: instructions.{dataset}", text, set(), set()).format()
        for name, parts in given.items():
            for part, text in parts.items():
                where = f"{path}: {name}.{part}"
                if part not in self._texts.get(name, {}):
                    raise UserError(f"{where}: unknown prompt; the prompts are {', '.join(_names())}")
                if part in ("system", "prefix") and text is None:
                    self._texts[name][part] = None
                    continue
                if part == "stop":
                    self._texts[name][part] = _stop_strings(where, text)
                    continue
                if part == "numbers" and text not in NUMBERS:
                    raise UserError(f"{where}: expected {' or '.join(NUMBERS)}, found {text!r}")
                known, required = PLACEHOLDERS.get((name, part), set()), REQUIRED.get((name, part), set())
                self._texts[name][part] = self._checked(where, text, known, required, blank=part.endswith("separator"))
        self._notation = self._notation_of(path, given.get("reranker", {}))

    def _notation_of(self, path: Path, given: Mapping[str, object]) -> Notation:
        """Return the notation of selections.

        Raises UserError if it cannot be parsed or the prompt describes another one.
        """
        texts = self._texts["reranker"]
        try:
            notation = Notation(texts["identifier"], texts["identifier_separator"].format(), texts["none"].format())
        except ValueError as error:
            raise UserError(f"{path}: reranker.identifier: {error}; give another identifier, identifier_separator or none") from error
        if notation != DEFAULT_NOTATION and "user" not in given:
            raise UserError(f"{path}: reranker.user: its notation differs from reranker.identifier; give a text "
                            f"that asks for {notation.write([2, 1])!r} or {notation.none!r}")
        if notation.identifier != DEFAULT_NOTATION.identifier and "document" not in given:
            raise UserError(f"{path}: reranker.document: its identifiers differ from reranker.identifier; give a text in which "
                            f"the first document is {notation.write([1])!r}")
        return notation

    @staticmethod
    def _checked(where: str, text: object, known: set[str], required: set[str], blank: bool = False) -> str:
        """Check a text: only `known` placeholders, all `required` ones, not empty.

        `blank` allows a text of spaces only.
        """
        if not isinstance(text, str) or not (text if blank else text.strip()):
            # LLaMA-Factory would replace an empty system prompt by its own.
            raise UserError(f"{where}: expected a non-empty text")
        if marker := TURN_MARKERS.search(text):
            excerpt = text[marker.start() : marker.start() + 20]
            raise UserError(f"{where}: {excerpt!r} contains a turn marker of a chat template; give only the text "
                            "between the markers")
        try:
            fields = [field for field in string.Formatter().parse(text) if field[1] is not None]
        except ValueError as error:
            raise UserError(f"{where}: {error}; write a literal brace twice") from error
        for _, field, form, conversion in fields:
            if field not in known or form or conversion:
                known_names = ", ".join(f"{{{placeholder}}}" for placeholder in sorted(known)) or "none"
                raise UserError(f"{where}: unknown placeholder {{{field}}}; use {known_names}, without a format")
        if missing := sorted(required - {field for _, field, _, _ in fields}):
            raise UserError(f"{where}: lacks the placeholder {{{missing[0]}}}; add it")
        return text

    @property
    def notation(self) -> Notation:
        """The notation of selections."""
        return self._notation

    def for_file(self) -> dict[str, dict]:
        """Return the content of a prompts file that gives these prompts, with every text that a model is asked with (the
        judge is another model).
        """
        asked = {name: {part: list(text) if isinstance(text, tuple) else text for part, text in parts.items()} for name, parts in self._texts.items() if name != "judge"}
        instructions = {dataset: text.replace("{", "{{").replace("}", "}}") for dataset, text in self._instructions.items()}
        return {**asked, **({"instructions": instructions} if instructions else {})}

    def stop(self, name: str) -> tuple[str, ...]:
        """Return the texts that end an answer to the prompt `name`. They are not part of the answer."""
        return self._texts[name]["stop"]

    def instruction(self, row: Mapping) -> str:
        """Return the instruction about the form of a row's answer: from the file, or else from the row's task."""
        return self._instructions.get(row.get("dataset") or "") or task_of_row(row).instruction

    def reranker(self, question: str, docs: Sequence[Doc]) -> Messages:
        """Return the prompt that asks for the identifiers of the needed documents among `docs`, numbered from 1.

        The prompt describes the form of `notation`, such as `[2], [1]` or `None`, which models are trained to write.
        identifiers.parse_ids documents the other forms that are accepted in an answer.
        """
        return self._messages("reranker", "user", question=question, documents=self._documents("reranker", docs))

    def pointwise(self, question: str, doc: Doc) -> Messages:
        """Return the prompt that asks whether one document is needed. The answer must begin with Yes or No."""
        return self._messages("pointwise", "user", question=question, documents=self._documents("pointwise", [doc]))

    def generator(self, question: str, docs: Sequence[Doc], instruction: str, numbers: Sequence[int] | None = None) -> Messages:
        """Return the prompt that asks for the answer, with or without documents.

        `docs` are numbered from 1 in the given order. If the prompts file sets `numbers: original`, they are numbered
        by `numbers`, their 1-based positions among the documents they were chosen from.
        """
        if not docs:
            return self._messages("generator", "user_without_documents", question=question, instruction=instruction)
        documents = self._documents("generator", docs, numbers if self._texts["generator"]["numbers"] == "original" else None)
        return self._messages("generator", "user", question=question, documents=documents, instruction=instruction)

    def judge(self, question: str, answers: Sequence[str], response: str) -> Messages:
        """Return the prompt that asks for five grades, which add up to 0 to 100 points."""
        return self._messages("judge", "user", question=question, answers="; ".join(answers), response=response)

    def _documents(self, name: str, docs: Sequence[Doc], numbers: Sequence[int] | None = None) -> str:
        parts = self._texts[name]
        numbered = zip(numbers or range(1, len(docs) + 1), docs, strict=True)
        return parts.get("separator", "\n\n").format().join(parts["document"].format(n=n, title=doc["title"], text=doc["text"]) for n, doc in numbered)

    def _messages(self, name: str, user: str, **fields: str) -> Messages:
        system, prefix = self._texts[name]["system"], self._texts[name].get("prefix")
        return [
            *([{"role": "system", "content": system.format()}] if system else []),
            {"role": "user", "content": as_text(self._texts[name][user].format(**fields))},
            *([{"role": "assistant", "content": prefix.format()}] if prefix else []),
        ]


def prefix_of(messages: Messages) -> str:
    """Return the given beginning of the model's answer; "" if there is none."""
    return messages[-1]["content"] if messages[-1]["role"] == "assistant" else ""


def _refuse_unfilled(path: Path, given: Mapping[str, Mapping[str, object]]) -> None:
    """Raise UserError, naming all, if a file has texts that are to be filled in: `{from: PLACE}`."""
    places = {
        f"{name}.{part}": text["from"] for name, parts in given.items() for part, text in parts.items() if isinstance(text, dict) and set(text) == {"from"}
    }
    if places:
        listed = "; ".join(f"{name} from {place}" for name, place in places.items())
        raise UserError(f"{path}: {next(iter(places))}: {len(places)} texts are not filled in; fill them in, in a copy of the file: {listed}")


def _stop_strings(where: str, given: object) -> tuple[str, ...]:
    listed = given if isinstance(given, list) else [] if given is None else [given]
    texts = tuple(text for text in listed if isinstance(text, str) and text)
    if len(texts) < len(listed):
        raise UserError(f"{where}: expected a non-empty text or a list of such texts")
    return texts


def read_yaml(path: Path, of: str) -> object:
    """Read a YAML file of `of`. Aliases (which can expand to any size) and tags (which name types) are refused.

    Raises UserError.
    """
    import yaml

    try:
        with path.open("rb") as file:
            text = file.read(MAX_PROMPTS_BYTES + 1).decode()
        if len(text) > MAX_PROMPTS_BYTES:
            raise ValueError("it is larger than 1 MB")
        depth = 0
        for token in yaml.scan(text):
            kind = type(token).__name__
            depth += kind.endswith("StartToken") - kind.endswith("EndToken")
            if kind in ("AliasToken", "TagToken") or depth > MAX_LEVELS:
                what = "aliases (*name) and tags (!name) are not allowed" if depth <= MAX_LEVELS else "nested too deep"
                raise ValueError(f"line {token.start_mark.line + 1}: {what}")
        return yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{path}: not a readable YAML file of {of}: {error}") from error


def _names() -> list[str]:
    return [*(f"{name}.{part}" for name, parts in DEFAULT_PROMPTS.items() for part in parts), "instructions.DATASET"]


def training_row(messages: Messages, **targets: str) -> dict[str, str]:
    """Return a LLaMA-Factory row: `instruction` is the user turn, `system` the system prompt, and `input` is empty.

    `targets` is output=... for SFT, or chosen=... and rejected=... for DPO. Raises UserError for a prompt without a
    system turn or with a prefix.
    """
    if messages[0]["role"] != "system":  # LLaMA-Factory would insert its own system prompt
        raise UserError("--prompts: system: null is for inference only; give a system prompt to train with")
    if prefix_of(messages):
        raise UserError("--prompts: prefix is for inference only; remove it to train")
    system, user = messages
    answers = {name: as_text(target) for name, target in targets.items()}
    return {"instruction": user["content"], "input": "", **answers, "system": system["content"]}
