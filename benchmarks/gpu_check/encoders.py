"""Parts about encoders: the dense encoder, two kinds of reranker, and BERTScore, on models with random weights."""

import os
import time

import numpy as np

from gpu_check import data
from gpu_check.part import Run, needs


def _timed(function):
    began = time.perf_counter()
    result = function()  # the result is on the host
    return result, time.perf_counter() - began


def _peak(device: str) -> dict:
    """Return the maximum GPU memory used since the last call."""
    if device == "cpu":
        return {}
    import torch

    peak = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    torch.cuda.reset_peak_memory_stats()
    return {"peak_gib": peak}


# ---------------------------------------------------------------- the dense encoder


def encoder(run: Run) -> None:
    """Check a BERT-base: bfloat16 on the GPU against float32 on the CPU, and the tokenizer's share of the time."""
    import torch
    from transformers import BertModel

    from dynamicrag.models.encoder import Encoder

    device = run.device
    # The encoder, and what it gives in float32 on the CPU
    torch.manual_seed(0)
    tokenizer = data.bert_tokenizer(500 if run.dry else 20_000)
    config = data.bert_config(run.dry, len(tokenizer))
    folder = data.saved(run.folder / "encoder", data.random_model(BertModel, config, device), tokenizer)
    few = data.texts(12 if run.dry else 48, 30 if run.dry else 80)
    fast = Encoder(str(folder), device)
    exact = Encoder(str(folder), "cpu", "float32").encode(few)
    run.note(dtype=str(fast.model.dtype), vocabulary=len(tokenizer))

    # Precision
    def same(dtype: str, least: float) -> dict:
        model = Encoder(str(folder), device, dtype)
        vectors = model.encode(few, batch_tokens=2048)
        unit, wanted = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (vectors.astype(np.float64), exact.astype(np.float64)))
        cosine = unit @ wanted.T
        least_own, others = cosine.diagonal().min(), cosine[~np.eye(len(few), dtype=bool)]
        assert np.isfinite(vectors).all() and least_own > least, f"a vector has a cosine of {least_own:.6f} to its own in float32 on the CPU; expected {least}"
        assert (cosine.argmax(axis=1) == np.arange(len(few))).all(), "a text is nearer to another text's vector than to its own"
        return {"least cosine": round(float(least_own), 7), "mean cosine of two texts": round(float(others.mean()), 4)}

    run.case("float32", same, "float32", 0.999999)
    run.case("bfloat16", same, "bfloat16", 0.999)
    # Speed
    passages = data.texts(24 if run.dry else 4096, 30 if run.dry else 130, seed=1)
    passages = passages * (1 if run.dry else 2)

    def throughput(parallel: str, batch_tokens: int | None) -> dict:
        before = os.environ.get("TOKENIZERS_PARALLELISM")
        os.environ["TOKENIZERS_PARALLELISM"] = parallel
        try:
            _, tokenizing = _timed(lambda: fast.tokenizer(passages, truncation=True, max_length=fast.max_length)["input_ids"])
            fast.seen_tokens = fast.padded_tokens = 0
            _, seconds = _timed(lambda: [fast.encode(passages[start : start + 2048], batch_tokens) for start in range(0, len(passages), 2048)])
        finally:
            os.environ["TOKENIZERS_PARALLELISM"] = before or "false"
        return {"passages_per_s": round(len(passages) / seconds), "tokenizer_share": round(tokenizing / seconds, 3),
                "tokenizer_ms_per_passage": round(1000 * tokenizing / len(passages), 3), "tokens_per_passage": round(fast.seen_tokens / len(passages)),
                "padding": round(fast.padded_tokens / fast.seen_tokens, 3), **_peak(device)}

    fast.encode(passages[:2048])  # warm-up
    for parallel in ("false", "true"):
        for batch_tokens in (None,) if run.dry else (None, 65_536):
            run.case(f"TOKENIZERS_PARALLELISM={parallel}, batch_tokens {batch_tokens or 'default'}", throughput, parallel, batch_tokens)


# ---------------------------------------------------------------- rerankers


