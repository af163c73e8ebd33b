"""What LLaMA-Factory makes of a training row: the tokens it keeps, and the columns it reads.

LLaMA-Factory cuts a conversation that is longer than the recipe's `cutoff_len`, and says nothing: the end of the prompt
goes, with the closing request and the beginning of the assistant's turn. The stages that write training rows therefore
fit every row into `cutoff_len` first. Whole documents go from the end, as they do at inference (requests.documents_that_fit).
"""

import itertools
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple, TypeVar

import orjson

from dynamicrag.llm.prompts import as_text, read_yaml
from dynamicrag.llm.requests import documents_that_fit
from dynamicrag.llm.templates import PromptTokenizer, in_threads, strange_markers
from dynamicrag.models.chat_templates import SAMPLE, Messages, read_template
from dynamicrag.models.checkpoints import NO_CODE, loading
from dynamicrag.rows.records import Doc
from dynamicrag.stage import UserError, log

Item = TypeVar("Item")
HERE = Path(__file__).resolve().parents[2]
# English in a large vocabulary has about 4.5 characters a token, in LLaMA-2's about 3.9; other scripts have one or fewer.
CHARACTERS_A_TOKEN = 3.5
TOKENS_OF_TURNS = 32  # what a template writes around the system prompt, the question and the answer
ROWS_A_BATCH = 256
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")
HUB_SECONDS = 5
SETTINGS = {"model_name_or_path": str, "template": str, "cutoff_len": int, "dataset_dir": str}


class Fitted(NamedTuple):
    """What became of one row: its training row, None if it is left out, how many documents it lost, and what a report says of it."""

    row: dict[str, str] | None
    removed: int = 0
    about: Mapping[str, float] = MappingProxyType({})


def add_length_flags(parser: ArgumentParser, recipe: str) -> None:
    """The flags of every stage that writes training rows. `recipe` is the recipe of the command in docs/pipeline.md."""
    group = parser.add_argument_group("length", "no training row is longer than the trainer reads: whole documents go, from the end")
    group.add_argument("--train_recipe", metavar="YAML", default=recipe, help="LLaMA-Factory recipe that will train these rows")
    group.add_argument("--cutoff_len", type=int, help="most tokens of a conversation (default: the recipe's cutoff_len)")
    group.add_argument("--tokenizer", help="folder or hub name of the model that will be trained (default: the recipe's model_name_or_path)")
    group.add_argument("--template", help="its chat template (default: template/<the recipe's template>.jinja)")


