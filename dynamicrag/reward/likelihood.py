"""The likelihood of the gold answer under a frozen generator, without decoding: a continuous term of the reward.

An answer that is decoded is right or wrong, and a small model's answer may change with any detail of the prompt. The
probability that the model gives the gold answer also shows how much a set of documents helps if no answer changes.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from dynamicrag.llm.engine import resolve_model, window_of
from dynamicrag.llm.model_files import prompts_for, pull
from dynamicrag.llm.options import CallOptions
from dynamicrag.llm.requests import RequestBuilder
from dynamicrag.llm.templates import PromptTokenizer, in_threads, load_prompts
from dynamicrag.models.batches import default_batch_tokens, length_batches, pad
from dynamicrag.models.chat_templates import Messages
from dynamicrag.models.checkpoints import check_tokenizer, load_weights, loading, pad_id_of, ready
from dynamicrag.models.device import pick_dtype
from dynamicrag.rows.row import Doc, Row
from dynamicrag.rows.tasks import target_answer

if TYPE_CHECKING:
    import torch


class Likelihood:
    """A generator that scores the gold answers of rows. It asks as inference does, and answers nothing."""

    def __init__(self, model: str, template: str, prompts: str | None, device: str, answer_order: str = "selection", batch_tokens: int | None = None):
        """Raises UserError if the model cannot be loaded or the template does not belong to it."""
        from transformers import AutoModelForCausalLM

        path = pull(resolve_model(model))
        self._prompts: PromptTokenizer = load_prompts(path, template)
        self.max_model_len = window_of(path, None)
        with loading(path, "a language model"):
            self._model = ready(load_weights(AutoModelForCausalLM, path, dtype=pick_dtype("auto", device)), device)
            check_tokenizer(self._prompts.tokenizer, self._model)
        self._device, self._budget = device, batch_tokens or default_batch_tokens(device)
        self._builder = RequestBuilder(cast(Any, self), CallOptions(prompts=prompts_for(path, prompts), answer_order=answer_order))
        self._slices = "logits_to_keep" in inspect.signature(self._model.forward).parameters
        self.computed = self.prompt_tokens = 0
        self._kept: dict[tuple[str, ...], float] = {}

    def fits(self, messages: Messages, max_tokens: int) -> bool:
        """Return whether the prompt leaves room for max_tokens in the window."""
        return len(self._prompts.ids(messages)) + max_tokens <= self.max_model_len

    def of_trajectories(self, rows: list[Row]) -> list[list[float]]:
        """Return the term of every trajectory of every row. Equal selections of a question are computed once."""
        sets = list(dict.fromkeys((number, tuple(ids)) for number, row in enumerate(rows) for ids in row["id_lists"]))
        asked = [(rows[number], [rows[number]["docs"][position - 1] for position in ids]) for number, ids in sets]
        values = dict(zip(sets, self.score(asked), strict=True))
        return [[values[number, tuple(ids)] for ids in row["id_lists"]] for number, row in enumerate(rows)]

    def cached(self, asked: Sequence[tuple[Row, list[Doc]]]) -> list[float]:
        """Return score(), and compute each question with its documents in their order only once."""
        keys = [(row["id"], *(doc["id"] for doc in docs)) for row, docs in asked]
        missing = {key: pair for key, pair in zip(keys, asked, strict=True) if key not in self._kept}
        self._kept.update(zip(missing, self.score(list(missing.values())), strict=True))
        return [self._kept[key] for key in keys]

    def score(self, asked: Sequence[tuple[Row, list[Doc]]]) -> list[float]:
        """Return the probability per token (geometric mean) of each row's gold answer after the prompt with its documents, in [0, 1]."""
        import torch

        texts = in_threads(lambda pair: (self._prompts.ids(self._builder.answer(*pair).messages), self._prompts.answer_ids(target_answer(pair[0]))), asked)
        values = [0.0] * len(texts)
        self.computed += len(texts)
        self.prompt_tokens += sum(len(prompt) + len(answer) for prompt, answer in texts)
        with torch.inference_mode():
            for batch in length_batches([len(prompt) + len(answer) for prompt, answer in texts], self._budget):
                for number, value in zip(batch, self._forward([texts[number] for number in batch]).tolist(), strict=True):
                    values[number] = value
        return values

    def _forward(self, texts: list[tuple[list[int], list[int]]]) -> torch.Tensor:
        """Return exp of the mean log-probability of each answer, float32 [batch]. Only logits of the answers are computed, if the model can."""
        import torch

        ids, mask = pad([prompt + answer for prompt, answer in texts], pad_id_of(self._prompts.tokenizer), self._device)
        first = min(len(prompt) for prompt, _ in texts) - 1 if self._slices else 0
        kept = torch.arange(first, ids.shape[1] - 1, device=self._device)
        options = {"logits_to_keep": kept} if self._slices else {}
        logits = self._model(input_ids=ids, attention_mask=mask, use_cache=False, **options).logits[:, : len(kept)].float()
        chosen = logits.log_softmax(dim=-1).gather(2, ids[:, kept + 1, None])[:, :, 0]
        places = kept[None, :] + 1
        begin = torch.tensor([[len(prompt)] for prompt, _ in texts], device=self._device)
        end = torch.tensor([[len(prompt) + len(answer)] for prompt, answer in texts], device=self._device)
        answers = (places >= begin) & (places < end)
        return ((chosen * answers).sum(dim=1) / answers.sum(dim=1).clamp(min=1)).exp()
