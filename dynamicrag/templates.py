"""Chat templates: files that are programs, written by whoever made the model.

transformers renders them in Jinja's sandbox (ImmutableSandboxedEnvironment), which has no way to files, modules or the
inside of objects. What a sandbox does not bound, time and memory, is bounded here, before a model is loaded: a template is
rendered once in a process of its own, which is ended where it takes more.
"""

import hashlib
import os
import resource
import threading
from array import array
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TypeVar

from dynamicrag.prompts import Messages, as_text
from dynamicrag.stage import UserError

Item, Result = TypeVar("Item"), TypeVar("Result")

SECONDS = 10
MEMORY = 1 << 30  # bytes beyond what this process has
MOST_SAID = 1000
# Tokens of the latest prompts that are kept, 4 bytes each: a chunk of 2000 prompts of 8192 tokens.
KEPT_TOKENS = 1 << 24
SAMPLE = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Which river is the longest?"}]
TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}


def read_template(path: str) -> str:
    """A chat template's text. Raises UserError where it cannot be read, is not Jinja, or does not write a question."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: the chat template cannot be read: {error}") from error
    try_template(text, path, SAMPLE)
    return text


def try_template(text: str, path: str, messages: Messages) -> None:
    """Render a chat template once in a process of its own. Raises UserError where it is not Jinja, or does not write the last message."""
    import transformers.utils.chat_template_utils  # noqa: F401 - here, so that the process does not load it anew

    context = get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_try, args=(text, messages, sender), daemon=True)
    process.start()
    sender.close()
    try:
        said = receiver.recv_bytes(MOST_SAID) if receiver.poll(SECONDS) else f": the chat template is not through after {SECONDS} s".encode()
    except EOFError:
        said = b": the chat template takes more memory than a prompt can"
    finally:
        process.kill()
        process.join()
        receiver.close()
    if said:
        raise UserError(f"{path}{said.decode(errors='replace')}")


def _try(text: str, messages: Messages, sender: Connection) -> None:
    """Send what is wrong with the template, beginning with its line where there is one; nothing where nothing is."""
    import jinja2
    from transformers.utils.chat_template_utils import render_jinja_template

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    wrong = ""
    try:
        [rendered], _ = render_jinja_template([messages], chat_template=text, add_generation_prompt=True, **TOKENS)
        if messages[-1]["content"] not in rendered:
            wrong = f": the chat template does not write the {messages[-1]['role']}'s turn"
    except jinja2.TemplateSyntaxError as error:
        wrong = f":{error.lineno}: not a Jinja template: {error.message}"
    except Exception as error:  # it is a program: it may raise whatever a program may
        wrong = f": the chat template cannot be rendered: {type(error).__name__}: {error}"
    sender.send_bytes(wrong.encode(errors="replace")[:MOST_SAID])  # bytes: nothing it says is unpickled


def forgeable(template: str, tokenizer) -> list[str]:
    """The special tokens with which this template marks turns, and which a document may hold as they are."""
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    written = {token for token in special if token in template} | {tokenizer.bos_token, tokenizer.eos_token} - {None}
    return sorted(token for token in written if as_text(token) == token)


class PromptTokenizer:
    """Messages as the token ids of a prompt, by one chat template and one tokenizer. May be called from several threads.

    A prompt is measured when its documents are chosen and needed again when it is sent: the ids of the latest prompts
    are kept, since a prompt of 5,000 tokens takes 10 ms.
    """

    def __init__(self, tokenizer, chat_template: str):
        from cachetools import LRUCache

        self.tokenizer, self.chat_template = tokenizer, chat_template
        self._kept: LRUCache = LRUCache(KEPT_TOKENS, getsizeof=len)
        self._lock = threading.Lock()

    def ids(self, messages: Messages) -> list[int]:
        """The token ids of a prompt, up to where the answer begins."""
        rendered = self.tokenizer.apply_chat_template(
            messages, chat_template=self.chat_template, add_generation_prompt=True, tokenize=False
        )
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
