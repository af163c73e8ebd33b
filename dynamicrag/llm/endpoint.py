"""OpenAI-compatible endpoints: addresses (stored in manifests), API keys (stored nowhere), errors and retries."""

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
PASSING_STATUSES = (408, 409, 425, 429)  # and every status of at least 500
MAX_SAID = 500
MAX_SHOWN = 100  # characters of a reply in an error message


class UnreadableReply(ValueError):
    """A reply with status 200 that is not a chat completion."""


def check_url(flag: str, url: str, variable: str) -> str:
    """Return the address without a trailing slash.

    Raises UserError if it has parts other than host, path and api-version.
    """
    if not BASE_URL.fullmatch(url):  # the URL is not shown, because it may contain a key
        raise UserError(
            f"{flag}: expected http(s)://host[:port][/path][?api-version=...] without user, password or other "
            f"parameters; the URL is stored in manifests, so put a key in the environment variable {variable}"
        )
    address, mark, query = url.partition("?")
    return address.rstrip("/") + mark + query


def read_key(*variables: str) -> str:
    """Return the value of the first of these environment variables that is set, or "".

    Raises UserError if it is not printable ASCII.
    """
    key = next(filter(None, map(os.environ.get, variables)), "").strip()
    if not re.fullmatch("[!-~]*", key):
        raise UserError(f"{' or '.join(variables)}: expected printable ASCII without spaces; correct the variable")
    return key


def without_key(text: str, key: str) -> str:
    """Return a server's text with the key replaced, because servers may repeat it."""
    return text.replace(key, "[key]") if key else text


def open_client(url: str, key: str, seconds: float, **options):
    """Return an openai.AsyncOpenAI client for a checked address, without its own retries.

    Azure gets the key in its own header.
    """
    import openai

    address, _, version = url.partition("?api-version=")
    if version:
        options |= {"default_query": {"api-version": version}, "default_headers": {"api-key": key} if key else None}
    return openai.AsyncOpenAI(base_url=address, api_key=key or "none", max_retries=0, timeout=seconds, **options)


def passes(error: BaseException) -> bool:
    """Return whether another attempt may help: the server is busy, broken or unreachable, or its reply cannot be read."""
    import openai

    if isinstance(error, openai.APIStatusError):
        # An exhausted quota has the same status as a rate limit, but does not recover.
        return error.code != "insufficient_quota" and (error.status_code in PASSING_STATUSES or error.status_code >= 500)
    return isinstance(error, openai.APIConnectionError | UnreadableReply | OSError)


def wait(state) -> float:
    """Return the seconds until the next attempt (for tenacity): the server's Retry-After plus a random exponential backoff."""
    from tenacity import wait_random_exponential

    retry_after = getattr(getattr(state.outcome.exception(), "response", None), "headers", {}).get("retry-after", "")
    seconds = 0.0
    with suppress(ValueError, OverflowError):
        seconds = float(retry_after) if re.fullmatch(r"[\d.]+", retry_after) else parsedate_to_datetime(retry_after).timestamp() - time.time()
    return min(max(seconds, 0), MAX_RETRY_AFTER_SECONDS) + wait_random_exponential(multiplier=0.5, max=MAX_WAIT_SECONDS)(state)


def refuse_foreign(flag: str, url: str, error: BaseException, reply: object, key: str) -> None:
    """Raise UserError if a reply with status 200 is a web page or other JSON, which means that the address is wrong.

    `reply` is the client's parsed reply, or None if parsing failed with `error`. Call this only for the first reply of
    a server: a server that has answered before may be behind a gateway that shows a page while it restarts.
    """
    import openai

    if reply is None and not isinstance(error, JSONDecodeError | UnicodeDecodeError | RecursionError | openai.APIResponseValidationError):
        return
    if getattr(reply, "choices", None) is not None or getattr(reply, "error", None):
        return
    came = getattr(error, "doc", "") if reply is None else getattr(reply, "to_dict", lambda: reply)()
    raise UserError(
        f"{flag} {url}: expected a chat completion, found {without_key(str(came), key)[:MAX_SHOWN]!r}; give the "
        "address of an OpenAI-compatible server, which usually ends in /v1"
    ) from error


def reason_of(error: BaseException, key: str, seconds: float) -> str:
    """Describe the error of a call with a timeout of `seconds`, without the key and with limited length."""
    import openai

    if isinstance(error, openai.APIStatusError):
        message = error.body.get("message") if isinstance(error.body, dict) else None
        reason = f"HTTP {error.status_code}: {message if isinstance(message, str) else repr(error.body)}"
    elif isinstance(error, TimeoutError | openai.APITimeoutError):
        reason = f"no complete reply within {seconds:g} s"
    elif isinstance(error, openai.APIConnectionError):
        reason = f"no connection ({error.__cause__ or error})"
    else:
        reason = str(error)
    return without_key(reason, key)[:MAX_SAID]  # cut after the replacement, so that no part of the key remains


def tokens_of(reply: object) -> tuple[int | None, int | None]:
    """Return the prompt tokens and generated tokens of a reply; None if not given. A prompt count of 0 means not given."""
    usage = getattr(reply, "usage", None)
    counts = [getattr(usage, name, None) for name in ("prompt_tokens", "completion_tokens")]
    prompt, generated = (value if type(value) is int and value >= 0 else None for value in counts)
    return (prompt, generated) if prompt else (None, generated or None)


def gave_reasoning(message: object) -> bool:
    """Return whether the server returned the model's reasoning in a separate field, which has two possible names."""
    return bool(getattr(message, "reasoning_content", None) or getattr(message, "reasoning", None))


def usable(text: object) -> str | None:
    """Return the text of a message, or the joined text parts of a list; None if there is none. Raises UnreadableReply."""
    if isinstance(text, list) and text and all(isinstance(part, dict) for part in text):
        text = "".join(part["text"] for part in text if part.get("type") == "text" and isinstance(part.get("text"), str)) or None
    if not isinstance(text, str | None):
        raise UnreadableReply(f"its content is {text!r:.100}")
    return text.encode(errors="replace").decode() if text else text  # JSON allows lone surrogates, text does not
