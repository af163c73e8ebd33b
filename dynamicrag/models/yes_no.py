"""Causal models as pointwise rerankers: P(yes) against no, for the token after a prompt about the document.

This is the form of Qwen3-Reranker (2025, arXiv 2506.05176): a system turn that requests yes or no, a user turn with
`<Instruct>:`, `<Query>:` and `<Document>:`, and an assistant turn without thinking. The chat template of the checkpoint
writes the turns. A template with the roles `query` and `document`, as used by sentence-transformers' CrossEncoder,
writes the whole prompt.
"""

from __future__ import annotations

import inspect
import re
from typing import TYPE_CHECKING, Any

from dynamicrag.models.batches import IDS_ALONE
from dynamicrag.models.chat_templates import try_template
from dynamicrag.models.checkpoints import read_json
from dynamicrag.models.reranker import Pair, Pointwise, Tokens
from dynamicrag.stage import UserError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Prompts of this project. A model card gives the prompts that a model was trained with; pass those through the flags.
SYSTEM_PROMPT = 'Decide whether the document is what the instruction asks to find for the query. Reply with one word, "yes" or "no".'
INSTRUCTION = "Find documents that contain what is needed to answer the query."
# Placeholders for question and document while the template is rendered, from Unicode's private use area.
QUERY_MARK, DOCUMENT_MARK = "\ue0f0", "\ue0f1"
# Minimum tokens of the window that must remain for question and document.
LEAST_ROOM = 16


