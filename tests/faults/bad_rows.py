"""Rows that no stage accepts: the changes that make a row wrong, and a pattern of the message."""

from stages import DOCS


def with_doc(**changes) -> dict:
    """The changes that make the second document of a row wrong."""
    return {"docs": [DOCS[0], {**DOCS[1], **changes}, *DOCS[2:]]}


BAD_ROWS: dict[str, tuple[dict, str]] = {
    "no id": ({"id": None}, "'id': "),
    "an empty id": ({"id": ""}, "'id': "),
    "an id that is true": ({"id": True}, r"'id': .*\bbool\b"),
    "an id that is a number with a point": ({"id": 1.5}, r"'id': .*\bfloat\b"),
    "an id beyond 64 bits": ({"id": 10**30}, r"'id': .*\bfloat\b"),
    "an id that is a list": ({"id": ["q1"]}, r"'id': .*\blist\b"),
    "an id that is used already": ({"id": "q1"}, r"'id': 'q1' .*\b1\b"),
    "an id of a number that is used as a string": ({"id": "q1", "sample_id": 1}, "'id': 'q1'"),
    "no question": ({"question": None}, "'question': "),
    "an empty question": ({"question": ""}, "'question': "),
    "a question of white space": ({"question": " \n\u3000"}, "'question': "),
    "a question that is a number": ({"question": 42}, r"'question': .*\bint\b"),
    "a question that is a list": ({"question": ["which?"]}, r"'question': .*\blist\b"),
    "a question to search with that is a list": ({"retrieved_question": ["which?"]}, r"'retrieved_question': .*\blist\b"),
    "an answer that is a number": ({"answers": 42}, r"'answers': .*\bint\b"),
    "answers of mixed types": ({"answers": ["oil", 42]}, "'answers': "),
    "answers that are an object": ({"answers": {"text": "oil"}}, "'answers'"),
    "answers in lists": ({"answers": [["oil"]]}, r"'answers': .*\blist\b"),
    "qa_pairs that are an object": ({"qa_pairs": {"short_answers": ["oil"]}}, "'qa_pairs'"),
    "qa_pairs without short_answers": ({"qa_pairs": [{"question": "which?"}]}, "'qa_pairs'"),
    "short_answers that are a string": ({"answers": None, "qa_pairs": [{"short_answers": "oil"}]}, "'qa_pairs'"),
    "short_answers that are numbers": ({"answers": None, "qa_pairs": [{"short_answers": [42]}]}, "'qa_pairs'"),
    "a data set that is a number": ({"dataset": 7}, r"'dataset': .*\bint\b"),
    "a data set that is an empty list": ({"dataset": []}, r"'dataset': .*\blist\b \[\]"),
    "docs that are a string": ({"docs": "p1"}, r"'docs': .*\bstr\b"),
    "docs that are an object": ({"docs": {"p1": DOCS[0]}}, r"'docs': .*\bdict\b"),
    "docs that are null beside ctxs": ({"docs": "null", "ctxs": DOCS}, "'docs': "),
    "docs in lists": ({"docs": [DOCS]}, r"'docs\[0\]': .*\blist\b"),
    "docs that are ids": ({"docs": ["p1", "p2"]}, r"'docs\[0\]': .*\bstr\b"),
    "docs of mixed types": ({"docs": [DOCS[0], None, *DOCS[2:]]}, r"'docs\[1\]': "),
    "ctxs of mixed types": ({"docs": None, "ctxs": [DOCS[0], 3, *DOCS[2:]]}, r"'ctxs\[1\]': .*\bint\b"),
    "a document without text": (with_doc(text=None), r"'docs\[1\]\.text'"),
    "a document whose text is a list": (with_doc(text=["a", "b"]), r"'docs\[1\]\.text': .*\blist\b"),
    "a document whose title is a number": (with_doc(title=1984), r"'docs\[1\]\.title': .*\bint\b"),
    "a document whose id is a list": (with_doc(id=["p2"]), r"'docs\[1\]\.id': .*\blist\b"),
    "a document whose id is an object": (with_doc(id={"$oid": "p2"}), r"'docs\[1\]\.id': .*\bdict\b"),
    "a document whose id is beyond 64 bits": (with_doc(id=10**30), r"'docs\[1\]\.id': .*\bfloat\b"),
    "a document whose id is empty": (with_doc(id=""), r"'docs\[1\]\.id': "),
    "a score that is a word": (with_doc(score="high"), r"'docs\[1\]\.score': .*\bstr\b"),
    "a score that is written NaN": (with_doc(score="NaN"), r"'docs\[1\]\.score': .*\bnan\b"),
    "a score that is written 1e999": (with_doc(score="1e999"), r"'docs\[1\]\.score': .*\binf\b"),
    "a score that is a list": (with_doc(score=[1]), r"'docs\[1\]\.score': .*\blist\b"),
    "a score that is true": (with_doc(score=True), r"'docs\[1\]\.score': .*\bbool\b"),
    "a rerank score of infinity": (with_doc(rerank_score="-Infinity"), r"'docs\[1\]\.rerank_score': "),
    "a label that is neither": (with_doc(rerank_label="maybe"), r"'docs\[1\]\.rerank_label': .*\"true\".*\"false\""),
    "a label that is a list": (with_doc(rerank_label=["true"]), r"'docs\[1\]\.rerank_label': "),
}
