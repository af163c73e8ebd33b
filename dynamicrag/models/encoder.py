"""The dense encoder: a text as one vector.

A sentence-transformers folder is applied as it says, module by module, on batches of our own; a plain folder is pooled by
the mean, as Contriever (Izacard et al., 2022, arXiv 2112.09118) is, unless a flag says otherwise. Reads a Hugging Face
folder or name, or a training checkpoint of Contriever's (`checkpoint.pth`). Code in a checkpoint is never executed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from dynamicrag.models.batches import IDS_ALONE, default_batch_tokens, length_batches, pad
from dynamicrag.models.checkpoints import (
    NO_CODE,
    check_tokenizer,
    load_tokenizer,
    load_weights,
    loading,
    positions,
    refuse_missing,
)
from dynamicrag.models.device import pick_device, pick_dtype
from dynamicrag.models.encoder_settings import PASSAGE, SentenceModules, Settings, read_settings
from dynamicrag.stage import UserError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from transformers import PreTrainedModel

CHECKPOINT = "checkpoint.pth"
ENCODER = f"an encoder, or Contriever's {CHECKPOINT}"
# Names of the query encoder's weights in Contriever's checkpoints: trained with a momentum queue, or in-batch.
CHECKPOINT_PREFIXES = ("encoder_q.", "encoder.")
# More characters than this a token cannot come from a text that matters; a 1 MB text is cut before it is tokenised.
CHARACTERS_PER_TOKEN = 100
# Tokens of a text that are read, where neither a flag nor the folder says how many.
MAX_LENGTH = 512
UNBOUNDED = 1_000_000  # a tokenizer without a limit says 1e30


class Encoder:
    """Encodes texts of one role, queries or passages, into vectors of `hidden_size`.

    `settings` says how. `max_length` is the flag, else what a sentence-transformers folder says, else 512, and never more
    than the model has positions for. `seen_tokens` and `padded_tokens` count what went through the model, without and
    with padding.
    """

    def __init__(
        self, path: str, device: str = "auto", dtype: str = "auto", max_length: int | None = None, normalize: bool = False,
        pooling: str | None = None, prompt: str | None = None, role: str = PASSAGE,
    ):
        self.device = pick_device(device)
        self.settings, modules = encoder_settings(path, role, normalize, pooling, prompt)
        self.model, self.tokenizer, says = _load(path, modules, pick_dtype(dtype, self.device))
        self.model.to(self.device).eval()
        # What follows the model computes in float32: it is little work, and scores are compared closely.
        self.tail = [module.to(self.device).float().eval() for module in modules.tail]
        self.truncate_dim = modules.truncate_dim
        self.hidden_size = self.settings.width
        self.max_length = min(max_length or says or MAX_LENGTH, positions(self.model) or max_length or MAX_LENGTH)
        self.prompt_length = _prompt_length(self.tokenizer, self.settings.prompt)
        self.pad_id = self.tokenizer.pad_token_id or 0
        self.seen_tokens = self.padded_tokens = 0

    def said(self) -> str:
        """What is done with a text, on one line."""
        return f"{self.settings.said()}, at most {self.max_length} tokens"

    def encode(
        self, texts: list[str], batch_tokens: int | None = None, progress: Callable[[int], None] | None = None
    ) -> np.ndarray:
        """Encode texts, in batches of similar length of at most `batch_tokens` padded tokens (by default what suits the device).

        Returns float32 of shape [len(texts), hidden_size], in the order of the texts. `progress` is called with the
        size of every batch.
        """
        return self.encode_tokens(self.tokenize(texts), batch_tokens, progress)

    def tokenize(self, texts: list[str]) -> list[list[int]]:
        """The tokens of the prompt and each text, cut to max_length. The tokenizer works on all cores, outside Python's global lock."""
        cut = [self.settings.prompt + text[: self.max_length * CHARACTERS_PER_TOKEN] for text in texts]
        return self.tokenizer(cut, truncation=True, max_length=self.max_length, **IDS_ALONE)["input_ids"] if cut else []

    def encode_tokens(
        self, tokens: list[list[int]], batch_tokens: int | None = None, progress: Callable[[int], None] | None = None
    ) -> np.ndarray:
        """encode() of texts that tokenize() has cut into tokens."""
        import numpy as np
        import torch

        vectors = np.empty((len(tokens), self.hidden_size), dtype=np.float32)
        encoded = []  # fetched at the end: a GPU works on one batch while the next is padded
        with torch.inference_mode():
            for batch in length_batches(list(map(len, tokens)), batch_tokens or default_batch_tokens(self.device)):
                ids, mask = pad([tokens[position] for position in batch], self.pad_id, self.device)
                encoded.append((batch, self._forward(ids, mask)))
                self.seen_tokens += sum(len(tokens[position]) for position in batch)
                self.padded_tokens += ids.numel()
                if progress is not None:
                    progress(len(batch))
            for batch, of_batch in encoded:
                vectors[batch] = of_batch.cpu().numpy()
        return vectors

    def _forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """The model, then the modules after it, in float32: [batch, length] -> [batch, hidden_size].

        Texts are padded on the right, whatever the tokenizer prefers: Pooling finds the last token by the mask, and no
        token of a causal model sees the padding after it.
        """
        hidden = self.model(input_ids=ids, attention_mask=mask).last_hidden_state.float()
        features = {"token_embeddings": hidden, "attention_mask": mask, "prompt_length": self.prompt_length}
        for place, module in enumerate(self.tail):
            if self.truncate_dim and place == len(self.tail) - 1 and type(module).__name__ == "Normalize":
                features["sentence_embedding"] = features["sentence_embedding"][:, : self.truncate_dim]
            features = module(features)
        return features["sentence_embedding"][:, : self.truncate_dim]


