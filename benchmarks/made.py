"""Artificial inputs for benchmarks of stages: corpus, encoder, embeddings and questions of any size."""

import csv
from pathlib import Path

import numpy as np


def corpus(folder: Path, count: int) -> Path:
    """Write a TSV of passages with 100 words each."""
    words = np.array([f"word{number}" for number in range(5000)])
    rng = np.random.default_rng(0)
    texts = [" ".join(words[rng.integers(0, 5000, 100)]) for _ in range(1000)]
    path = folder / f"passages_{count}.tsv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerow(["id", "text", "title"])
        writer.writerows([number, texts[number % 1000], f"title {number}"] for number in range(count))
    return path


def encoder(folder: Path, width: int, layers: int) -> Path:
    """Save a BERT with random weights. Width 768 and 12 layers give Contriever's size."""
    from transformers import BertConfig, BertModel, BertTokenizer

    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"word{number}" for number in range(5000))]
    config = BertConfig(vocab_size=30522, hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 64, intermediate_size=4 * width)
    BertModel(config).save_pretrained(folder)
    BertTokenizer(vocab={piece: number for number, piece in enumerate(pieces)}).save_pretrained(folder)
    return folder


def shards(folder: Path, count: int, width: int) -> str:
    from dynamicrag.search.shards import save_array, save_ids

    folder.mkdir()
    rng = np.random.default_rng(0)
    block = rng.standard_normal((min(count, 100_000), width), dtype=np.float32).astype(np.float16)
    for number, start in enumerate(range(0, count, 1_000_000)):
        size = min(1_000_000, count - start)
        # All distinct
        turned = [np.roll(block, start // len(block) + turn, axis=1) for turn in range(-(-size // len(block)))]
        save_array(folder / f"passages_{number:02d}.npy", np.concatenate(turned)[:size])
        save_ids(folder / f"passages_{number:02d}.ids.npy", [str(start + row) for row in range(size)])
    return f"{folder}/*"


def questions_file(folder: Path, count: int) -> Path:
    path = folder / f"questions_{count}.jsonl"
    with path.open("w") as file:
        for number in range(count):
            file.write(f'{{"id": "{number}", "question": "word{number % 5000} word{number * 7 % 5000}"}}\n')
    return path
