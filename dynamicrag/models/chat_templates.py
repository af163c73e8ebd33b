"""Chat templates: files that are programs, written by whoever made the model.

transformers renders them in Jinja's sandbox (ImmutableSandboxedEnvironment), which has no way to files, modules or the
inside of objects. What a sandbox does not bound, time and memory, is bounded here, before a model is loaded: a template is
rendered once in a process of its own, which is ended where it takes more.
"""

import resource
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

from dynamicrag.stage import UserError

Messages = list[dict[str, str]]  # turns of a conversation, each with its role and content

SECONDS = 10
MEMORY = 1 << 30  # bytes beyond what this process has
MOST_SAID = 1000
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


def try_template(text: str, name: str, messages: Messages) -> None:
    """Render a chat template within bounds. Raises UserError, with `name`, if it is not Jinja or does not write the last message."""
    import transformers.utils.chat_template_utils  # noqa: F401 - here, so that the process does not load it again

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
        raise UserError(f"{name}{said.decode(errors='replace')}")


def _try(text: str, messages: Messages, sender: Connection) -> None:
    """Send what is wrong with the template, beginning with its line where there is one; nothing where nothing is."""
    import jinja2
    from transformers.utils.chat_template_utils import render_jinja_template

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    wrong = ""
    try:
        [rendered], _ = render_jinja_template([messages], chat_template=text, add_generation_prompt=True, **TOKENS, **fixed_options(text))
        if messages[-1]["content"] not in rendered:
            wrong = f": the chat template does not write the {messages[-1]['role']}'s turn"
    except jinja2.TemplateSyntaxError as error:
        wrong = f":{error.lineno}: not a Jinja template: {error.message}"
    except Exception as error:  # it is a program: it may raise whatever a program may
        wrong = f": the chat template cannot be rendered: {type(error).__name__}: {error}"
    sender.send_bytes(wrong.encode(errors="replace")[:MOST_SAID])  # bytes: nothing it says is unpickled


def fixed_options(template: str, thinking: bool = False) -> dict[str, object]:
    """What a template may ask for: the switch of reasoning, and the date that Llama 3.1's writes where it has no clock."""
    return {
        **({"enable_thinking": thinking} if "enable_thinking" in template else {}),
        **({"date_string": "26 Jul 2024"} if "date_string" in template else {}),
    }
