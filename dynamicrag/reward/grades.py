"""The judge's grades and their cost: five criteria of 0 to 20 points each, the reply formats that ask for them, and a strict
reader of the reply.
"""

from dataclasses import dataclass

import orjson

from dynamicrag.llm.endpoint import UnreadableReply

CRITERIA = ("correctness", "completeness", "relevance", "support", "clarity")
POINTS = 20
# Points are enumerated, because OpenAI refuses a range (minimum, maximum) for fine-tuned models, and strict modes of
# other vendors refuse it always. Every endpoint that accepts a schema accepts an enumeration.
SCHEMA = {
    "type": "object", "properties": {name: {"type": "integer", "enum": list(range(POINTS + 1))} for name in CRITERIA},
    "required": list(CRITERIA), "additionalProperties": False,
}
REPLY_FORMATS = {
    "json_schema": {"type": "json_schema", "json_schema": {"name": "grades", "strict": True, "schema": SCHEMA}},
    "json_object": {"type": "json_object"},
    "text": None,
}


class UnreadableGrade(UnreadableReply):
    """The judge's reply does not contain five numbers in range."""


def parse_grade(reply: str) -> float:
    """Return the sum of five grades of 0 to 20, divided by 100. Raises UnreadableGrade."""
    start, end = reply.find("{"), reply.rfind("}")
    try:
        grades = orjson.loads(reply[start : end + 1])
        points = [grades[criterion] for criterion in CRITERIA]
    except (orjson.JSONDecodeError, KeyError, TypeError) as error:
        raise UnreadableGrade(f"not a JSON object with {', '.join(CRITERIA)}: {reply!r}") from error
    for criterion, value in zip(CRITERIA, points, strict=True):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= POINTS:
            raise UnreadableGrade(f"{criterion} is {value!r}; expected a number from 0 to {POINTS}")
    return sum(points) / (POINTS * len(CRITERIA))


@dataclass
class JudgeUsage:
    """Counts of calls answered with HTTP 200, of cached prompts, and of tokens as far as replies report them."""

    calls: int = 0
    cached: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0

    def counts(self) -> dict[str, int | None]:
        """Return all counts. Token counts are None if no reply reported them."""
        tokens = ("prompt_tokens", "generated_tokens")
        return {name: None if name in tokens and self.calls and not value else value for name, value in vars(self).items()}
