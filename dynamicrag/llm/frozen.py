"""A generator that does not change: equal requests are answered once, in this run and after an interruption."""

from pathlib import Path
from typing import Any

from dynamicrag.llm.completion import Completion, Request, Sample, Usage
from dynamicrag.llm.completion_cache import CompletionCache, Reply, key_of
from dynamicrag.models.chat_templates import Messages


class FrozenEngine:
    """An engine (fits, complete) that keeps the answers of another one in a file. Each request asks for one greedy text.

    A request is built from the question and its documents in their order, so that it stands for both. Refusals are not
    kept: they cost nothing, and a server may answer the next time.
    """

    def __init__(self, engine: Any, output: str | Path, model: str):
        self._engine, self._model = engine, model
        self.cache = CompletionCache(output)
        self.asked = 0  # requests of this run, with those that were answered before
        self.max_model_len = getattr(engine, "max_model_len", None)

    def fits(self, messages: Messages, max_tokens: int) -> bool:
        """Return whether the prompt leaves room for max_tokens in the engine's window."""
        return self._engine.fits(messages, max_tokens)

    def complete(self, requests: list[Request]) -> list[Completion]:
        """Answer the requests that are not answered yet as one batch, and return all completions in order."""
        self.asked += len(requests)
        keys = [key_of(self._model, request) for request in requests]
        missing = {key: request for key, request in zip(keys, requests, strict=True) if self.cache.get(key) is None}
        given = dict(zip(missing, self._engine.complete(list(missing.values())) if missing else [], strict=True))
        for key, completion in given.items():
            if completion.answered:
                self.cache.put(key, _reply_of(completion))
        return [_completion_of(kept) if (kept := self.cache.get(key)) is not None else given[key] for key in keys]

    @property
    def usage(self) -> Usage:
        """The cost of all answers that are kept."""
        usage = Usage()
        for reply in self.cache.all():
            usage.add(_completion_of(reply))
        return usage


def _reply_of(completion: Completion) -> Reply:
    finish = "length" if completion.cut_off else "stop"
    return [Sample(completion.texts[0], finish, refusal=completion.unreadable.get(0))], completion.prompt_tokens, completion.generated_tokens


def _completion_of(reply: Reply) -> Completion:
    [sample], prompt_tokens, generated_tokens = reply
    unreadable = {0: sample.refusal} if sample.refusal else {}
    return Completion([sample.text or ""], prompt_tokens, generated_tokens, unreadable, frozenset({0} if sample.finish_reason == "length" else ()))
