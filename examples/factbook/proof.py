"""Prove the Factbook questions: every gold passage exists and states what the answer needs, and the answer follows from
it.

Imported by questions.py, which writes only rows that check() accepts. Keys of a row that the proof uses:

    gold_docs   ids of the needed passages, in the order in which they are needed
    evidence    parallel to gold_docs: the needed part of each passage (several parts are joined with JOINT)
    values      the value in each part, in the same order
    rule        how the answer follows from the values; see RULES

Answers are recomputed from the evidence, not taken from the facts that the questions were built from.
"""

import operator
from collections import defaultdict

from facts import MAX_ANSWER_WORDS, holds, normalise, number

from dynamicrag.stage import UserError

JOINT = " | "
RULES = {
    "arithmetic": "the answer is the result of the expression in the rule",
    "known": "common knowledge: no passage is needed",
    "value": "the answer is the last value",
    "largest": "the answer is the country with the largest value",
    "smallest": "the answer is the country with the smallest value",
    "list": "the answer lists all values in order",
    "above": "the answer is the number of values above the bound in the rule",
    "claim": "the claim states the value in the rule: SUPPORTS if it is the right value, otherwise REFUTES",
    "unstated": "no passage decides the claim: NOT ENOUGH INFO",
    "paragraph": "the answer is all values, one after the other",
    "pairs": "each value answers one reading of the question",
}
NUMBER_WORDS = ("none", "one", "two", "three", "four")
OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}
LONG_KINDS = ("long", "ambiguous")


def enumerate_words(words: list[str], last: str = "and") -> str:
    """Join words as in "A, B and C"."""
    return f" {last} ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else words[0]


def check(rows: list[dict], passages: list[dict]) -> None:
    """Raise UserError for the first row that its passages do not prove, and for a repeated id or question."""
    by_id = {passage["id"]: passage for passage in passages}
    by_title = defaultdict(list)
    for passage in passages:
        by_title[passage["title"]].append(passage)
    seen = {}
    for row in rows:
        for key in ("id", "question"):
            mark = (key, row[key].lower())
            if mark in seen:
                raise UserError(f"question {row['id']}: the same {key} as {seen[mark]}")
            seen[mark] = row["id"]
        problem = find_problem(row, by_id, by_title)
        if problem:
            raise UserError(f"question {row['id']} ({row['question']}): {problem}")


def find_problem(row: dict, by_id: dict[str, dict], by_title: dict[str, list[dict]]) -> str | None:
    """Return what is wrong with a row, or None."""
    answers, values = row["answers"], row["values"]
    if not answers or not all(answers):
        return "no answer, or an empty one"
    if row["kind"] not in LONG_KINDS and any(len(answer.split()) > MAX_ANSWER_WORDS for answer in answers):
        return f"an answer of more than {MAX_ANSWER_WORDS} words"
    if len(row["evidence"]) != len(row["gold_docs"]) or len(set(row["gold_docs"])) != len(row["gold_docs"]):
        return "gold_docs are repeated, or not parallel to evidence"
    stretches = []
    for gold, evidence in zip(row["gold_docs"], row["evidence"], strict=True):
        passage = by_id.get(gold)
        if passage is None:
            return f"there is no passage {gold}"
        for stretch in evidence.split(JOINT):
            if not holds(passage["text"], stretch):
                return f"passage {gold} does not hold {stretch!r}"
            stretches.append((passage, stretch))
    if row["rule"].split()[0] not in ("arithmetic", "known", "unstated"):
        if not stretches or len(stretches) != len(values):
            return "values are not parallel to evidence"
        for (passage, stretch), value in zip(stretches, values, strict=True):
            if not holds(stretch, value):
                return f"{value!r} is not in its evidence {stretch!r}"
            rival = find_rival(passage, stretch, value, by_title) if row["kind"] not in LONG_KINDS else None
            if rival:
                return f"passage {rival} states the same field as {passage['id']}: the value is ambiguous"
    elif stretches:
        return "a question without passages has evidence"
    return broken_rule(row, [passage["title"].rpartition(": ")[0] for passage, _ in stretches])


def find_rival(passage: dict, stretch: str, value: str, by_title: dict[str, list[dict]]) -> str | None:
    """Return another passage of the same country and section that gives the same field a value; None if there is none."""
    label = stretch[:stretch.find(value)]
    if not label[:1].isupper() or not label.endswith(": "):
        return None
    return next((other["id"] for other in by_title[passage["title"]]
                 if other["id"] != passage["id"] and f". {label}" in f". {other['text']}"), None)


def broken_rule(row: dict, countries: list[str]) -> str | None:
    """Recompute the answer. Returns what is wrong with it, or None."""
    rule, _, argument = row["rule"].partition(" ")
    answer, values = row["answers"][0], row["values"]
    if rule not in RULES:
        return f"the rule {rule!r} is unknown"
    if rule == "known":
        return None
    if rule == "paragraph":
        whole = " ".join(values)
        right = len(normalise(answer).split()) == len(normalise(whole).split()) and all(holds(answer, value) for value in values)
        return None if right else "the answer is not the paragraph of the passages"
    if rule == "pairs":
        short = [pair["short_answers"][0] for pair in row["qa_pairs"]]
        return None if len(short) > 1 and sorted(short) == sorted(values) else f"qa_pairs answer {short}, the passages {values}"
    if rule in ("largest", "smallest"):
        pick = max if rule == "largest" else min
        numbers = [number(value) for value in values]
        if numbers.count(pick(numbers)) > 1:
            return "two countries tie"
        expected = countries[numbers.index(pick(numbers))]
    elif rule == "arithmetic":
        left, sign, right = argument.split()
        expected = str(OPERATORS[sign](int(left), int(right)))
    elif rule == "value":
        expected = values[-1]
    elif rule == "list":
        expected = enumerate_words(values)
    elif rule == "above":
        if argument.lower() not in row["question"].lower():
            return f"the question does not name the bound {argument!r}"
        expected = NUMBER_WORDS[sum(number(value) > number(argument) for value in values)]
    elif rule == "unstated":
        expected = "NOT ENOUGH INFO"
    else:
        if argument.lower() not in row["question"].lower():
            return f"the claim does not state {argument!r}"
        expected = "SUPPORTS" if normalise(argument) == normalise(values[0]) else "REFUTES"
    return None if normalise(answer) == normalise(expected) else f"the answer should be {expected!r}, not {answer!r}"
