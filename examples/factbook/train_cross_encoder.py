"""Train the demo's reranker: a cross-encoder that predicts whether a passage is needed for a question.

Starts from the sentence encoder of models.py. Trains on easy pairs first (a needed passage and one retrieved for
another question), then on hard pairs (a needed passage and its neighbours in the ranking). With hard pairs alone, the
loss does not decrease for thousands of pairs. Reads the questions of reranker.jsonl after retrieval (`docs`, best
first, and `gold_docs`). Rows marked `held_out` are not trained on: one half at most is used for evaluation, the others
for calibration. Writes a sequence-classification checkpoint whose sigmoid is above 0.5 for needed passages: the bias of
its output is shifted, so that this label selects best (mean F1) among the first --n_docs of the calibration questions.

    python examples/factbook/train_cross_encoder.py --input_file output/factbook/reranker_retrieval.jsonl \\
        --encoder models/minilm --output_dir models/cross-encoder
"""

import argparse
import math
import os
import random
import shutil
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from dynamicrag.files.jsonio import read_json
from dynamicrag.models.reranker import document_text
from dynamicrag.stage import ArgumentParser, UserError, derive_seed, log, run

# Ratio of the learning rates of the new classification head and the encoder.
HEAD_RATE = 5.0
# (question, passage, whether the passage is needed)
Pair = tuple[str, str, bool]


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    group = parser.add_argument_group("files")
    group.add_argument("--input_file", required=True, help="retrieval output for reranker.jsonl")
    group.add_argument("--encoder", default="models/minilm", help="checkpoint to start from")
    group.add_argument("--output_dir", default="models/cross-encoder", help="folder of the trained checkpoint")
    group.add_argument("--overwrite", action="store_true", help="replace an existing checkpoint")
    group = parser.add_argument_group("pairs")
    group.add_argument("--max_pairs", type=int, default=4500, help="maximum number of question-passage pairs")
    group.add_argument("--easy_share", type=float, default=0.3,
                       help="share of --max_pairs that are easy and come first")
    group.add_argument("--negatives", type=int, default=3, help="negative passages per needed passage in hard pairs")
    group.add_argument("--max_length", type=int, default=256,
                       help="maximum tokens of a pair; the passage is cut, not the question")
    group.add_argument("--eval_rows", type=int, default=100, help="maximum number of held-out questions for evaluation")
    group.add_argument("--n_docs", type=int, default=5, help="documents that will be shown to the LLM, for calibration")
    group = parser.add_argument_group("training")
    group.add_argument("--epochs", type=int, default=1, help="passes over the hard pairs")
    group.add_argument("--batch_size", type=int, default=8, help="pairs per step")
    group.add_argument("--learning_rate", type=float, default=1e-4, help="peak of the linear schedule")
    group.add_argument("--warmup", type=float, default=0.1, help="share of the steps in which the learning rate rises")
    group.add_argument("--dtype", choices=["bfloat16", "float32"],
                       default="bfloat16", help="precision of the forward pass")
    group.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="device for training")
    group.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads")
    group.add_argument("--seed", type=int, default=42, help="seed of every random choice")
    return parser.parse_args(argv)


def read_rows(path: str) -> list[dict]:
    rows = []
    for line, row in read_json(path):
        for key in ("question", "docs", "gold_docs", "held_out"):
            if key not in row:
                raise UserError(f"{path}:{line}: key {key!r} is missing; run the retriever on "
                                "data/factbook/reranker.jsonl, which questions.py writes")
        rows.append(row)
    return rows


