"""Requests to an LLM and what came back: texts without the model's reasoning, and why a text cannot be read.

Both engines end here, so that every stage reads a reasoning model, a limit of tokens and a refusal in the same way.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from dynamicrag.models.chat_templates import Messages

_REASONING = r"(?:think|thinking|reasoning)"
OPENS = re.compile(rf"<\s*{_REASONING}\s*>|\[THINK\]", re.IGNORECASE)
CLOSES = re.compile(rf"<\s*/\s*{_REASONING}\s*>|\[/THINK\]", re.IGNORECASE)
# Ends that the model did not choose, besides the limit of tokens.
_BROKEN_OFF = {"content_filter": "withheld by a content filter", "abort": "aborted by the engine", "error": "ended by an error of the engine"}


@dataclass(frozen=True)
class Request:
    """One prompt; the output begins after an assistant's message at its end, if there is one.

    `pattern` is a regular expression the output must match; None leaves it free. The texts of `stop` end the output, and are no
    part of it. `limit` is the flag of max_tokens.
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
    """One text as the engine or the server gave it. `reasoned`: it gave reasoning apart from it; `refusal`: why there is none."""

    text: str | None
    finish_reason: str | None = "stop"
    reasoned: bool = False
    refusal: str | None = None


@dataclass(frozen=True)
class Completion:
    """What came back for one request: `n` texts (stripped, without reasoning), and the tokens they cost; None if that is not known.

    A sample in `unreadable` has no text, and the reason why; those in `cut_off` ended at the limit of tokens. A request that
    was not `answered` was refused, by the server or as too long, and cost nothing.
    """

    texts: list[str] = field(default_factory=list)
    prompt_tokens: int | None = 0
    generated_tokens: int | None = 0
    unreadable: dict[int, str] = field(default_factory=dict)
    cut_off: frozenset[int] = frozenset()
    answered: bool = True

    def reason(self, what: str, sample: int = 0) -> str:
        """Why a sample cannot be read as `what` ("answer"), or "" if it can."""
        reason = self.unreadable.get(sample, "")
        return f"no {what} in the model's output: {reason}" if reason and self.answered else reason


@dataclass
class Usage:
    """What a row has cost so far; None if a server does not say how many tokens one of the calls cost."""

    calls: int = 0
    prompt_tokens: int | None = 0
    generated_tokens: int | None = 0

    def add(self, completion: Completion) -> None:
        self.calls += completion.answered
        self.prompt_tokens = known_sum([self.prompt_tokens, completion.prompt_tokens])
        self.generated_tokens = known_sum([self.generated_tokens, completion.generated_tokens])


def known_sum(counts: Iterable[int | None]) -> int | None:
    """The sum; None if one of the numbers is not known."""
    counts = list(counts)
    return None if None in counts else sum(counts)


def after_reasoning(text: str, opened: bool = False) -> str | None:
    """What a text says after its reasoning, stripped; None if it has reasoning and nothing after it.

    Reasoning stands in <think>, <thinking>, <reasoning> or [THINK]. A template may write the opening tag itself: then all
    up to the closing tag is reasoning, and with `opened` all of a text that has none. A block that is not closed has
    nothing after it.
    """
    if leaves_open(text, opened):
        return None
    *_, rest = CLOSES.split(text)
    return rest.strip() or (None if CLOSES.search(text) else "")


def leaves_open(text: str, opened: bool = False) -> bool:
    """Whether reasoning is open at the end of a text; `opened`: it was at its beginning."""
    *before, rest = CLOSES.split(text)
    return bool(OPENS.search(rest)) or (opened and not before)


def opens_itself(text: str) -> bool:
    """Whether a text ends reasoning that it does not begin: the chat template has written the opening tag."""
    closing = CLOSES.search(text)
    return bool(closing) and not OPENS.search(text, 0, closing.start())


def read_sample(sample: Sample, max_tokens: int, opened: bool = False) -> tuple[str, str]:
    """The text of a sample and "", or "" and the reason why it cannot be read."""
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
    """The completion of a request. `opened`: its prompt ends with the tag that opens reasoning."""
    # What a pattern constrains holds no reasoning, unless the engine constrains only what follows it: then it is closed.
    read = [read_sample(sample, request.max_tokens, opened and not request.pattern) for sample in samples]
    return Completion(
        [text for text, _ in read], prompt_tokens, generated_tokens,
        {number: reason for number, (_, reason) in enumerate(read) if reason},
        frozenset(number for number, sample in enumerate(samples) if sample.finish_reason == "length"),
    )


def refused(request: Request, reason: str) -> Completion:
    """The completion of a request that was not answered, at no cost."""
    return Completion([""] * request.n, unreadable=dict.fromkeys(range(request.n), reason), answered=False)
