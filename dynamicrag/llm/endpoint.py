"""OpenAI-compatible endpoints: their address, which is written to manifests, their key, which is written nowhere, and retries."""

import os
import re
import time
from contextlib import suppress
from email.utils import parsedate_to_datetime
from json import JSONDecodeError

from dynamicrag.stage import UserError

BASE_URL = re.compile(
    r"https?://(\[[0-9a-f:.]+\]|[^\s/?#@:\[\]]+)(:\d{1,5})?(/[^\s?#]*)?(\?api-version=[\w.-]{1,40})?", re.IGNORECASE | re.ASCII
)
ATTEMPTS = 8
MAX_WAIT_SECONDS = 30
MAX_RETRY_AFTER_SECONDS = 120
PASSING_STATUSES = (408, 409, 425, 429)  # and all from 500
MOST_SAID = 500
MOST_SHOWN = 100  # characters of a reply


class UnreadableReply(ValueError):
    """A reply with status 200 that is not what was asked for."""


def check_url(flag: str, url: str, variable: str) -> str:
    """The address without a slash at its end. Raises UserError for one with more than host, path and Azure's api-version."""
    if not BASE_URL.fullmatch(url):  # not shown: what is wrong with it may be the key
        raise UserError(
            f"{flag}: expected http(s)://host[:port][/path][?api-version=...] without user, password or another query, as it is "
            f"written to manifests: a key belongs in the environment variable {variable}"
        )
    address, mark, query = url.partition("?")
    return address.rstrip("/") + mark + query


def read_key(*variables: str) -> str:
    """The key of the first of these environment variables that has one, else none. Raises UserError for what no header can hold."""
    key = next(filter(None, map(os.environ.get, variables)), "").strip()
    if not re.fullmatch("[!-~]*", key):
        raise UserError(f"{' or '.join(variables)}: expected printable ASCII without spaces")
    return key


def without_key(text: str, key: str) -> str:
    """What a server said, which may repeat the key."""
    return text.replace(key, "[key]") if key else text


def open_client(url: str, key: str, seconds: float, **options):
    """An openai.AsyncOpenAI of a checked address, without retries of its own. Azure takes the key in a header of its own."""
    import openai

    address, _, version = url.partition("?api-version=")
    if version:
        options |= {"default_query": {"api-version": version}, "default_headers": {"api-key": key} if key else None}
    return openai.AsyncOpenAI(base_url=address, api_key=key or "none", max_retries=0, timeout=seconds, **options)


def passes(error: BaseException) -> bool:
    """Whether another try may help: the server is busy or broken, cannot be reached, or replied with something else."""
    import openai

    if isinstance(error, openai.APIStatusError):
        # A quota that is used up has the status of a rate that is too high, and stays used up.
        return error.code != "insufficient_quota" and (error.status_code in PASSING_STATUSES or error.status_code >= 500)
    return isinstance(error, openai.APIConnectionError | UnreadableReply | OSError)


def wait(state) -> float:
    """Seconds to the next try (of a tenacity state): what the server asks for, and a random time under a bound that doubles."""
    from tenacity import wait_random_exponential

    asked = getattr(getattr(state.outcome.exception(), "response", None), "headers", {}).get("retry-after", "")
    seconds = 0.0
    with suppress(ValueError, OverflowError):
        seconds = float(asked) if re.fullmatch(r"[\d.]+", asked) else parsedate_to_datetime(asked).timestamp() - time.time()
    return min(max(seconds, 0), MAX_RETRY_AFTER_SECONDS) + wait_random_exponential(multiplier=0.5, max=MAX_WAIT_SECONDS)(state)


def refuse_foreign(flag: str, url: str, error: BaseException, reply: object, key: str) -> None:
    """Raises UserError for a reply with status 200 that no chat endpoint sends, a page or other JSON: the address is wrong.

    `reply` is what the client made of it; None if it could make nothing of it, for `error`. For the first reply of a server alone:
    one that has answered before may well be behind a gateway that shows a page while it restarts.
    """
    import openai

    if reply is None and not isinstance(error, JSONDecodeError | UnicodeDecodeError | RecursionError | openai.APIResponseValidationError):
        return
    if getattr(reply, "choices", None) is not None or getattr(reply, "error", None):
        return
    came = getattr(error, "doc", "") if reply is None else getattr(reply, "to_dict", lambda: reply)()
    raise UserError(
        f"{flag} {url}: its first reply is no chat completion, but {without_key(str(came), key)[:MOST_SHOWN]!r}; give the address of an "
        "OpenAI-compatible server, which mostly ends in /v1"
    ) from error


def reason_of(error: BaseException, key: str, seconds: float) -> str:
    """What went wrong with a call that may take `seconds`, without the key and of bounded length."""
    import openai

    if isinstance(error, openai.APIStatusError):
        message = error.body.get("message") if isinstance(error.body, dict) else None
        reason = f"HTTP {error.status_code}: {message if isinstance(message, str) else repr(error.body)}"
    elif isinstance(error, TimeoutError | openai.APITimeoutError):
        reason = f"no whole reply within {seconds:g} s"
    elif isinstance(error, openai.APIConnectionError):
        reason = f"no connection ({error.__cause__ or error})"
    else:
        reason = str(error)
    return without_key(reason, key)[:MOST_SAID]  # cut last, so that no half of the key is left


def tokens_of(reply: object) -> tuple[int | None, int | None]:
    """Tokens of the prompt and tokens generated, as a reply gives them; None if it does not: no prompt has 0."""
    counts = [getattr(reply.usage, name, None) for name in ("prompt_tokens", "completion_tokens")]
    prompt, generated = (value if type(value) is int and value >= 0 else None for value in counts)
    return (prompt, generated) if prompt else (None, generated or None)


def gave_reasoning(message: object) -> bool:
    """Whether a server has split a model's reasoning off, into a field of its own; the field has two names."""
    return bool(getattr(message, "reasoning_content", None) or getattr(message, "reasoning", None))


def usable(text: object) -> str | None:
    """The text of a message: as it is, or the text parts of a list of parts; None if there is none. Raises UnreadableReply."""
    if isinstance(text, list) and text and all(isinstance(part, dict) for part in text):
        text = "".join(part["text"] for part in text if part.get("type") == "text" and isinstance(part.get("text"), str)) or None
    if not isinstance(text, str | None):
        raise UnreadableReply(f"its content is {text!r:.100}")
    return text.encode(errors="replace").decode() if text else text  # half a surrogate pair, which JSON allows, is no text
