"""Prompts as the tokens of a chat template: which template a checkpoint is asked with, and what it makes of messages."""

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
from dynamicrag.llm.prompts import as_text, prefix_of
from dynamicrag.models.chat_templates import SAMPLE, Messages, fixed_options, read_template, try_template
from dynamicrag.stage import UserError, log

AUTO = "auto"
FOLDER = Path(__file__).resolve().parents[2] / "template"
# What marks turns, where it is a token of its own: <|im_start|>, Gemma's <start_of_turn>, DeepSeek's with wide bars.
MARKER = re.compile(r"<\|[^<>|\s]{1,40}\|>|<(?:start|end)_of_\w{1,20}>|<\uff5c[^<>\uff5c]{1,40}\uff5c>")
# Tokens of the latest prompts that are kept, 4 bytes each: a chunk of 2000 prompts of 8192 tokens.
KEPT_TOKENS = 1 << 24

Item, Result = TypeVar("Item"), TypeVar("Result")


def forgeable(template: str, tokenizer) -> list[str]:
    """The special tokens with which this template marks turns, and which a document may hold as they are."""
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    written = {token for token in special if token in template} | {tokenizer.bos_token, tokenizer.eos_token} - {None}
    return sorted(token for token in written if as_text(token) == token)


class PromptTokenizer:
    """Messages as the token ids of a prompt, by one chat template and one tokenizer. May be called from several threads.

    A prompt is measured when its documents are chosen and needed again when it is sent: the ids of the latest prompts
    are kept, since a prompt of 5,000 tokens takes 10 ms. `name` is what errors call the template; with `fold_system` the
    system prompt begins the user turn, for a template that has no place for it.
    """

    def __init__(self, tokenizer, chat_template: str, name: str = "", thinking: bool = False, fold_system: bool = False):
        from cachetools import LRUCache

        self.tokenizer, self.chat_template, self.name = tokenizer, chat_template, name
        self._options, self._fold_system = fixed_options(chat_template, thinking), fold_system
        self._kept: LRUCache = LRUCache(KEPT_TOKENS, getsizeof=len)
        self._lock = threading.Lock()

    @property
    def opens_reasoning(self) -> bool:
        """Whether every prompt ends with the tag that opens a model's reasoning."""
        *_, end = self.render(SAMPLE).rpartition(SAMPLE[1]["content"])
        return any(not end[opening.end() :].strip() for opening in OPENS.finditer(end))

    def render(self, messages: Messages) -> str:
        """A prompt as text, up to where the answer begins, or goes on after an assistant's message at the end."""
        if prefix := prefix_of(messages):
            return self.render(messages[:-1]) + prefix
        if self._fold_system and messages[0]["role"] == "system":
            system, user, *rest = messages
            messages = [{**user, "content": f"{system['content']}\n\n{user['content']}"}, *rest]
        return self.tokenizer.apply_chat_template(
            messages, chat_template=self.chat_template, add_generation_prompt=True, tokenize=False, **self._options
        )

    def ids(self, messages: Messages) -> list[int]:
        """The token ids of render()."""
        rendered = self.render(messages)
        key = hashlib.blake2b(rendered.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        with self._lock:
            kept = self._kept.get(key)
        if kept is None:
            kept = array("I", self.tokenizer.encode(rendered, add_special_tokens=False))
            with self._lock:
                if len(kept) <= KEPT_TOKENS:
                    self._kept[key] = kept
        return kept.tolist()


def in_threads(work: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """work() of every item, in order, on all cores: a tokenizer works outside Python's global lock."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(work, items))


# ---------------------------------------------------------------- which template


def load_prompts(model: str, template: str, thinking: bool = False) -> PromptTokenizer:
    """The prompts of a model by `template`: a file, or "auto", which finds the model's own. Says which one auto has taken.

    Raises UserError if the tokenizer cannot be loaded, and for a file whose markers are no tokens of the model: it would be
    asked in a format it has never seen.
    """
    from transformers import AutoTokenizer

    from dynamicrag.models.checkpoints import NO_CODE, loading

    text = read_template(template) if template != AUTO else ""
    with loading(model, "a tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(model, **NO_CODE)
    if template != AUTO:
        prompts = PromptTokenizer(tokenizer, text, template, thinking)
        if strange := strange_markers(prompts):
            fitting = fitting_templates(model, tokenizer)
            advice = f"--template {fitting[0]}, or auto" if fitting else "--template auto, or a template of this model's"
            raise UserError(f"{template}: it marks turns with {', '.join(strange)}, which are no tokens of {model}; give {advice}")
        return prompts
    prompts = own_template(model, tokenizer, thinking)
    recipe = recipe_template(model)
    if prompts and recipe:
        # LLaMA-Factory keeps the template of a base model that has one, whichever the recipe trains with.
        trained = PromptTokenizer(tokenizer, read_template(str(recipe)), _shown(recipe), thinking)
        if not strange_markers(trained) and trained.ids(SAMPLE) != prompts.ids(SAMPLE):
            log.warning("--template auto: %s, which the recipe of %s trains with; the checkpoint's own template asks otherwise", trained.name, model)
            return trained
    if prompts:
        log.info("--template auto: the chat template of %s", model)
        return prompts
    fitting = fitting_templates(model, tokenizer)
    if not fitting:
        raise UserError(f"{model}: has no chat template, and none of template/*.jinja fits its tokens; give --template the one it was trained with")
    log.info("--template auto: %s, as %s has no chat template of its own", fitting[0], model)
    return PromptTokenizer(tokenizer, read_template(str(FOLDER / Path(fitting[0]).name)), fitting[0], thinking)


def own_template(model: str, tokenizer, thinking: bool = False) -> PromptTokenizer | None:
    """The prompts by the chat template that a checkpoint brings, None if it brings none. Raises UserError for one that cannot be used."""
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
        log.info("%s has no place for a system prompt: it begins the user's turn", name)
        fold_system = True
    prompts = PromptTokenizer(tokenizer, text, name, thinking, fold_system)
    if strange := strange_markers(prompts):
        log.warning("%s marks turns with %s, which are no tokens of its tokenizer", name, ", ".join(strange))
    return prompts


def strange_markers(prompts: PromptTokenizer) -> list[str]:
    """The markers in a prompt that are not single tokens."""
    markers = dict.fromkeys(MARKER.findall(prompts.render(SAMPLE)))
    return [marker for marker in markers if not is_token(prompts.tokenizer, marker)]


def is_token(tokenizer, text: str) -> bool:
    """Whether a tokenizer reads a text as one token, and as that one."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    return len(ids) == 1 and tokenizer.convert_ids_to_tokens(ids) == [text]


def fitting_templates(model: str, tokenizer) -> list[str]:
    """Those of template/*.jinja whose markers are tokens of a model, the likeliest first: by its markers, else by its name."""
    name = re.sub(r"[^a-z0-9]", "", "".join(Path(model).parts[-2:]).lower())
    ranked = []
    for path in sorted(FOLDER.glob("*.jinja")):
        text = path.read_text(encoding="utf-8")
        if strange_markers(PromptTokenizer(tokenizer, text)):
            continue
        has_markers = bool(MARKER.search(text))
        # Those without markers of that kind fit every tokenizer: they count only for models of the kind.
        of_its_kind = is_token(tokenizer, "[INST]") if path.stem == "mistral" else tokenizer.bos_token == "<s>"
        if not (has_markers or of_its_kind or path.stem in name):
            continue
        ranked.append((not has_markers, path.stem not in name, path.stem != "mistral", _shown(path)))
    return [shown for *_, shown in sorted(ranked)]


def recipe_template(model: str) -> Path | None:
    """The template file that a recipe here trains a model with, if `model` is the output folder of one (`DynamicRAG_llama3_8b/sft`)."""
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
