"""Identifiers: how a selection of documents is written, and how a model's output is parsed.

A selection is an ordered list of 1-based positions into the documents shown: `[3], [1]`, or `None` for no document.
Models are trained to write this form. A prompts file may define another Notation. parse_ids also reads other common
forms and documents which ones.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import regex

from dynamicrag.rows.row import Row

# Tokens of a list. A text with anything else is prose.
_TOKEN = re.compile(
    r"\s*(?:(?P<n>\d+)|(?P<o>\[)|(?P<c>\])|(?P<s>[,;>&]|and\b)|(?P<r>[-\u2013\u2014]|to\b)|(?P<x>none\b)"
    r"|(?P<w>(?:documents?|docs?|passages?|identifiers?|ids?|no\.|\#)(?![a-z])))",
    re.IGNORECASE | re.ASCII,
)
# A list by the kinds of its tokens, ignoring brackets: numbers and ranges, each after an optional word, with
# separators.
_LIST = re.compile(r"w?n(?:rw?n)?(?:s+w?n(?:rw?n)?)*s*")
_LEAD_IN = re.compile(
    r"\s*(?:(?:so|the|my|final|best|most|important|relevant|needed|required|necessary|useful|selected|chosen|selection|answer|output|"
    r"result|list|ranking|documents?|docs?|passages?|identifiers?|ids?|numbers?|is|are|i|choose|select|need)[\s_]+){0,8}"
    r"(?:answer|selection|output|result|list|ranking|documents?|docs?|passages?|identifiers?|ids?|numbers?|is|are|needed|required|"
    r"relevant|necessary|selected|chosen|choose|select|need)\s*:", re.IGNORECASE | re.ASCII,
)
_OTHER_FORMS = str.maketrans({
    "\uff3b": "[", "\uff3d": "]", "\u3010": "[", "\u3011": "]", "\u3014": "[", "\u3015": "]", "\uff0c": ",", "\u3001": ",", "\uff1b": ";",
    "\uff1a": ":", "\uff1e": ">", "\u3002": ".", "*": None, "`": None, '"': None,
})
_BULLET = re.compile(r"^[ \t]*[-\u2022][ \t]+", re.MULTILINE)
_MAX_SAID = 200
# The engines' regular expressions do not support an escaped space, which re.escape writes.
_SPECIAL = re.compile(r"[\\.^$*+?{}\[\]|()]")


@dataclass(frozen=True)
class Selection:
    """A selection parsed from a model's output.

    If it is not `valid`, `reason` says why: no list, or no position in range.
    """

    ids: list[int]
    valid: bool
    out_of_range: int = 0
    repeated: int = 0
    reason: str = field(default="", compare=False)


@dataclass(frozen=True)
class Notation:
    """How a model writes a selection: one identifier (with {n} for the position), the separator, and the word for no document.

    Raises ValueError for a notation that cannot be parsed unambiguously.
    """

    identifier: str = "[{n}]"
    separator: str = ", "
    none: str = "None"

    def __post_init__(self):
        if len(self.identifier.format(n="\0").split("\0")) != 2:
            raise ValueError("an identifier must contain {n} exactly once")
        before, after = self.around
        if not (after + self.separator + before).strip("0123456789"):
            raise ValueError(f"two identifiers run together: {self.write([1, 2])!r}")
        if self._exact.fullmatch(self.none):
            raise ValueError(f"{self.none!r} means no document but is also an identifier")

    @property
    def around(self) -> tuple[str, str]:
        """The texts before and after the number in an identifier."""
        before, after = self.identifier.format(n="\0").split("\0")
        return before, after

    @cached_property
    def _exact(self) -> regex.Pattern:
        identifier = "([1-9][0-9]*)".join(map(regex.escape, self.around))
        return regex.compile(f"{identifier}(?:{regex.escape(self.separator)}{identifier})*")

    def write(self, ids: Sequence[int]) -> str:
        return self.separator.join(self.identifier.format(n=position) for position in ids) or self.none

    def read(self, text: str, cut_off: bool = False) -> list[int] | None:
        """Return the positions if write() could have written the text, [] for no document, and None for any other text.

        With `cut_off`, the text may be the beginning of a selection; a last number that may be incomplete is dropped.
        """
        text = text.strip()
        if text == self.none:
            return []
        whole = self._exact.fullmatch(text, partial=cut_off)
        complete = self._exact.match(text)
        if not (whole and complete):
            return None
        numbers = complete.captures(1) + complete.captures(2)
        if cut_off and not self.around[1] and complete.end() == len(text):
            numbers = numbers[:-1]
        # int() refuses thousands of digits.
        return [int(digits) if len(digits) < 10 else 10**9 for digits in numbers] or None


DEFAULT_NOTATION = Notation()


def format_ids(ids: Sequence[int], notation: Notation = DEFAULT_NOTATION) -> str:
    """Write a selection in the form that models are trained to write."""
    return notation.write(ids)


def parse_ids(text: str, n_docs: int, cut_off: bool = False, notation: Notation = DEFAULT_NOTATION) -> Selection:
    """Parse a selection among `n_docs` documents from a model's output. This inverts format_ids.

    The output either follows `notation` or is a list in a common form. The list is the whole output, the last
    paragraph, or the last line after a lead-in with a colon ("Answer:", "The needed documents are:"). The first two may
    have a lead-in too. A list is `None`, or numbers such as `[3], [1]`, `[3, 1]`, `[3][1]`, `3, 1`, `Doc 3` or `[3] >
    [1]`. It may have one item per line, full-width brackets and commas, Markdown marks and bullets, and ascending
    ranges (`[1]-[3]`, `1-3`). Prose is not parsed: "Document 3 is needed, none of the others" is not a list, nor is a
    list that prose follows.

    Identifiers are taken in order; repeats and positions outside 1..n_docs are dropped and counted. `None` alone is the
    empty selection. Any other output is invalid, which differs from None. `cut_off` means that the output ends at the
    token limit: a last number without its bracket or comma may be incomplete and is dropped.
    """
    ids: dict[int, None] = {}
    out_of_range = repeated = 0
    exact = notation.read(text, cut_off)
    numbers = _final_list(text, cut_off) if exact is None else [(position, position) for position in exact]
    for first, last in numbers or ():
        inside = range(max(first, 1), min(last, n_docs) + 1)
        out_of_range += last - first + 1 - len(inside)
        repeated += sum(position in ids for position in inside)
        ids.update(dict.fromkeys(inside))
    valid = bool(ids) or numbers == []
    said = (f"no selection in the model's output {text[:_MAX_SAID]!r}; expected {notation.write([1, 2])} or "
            f"{notation.none}, among {n_docs} documents")
    return Selection(list(ids), valid, out_of_range, repeated, "" if valid else said)


def _final_list(text: str, cut_off: bool) -> list[tuple[int, int]] | None:
    """Return the (first, last) ranges of the list that a text is or ends with, [] for `None`; None if there is no list."""
    text = _BULLET.sub("", text.translate(_OTHER_FORMS).strip())
    whole = _ranges(_without_lead_in(text), cut_off)
    if whole is not None:
        return whole
    before, _, last = text.rpartition("\n")
    lead_in = _LEAD_IN.match(last)
    if lead_in and last[lead_in.end() :].strip():
        return _ranges(last[lead_in.end() :], cut_off)
    before, gap, paragraph = text.rpartition("\n\n")
    heading = before.rstrip().rpartition("\n")[2].rstrip()
    # A list under a heading such as "Not needed:" is not a selection.
    if not gap or (heading.endswith(":") and not _LEAD_IN.fullmatch(heading)):
        return None
    return _ranges(_without_lead_in(paragraph), cut_off)


def _without_lead_in(text: str) -> str:
    lead_in = _LEAD_IN.match(text)
    return text[lead_in.end() :] if lead_in else text


def _ranges(text: str, cut_off: bool) -> list[tuple[int, int]] | None:
    """Return (first, last) for each item of a text that is a list, [] for `None`; None for a text that is not a list."""
    if cut_off:
        text = text.rstrip("0123456789")
    kinds, numbers, depth, at = [], [], 0, 0
    text = text.strip().removesuffix(".")
    while token := _TOKEN.match(text, at):
        kind = str(token.lastgroup)  # every alternative is a group
        if kinds and "\n" in text[at : token.start(kind)] and kind not in "cs":
            kinds.append("s")
        elif kind == "o" and text[at - 1 : at] == "]":
            kinds.append("s")  # [3][1], [3] [1]
        at = token.end()
        if kind in "oc":
            depth += 1 if kind == "o" else -1
            if depth < 0:
                return None
            continue
        kinds.append(kind)
        if kind == "n":
            digits = token[kind].lstrip("0")
            # int() refuses thousands of digits.
            numbers.append(int(digits or 0) if len(digits) < 10 else 10**9)
    shape = "".join(kinds)
    if text[at:].strip() or (depth and not cut_off):
        return None
    if shape == "x":
        return []
    if not _LIST.fullmatch(shape):
        return None
    ranges, taken = [], iter(numbers)
    for item in shape.replace("w", "").replace("nrn", "r").replace("s", ""):
        first = next(taken)
        ranges.append((first, next(taken) if item == "r" else first))
    # [3]-[1] is ambiguous: it may mean two documents or three.
    return ranges if all(first <= last for first, last in ranges) else None


def ids_pattern(n_docs: int, notation: Notation = DEFAULT_NOTATION) -> str:
    """Return a regular expression that matches every well-formed selection among `n_docs` documents, for constrained decoding.

    It allows repeats, because an expression that excludes them is exponential in n_docs. parse_ids drops repeats.
    """
    none, separator, before, after = (_SPECIAL.sub(r"\\\g<0>", text) for text in (notation.none, notation.separator, *notation.around))
    if n_docs == 0:
        return none
    identifier = f"{before}({'|'.join(map(str, range(1, n_docs + 1)))}){after}"
    return f"({none}|{identifier}({separator}{identifier}){{0,{n_docs - 1}}})"


def summarise_selections(rows: Iterable[Row], notation: Notation = DEFAULT_NOTATION) -> dict[str, float]:
    """Summarise the sampled selections: counts of malformed ones, share of None, mean and variance of the length, variety."""
    seen = dict.fromkeys(("questions", "trajectories", "malformed", "out_of_range", "repeated"), 0)
    valid = none = k = k_squared = distinct = answers = 0
    for row in rows:
        sampled = [trajectory for trajectory, expert in enumerate(row["from_expert"]) if not expert]
        texts = [row["selections"][trajectory] for trajectory in sampled] + row["invalid_selections"]
        parsed = [parse_ids(text, row["docs_shown"], notation=notation) for text in texts]
        seen["questions"] += 1
        seen["trajectories"] += len(texts)
        seen["malformed"] += len(row["invalid_selections"])
        seen["out_of_range"] += sum(selection.out_of_range for selection in parsed)
        seen["repeated"] += sum(selection.repeated for selection in parsed)
        selections = [row["id_lists"][trajectory] for trajectory in sampled]
        valid += len(selections)
        none += selections.count([])
        k += sum(map(len, selections))
        k_squared += sum(len(ids) ** 2 for ids in selections)
        distinct += len(set(map(tuple, selections)))
        answers += len({row["responses"][trajectory] for trajectory in sampled})
    mean = k / max(valid, 1)
    return {
        **seen,
        "none_share": none / max(valid, 1),
        "k_mean": mean,
        "k_spread": max(k_squared / max(valid, 1) - mean**2, 0.0) ** 0.5,
        "distinct_selections": distinct / max(seen["questions"], 1),
        "distinct_answers": answers / max(seen["questions"], 1),
    }