def encoder_settings(
    path: str, role: str = PASSAGE, normalize: bool = False, pooling: str | None = None, prompt: str | None = None
) -> tuple[Settings, SentenceModules]:
    """read_settings() of any encoder, also of a checkpoint of Contriever's training. Raises UserError for what is none."""
    checkpoint = _checkpoint(path)
    with loading(path, ENCODER):
        if checkpoint is None:
            return read_settings(path, role, normalize, pooling, prompt)
        base = checkpoint.parent if (checkpoint.parent / "config.json").is_file() else _read_checkpoint(checkpoint)[0]
        return read_settings(str(base), role, normalize, pooling, prompt, plain=True)


def _prompt_length(tokenizer: object, prompt: str) -> int:
    """Tokens of a prompt, without what the tokenizer puts after a text: what a Pooling with include_prompt = false leaves out."""
    if not prompt:
        return 0
    tokens = tokenizer(prompt, **IDS_ALONE)["input_ids"]
    return len(tokens) - (tokens[-1] in tokenizer.all_special_ids)


def _checkpoint(path: str) -> Path | None:
    """The Contriever checkpoint at `path`, unless the folder has weights in a safer format too."""
    given = Path(path)
    if given.suffix == ".pth" and given.is_file():
        return given
    found = given / CHECKPOINT
    return found if found.is_file() and not (given / "model.safetensors").is_file() else None


def _load(path: str, modules: SentenceModules, dtype: torch.dtype | None) -> tuple[PreTrainedModel, object, int | None]:
    """Model, tokenizer, and the tokens of a text that the folder says are read."""
    from transformers import AutoModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # it would report the pooling layer of BERT, which no pooling here uses
    checkpoint = _checkpoint(path)
    with loading(path, ENCODER):
        if checkpoint is not None:
            return (*_load_checkpoint(checkpoint, dtype), None)
        if modules.transformer is not None:
            return _load_transformer(path, modules.transformer, dtype)
        model = load_weights(AutoModel, path, dtype=dtype)
        return model, load_tokenizer(path, model), None


def _load_transformer(path: str, folder: str, dtype: torch.dtype | None) -> tuple[PreTrainedModel, object, int | None]:
    """The Transformer module of a sentence-transformers folder, by that library: it knows each kind's encoder and tokenizer."""
    from sentence_transformers.base.modules import Transformer

    class Checked(Transformer):
        """Refuses a checkpoint without weights for a part of its model, which would be noise."""

        def _load_model(self, *args: object, **kwargs: object) -> PreTrainedModel:
            model, found = super()._load_model(*args, output_loading_info=True, **kwargs)
            refuse_missing(found)
            return model

    module = Checked.load(path, subfolder=folder, model_kwargs={"dtype": dtype}, **NO_CODE)
    text = module.modality_config.get("text", {})
    if (text.get("method"), text.get("method_output_name")) != ("forward", "last_hidden_state") or module.tokenizer is None:
        raise UserError(f"{path}: its Transformer gives {text or 'nothing'} for a text; an encoder here gives the last hidden states")
    check_tokenizer(module.tokenizer, module.model)
    says = module.max_seq_length
    return module.model, module.tokenizer, says if says and says < UNBOUNDED else None


def _read_checkpoint(path: Path) -> tuple[str, dict]:
    """A checkpoint of Contriever's training, {"model": weights, "opt": its arguments}: the base model they name, and the weights."""
    import pickle

    import torch

    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"{path}: refused, it holds more than weights: {str(error).splitlines()[0]}") from error
    if not isinstance(state, dict) or not isinstance(state.get("model"), dict):
        raise UserError(f"{path}: not a Contriever checkpoint; expected a dictionary with the weights under 'model'")
    beside = (path.parent / "config.json").is_file()
    base = str(path.parent) if beside else getattr(state.get("opt"), "retriever_model_id", "bert-base-uncased")
    return base, state["model"]


def _load_checkpoint(path: Path, dtype: torch.dtype | None) -> tuple[PreTrainedModel, object]:
    """The encoder of a checkpoint of Contriever's training."""
    from transformers import AutoConfig, AutoModel

    base, weights = _read_checkpoint(path)
    for prefix in CHECKPOINT_PREFIXES:
        inner = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        if any(name.startswith("embeddings.") for name in inner):
            weights = inner
            break
    model = AutoModel.from_config(AutoConfig.from_pretrained(base, **NO_CODE), dtype=dtype, **NO_CODE)
    missing = [name for name in model.load_state_dict(weights, strict=False).missing_keys if "pooler" not in name]
    missing = [name for name in missing if not name.endswith("position_ids")]
    if missing:
        raise UserError(f"{path}: has no weights for {missing[0]} and {len(missing) - 1} more of {base}")
    return model, load_tokenizer(base, model)