class YesNo(Pointwise):
    """A causal checkpoint with a chat template, scored by its next token."""

    left = True  # the last position is scored, so all texts of a batch must end there

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, device: str, max_length: int, path: str = "",
        instruction: str | None = None, system_prompt: str | None = None,
    ):
        super().__init__(model, tokenizer, device, max_length)
        self.yes_no = _trained_tokens(path) or [self._one_token(word) for word in ("yes", "no")]
        rendered = self._render(path, instruction, system_prompt)
        if rendered.count(QUERY_MARK) != 1 or rendered.count(DOCUMENT_MARK) != 1 or rendered.index(QUERY_MARK) > rendered.index(DOCUMENT_MARK):
            raise UserError("its chat template does not contain the question followed by the document, once each; "
                            "give a reranker's template")
        self._divide(rendered)
        self.accepts = inspect.signature(self.model.forward).parameters.keys()

    def said(self) -> str:
        words = " and ".join(repr(self.tokenizer.decode([token])) for token in self.yes_no)
        return f"a causal model, P(first of {words}), at most {self.max_length} tokens; {self.prompt_said}"

    def _one_token(self, word: str) -> int:
        tokens = self.tokenizer(word, add_special_tokens=False, **IDS_ALONE)["input_ids"]
        if len(tokens) != 1 or tokens[0] == self.tokenizer.unk_token_id:
            raise UserError(f"its tokenizer splits {word!r} into the tokens {tokens}; give a model in which this word is a single token")
        return tokens[0]

    def _render(self, path: str, instruction: str | None, system_prompt: str | None) -> str:
        """Return the prompt of a pair, with placeholders for question and document."""
        template = self.tokenizer.chat_template
        if not isinstance(template, str):
            raise UserError("has no chat template; give a causal reranker with the chat template of its authors")
        shipped = _shipped_prompt(path)
        instruction = instruction if instruction is not None else shipped
        if all(re.search(f"['\"]{role}['\"]", template) for role in ("query", "document")):
            if system_prompt is not None:
                raise UserError("its chat template has the roles query and document and writes the system turn "
                                "itself; omit --system_prompt")
            messages = [{"role": "query", "content": QUERY_MARK}, {"role": "document", "content": DOCUMENT_MARK}]
            messages = [{"role": "system", "content": instruction}, *messages] if instruction is not None else messages
            self.prompt_said = f"prompt of its chat template, {f'instruction {instruction!r}' if instruction is not None else 'no instruction'}"
        else:
            system_prompt, instruction = SYSTEM_PROMPT if system_prompt is None else system_prompt, INSTRUCTION if instruction is None else instruction
            content = f"<Instruct>: {instruction}\n<Query>: {QUERY_MARK}\n<Document>: {DOCUMENT_MARK}"
            messages = [{"role": "system", "content": system_prompt}, {"role": "user", "content": content}]
            self.prompt_said = f"system prompt {system_prompt!r}, instruction {instruction!r}"
        try_template(template, "its chat template", messages)
        return str(self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, enable_thinking=False, tokenize=False))

    def _divide(self, rendered: str) -> None:
        """Cut the prompt at the special tokens around question and document.

        The part between them is tokenised as one text, without special tokens, so that a document cannot end its turn.
        The tokens at the cuts are the same as in the whole prompt.
        """
        special = [str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        query, document = rendered.index(QUERY_MARK), rendered.index(DOCUMENT_MARK)
        start = max((rendered.rfind(token, 0, query) + len(token) for token in special if rendered.rfind(token, 0, query) >= 0), default=0)
        end = min((rendered.find(token, document) for token in special if rendered.find(token, document) >= 0), default=len(rendered))
        between = rendered[start:end]
        self.before_query, rest = between.split(QUERY_MARK)
        self.before_document, after = rest.split(DOCUMENT_MARK)
        self.head = self._tokens(rendered[:start])
        self.tail = self._tokens(after, split_special_tokens=True) + self._tokens(rendered[end:])
        self.room = self.max_length - len(self.head) - len(self.tail) - len(self._tokens(self.before_query + self.before_document))
        if self.room < LEAST_ROOM:
            raise UserError(f"--max_length {self.max_length}: the prompt alone takes {self.max_length - self.room} "
                            "tokens; give a larger value")

    def _tokens(self, text: str | list[str], **options: Any) -> list:
        return self.tokenizer(text, add_special_tokens=False, **IDS_ALONE, **options)["input_ids"] if text else []

    def tokenize(self, pairs: list[Pair]) -> list[Tokens]:
        """Return the tokens of each prompt. Only the document is cut, and a question beyond half the room."""
        halves = {question: self._first_tokens(question, self.room // 2) for question in dict.fromkeys(question for question, _ in pairs)}
        texts = [f"{self.before_query}{halves[question]}{self.before_document}{self._cut(text)}" for question, text in pairs]
        most = self.max_length - len(self.head) - len(self.tail)
        return [(self.head + tokens[:most] + self.tail, []) for tokens in self._tokens(texts, split_special_tokens=True)]

    def forward(self, ids: torch.Tensor, mask: torch.Tensor, types: torch.Tensor) -> torch.Tensor:
        """Return P(yes) by softmax over the logits of yes and no at the last position, in float32: [batch, length] -> [batch]."""
        options = {"position_ids": (mask.cumsum(dim=1) - 1).clamp(min=0), "logits_to_keep": 1, "use_cache": False}
        options = {name: value for name, value in options.items() if name in self.accepts}
        logits = self.model(input_ids=ids, attention_mask=mask, **options).logits[:, -1, self.yes_no].float()
        return logits.softmax(dim=-1)[:, 0]


def _shipped_prompt(path: str) -> str | None:
    """Return the default or query prompt in a CrossEncoder's config_sentence_transformers.json; None if there is none."""
    config = read_json(path, "config_sentence_transformers.json") or {}
    prompts = config.get("prompts") or {}
    prompt = prompts.get(config.get("default_prompt_name") or "query")
    if prompt is not None and not isinstance(prompt, str):
        raise UserError(f"config_sentence_transformers.json: the prompt is {prompt!r}; expected a string")
    return prompt or None


def _trained_tokens(path: str) -> list[int] | None:
    """Return the two tokens that sentence-transformers' LogitScore compares; None if the checkpoint lacks that module."""
    for module in read_json(path, "modules.json") or []:
        if str(module.get("type")).rpartition(".")[2] == "LogitScore":
            config = read_json(path, f"{module['path']}/config.json") or {}
            tokens: list = [config.get("true_token_id"), config.get("false_token_id")]
            if not all(type(token) is int for token in tokens):
                raise UserError(f"{module['path']}/config.json: true_token_id and false_token_id are {tokens}; "
                                "expected two integers")
            return tokens
    return None
