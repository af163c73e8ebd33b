"""Refusals of requests: the key, the size and the form of a body. A refusal never repeats a key, a path or a stack trace."""

import asyncio
import hmac
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from dynamicrag.llm.endpoint import read_key
from dynamicrag.stage import UserError

if TYPE_CHECKING:
    from pydantic import BaseModel
    from starlette.requests import Request

Body = TypeVar("Body", bound="BaseModel")
BODY_SECONDS = 30  # in which a client must have sent its body
MAX_ERRORS = 5  # errors of a body that a reply names
KEY_VARIABLE = "SERVE_API_KEY"


class Refusal(Exception):
    """A request that is not answered: HTTP status, a short name for programs, a message for people, headers."""

    def __init__(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None):
        super().__init__(message)
        self.status, self.code, self.message, self.headers = status, code, message, dict(headers or {})

    def content(self) -> dict[str, object]:
        """Return the body of the reply: `error` as OpenAI's clients read it, `message` as Cohere's do."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": None, "code": self.code}, "message": self.message}


def read_keys(path: str | None) -> list[bytes]:
    """Return the keys that the server accepts: the lines of a file, or else SERVE_API_KEY; none if every client is accepted.

    Raises UserError if the file cannot be read, has no key, or a key is not printable ASCII.
    """
    if path is None:
        key = read_key(KEY_VARIABLE)
        return [key.encode()] if key else []
    try:
        keys = Path(path).read_text(encoding="utf-8").split()
    except (OSError, ValueError) as error:
        raise UserError(f"--api-key-file: {path}: cannot be read ({type(error).__name__}); give a text file with one key per line") from error
    if not keys or not all(key.isascii() and key.isprintable() for key in keys):
        raise UserError(f"--api-key-file: {path}: expected one key of printable ASCII per line; correct the file")
    return [key.encode() for key in keys]


def check_key(request: "Request", keys: Sequence[bytes]) -> None:
    """Raise Refusal if the server has keys and the request has none of them. Every key is compared, each in constant time."""
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    matches = [hmac.compare_digest(key, given.strip().encode("utf-8", "replace")) for key in keys]
    if keys and not (scheme.lower() == "bearer" and any(matches)):
        raise Refusal(401, "invalid_api_key", "the key is missing or wrong; send it as Authorization: Bearer KEY", {"WWW-Authenticate": "Bearer"})


async def read_body(request: "Request", kind: type[Body], limit: int) -> Body:
    """Return the body of a request, of at most `limit` bytes. Raises Refusal: 408, 413, 415, 400 for JSON, 422 for its form."""
    from pydantic import ValidationError

    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refusal(415, "unsupported_media_type", "expected Content-Type: application/json")
    too_large = Refusal(413, "body_too_large", f"the body has more than {limit} bytes, the limit of this server")
    length = request.headers.get("content-length", "")
    if length.isascii() and length.isdigit() and (len(length) > 15 or int(length) > limit):
        raise too_large
    data = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                data += chunk
                if len(data) > limit:
                    raise too_large
    except TimeoutError as error:
        raise Refusal(408, "timeout", f"the body did not arrive within {BODY_SECONDS} s") from error
    try:
        return kind.model_validate_json(bytes(data))
    except ValidationError as error:
        errors = error.errors(include_url=False, include_context=False, include_input=False)
    if errors[0]["type"] == "json_invalid":
        raise Refusal(400, "invalid_json", "the body is not valid JSON")
    named = "; ".join(f"{'.'.join(map(str, one['loc'])) or 'body'}: {one['msg']}" for one in errors[:MAX_ERRORS])
    raise Refusal(422, "invalid_request", named[:1000])
