"""What an encoder does with a text beside computing hidden states: prompt, pooling, normalisation. Its folder says it.

A sentence-transformers folder (`modules.json`) lists modules: a Transformer, a Pooling (BGE and mxbai take the first
token, E5 and GTE the mean, Qwen3-Embedding the last token), Dense layers, a Normalize. Its
`config_sentence_transformers.json` has the prompts that its authors put before a query and before a passage. The library
sentence-transformers loads these modules. A plain Hugging Face folder says nothing: it is pooled by the mean, unless a
flag says otherwise; prompts may stand beside its weights too. Shards keep what was used, and a search with other settings is refused.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dynamicrag.models.checkpoints import NO_CODE, read_json
from dynamicrag.rows.manifest import manifest_path, read_manifest
from dynamicrag.stage import UserError, log

if TYPE_CHECKING:
    from torch import nn

POOLINGS = ("mean", "cls", "lasttoken")
QUERY, PASSAGE = "query", "passage"
# The names of prompts in config_sentence_transformers.json, in the order in which sentence-transformers looks for them.
PROMPT_NAMES = {QUERY: ("query",), PASSAGE: ("document", "passage", "corpus")}
# Modules that may follow the Transformer: each takes and gives one vector a text, or pools the token vectors to one.
TAIL_MODULES = {"Pooling", "Normalize", "Dense", "LayerNorm", "Dropout"}


@dataclass(frozen=True)
class Settings:
    """What decides the vector of a text, beside the weights and the precision."""

    pooling: str  # mean, cls, lasttoken, max, ...; several that are concatenated are joined by "+"
    layers: list[str]  # modules between pooling and normalisation, such as Dense
    normalize: bool
    prompt: str  # what is put before each text of this role
    width: int

    def said(self) -> str:
        """The settings on one line, for people."""
        pooling = {"cls": "first token", "lasttoken": "last token"}.get(self.pooling, self.pooling)
        prompt = f"prompt {self.prompt!r}" if self.prompt else "no prompt"
        return ", ".join([f"pooling {pooling}", *self.layers, "normalised" if self.normalize else "not normalised", prompt])


@dataclass(frozen=True)
class SentenceModules:
    """The modules of a sentence-transformers folder: where its Transformer is, and what follows it, loaded."""

    transformer: str | None  # folder within the checkpoint, "" for the checkpoint itself; None: the folder is a plain one
    tail: list[nn.Module]
    truncate_dim: int | None


def read_settings(
    path: str, role: str = PASSAGE, normalize: bool = False, pooling: str | None = None, prompt: str | None = None,
    plain: bool = False,
) -> tuple[Settings, SentenceModules]:
    """The settings of the encoder at `path` (a folder or a hub name) for texts of a role, and the modules after its Transformer.

    `prompt` takes the place of the folder's; `pooling` is for plain folders. `normalize` adds a normalisation where the
    folder asks for none; `plain` says that the folder is a plain one, whatever is in it. Raises UserError where the flags contradict the folder, or it holds a module of another kind.
    """
    from sentence_transformers.base.modules import Normalize
    from sentence_transformers.sentence_transformer.modules import Pooling
    from transformers import AutoConfig

    listed = None if plain else read_json(path, "modules.json")
    if listed is None:
        width = AutoConfig.from_pretrained(path, **NO_CODE).hidden_size
        modules = SentenceModules(None, [Pooling(width, pooling or POOLINGS[0])], None)
        config = {} if plain else _read_config(path)
    else:
        config = _read_config(path)
        modules = _load_tail(path, listed, config.get("truncate_dim"))
        width = AutoConfig.from_pretrained(path, subfolder=modules.transformer, **NO_CODE).hidden_size
    poolings = [module for module in modules.tail if isinstance(module, Pooling)]
    names = [type(module).__name__ for module in modules.tail]
    if len(poolings) != 1 or names[0] != "Pooling":
        raise UserError(f"{path}/modules.json: {names} after the Transformer; an encoder here has one Pooling, which comes first")
    pooled = poolings[0].pooling_mode if isinstance(poolings[0].pooling_mode, str) else "+".join(poolings[0].pooling_mode)
    if pooling is not None and pooling != pooled:
        raise UserError(f"--pooling {pooling}: {path}/modules.json asks for {pooled}; leave the flag out, it is for plain folders")
    compared_by = config.get("similarity_fn_name")
    by_folder = listed is not None and (names[-1] == "Normalize" or compared_by == "cosine")
    if normalize and listed is not None and not by_folder:
        log.warning("--normalize: %s has no Normalize module, and its vectors are compared by %s; they are normalised, as the flag says", path,
                    compared_by or "a function that it does not name")
    elif listed is not None and not by_folder and compared_by not in ("dot", "dot_score"):
        log.warning("%s: has no Normalize module, and does not say how its vectors are compared; here they are compared by inner "
                    "product: give --normalize to both stages if its authors use the cosine", path)
    for module in modules.tail:
        width = module.get_embedding_dimension() if hasattr(module, "get_embedding_dimension") else width
    width = min(width, modules.truncate_dim or width)
    if (normalize or by_folder) and (names[-1] != "Normalize" or modules.truncate_dim):
        modules.tail.append(Normalize())
    layers = [name for name in names[1:] if name not in ("Normalize", "Dropout")]
    return Settings(pooled, layers, normalize or by_folder, _prompt_of(path, config, role) if prompt is None else prompt, width), modules


def _load_tail(path: str, listed: object, truncate_dim: int | None) -> SentenceModules:
    """The modules that modules.json lists after the Transformer."""
    from sentence_transformers.util.misc import import_module_class

    if not isinstance(listed, list) or not all(isinstance(one, dict) for one in listed):
        raise UserError(f"{path}/modules.json: expected a list of modules; this is no sentence-transformers folder")
    kinds = [(one.get("type"), one.get("path", "")) for one in listed]
    for place, (kind, folder) in enumerate(kinds):
        known = {"Transformer"} if place == 0 else TAIL_MODULES
        if not isinstance(kind, str) or not kind.startswith("sentence_transformers.") or kind.rpartition(".")[2] not in known:
            raise UserError(f"{path}/modules.json: refused: module {place} is {kind!r}, and only {', '.join(sorted(known))} of "
                            "sentence_transformers are loaded here; code that comes with a model is never run")
        if not isinstance(folder, str) or Path(folder).is_absolute() or ".." in Path(folder).parts:
            raise UserError(f"{path}/modules.json: refused: the path of module {place} is {folder!r}, which is outside the model's folder")
        activation = (read_json(path, f"{folder}/config.json") or {}).get("activation_function", "torch.") if place else "torch."
        if not str(activation).startswith("torch."):
            raise UserError(f"{path}/{folder}/config.json: refused: its activation function is {activation!r}, which is not one of torch's")
    tail = [import_module_class(kind, path, **NO_CODE).load(path, subfolder=folder, **NO_CODE).eval() for kind, folder in kinds[1:]]
    return SentenceModules(kinds[0][1], tail, truncate_dim)


def _read_config(path: str) -> dict:
    """config_sentence_transformers.json: prompts, how vectors are compared, their width. {} where a folder has none."""
    config = read_json(path, "config_sentence_transformers.json")
    config = {} if config is None else config
    if not isinstance(config, dict) or not isinstance(config.get("prompts") or {}, dict) or not isinstance(config.get("truncate_dim"), int | None):
        raise UserError(f"{path}/config_sentence_transformers.json: expected an object with prompts by name, and a whole number as truncate_dim")
    return config


def _prompt_of(path: str, config: dict, role: str) -> str:
    """The prompt of a role; where none is for queries or for passages alone, the default prompt is for both."""
    prompts = {name: prompt for name, prompt in (config.get("prompts") or {}).items() if prompt}
    named = {name for names in PROMPT_NAMES.values() for name in names}
    names = PROMPT_NAMES[role] if named & prompts.keys() else (config.get("default_prompt_name"),)
    prompt = next((prompts[name] for name in names if name in prompts), "")
    if not isinstance(prompt, str):
        raise UserError(f"{path}/config_sentence_transformers.json: the prompt for each {role} is {prompt!r}, which is no text")
    return prompt


# ---------------------------------------------------------------- what shards were made with


def record(settings: Settings, max_length: int) -> dict:
    """What a shard's manifest keeps, as `summary`."""
    return {"encoder": {**asdict(settings), "max_length": max_length}}


