"""Measure the speed of the reranker, compared with the published loop and with the limit set by its encoder, in one
run.

The published loop handles one question at a time in file order, pads its documents to the longest and calls
generate(max_length=2). The limit is the encoder alone, on full batches of documents of equal length: no padding, no
decoder. The model is a T5 of base size with random weights, with its output spread so that both labels occur. Documents
are passages of 100 words from the CIA World Factbook, in a vocabulary learned from them.

    python benchmarks/reranking.py
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import measure
import numpy as np
import torch

from dynamicrag.models.batches import default_batch_tokens, length_batches, pad
from dynamicrag.models.monot5 import MonoT5
from dynamicrag.models.reranker import Pair, load_reranker
from dynamicrag.search.corpus import read_passages
from dynamicrag.stage import ArgumentParser

LIMIT = "encoder, padding-free limit"

sys.path.insert(0, str(measure.REPOSITORY / "examples" / "factbook"))


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    parser.add_argument("--questions", type=int, default=8)
    parser.add_argument("--n_docs", type=int, default=50)
    parser.add_argument("--batch_tokens", type=int, help="padded tokens per batch (default: depends on the device)")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output_file", help="JSON file to which the results are added")
    return parser.parse_args(argv)


def passages(folder: Path) -> list[str]:
    """Return the Factbook in passages of at most 100 words."""
    import corpus

    corpus.main(["--output_file", str(folder / "passages.jsonl"), "--max_words", "100"])
    return [f"{title} {text}" for _, title, text in read_passages(folder / "passages.jsonl")]


def make_model(folder: Path, texts: list[str]) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import T5Config, T5ForConditionalGeneration, T5Tokenizer

    raw = Tokenizer(models.Unigram())
    raw.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    special = ["<pad>", "</s>", "<unk>"]
    raw.train_from_iterator(texts, trainers.UnigramTrainer(vocab_size=16_000, special_tokens=special, unk_token="<unk>", show_progress=False))
    vocabulary = dict(json.loads(raw.to_str())["model"]["vocab"])
    vocabulary = list({**vocabulary, "▁true": -8.0, "▁false": -8.0, "▁Relevant:": -8.0}.items())
    T5Tokenizer(vocab=vocabulary, extra_ids=0).save_pretrained(folder)
    torch.manual_seed(0)
    config = T5Config(d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_heads=12, decoder_start_token_id=0)
    T5ForConditionalGeneration(config).save_pretrained(folder)


def spread(model: MonoT5, pairs: list[Pair]) -> None:
    """Set the weights of `true` so that half of these pairs are relevant and the log-odds have a standard deviation of 3.

    A random model gives all documents the same label, and scores so close to 0.5 that rounding errors change it.
    """
    with torch.inference_mode():
        ids, mask = pad([tokens for tokens, _ in model.tokenize(pairs)], model.pad_id, model.device)
        states = model._first_token(model.model.encoder(input_ids=ids, attention_mask=mask).last_hidden_state, mask).float()
        true, false = model.model.lm_head.weight[model.true_false].float()
        mean = states.mean(dim=0)
        direction = (true - false) - ((true - false) @ states.T).median() / (mean @ mean) * mean
        scaled = false + direction * 3 / (direction @ states.T).std()
    model.model.lm_head.weight.data[model.true_false[0]] = scaled.to(model.model.lm_head.weight.dtype)


def published(model: MonoT5, by_question: list[list[Pair]]) -> np.ndarray:
    """Return P(true) by generate(max_length=2), one question at a time."""
    scores = []
    with torch.inference_mode():
        for pairs in by_question:
            texts = [f"Query: {question} Document: {document} Relevant:" for question, document in pairs]
            inputs = model.tokenizer(texts, padding=True, truncation=True, max_length=512, return_tensors="pt").to(model.device)
            generated = model.model.generate(**inputs, max_length=2, return_dict_in_generate=True, output_scores=True)
            logits = generated.scores[0][:, model.true_false].float()
            scores.append(logits.softmax(dim=1)[:, 0].cpu().numpy())
    return np.concatenate(scores)


def main() -> None:
    args = parse_args()
    rng = np.random.default_rng(0)
    scores, rows, figures = {}, [], {}
    batch_tokens = args.batch_tokens or default_batch_tokens(args.device)
    with tempfile.TemporaryDirectory() as folder:
        # Questions and their documents
        texts = passages(Path(folder))
        questions = [" ".join(texts[number].split()[:9]) + "?" for number in rng.choice(len(texts), args.questions, replace=False)]
        by_question = [[(question, texts[number]) for number in rng.choice(len(texts), args.n_docs, replace=False)] for question in questions]
        pairs = [pair for pairs in by_question for pair in pairs]
        make_model(Path(folder), texts)
        # Each precision: lengths, systems, speed
        for dtype in args.dtypes:
            model = load_reranker(folder, args.device, dtype)
            spread(model, pairs[:40])
            lengths = [len(tokens) for tokens, _ in model.tokenize(pairs)]
            padded = sum(len(batch) * max(lengths[n] for n in batch) for batch in length_batches(lengths, batch_tokens))
            by_file = sum(args.n_docs * max(lengths[start : start + args.n_docs]) for start in range(0, len(pairs), args.n_docs))

            def loop(model=model, dtype=dtype) -> float:
                scores["published loop", dtype] = published(model, by_question)
                return len(pairs)

            def ours(model=model, dtype=dtype) -> float:
                scores["reranker.py", dtype] = model.score(pairs, batch_tokens)
                return len(pairs)

            began = time.perf_counter()
            systems = {"published loop": loop, "reranker.py": ours, LIMIT: partial(measure.encoder_alone, model.model.encoder, lengths, batch_tokens, args.device)}
            seconds = measure.in_turns(systems, args.rounds, warm_up=False)
            waste = {"published loop": 1 - sum(lengths) / by_file, "reranker.py": 1 - sum(lengths) / padded, LIMIT: 0.0}
            print(f"{dtype}: {time.perf_counter() - began:.0f} s", file=sys.stderr)
            for name, s in seconds.items():
                figures[f"{name}, {dtype}"] = 1 / s
                rows.append([name, dtype, f"{1 / s:.2f}", f"{seconds['published loop'] / s:.2f}",
                             f"{seconds[LIMIT] / s:.2f}", f"{waste[name]:.1%}"])
    # Report speed, then agreement
    title = f"Reranking, {len(pairs)} documents of {np.mean(lengths):.0f} tokens ({min(lengths)} to {max(lengths)}), T5-base, {args.device}"
    measure.report(title, ["", "precision", "documents/s", "to the loop", "to the limit", "padding"], rows, figures, args.output_file)
    reference = scores["published loop", args.dtypes[0]]
    print()
    for (name, dtype), values in scores.items():
        same = (values > 0.5) == (reference > 0.5)
        print(f"{name}, {dtype}: labels as the published loop in {args.dtypes[0]} {same.mean():.2%}, scores within {np.abs(values - reference).max():.2e}; "
              f"{(values > 0.5).mean():.0%} relevant; those that differ have scores {np.round(reference[~same], 4).tolist()}")


if __name__ == "__main__":
    main()
