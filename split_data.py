"""Split a file of questions into one file per retrieval worker.

The parts are contiguous and their sizes differ by at most one, so that the workers finish together and aggregate.py can
restore the order.

Reads    data/rag_training_data.json                     questions
Writes   data/splits/split_0.json, split_1.json, ...     the same rows, divided

    python split_data.py --input_file data/rag_training_data.json --output_dir data/splits --num_splits 8
"""

import argparse
import re
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from dynamicrag import stage
from dynamicrag.rows.manifest import manifest_path
from dynamicrag.rows.output import Output

SPLIT_NAME = re.compile(r"split_(\d+)\.json")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = stage.ArgumentParser(__doc__)
    group = parser.add_argument_group("files")
    group.add_argument("--input_file", default="data/rag_training_data.json", help="questions, JSON or JSONL")
    group.add_argument("--output_dir", default="data/splits", help="folder of the parts")
    group.add_argument("--num_splits", type=int, default=8, help="number of parts, one per worker")
    group.add_argument("--dataset", default=None, help="data set of every row; overrides the rows")
    stage.add_common_flags(parser)
    args = parser.parse_args(argv)
    if args.num_splits < 1:
        parser.error("--num_splits must be at least 1")
    return args


def split_sizes(rows: int, num_splits: int) -> list[int]:
    """Return the sizes of the parts: 9 rows in 8 parts give 2,1,1,1,1,1,1,1. No part is empty."""
    parts = min(rows, num_splits)
    return [rows // parts + (part < rows % parts) for part in range(parts)]


def remove_stale(folder: Path, parts: int, overwrite: bool) -> None:
    """Remove the parts of an earlier, larger split, for which workers would retrieve too."""
    stale = [path for path in folder.glob("split_*.json") if (name := SPLIT_NAME.fullmatch(path.name))
             and int(name[1]) >= parts]
    if stale and not overwrite:
        raise stage.UserError(f"{min(stale)}: belongs to an earlier split into more than {parts} parts; "
                              "give --overwrite to remove it and replace the others")
    for path in stale:
        manifest_path(path).unlink(missing_ok=True)
        path.unlink()
        stage.log.info("removed %s, which belongs to an earlier, larger split", path)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    from dynamicrag.rows.records import count_rows, read_rows

    sizes = split_sizes(count_rows(args.input_file, skip_malformed=args.on_error == "skip"), args.num_splits)
    if len(sizes) < args.num_splits:
        stage.log.warning("--num_splits %d: the %d questions fill only %d parts", args.num_splits, sum(sizes), len(sizes))
    paths = [Path(args.output_dir) / f"split_{part}.json" for part in range(len(sizes))]
    output = Output(vars(args), list(map(str, paths)), [args.input_file])
    remove_stale(Path(args.output_dir), len(paths), args.overwrite)
    if output.finished:
        return
    rows = read_rows(args.input_file, dataset=args.dataset, reject=output.reject)
    for path, size in zip(paths, sizes, strict=True):
        output.publish(path, islice(rows, size))
    for _ in rows:  # counts malformed rows after the last valid one
        pass
    output.finish(questions=sum(sizes), parts=len(sizes))


if __name__ == "__main__":
    stage.run(main)
