"""Create a report of a results folder: one HTML file that works offline, with its figures as PNG files.

Results are the files in RESULTS_DIR that have a manifest of inference.py or top_inference.py. Training curves are those
of the models in the parent folder. If data for a section is missing, one line names the script that creates it.

Reads    RESULTS_DIR/*.json, *.jsonl             answered rows, their remain files and manifests
         RESULTS_DIR/../DynamicRAG_*/            logs of the trainer; also rounds/ of scripts/iterate.sh
Writes   RESULTS_DIR/report/index.html           tables, figures and a browser of all cases
         RESULTS_DIR/report/*.png                the figures

    python -m dynamicrag.report runs/demo_default/results
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import orjson
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from dynamicrag import stage
from dynamicrag.evaluation.metrics import METRIC_NAMES
from dynamicrag.evaluation.tables import cost_cell
from dynamicrag.files.atomic import atomic_writer
from dynamicrag.report import comparisons, costs, training
from dynamicrag.report.cases import case_sets
from dynamicrag.report.figures import METRIC_LABELS
from dynamicrag.report.reading import read_systems
from dynamicrag.report.sections import Section, Table
from dynamicrag.report.systems import System, by_evaluation_set
from dynamicrag.stage import UserError

HERE = Path(__file__).parent


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = stage.ArgumentParser(__doc__)
    parser.add_argument("results_dir", help="folder of results files")
    parser.add_argument("--output_dir", help="folder of the report (default: RESULTS_DIR/report)")
    parser.add_argument("--cases", type=int, default=200, help="questions per evaluation set in the case browser")
    parser.add_argument("--metric", choices=METRIC_NAMES, help="metric of every row (default: that of each data set)")
    parser.add_argument("--seed", type=int, default=42, help="seed of the bootstrap")
    return parser.parse_args(argv)


def result_lines(systems: Sequence[System]) -> dict[str, list[dict]]:
    """Return the lines of the result table by evaluation set: evaluate.py's numbers, and which system is best."""
    lines = {}
    for name, members in by_evaluation_set(systems).items():
        best = max((system.score for system in members if not system.knows), default=None)
        lines[name] = [
            {
                **system.summary, "generator": system.generator, "label": system.label, "file": system.path.name, "selector": system.selector,
                "metrics": ", ".join(METRIC_LABELS.get(metric, metric) for metric in str(system.summary["metric"]).split("+")), "best": system.score == best and not system.knows,
            }
            for system in members
        ]
    return lines


def published(systems: Sequence[System]) -> Section:
    """Return published numbers next to this run's dynamic selection, without a table if no data set has any."""
    section = Section("published", "Published numbers",
                                   "Published results with other models and data: for orientation, not for comparison.")
    rows = []
    for entry in orjson.loads((HERE / "published.json").read_bytes()):
        own = []
        for system in systems:
            if system.selector == "dynamic" and (cell := system.summary["groups"].get(entry["dataset"])):
                source = f"{system.evaluation_set}, n = {cell['n']}"
                own.append([f"this run, {system.name}", entry["dataset"], system.summary["metric"], f"{cell['score']:.1f}", source])
        if own:
            rows += [[entry["system"], entry["dataset"], entry["metric"], f"{entry['score']:.1f}", f"published: {entry['source']}"], *own]
    if rows:
        section.tables.append(Table("", ["system", "data set", "metric", "score", "source"], rows))
    return section


def render(**values: object) -> str:
    """Render the page. The template escapes all values from the results as HTML, or as JSON inside the script element."""
    environment = Environment(loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    own = {name: Markup((HERE / f"page.{name}").read_text(encoding="utf-8")) for name in ("css", "js")}
    return environment.get_template("page.html.jinja").render(**own, **values)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    results = Path(args.results_dir)
    if not results.is_dir():
        raise UserError(f"{results}: no such folder; give the folder written by scripts/09_infer.sh, such as "
                        "runs/demo_default/results")
    if args.cases < 0:
        raise UserError(f"--cases: expected at least 0, found {args.cases}")
    folder = Path(args.output_dir or results / "report")
    systems = read_systems(results, args.metric, args.seed)
    folder.mkdir(parents=True, exist_ok=True)
    work = results.resolve().parent
    compared = [system for system in systems if not system.wider]
    sections = [
        comparisons.generators(compared, folder), comparisons.rerankers(compared, folder), comparisons.documents(compared, folder),
        comparisons.chosen(compared, folder), training.trained(work, folder), costs.top_n(systems, folder), costs.efficiency(systems, folder),
        published(compared),
    ]
    page = render(
        title=work.name if results.resolve().name == "results" else results.resolve().name,
        systems=systems,
        results=result_lines(systems),
        cost_cell=cost_cell,
        findings={name: comparisons.findings([one for one in members if not one.wider]) for name, members in by_evaluation_set(systems).items()},
        groups=comparisons.group_tables(systems),
        sections=[one for one in sections if one.pictures or one.tables],
        missing=[one for one in sections if one.missing],
        cases=case_sets(systems, args.cases, args.metric) if args.cases else [],
    )
    with atomic_writer(folder / "index.html") as file:
        file.write(page.encode())
    print(folder / "index.html")
