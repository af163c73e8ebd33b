"""MonoT5 (Nogueira et al., 2020, arXiv 2003.06713), a sequence-to-sequence model as a pointwise reranker.

It reads `Query: q Document: d Relevant:`. The score is P(true) against `false` for the first output token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dynamicrag.models.batches import IDS_ALONE
from dynamicrag.models.reranker import Pair, Pointwise, Tokens
from dynamicrag.stage import UserError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
class MonoT5(Pointwise):
    """A sequence-to-sequence checkpoint, scored by its first output token."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, device: str, max_length: int):
        super().__init__(model, tokenizer, device, max_length)
        self.true_false = [self._one_token(word) for word in ("true", "false")]

    def said(self) -> str:
        return f"monoT5, P(true) of true and false, at most {self.max_length} tokens"

    def _one_token(self, word: str) -> int:
        tokens = self._tokens(word)
        if len(tokens) != 1 or tokens[0] == self.tokenizer.unk_token_id:
            raise UserError(f"its tokenizer splits {word!r} into the tokens {tokens}; give a monoT5 checkpoint, in which this word is a single token")
        return tokens[0]

    def _tokens(self, text: str | list[str]) -> list:
        return self.tokenizer(text, add_special_tokens=False, **IDS_ALONE)["input_ids"]

    def tokenize(self, pairs: list[Pair]) -> list[Tokens]:
        """Return the tokens of each prompt.

        Only the document is cut, and a question beyond half the window; `Relevant:` stays.
        """
        if not pairs:
            return []
        document, relevant = self._tokens("Document:"), [*self._tokens("Relevant:"), self.tokenizer.eos_token_id]
        questions = list(dict.fromkeys(question for question, _ in pairs))  # each occurs with many documents
        starts = dict(zip(questions, self._tokens([f"Query: {self._cut(question)}" for question in questions]), strict=True))
        texts = self._tokens([self._cut(text) for _, text in pairs])
        inputs = []
        for (question, _), text in zip(pairs, texts, strict=True):
            start = starts[question][: self.max_length // 2] + document
            tokens = start + text[: self.max_length - len(start) - len(relevant)] + relevant
            inputs.append((tokens, []))
        return inputs

    def forward(self, ids: torch.Tensor, mask: torch.Tensor, types: torch.Tensor) -> torch.Tensor:
        """Return P(true) by softmax over the first token's logits of true and false, in float32: [batch, length] -> [batch]."""
        hidden = self.model.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        logits = self._first_token(hidden, mask).float() @ self.model.lm_head.weight[self.true_false].float().T
        return logits.softmax(dim=-1)[:, 0]

    def _first_token(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return the decoder output at its first position: encoder states [batch, length, width] -> [batch, width].

        There is one query per document, so keys and values need not be computed for every token: K h . q equals h .
        K'q, and a weighted sum of values is V applied to the weighted sum of states. This saves two products with every
        encoder state per layer, a seventh of the work of a T5-base. The single token attends to itself with weight 1.
        """
        decoder, config = self.model.decoder, self.model.config
        start = mask.new_full((len(hidden),), config.decoder_start_token_id)
        state = decoder.embed_tokens(start)
        ignored = (mask == 0)[:, None]
        for block in decoder.block:
            itself, cross, feed_forward = block.layer
            attention = itself.SelfAttention
            state = state + attention.o(attention.v(itself.layer_norm(state)))
            attention = cross.EncDecAttention
            keys, values = (part.weight.view(config.num_heads, config.d_kv, -1) for part in (attention.k, attention.v))
            query = attention.q(cross.layer_norm(state)).view(-1, config.num_heads, config.d_kv)
            scores = (query.transpose(0, 1) @ keys).transpose(0, 1) @ hidden.transpose(1, 2)  # [batch, heads, length]
            weights = scores.float().masked_fill(ignored, float("-inf")).softmax(dim=-1).to(hidden.dtype)
            summed = (weights @ hidden).transpose(0, 1) @ values.transpose(1, 2)  # [heads, batch, d_kv]
            state = state + attention.o(summed.transpose(0, 1).reshape(len(state), -1))
            state = feed_forward(state)
        state = decoder.final_layer_norm(state)
        return state * config.d_model**-0.5 if getattr(config, "scale_decoder_outputs", False) else state
