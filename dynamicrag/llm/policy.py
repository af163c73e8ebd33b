"""The selector while it is trained: a transformers model that samples selections as the engines do.

Its weights change from step to step, so that it runs in the trainer and not in vLLM. Selections are short: nearly all of
the time goes into the prompt, which all samples of a question share. Selections are constrained by the same expressions
and the same library (xgrammar) as in vLLM.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

from dynamicrag.llm.completion import Completion, Request, Sample, completion_of, refused
from dynamicrag.llm.templates import PromptTokenizer
from dynamicrag.models.chat_templates import Messages


class PolicyEngine:
    """An engine (fits, complete) over a model that is trained in this process.

    `unwrapped` opens the model for generation, without the wrappers of a distributed training. The trainer sets it.
    """

    def __init__(self, prompts: PromptTokenizer, max_model_len: int):
        self.prompts, self.max_model_len = prompts, max_model_len
        self.unwrapped: Callable[[], AbstractContextManager[Any]] | None = None
        self.end = int(prompts.tokenizer.eos_token_id)
        self._compiler: Any = None

    def fits(self, messages: Messages, max_tokens: int) -> bool:
        """Return whether the prompt leaves room for max_tokens in the window."""
        return len(self.prompts.ids(messages)) + max_tokens <= self.max_model_len

    def complete(self, requests: list[Request]) -> list[Completion]:
        """Run the requests one after another, in order."""
        return [self.completion(request, samples) for request, samples in zip(requests, self.sample(requests), strict=True)]

    def completion(self, request: Request, samples: list[list[int]]) -> Completion:
        """Return the completion of sampled tokens. A prompt that exceeds the window has no samples."""
        if not samples:
            return refused(request, f"a prompt does not leave {request.max_tokens} ({request.limit}) within --max-model-len {self.max_model_len}")
        decode = self.prompts.tokenizer.decode
        texts = [Sample(decode(ids, skip_special_tokens=True), "stop" if ids[-1:] == [self.end] else "length") for ids in samples]
        return completion_of(texts, request, len(self.prompts.ids(request.messages)), sum(map(len, samples)))

    def sample(self, requests: list[Request]) -> list[list[list[int]]]:
        """Return the tokens of the `n` samples of each request, with the end token; [] for a prompt that exceeds the window."""
        with self._generating() as model:
            return [self._sampled(model, request) if self.fits(request.messages, request.max_tokens) else [] for request in requests]

    @contextlib.contextmanager
    def _generating(self) -> Iterator[Any]:
        """Open the model in evaluation mode, without gradients, and restore its mode."""
        import torch

        assert self.unwrapped is not None, "the trainer sets it"
        with self.unwrapped() as model, torch.no_grad():
            training = model.training
            model.eval()
            try:
                yield model
            finally:
                model.train(training)

    def _sampled(self, model: Any, request: Request) -> list[list[int]]:
        """Sample one request with its own seed: its prompt is computed once, then continued `n` times."""
        import torch
        from transformers import DynamicCache, GenerationConfig

        torch.manual_seed(request.seed)
        prompt = torch.tensor([self.prompts.ids(request.messages)], device=model.device)
        cache = DynamicCache(config=model.config)
        model(input_ids=prompt[:, :-1], past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache.batch_repeat_interleave(request.n)
        # Every value is given: those that are left out would come from the model's own file
        sampled: dict[str, Any] = {"do_sample": True, "temperature": request.temperature, "top_p": request.top_p, "top_k": 0} if request.temperature else {"do_sample": False}
        config = GenerationConfig(
            max_new_tokens=request.max_tokens, eos_token_id=self.end, pad_token_id=self.end, repetition_penalty=1.0, disable_compile=True, **sampled,
        )
        whole = model.generate(
            input_ids=prompt.repeat(request.n, 1), attention_mask=torch.ones_like(prompt).repeat(request.n, 1), past_key_values=cache,
            generation_config=config, logits_processor=self._constraint(model, request.pattern),
        )
        return [until(ids, self.end) for ids in whole[:, prompt.shape[1] :].tolist()]

    def _constraint(self, model: Any, pattern: str | None) -> list:
        """Return the processors that exclude every token that does not continue a text of the pattern."""
        if not pattern:
            return []
        import xgrammar
        from xgrammar.contrib.hf import LogitsProcessor

        if self._compiler is None:
            size = model.get_output_embeddings().weight.shape[0]
            self._compiler = xgrammar.GrammarCompiler(xgrammar.TokenizerInfo.from_huggingface(self.prompts.tokenizer, vocab_size=size, stop_token_ids=[self.end]))
        space = " ?" if self.prompts.opens_with_space else ""
        return [LogitsProcessor(self._compiler.compile_regex(f"{space}({pattern})" if space else pattern))]


def until(ids: list[int], end: int) -> list[int]:
    """Return the tokens up to the first end token, with it."""
    return ids[: ids.index(end) + 1] if end in ids else ids
