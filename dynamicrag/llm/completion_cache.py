"""A cache of completions on disk, so that no call to a server is paid for twice after an interruption.

Rows are written in chunks, and a chunk needs several calls per question. Each reply is therefore appended to
`<output>.partial.completions.jsonl` when it arrives. The file is removed when the run is finished.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import astuple
from pathlib import Path

import orjson

from dynamicrag.files.atomic import naming
from dynamicrag.llm.completion import Request, Sample

Reply = tuple[list[Sample], int | None, int | None]  # samples, prompt tokens, generated tokens (None if not known)


class CompletionCache:
    """The replies of one run by request, in a file. The file is opened at the first get() or put()."""

    def __init__(self, output: str | Path):
        self.path = Path(f"{output}.partial.completions.jsonl")
        self._replies: dict[str, Reply] | None = None
        self._file = None

    def get(self, key: str) -> Reply | None:
        if self._replies is None:
            self._replies = self._read()
        return self._replies.get(key)

    def put(self, key: str, reply: Reply) -> None:
        """Add a reply. When this returns, the reply survives a kill. Raises OSError, naming the file."""
        samples, *tokens = reply
        line = orjson.dumps([key, [astuple(sample) for sample in samples], *tokens])
        with naming(self.path):
            if self._file is None:
                self._file = self.path.open("ab", buffering=0)
                line = b"\n" + line  # a kill may have left an incomplete line
            self._file.write(line + b"\n")
        if self._replies is not None:
            self._replies[key] = reply

    def all(self) -> Iterable[Reply]:
        """Return every reply, those of an interrupted run too."""
        if self._replies is None:
            self._replies = self._read()
        return self._replies.values()

    def remove(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file = self._replies = None
        self.path.unlink(missing_ok=True)

    def _read(self) -> dict[str, Reply]:
        """Read the replies. Incomplete or invalid lines are ignored, and their requests are sent again."""
        replies: dict[str, Reply] = {}
        if self.path.is_file():
            with self.path.open("rb") as file:
                for line in file:
                    try:
                        key, samples, prompt_tokens, generated_tokens = orjson.loads(line)
                        read = [Sample(*sample) for sample in samples]
                    except (ValueError, TypeError):
                        continue
                    if all(isinstance(sample.text, str | None) for sample in read) and all(type(count) in (int, type(None)) for count in (prompt_tokens, generated_tokens)):
                        replies[str(key)] = read, prompt_tokens, generated_tokens
        return replies


def key_of(model: str, request: Request, *more: object) -> str:
    """Return the cache key: a hash of the model and every part of the request.

    The address of the server is not included.
    """
    parts = [model, request.messages, request.seed, request.max_tokens, request.n, request.temperature, request.top_p, request.pattern, request.stop, *more]
    return hashlib.blake2b(orjson.dumps(parts), digest_size=16).hexdigest()
