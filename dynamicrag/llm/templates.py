"""Chat templates: choose the template of a checkpoint, and convert messages to token ids with it."""

import functools
import hashlib
import os
import re
import threading
from array import array
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from dynamicrag.llm.completion import OPENS
from dynamicrag.llm.model_files import MANIFEST, TEMPLATE, file_of
from dynamicrag.llm.prompts import as_text, prefix_of
from dynamicrag.models.chat_templates import SAMPLE, Messages, fixed_options, read_template, try_template
from dynamicrag.stage import UserError, log

AUTO = "auto"
FOLDER = Path(__file__).resolve().parents[2] / "template"
# Turn markers that are single tokens: <|im_start|>, Gemma's <start_of_turn>, DeepSeek's with full-width bars.
MARKER = re.compile(r"<\|[^<>|\s]{1,40}\|>|<(?:start|end)_of_\w{1,20}>|<\uff5c[^<>\uff5c]{1,40}\uff5c>")
# Size of the cache of prompt tokens (4 bytes each): a chunk of 2000 prompts of 8192 tokens.
KEPT_TOKENS = 1 << 24

# A token that only models of a template's kind have, the rarest first.
KIN = {"mistral": "[INST]", "qwen3": "<think>", "qwen": "<|object_ref_start|>"}

Item = TypeVar("Item")
Result = TypeVar("Result")


def forgeable(template: str, tokenizer) -> list[str]:
    """Return the special tokens that mark turns in this template and that documents may contain unescaped."""
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    written = {token for token in special if token in template} | {tokenizer.bos_token, tokenizer.eos_token} - {None}
    return sorted(token for token in written if as_text(token) == token)


