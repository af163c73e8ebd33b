"""Replies of a server: read, cut at stop strings, and checked against the pattern of their request."""

import re
from dataclasses import replace

from dynamicrag.llm.completion import Request, Sample, after_reasoning
from dynamicrag.llm.completion_cache import Reply
from dynamicrag.llm.endpoint import UnreadableReply, gave_reasoning, tokens_of, usable


def single(request: Request, sample: int) -> Request:
    """Return one sample of a request as its own request."""
    return replace(request, n=1, seed=(request.seed + sample) & 0x7FFFFFFF)


def read_reply(reply, request: Request) -> Reply:
    """Convert a chat completion to a Reply. Malformed completions raise almost any exception."""
    samples = []
    for choice in reply.choices[: request.n]:
        message = choice.message
        refusal = getattr(message, "refusal", None)
        finish = choice.finish_reason if isinstance(choice.finish_reason, str) else None
        samples.append(Sample(usable(message.content), finish, gave_reasoning(message), f"the model declined: {refusal}" if refusal else None))
    if not samples:
        raise UnreadableReply("it has no choices")
    return samples, *tokens_of(reply)


def constrained(reply: Reply, pattern: str) -> bool:
    """Return whether every text that ended by itself matches the pattern."""
    texts = [after_reasoning(sample.text or "") for sample in reply[0] if sample.finish_reason == "stop"]
    return all(not text or re.fullmatch(pattern, text) for text in texts)


def cut(sample: Sample, stop: tuple[str, ...]) -> Sample:
    """Cut a sample at the first of the `stop` texts."""
    whole = sample.text or ""
    ends = [at for text in stop if (at := whole.find(text)) >= 0]
    return replace(sample, text=whole[: min(ends)], finish_reason="stop") if ends else sample