def sample_pairs(rows: list[dict], negatives: int, limit: int, rng: random.Random) -> list[Pair]:
    """Return every retrieved needed passage, and other passages sampled with preference for high ranks."""
    pairs = []
    for row in rng.sample(rows, len(rows)):
        gold = set(row["gold_docs"])
        needed = [doc for doc in row["docs"] if doc["id"] in gold]
        others = [(rank, doc) for rank, doc in enumerate(row["docs"], start=1) if doc["id"] not in gold]
        # Weighted sampling without replacement: the largest values of u^(1/w), with weight 1/rank.
        others.sort(key=lambda ranked: rng.random() ** ranked[0], reverse=True)
        chosen = [doc for _, doc in others[:negatives * max(1, len(needed))]]
        pairs += [(row["question"], document_text(doc), True) for doc in needed]
        pairs += [(row["question"], document_text(doc), False) for doc in chosen]
        if len(pairs) >= limit:
            break
    return pairs[:limit]


def sample_easy_pairs(rows: list[dict], limit: int, rng: random.Random) -> list[Pair]:
    """Return every retrieved needed passage, each with a passage that was retrieved for any question."""
    others = [doc for row in rows for doc in row["docs"]]
    pairs = []
    for row in rng.sample(rows, len(rows)):
        for doc in row["docs"]:
            if doc["id"] in row["gold_docs"]:
                pairs.append((row["question"], document_text(doc), True))
                other = rng.choice(others)
                if other["id"] not in row["gold_docs"]:
                    pairs.append((row["question"], document_text(other), False))
    return pairs[:limit]


def batches_by_length(lengths: list[int], size: int, rng: random.Random) -> list[list[int]]:
    """Return random batches of similar length: sorted within chunks of 32 batches, then shuffled."""
    order = rng.sample(range(len(lengths)), len(lengths))
    chunks = [sorted(order[at:at + 32 * size], key=lambda i: lengths[i]) for at in range(0, len(order), 32 * size)]
    batches = [chunk[at:at + size] for chunk in chunks for at in range(0, len(chunk), size)]
    rng.shuffle(batches)
    return batches


def learning_rate_at(step: int, steps: int, warmup: float) -> float:
    """Return the share of the peak learning rate: linear rise, then linear decay."""
    rise = max(1, math.ceil(steps * warmup))
    return (step + 1) / rise if step < rise else max(0.0, (steps - step) / max(1, steps - rise))


def ranking_quality(rows: list[dict], orders: list[list[dict]]) -> tuple[float, float]:
    """Return MRR@10 and R@1 of the first needed passage, over the questions that need any; 0 if none was retrieved."""
    reciprocal, first, count = 0.0, 0, 0
    for row, docs in zip(rows, orders, strict=True):
        if row["gold_docs"]:
            count += 1
            rank = next((rank for rank, doc in enumerate(docs[:10], start=1) if doc["id"] in row["gold_docs"]), None)
            reciprocal += 1 / rank if rank else 0.0
            first += rank == 1
    return reciprocal / max(1, count), first / max(1, count)


def train(model, encoded: dict, labels: list[bool], easy: int, args, rng: random.Random) -> None:
    """Train with AdamW on the first `easy` pairs, then on the others, with binary cross-entropy on the single logit."""
    import torch
    from tqdm import tqdm

    # The head is untrained, the encoder is not.
    head = [weight for name, weight in model.named_parameters() if "encoder" not in name and "embeddings" not in name]
    body = [weight for name, weight in model.named_parameters() if "encoder" in name or "embeddings" in name]
    optimizer = torch.optim.AdamW([{"params": body, "rate": 1.0}, {"params": head, "rate": HEAD_RATE}], weight_decay=0.01)
    lengths = [len(ids) for ids in encoded["input_ids"]]
    plan = batches_by_length(lengths[:easy], args.batch_size, rng)
    for _ in range(args.epochs):
        plan += [[easy + i for i in batch] for batch in batches_by_length(lengths[easy:], args.batch_size, rng)]
    model.train()
    running = None
    with tqdm(total=sum(map(len, plan)), unit="pair", desc="training", mininterval=2) as progress:
        for step, batch in enumerate(plan):
            for group in optimizer.param_groups:
                group["lr"] = args.learning_rate * group["rate"] * learning_rate_at(step, len(plan), args.warmup)
            logits = score(model, encoded, batch, args)
            target = torch.tensor([float(labels[i]) for i in batch], device=logits.device)
            loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, target)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            running = loss.item() if running is None else 0.95 * running + 0.05 * loss.item()
            progress.set_postfix(loss=f"{running:.3f}", refresh=False)
            progress.update(len(batch))
    model.eval()


