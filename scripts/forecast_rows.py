"""The rows of scripts/forecast.py: how many a file has, and the mean lengths of their prompts and answers."""

import random
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean

import orjson
from forecast_costs import BYTES_A_PARAMETER, Means

import construct_generator_sft
from dynamicrag.files.jsonio import read_json
from dynamicrag.llm.engine import DEFAULT_WINDOW, window_of
from dynamicrag.llm.prompts import Prompts
from dynamicrag.llm.recipe import load_tokenizer
from dynamicrag.llm.requests import documents_that_fit
from dynamicrag.llm.templates import AUTO, PromptTokenizer, own_template
from dynamicrag.llm.training_rows import TrainingWindow
from dynamicrag.models.chat_templates import Messages, read_template
from dynamicrag.rows.records import normalise_row
from dynamicrag.rows.row import Doc, Row, RowError
from dynamicrag.rows.tasks import dataset_named, name_of_file, target_answer, task_of_row
from dynamicrag.stage import UserError, derive_seed

PREFIX = "dynamicrag_"  # of the prepared files of the published data


class Counted:
    """A file of rows: their number, its bytes, and a random sample of them.

    Raises UserError for a file without rows, a malformed row in the sample, and rows of another data set than the name of
    a prepared file says.
    """

    def __init__(self, path: str, sample: int, seed: int):
        from tqdm import tqdm

        rng, kept = random.Random(derive_seed(seed, Path(path).name)), []
        self.path, self.rows, self.name = path, 0, Path(path).stem
        for line, value in tqdm(read_json(path), desc=f"counting {self.name}", unit=" rows"):
            self.rows += 1
            if len(kept) < sample:
                kept.append((line, value))
            elif (place := rng.randrange(self.rows)) < sample:
                kept[place] = line, value
        if not kept:
            raise UserError(f"{path}: contains no usable row; give a file with at least one valid row")
        self.bytes = Path(path).stat().st_size
        self.sample = [self._row(line, value) for line, value in kept]
        named = dataset_named(self.name.removeprefix(PREFIX)) if self.name.startswith(PREFIX) else None
        if named and (other := next((row for row in self.sample if row.get("dataset") != named), None)):
            raise UserError(f"{path}: row {other['id']}: dataset is {other.get('dataset')}, not {named} as the file's name says; prepare the file again")

    def _row(self, line: int, value: object) -> Row:
        try:
            return normalise_row(value, ("docs",), file_name=name_of_file(self.path))
        except RowError as error:
            raise UserError(f"{self.path}:{line}: {error}") from error

    @property
    def labelled(self) -> bool:
        """Whether the documents have a reranker's labels."""
        return all("rerank_label" in doc for row in self.sample for doc in row["docs"])


class Lengths:
    """The tokens of prompts and answers: counted with the model's tokenizer if it can be loaded, or else estimated."""

    def __init__(self, asked: Namespace, docs_chosen: int):
        self.asked, self.docs_chosen, self.prompts = asked, docs_chosen, Prompts(asked.prompts)
        model, template = asked.llm_model, None
        absent = not Path(model).is_dir() and model.startswith(("/", "."))
        tokenizer, why = (None, f"{model} is not here") if absent else load_tokenizer(model)
        if tokenizer is not None:
            template = own_template(model, tokenizer) if asked.template == AUTO else PromptTokenizer(tokenizer, read_template(asked.template))
        self.source = f"counted with the tokenizer of {model}" if template else f"a guess: {why or f'{model} has no chat template'}"
        window = window_of(model, asked.max_model_len) if (Path(model) / "config.json").is_file() else asked.max_model_len or DEFAULT_WINDOW
        self.window = TrainingWindow(window, template)
        self.selection = min(self.window.answer_tokens(self.prompts.notation.write(list(range(1, docs_chosen + 1)))), asked.selection_max_tokens)

    def selecting(self, row: Row) -> tuple[list[Doc], int]:
        """Return the documents shown for a selection, and the tokens of its prompt; none for a question that does not fit."""
        docs = row["docs"][: self.asked.topn]
        return self._fitting(lambda some: self.prompts.reranker(row["question"], some), docs, self.asked.selection_max_tokens)

    def answer(self, row: Row) -> int:
        """Return the tokens of the longest answer allowed."""
        return self.asked.answer_max_tokens or task_of_row(row).max_tokens

    def answering(self, row: Row, docs: Sequence[Doc]) -> int:
        """Return the tokens of the prompt that asks for an answer from these documents; 0 if the question does not fit."""
        def build(some: Sequence[Doc]) -> Messages:
            return self.prompts.generator(row["question"], some, self.prompts.instruction(row), range(1, len(some) + 1))

        return self._fitting(build, docs, self.answer(row))[1]

    def _fitting(self, build: Callable[[Sequence[Doc]], Messages], docs: Sequence[Doc], room: int) -> tuple[list[Doc], int]:
        """Return the documents that fit the window with an answer of `room` tokens, and the tokens of their prompt."""
        if not self.window.fits(build([]), room):
            return [], 0
        fitting = documents_that_fit(self.window, build, docs, room)
        return fitting, self.window.prompt_tokens(build(fitting))

    def question(self, row: Row, selector: str) -> tuple[int, int]:
        """Return the tokens that a question reads and writes, at most, with a selector of inference.py."""
        shown, selecting = self.selecting(row)
        read, written = (selecting, self.selection) if selector == "dynamic" and shown else (0, 0)
        if selector == "pointwise":
            read, written = sum(self.window.prompt_tokens(self.prompts.pointwise(row["question"], doc)) for doc in shown), 2 * len(shown)
        chosen = {"none": 0, "all": len(shown)}.get(selector, int(selector.partition(":")[2] or self.docs_chosen))
        return read + self.answering(row, shown[:chosen]), written + self.answer(row)


def parameters_of(model: str) -> float | None:
    """Return the parameters of a model in a folder, by the size of its weights; None if it is not there."""
    size = sum(path.stat().st_size for path in Path(model).glob("*.safetensors"))
    if not size:
        return None
    config = Path(model) / "config.json"
    settings = orjson.loads(config.read_bytes()) if config.is_file() else {}
    return size / (4 if "float32" in (settings.get("dtype"), settings.get("torch_dtype")) else BYTES_A_PARAMETER)


def means_of(file: Counted, lengths: Lengths) -> Means:
    """Return the mean lengths of a training file's rows. The generator is taught with the documents labelled relevant."""
    most = construct_generator_sft.parse_args([]).max_docs

    def taught(row: Row) -> int:
        docs = [doc for doc in row["docs"][: lengths.asked.topn] if doc.get("rerank_label") == "true"] if file.labelled else row["docs"][: lengths.docs_chosen]
        return lengths.answering(row, docs[:most]) + (lengths.window.answer_tokens(target_answer(row)) if row.get("answers") else 0)

    columns = zip(*(
        (len(row["docs"]), lengths.selecting(row)[1], lengths.answering(row, row["docs"][: lengths.docs_chosen]), lengths.answer(row), taught(row))
        for row in file.sample
    ), strict=True)
    documents, selecting, answered, answer, generator = map(fmean, columns)
    return Means(documents, file.bytes / file.rows, selecting, lengths.selection, answered, answer, generator)
