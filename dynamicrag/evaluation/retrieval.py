"""Metrics of a question's documents, best first: against gold documents, and against gold answers in their text."""

import math
import unicodedata
from collections.abc import Sequence

from dynamicrag.rows.records import Doc

SCORES = {"retrieval": "score", "reranking": "rerank_score"}  # an order of the documents, and the key it goes by


def in_order(docs: list[Doc], order: str) -> list[Doc] | None:
    """The documents best first, equal scores as in the row.

    Where one has no score, the retriever's order is the row's, and the reranker's is not known: None.
    """
    key = SCORES[order]
    if all(doc.get(key) is not None for doc in docs):
        return sorted(docs, key=lambda doc: -doc[key])
    return docs if order == "retrieval" else None


def gold_measures(ranked: Sequence[tuple[list[str], dict[str, int]]], cutoffs: list[int]) -> list[dict[str, float]]:
    """R@k, nDCG@10 (the gain is the relevance) and MRR@10, in [0, 1], of each pair in `ranked`.

    A pair is the document ids, best first, and the relevance (1 or more) by gold id, of which there is at least one.
    """
    import ir_measures

    names = {ir_measures.R @ k: f"R@{k}" for k in cutoffs}
    names |= {ir_measures.nDCG @ 10: "nDCG@10", ir_measures.RR @ 10: "MRR@10"}
    run, qrels = {}, {}
    for number, (doc_ids, gold) in enumerate(ranked):
        # ir_measures sorts by score and breaks ties by id. Named by their ranks and scored by the negative, documents
        # stay in order; one that is there twice counts where it is first, and still takes up its second place.
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
    """The tokens of a text, each between single spaces, by DPR's rule; empty for a text without any token.

    The text is normalised NFD. A token is a run of letters, digits and marks, or one other character that is no space and
    no control character. Tokens are lower-cased (Karpukhin et al. 2020, arXiv 2004.04906: has_answer over SimpleTokenizer).
    """
    import regex

    tokens = regex.findall(r"[\p{L}\p{N}\p{M}]+|[^\p{Z}\p{C}]", unicodedata.normalize("NFD", text))
    return f" {' '.join(tokens).lower()} " if tokens else ""


def answer_rank(docs: Sequence[Doc], answers: Sequence[str]) -> float:
    """Rank of the first document whose text holds an answer, its tokens one after the other, or infinity.

    By DPR's rule, so the title is not looked at; an answer without any token is in no document.
    """
    wanted = list(filter(None, map(searched_form, answers)))
    texts = (searched_form(doc["text"]) for doc in docs)
    return next((rank for rank, text in enumerate(texts, start=1) if any(answer in text for answer in wanted)), math.inf)
