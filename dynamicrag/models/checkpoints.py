"""Encoders and rerankers in folders that others made: loaded without running any code they bring, refused in one line."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dynamicrag.stage import UserError

# transformers asks on the terminal whether code beside the weights may run, where it is not told; it is always told no.
NO_CODE = {"trust_remote_code": False}


@contextmanager
def loading(path: str, what: str) -> Iterator[None]:
    """Say in one line why `path` cannot be loaded as `what`: in a damaged folder the libraries raise almost any exception."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{path}: cannot be loaded as {what} ({reason}); give the folder of a Hugging Face model") from error


def load_weights(auto: type, path: str, **options: object) -> object:
    """The model of an Auto class. Raises ValueError where the folder has no weights for a part of it: they would be noise."""
    model, found = auto.from_pretrained(path, output_loading_info=True, **NO_CODE, **options)
    refuse_missing(found)
    return model


def refuse_missing(found: dict) -> None:
    """Raises ValueError where transformers' loading info names weights that a checkpoint does not have."""
    missing = sorted(name for name in found["missing_keys"] if "pooler" not in name and not name.endswith("position_ids"))
    if missing:
        raise ValueError(f"it has no weights for {missing[0]} and {len(missing) - 1} more")


def load_tokenizer(path: str, model: object) -> object:
    """The tokenizer of a model. Raises ValueError where it has tokens that the model has not."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path, **NO_CODE)
    check_tokenizer(tokenizer, model)
    return tokenizer


def check_tokenizer(tokenizer: object, model: object) -> None:
    """Raises ValueError where a tokenizer has tokens that the model has not."""
    known = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > known:
        raise ValueError(f"its tokenizer has {len(tokenizer)} tokens, its model {known}")


def positions(model: object) -> int | None:
    """How many tokens a model can read; None where its positions are relative.

    Models of RoBERTa's kind count positions from the one after that of padding: XLM-R has 514, and reads 512 tokens.
    """
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is None or limit < 1:
        return None
    tables = (module for name, module in model.named_modules() if name.endswith("position_embeddings"))
    padding = next((table.padding_idx for table in tables if getattr(table, "padding_idx", None) is not None), -1)
    return limit - padding - 1


def read_json(path: str, name: str) -> object | None:
    """A JSON file of a checkpoint, or None where it has no such file."""
    import orjson
    from transformers.utils import cached_file

    if Path(path).is_file():
        return None
    found = cached_file(
        path, name, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_gated_repo=False, _raise_exceptions_for_connection_errors=False
    )
    if found is None:
        return None
    try:
        return orjson.loads(Path(found).read_bytes())
    except orjson.JSONDecodeError as error:
        raise UserError(f"{path}/{name}: not JSON ({error}); give the folder of a Hugging Face model") from error
