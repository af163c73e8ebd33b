"""What is told of a published model: how it was trained, what it scored, and both in a model card for the hub."""

import os
import re
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from dynamicrag.evaluation.tables import selection_tables, summary_tables, system_names
from dynamicrag.llm.prompts import Prompts, read_yaml
from dynamicrag.llm.templates import PromptTokenizer
from dynamicrag.rows.manifest import read_manifest
from dynamicrag.rows.row import Doc
from dynamicrag.rows.tasks import dataset_named
from dynamicrag.stage import UserError, log

ROOT = Path(__file__).resolve().parents[2]
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
# Settings of a training run that the card shows, in this order. Paths of the machine are not among them, nor the batch of a device,
# which scripts/training.sh fits to the number of GPUs.
SHOWN_SETTINGS = (
    "stage", "finetuning_type", "lora_rank", "lora_alpha", "pref_loss", "pref_beta", "pref_ftx", "dataset", "template", "cutoff_len",
    "learning_rate", "num_train_epochs", "max_steps", "lr_scheduler_type", "warmup_steps", "warmup_ratio", "quantization_bit", "bf16", "seed",
)
SHOWN_ARGUMENTS = ("selector", "topn", "max_context_window", "dtype", "selection_temperature", "constrain_ids", "seed")


class System(NamedTuple):
    """A system of a metrics file: its summary, the arguments of the run that answered, and the date of the scoring."""

    name: str
    summary: dict[str, Any]
    manifest: dict[str, Any] | None  # of the results file; None if it is not there
    by_dataset: bool  # whether the groups of the summary are data sets
    date: str


# ---------------------------------------------------------------- training


def training_of(model: Path) -> tuple[list[dict], str | None]:
    """Return the training runs that led to a model, the first one first, and the name of the model before them.

    Each has `name`, `settings`, `data` (SHA-256 by file name), `steps`, `epochs` and `shown`, as far as the folder says.
    The name is that of the hub; None if it is not known or a folder.
    """
    runs: list[dict] = []
    folder, base, seen = model, None, set()
    while folder.is_dir() and (real := os.path.realpath(folder)) not in seen:
        seen.add(real)
        settings, state = _settings_of(folder), _state_of(folder)
        base = settings.get("model_name_or_path") or _base_of_card(folder)
        if not settings and not state:
            break
        shown = {
            **{key: settings[key] for key in SHOWN_SETTINGS if settings.get(key) is not None},
            **{key: value for key, value in state.items() if value is not None},
        }
        told = {key: settings[key] for key in SHOWN_SETTINGS if key in settings}
        runs.insert(0, {"name": folder.name, **state, "settings": told, "data": _data_of(folder), "shown": shown})
        if not base:
            break
        folder = Path(base)
    named = isinstance(base, str) and HUB_NAME.fullmatch(base) and not Path(base).exists()
    return runs, base if named else None


def _settings_of(folder: Path) -> dict[str, Any]:
    """The recipe's settings and those that the training script added; {} for a model of another trainer."""
    path = folder / "settings.txt"
    if not path.is_file():
        return {}
    recipe, *words = path.read_text(encoding="utf-8").split()
    files = [file for file in (Path(recipe), ROOT / recipe) if file.is_file()]
    settings = read_yaml(files[0], "settings") if files else {}
    given = {key: value for key, _, value in (word.partition("=") for word in words if "=" in word)}
    return {**(settings if isinstance(settings, dict) else {}), **given}


def _state_of(folder: Path) -> dict[str, Any]:
    path = folder / "trainer_state.json"
    if not path.is_file():
        return {}
    try:
        state = orjson.loads(path.read_bytes())
        losses = [entry["loss"] for entry in state.get("log_history", []) if "loss" in entry]
        return {"steps": state.get("global_step"), "epochs": state.get("epoch"), "last_loss": round(losses[-1], 4) if losses else None}
    except (orjson.JSONDecodeError, AttributeError, TypeError) as error:
        raise UserError(f"{path}: not a trainer's state ({error}); train the model again") from error


def _data_of(folder: Path) -> dict[str, str]:
    """SHA-256 by name of the training data, as scripts/training.sh keeps them."""
    path = folder / "trained_on.sha256"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    pairs = (line.split(maxsplit=1) for line in lines if line.strip())
    data = {Path(file).name: sha256 for sha256, file in pairs}  # beside the recipe and what stands for the base model
    return {name: sha256 for name, sha256 in data.items() if name.endswith((".json", ".jsonl")) and name not in ("config.json", "trainer_state.json")}


