"""Measure the speed of embedding passages, compared with batches in file order and with the limit set by the encoder.

The limit is the encoder alone at its best batch size, on passages of equal length: no padding, no tokenizer, no disk.
The encoder is a BERT of Contriever's size with random weights. Each passage has 100 words of the CIA World Factbook.
The stage is run in the same way as by users, so that its rate includes tokenizing, writing and padding.

    python benchmarks/encoding.py
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import measure
import numpy as np
import torch

import generate_passage_embeddings
from dynamicrag.models.batches import default_batch_tokens
from dynamicrag.models.encoder import Encoder
from dynamicrag.rows.manifest import read_manifest
from dynamicrag.search.passages import open_passages
from dynamicrag.stage import ArgumentParser

sys.path.insert(0, str(measure.REPOSITORY / "examples" / "factbook"))
LIMIT = "encoder, padding-free limit"


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    parser.add_argument("--model_name_or_path", help="a real encoder (default: one with random weights)")
    parser.add_argument("--passages", type=int, default=600)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output_file", help="JSON file to which the results are added")
    return parser.parse_args(argv)


def factbook(folder: Path, count: int) -> Path:
    """Write every n-th passage of the Factbook, with at most 100 words each. Returns the path."""
    import corpus

    corpus.main(["--output_file", str(folder / "all.jsonl"), "--max_words", "100"])
    lines = (folder / "all.jsonl").read_text().splitlines(keepends=True)
    path = folder / "passages.jsonl"
    path.write_text("".join(lines[:: max(len(lines) // count, 1)][:count]))
    return path


def make_encoder(folder: Path, passages: Path) -> str:
    """Save a BERT of base size with a WordPiece vocabulary learned from the passages."""
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertConfig, BertModel, BertTokenizer

    raw = BertWordPieceTokenizer()
    raw.train(str(passages), vocab_size=30522, min_frequency=1, show_progress=False)
    BertModel(BertConfig()).save_pretrained(folder)
    BertTokenizer(vocab=raw.get_vocab()).save_pretrained(folder)
    return str(folder)


def main() -> None:
    args = parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # The texts, the encoder and the lengths in tokens
        passages = factbook(folder, args.passages)
        model = args.model_name_or_path or make_encoder(folder / "encoder", folder / "all.jsonl")
        store = open_passages(passages)
        columns = store.slice(0, len(store))
        texts = [f"{title} {text}" for title, text in zip(columns["title"], columns["text"], strict=True)]
        encoder = Encoder(model, args.device, args.dtype)
        lengths = [len(tokens) for tokens in encoder.tokenizer(texts, truncation=True, max_length=512)["input_ids"]]
        files = iter(range(10_000))

        # What is compared
        def stage() -> float:
            nonlocal made
            output, began = folder / f"embeddings_{next(files)}", time.perf_counter()
            generate_passage_embeddings.main(["--model_name_or_path", model, "--passages", str(passages), "--output_dir", str(output),
                                              "--dtype", args.dtype, "--device", args.device])
            made = read_manifest(output / "passages_00.npy")["counts"]
            # Reported rate, without loading the encoder
            return float(made["rate"].split()[0]) * (time.perf_counter() - began)

        def in_file_order() -> float:
            for start in range(0, len(texts), 64):
                batch = encoder.tokenizer(texts[start : start + 64], padding=True, truncation=True, max_length=512, return_tensors="pt")
                with torch.inference_mode():
                    encoder._forward(batch["input_ids"].to(args.device), batch["attention_mask"].to(args.device)).cpu()
            return len(texts)

        made: dict = {}
        default = default_batch_tokens(args.device)
        limits = {
            f"{LIMIT}, {size} tokens per batch": partial(measure.encoder_alone, encoder.model, lengths, size, args.device)
            for size in (default // 2, default, 2 * default, 4 * default)
        }
        systems = {"batches of 64 in file order": in_file_order, "generate_passage_embeddings.py": stage, **limits}
        # Measure and report
        seconds = measure.in_turns(systems, args.rounds)
    best = min(limits, key=seconds.get)
    rows = [[system, f"{1 / s:.1f}", f"{seconds['batches of 64 in file order'] / s:.2f}", f"{seconds[best] / s:.2f}"] for system, s in seconds.items()]
    title = f"Encoding, {len(texts)} passages of {np.mean(lengths):.0f} tokens ({min(lengths)} to {max(lengths)}), {args.device}"
    measure.report(title, ["", "passages/s", "to file order", "to the best limit"], rows, {name: 1 / s for name, s in seconds.items()}, args.output_file)
    print(f"padding of generate_passage_embeddings.py: {made['padding']}")


if __name__ == "__main__":
    main()
