"""Prompt, pooling and normalisation of an encoder, as given by its folder.

A sentence-transformers folder (`modules.json`) lists modules: a Transformer, a Pooling (the first token for BGE and
mxbai, the mean for E5 and GTE, the last token for Qwen3-Embedding), Dense layers, a Normalize. Its
`config_sentence_transformers.json` contains the prompts for queries and passages. The library sentence-transformers
loads these modules. A plain Hugging Face folder gives no pooling: the mean is used unless a flag gives another. It may
contain prompts. The settings are stored with the shards, and a search with other settings is refused.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynamicrag.models.checkpoints import NO_CODE, read_json
from dynamicrag.rows.manifest import manifest_path, read_manifest
from dynamicrag.stage import UserError, log

if TYPE_CHECKING:
    from torch import nn

POOLINGS = ("mean", "cls", "lasttoken")
QUERY, PASSAGE = "query", "passage"
# Prompt names in config_sentence_transformers.json, in the order in which sentence-transformers looks for them.
PROMPT_NAMES = {QUERY: ("query",), PASSAGE: ("document", "passage", "corpus")}
# Modules that may follow the Transformer. Each maps one vector per text to another, or pools the token vectors.
TAIL_MODULES = {"Pooling", "Normalize", "Dense", "LayerNorm", "Dropout"}


@dataclass(frozen=True)
class Settings:
    """The settings that determine the vector of a text, apart from weights and precision."""

    pooling: str  # mean, cls, lasttoken, max, ...; concatenated poolings are joined by "+"
    layers: list[str]  # modules between pooling and normalisation, such as Dense
    normalize: bool
    prompt: str  # prefix of each text of this role
    width: int

    def said(self) -> str:
        """Describe the settings on one line."""
        pooling = {"cls": "first token", "lasttoken": "last token"}.get(self.pooling, self.pooling)
        prompt = f"prompt {self.prompt!r}" if self.prompt else "no prompt"
        return ", ".join([f"pooling {pooling}", *self.layers, "normalised" if self.normalize else "not normalised", prompt])


@dataclass(frozen=True)
class SentenceModules:
    """The modules of a sentence-transformers folder: the path of its Transformer, and the loaded modules after it."""

    transformer: str | None  # folder within the checkpoint, "" for the checkpoint itself; None for a plain folder
    tail: list[nn.Module]
    truncate_dim: int | None


def read_settings(
    path: str, role: str = PASSAGE, normalize: bool = False, pooling: str | None = None, prompt: str | None = None,
    plain: bool = False,
) -> tuple[Settings, SentenceModules]:
    """Return the settings of an encoder for texts of a role, and the modules after its Transformer.

    `path` is a folder or a hub name. `prompt` replaces the folder's prompt. `pooling` is for plain folders only.
    `normalize` adds a normalisation if the folder has none. `plain` treats the folder as a plain one. Raises UserError
    if the flags contradict the folder or the folder contains an unsupported module.
    """
    from sentence_transformers.base.modules import Normalize
    from sentence_transformers.sentence_transformer.modules import Pooling
    from transformers import AutoConfig

    # The modules that the folder lists, or those of a plain folder
    listed = None if plain else read_json(path, "modules.json")
    if listed is None:
        width = AutoConfig.from_pretrained(path, **NO_CODE).hidden_size
        pooled_by: Any = pooling or POOLINGS[0]
        modules = SentenceModules(None, [Pooling(width, pooled_by)], None)
        config = {} if plain else _read_config(path)
    else:
        config = _read_config(path)
        modules = _load_tail(path, listed, config.get("truncate_dim"))
        width = AutoConfig.from_pretrained(path, subfolder=modules.transformer, **NO_CODE).hidden_size
    # Pooling
    poolings = [module for module in modules.tail if isinstance(module, Pooling)]
    names = [type(module).__name__ for module in modules.tail]
    if len(poolings) != 1 or names[0] != "Pooling":
        raise UserError(f"{path}/modules.json: {names} follow the Transformer; give an encoder with exactly one "
                        "Pooling, which comes first")
    pooled = poolings[0].pooling_mode if isinstance(poolings[0].pooling_mode, str) else "+".join(poolings[0].pooling_mode)
    if pooling is not None and pooling != pooled:
        raise UserError(f"--pooling {pooling}: {path}/modules.json specifies {pooled}; omit the flag, which is for "
                        "plain folders only")
    # Normalisation
    compared_by = config.get("similarity_fn_name")
    by_folder = listed is not None and (names[-1] == "Normalize" or compared_by == "cosine")
    if normalize and listed is not None and not by_folder:
        log.warning("--normalize: %s has no Normalize module, and its vectors are compared by %s; they are normalised "
                    "because of the flag",
                    path, compared_by or "an unnamed function")
    elif listed is not None and not by_folder and compared_by not in ("dot", "dot_score"):
        log.warning("%s: has no Normalize module and does not name its similarity function; the inner product is "
                    "used; give --normalize "
                    "to both stages if its authors use the cosine", path)
    # Width
    for module in modules.tail:
        dimension: Any = getattr(module, "get_embedding_dimension", None)
        width = dimension() if dimension else width
    width = min(width, modules.truncate_dim or width)
    if (normalize or by_folder) and (names[-1] != "Normalize" or modules.truncate_dim):
        modules.tail.append(Normalize())
    layers = [name for name in names[1:] if name not in ("Normalize", "Dropout")]
    return Settings(pooled, layers, normalize or by_folder, _prompt_of(path, config, role) if prompt is None else prompt, width), modules


def _load_tail(path: str, listed: object, truncate_dim: int | None) -> SentenceModules:
    """Load the modules that modules.json lists after the Transformer. Raises UserError for an unsupported module."""
    from sentence_transformers.util.misc import import_module_class

    if not isinstance(listed, list) or not all(isinstance(one, dict) for one in listed):
        raise UserError(f"{path}/modules.json: expected a list of modules; give a sentence-transformers folder")
    kinds = [(one.get("type"), one.get("path", "")) for one in listed]
    for place, (kind, folder) in enumerate(kinds):
        known = {"Transformer"} if place == 0 else TAIL_MODULES
        if not isinstance(kind, str) or not kind.startswith("sentence_transformers.") or kind.rpartition(".")[2] not in known:
            raise UserError(f"{path}/modules.json: module {place} is {kind!r}, which is not {' or '.join(sorted(known))} of sentence_transformers; "
                            "give another encoder, because the code of a model is never run")
        if not isinstance(folder, str) or Path(folder).is_absolute() or ".." in Path(folder).parts:
            raise UserError(f"{path}/modules.json: the path of module {place} is {folder!r}, outside the model folder; "
                            "give another encoder")
        activation = (read_json(path, f"{folder}/config.json") or {}).get("activation_function", "torch.") if place else "torch."
        if not str(activation).startswith("torch."):
            raise UserError(f"{path}/{folder}/config.json: the activation function {activation!r} is not from torch; "
                            "give another encoder")
    tail = [import_module_class(kind, path, **NO_CODE).load(path, subfolder=folder, **NO_CODE).eval() for kind, folder in kinds[1:]]
    return SentenceModules(kinds[0][1], tail, truncate_dim)


def _read_config(path: str) -> dict:
    """Read config_sentence_transformers.json: prompts, similarity function, vector width. {} if the folder has none."""
    config = read_json(path, "config_sentence_transformers.json")
    config = {} if config is None else config
    if not isinstance(config, dict) or not isinstance(config.get("prompts") or {}, dict) or not isinstance(config.get("truncate_dim"), int | None):
        raise UserError(f"{path}/config_sentence_transformers.json: expected an object with prompts by name and an "
                        "integer truncate_dim")
    return config


def _prompt_of(path: str, config: dict, role: str) -> str:
    """Return the prompt of a role. If no prompt is specific to a role, the default prompt applies to both roles."""
    prompts = {name: prompt for name, prompt in (config.get("prompts") or {}).items() if prompt}
    named = {name for names in PROMPT_NAMES.values() for name in names}
    names = PROMPT_NAMES[role] if named & prompts.keys() else (config.get("default_prompt_name"),)
    prompt = next((prompts[name] for name in names if name in prompts), "")
    if not isinstance(prompt, str):
        raise UserError(f"{path}/config_sentence_transformers.json: the prompt for each {role} is {prompt!r}; "
                        "expected a string")
    return prompt


# ---------------------------------------------------------------- settings stored with shards


def record(settings: Settings, max_length: int) -> dict:
    """Return the `summary` that a shard's manifest stores."""
    return {"encoder": {**asdict(settings), "max_length": max_length}}


