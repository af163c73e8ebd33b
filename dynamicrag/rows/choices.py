"""Multiple choice: read the choices of a row, add them to its question, and find the choice that a response names.

ARC (Clark et al. 2018) labels choices A to E, and those of some questions 1 to 4.
"""

import re
import string
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from dynamicrag.rows.text import composed

# Labels that are also words: "A" before another word is an article, and "I" is a pronoun, unless a reason follows.
AMBIGUOUS = ("A", "I")
_OPEN, _CLOSE = r"[\s\"'(\[{*_$]*", r"(?![\w']|[-.,]\w)"
_REASON = re.compile(r"\s+(?:because|since|as|is)\b", re.IGNORECASE)
_STATEMENT = (
    r"(?:\\boxed(?=\{)|\b(?:(?:choose|pick|select|it is|it's)\s|(?:answer|choice|option)\b))[\s*_]*"
    r"(?:is|was|are|would be|should be|must be|[:=])?[\s*_]*(?:(?:most likely|probably|clearly|therefore|thus|indeed)\s+)?[:=]?\s*(?:the\s+)?(?:(?:choice|option|letter|number)\s+)?"
)
_LISTED = re.compile(r"^[ \t]*[(\[]?([A-Za-z]|\d)[)\].:][ \t]+(\S.*)$", re.MULTILINE)


class Choice(NamedTuple):
    label: str
    text: str


def choices_of(row: Mapping) -> list[Choice]:
    """Return the choices in the row's key `choices`; an empty list if the row has no such key.

    Accepted forms are ARC's {"text": [...], "label": [...]}, a list of texts, a list of {"text", "label"}, and
    {label: text}. Choices without labels get A, B, C, ... Raises ValueError for any other form.
    """
    texts = row.get("choices")
    if texts is None:
        return []
    labels: Sequence | None = None
    if isinstance(texts, dict) and isinstance(texts.get("text"), list):
        texts, labels = texts["text"], texts.get("label")
    elif isinstance(texts, dict) and all(re.fullmatch(r"[A-Za-z]|\d", label) for label in texts):
        texts, labels = list(texts.values()), list(texts)
    elif isinstance(texts, list) and texts and all(isinstance(choice, dict) and {"text", "label"} <= choice.keys() for choice in texts):
        texts, labels = [choice["text"] for choice in texts], [choice["label"] for choice in texts]
    if labels is None and isinstance(texts, list):
        labels = list(string.ascii_uppercase[: len(texts)])
    if (
        not isinstance(texts, list) or not isinstance(labels, list) or len(labels) != len(texts)
        or not all(type(value) in (str, int, float) and str(value).strip() for value in (*texts, *labels))
        or len({str(label).casefold() for label in labels}) != len(labels)
    ):
        raise ValueError('expected {"text": [...], "label": [...]}, a list of texts, or a list of {"text", "label"}')
    return [Choice(str(label).strip(), str(text).strip()) for label, text in zip(labels, texts, strict=True)]


def shown_choices(row: Mapping) -> list[Choice]:
    """Return the choices in the row's key `choices`, or else those that its question lists, one per line ("A: iron", "(B) wood")."""
    try:
        if choices := choices_of(row):
            return choices
    except ValueError:
        pass
    listed = [Choice(label, text.strip()) for label, text in _LISTED.findall(row.get("question") or "")]
    labels = "".join(choice.label.upper() for choice in listed)
    in_order = len(labels) > 1 and (string.ascii_uppercase.startswith(labels) or "123456789".startswith(labels))
    return listed if in_order else []


def with_choices(question: str, choices: Sequence[Choice]) -> str:
    """Append the choices to the question, one per line ("A: iron").

    A question that already shows all of them is returned unchanged.
    """
    shown = " ".join(question.split()).casefold()

    def is_shown(choice: Choice) -> bool:
        label, text = (" ".join(part.split()).casefold() for part in choice)
        return f"{label}: {text}" in shown or re.search(rf"(?<!\w){re.escape(label)}[)\].:\-]+ ?{re.escape(text)}", shown) is not None

    if not choices or all(map(is_shown, choices)):
        return question
    return "\n".join([question, *(f"{label}: {text}" for label, text in choices)])