def score(model, encoded: dict, batch: list[int], args):
    """Return the logits of a batch of pairs, padded to the longest of them."""
    import torch

    width = max(len(encoded["input_ids"][i]) for i in batch)
    inputs = {
        key: torch.tensor([encoded[key][i] + [0] * (width - len(encoded[key][i])) for i in batch], device=args.device)
        for key in ("input_ids", "attention_mask", "token_type_ids")
    }
    with torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.dtype == "bfloat16"):
        return model(**inputs).logits.squeeze(-1).float()


def encode(tokenizer, pairs: list[Pair], max_length: int) -> dict:
    return tokenizer(
        [question for question, _, _ in pairs], [passage for _, passage, _ in pairs],
        truncation="only_second", max_length=max_length, return_token_type_ids=True,
    )


def rerank(model, tokenizer, rows: list[dict], args) -> list[list[tuple[float, dict]]]:
    """Return (probability, document) pairs for every row, best first."""
    import torch
    from tqdm import tqdm

    pairs = [(row["question"], document_text(doc), False) for row in rows for doc in row["docs"]]
    encoded = encode(tokenizer, pairs, args.max_length)
    order = sorted(range(len(pairs)), key=lambda i: len(encoded["input_ids"][i]))
    scores = [0.0] * len(pairs)
    with torch.inference_mode(), tqdm(total=len(order), unit="pair", desc="held-out questions", mininterval=2) as progress:
        for at in range(0, len(order), 64):
            batch = order[at:at + 64]
            for i, value in zip(batch, score(model, encoded, batch, args).sigmoid().tolist(), strict=True):
                scores[i] = value
            progress.update(len(batch))
    remaining = iter(scores)
    return [sorted(((next(remaining), doc) for doc in row["docs"]), key=lambda pair: -pair[0]) for row in rows]


def label_quality(rows: list[dict], ranked: list[list[tuple[float, dict]]]) -> tuple[float, float]:
    """Return precision and recall of the label "above 0.5", over all retrieved documents."""
    hits = said = needed = 0
    for row, docs in zip(rows, ranked, strict=True):
        for probability, doc in docs:
            is_needed, is_said = doc["id"] in row["gold_docs"], probability > 0.5
            hits, said, needed = hits + (is_needed and is_said), said + is_said, needed + is_needed
    return hits / max(1, said), hits / max(1, needed)


def best_threshold(rows: list[dict], ranked: list[list[tuple[float, dict]]], n_docs: int) -> tuple[float, float]:
    """Return the probability above which the first `n_docs` documents are selected with the highest mean F1, and this F1.

    An empty selection is right (1) if a question needs no passage. Of equal thresholds, the one nearest to 0.5 is taken.
    """
    shown = [docs[:n_docs] for docs in ranked]
    known = sorted({probability for docs in shown for probability, _ in docs})
    bounds = [0.0, *((low + high) / 2 for low, high in pairwise(known)), 1.0]
    totals = [0.0] * len(bounds)
    for row, docs in zip(rows, shown, strict=True):
        # Documents are best first, so that a threshold selects the first k of them.
        needed, hits, by_k = len(row["gold_docs"]), 0, [0.0 if row["gold_docs"] else 1.0]
        for k, (_, doc) in enumerate(docs, start=1):
            hits += doc["id"] in row["gold_docs"]
            by_k.append(2 * hits / (needed + k))
        for place, bound in enumerate(bounds):
            totals[place] += by_k[sum(probability > bound for probability, _ in docs)]
    best = max(range(len(bounds)), key=lambda place: (totals[place], -abs(bounds[place] - 0.5)))
    return bounds[best], totals[best] / len(rows)


