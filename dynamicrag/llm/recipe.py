"""LLaMA-Factory's recipe for the rows that a stage writes: its token limit, tokenizer, template and columns."""

from argparse import ArgumentParser, Namespace
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import orjson

from dynamicrag.files.hub_access import why_unreachable
from dynamicrag.llm.prompts import read_yaml
from dynamicrag.models.checkpoints import NO_CODE, loading
from dynamicrag.stage import UserError, log, options_from

HERE = Path(__file__).resolve().parents[2]
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")
SETTINGS = {"model_name_or_path": str, "template": str, "cutoff_len": int, "dataset_dir": str}


@dataclass(frozen=True)
class LengthOptions:
    """What limits the length of training rows: the flags of add_length_flags, which describe them."""

    train_recipe: str
    cutoff_len: int | None = None
    tokenizer: str | None = None
    template: str | None = None


def add_length_flags(parser: ArgumentParser, recipe: str) -> None:
    """Add the flags of every stage that writes training rows. `recipe` is the default recipe."""
    group = parser.add_argument_group("length", "training rows never exceed the trainer's token limit: whole "
                                                "documents are removed from the end")
    group.add_argument("--train_recipe", metavar="YAML", default=recipe, help="LLaMA-Factory recipe that will train these rows")
    group.add_argument("--cutoff_len",
                       type=int, help="maximum tokens of a conversation (default: the recipe's cutoff_len)")
    group.add_argument("--tokenizer",
                       help="folder or hub name of the model to be trained (default: the recipe's model_name_or_path)")
    group.add_argument("--template",
                       help="chat template of that model (default: template/<the recipe's template>.jinja)")


def recipe_path(train_recipe: str) -> Path | None:
    """Return the recipe's file, from the current or the project's folder; None without the project.

    Raises UserError if it is missing.
    """
    given = Path(train_recipe)
    if existing := next((path for path in (given, HERE / given) if path.is_file()), None):
        return existing
    if (HERE / "recipes").is_dir():
        raise UserError(f"{given}: no such recipe; give --train_recipe the YAML file that llamafactory-cli will use")
    return None


def read_recipe(path: Path) -> dict:
    """Return the settings of a LLaMA-Factory recipe that affect lengths and columns. Raises UserError."""
    recipe = read_yaml(path, "settings")
    if not isinstance(recipe, dict):
        raise UserError(f"{path}: expected a mapping of settings; give --train_recipe a LLaMA-Factory recipe")
    for name, kind in SETTINGS.items():
        if name in recipe and type(recipe[name]) is not kind:
            raise UserError(f"{path}: {name}: expected {'an integer' if kind is int else 'a text'}, found {recipe[name]!r}")
    return {name: recipe[name] for name in SETTINGS if name in recipe}


def resolve_length_flags(args: Namespace) -> list[str]:
    """Fill flags that are not given from the recipe. Returns the files that determine lengths, as inputs of the stage.

    The recipe itself is not among them, because other settings do not affect training rows. Raises UserError as
    read_recipe does.
    """
    options = resolve_lengths(options_from(args, LengthOptions))
    vars(args).update(asdict(options))
    files = [options.template, *(Path(options.tokenizer) / name for name in TOKENIZER_FILES if options.tokenizer)]
    return [str(file) for file in files if file and Path(file).is_file()]


def resolve_lengths(options: LengthOptions) -> LengthOptions:
    """Return the options with those that are None taken from the recipe. Raises UserError as read_recipe does."""
    path = recipe_path(options.train_recipe)
    recipe = read_recipe(path) if path else {}
    template = options.template
    if not template:
        name = Path("template") / f"{Path(recipe.get('template', '')).name}.jinja"
        template = next((str(file) for file in (name, HERE / name) if file.is_file()), None)
    return replace(
        options, cutoff_len=recipe.get("cutoff_len") if options.cutoff_len is None else options.cutoff_len,
        tokenizer=options.tokenizer or recipe.get("model_name_or_path"), template=template,
    )


def load_tokenizer(model: str) -> tuple[Any, str]:
    """Return the tokenizer of a folder or hub name, or None and the reason. Raises UserError for a damaged folder."""
    folder = Path(model)
    if folder.is_dir():
        if not any((folder / name).is_file() for name in TOKENIZER_FILES):
            return None, f"{model} contains no tokenizer"
    elif folder.exists() or folder.is_absolute() or model.startswith("."):
        raise UserError(f"{model}: no such folder; give --tokenizer the folder of the model to be trained")
    elif why := _unreachable(model):
        return None, why
    with loading(model, "a tokenizer"):
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(model, **NO_CODE), ""
        except OSError as error:
            if folder.is_dir():
                raise
            return None, f"the hub does not deliver the tokenizer of {model} ({str(error).strip().splitlines()[0]})"


def _unreachable(name: str) -> str | None:
    """Return why a hub name cannot be looked up, or None. One quick request; transformers would retry for minutes."""
    import huggingface_hub as hub

    try:
        cached = any(isinstance(hub.try_to_load_from_cache(name, file), str) for file in TOKENIZER_FILES)
    except hub.errors.HFValidationError:
        return f"{name} is neither a folder nor a model name"
    if cached:
        return None
    return f"{name} is not a local folder, and {why}" if (why := why_unreachable()) else None


def check_columns(train_recipe: str, output: str) -> None:
    """Log which dataset_info.json entry trains a file, and warn about entries that would ignore its system prompts.

    Without a mapping in `columns`, LLaMA-Factory silently trains without a system prompt. Published entries have no
    such mapping.
    """
    path = recipe_path(train_recipe)
    folder = Path((read_recipe(path) if path else {}).get("dataset_dir", "recipes"))
    info_path = next((file for file in (folder / "dataset_info.json", HERE / folder / "dataset_info.json") if file.is_file()), None)
    note = ('LLaMA-Factory uses the system prompts of this file only if "columns" of the dataset_info.json entry has '
            '"system": "system"')
    if info_path is None:
        log.warning("%s: %s", output, note)
        return
    try:
        info = orjson.loads(info_path.read_bytes())
        entries = {name: entry for name, entry in info.items() if Path(entry.get("file_name", "")).name == Path(output).name}
        lost = [name for name, entry in entries.items() if entry.get("columns", {}).get("system") != "system"]
    except (ValueError, AttributeError, TypeError) as error:
        raise UserError(f"{info_path}: not a dataset_info.json of LLaMA-Factory ({error}); see recipes/dataset_info.json") from error
    for name in lost:
        log.warning("%s: entry %s would train %s without its system prompt; add \"system\": \"system\" to its columns", info_path, name, output)
    if not entries:
        log.warning("%s: no entry of %s names this file; %s", output, info_path, note)
    elif not lost:
        log.info("%s: %s; %s in %s has it", output, note, ", ".join(entries), info_path)
