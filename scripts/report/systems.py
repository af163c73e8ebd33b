"""The systems of a results folder: who answered, from whose documents, which questions, how well and at what cost.

A system is one results file of inference.py or top_inference.py. What it is says its manifest, never its name.
"""

import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from dynamicrag.gold import gold_documents
from dynamicrag.manifest import read_manifest
from dynamicrag.records import Row
from dynamicrag.stage import UserError, log

sys.path.insert(0, str(Path(__file__).parents[2]))
import evaluate  # a script of the root, not of the package

SELECTORS = ("none", "top", "all", "monot5", "adaptive", "pointwise", "dynamic", "windows")
BY_LLM = ("pointwise", "dynamic", "windows")
STAGES = {"sft": 0, "dpo": 1, "best": 2}
HEAVY_KEYS = {"docs", "candidates", "positive_ctxs", "negative_ctxs", "hard_negative_ctxs"}  # for the case browser, which reads them itself


@dataclass
class System:
    """One results file.

    selector is inference.py's, or "windows" of top_inference.py; label is the same for people. rows are without their
    documents, and `needed` is how many a question needs, None where not known; scores are in [0, 1], by id; summary and
    kinds are evaluate.py's, on 0 to 100, with groups by data set and by kind (kinds is None where the rows have none).
    wider is whether it read more, or fewer, documents than most systems of its evaluation set, or window by window.
    """

    path: Path
    arguments: dict
    evaluation_set: str
    generator: str
    selector: str
    label: str
    seconds: float
    rows: list[Row]
    scores: dict[str, float]
    summary: dict
    kinds: dict | None
    wider: bool = False

    @property
    def name(self) -> str:
        return f"{self.generator} · {self.label}"

    @property
    def rank(self) -> tuple[int, int]:
        """The selector's place among others, in tables and figures."""
        number = self.selector.partition(":")[2]
        place = SELECTORS.index(self.family) if self.family in SELECTORS else len(SELECTORS)
        return place, int(number) if self.family == "top" else self.shown

    @property
    def family(self) -> str:
        """The selector without its number."""
        return self.selector.partition(":")[0]

    @property
    def fixed(self) -> bool:
        """Whether every question gets the same number of documents."""
        return self.family in ("none", "top", "all")

    @property
    def shown(self) -> int:
        """How many documents of a question it read."""
        return int(self.arguments["topn"])

    @property
    def speed(self) -> float:
        """Questions a second."""
        return len(self.rows) / max(self.seconds, 0.1)


def read_systems(folder: Path, metric: str | None, seed: int) -> list[System]:
    """Every system of a results folder: by evaluation set, then model, then selector.

    Raises UserError where there is none, or where a results file or its remain file cannot be read.
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
        log.info("left out, without the manifest of a stage: %s", ", ".join(others))
    sets = _evaluation_sets(manifests)
    models = {str(value) for manifest in manifests.values() for value in _models(manifest["arguments"])}
    names = short_names(models)
    systems = [
        system for path, manifest in manifests.items()
        if (system := _read_system(path, manifest, sets[path], names, metric, seed)) is not None
    ]
    if not systems:
        raise UserError(f"{folder}: holds no results of inference.py that can be scored; make them with: bash scripts/09_infer.sh")
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
    rows: list[Row] = []

    def read() -> Iterator[Row]:
        for row in answered_rows(path, manifest):
            gold = gold_ids(row, path)
            rows.append({**{key: row[key] for key in row.keys() - HEAVY_KEYS}, "needed": None if gold is None else len(gold)})
            yield row

    try:
        summary, scores = evaluate.summarise(read(), metric, "dataset", seed)
    except UserError as error:
        log.warning("%s: left out: %s", path, error)
        return None
    kinds = evaluate.summarise(rows, metric, "kind", seed)[0] if any("kind" in row for row in rows) else None
    selector = arguments.get("selector", "windows")
    label = f"windows, of {arguments['topn']}" if selector == "windows" else selector.replace(":", " ")
    if selector in BY_LLM and arguments.get("reranker_model"):
        label += f", chosen by {names[arguments['reranker_model']]}"
    return System(
        path, arguments, evaluation_set, names[arguments["llm_model"]], selector, label, manifest["seconds"], rows, scores,
        summary, kinds,
    )


def answered_rows(path: Path, manifest: dict | None = None) -> Iterator[Row]:
    """evaluate.py's rows of a results file, with the remain file that lies beside it wherever the run was made."""
    outputs = (manifest or read_manifest(path))["outputs"]
    beside = [path.with_name(Path(output).name) for output in outputs[1:]]
    yield from evaluate.result_rows(str(path), next((str(remain) for remain in beside if remain.exists()), None), None, None)


def gold_ids(row: Row, path: Path) -> set[str] | None:
    """The ids of the documents that a question needs, None where that is not known."""
    known = row.get("gold_docs") is not None or row.get("positive_ctxs")
    return set(gold_documents(row, str(path))) if known else None


def _models(arguments: dict) -> list[str]:
    return [arguments[key] for key in ("llm_model", "reranker_model") if arguments.get(key)]


def _evaluation_sets(manifests: dict[Path, dict]) -> dict[Path, str]:
    """The evaluation set of each results file: its questions' file, known by content; a second one of a name is numbered."""
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
    """Say of systems that read another number of documents how many; of others that seem the same the name of their file."""
    for members in by_evaluation_set(systems).values():
        shown = Counter(system.shown for system in members if system.selector != "windows")
        usual = max(shown, key=lambda number: (shown[number], -number), default=0)
        for system in members:
            system.wider = system.selector == "windows" or system.shown != usual
            if system.wider and system.family not in ("windows", "none", "top"):
                system.label += f" of {system.shown}"
    seen = Counter((system.evaluation_set, system.name) for system in systems)
    for system in [system for system in systems if seen[system.evaluation_set, system.name] > 1]:
        system.label += f" ({system.path.stem})"


def short_names(paths: Iterable[str]) -> dict[str, str]:
    """The shortest ends of the paths that tell them apart: .../sft and .../dpo are sft and dpo."""
    parts = {path: Path(path).parts for path in paths}
    for length in range(1, max(map(len, parts.values()), default=0) + 1):
        names = {path: "/".join(part[-length:]) for path, part in parts.items()}
        if len(set(names.values())) == len(names):
            return names
    return {path: path for path in parts}


def by_evaluation_set(systems: list[System]) -> dict[str, list[System]]:
    """The systems of each evaluation set, in order."""
    sets: dict[str, list[System]] = defaultdict(list)
    for system in systems:
        sets[system.evaluation_set].append(system)
    return dict(sets)


def by_generator(systems: list[System]) -> dict[str, list[System]]:
    """The systems of each model that answers, in order."""
    generators: dict[str, list[System]] = defaultdict(list)
    for system in systems:
        generators[system.generator].append(system)
    return dict(generators)
