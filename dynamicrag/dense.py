"""The dense encoder: a text as one vector, the mean of the last hidden states of its tokens.

This is how Contriever (Izacard et al., 2022, arXiv 2112.09118) and the sentence-transformers models encode; the latter
also normalise the vectors. Reads a Hugging Face folder or name, or a training checkpoint of Contriever's
(`checkpoint.pth`). Code in a checkpoint is never executed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from dynamicrag.batches import IDS_ALONE, default_batch_tokens, length_batches, pad
from dynamicrag.checkpoints import NO_CODE, load_tokenizer, load_weights, loading
from dynamicrag.device import pick_device, pick_dtype
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


class Encoder:
    """Encodes texts into vectors of `hidden_size`.

    `seen_tokens` and `padded_tokens` count what went through the model, without and with padding.
    """

    def __init__(
        self, path: str, device: str = "auto", dtype: str = "auto", max_length: int = 512, normalize: bool = False
    ):
        self.device = pick_device(device)
        self.normalize = normalize
        self.model, self.tokenizer = _load(path, pick_dtype(dtype, self.device))
        self.model.to(self.device).eval()
        self.hidden_size: int = self.model.config.hidden_size
        self.max_length = min(max_length, getattr(self.model.config, "max_position_embeddings", max_length))
        self.pad_id = self.tokenizer.pad_token_id or 0
        self.seen_tokens = self.padded_tokens = 0

    def encode(
        self, texts: list[str], batch_tokens: int | None = None, progress: Callable[[int], None] | None = None
    ) -> np.ndarray:
        """Encode texts, in batches of similar length of at most `batch_tokens` padded tokens (by default what suits the device).

        Returns float32 of shape [len(texts), hidden_size], in the order of the texts. `progress` is called with the
        size of every batch.
        """
        return self.encode_tokens(self.tokenize(texts), batch_tokens, progress)

    def tokenize(self, texts: list[str]) -> list[list[int]]:
        """The tokens of each text, cut to max_length. The tokenizer works on all cores, outside Python's global lock."""
        cut = [text[: self.max_length * CHARACTERS_PER_TOKEN] for text in texts]
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
        """Mean over the real tokens, in float32: [batch, length] -> [batch, hidden_size]."""
        import torch

        hidden = self.model(input_ids=ids, attention_mask=mask).last_hidden_state.float()
        weights = mask.unsqueeze(-1)
        mean = (hidden * weights).sum(dim=1) / weights.sum(dim=1)
        return torch.nn.functional.normalize(mean, dim=-1) if self.normalize else mean


def hidden_size(path: str) -> int:
    """The width of an encoder's vectors, from its configuration alone."""
    from transformers import AutoConfig

    checkpoint = _checkpoint(path)
    with loading(path, ENCODER):
        if checkpoint is not None and not (checkpoint.parent / "config.json").is_file():
            return _load(path, None)[0].config.hidden_size
        return AutoConfig.from_pretrained(checkpoint.parent if checkpoint else path, **NO_CODE).hidden_size


def _checkpoint(path: str) -> Path | None:
    """The Contriever checkpoint at `path`, unless the folder has weights in a safer format too."""
    given = Path(path)
    if given.suffix == ".pth" and given.is_file():
        return given
    found = given / CHECKPOINT
    return found if found.is_file() and not (given / "model.safetensors").is_file() else None


def _load(path: str, dtype: torch.dtype | None) -> tuple[PreTrainedModel, object]:
    from transformers import AutoModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # it would report the pooling layer, which mean pooling does without
    checkpoint = _checkpoint(path)
    with loading(path, ENCODER):
        if checkpoint is not None:
            return _load_checkpoint(checkpoint, dtype)
        model = load_weights(AutoModel, path, dtype=dtype)
        return model, load_tokenizer(path, model)


def _load_checkpoint(path: Path, dtype: torch.dtype | None) -> tuple[PreTrainedModel, object]:
    """A checkpoint of Contriever's training: {"model": weights, "opt": its arguments, naming the base model}."""
    import pickle

    import torch
    from transformers import AutoConfig, AutoModel

    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"{path}: refused, it holds more than weights: {str(error).splitlines()[0]}") from error
    if not isinstance(state, dict) or not isinstance(state.get("model"), dict):
        raise UserError(f"{path}: not a Contriever checkpoint; expected a dictionary with the weights under 'model'")
    beside = (path.parent / "config.json").is_file()
    base = str(path.parent) if beside else getattr(state.get("opt"), "retriever_model_id", "bert-base-uncased")
    weights = state["model"]
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
