"""What a judge is asked for, five grades of 0 to 20 points, and how its reply is read: strictly, in whatever form it was asked for."""

import orjson

from dynamicrag.llm.endpoint import UnreadableReply

CRITERIA = ("correctness", "completeness", "relevance", "support", "clarity")
POINTS = 20
# Points are enumerated: a range (minimum, maximum) is refused by OpenAI for fine-tuned models and by other vendors'
# strict modes always, while an endpoint that takes a schema takes an enumeration.
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
    """The judge's reply is not five numbers in range."""


def parse_grade(reply: str) -> float:
    """Five grades of 0 to 20 as their sum over 100. Raises UnreadableGrade."""
    start, end = reply.find("{"), reply.rfind("}")
    try:
        grades = orjson.loads(reply[start : end + 1])
        points = [grades[criterion] for criterion in CRITERIA]
    except (orjson.JSONDecodeError, KeyError, TypeError) as error:
        raise UnreadableGrade(f"not a JSON object with {', '.join(CRITERIA)}: {reply!r}") from error
    for criterion, value in zip(CRITERIA, points, strict=True):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= POINTS:
            raise UnreadableGrade(f"{criterion} is {value!r}, expected a number from 0 to {POINTS}")
    return sum(points) / (POINTS * len(CRITERIA))