def refuse_other_settings(shards: Iterable[Path], model: str, settings: Settings) -> None:
    """Raises UserError, naming both, where shards were made with other settings than those their search would use.

    Shards without a record, such as published ones, are accepted, with one line that says so.
    """
    unknown, prompts = [], {}
    for shard in shards:
        made = _recorded(shard)
        if made is None:
            unknown.append(shard)
            continue
        prompts.setdefault(made["prompt"], shard)
        now = asdict(settings)
        other = [f"{key} {made[key]!r} then, {now[key]!r} now" for key in ("pooling", "layers", "normalize") if made[key] != now[key]]
        if other:
            raise UserError(f"{shard}: was embedded with other settings than {model} has here: {'; '.join(other)}; give the same flags to "
                            "generate_passage_embeddings.py and retriever.py, or embed the corpus again")
    if len(prompts) > 1:
        (one, first), (two, second), *_ = prompts.items()
        raise UserError(f"{second}: its passages were embedded after the prompt {two!r}, those of {first} after {one!r}; embed one of them again")
    if unknown:
        log.info("%s%s: does not say how it was embedded; questions are encoded with %s", unknown[0],
                 f" and {len(unknown) - 1} more" if len(unknown) > 1 else "", settings.said())
    if any(prompts) and not settings.prompt:
        log.warning("%s: its passages were embedded after the prompt %r, and %s has none for questions; give --query_prompt if its authors "
                    "use one", prompts[next(filter(None, prompts))], next(filter(None, prompts)), model)


def _recorded(shard: Path) -> dict | None:
    """How a shard was embedded, or None where nothing says it. Shards older than the record were pooled by the mean."""
    manifest = read_manifest(shard)
    if manifest is None:
        return None
    made = (manifest.get("summary") or {}).get("encoder") if isinstance(manifest.get("summary") or {}, dict) else {}
    if made is None:
        normalize = manifest["arguments"].get("normalize")
        return {"pooling": "mean", "layers": [], "normalize": normalize, "prompt": ""} if isinstance(normalize, bool) else None
    if not isinstance(made, dict) or not {"pooling", "layers", "normalize", "prompt"} <= made.keys() or not isinstance(made["prompt"], str):
        raise UserError(f"{manifest_path(shard)}: does not say how the shard was embedded; embed this shard again with --overwrite")
    return made
