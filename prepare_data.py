"""Get published data sets, corpora, embeddings and models, and retrieved documents that others share, in this project's form.

`--list` shows what there is by name, and `--dry_run` what a download costs. An interrupted download continues. With `--limit`, only
the beginning of a set of questions is downloaded. A shared run is a folder of questions with their documents, so that nobody has to
search Wikipedia to repeat a result: `--export_run` makes one from the output of retriever.py, and `--shared_runs` takes one from a
folder or from a data set repository.

Reads    a model hub (HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE), plain addresses, or a shared run
Writes   data/prepared/dynamicrag_nq.jsonl      rows, one file per set of questions; corpora and embeddings beside them
         models/contriever-msmarco              models, one folder per repository

    python prepare_data.py --name dynamicrag_nq --limit 20
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from dynamicrag import stage
from dynamicrag.evaluation.tables import markdown_table
from dynamicrag.files.downloads import free_space, size_of
from dynamicrag.files.hub import no_network
from dynamicrag.files.published import Published, chosen, published, similar
from dynamicrag.rows.preparation import Cost, PrepareOptions, cost_of, is_there, prepare
from dynamicrag.rows.shared_runs import export_run, import_run
from dynamicrag.stage import UserError, log, options_from


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = stage.ArgumentParser(__doc__)
    group = parser.add_argument_group("what")
    group.add_argument("--list", action="store_true", help="show every set: source, licence, stage, and what is unverified")
    group.add_argument("--name", nargs="+", default=[], help="sets of --list; groups of them: dynamicrag, flashrag, corpora, models; or all")
    group.add_argument("--dry_run", action="store_true", help="show bytes, free disk, licence, and what is there already")
    group.add_argument("--limit", type=int, default=None, help="only the first rows of each set of questions and passages of each corpus")
    group.add_argument("--revision", default=None, help="branch, tag or commit of the repositories (default: that of --list)")
    group = parser.add_argument_group("files")
    group.add_argument("--output_dir", default="data/prepared", help="folder of rows, corpora, embeddings and shared runs")
    group.add_argument("--models_dir", default="models", help="folder of models")
    group.add_argument("--keep_downloads", action="store_true", help="keep the files that rows and corpora were made from")
    group = parser.add_argument_group("shared runs")
    group.add_argument("--shared_runs", default=None, help="folder or data set repository from which to take the runs of --name")
    group.add_argument("--export_run", default=None, help="retrieved rows to share, as the run --run_name in --output_dir")
    group.add_argument("--run_name", default=None, help="name of the exported run")
    group.add_argument("--corpus", default=None, help="corpus of the exported run (default: as the manifest of its rows says)")
    group.add_argument("--encoder", default=None, help="encoder of the exported run (default: as the manifest of its rows says)")
    stage.add_common_flags(parser)
    args = parser.parse_args(argv)
    if args.limit is not None and args.limit < 1:
        parser.error("--limit must be at least 1")
    if bool(args.export_run) != bool(args.run_name):
        parser.error("--export_run and --run_name need each other")
    return args


def listing() -> str:
    """Return the table of published sets."""
    header = ["name", "from", "revision", "size", "rows", "licence", "stage", "unverified"]
    return markdown_table(header, [
        [entry.name, entry.place, entry.revision if entry.repo else "-", f"{'' if entry.bytes else 'about '}{size_of(entry.bytes or entry.about_bytes)}"
         if entry.bytes or entry.about_bytes else "not known", f"{entry.rows:,}" if entry.rows else "-", entry.licence, entry.stage, entry.unverified]
        for entry in published().values()
    ])


def forecast(entries: list[Published], options: PrepareOptions) -> str:
    """Return a table of what a download costs and what is there already. Sizes of a server that cannot be reached are those of the list."""
    lines, total, silent = [], 0, set()
    for entry in entries:
        cost = Cost(entry.bytes or entry.about_bytes, note="size as in --list")
        try:
            if entry.server not in silent or is_there(entry, entry.path(options.output_dir, options.models_dir)):
                cost = cost_of(entry, options)
        except UserError as error:
            cost = replace(cost, note=str(error))
            silent |= {entry.server} if no_network(error) else set()
        total += cost.missing or 0
        lines.append([entry.name, str(entry.path(options.output_dir, options.models_dir)), size_of(cost.size), "a part" if cost.cut else size_of(cost.missing),
                      size_of(cost.there), entry.licence, cost.note])
    table = markdown_table(["name", "becomes", "size", "to download", "there already", "licence", "note"], lines)
    free = {folder: free_space(Path(folder)) for folder in (options.output_dir, options.models_dir)}
    if total > min(free.values()):
        log.warning("--name: %s to download, and %s free; take fewer sets, free some space, or give another --output-dir or --models-dir",
                    size_of(total), size_of(min(free.values())))
    return (f"{table}\n\nTo download: {size_of(total)}. Free: {', '.join(f'{size_of(space)} for {folder}' for folder, space in free.items())}. "
            "Rows and unpacked archives need as much again while they are made.")


def prepare_all(entries: list[Published], options: PrepareOptions) -> None:
    """Prepare every set. One that cannot be had does not keep the others from being prepared, and a server that cannot be reached is
    not asked again. Raises UserError at the end, or at once if there is nothing else to prepare.
    """
    failed, silent = [], set()
    for entry in entries:
        try:
            if entry.server not in silent or is_there(entry, entry.path(options.output_dir, options.models_dir)):
                prepare(entry, options)
                continue
        except UserError as error:
            silent |= {entry.server} if no_network(error) else set()
            if {other.server for other in entries} <= silent or len(entries) == 1:
                raise
            log.error("%s", error)
        failed.append(entry.name)
    if failed:
        raise UserError(f"--name: {len(failed)} of {len(entries)} sets were not prepared: {', '.join(failed)}; see the messages above, and run the "
                        "same command again")


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    options = options_from(args, PrepareOptions)
    if args.list:
        print(listing())
    elif args.export_run:
        log.info("%s: the shared run", export_run(args.export_run, args.run_name, args.output_dir, args.corpus, args.encoder))
    elif not args.name:
        raise UserError("--name: nothing to prepare; give names of --list")
    elif args.shared_runs:
        for name in args.name:
            import_run(args.shared_runs, name, options)
    else:
        try:
            entries = chosen(args.name)
        except KeyError as error:
            meant = " or ".join(similar(error.args[0]))
            raise UserError(f"--name {error.args[0]}: there is no such set; {f'is it {meant}? ' if meant else ''}--list shows them") from error
        if args.dry_run:
            print(forecast(entries, options))
        else:
            prepare_all(entries, options)


if __name__ == "__main__":
    stage.run(main)