def reranker(run: Run) -> None:
    """Check a T5-base and a BERT-base: MonoT5 and CrossEncoder against the model's own forward; documents per second."""
    device = run.device
    questions, documents = data.texts(8, 9, seed=2), data.texts(12 if run.dry else 64, 20 if run.dry else 90, seed=3)
    pairs = [(questions[number % 8] + "?", text) for number, text in enumerate(documents)]
    kept = {}
    for gated in (False, True):
        for scaled in (True, False):
            name = f"monoT5 {'gated' if gated else 'plain'}, {'scaled' if scaled else 'not scaled'}"
            run.case(name, _monot5, run, pairs, gated, scaled, kept, device)
    for labels in (1, 2):
        run.case(f"cross-encoder, {labels} label", _cross_encoder, run, pairs, labels, kept, device)
    more = [(questions[number % 8] + "?", text) for number, text in enumerate(data.texts(24 if run.dry else 4096, 20 if run.dry else 130, seed=4))]
    for name, folder in kept.items():
        for batch_tokens in (2048,) if run.dry else (16_384, 65_536):
            run.case(f"{name}, {batch_tokens} tokens per batch", _throughput, folder, more, batch_tokens, device)


def _batch(model, pairs, rows: slice):
    from dynamicrag.models.batches import pad

    inputs = model.tokenize(pairs)[rows]
    ids, mask = pad([tokens for tokens, _ in inputs], model.pad_id, model.device)
    types, _ = pad([kinds or [0] * len(tokens) for tokens, kinds in inputs], 0, model.device)
    return ids, mask, types


def _monot5(run: Run, pairs, gated: bool, scaled: bool, kept: dict, device: str) -> dict:
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    from dynamicrag.models.monot5 import MonoT5
    from dynamicrag.models.reranker import load_reranker

    # A model with random weights whose probabilities differ
    torch.manual_seed(3)
    tokenizer = data.t5_tokenizer(500 if run.dry else 20_000)
    width, layers = (64, 2) if run.dry else (768, 12)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=width, d_kv=64 if not run.dry else 16, d_ff=(2048 if gated else 3072) if not run.dry else 128, num_layers=layers,
        num_heads=12 if not run.dry else 4, decoder_start_token_id=0, feed_forward_proj="gated-gelu" if gated else "relu",
        scale_decoder_outputs=scaled, tie_word_embeddings=scaled,
    )
    made = data.random_model(T5ForConditionalGeneration, config, device)
    if not scaled:  # otherwise the logits are so far apart that every probability is 0 or 1
        with torch.no_grad():
            made.lm_head.weight.mul_(width**-0.5)
    folder = data.saved(run.folder / f"monot5_{gated}_{scaled}", made, tokenizer)
    del made
    kept.setdefault("monoT5", folder)
    # Its own forward pass, this project's, and that without padding
    found = {}
    probabilities = {}
    for dtype in ("float32", "bfloat16"):
        model = load_reranker(str(folder), device, dtype)
        assert isinstance(model, MonoT5) and bool(getattr(model.model.config, "scale_decoder_outputs", scaled)) is scaled
        with torch.inference_mode():
            whole = _batch(model, pairs, slice(None))
            start = torch.full((len(pairs), 1), model.model.config.decoder_start_token_id, device=device)
            logits = model.model(input_ids=whole[0], attention_mask=whole[1], decoder_input_ids=start).logits[:, 0, model.true_false].float()
            own, ours = logits.softmax(dim=-1)[:, 0], model.forward(*whole)
            alone = torch.cat([model.forward(*_batch(model, pairs, slice(row, row + 1))) for row in range(0, len(pairs), 4)])
        probabilities[dtype] = own, ours
        found[dtype] = {"own forward": _most(own, ours), "unpadded": _most(alone, ours[::4])}
    # Differences that bfloat16 does not explain are errors
    spread = float(probabilities["float32"][0].std())
    precision = _most(probabilities["bfloat16"][0], probabilities["float32"][0])
    print(found, "bfloat16 of the own forward is off by", precision, "spread", spread)
    assert spread > 0.005, f"the model does not tell documents apart: {spread}"
    for against, difference in found["float32"].items():
        assert difference < 1e-4, f"float32, {against}: {difference}"
    for against, difference in found["bfloat16"].items():  # not much worse than bfloat16 itself
        assert difference < min(max(2e-2, 2 * precision), 0.1), f"bfloat16, {against}: {difference}; the precision itself: {precision}"
    return {**{f"{dtype} {against}": f"{value:.1e}" for dtype, values in found.items() for against, value in values.items()},
            "bfloat16 itself": f"{precision:.1e}", "spread": round(spread, 3)}


def _most(one, other) -> float:
    return float((one - other).abs().max())


