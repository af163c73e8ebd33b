"""Combine the output files of workers into one file, in the order of the questions before splitting.

Every shard must exist and be complete. If the parts written by split_data.py still exist, each shard must have been
made from its part. Rows are never merged, and an id that occurs twice is refused. The exception are files of
`retriever.py --corpus_shard i/n`, which contain the same questions. Their documents are merged by score, which gives
the result of one search of the whole corpus (exactly so for `--index flat`).

With --questions, the shards are the answers of inference.py or top_inference.py to the parts of that file. Their remain
files are combined too, and the manifest is the one that a single run over all questions would have written.

Reads    output/retrieval_split_0.json, _1, ...          output files of the workers
Writes   output/retrieval_data.jsonl                     the same rows in one file

    python aggregate.py
"""

import argparse
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from dynamicrag import stage
from dynamicrag.files.paths import matching
from dynamicrag.rows.manifest import fingerprint, is_content, manifest_path, read_manifest, require_manifest
from dynamicrag.rows.output import Output
from dynamicrag.rows.row import STAGE_KEYS, Row
from dynamicrag.search.corpus_parts import corpus_shard, in_corpus_order, merge_by_score
from dynamicrag.stage import UserError

ROWS_PER_CHUNK = 250


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = stage.ArgumentParser(__doc__)
    group = parser.add_argument_group("files")
    group.add_argument("--input_files", default="output/retrieval_split_*.json", help="the shards, as a quoted glob")
    group.add_argument("--output_file", default="output/retrieval_data.jsonl", help="all rows")
    group.add_argument("--splits_dir", default="data/splits",
                       help="folder written by split_data.py; checked if it exists")
    group.add_argument("--questions", default=None, help="the file that split_data.py divided, for shards with answers")
    stage.add_common_flags(parser)
    return parser.parse_args(argv)


def numbered(pattern: str | Path, suffix: str = "") -> dict[int, Path]:
    """Return the files that match a glob by the last number in their name, in numerical order (10 follows 9, not 1)."""
    by_number: dict[int, Path] = {}
    for path in matching(pattern, suffix):
        if path.name.endswith((".manifest.json", ".rejected.jsonl", ".retrieval.json")):
            continue
        numbers = re.findall(r"\d+", path.stem)
        if not numbers:
            raise UserError(f"{path}: has no shard number in its name; restrict --input_files")
        other = by_number.setdefault(int(numbers[-1]), path)
        if other != path:
            raise UserError(f"{path}: has the same shard number as {other}; restrict --input_files")
    return dict(sorted(by_number.items()))


def find_shards(pattern: str, splits_dir: str) -> list[Path]:
    """Return all shards in order. Raises UserError naming the first that is missing, unfinished or from another split."""
    unfinished = {number: path for number, path in numbered(pattern, ".partial").items()}
    for path in unfinished.values():
        raise UserError(f"{path}: this shard is unfinished; run its command again to continue it")
    shards, splits = numbered(pattern), numbered(Path(splits_dir) / "split_*.json")
    if not shards:
        raise UserError(f"{pattern}: no shards; create them with retriever.py")
    example = next(iter(shards.values()))
    if any(corpus_shard(path) for path in shards.values()):
        splits = {}
    for number in range(max([*shards, *splits]) + 1):
        if number not in shards:
            name = re.sub(r"\d+(?=\D*$)", str(number), example.stem) + example.suffix
            raise UserError(f"{example.with_name(name)}: this shard is missing; run retriever.py for it")
        manifest = read_manifest(shards[number])
        if manifest is None:
            raise UserError(f"{shards[number]}: has no manifest and is therefore incomplete; run its retriever.py "
                            "again")
        if not splits:
            continue
        if number not in splits:
            raise UserError(f"{shards[number]}: there is no split_{number}.json in {splits_dir}; remove the shard if "
                            "it belongs to an earlier run, or give --splits_dir")
        if not any(is_content(made_from, splits[number]) for made_from in manifest["inputs"].values()):
            raise UserError(f"{shards[number]}: was not made from the current {splits[number]}; run its retriever.py "
                            "again with --overwrite")
    return list(shards.values())


def read_shards(paths: list[Path]) -> Iterator[Row]:
    """Yield the rows of all shards, one file after the other. Raises UserError for an id that occurs in two of them."""
    from dynamicrag.rows.records import read_rows
    from dynamicrag.rows.seen import Seen

    seen = Seen()
    for shard, path in enumerate(paths):
        for row in read_rows(path, needs=STAGE_KEYS["aggregate"].reads):
            if (other := seen.add(row["id"], shard)) is not None:
                raise UserError(f"{path}: id {row['id']!r} is also in {paths[other]}; ids must be unique")
            yield row


