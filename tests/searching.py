"""The stages of retrieval on a tiny corpus."""

import random

from conftest import read_jsonl
from stubs import make_text

import generate_passage_embeddings
import retriever

QUESTIONS = [{"id": f"q{number}", "question": make_text(random.Random(number), 3, 9)} for number in range(11)]


def embed(model, passages, folder, *flags):
    generate_passage_embeddings.main([
        "--model_name_or_path", str(model), "--passages", str(passages), "--output_dir", str(folder), "--dtype", "float32",
        "--device", "cpu", *map(str, flags),
    ])


def retrieve(model, passages, embeddings, query, output, *flags):
    retriever.main([
        "--model_name_or_path", str(model), "--passages", str(passages), "--passages_embeddings", f"{embeddings}/*", "--query",
        str(query), "--output_dir", str(output), "--dtype", "float32", "--device", "cpu", *map(str, flags),
    ])
    return read_jsonl(output)
