"""Requests to an LLM and their completions: the text without reasoning, or the reason why there is none.

Both engines use this module, so that every stage treats reasoning, token limits and refusals in the same way.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from dynamicrag.models.chat_templates import Messages

_REASONING = r"(?:think|thinking|reasoning)"
OPENS = re.compile(rf"<\s*{_REASONING}\s*>|\[THINK\]", re.IGNORECASE)
CLOSES = re.compile(rf"<\s*/\s*{_REASONING}\s*>|\[/THINK\]", re.IGNORECASE)
# Finish reasons that the model did not choose, apart from the token limit.
_BROKEN_OFF = {"content_filter": "withheld by a content filter", "abort": "aborted by the engine", "error": "ended by an error of the engine"}


@dataclass(frozen=True)
class Request:
    """One prompt. If the last message is an assistant's, the output continues it.

    `pattern` is a regular expression that the output must match, or None. The output ends before any text of `stop`.
    `limit` is the flag that sets max_tokens, for messages.
    """

    messages: Messages
    seed: int
    max_tokens: int
    n: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    pattern: str | None = None
    stop: tuple[str, ...] = ()
    limit: str = "--answer-max-tokens"


@dataclass(frozen=True)
class Sample:
    """One raw output.

    `reasoned` means that the server returned reasoning separately; `refusal` is the reason for a missing text.
    """

    text: str | None
    finish_reason: str | None = "stop"
    reasoned: bool = False
    refusal: str | None = None


@dataclass(frozen=True)
class Completion:
    """The result of one request: `n` texts (stripped, without reasoning) and their cost in tokens (None if not known).

    `unreadable` maps the number of a sample without text to the reason. `cut_off` holds the samples that ended at the
    token limit. A request that was not `answered` was refused, by the server or because it is too long, and cost
    nothing.
    """

    texts: list[str] = field(default_factory=list)
    prompt_tokens: int | None = 0
    generated_tokens: int | None = 0
    unreadable: dict[int, str] = field(default_factory=dict)
    cut_off: frozenset[int] = frozenset()
    answered: bool = True

    def reason(self, what: str, sample: int = 0) -> str:
        """Return why a sample has no text, for an output called `what` (such as "answer"); "" if it has one."""
        reason = self.unreadable.get(sample, "")
        return f"no {what} in the model's output: {reason}" if reason and self.answered else reason


@dataclass
class Usage:
    """The cost of a row so far. A count is None if the server did not report the tokens of one of the calls."""

    calls: int = 0
    prompt_tokens: int | None = 0
    generated_tokens: int | None = 0

    def add(self, completion: Completion) -> None:
        self.calls += completion.answered
        self.prompt_tokens = known_sum([self.prompt_tokens, completion.prompt_tokens])
        self.generated_tokens = known_sum([self.generated_tokens, completion.generated_tokens])


def known_sum(counts: Iterable[int | None]) -> int | None:
    """Return the sum, or None if one of the counts is None."""
    counts = list(counts)
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None


def after_reasoning(text: str, opened: bool = False) -> str | None:
    """Return the text after the model's reasoning, stripped; None if there is only reasoning.

    Reasoning is enclosed in <think>, <thinking>, <reasoning> or [THINK] tags. A template may write the opening tag
    itself: everything up to the closing tag is then reasoning. With `opened`, a text without any tag is reasoning too.
    Nothing follows an unclosed block.
    """
    if leaves_open(text, opened):
        return None
    *_, rest = CLOSES.split(text)
    return rest.strip() or (None if CLOSES.search(text) else "")


def leaves_open(text: str, opened: bool = False) -> bool:
    """Return whether the text ends inside reasoning. `opened` means that it starts inside reasoning."""
    *before, rest = CLOSES.split(text)
    return bool(OPENS.search(rest)) or (opened and not before)


def opens_itself(text: str) -> bool:
    """Return whether the text closes reasoning that it did not open, because the chat template wrote the opening tag."""
    closing = CLOSES.search(text)
    return bool(closing) and not OPENS.search(text, 0, closing.start())


def read_sample(sample: Sample, max_tokens: int, opened: bool = False) -> tuple[str, str]:
    """Return (text, "") for a sample that can be read, or ("", reason)."""
    cut_off = f"cut off after {max_tokens} tokens" if sample.finish_reason == "length" else ""
    if sample.refusal:
        return "", sample.refusal
    if sample.finish_reason in _BROKEN_OFF:
        return "", _BROKEN_OFF[sample.finish_reason]
    text = after_reasoning(sample.text or "", opened)
    if text:
        return text, ""
    if text is None or sample.reasoned:
        return "", f"{cut_off}, all of them reasoning" if cut_off else "nothing follows its reasoning"
    if cut_off:
        return "", f"{cut_off}, before any text"
    return "", "the reply has no text" if sample.text is None else ""


def completion_of(
    samples: list[Sample], request: Request, prompt_tokens: int | None = 0, generated_tokens: int | None = 0, opened: bool = False
) -> Completion:
    """Return the completion of a request. `opened` means that its prompt ends with the tag that opens reasoning."""
    # An output under a pattern contains no reasoning, unless the engine constrains only the part after the closing tag.
    read = [read_sample(sample, request.max_tokens, opened and not request.pattern) for sample in samples]
    return Completion(
        [text for text, _ in read], prompt_tokens, generated_tokens,
        {number: reason for number, (_, reason) in enumerate(read) if reason},
        frozenset(number for number, sample in enumerate(samples) if sample.finish_reason == "length"),
    )


def refused(request: Request, reason: str) -> Completion:
    """Return the completion of a request that was refused, at no cost."""
    return Completion([""] * request.n, unreadable=dict.fromkeys(range(request.n), reason), answered=False)
