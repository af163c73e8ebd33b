"""Write one table of the results of several evaluation sets: a line per system, a column per set.

Reads    RESULTS_DIR/SET.metrics.json     of scripts/10_evaluate.sh
Writes   RESULTS_DIR/all_sets.md          the table
         RESULTS_DIR/all_sets.json        the same numbers

    python scripts/all_sets.py --results_dir results --sets dynamicrag_nq dynamicrag_popqa
"""

from pathlib import Path
from statistics import fmean

import orjson

from dynamicrag import stage
from dynamicrag.evaluation.tables import markdown_table
from dynamicrag.files.atomic import atomic_writer
from dynamicrag.rows.tasks import dataset_named
from dynamicrag.stage import UserError, log

PUBLISHED = Path(__file__).resolve().parents[1] / "dynamicrag/report/published.json"
PREFIX = "dynamicrag_"  # of the prepared files of the published data


def parse_args(argv=None):
    parser = stage.ArgumentParser(__doc__)
    parser.add_argument("--results_dir", required=True, help="folder of the results")
    parser.add_argument("--sets", nargs="+", required=True, help="names of the evaluation sets")
    return parser.parse_args(argv)


def read_set(folder: Path, name: str) -> dict[str, dict]:
    """Return the summary of each system on a set. Raises UserError if evaluate.py has not written it."""
    path = folder / f"{name}.metrics.json"
    try:
        results = orjson.loads(path.read_bytes())["results"]
        return {system.removeprefix(f"{name}_"): summary for system, summary in results.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not written by evaluate.py ({error!r}); run scripts/10_evaluate.sh") from error


def published(names: list[str]) -> dict[str, dict[str, dict]]:
    """Return the published scores of these sets, by system and set."""
    found: dict[str, dict[str, dict]] = {}
    for entry in orjson.loads(PUBLISHED.read_bytes()):
        for name in names:
            if dataset_named(name.removeprefix(PREFIX)) == entry["dataset"]:
                found.setdefault(f"published: {entry['system']}", {})[name] = entry
    return found


def table_of(systems: dict[str, dict[str, dict]], names: list[str]) -> str:
    """Return the table: scores with 95 % intervals, their mean where every set has one, and documents per question."""
    def cell(summary: dict | None) -> str:
        if summary is None:
            return ""
        return f"{summary['score']:.1f}" + (f" ({summary['low']:.1f} to {summary['high']:.1f})" if "low" in summary else "")

    lines = []
    for system, sets in systems.items():
        whole = len(sets) == len(names)
        documents = [summary.get("documents") for summary in sets.values()]
        lines.append([
            system, *(cell(sets.get(name)) for name in names), f"{fmean(summary['score'] for summary in sets.values()):.1f}" if whole else "",
            f"{fmean(documents):.2f}" if whole and None not in documents else "",
        ])
    metrics = {name: next((sets[name]["metric"] for sets in systems.values() if name in sets), "") for name in names}
    return markdown_table(["system", *(f"{name.removeprefix(PREFIX)} ({metrics[name]})" for name in names), "mean", "documents"], lines)


def main(argv=None):
    args = parse_args(argv)
    folder = Path(args.results_dir)
    systems: dict[str, dict[str, dict]] = {}
    for name in args.sets:
        for system, summary in read_set(folder, name).items():
            systems.setdefault(system, {})[name] = summary
    systems |= published(args.sets)
    table = table_of(systems, args.sets)
    for name, content in (("all_sets.md", f"{table}\n".encode()), ("all_sets.json", orjson.dumps(systems, option=orjson.OPT_INDENT_2))):
        with atomic_writer(folder / name) as file:
            file.write(content)
    print(table)
    log.info("the table of %d sets is in %s", len(args.sets), folder / "all_sets.md")


if __name__ == "__main__":
    stage.run(main)
