"""The dense encoder, which maps a text to one vector.

A sentence-transformers folder is applied module by module, with batches formed here. A plain folder uses mean pooling,
like Contriever (Izacard et al., 2022, arXiv 2112.09118), unless a flag gives another pooling. The model is a Hugging
Face folder or name, or a Contriever training checkpoint (`checkpoint.pth`). Code in a checkpoint is never executed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynamicrag.models.batches import IDS_ALONE, default_batch_tokens, length_batches, pad
from dynamicrag.models.checkpoints import (
    NO_CODE,
    check_tokenizer,
    load_tokenizer,
    load_weights,
    loading,
    pad_id_of,
    positions,
    ready,
    refuse_missing,
)
from dynamicrag.models.device import pick_device, pick_dtype
from dynamicrag.models.encoder_settings import PASSAGE, SentenceModules, Settings, read_settings
from dynamicrag.stage import UserError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CHECKPOINT = "checkpoint.pth"
ENCODER = f"an encoder, or Contriever's {CHECKPOINT}"
# Prefixes of the query encoder's weights in Contriever checkpoints, trained with a momentum queue or in-batch
# negatives.
CHECKPOINT_PREFIXES = ("encoder_q.", "encoder.")
# A text is cut to this many characters per token of the limit before it is tokenised, because texts of 1 MB occur.
CHARACTERS_PER_TOKEN = 100
# Maximum tokens of a text if neither a flag nor the folder gives a limit.
MAX_LENGTH = 512
UNBOUNDED = 1_000_000  # a tokenizer without a limit reports 1e30


class Encoder:
    """Encodes texts of one role (queries or passages) as vectors of `hidden_size`.

    `settings` holds pooling, prompt and normalisation. `max_length` comes from the flag, otherwise from the
    sentence-transformers folder, otherwise it is 512; it never exceeds the positions of the model. `seen_tokens` and
    `padded_tokens` count the tokens that were processed, without and with padding.
    """

    def __init__(
        self, path: str, device: str = "auto", dtype: str = "auto", max_length: int | None = None, normalize: bool = False,
        pooling: str | None = None, prompt: str | None = None, role: str = PASSAGE,
    ):
        self.device = pick_device(device)
        self.settings, modules = encoder_settings(path, role, normalize, pooling, prompt)
        model, self.tokenizer, says = _load(path, modules, pick_dtype(dtype, self.device))
        self.model = ready(model, self.device)
        # The modules after the model run in float32: they are cheap, and small differences in scores matter.
        self.tail = [module.to(self.device).float().eval() for module in modules.tail]
        self.truncate_dim = modules.truncate_dim
        self.hidden_size = self.settings.width
        self.max_length = min(max_length or says or MAX_LENGTH, positions(self.model) or max_length or MAX_LENGTH)
        self.prompt_length = _prompt_length(self.tokenizer, self.settings.prompt)
        self.pad_id = pad_id_of(self.tokenizer)
        self.seen_tokens = self.padded_tokens = 0

    def said(self) -> str:
        """Describe on one line how a text is encoded."""
        return f"{self.settings.said()}, at most {self.max_length} tokens"

    def encode(
        self, texts: list[str], batch_tokens: int | None = None, progress: Callable[[int], object] | None = None
    ) -> np.ndarray:
        """Encode texts in batches of similar length with at most `batch_tokens` padded tokens (default: depends on the device).

        Returns float32 [len(texts), hidden_size] in the order of the texts. `progress` is called with the size of every
        batch.
        """
        return self.encode_tokens(self.tokenize(texts), batch_tokens, progress)

    def tokenize(self, texts: list[str]) -> list[list[int]]:
        """Return the tokens of prompt and text for each text, cut to max_length.

        The tokenizer uses all cores and releases the GIL.
        """
        cut = [self.settings.prompt + text[: self.max_length * CHARACTERS_PER_TOKEN] for text in texts]
        return self.tokenizer(cut, truncation=True, max_length=self.max_length, **IDS_ALONE)["input_ids"] if cut else []

    def encode_tokens(
        self, tokens: list[list[int]], batch_tokens: int | None = None, progress: Callable[[int], object] | None = None
    ) -> np.ndarray:
        """Encode texts that tokenize() has already split into tokens; otherwise like encode()."""
        import numpy as np
        import torch

        vectors = np.empty((len(tokens), self.hidden_size), dtype=np.float32)
        encoded = []  # fetched at the end, so that a GPU works on one batch while the next is padded
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
        """Run the model and the modules after it, in float32: [batch, length] -> [batch, hidden_size].

        Texts are always padded on the right: Pooling finds the last token by the mask, and in a causal model no token
        attends to the padding after it.
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
    """Call read_settings() for any encoder, including a Contriever checkpoint. Raises UserError for anything else."""
    checkpoint = _checkpoint(path)
    with loading(path, ENCODER):
        if checkpoint is None:
            return read_settings(path, role, normalize, pooling, prompt)
        base = checkpoint.parent if (checkpoint.parent / "config.json").is_file() else _read_checkpoint(checkpoint)[0]
        return read_settings(str(base), role, normalize, pooling, prompt, plain=True)


