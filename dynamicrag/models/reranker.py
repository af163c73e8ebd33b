"""Pointwise rerankers, which compute the probability that a document is relevant to a question.

CrossEncoder is a sequence classifier over the pair. MonoT5 is in monot5.py, and causal models that answer yes or no are
in yes_no.py. The configuration of a checkpoint determines which of the three it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from dynamicrag.models.batches import default_batch_tokens, length_batches, pad
from dynamicrag.models.checkpoints import (
    NO_CODE,
    load_tokenizer,
    load_weights,
    loading,
    pad_id_of,
    positions,
    read_json,
    ready,
)
from dynamicrag.models.device import pick_device, pick_dtype
from dynamicrag.stage import UserError, log

if TYPE_CHECKING:
    import numpy as np
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

Pair = tuple[str, str]  # question, document: title and text
Tokens = tuple[list[int], list[int]]  # token ids of a pair, and its segments (empty if the model has none)

# A text is cut to this many characters per token of the limit before it is tokenised; no token is longer.
CHARACTERS_PER_TOKEN = 100


def document_text(doc: Mapping) -> str:
    """Return the text of a document that every reranker reads, in training and in use."""
    return f"{doc['title']} {doc['text']}".strip()


class Pointwise:
    """Base class of all rerankers: scores many pairs in batches of similar length."""

    left = False  # whether batches are padded on the left

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, device: str, max_length: int):
        self.model: Any = ready(model, device)  # the layers of an architecture have no declared types
        self.tokenizer, self.device, self.max_length = tokenizer, device, max_length
        self.pad_id = pad_id_of(tokenizer)

    def score(
        self, pairs: list[Pair], batch_tokens: int | None = None, progress: Callable[[int], object] | None = None
    ) -> np.ndarray:
        """Return P(relevant) for each pair: float32 [len(pairs)] in [0, 1], in the order of the pairs.

        `batch_tokens` limits the padded tokens of a batch (default: depends on the device). `progress` is called with
        the size of every batch.
        """
        return self.score_tokens(self.tokenize(pairs), batch_tokens, progress)

    def score_tokens(
        self, inputs: list[Tokens], batch_tokens: int | None = None, progress: Callable[[int], object] | None = None
    ) -> np.ndarray:
        """Score pairs that tokenize() has already split into tokens; otherwise like score()."""
        import numpy as np
        import torch

        scores = np.empty(len(inputs), dtype=np.float32)
        scored = []  # fetched at the end, so that a GPU works on one batch while the next is padded
        with torch.inference_mode():
            for batch in length_batches([len(tokens) for tokens, _ in inputs], batch_tokens or default_batch_tokens(self.device)):
                ids, mask = pad([inputs[position][0] for position in batch], self.pad_id, self.device, self.left)
                types, _ = pad([inputs[position][1] for position in batch], 0, self.device)
                scored.append((batch, self.forward(ids, mask, types)))
                if progress is not None:
                    progress(len(batch))
            for batch, of_batch in scored:
                scores[batch] = of_batch.cpu().numpy()
        return scores

    def said(self) -> str:
        """Describe on one line how the score is computed."""
        raise NotImplementedError

    def tokenize(self, pairs: list[Pair]) -> list[Tokens]:
        """Return the tokens and segments of each pair, cut to max_length."""
        raise NotImplementedError

    def forward(self, ids: torch.Tensor, mask: torch.Tensor, types: torch.Tensor) -> torch.Tensor:
        """Return P(relevant), float32: [batch, length] -> [batch]."""
        raise NotImplementedError

    def _cut(self, text: str) -> str:
        return text[: self.max_length * CHARACTERS_PER_TOKEN]

    def _first_tokens(self, text: str, count: int) -> str:
        """Return the part of a text that its first `count` tokens cover."""
        text = self._cut(text)
        offsets = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"][:count]
        return text[: offsets[-1][1]] if offsets else text


class CrossEncoder(Pointwise):
    """A sequence classifier with one label (sigmoid) or two labels, of which the second is `relevant` (softmax)."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, device: str, max_length: int):
        super().__init__(model, tokenizer, device, max_length)
        if self.model.config.num_labels > 2:
            raise UserError(f"its classifier has {self.model.config.num_labels} labels; give a reranker with one or two")
        if getattr(self.model.config, "pad_token_id", None) is None:  # needed to find the last token of a causal model
            self.model.config.pad_token_id = self.pad_id

    def said(self) -> str:
        of = "the sigmoid of its one logit" if self.model.config.num_labels == 1 else "the softmax of its second of two logits"
        return f"a sequence classifier, {of}, at most {self.max_length} tokens"

    def tokenize(self, pairs: list[Pair]) -> list[Tokens]:
        """Return the tokens and segments of each pair. Only the document is cut, and a question beyond half the window."""
        if not pairs:
            return []
        halves = {question: self._first_tokens(question, self.max_length // 2) for question in dict.fromkeys(question for question, _ in pairs)}
        questions = [halves[question] for question, _ in pairs]
        texts = [self._cut(text) for _, text in pairs]
        encoded = self.tokenizer(
            questions, texts, truncation="only_second", max_length=self.max_length, return_token_type_ids=True, return_attention_mask=False
        )
        return list(zip(encoded["input_ids"], encoded["token_type_ids"], strict=True))

    def forward(self, ids: torch.Tensor, mask: torch.Tensor, types: torch.Tensor) -> torch.Tensor:
        """Map the logits to [0, 1], in float32: [batch, length] -> [batch]."""
        segments = {"token_type_ids": types} if "token_type_ids" in self.tokenizer.model_input_names else {}
        logits = self.model(input_ids=ids, attention_mask=mask, **segments).logits.float()
        return logits[:, 0].sigmoid() if logits.shape[1] == 1 else logits.softmax(dim=-1)[:, 1]


def load_reranker(
    path: str, device: str = "auto", dtype: str = "auto", max_length: int = 512, instruction: str | None = None,
    system_prompt: str | None = None,
) -> Pointwise:
    """Load the reranker from a Hugging Face folder or hub name. Its architecture determines the class.

    `instruction` and `system_prompt` are for causal models only. Raises UserError for any other kind of model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification
    from transformers.utils import logging

    from dynamicrag.models.monot5 import MonoT5
    from dynamicrag.models.yes_no import YesNo

    logging.disable_progress_bar()
    device = pick_device(device)
    with loading(path, "a reranker"):
        config = AutoConfig.from_pretrained(path, **NO_CODE)
        options = {}
        if any(name.endswith("ForSequenceClassification") for name in config.architectures or []):
            kind, auto = CrossEncoder, AutoModelForSequenceClassification
        elif any(name.endswith("ForCausalLM") for name in config.architectures or []):
            kind, auto = YesNo, AutoModelForCausalLM
            options = {"path": path, "instruction": instruction, "system_prompt": system_prompt}
        elif config.model_type in ("t5", "mt5"):
            kind, auto = MonoT5, AutoModelForSeq2SeqLM
        else:
            raise UserError(f"{path}: {config.architectures} is not a reranker; expected monoT5, a sequence "
                            "classifier or a causal model")
        if kind is not YesNo and (instruction is not None or system_prompt is not None):
            raise UserError(f"{path}: {kind.__name__} does not use --instruction and --system_prompt; omit them")
        model = load_weights(auto, path, dtype=pick_dtype(dtype, device))
        if kind is CrossEncoder:
            _warn_of_other_uses(path, config)
        window = positions(model) or max_length  # T5 has relative positions and no limit
        tokenizer, max_length = load_tokenizer(path, model), min(max_length, window)
    try:
        return kind(model, tokenizer, device, max_length, **options)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _warn_of_other_uses(path: str, config: PreTrainedConfig) -> None:
    """Log a warning if sentence-transformers' CrossEncoder would compute another score, through a function or a prompt.

    Identity gives the logit, whose sigmoid gives the same order as a probability.
    """
    shipped = read_json(path, "config_sentence_transformers.json") or {}
    within = getattr(config, "sentence_transformers", None) or {}
    function = within.get("activation_fn") or getattr(config, "sbert_ce_default_activation_function", None) or shipped.get("activation_fn")
    if function and str(function).rpartition(".")[2] not in ("Sigmoid", "Identity"):
        log.warning("%s: its authors apply %s to its logits; here rerank_score is their sigmoid or softmax",
                    path, function)
    prompt = (shipped.get("prompts") or {}).get(shipped.get("default_prompt_name"))
    if prompt:
        log.warning("%s: its authors put the prompt %r before each pair, which is not supported here", path, prompt)
