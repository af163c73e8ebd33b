"""BERTScore F1 (Zhang et al. 2020, arXiv 1904.09675) of many answers at once.

Models, tokenisation, layers and baselines are the bert-score package's. The batches are ours: its own follow the order
of a set, which differs from one process to the next, and pad with a similarity of 0, which a negative one loses to; so
its scores depend on what else is scored. These do not, beyond the last digits of the encoder.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dynamicrag.models.batches import default_batch_tokens, length_batches, pad
from dynamicrag.models.checkpoints import NO_CODE
from dynamicrag.stage import UserError, log

if TYPE_CHECKING:
    import torch

UNLIMITED = 1_000_000
# Embeddings of this many tokens are in memory at a time: 0.8 GB at a width of 1024.
BLOCK_TOKENS = 200_000


class BertScore:
    """One encoder, loaded once. Only unique texts are encoded and unique pairs compared."""

    def __init__(self, model: str, layer: int | None, device: str, baseline: str = "auto", batch_tokens: int | None = None):
        """`model` is an encoder folder or a hub name. `baseline` rescales F1 so that unrelated texts score about 0.

        It is the name of a model bert-score has a baseline of; auto takes the one called like `model` or its folder,
        where there is one; none leaves scores as they are. Raises UserError for a model or baseline that is not there.
        """
        from bert_score import BERTScorer
        from bert_score.utils import model2layers
        from transformers import AutoConfig, dynamic_module_utils
        from transformers.utils import logging

        names = {known.rpartition("/")[2]: known for known in model2layers} | {known: known for known in model2layers}
        called = names.get(model) or (names.get(Path(model).name) if Path(model).is_dir() else None)
        path = _baseline_path(called or "" if baseline == "auto" else baseline)
        if path is None and baseline not in ("auto", "none"):
            raise UserError(f"--bert_baseline {baseline}: bert-score has no English baseline of that model")
        logging.set_verbosity_error()  # it would report the pooling layer, which BERTScore does without
        dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0  # bert-score does not say no to code beside the weights: refused, nobody is asked
        try:
            config = AutoConfig.from_pretrained(model, **NO_CODE)
            layer = model2layers.get(called, config.num_hidden_layers) if layer is None else layer
            scorer = BERTScorer(
                model_type=model, num_layers=layer, lang="en", device=device, rescale_with_baseline=path is not None,
                baseline_path=path and str(path),
            )
            self.baseline = float(scorer.baseline_vals[2]) if path else 0.0
        except Exception as error:  # in a damaged folder the libraries raise almost any
            if path and isinstance(error, IndexError):
                raise UserError(f"--bert_layer {layer}: the baseline of {path.stem} has no such layer; give another, or --bert_baseline none") from error
            raise UserError(f"--bert_model {model}: no encoder could be loaded: {error}") from error
        self.layer = layer
        self._model, self._tokenizer, self._device = scorer._model, scorer._tokenizer, device
        if self._tokenizer.model_max_length > UNLIMITED:  # not in its files; RoBERTa does not use two of its positions
            self._tokenizer.model_max_length = getattr(config, "max_position_embeddings", 514) - 2
        self._unweighted = {self._tokenizer.cls_token_id, self._tokenizer.sep_token_id}
        self._pad_id = self._tokenizer.pad_token_id or 0
        # Answers are of very different lengths: a quarter of the usual batch keeps the padding beside a long one small.
        self._batch_tokens = batch_tokens or default_batch_tokens(device) // 4
        if path:
            log.info("BERTScore is rescaled by bert-score's baseline of %s, layer %d: %.3f becomes 0", path.stem, layer, self.baseline)

    def score(self, pairs: Sequence[tuple[str, Sequence[str]]]) -> list[float]:
        """F1 of each (response, gold answers), best gold answer, clipped to [0, 1]; an empty response scores 0."""
        unique = dict.fromkeys(
            (response.strip(), gold.strip())
            for response, golds in pairs for gold in golds if response.strip() and gold.strip()
        )
        scores = dict(zip(unique, self._rescaled(list(unique)), strict=True))
        return [
            max((scores.get((response.strip(), gold.strip()), 0.0) for gold in golds), default=0.0) for response, golds in pairs
        ]

    def _rescaled(self, pairs: list[tuple[str, str]]) -> list[float]:
        """F1 of unique pairs, in their order, rescaled and clipped."""
        tokens = self._tokens(list(dict.fromkeys(text for pair in pairs for text in pair)))
        f1: list[float] = []
        for block in _blocks(pairs, tokens):
            f1 += self._f1(block, self._embed({text: tokens[text] for pair in block for text in pair}))
        return [min(max((value - self.baseline) / (1 - self.baseline), 0.0), 1.0) for value in f1]

    def _tokens(self, texts: list[str]) -> dict[str, list[int]]:
        """As the package encodes them: one by one where its tokenizer wants a space before, else all at once, which is faster."""
        from bert_score.utils import GPT2Tokenizer, RobertaTokenizer, sent_encode

        if not texts or isinstance(self._tokenizer, GPT2Tokenizer | RobertaTokenizer):
            return {text: sent_encode(self._tokenizer, text) for text in texts}
        encoded = self._tokenizer(texts, truncation=True, max_length=self._tokenizer.model_max_length)["input_ids"]
        return dict(zip(texts, encoded, strict=True))

    def _embed(self, tokens: dict[str, list[int]]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Of each text: its tokens' vectors of length 1, float32 [length, width], and their weights [length], which sum to one."""
        import torch

        texts, embedded = list(tokens), {}
        with torch.inference_mode():
            for batch in length_batches([len(tokens[text]) for text in texts], self._batch_tokens):
                ids, mask = pad([tokens[texts[position]] for position in batch], self._pad_id, self._device)
                vectors = torch.nn.functional.normalize(self._model(ids, attention_mask=mask)[0].float(), dim=-1)
                for position, of_text in zip(batch, vectors, strict=True):
                    length = len(tokens[texts[position]])
                    weights = [float(token not in self._unweighted) for token in tokens[texts[position]]]
                    total = max(sum(weights), 1.0)  # nothing but the two special tokens: a text in none of the vocabulary's characters
                    embedded[texts[position]] = of_text[:length], torch.tensor(weights, device=self._device) / total
        return embedded

    def _f1(self, pairs: list[tuple[str, str]], embedded: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> list[float]:
        """Each token is matched with the most similar one of the other text: P over the response, R over the gold answer."""
        import torch
        from torch.nn.utils.rnn import pad_sequence

        f1 = [0.0] * len(pairs)
        longest = [max(len(embedded[text][1]) for text in pair) for pair in pairs]
        with torch.inference_mode():
            for batch in length_batches(longest, self._batch_tokens):
                (given, given_weights), (gold, gold_weights) = (
                    (pad_sequence(part, batch_first=True) for part in zip(*(embedded[pairs[position][side]] for position in batch), strict=True))
                    for side in (0, 1)
                )
                similarity = torch.bmm(given, gold.transpose(1, 2))
                for row, position in enumerate(batch):  # padding is matched last
                    similarity[row, len(embedded[pairs[position][0]][1]) :] = -1.0
                    similarity[row, :, len(embedded[pairs[position][1]][1]) :] = -1.0
                precision = (similarity.amax(dim=2) * given_weights).sum(dim=1)
                recall = (similarity.amax(dim=1) * gold_weights).sum(dim=1)
                scores = torch.nan_to_num(2 * precision * recall / (precision + recall), nan=0.0, posinf=0.0, neginf=0.0)
                for position, value in zip(batch, scores.tolist(), strict=True):
                    f1[position] = value
        return f1


def _blocks(pairs: list[tuple[str, str]], tokens: dict[str, list[int]]) -> Iterator[list[tuple[str, str]]]:
    """Cut pairs where their distinct texts reach BLOCK_TOKENS."""
    block, texts, size = [], set(), 0
    for pair in pairs:
        size += sum(len(tokens[text]) for text in set(pair) - texts)
        texts.update(pair)
        block.append(pair)
        if size >= BLOCK_TOKENS:
            yield block
            block, texts, size = [], set(), 0
    if block:
        yield block


def _baseline_path(model: str) -> Path | None:
    """bert-score's English baseline of a model, by layer, or None where it has none."""
    import bert_score

    path = Path(bert_score.__file__).parent / "rescale_baseline/en" / f"{model}.tsv"
    return path if model and path.is_file() else None