def same_run(shards: list[Path], questions: str, splits_dir: str) -> dict:
    """Return the identity of one run over `questions` that the answered shards share: stage, arguments, and input hashes.

    Raises UserError if a shard was made differently from the first one, or the parts are not from the current
    `questions`.
    """
    split = read_manifest(Path(splits_dir) / "split_0.json")
    if split is None:
        raise UserError(f"{splits_dir}: contains no finished split of {questions}; run split_data.py, or give "
                        "--splits_dir")
    whole = fingerprint(questions)
    if not any(is_content(made_from, questions) for made_from in split["inputs"].values()):
        raise UserError(f"{splits_dir}: is not a split of the current {questions}; run split_data.py and the shards "
                        "again with --overwrite")
    first: dict = {}
    for path in shards:
        manifest = require_manifest(path)
        part = manifest["arguments"].get("input_json")
        if not isinstance(part, str) or len(manifest["outputs"]) != 2 or not isinstance(manifest.get("seconds"), int | float):
            raise UserError(f"{manifest_path(path)}: not a manifest of inference.py or top_inference.py; omit "
                            "--questions")
        shared = {
            "stage": manifest.get("stage"),
            "arguments": {**manifest["arguments"], "input_json": questions},
            "inputs": {questions: whole, **{name: content for name, content in manifest["inputs"].items() if name != part}},
            **({"resolved": manifest["resolved"]} if "resolved" in manifest else {}),
        }
        first = first or shared
        for what in ("arguments", "inputs", "resolved"):
            here, there = shared.get(what, {}), first.get(what, {})
            changed = sorted(key for key in here.keys() | there.keys() if here.get(key) != there.get(key))
            if changed:
                raise UserError(f"{path}: its {changed[0]} differs from that of {shards[0]}; run its {shared['stage']}.py again with the same one")
    return first


def aggregate_answers(args: argparse.Namespace, shards: list[Path]) -> None:
    """Combine answered shards and their remain files, and write the manifest that a single run would have written."""
    from dynamicrag.files.jsonio import read_json
    from dynamicrag.llm.answering import remain_path

    shared = same_run(shards, args.questions, args.splits_dir)
    manifests = [require_manifest(path) for path in shards]
    outputs = [args.output_file, remain_path(args.output_file)]
    arguments = {"on_error": "fail", **shared["arguments"], "overwrite": args.overwrite}
    output = Output(arguments, outputs, list(shared["inputs"]))
    if output.finished:
        return
    changed = sorted(name for name, content in shared["inputs"].items() if output.identity["inputs"][name] != content)
    if changed:
        raise UserError(f"{changed[0]}: has changed since {shards[0]} was made; run its {shared['stage']}.py again "
                        "with --overwrite")
    output.identity["stage"] = shared["stage"]
    if "resolved" in shared:
        devices = dict.fromkeys(manifest["device"] for manifest in manifests if "device" in manifest)
        output.record(", ".join(devices) or None, **shared["resolved"])
    output.started -= sum(manifest["seconds"] for manifest in manifests)  # the total of all workers
    remains = [path.with_name(Path(manifest["outputs"][1]).name) for path, manifest in zip(shards, manifests, strict=True)]
    counts = {
        what: output.publish(target, (row for path in paths for _, row in read_json(path)))
        for what, target, paths in zip(("answered", "unanswered"), outputs, (shards, remains), strict=True)
    }
    written, rows = sum(counts.values()), sum(manifest["counts"].get("rows", 0) for manifest in manifests)
    if written != rows:
        raise UserError(f"{args.input_files}: the shards and their remain files contain {written} rows, but their "
                        f"manifests give {rows}; run inference.py again with --overwrite")
    output.finish(rows=rows, **counts, shards=len(shards))


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    shards = find_shards(args.input_files, args.splits_dir)
    if args.questions is not None:
        aggregate_answers(args, shards)
        return
    output = Output(vars(args), [args.output_file], list(map(str, shards)))
    if output.finished:
        return

    from tqdm import tqdm

    if any(map(corpus_shard, shards)):
        shards = in_corpus_order(shards)
        n_docs = require_manifest(shards[0])["arguments"].get("n_docs")
        if type(n_docs) is not int or n_docs < 1:
            raise UserError(f"{manifest_path(shards[0])}: not a manifest of retriever.py (n_docs is {n_docs!r}); run "
                            "retriever.py again with --overwrite")
        rows = merge_by_score(shards, n_docs)
    else:
        rows = read_shards(shards)
    with tqdm(desc="aggregating", unit=" questions") as progress:
        for chunk in output.chunks(rows, ROWS_PER_CHUNK):
            output.write(chunk)
            progress.update(len(chunk))
            del chunk
    if not output.rows:
        raise UserError(f"{args.input_files}: contains no row; check the shards")
    output.finish(shards=len(shards))


if __name__ == "__main__":
    stage.run(main)