class PromptTokenizer:
    """Converts messages to the token ids of a prompt, with one chat template and one tokenizer. Thread-safe.

    A prompt is tokenised when its documents are chosen and again when it is sent. The ids of recent prompts are cached,
    because a prompt of 5,000 tokens takes 10 ms. Errors refer to the template as `name`. With `fold_system`, the system
    prompt becomes the beginning of the user turn, for templates without a system turn.
    """

    def __init__(self, tokenizer, chat_template: str, name: str = "", thinking: bool = False, fold_system: bool = False):
        from cachetools import LRUCache

        self.tokenizer, self.chat_template, self.name = tokenizer, chat_template, name
        # A model without a beginning-of-text token, such as Qwen, writes nothing in its place, as with LLaMA-Factory.
        missing = {name: "" for name in ("bos_token", "eos_token") if getattr(tokenizer, name, None) is None}
        self._options, self._fold_system = {**fixed_options(chat_template, thinking), **missing}, fold_system
        self._kept: LRUCache = LRUCache(KEPT_TOKENS, getsizeof=len)
        self._lock = threading.Lock()

    @functools.cached_property
    def opens_reasoning(self) -> bool:
        """Whether every prompt ends with the tag that opens the model's reasoning."""
        *_, end = self.render(SAMPLE).rpartition(SAMPLE[1]["content"])
        return any(not end[opening.end() :].strip() for opening in OPENS.finditer(end))

    @functools.cached_property
    def longest_token(self) -> int:
        """The number of characters of the longest token."""
        return max(map(len, self.tokenizer.get_vocab()))

    @functools.cached_property
    def opens_with_space(self) -> bool:
        """Whether a model of this template and tokenizer begins its answers with a space, as Mistral and LLaMA2 are trained.

        LLaMA-Factory encodes an answer by itself: SentencePiece puts a space in front, or the template has one.
        """
        prompt, answer = self.render(SAMPLE), "[1]"
        whole = self.tokenizer.apply_chat_template(
            [*SAMPLE, {"role": "assistant", "content": answer}], chat_template=self.chat_template, tokenize=False, **self._options
        ) if not self._fold_system else ""
        written = whole[len(prompt) :] if whole.startswith(prompt) else answer
        first, *_ = self.tokenizer.convert_ids_to_tokens(self.tokenizer.encode(written, add_special_tokens=False))
        return first.startswith(("\u2581", "\u0120", " "))

    def render(self, messages: Messages) -> str:
        """Return a prompt as text, up to the start of the answer.

        A final assistant message is appended as its beginning.
        """
        if prefix := prefix_of(messages):
            return self.render(messages[:-1]) + prefix
        if self._fold_system and messages[0]["role"] == "system":
            system, user, *rest = messages
            messages = [{**user, "content": f"{system['content']}\n\n{user['content']}"}, *rest]
        return self.tokenizer.apply_chat_template(
            messages, chat_template=self.chat_template, add_generation_prompt=True, tokenize=False, **self._options
        )

    def ids(self, messages: Messages) -> list[int]:
        """Return the token ids of render()."""
        rendered = self.render(messages)
        key = hashlib.blake2b(rendered.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        with self._lock:
            cached = self._kept.get(key)
        if cached is None:
            cached = array("I", self.tokenizer.encode(rendered, add_special_tokens=False))
            with self._lock:
                if len(cached) <= KEPT_TOKENS:
                    self._kept[key] = cached
        return cached.tolist()

    def answer_ids(self, answer: str) -> list[int]:
        """Return the tokens with which a model is trained to write an answer, without those that end its turn."""
        sample, answer = SAMPLE[1:] if self._fold_system else SAMPLE, as_text(answer)
        prompt = self.render(sample)
        whole = self.tokenizer.apply_chat_template(
            [*sample, {"role": "assistant", "content": answer}], chat_template=self.chat_template, tokenize=False, **self._options
        )
        written = whole[len(prompt) :] if whole.startswith(prompt) else answer
        return self.tokenizer.encode(written[: written.find(answer) + len(answer)], add_special_tokens=False)


def in_threads(work: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """Return work() of every item, in order, on all cores. Tokenizers release the GIL."""
    items = list(items)
    if len(items) < 2:
        return [work(item) for item in items]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(work, items))


# ---------------------------------------------------------------- choice of the template


def load_prompts(model: str, template: str, thinking: bool = False) -> PromptTokenizer:
    """Return the prompts of a model with `template`, a file or "auto" for the model's own template.

    The choice is logged, with a warning if the model was published with a template that gives other prompts. Raises
    UserError if the tokenizer cannot be loaded, or if turn markers of the file are not tokens of the model, which would
    then see an unknown format.
    """
    from transformers import AutoTokenizer

    from dynamicrag.models.checkpoints import NO_CODE, loading

    text = read_template(template) if template != AUTO else ""
    published = file_of(model, TEMPLATE) if (Path(model) / MANIFEST).is_file() else None
    with loading(model, "a tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(model, **NO_CODE)
    # The file that was given
    if template != AUTO:
        prompts = PromptTokenizer(tokenizer, text, template, thinking)
        if strange := strange_markers(prompts):
            fitting = fitting_templates(model, tokenizer)
            advice = f"--template {fitting[0]}, or auto" if fitting else "--template auto, or a template of this model's"
            raise UserError(f"{template}: marks turns with {', '.join(strange)}, which are not tokens of {model}; "
                            f"give {advice}")
        log.info("--template: using %s", template)
        own = own_template(model, tokenizer, thinking) if published else None
        if own and own.ids(SAMPLE) != prompts.ids(SAMPLE):
            log.warning("--template %s: gives other prompts than %s, with which %s was published; omit the flag, or give "
                        "auto", template, published, model)
        return prompts
    # The checkpoint's own template, unless it was trained with another
    prompts = own_template(model, tokenizer, thinking)
    if prompts and published:
        log.info("--template auto: using %s, which comes with the model", published)
        return prompts
    recipe = recipe_template(model)
    if prompts and recipe:
        # LLaMA-Factory saves the template of the base model if it has one, even if the recipe trains with another.
        trained = PromptTokenizer(tokenizer, read_template(str(recipe)), _shown(recipe), thinking)
        if not strange_markers(trained) and trained.ids(SAMPLE) != prompts.ids(SAMPLE):
            log.warning("--template auto: using %s, the template of the recipe of %s; the checkpoint's own template "
                        "gives other prompts", trained.name, model)
            return trained
    if prompts:
        log.info("--template auto: using the chat template of %s", model)
        return prompts
    # A file that fits its tokens
    fitting = fitting_templates(model, tokenizer)
    if not fitting:
        raise UserError(f"{model}: has no chat template, and no file of template/*.jinja fits its tokens; give "
                        "--template the one it was trained with")
    log.info("--template auto: using %s, because %s has no chat template", fitting[0], model)
    return PromptTokenizer(tokenizer, read_template(str(FOLDER / Path(fitting[0]).name)), fitting[0], thinking)


def own_template(model: str, tokenizer, thinking: bool = False) -> PromptTokenizer | None:
    """Return the prompts with the checkpoint's chat template; None if it has none.

    Raises UserError for an unusable template.
    """
    text = tokenizer.chat_template
    if isinstance(text, dict):
        text = text.get("default") or next(iter(text.values()), None)
    if not text:
        return None
    name, fold_system = f"the chat template of {model}", False
    try:
        try_template(text, name, SAMPLE)
    except UserError:
        try_template(text, name, SAMPLE[1:])
        log.info("%s: has no system turn; the system prompt becomes the beginning of the user turn", name)
        fold_system = True
    prompts = PromptTokenizer(tokenizer, text, name, thinking, fold_system)
    if strange := strange_markers(prompts):
        log.warning("%s: marks turns with %s, which are not tokens of the model", name, ", ".join(strange))
    return prompts


def strange_markers(prompts: PromptTokenizer) -> list[str]:
    """Return the turn markers in a prompt that are not single tokens."""
    markers = dict.fromkeys(MARKER.findall(prompts.render(SAMPLE)))
    return [marker for marker in markers if not is_token(prompts.tokenizer, marker)]


def is_token(tokenizer, text: str) -> bool:
    """Return whether a tokenizer encodes a text as exactly one token with the same text."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    return len(ids) == 1 and tokenizer.convert_ids_to_tokens(ids) == [text]


def fitting_templates(model: str, tokenizer) -> list[str]:
    """Return the files of template/*.jinja whose markers are tokens of a model, most likely first, by markers and then by name."""
    name = re.sub(r"[^a-z0-9]", "", "".join(Path(model).parts[-2:]).lower())
    ranked = []
    for path in sorted(FOLDER.glob("*.jinja")):
        text = path.read_text(encoding="utf-8")
        if strange_markers(PromptTokenizer(tokenizer, text)):
            continue
        has_markers = bool(MARKER.search(text))
        # Templates without such markers fit every tokenizer, and several have the same. They are for models of their kind.
        of_its_kind = is_token(tokenizer, KIN[path.stem]) if path.stem in KIN else has_markers or tokenizer.bos_token == "<s>"
        if not (of_its_kind or path.stem in name):
            continue
        longest_name = len(path.stem) if path.stem in name else 0  # "qwen3" is nearer to Qwen3-8B than "qwen"
        kin = list(KIN).index(path.stem) if path.stem in KIN else len(KIN)
        ranked.append((not has_markers, -longest_name, kin, _shown(path)))
    return [shown for *_, shown in sorted(ranked)]


def recipe_template(model: str) -> Path | None:
    """Return the template of the recipe that trained a model; None if `model` is not a recipe's output (`DynamicRAG_llama3_8b/sft`)."""
    recipes = FOLDER.parent / "recipes"
    for part in Path(model).parts[-2:]:
        recipe = recipes / part.removeprefix("DynamicRAG_") / "sft.yaml"
        if part.startswith("DynamicRAG_") and recipe.is_file():
            named = re.search(r"^template: (\w+)", recipe.read_text(encoding="utf-8"), re.MULTILINE)
            path = FOLDER / f"{named[1] if named else ''}.jinja"
            return path if path.is_file() else None
    return None


def _shown(path: Path) -> str:
    return f"template/{path.name}"
