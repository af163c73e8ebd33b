"""The files that come with a published model (publish.py): its manifest, its prompts and its chat template.

A stage that loads a model takes its prompts and its chat template from a flag if one is given, or else from the files
that come with the model, or else from the project's defaults. The choice is logged. A model comes from a folder or from
the hub, whose published models are downloaded as a whole: all files are of one commit.
"""

import functools
import hashlib
from pathlib import Path

import orjson

from dynamicrag.files.hub_access import hub_errors, why_unreachable
from dynamicrag.llm.prompts import Prompts
from dynamicrag.stage import UserError, log

MANIFEST = "dynamicrag.json"
PROMPTS = "dynamicrag_prompts.yaml"
TEMPLATE = "chat_template.jinja"
# The files of a model that are published and pulled. No other file leaves this machine, and none is pulled: no pickle, no
# optimizer state, no checkpoint, no log.
MODEL_FILES = (
    "*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json",
    "tokenizer.model", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt",
)
PUBLISHED = (*MODEL_FILES, MANIFEST, PROMPTS, TEMPLATE, "README.md", ".eval_results/*.yaml")


def manifest_of(model: str) -> Path | None:
    """Return the manifest of a published model, from its folder or from the hub (one small file); None for any other
    model, and if the hub does not deliver it.
    """
    from huggingface_hub import constants

    if Path(model).exists():
        path = Path(model) / MANIFEST
        return path if path.is_file() else None
    return _manifest_on_hub(model, constants.ENDPOINT, constants.HF_HUB_CACHE)


@functools.lru_cache
def _manifest_on_hub(model: str, endpoint: str, cache: str) -> Path | None:
    """The hub is asked once per process, so that all its runs are of one commit."""
    import huggingface_hub as hub

    try:
        cached = hub.try_to_load_from_cache(model, MANIFEST, cache_dir=cache)
        if why_unreachable():
            return Path(cached) if isinstance(cached, str) else None
        return Path(hub.hf_hub_download(model, MANIFEST, cache_dir=cache))
    except (hub.errors.HFValidationError, hub.errors.EntryNotFoundError, hub.errors.HfHubHTTPError):
        return None  # loading the model says why it cannot be loaded


def pull(model: str) -> str:
    """Return the folder of a model that is published on the hub, downloaded in the commit of its manifest.

    Any other name is returned unchanged. Raises UserError if the hub does not deliver a file.
    """
    if Path(model).exists() or (manifest := manifest_of(model)) is None:
        return model
    from huggingface_hub import snapshot_download

    with hub_errors(model):
        folder = snapshot_download(model, revision=manifest.parent.name, allow_patterns=list(PUBLISHED))
    log.info("%s: pulled to %s", model, folder)
    return folder


def files_of(manifest: Path) -> dict[str, dict]:
    """Return size and SHA-256 of each file that a manifest names. Raises UserError if it is not a manifest."""
    try:
        files = orjson.loads(manifest.read_bytes())["files"]
        if not all(isinstance(file["sha256"], str) for file in files.values()):
            raise ValueError("a file without sha256")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{manifest}: not the manifest of a published model ({error}); publish the model again") from error
    return files


def file_of(model: str, name: str) -> Path | None:
    """Return a file that comes with the model in a folder, or None. Warns if it is not the one that was published."""
    path, manifest = Path(model) / name, Path(model) / MANIFEST
    if not path.is_file():
        return None
    published = files_of(manifest).get(name) if manifest.is_file() else None
    if published and hashlib.sha256(path.read_bytes()).hexdigest() != published["sha256"]:
        log.warning("%s: has changed since the model was published (%s)", path, MANIFEST)
    return path


def prompts_for(model: str, given: str | None) -> str | None:
    """Return the prompts file for a model in a folder: `given` (--prompts), or the one that comes with it, or None for
    the project's own prompts.

    Raises UserError as Prompts does.
    """
    own = file_of(model, PROMPTS)
    if given is None:
        log.info("prompts: %s", f"{own}, which comes with the model" if own else "the project's own (dynamicrag/llm/prompt_texts.py)")
        return str(own) if own else None
    log.info("prompts: %s, from --prompts", given)
    if own and Prompts(given).for_file() != Prompts(str(own)).for_file():
        log.warning("--prompts %s: differs from %s, which comes with the model; omit the flag to ask the model in the words "
                    "that it was published with", given, own)
    return given


def prompts_yaml(prompts: Prompts) -> str:
    """Return the content of a prompts file that gives these prompts. Texts of several lines are quoted on one line."""
    import yaml

    class Dumper(yaml.SafeDumper):
        pass

    Dumper.add_representer(str, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if "\n" in text else None))
    return yaml.dump(prompts.for_file(), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=10**6)