def _base_of_card(folder: Path) -> str | None:
    """The base model that LLaMA-Factory writes into README.md."""
    from huggingface_hub import ModelCard

    path = folder / "README.md"
    if not path.is_file():
        return None
    try:
        base = ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=True).data.to_dict().get("base_model")
    except ValueError:
        return None
    return base if isinstance(base, str) else None


# ---------------------------------------------------------------- results


def read_results(paths: Iterable[str]) -> list[System]:
    """Return the systems of metrics files that evaluate.py wrote. Raises UserError for any other file."""
    systems = []
    for path in paths:
        try:
            metrics = orjson.loads(Path(path).read_bytes())
            arguments, summaries = metrics["arguments"], metrics["results"]
            summary_tables(summaries)  # knows which keys a summary needs
            files = dict(zip(system_names(arguments["results_file"]), arguments["results_file"], strict=True))
            groups = arguments.get("group_by", "dataset") == "dataset"
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); give --results what evaluate.py wrote") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: not the metrics of evaluate.py ({type(error).__name__}: {error}); give --results a "
                            "*.metrics.json") from error
        date = datetime.fromtimestamp(Path(path).stat().st_mtime, UTC).isoformat(timespec="seconds")
        for name, summary in summaries.items():
            file = Path(files.get(name, name))
            answered = next((place for place in (file, Path(path).with_name(file.name)) if place.exists()), file)
            systems.append(System("/".join(Path(name).parts[-2:]), summary, read_manifest(answered), groups, date))
    return systems


def results_table(systems: list[System]) -> str:
    """Return the tables of all systems in Markdown; "" without systems."""
    summaries = {system.name: system.summary for system in systems}
    if len(summaries) < len(systems):
        raise UserError("--results: two systems have the same name; rename a results file and score it again")
    return "\n\n".join(filter(None, [summary_tables(summaries), selection_tables(summaries)])) if summaries else ""


def shown_arguments(system: System) -> dict[str, Any]:
    """Return the arguments of a system's run that affect its score, without paths of the machine."""
    arguments = (system.manifest or {}).get("arguments", {})
    return {key: arguments[key] for key in SHOWN_ARGUMENTS if arguments.get(key) is not None}


def evaluation_files(systems: list[System], hub_dataset: str, known: Mapping[str, str]) -> dict[str, str]:
    """Return the hub's evaluation results: YAML by file name, one file per data set.

    The model is a DynamicRAG selector, so that results of other selectors are left out. `known` gives the task of the
    benchmark `hub_dataset` by data set; results of other data sets are left out and logged.
    """
    import yaml
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

    entries: dict[str, list[EvalResultEntry]] = {}
    for system in systems:
        arguments = shown_arguments(system)
        if arguments.get("selector", "dynamic") != "dynamic":
            continue
        for group, scores in system.summary["groups"].items() if system.by_dataset else ():
            task = known.get(dataset_named(group) or group)
            if task is None:
                log.info("%s: data set %r is none of %s; it is in the card only", system.name, group, hub_dataset)
                continue
            told = {"metric": scores.get("metrics") or system.summary["metric"], "n": scores["n"], "documents": round(scores["documents"], 2), **arguments}
            notes = f"95 % interval {scores['low']:.1f} to {scores['high']:.1f}; " + ", ".join(f"{key} {value}" for key, value in told.items())
            entries.setdefault(task, []).append(EvalResultEntry(hub_dataset, task, round(scores["score"], 2), date=system.date, notes=notes))
    return {f".eval_results/{task}.yaml": yaml.safe_dump(eval_result_entries_to_yaml(found), sort_keys=False) for task, found in entries.items()}


# ---------------------------------------------------------------- the card

QUESTION = "Which river is the longest?"
DOCS: list[Doc] = [
    {"id": "a", "title": "Amazon", "text": "The Amazon carries the most water."}, {"id": "b", "title": "Nile", "text": "The Nile is the longest river."},
]


def examples_of(prompts: Prompts, template: PromptTokenizer) -> dict[str, str]:
    """Return the text of both calls of a question with two documents."""
    instruction = prompts.instruction({"dataset": "nq"})
    return {
        "selection": template.render(prompts.reranker(QUESTION, DOCS)),
        "answer": template.render(prompts.generator(QUESTION, DOCS[1:], instruction, [2])),
    }


def render_card(metadata: Mapping[str, Any], **values: Any) -> str:
    """Return the model card: YAML for the hub, then Markdown. `values` are those of card.md.jinja."""
    from huggingface_hub import ModelCardData
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, keep_trailing_newline=True, trim_blocks=True)
    block = ModelCardData(**{key: value for key, value in metadata.items() if value}).to_yaml()
    return environment.get_template("card.md.jinja").render(metadata=f"---\n{block}\n---", **metadata, **values)