def gold_label(answer: str, choices: Sequence[Choice]) -> str | None:
    """Return the label that a gold answer gives, directly or as the text of a choice; None if it matches no choice.

    If the choices are not known, a single letter or digit counts as a label.
    """
    bare = _bare(answer)
    by_label = {choice.label.casefold(): choice.label for choice in choices}
    by_text = {_bare(choice.text): choice.label for choice in choices}
    if choices:
        return by_label.get(bare) or by_text.get(bare) or _same_place(bare, choices)
    return bare.upper() if re.fullmatch(r"[a-z]|\d", bare) else None


def chosen_label(response: str, gold: str, choices: Sequence[Choice]) -> str | None:
    """Return the label of the choice that a response names, or None.

    If no choices are known, `gold` gives the kind of label. The rules apply in this order: a label at the start of the
    response that is marked as one ("(C)", "C.", "C"); the last label that the response states ("the answer is C"); a
    response that equals the text of a choice; a label before other words, except the article "A"; the only choice whose
    text occurs in the response; the only label in brackets. If the choices are known, a lone letter or digit of the
    other kind stands for a position: C is 3, and 3 is C.
    """
    text = composed(response).strip()
    bare = _bare(text)
    labels = {choice.label.casefold(): choice.label for choice in choices}
    one = "|".join(map(re.escape, sorted(labels, key=len, reverse=True))) or (r"\d" if gold.isdigit() else "[A-Za-z]")
    label = rf"(?P<label>{one}){_CLOSE}"

    def named(match: re.Match) -> str:
        given = str(match["label"])
        return labels.get(given.casefold(), given.upper())

    def is_word(match: re.Match) -> bool:
        """Return whether "A", "a" or "I" is an ordinary word: another word follows and nothing marks it as a label."""
        after = text[match.end() :]
        return match["label"].upper() in AMBIGUOUS and re.match(r"\s+\w", after) is not None and (
            match["label"].islower() or not _REASON.match(after)
        )

    # A marked label at the start
    start = re.match(rf"{_OPEN}{label}", text, re.IGNORECASE)
    opened = start is not None and re.search(r"[(\[{*]", text[: start.start("label")]) is not None
    if start and (opened or re.match(r"\s*(?:$|[.:;)\]}*\n]|[-–—]\s|,(?!\s*(?:" + one + r")(?!\w)))", text[start.end() :], re.IGNORECASE)):
        return named(start)
    # A stated label
    stated = [m for m in re.finditer(rf"{_STATEMENT}(?P<open>{_OPEN}){label}", text, re.IGNORECASE) if m["open"].strip() or not is_word(m)]
    stated += re.finditer(rf"(?<![\w-]){label}[)\]*\"']*\s+is\s+(?:the\s+)?(?:correct|right|best)\b(?!\s+not)", text, re.IGNORECASE)
    if stated:
        return named(max(stated, key=lambda m: m.start("label")))
    # The text of a choice
    by_text = {_bare(choice.text): choice.label for choice in choices}
    if bare in by_text:
        return by_text[bare]
    # A label before other words
    if start and not is_word(start):
        return named(start)
    if start and any(_bare(text[start.end() :]).startswith(_bare(c.text)) for c in choices if c.label.casefold() == start["label"].casefold()):
        return named(start)  # "A iron", where iron is choice A
    # A position
    if same := _same_place(bare, choices, gold):
        return same
    # A text or a label within the response
    held = [words for words in by_text if words and f" {words} " in f" {bare} "]
    held = [words for words in held if not any(words != other and f" {words} " in f" {other} " for other in held)]
    if len(held) == 1:
        return by_text[held[0]]
    bracketed = {named(m) for m in re.finditer(rf"[(\[]{label}[)\]]", text, re.IGNORECASE)}
    return bracketed.pop() if len(bracketed) == 1 else None


def _same_place(bare: str, choices: Sequence[Choice], gold: str = "") -> str | None:
    """Return the label at the position that a lone letter or digit of the other kind names: C is 3 if the labels are 1 to 4."""
    if not re.fullmatch(r"[a-z]|[1-9]", bare):
        return None
    place = int(bare) if bare.isdigit() else ord(bare) - ord("a") + 1
    if choices:
        return choices[place - 1].label if place <= len(choices) else None
    return str(place) if gold.isdigit() else None


def _bare(text: str) -> str:
    """Return the text in lower case, without ASCII punctuation and with single spaces."""
    text = composed(text).casefold().translate(dict.fromkeys(map(ord, string.punctuation)))
    return " ".join(text.split())