def _cross_encoder(run: Run, pairs, labels: int, kept: dict, device: str) -> dict:
    import torch
    from transformers import BertForSequenceClassification

    from dynamicrag.models.reranker import CrossEncoder, load_reranker

    torch.manual_seed(4)
    tokenizer = data.bert_tokenizer(500 if run.dry else 20_000)
    config = data.bert_config(run.dry, len(tokenizer), num_labels=labels)
    folder = data.saved(run.folder / f"cross_encoder_{labels}", data.random_model(BertForSequenceClassification, config, device), tokenizer)
    kept.setdefault("cross-encoder", folder)
    found = {}
    for dtype, most in (("float32", 1e-4), ("bfloat16", 2e-2)):
        model = load_reranker(str(folder), device, dtype)
        assert isinstance(model, CrossEncoder)
        with torch.inference_mode():
            ours, own = model.forward(*_batch(model, pairs, slice(None))), []
            for question, text in pairs:
                encoded = tokenizer(question, text, truncation=True, max_length=model.max_length, return_tensors="pt").to(device)
                logits = model.model(**encoded).logits[0].float()
                own.append(logits[0].sigmoid() if labels == 1 else logits.softmax(dim=-1)[1])
            own = torch.stack(own)
        found[dtype] = ours, own
        if dtype == "bfloat16":
            most = min(max(most, 2 * _most(own, found["float32"][1])), 0.1)
        assert _most(ours, own) < most, f"{dtype}: {_most(ours, own)} off the model's own; expected {most}"
    spread = float(found["float32"][1].std())
    assert spread > 0.005, f"the model does not tell documents apart: {spread}"
    return {**{dtype: f"{_most(*values):.1e}" for dtype, values in found.items()}, "spread": round(spread, 3)}


def _throughput(folder, pairs, batch_tokens: int, device: str) -> dict:
    from dynamicrag.models.reranker import load_reranker

    model = load_reranker(str(folder), device)
    model.score(pairs[:512], batch_tokens)
    _peak(device)
    inputs, tokenizing = _timed(lambda: model.tokenize(pairs))
    scores, seconds = _timed(lambda: model.score(pairs, batch_tokens))
    assert np.isfinite(scores).all() and (scores >= 0).all() and (scores <= 1).all()
    return {"documents_per_s": round(len(pairs) / seconds), "tokenizer_share": round(tokenizing / seconds, 3),
            "tokens_per_document": round(sum(len(tokens) for tokens, _ in inputs) / len(pairs)), **_peak(device)}


# ---------------------------------------------------------------- BERTScore


def bertscore(run: Run) -> None:
    """Check a BERT-large: GPU against CPU, single pairs against all pairs together, pairs per second."""
    needs("bert_score")
    import torch
    from transformers import BertModel

    from dynamicrag.reward.bertscore import BertScore

    device = run.device
    # The encoder and the pairs
    torch.manual_seed(5)
    tokenizer = data.bert_tokenizer(500 if run.dry else 20_000)
    config = data.bert_config(run.dry, len(tokenizer), large=True)
    folder = str(data.saved(run.folder / "bert_large_made", data.random_model(BertModel, config, device), tokenizer))
    count = 40 if run.dry else 2000
    responses, gold = data.texts(count, 16, seed=6), data.texts(count, 12, seed=7)
    gold = [f"{text} {' '.join(response.split()[: number % 8])}" for number, (text, response) in enumerate(zip(gold, responses, strict=True))]
    pairs = [(response, [text]) for response, text in zip(responses, gold, strict=True)]
    # Speed
    scorer = BertScore(folder, None, device)
    scorer.score(pairs[:50])
    _peak(device)
    together, seconds = _timed(lambda: scorer.score(pairs))
    run.note(pairs_per_s=round(count / seconds), pairs=count, spread=round(float(np.std(together)), 4), least=round(min(together), 3), most=round(max(together), 3), **_peak(device))

    # Scores
    def alone() -> dict:
        off = max(abs(scorer.score([pairs[row]])[0] - together[row]) for row in range(0, count, max(count // 25, 1)))
        assert off < 1e-4, f"a pair alone scores {off} differently"
        return {"off by": f"{off:.1e}"}

    def on_the_cpu() -> dict:
        some = range(0, count, max(count // 50, 1))
        scores = BertScore(folder, None, "cpu").score([pairs[row] for row in some])
        off = max(abs(score - together[row]) for score, row in zip(scores, some, strict=True))
        assert off < 1e-3, f"a pair scores {off} differently on the CPU"
        return {"off by": f"{off:.1e}"}

    def itself() -> dict:
        assert min(scorer.score([(text, [text]) for text in responses[:20]])) > 0.9999 and np.std(together) > 1e-3, "a text against itself is not 1, or all pairs score alike"
        return {"equal": True}

    run.case("alone against all together", alone)
    run.case("a text against itself", itself)
    run.case("against the CPU", on_the_cpu)
