"""Load encoders and rerankers from folders of third parties, without running any code from them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from dynamicrag.stage import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Without this option, transformers asks on the terminal whether code from the checkpoint may run. The answer is always
# no.
NO_CODE: dict[str, Any] = {"trust_remote_code": False}


@contextmanager
def loading(path: str, what: str) -> Iterator[None]:
    """Turn any error into a UserError that says why `path` cannot be loaded as `what`.

    Damaged folders cause all kinds of errors.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        on_hub = "" if Path(path).exists() else ", or a name on the hub, and HF_TOKEN if that model is private or gated"
        raise UserError(f"{path}: cannot be loaded as {what} ({reason}); give the folder of a Hugging Face model{on_hub}") from error


def load_weights(auto: Any, path: str, **options: object) -> PreTrainedModel:
    """Load the model of an Auto class. Raises ValueError if weights are missing, because they would be random."""
    model, loading_info = auto.from_pretrained(path, output_loading_info=True, **NO_CODE, **options)
    refuse_missing(loading_info)
    return model


def refuse_missing(found: dict) -> None:
    """Raise ValueError if transformers' loading info lists weights that the checkpoint lacks."""
    missing = sorted(name for name in found["missing_keys"] if "pooler" not in name and not name.endswith("position_ids"))
    if missing:
        raise ValueError(f"it lacks {len(missing)} weights, such as {missing[0]}")


def load_tokenizer(path: str, model: PreTrainedModel) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model. Raises ValueError if it has more tokens than the model."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path, **NO_CODE)
    check_tokenizer(tokenizer, model)
    return tokenizer


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """Raise ValueError if a tokenizer has more tokens than its model."""
    known = getattr(model.get_input_embeddings(), "num_embeddings")  # noqa: B009 - torch does not declare it
    if len(tokenizer) > known:
        raise ValueError(f"its tokenizer has {len(tokenizer)} tokens, but its model only {known}")


def ready(model: PreTrainedModel, device: str) -> PreTrainedModel:
    """Return the model on `device`, for use without training."""
    cast(Any, model).to(device)  # transformers' declaration of to() is not one of a method
    return model.eval()


def pad_id_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id of the padding token; 0 if there is none, because padding is masked."""
    found = tokenizer.pad_token_id
    return found if isinstance(found, int) else 0


def positions(model: PreTrainedModel) -> int | None:
    """Return the maximum number of tokens that a model can read; None if its positions are relative.

    Models like RoBERTa number positions after the padding index: XLM-R has 514 positions and reads 512 tokens.
    """
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is None or limit < 1:
        return None
    tables = (module for name, module in model.named_modules() if name.endswith("position_embeddings"))
    padding = next((table.padding_idx for table in tables if getattr(table, "padding_idx", None) is not None), -1)
    return limit - padding - 1


def read_json(path: str, name: str) -> Any:
    """Read a JSON file of a checkpoint; None if there is no such file. Raises UserError if it is not JSON."""
    import orjson
    from transformers.utils.hub import cached_file

    if Path(path).is_file():
        return None
    file = cached_file(
        path, name, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_gated_repo=False, _raise_exceptions_for_connection_errors=False
    )
    if file is None:
        return None
    try:
        return orjson.loads(Path(file).read_bytes())
    except orjson.JSONDecodeError as error:
        raise UserError(f"{path}/{name}: not JSON ({error}); give the folder of a Hugging Face model") from error


def model_window(model: str) -> int | None:
    """Return the window of a model in tokens according to its config.json; None if it gives none."""
    from transformers import PretrainedConfig

    with loading(model, "a language model"):
        config, _ = PretrainedConfig.get_config_dict(model)
        config = {**config, **(config.get("text_config") or {})}
        names = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "max_sequence_length", "n_ctx")
        windows = [config[name] for name in names if type(config.get(name)) is int and config[name] > 0]
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        if windows and rope.get("rope_type", rope.get("type")) in ("yarn", "linear", "dynamic"):
            windows = [int((rope.get("original_max_position_embeddings") or min(windows)) * rope.get("factor", 1))]
    return min(windows, default=None)
