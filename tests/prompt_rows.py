"""A row whose texts look like placeholders and formats, for the tests of prompts."""

DOCS = [
    {"id": "a", "title": "Nile", "text": "A river.", "rerank_score": 0.9, "rerank_label": "true", "score": 1.0},
    {"id": "b", "title": "{question} {0}", "text": "braces {} {{x}} %s \\n", "rerank_score": 0.1, "rerank_label": "false", "score": 0.9},
    {"id": "c", "title": "São Tomé", "text": "Zeile\neins ", "rerank_score": 0.8, "rerank_label": "true", "score": 0.8},
]
ROW = {
    "id": "nq_1", "dataset": "nq", "question": "Which {river} is longest?", "answers": ["the Nile"], "docs": DOCS, "docs_shown": 3,
    "id_lists": [[3, 1], [2]], "responses": ["the Nile", "Amazon"], "response_scores": [0.9, 0.1], "score_terms": [{"em": 1.0}, {"em": 0.0}],
}
