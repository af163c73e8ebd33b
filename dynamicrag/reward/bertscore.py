"""BERTScore F1 (Zhang et al. 2020, arXiv 1904.09675) of many answers at once.

Models, tokenisation, layers and baselines are those of the bert-score package. Batching is implemented here, because
the package's scores depend on what else is scored: its batches follow the order of a set, which differs between
processes, and its padding has a similarity of 0, which beats a negative one. The scores here do not depend on the
batch, apart from the last digits of the encoder.
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
# Maximum tokens whose embeddings are in memory: 0.8 GB at a width of 1024.
BLOCK_TOKENS = 200_000


class BertScore:
    """One encoder, loaded once. Only distinct texts are encoded and only distinct pairs are compared."""

    def __init__(self, model: str, layer: int | None, device: str, baseline: str = "auto", batch_tokens: int | None = None):
        """`model` is an encoder folder or a hub name. `baseline` rescales F1 so that unrelated texts score about 0.

        It is the name of a model for which bert-score has a baseline. "auto" takes the baseline named like `model` or
        its folder, if there is one; "none" disables rescaling. Raises UserError for an unknown model or baseline.
        """
        from bert_score import BERTScorer
        from bert_score.utils import model2layers
        from transformers import AutoConfig, dynamic_module_utils
        from transformers.utils import logging

        # Find the baseline
        names = {known.rpartition("/")[2]: known for known in model2layers} | {known: known for known in model2layers}
        called = names.get(model) or (names.get(Path(model).name) if Path(model).is_dir() else None)
        path = _baseline_path(called or "" if baseline == "auto" else baseline)
        if path is None and baseline not in ("auto", "none"):
            raise UserError(f"--bert_baseline {baseline}: bert-score has no English baseline for this model; give "
                            "another, or none")
        # Load the encoder
        logging.set_verbosity_error()  # suppresses reports about the pooling layer, which BERTScore does not use
        # bert-score does not forbid code next to the weights. With this setting it is refused without asking the user.
        dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0
        try:
            config = AutoConfig.from_pretrained(model, **NO_CODE)
            layer = model2layers.get(called or "", config.num_hidden_layers) if layer is None else layer
            scorer = BERTScorer(
                model_type=model, num_layers=layer, lang="en", device=device, rescale_with_baseline=path is not None,
                baseline_path=path and str(path),
            )
            self.baseline = float(scorer.baseline_vals[2]) if path else 0.0
        except Exception as error:  # a damaged folder can cause almost any exception
            if path and isinstance(error, IndexError):
                raise UserError(f"--bert_layer {layer}: the baseline of {path.stem} lacks this layer; give another, "
                                "or --bert_baseline none") from error
            raise UserError(f"--bert_model {model}: the encoder cannot be loaded: {error}; give another "
                            "model") from error
        # Settings of scoring
        self.layer = layer
        self._model, self._tokenizer, self._device = scorer._model, scorer._tokenizer, device
        # No limit in its files; RoBERTa cannot use two of its positions
        if self._tokenizer.model_max_length > UNLIMITED:
            self._tokenizer.model_max_length = getattr(config, "max_position_embeddings", 514) - 2
        self._unweighted = {self._tokenizer.cls_token_id, self._tokenizer.sep_token_id}
        self._pad_id = self._tokenizer.pad_token_id or 0
        # The lengths of answers vary widely. A quarter of the usual batch keeps the padding next to long answers small.
        self._batch_tokens = batch_tokens or default_batch_tokens(device) // 4
        if path:
            log.info("BERTScore is rescaled with bert-score's baseline for %s, layer %d: %.3f becomes 0",
                     path.stem, layer, self.baseline)

    def score(self, pairs: Sequence[tuple[str, Sequence[str]]]) -> list[float]:
        """Return F1 for each (response, gold answers), with the best gold answer, clipped to [0, 1]; 0 for an empty response."""
        unique = dict.fromkeys(
            (response.strip(), gold.strip())
            for response, golds in pairs for gold in golds if response.strip() and gold.strip()
        )
        scores = dict(zip(unique, self._rescaled(list(unique)), strict=True))
        return [
            max((scores.get((response.strip(), gold.strip()), 0.0) for gold in golds), default=0.0) for response, golds in pairs
        ]

    def _rescaled(self, pairs: list[tuple[str, str]]) -> list[float]:
        """Return F1 of distinct pairs, in order, rescaled and clipped."""
        tokens = self._tokens(list(dict.fromkeys(text for pair in pairs for text in pair)))
        f1: list[float] = []
        for block in _blocks(pairs, tokens):
            f1 += self._f1(block, self._embed({text: tokens[text] for pair in block for text in pair}))
        return [min(max((value - self.baseline) / (1 - self.baseline), 0.0), 1.0) for value in f1]

    def _tokens(self, texts: list[str]) -> dict[str, list[int]]:
        """Encode texts like the package: one by one if the tokenizer needs a leading space, otherwise all at once, which is faster."""
        from bert_score.utils import GPT2Tokenizer, RobertaTokenizer, sent_encode

        if not texts or isinstance(self._tokenizer, GPT2Tokenizer | RobertaTokenizer):
            return {text: sent_encode(self._tokenizer, text) for text in texts}
        encoded = self._tokenizer(texts, truncation=True, max_length=self._tokenizer.model_max_length)["input_ids"]
        return dict(zip(texts, encoded, strict=True))

    def _embed(self, tokens: dict[str, list[int]]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Return, for each text, unit vectors of its tokens, float32 [length, width], and weights [length] that sum to one."""
        import torch

        texts, embedded = list(tokens), {}
        with torch.inference_mode():
            for batch in length_batches([len(tokens[text]) for text in texts], self._batch_tokens):
                ids, mask = pad([tokens[texts[position]] for position in batch], self._pad_id, self._device)
                vectors = torch.nn.functional.normalize(self._model(ids, attention_mask=mask)[0].float(), dim=-1)
                for position, of_text in zip(batch, vectors, strict=True):
                    length = len(tokens[texts[position]])
                    weights = [float(token not in self._unweighted) for token in tokens[texts[position]]]
                    # Only the two special tokens: the vocabulary has none of the characters of the text.
                    total = max(sum(weights), 1.0)
                    embedded[texts[position]] = of_text[:length], torch.tensor(weights, device=self._device) / total
        return embedded

    def _f1(self, pairs: list[tuple[str, str]], embedded: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> list[float]:
        """Match each token with the most similar token of the other text: P over the response, R over the gold answer."""
        import torch
        from torch.nn.utils.rnn import pad_sequence

        f1 = [0.0] * len(pairs)
        longest = [max(len(embedded[text][1]) for text in pair) for pair in pairs]
        with torch.inference_mode():
            for batch in length_batches(longest, self._batch_tokens):
                (given, given_weights), (gold, gold_weights) = (
                    (pad_sequence(list(part), batch_first=True) for part in zip(*(embedded[pairs[position][side]] for position in batch), strict=True))
                    for side in (0, 1)
                )
                similarity = torch.bmm(given, gold.transpose(1, 2))
                for row, position in enumerate(batch):  # padding never matches
                    similarity[row, len(embedded[pairs[position][0]][1]) :] = -1.0
                    similarity[row, :, len(embedded[pairs[position][1]][1]) :] = -1.0
                precision = (similarity.amax(dim=2) * given_weights).sum(dim=1)
                recall = (similarity.amax(dim=1) * gold_weights).sum(dim=1)
                scores = torch.nan_to_num(2 * precision * recall / (precision + recall), nan=0.0, posinf=0.0, neginf=0.0)
                for position, value in zip(batch, scores.tolist(), strict=True):
                    f1[position] = value
        return f1


def _blocks(pairs: list[tuple[str, str]], tokens: dict[str, list[int]]) -> Iterator[list[tuple[str, str]]]:
    """Cut pairs into blocks whose distinct texts have about BLOCK_TOKENS tokens."""
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
    """Return the path of bert-score's English baseline for a model; None if there is none."""
    import bert_score

    path = Path(bert_score.__file__).parent / "rescale_baseline/en" / f"{model}.tsv"
    return path if model and path.is_file() else None