def _prompt_length(tokenizer: PreTrainedTokenizerBase, prompt: str) -> int:
    """Return the number of prompt tokens without a trailing special token.

    Pooling with include_prompt = false skips these.
    """
    if not prompt:
        return 0
    tokens = tokenizer(prompt, **IDS_ALONE)["input_ids"]
    return len(tokens) - (tokens[-1] in tokenizer.all_special_ids)


def _checkpoint(path: str) -> Path | None:
    """Return the Contriever checkpoint at `path`; None if there is none or the folder also has safetensors weights."""
    given = Path(path)
    if given.suffix == ".pth" and given.is_file():
        return given
    checkpoint = given / CHECKPOINT
    return checkpoint if checkpoint.is_file() and not (given / "model.safetensors").is_file() else None


def _load(path: str, modules: SentenceModules, dtype: torch.dtype | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, int | None]:
    """Return the model, the tokenizer, and the token limit that the folder gives (None: no limit)."""
    from transformers import AutoModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # suppresses reports about BERT's pooling layer, which is not used
    checkpoint = _checkpoint(path)
    with loading(path, ENCODER):
        if checkpoint is not None:
            return (*_load_checkpoint(checkpoint, dtype), None)
        if modules.transformer is not None:
            return _load_transformer(path, modules.transformer, dtype)
        model = load_weights(AutoModel, path, dtype=dtype)
        return model, load_tokenizer(path, model), None


def _load_transformer(path: str, folder: str, dtype: torch.dtype | None) -> tuple[PreTrainedModel, Any, int | None]:
    """Load the Transformer module of a sentence-transformers folder with that library, which supports every kind of it."""
    from sentence_transformers.base.modules import Transformer

    class Checked(Transformer):
        """Raises ValueError for a checkpoint with missing weights, which would be random."""

        def _load_model(self, *args: Any, **kwargs: Any) -> PreTrainedModel:
            loaded: Any = super()._load_model(*args, output_loading_info=True, **kwargs)
            model, loading_info = loaded
            refuse_missing(loading_info)
            return model

    module = Checked.load(path, subfolder=folder, model_kwargs={"dtype": dtype}, **NO_CODE)
    text = module.modality_config.get("text", {})
    if (text.get("method"), text.get("method_output_name")) != ("forward", "last_hidden_state") or module.tokenizer is None:
        raise UserError(f"{path}: its Transformer returns {text or 'nothing'} for a text; give an encoder that "
                        "returns the last hidden states")
    check_tokenizer(module.tokenizer, module.model)
    says = module.max_seq_length
    return module.model, module.tokenizer, says if says and says < UNBOUNDED else None


def _read_checkpoint(path: Path) -> tuple[str, dict]:
    """Read a Contriever training checkpoint, {"model": weights, "opt": arguments}. Returns the base model's name and the weights."""
    import pickle

    import torch

    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"{path}: contains more than weights ({str(error).splitlines()[0]}); give another checkpoint") from error
    if not isinstance(state, dict) or not isinstance(state.get("model"), dict):
        raise UserError(f"{path}: not a Contriever checkpoint; expected a dictionary with weights under the key 'model'")
    beside = (path.parent / "config.json").is_file()
    base = str(path.parent) if beside else getattr(state.get("opt"), "retriever_model_id", "bert-base-uncased")
    return base, state["model"]


def _load_checkpoint(path: Path, dtype: torch.dtype | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the encoder and the tokenizer of a Contriever training checkpoint."""
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
        raise UserError(f"{path}: lacks {len(missing)} weights of {base}, such as {missing[0]}; give a complete checkpoint")
    return model, load_tokenizer(base, model)