class TrainingWindow:
    """The `cutoff_len` tokens of a conversation that are trained: system prompt, prompt, answer and end token together.

    Without a tokenizer, lengths are estimated by characters; without a cutoff_len everything fits.
    """

    def __init__(self, cutoff_len: int | None = None, prompts: PromptTokenizer | None = None):
        self.cutoff_len, self._prompts = cutoff_len, prompts
        self._quiet = False
        self.written = self.shortened = self.left_out = self.removed = 0

    @property
    def unit(self) -> str:
        return "tokens" if self._prompts else "characters"

    def fits(self, messages: Messages, max_tokens: int) -> bool:
        """Whether the prompt leaves room for an answer of max_tokens."""
        if self.cutoff_len is None:
            return True
        if self._prompts:
            return len(self._prompts.ids(messages)) + max_tokens <= self.cutoff_len
        return TOKENS_OF_TURNS + sum(estimated_tokens(message["content"]) for message in messages) + max_tokens <= self.cutoff_len

    def answer_tokens(self, answer: str) -> int:
        """Tokens of an answer with all that the template writes after the prompt, the end token included."""
        if not self._prompts:
            return estimated_tokens(answer)

        def rendered(messages: Messages, prompt_only: bool) -> str:
            return self._prompts.tokenizer.apply_chat_template(
                messages, chat_template=self._prompts.chat_template, add_generation_prompt=prompt_only, tokenize=False
            )

        whole = rendered([*SAMPLE, {"role": "assistant", "content": as_text(answer)}], False)
        return len(self._prompts.tokenizer.encode(whole[len(rendered(SAMPLE, True)) :], add_special_tokens=False))

    def size(self, answer: str) -> int:
        """The length of a target in `unit`, for reports."""
        return self.answer_tokens(answer) if self._prompts else len(answer)

    def documents(self, build: Callable[[Sequence[Doc]], Messages], docs: Sequence[Doc], *answers: str) -> list[Doc] | None:
        """The longest beginning of `docs` that fits beside the longest of `answers`; None if not even the question fits."""
        room = max(map(self.answer_tokens, answers))
        if not self.fits(build([]), room):
            return None
        return documents_that_fit(self, build, docs, room)

    def conversation(self, row: dict) -> Fitted:
        """A training row with a history, of as many of its first questions as fit; none if not even the first does.

        `removed` counts the questions that went.
        """
        turns = [*row["history"], [row["instruction"], row["output"]]]
        messages = [{"role": "system", "content": row["system"]}]
        fitting = 0
        for question, answer in turns:
            messages.append({"role": "user", "content": question})
            if not self.fits(messages, self.answer_tokens(answer)):
                break
            messages.append({"role": "assistant", "content": answer})
            fitting += 1
        if not fitting:
            return Fitted(None)
        question, answer = turns[fitting - 1]
        return Fitted({**row, "instruction": question, "output": answer, "history": turns[: fitting - 1]}, len(turns) - fitting)

    def again(self) -> "TrainingWindow":
        """The same window with nothing counted, and without a progress bar: for a first look at some rows."""
        window = TrainingWindow(self.cutoff_len, self._prompts)
        window._quiet = True
        return window

    def kept(self, rows: Iterable[Item], fit: Callable[[Item], list[Fitted]], total: int | None, desc: str, path: str) -> Iterator[Fitted]:
        """Those training rows of every row that fit, counted, in order; `fit` runs on all cores.

        Raises UserError at the end if the rows of `path` left none.
        """
        for fitted in self._in_batches(rows, fit, total, desc):
            if fitted.row is None:
                self.left_out += 1
                continue
            self.written += 1
            self.shortened += fitted.removed > 0
            self.removed += fitted.removed
            yield fitted
        if self.left_out and not self.written:
            how = "" if self._prompts else ", by an estimate (--tokenizer counts)"
            raise UserError(
                f"{path}: not one of {self.left_out} rows fits cutoff_len {self.cutoff_len} with the documents its target names{how}; "
                "show fewer documents (--n_docs), use shorter passages, or train with a larger cutoff_len"
            )

    def _in_batches(self, rows: Iterable[Item], fit: Callable[[Item], list[Fitted]], total: int | None, desc: str) -> Iterator[Fitted]:
        from tqdm import tqdm

        rows = iter(rows)
        with tqdm(total=total, unit="row", desc=desc, **({"disable": True} if self._quiet else {})) as progress:
            while batch := list(itertools.islice(rows, ROWS_A_BATCH)):
                yield from itertools.chain.from_iterable(in_threads(fit, batch))
                progress.update(len(batch))

    def counts(self, what: str = "documents") -> dict[str, int]:
        """How many rows were shortened, by `what`, and left out, for the manifest; a warning if any was."""
        if self.shortened or self.left_out:
            log.warning(
                "cutoff_len %d%s: %s removed from the end of prompts: %d, in %d rows; rows left out, since the target names one that does "
                "not fit or nothing fits: %d", self.cutoff_len, "" if self._prompts else " (estimated)", what, self.removed, self.shortened, self.left_out,
            )
        return {"shortened": self.shortened, "left_out": self.left_out}


def estimated_tokens(text: str) -> int:
    """A guess at the tokens of a text: CHARACTERS_A_TOKEN in ASCII, one token for every other character."""
    ascii_only = len(text.encode("ascii", "ignore"))
    return round(ascii_only / CHARACTERS_A_TOKEN) + len(text) - ascii_only


# ---------------------------------------------------------------- the recipe


def recipe_path(args: Namespace) -> Path | None:
    """The recipe's file, in this folder or in the project's; None without the project's folder. Raises UserError for one that is not there."""
    given = Path(args.train_recipe)
    if found := next((path for path in (given, HERE / given) if path.is_file()), None):
        return found
    if (HERE / "recipes").is_dir():
        raise UserError(f"{given}: no such recipe; give --train_recipe the YAML file that llamafactory-cli will train with")
    return None


def read_recipe(path: Path) -> dict:
    """The settings of a LLaMA-Factory recipe that lengths and columns depend on. Raises UserError."""
    recipe = read_yaml(path, "settings")
    if not isinstance(recipe, dict):
        raise UserError(f"{path}: expected a mapping of settings; give --train_recipe a recipe of LLaMA-Factory")
    for name, kind in SETTINGS.items():
        if name in recipe and type(recipe[name]) is not kind:
            raise UserError(f"{path}: {name}: expected {'an integer' if kind is int else 'a text'}, found {recipe[name]!r}")
    return {name: recipe[name] for name in SETTINGS if name in recipe}


def resolve_length_flags(args: Namespace) -> list[str]:
    """Put what the recipe says in the place of flags not given, and return the files that decide lengths: inputs of a stage.

    The recipe itself is none of them: another learning rate changes no training row. Raises UserError as read_recipe does.
    """
    path = recipe_path(args)
    recipe = read_recipe(path) if path else {}
    args.cutoff_len = recipe.get("cutoff_len") if args.cutoff_len is None else args.cutoff_len
    args.tokenizer = args.tokenizer or recipe.get("model_name_or_path")
    if not args.template:
        name = Path("template") / f"{Path(recipe.get('template', '')).name}.jinja"
        args.template = next((str(file) for file in (name, HERE / name) if file.is_file()), None)
    files = [args.template, *(Path(args.tokenizer) / name for name in TOKENIZER_FILES if args.tokenizer)]
    return [str(file) for file in files if file and Path(file).is_file()]


