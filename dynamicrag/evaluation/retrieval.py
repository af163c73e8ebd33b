"""Retrieval metrics of a question's ranked documents: against gold documents, and against gold answers in their text.
"""

import math
import unicodedata
from collections.abc import Sequence
from functools import cache

from dynamicrag.rows.row import Doc

SCORES = {"retrieval": "score", "reranking": "rerank_score"}  # orders of documents, and the key that defines each


def in_order(docs: list[Doc], order: str) -> list[Doc] | None:
    """Return the documents best first; equal scores keep the row's order.

    If a document has no score, the retrieval order is the row's order, and the reranking order is not known (None).
    """
    key = SCORES[order]
    if all(doc.get(key) is not None for doc in docs):
        return sorted(docs, key=lambda doc: -doc[key])
    return docs if order == "retrieval" else None


def gold_measures(ranked: Sequence[tuple[list[str], dict[str, int]]], cutoffs: list[int]) -> list[dict[str, float]]:
    """Return R@k, nDCG@10 (the relevance is the gain) and MRR@10, in [0, 1], for each pair in `ranked`.

    A pair consists of the document ids, best first, and the relevance (at least 1) by gold id; there is at least one.
    """
    import ir_measures

    names = {ir_measures.R @ k: f"R@{k}" for k in cutoffs}
    names |= {ir_measures.nDCG @ 10: "nDCG@10", ir_measures.RR @ 10: "MRR@10"}
    run, qrels = {}, {}
    for number, (doc_ids, gold) in enumerate(ranked):
        # ir_measures sorts by score and breaks ties by id. Documents named by their rank and scored by its negative
        # stay in order. A repeated document counts at its first rank and still occupies the second.
        ranks: dict[str, int] = {}
        for rank, doc_id in enumerate(doc_ids, start=1):
            ranks.setdefault(doc_id, rank)
        run[str(number)] = {str(rank): float(-rank) for rank in range(1, len(doc_ids) + 1)}
        qrels[str(number)] = {str(ranks.get(doc_id, -place)): gold[doc_id] for place, doc_id in enumerate(gold, 1)}
    measures = [dict.fromkeys(names.values(), 0.0) for _ in ranked]
    for metric in ir_measures.iter_calc(list(names), qrels, run) if ranked else ():
        measures[int(metric.query_id)][names[metric.measure]] = metric.value
    return measures


def searched_form(text: str) -> str:
    """Return the tokens of a text, with one space around each, by DPR's rule; "" for a text without tokens.

    The text is normalised to NFD. A token is a sequence of letters, digits and marks, or any other character except
    spaces and control characters. Tokens are lower-cased (Karpukhin et al. 2020, arXiv 2004.04906: has_answer,
    SimpleTokenizer).
    """
    tokens = _token().findall(unicodedata.normalize("NFD", text))
    return f" {' '.join(tokens).lower()} " if tokens else ""


@cache
def _token():
    import regex

    return regex.compile(r"[\p{L}\p{N}\p{M}]+|[^\p{Z}\p{C}]")


def answer_rank(docs: Sequence[Doc], answers: Sequence[str]) -> float:
    """Return the rank of the first document whose text contains an answer as consecutive tokens; infinity if there is none.

    By DPR's rule, titles are ignored. An answer without tokens occurs in no document.
    """
    wanted = [(answer, answer.split()) for answer in filter(None, map(searched_form, answers))]

    def has_answer(text: str) -> bool:
        possible = [answer for answer, _ in wanted]
        if text.isascii():  # its tokens are substrings, which are found much faster
            lowered = text.lower()
            possible = [answer for answer, tokens in wanted if all(token in lowered for token in tokens)]
        return bool(possible) and any(map(searched_form(text).__contains__, possible))

    return next((rank for rank, doc in enumerate(docs, start=1) if has_answer(doc["text"])), math.inf)
