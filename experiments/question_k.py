"""Predict from the question alone how many documents it needs, without reading one, and label the first k documents.

This is the baseline for a selector that reads documents: if the wording of a question tells its number of documents,
a fixed reranker order with this number is enough. A logistic regression on the question's embedding is trained on rows
whose number is known from the labels in use (process_training_data.py); its strength of regularisation is chosen by
cross-validation. Any rows and any encoder folder can be given.

Reads    TRAIN_FILES     rows with question and true_count
         INPUT_FILE      rows with question and docs, in the reranker's order
Writes   OUTPUT_FILE     the rows of INPUT_FILE, with question_k, and with rerank_label true for the first question_k documents:
                         `inference.py --selector monot5` answers from these

    .venv/bin/python experiments/question_k.py --train_files training_data/retrieval_data_rerank_sequence.jsonl \\
        training_data/retrieval_data_rerank_normal.jsonl --encoder models/minilm --input_file eval_data/test.jsonl \\
        --output_file eval_data/test_question.jsonl
"""

import argparse
from collections import Counter
from collections.abc import Sequence

import numpy as np

from dynamicrag import stage
from dynamicrag.files.jsonio import read_json, write_json
from dynamicrag.models.encoder import Encoder
from dynamicrag.models.encoder_settings import QUERY
from dynamicrag.rows.shown import DOCUMENTS_HELP, DOCUMENTS_SHOWN
from dynamicrag.stage import UserError, log

STRENGTHS = (0.1, 1.0, 10.0, 100.0)  # C of the regression: less regularisation to the right
FOLDS = 5


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = stage.ArgumentParser(__doc__)
    parser.add_argument("--train_files", nargs="+", required=True, help="labelled rows; not those of the evaluation")
    parser.add_argument("--input_file", required=True, help="rows to label")
    parser.add_argument("--output_file", required=True, help="the labelled rows")
    parser.add_argument("--encoder", default="models/minilm", help="folder of a sentence encoder")
    parser.add_argument("--normalize", action="store_true", help="divide the embeddings by their length")
    parser.add_argument("--n_docs", type=int, default=DOCUMENTS_SHOWN, help=DOCUMENTS_HELP)
    parser.add_argument("--device", default="auto", help="device of the encoder")
    parser.add_argument("--seed", type=int, default=42, help="seed of the folds")
    return parser.parse_args(argv)


def read_questions(path: str, key: str) -> list[dict]:
    """Return the rows of a file. Raises UserError naming file, line and key of a row that lacks its question or `key`."""
    rows = []
    for line, row in read_json(path):
        for wanted, kind in (("question", str), (key, int if key == "true_count" else list)):
            if not isinstance(row.get(wanted), kind):
                raise UserError(f"{path}:{line}: key '{wanted}': expected a value of type {kind.__name__}; give a file of "
                                f"{'process_training_data.py' if key == 'true_count' else 'reranker.py'}")
        rows.append(row)
    if not rows:
        raise UserError(f"{path}: contains no row; check the file")
    return rows


def predict_k(train: np.ndarray, counts: Sequence[int], asked: np.ndarray, seed: int) -> tuple[np.ndarray, float]:
    """Return the number of documents for each of the questions `asked`, and the accuracy on held-out folds.

    `train` [n, width] and `asked` [m, width] are embeddings.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, KFold

    if len(set(counts)) == 1:
        return np.full(len(asked), counts[0]), 1.0
    folds = KFold(min(FOLDS, len(counts)), shuffle=True, random_state=seed)
    search = GridSearchCV(LogisticRegression(max_iter=2000), {"C": STRENGTHS}, cv=folds, scoring="accuracy", error_score=0.0)
    search.fit(train, np.asarray(counts))
    return search.predict(asked), float(search.best_score_)


def with_labels(row: dict, k: int, n_docs: int) -> dict:
    """Return the row with its first k of `n_docs` documents labelled relevant, and no other."""
    k = min(k, n_docs)
    docs = [{**doc, "rerank_label": "true" if place < k else "false"} for place, doc in enumerate(row["docs"])]
    return {**row, "question_k": k, "docs": docs}


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    train = [row for path in args.train_files for row in read_questions(path, "true_count")]
    rows = read_questions(args.input_file, "docs")
    encoder = Encoder(args.encoder, args.device, normalize=args.normalize, role=QUERY)
    vectors = encoder.encode([row["question"] for row in (*train, *rows)])
    counts = [min(row["true_count"], args.n_docs) for row in train]
    predicted, accuracy = predict_k(vectors[: len(train)], counts, vectors[len(train) :], args.seed)
    write_json(args.output_file, (with_labels(row, int(k), args.n_docs) for row, k in zip(rows, predicted, strict=True)))
    most = Counter(counts).most_common(1)[0][1] / len(counts)
    log.info("trained on %d questions; accuracy of k in cross-validation %.3f, of the most frequent k %.3f", len(train), accuracy, most)
    log.info("%s: %d questions by k: %s", args.output_file, len(rows), ", ".join(f"{k}: {count}" for k, count in sorted(Counter(map(int, predicted)).items())))


if __name__ == "__main__":
    stage.run(main)
