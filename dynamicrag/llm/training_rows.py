"""Training rows as LLaMA-Factory reads them: fit rows into the token limit of the recipe.

LLaMA-Factory silently truncates a conversation that is longer than the recipe's `cutoff_len`: the end of the prompt is
lost, with the final question and the start of the assistant's turn. The stages that write training rows therefore fit
every row into `cutoff_len` first. Whole documents are removed from the end, as in inference
(requests.documents_that_fit).
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

from dynamicrag.llm.prompts import as_text
from dynamicrag.llm.recipe import LengthOptions, load_tokenizer, resolve_lengths
from dynamicrag.llm.requests import documents_that_fit
from dynamicrag.llm.templates import PromptTokenizer, in_threads, strange_markers
from dynamicrag.models.chat_templates import SAMPLE, Messages, read_template
from dynamicrag.rows.row import Doc
from dynamicrag.stage import UserError, log

Item = TypeVar("Item")
# English text has about 4.5 characters per token with a large vocabulary and 3.9 with LLaMA-2's; other scripts have one
# or fewer.
CHARACTERS_PER_TOKEN = 3.5
TOKENS_OF_TURNS = 32  # tokens that a template adds around system prompt, question and answer
ROWS_PER_BATCH = 256


class Fitted(NamedTuple):
    """The result of fitting one row: the training row (None if left out), the number of documents removed, values for a report."""

    row: dict[str, Any] | None
    removed: int = 0
    about: Mapping[str, float] = MappingProxyType({})


class TrainingWindow:
    """The maximum tokens of a training conversation (`cutoff_len`), including system prompt, prompt, answer and end token.

    Without a tokenizer, lengths are estimated from characters. Without a cutoff_len, everything fits.
    """

    def __init__(self, cutoff_len: int | None = None, prompts: PromptTokenizer | None = None):
        self.cutoff_len, self._prompts = cutoff_len, prompts
        self._quiet = False
        self.written = self.shortened = self.left_out = self.removed = 0

    @property
    def unit(self) -> str:
        return "tokens" if self._prompts else "characters"

    def prompt_tokens(self, messages: Messages) -> int:
        """Return the tokens of a prompt, counted or estimated."""
        if self._prompts:
            return len(self._prompts.ids(messages))
        return TOKENS_OF_TURNS + sum(estimated_tokens(message["content"]) for message in messages)

    def fits(self, messages: Messages, max_tokens: int) -> bool:
        """Return whether the prompt leaves room for an answer of max_tokens."""
        return self.cutoff_len is None or self.prompt_tokens(messages) + max_tokens <= self.cutoff_len

    def answer_tokens(self, answer: str) -> int:
        """Return the tokens of an answer, including everything that the template writes after the prompt, such as the end token."""
        prompts = self._prompts
        if not prompts:
            return estimated_tokens(answer)

        def rendered(messages: Messages, prompt_only: bool) -> str:
            return prompts.tokenizer.apply_chat_template(
                messages, chat_template=prompts.chat_template, add_generation_prompt=prompt_only, tokenize=False
            )

        whole = rendered([*SAMPLE, {"role": "assistant", "content": as_text(answer)}], False)
        return len(prompts.tokenizer.encode(whole[len(rendered(SAMPLE, True)) :], add_special_tokens=False))

    def size(self, answer: str) -> int:
        """Return the length of a target in `unit`, for reports."""
        return self.answer_tokens(answer) if self._prompts else len(answer)

    def documents(self, build: Callable[[Sequence[Doc]], Messages], docs: Sequence[Doc], *answers: str) -> list[Doc] | None:
        """Return the longest prefix of `docs` that fits together with the longest of `answers`; None if the question does not fit."""
        room = max(map(self.answer_tokens, answers))
        if not self.fits(build([]), room):
            return None
        return documents_that_fit(self, build, docs, room)

    def conversation(self, row: dict) -> Fitted:
        """Fit a training row that has a history: keep as many of its first questions as fit, or no row if the first does not.

        `removed` is the number of questions that were removed.
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
        """Return the same window with counts of 0 and without a progress bar, for a first look at some rows."""
        window = TrainingWindow(self.cutoff_len, self._prompts)
        window._quiet = True
        return window

    def kept(self, rows: Iterable[Item], fit: Callable[[Item], list[Fitted]], total: int | None, desc: str, path: str) -> Iterator[Fitted]:
        """Yield the training rows that fit, in order, and count them. With a tokenizer, `fit` runs on all cores.

        Raises UserError at the end if no row of `path` fits.
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
            how = "" if self._prompts else ", as estimated (--tokenizer counts the tokens)"
            raise UserError(
                f"{path}: none of {self.left_out} rows fits in cutoff_len {self.cutoff_len} with the documents that its "
                f"target names{how}; show fewer documents (--n_docs), use shorter passages, or train with a larger "
                "cutoff_len"
            )

    def _in_batches(self, rows: Iterable[Item], fit: Callable[[Item], list[Fitted]], total: int | None, desc: str) -> Iterator[Fitted]:
        from tqdm import tqdm

        rows = iter(rows)
        options: dict[str, Any] = {"disable": True} if self._quiet else {}  # the default is an environment variable's
        with tqdm(total=total, unit="row", desc=desc, **options) as progress:
            while batch := list(itertools.islice(rows, ROWS_PER_BATCH)):
                yield from itertools.chain.from_iterable(in_threads(fit, batch) if self._prompts else map(fit, batch))
                progress.update(len(batch))

    def counts(self, what: str = "documents") -> dict[str, int]:
        """Return the numbers of rows shortened and left out, for the manifest, and log a warning if there are any."""
        if self.shortened or self.left_out:
            log.warning(
                "cutoff_len %d%s: %d %s are removed from the end of the prompts of %d rows; %d rows are left out, because "
                "nothing fits or the target names a removed document",
                self.cutoff_len, "" if self._prompts else " (estimated)", self.removed, what, self.shortened, self.left_out,
            )
        return {"shortened": self.shortened, "left_out": self.left_out}


def estimated_tokens(text: str) -> int:
    """Estimate the tokens of a text: one per CHARACTERS_PER_TOKEN characters of ASCII, one for every other character."""
    ascii_only = len(text.encode("ascii", "ignore"))
    return round(ascii_only / CHARACTERS_PER_TOKEN) + len(text) - ascii_only


def load_window(options: LengthOptions) -> TrainingWindow:
    """Return the window of the recipe. Logs once if lengths are estimated or not checked.

    Raises UserError for an unusable recipe, template or tokenizer folder.
    """
    options = resolve_lengths(options)
    cutoff_len, model, template = options.cutoff_len, options.tokenizer, options.template
    if cutoff_len is None:
        log.warning("%s: does not exist or has no cutoff_len, so that lengths are not checked; give --cutoff_len or "
                    "--train_recipe", options.train_recipe)
        return TrainingWindow()
    if cutoff_len < 1:
        raise UserError(f"cutoff_len {cutoff_len}: expected at least 1; give another --cutoff_len")
    tokenizer, why = load_tokenizer(model) if model else (None, f"{options.train_recipe} names no model")
    if tokenizer is not None and template is None:
        why = f"the chat template that {options.train_recipe} names does not exist"
    if tokenizer is None or template is None:
        log.warning(
            "cutoff_len %d: lengths are estimated at %s characters per token, because %s; to count tokens, give "
            "--tokenizer the folder of the model to be trained, and --template", cutoff_len, CHARACTERS_PER_TOKEN, why,
        )
        return TrainingWindow(cutoff_len)
    prompts = PromptTokenizer(tokenizer, read_template(template))
    if strange := strange_markers(prompts):
        raise UserError(f"{template}: marks turns with {', '.join(strange)}, which are not tokens of {model}; give "
                        "--template or --train_recipe the template of this model")
    log.info("cutoff_len %d, counted with the tokenizer of %s and %s", cutoff_len, model, template)
    return TrainingWindow(cutoff_len, prompts)