def calibrate(model, tokenizer, rows: list[dict], args) -> None:
    """Shift the output's bias, so that a sigmoid above 0.5 is the best label for these rows."""
    import torch

    threshold, quality = best_threshold(rows, rerank(model, tokenizer, rows, args), args.n_docs)
    threshold = min(max(threshold, 1e-4), 1 - 1e-4)
    with torch.no_grad():
        model.classifier.bias -= math.log(threshold / (1 - threshold))
    log.info("calibrated on %d held-out questions: a probability of %.3f becomes 0.5 (mean F1 of the selection %.3f)", len(rows), threshold, quality)


def save(model, tokenizer, folder: Path) -> None:
    """Write all files or none: into a temporary folder, which is then renamed."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        temporary.chmod(0o755)
        for file in temporary.iterdir():
            file.chmod(0o644)
        if folder.exists():
            shutil.rmtree(folder)
        temporary.replace(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    folder = Path(args.output_dir)
    if (folder / "config.json").exists() and not args.overwrite:
        log.info("%s already exists; nothing to do (--overwrite trains it again)", folder)
        return
    # Draw the pairs
    rows = read_rows(args.input_file)
    not_trained_on = [row for row in rows if row["held_out"]]
    held_out = not_trained_on[:min(args.eval_rows, len(not_trained_on) // 2)]
    for_calibration = not_trained_on[len(held_out):]
    rng = random.Random(derive_seed(args.seed, "pairs"))
    seen = [row for row in rows if not row["held_out"]]
    pairs = sample_easy_pairs(seen, int(args.easy_share * args.max_pairs), rng)
    easy = len(pairs)
    pairs += sample_pairs(seen, args.negatives, args.max_pairs - easy, rng)
    positives = sum(needed for _, _, needed in pairs)
    if not positives:
        raise UserError(f"{args.input_file}: no gold document was retrieved; check that these passages were indexed")
    if not (Path(args.encoder) / "config.json").exists():
        raise UserError(f"{args.encoder}: contains no checkpoint; create it with python examples/factbook/models.py")
    # Load the encoder
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, logging

    # The classification head is new, as intended; transformers would warn about it at length.
    logging.set_verbosity_error()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.encoder)
    # No dropout: no pair is seen twice, and dropout would make attention several times slower on a CPU.
    model = AutoModelForSequenceClassification.from_pretrained(
        args.encoder, num_labels=1, dtype=torch.float32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).to(args.device)
    # Train
    log.info("training on %d pairs (%d easy, %d needed); evaluating on %d held-out questions",
             len(pairs), easy, positives, len(held_out))
    started = time.monotonic()
    train(model, encode(tokenizer, pairs, args.max_length), [needed for _, _, needed in pairs], easy, args, rng)
    seconds = time.monotonic() - started
    if for_calibration:
        calibrate(model, tokenizer, for_calibration, args)
    save(model, tokenizer, folder)
    # Evaluate
    if held_out:
        ranked = rerank(model, tokenizer, held_out, args)
        before = ranking_quality(held_out, [row["docs"] for row in held_out])
        after = ranking_quality(held_out, [[doc for _, doc in docs] for docs in ranked])
        log.info("held out, as retrieved: MRR@10 %.3f, R@1 %.3f", *before)
        log.info("held out, reranked:     MRR@10 %.3f, R@1 %.3f", *after)
        log.info("held out, label above 0.5: precision %.3f, recall %.3f", *label_quality(held_out, ranked))
        if after[0] <= before[0]:
            log.warning("%s: not better than the retriever, so that models trained on its labels will be worse; train on more "
                        "questions and --max_pairs, or with another --seed", args.output_dir)
    log.info("%s: trained in %.0f s (%.1f pairs per second)",
             folder, seconds, (easy + args.epochs * (len(pairs) - easy)) / seconds)


if __name__ == "__main__":
    run(main)
