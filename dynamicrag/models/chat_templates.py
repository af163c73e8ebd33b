"""Chat templates, which are programs written by the authors of a model.

transformers renders them in Jinja's sandbox (ImmutableSandboxedEnvironment), which blocks access to files, modules and
object internals. The sandbox does not limit time and memory. They are limited here: before a model is loaded, its
template is rendered once in a separate process, which is killed when it exceeds the limits.
"""

import resource
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from dynamicrag.stage import UserError

Messages = list[dict[str, str]]  # turns of a conversation, each with its role and content

SECONDS = 10
MEMORY = 1 << 30  # bytes in addition to the current size of this process
MAX_SAID = 1000
SAMPLE = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Which river is the longest?"}]
TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}


def read_template(path: str) -> str:
    """Return the text of a chat template. Raises UserError if it cannot be read, is not Jinja, or omits the question."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: the chat template cannot be read ({error}); give another --template") from error
    try_template(text, path, SAMPLE)
    return text


def try_template(text: str, name: str, messages: Messages) -> None:
    """Render a chat template within limits.

    Raises UserError, starting with `name`, if it is not Jinja or omits the last message.
    """
    import transformers.utils.chat_template_utils  # noqa: F401 - imported here, so that the child process inherits it

    context = get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_try, args=(text, messages, sender), daemon=True)
    process.start()
    sender.close()
    try:
        if receiver.poll(SECONDS):
            said = receiver.recv_bytes(MAX_SAID)
        else:
            said = f": the chat template takes more than {SECONDS} s; give another template".encode()
    except EOFError:
        said = b": the chat template takes more memory than allowed; give another template"
    finally:
        process.kill()
        process.join()
        receiver.close()
    if said:
        raise UserError(f"{name}{said.decode(errors='replace')}")


def _try(text: str, messages: Messages, sender: Connection) -> None:
    """Send the error in the template, starting with its line if known; send nothing if the template is valid."""
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
    except Exception as error:  # a template is a program and may raise anything
        wrong = f": the chat template cannot be rendered: {type(error).__name__}: {error}"
    sender.send_bytes(wrong.encode(errors="replace")[:MAX_SAID])  # bytes, so that the receiver unpickles nothing


def fixed_options(template: str, thinking: bool = False) -> dict[str, Any]:
    """Return options that a template may use: the switch for reasoning, and a fixed date for Llama 3.1's template."""
    return {
        **({"enable_thinking": thinking} if "enable_thinking" in template else {}),
        **({"date_string": "26 Jul 2024"} if "date_string" in template else {}),
    }
