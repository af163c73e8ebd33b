"""Read the systems of a results folder. The manifest of a results file identifies its system; the file name does not.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import cast

from dynamicrag.evaluation.answers import summarise
from dynamicrag.evaluation.results import result_rows
from dynamicrag.report.systems import BY_LLM, AskedRow, System, by_evaluation_set
from dynamicrag.rows.gold import needed_documents
from dynamicrag.rows.manifest import read_manifest, require_manifest
from dynamicrag.rows.row import Row
from dynamicrag.stage import UserError, log

STAGES = {"sft": 0, "dpo": 1, "best": 2}
# Keys that only the case browser needs; it reads them itself.
HEAVY_KEYS = {"docs", "candidates", "positive_ctxs", "negative_ctxs", "hard_negative_ctxs"}


def read_systems(folder: Path, metric: str | None, seed: int) -> list[System]:
    """Return every system of a results folder, by evaluation set, then model, then selector.

    A results file without any gold answer is left out. Raises UserError if no other file remains, or if a results file
    or its remain file cannot be read.
    """
    manifests, others = {}, []
    for path in sorted(path for path in folder.iterdir() if path.suffix in (".json", ".jsonl")):
        if path.name.endswith(".manifest.json"):
            continue
        manifest = read_manifest(path)
        if manifest is None:
            others.append(path.name)
        elif {"selector", "max_context_window"} & manifest["arguments"].keys() and Path(manifest["outputs"][0]).name == path.name:
            manifests[path] = manifest
    if others:
        log.info("left out, because they have no manifest of a stage: %s", ", ".join(others))
    sets = _evaluation_sets(manifests)
    models = {str(value) for manifest in manifests.values() for value in _models(manifest["arguments"])}
    names = short_names(models)
    systems = [
        system for path, manifest in manifests.items()
        if (system := _read_system(path, manifest, sets[path], names, metric, seed)) is not None
    ]
    if not systems:
        raise UserError(f"{folder}: contains no results of inference.py that can be scored; create them with bash "
                        "scripts/09_infer.sh")
    _tell_apart(systems)
    places = {name: place for place, name in enumerate(dict.fromkeys(sets.values()))}
    stages = {system.generator: STAGES.get(Path(system.arguments["llm_model"]).name, len(STAGES)) for system in systems}
    return sorted(systems, key=lambda system: (
        places[system.evaluation_set], stages[system.generator], system.generator, system.rank, system.label,
    ))


def _read_system(
    path: Path, manifest: dict, evaluation_set: str, names: dict[str, str], metric: str | None, seed: int
) -> System | None:
    arguments = manifest["arguments"]
    rows: list[AskedRow] = []
    whole = False

    def read() -> Iterator[Row]:
        nonlocal whole
        for row in answered_rows(path, manifest):
            needed = needed_documents(row, str(path))
            light = {key: value for key, value in row.items() if key not in HEAVY_KEYS}
            rows.append(cast(AskedRow, {**light, "needed": None if needed is None else len(needed)}))
            yield row
        whole = True

    try:
        summary, scores = summarise(read(), metric, "dataset", seed, str(path))
    except UserError as error:
        if not whole:  # the file cannot be read
            raise
        log.warning("left out: %s", error)
        return None
    kinds = summarise(rows, metric, "kind", seed)[0] if any("kind" in row for row in rows) else None
    selector = arguments.get("selector", "windows")
    label = f"windows, N = {arguments['topn']}" if selector == "windows" else selector.replace(":", " ")
    if selector in BY_LLM and arguments.get("reranker_model"):
        label += f", chosen by {names[arguments['reranker_model']]}"
    return System(
        path, arguments, evaluation_set, names[arguments["llm_model"]], selector, label, manifest["seconds"], rows, scores,
        summary, kinds,
    )


def answered_rows(path: Path, manifest: dict | None = None) -> Iterator[Row]:
    """Yield evaluate.py's rows of a results file, with the remain file next to it, even if the folder was moved."""
    outputs = (manifest or require_manifest(path))["outputs"]
    beside = [path.with_name(Path(output).name) for output in outputs[1:]]
    yield from result_rows(str(path), next((str(remain) for remain in beside if remain.exists()), None), None, None)


def _models(arguments: dict) -> list[str]:
    return [arguments[key] for key in ("llm_model", "reranker_model") if arguments.get(key)]


def _evaluation_sets(manifests: dict[Path, dict]) -> dict[Path, str]:
    """Return the evaluation set of each results file, identified by content. Sets with the same name are numbered."""
    versions: dict[str, list[str]] = defaultdict(list)
    names = {}
    for path, manifest in manifests.items():
        questions = manifest["arguments"]["input_json"]
        stem, content = Path(questions).stem, manifest["inputs"].get(questions, "")
        if content not in versions[stem]:
            versions[stem].append(content)
        number = versions[stem].index(content) + 1
        names[path] = stem if number == 1 else f"{stem} ({number})"
    return names


def _tell_apart(systems: list[System]) -> None:
    """Add the number of documents to the label of wider systems, and the file name to labels that would be equal."""
    for members in by_evaluation_set(systems).values():
        shown = Counter(system.shown for system in members if system.selector != "windows")
        usual = max(shown, key=lambda number: (shown[number], -number), default=0)
        for system in members:
            system.wider = system.selector == "windows" or system.shown != usual
            if system.wider and system.family not in ("windows", "none", "top"):
                system.label += f", N = {system.shown}"
    seen = Counter((system.evaluation_set, system.name) for system in systems)
    for system in [system for system in systems if seen[system.evaluation_set, system.name] > 1]:
        system.label += f" ({system.path.stem})"


def short_names(paths: Iterable[str]) -> dict[str, str]:
    """Return the shortest distinct path endings: .../sft and .../dpo become sft and dpo."""
    parts = {path: Path(path).parts for path in paths}
    for length in range(1, max(map(len, parts.values()), default=0) + 1):
        names = {path: "/".join(part[-length:]) for path, part in parts.items()}
        if len(set(names.values())) == len(names):
            return names
    return {path: path for path in parts}
