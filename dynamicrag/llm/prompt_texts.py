"""The texts of the project's own prompts, and the placeholders that each may and must have."""

from typing import Any

from dynamicrag.rows.identifiers import DEFAULT_NOTATION

# A text; None for no system prompt or prefix; a tuple of texts for `stop`.
DEFAULT_PROMPTS: dict[str, dict[str, Any]] = {
    "reranker": {
        "system": "You choose the documents that are needed to answer a question.",
        "user": (
            "Question: {question}\n\n{documents}\n\n"
            "Which documents are needed to answer the question: {question}\n"
            "Write their identifiers, the most important first, as in [2], [1]. Write None if no document is needed."
        ),
        # The identifier is on both sides of the text: a small model copies it more reliably from the nearer side.
        "document": "[{n}] {title}\n{text} [{n}]",
        "separator": "\n\n",
        "identifier": DEFAULT_NOTATION.identifier,
        "identifier_separator": DEFAULT_NOTATION.separator,
        "none": DEFAULT_NOTATION.none,
        "prefix": None,
        "stop": (),
    },
    "pointwise": {
        "system": "You judge whether a document is needed to answer a question.",
        "user": "Question: {question}\n\n{documents}\n\nIs this document needed to answer the question? Write Yes or No.",
        "document": "{title}\n{text}",
        "prefix": None,
        "stop": (),
    },
    "generator": {
        "system": "You answer questions, using the documents where they help.",
        "user": "{documents}\n\nQuestion: {question}\n{instruction}",
        "user_without_documents": "Question: {question}\n{instruction}",
        "document": "[{n}] {title}\n{text}",
        "separator": "\n\n",
        "numbers": "new",
        "prefix": None,
        "stop": (),
    },
    "judge": {
        "system": "You grade answers strictly and fairly.",
        "user": (
            "Question: {question}\nReference answers: {answers}\nAnswer to grade: {response}\n\n"
            "Give 0 to 20 points for each of: correctness against the reference, completeness, relevance to the question, "
            "absence of unsupported claims, clarity. Reply with a JSON object with the integer keys "
            "correctness, completeness, relevance, support, clarity."
        ),
    },
}
NUMBERS = ("new", "original")
PLACEHOLDERS = {
    ("reranker", "user"): {"question", "documents"},
    ("reranker", "document"): {"n", "title", "text"},
    ("reranker", "identifier"): {"n"},
    ("pointwise", "user"): {"question", "documents"},
    ("pointwise", "document"): {"n", "title", "text"},
    ("generator", "user"): {"question", "documents", "instruction"},
    ("generator", "user_without_documents"): {"question", "instruction"},
    ("generator", "document"): {"n", "title", "text"},
    ("judge", "user"): {"question", "answers", "response"},
}
# A prompt without these placeholders would lack the question or the documents.
REQUIRED = {
    ("reranker", "user"): {"question", "documents"}, ("pointwise", "user"): {"question", "documents"},
    ("generator", "user"): {"question", "documents"}, ("generator", "user_without_documents"): {"question"},
    ("reranker", "identifier"): {"n"},
    **{(name, "document"): {"text"} for name in ("reranker", "pointwise", "generator")}, ("judge", "user"): {"response"},
}