def load_window(args: Namespace) -> TrainingWindow:
    """The window of the recipe. Says once if lengths are estimated, or not checked at all.

    Raises UserError for a recipe, a template or a tokenizer folder that cannot be used.
    """
    resolve_length_flags(args)
    cutoff_len, model, template = args.cutoff_len, args.tokenizer, args.template
    if cutoff_len is None:
        log.warning("lengths are not checked: %s is not here, or has no cutoff_len; give --cutoff_len or --train_recipe", args.train_recipe)
        return TrainingWindow()
    if cutoff_len < 1:
        raise UserError(f"cutoff_len {cutoff_len}: expected at least 1; give another --cutoff_len")
    tokenizer, why = load_tokenizer(model) if model else (None, f"{args.train_recipe} names no model")
    if tokenizer is not None and template is None:
        tokenizer, why = None, f"there is no chat template of the name that {args.train_recipe} gives"
    if tokenizer is None:
        log.warning(
            "lengths are not counted but estimated, at %s characters a token, against cutoff_len %d: %s. Give --tokenizer the folder of "
            "the model that will be trained, and --template, to count them", CHARACTERS_A_TOKEN, cutoff_len, why,
        )
        return TrainingWindow(cutoff_len)
    prompts = PromptTokenizer(tokenizer, read_template(template))
    if strange := strange_markers(prompts):
        raise UserError(f"{template}: it marks turns with {', '.join(strange)}, which are no tokens of {model}; give --template or "
                        "--train_recipe the one that this model is trained with")
    log.info("cutoff_len %d, counted by the tokenizer of %s and %s", cutoff_len, model, template)
    return TrainingWindow(cutoff_len, prompts)


def load_tokenizer(model: str) -> tuple[object | None, str]:
    """The tokenizer of a folder or of a hub name; None, and why, if it cannot be had. Raises UserError for a damaged folder."""
    folder = Path(model)
    if folder.is_dir():
        if not any((folder / name).is_file() for name in TOKENIZER_FILES):
            return None, f"{model} holds no tokenizer"
    elif folder.exists() or folder.is_absolute() or model.startswith("."):
        raise UserError(f"{model}: no such folder; give --tokenizer the folder of the model that will be trained")
    elif why := _unreachable(model):
        return None, why
    with loading(model, "a tokenizer"):
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(model, **NO_CODE), ""
        except OSError as error:
            if folder.is_dir():
                raise
            return None, f"the tokenizer of {model} cannot be had from the hub ({str(error).strip().splitlines()[0]})"


def _unreachable(name: str) -> str | None:
    """Why a hub name cannot be looked up: asked once and quickly, since transformers asks for minutes."""
    import huggingface_hub as hub

    try:
        cached = any(isinstance(hub.try_to_load_from_cache(name, file), str) for file in TOKENIZER_FILES)
    except hub.errors.HFValidationError:
        return f"{name} is neither a folder nor the name of a model"
    if cached:
        return None
    if hub.constants.HF_HUB_OFFLINE:
        return f"{name} is not a folder here, and no hub is asked (HF_HUB_OFFLINE)"
    from urllib.error import HTTPError
    from urllib.request import Request, urlopen

    try:
        urlopen(Request(hub.constants.ENDPOINT, method="HEAD"), timeout=HUB_SECONDS).close()
    except HTTPError:
        return None  # it answers
    except (OSError, ValueError) as error:
        return f"{name} is not a folder here, and {hub.constants.ENDPOINT} cannot be reached ({error})"
    return None


# ---------------------------------------------------------------- the columns


def check_columns(args: Namespace, output: str) -> None:
    """Say which dataset_info.json entry trains a file, and warn of an entry that would lose a column of it.

    LLaMA-Factory trains without a system prompt if `columns` does not map it, as published entries do not, and says nothing.
    """
    path = recipe_path(args)
    folder = Path((read_recipe(path) if path else {}).get("dataset_dir", "recipes"))
    info_path = next((file for file in (folder / "dataset_info.json", HERE / folder / "dataset_info.json") if file.is_file()), None)
    note = 'LLaMA-Factory trains the system prompt of these rows only if "columns" of the dataset_info.json entry has "system": "system"'
    if info_path is None:
        log.warning("%s: %s", output, note)
        return
    try:
        info = orjson.loads(info_path.read_bytes())
        entries = {name: entry for name, entry in info.items() if Path(entry.get("file_name", "")).name == Path(output).name}
        lost = [name for name, entry in entries.items() if entry.get("columns", {}).get("system") != "system"]
    except (ValueError, AttributeError, TypeError) as error:
        raise UserError(f"{info_path}: not a dataset_info.json of LLaMA-Factory ({error}); see recipes/dataset_info.json") from error
    for name in lost:
        log.warning("%s: entry %s would train %s without its system prompt; add \"system\": \"system\" to its columns", info_path, name, output)
    if not entries:
        log.warning("%s: no entry of %s names this file. %s", output, info_path, note)
    elif not lost:
        log.info("%s: %s; %s in %s does", output, note, ", ".join(entries), info_path)