def refuse_other_settings(shards: Iterable[Path], model: str, settings: Settings) -> None:
    """Raise UserError, naming both settings, if the settings of shards differ from those of the search.

    Shards without stored settings, such as published ones, are accepted, which is logged once.
    """
    unknown, prompts = [], {}
    for shard in shards:
        recorded = _recorded(shard)
        if recorded is None:
            unknown.append(shard)
            continue
        prompts.setdefault(recorded["prompt"], shard)
        now = asdict(settings)
        keys = [key for key in ("pooling", "layers", "normalize") if recorded[key] != now[key]]
        other = [f"{key} {recorded[key]!r} before, {now[key]!r} now" for key in keys]
        if other:
            raise UserError(f"{shard}: its settings differ from those of {model}: {'; '.join(other)}; give the same flags to "
                            "generate_passage_embeddings.py and retriever.py, or embed the corpus again")
    if len(prompts) > 1:
        (one, first), (two, second), *_ = prompts.items()
        raise UserError(f"{second}: was embedded with the prompt {two!r}, but {first} with the prompt {one!r}; embed "
                        "one of them again")
    if unknown:
        log.info("%s%s: the settings of the embedding are not known; questions are encoded with %s", unknown[0],
                 f" and {len(unknown) - 1} more" if len(unknown) > 1 else "", settings.said())
    if any(prompts) and not settings.prompt:
        log.warning("%s: was embedded with the prompt %r, but %s has no prompt for questions; give --query_prompt if "
                    "its authors "
                    "use one", prompts[next(filter(None, prompts))], next(filter(None, prompts)), model)


def _recorded(shard: Path) -> dict | None:
    """Return the stored settings of a shard; None if there are none. Shards of earlier versions used mean pooling."""
    manifest = read_manifest(shard)
    if manifest is None:
        return None
    recorded = (manifest.get("summary") or {}).get("encoder") if isinstance(manifest.get("summary") or {}, dict) else {}
    if recorded is None:
        normalize = manifest["arguments"].get("normalize")
        return {"pooling": "mean", "layers": [], "normalize": normalize, "prompt": ""} if isinstance(normalize, bool) else None
    keys = {"pooling", "layers", "normalize", "prompt"}
    if not isinstance(recorded, dict) or not keys <= recorded.keys() or not isinstance(recorded["prompt"], str):
        raise UserError(f"{manifest_path(shard)}: lacks the settings of the embedding; embed this shard again with "
                        "--overwrite")
    return recorded
