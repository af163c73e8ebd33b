"""Divide the questions that are not expert rows between generator SFT and DPO, at random.

The published sizes are 70,000 for SFT and the remaining 50,000 for DPO. A smaller data set is divided in about the same
proportion, three fifths to two fifths, and neither part is empty. --dev_size holds out questions from both parts, with
which several rounds of DPO are compared (scripts/iterate.sh).

Reads    training_data/retrieval_data_rerank_normal.jsonl
Writes   training_data/training_data_sft.jsonl, training_data/training_data_dpo.jsonl      rows unchanged
         training_data/training_data_dev.jsonl                                             likewise, with --dev_size

    python split_for_sft_dpo.py
"""

import argparse
import random
from collections.abc import Sequence

from dynamicrag import stage
from dynamicrag.rows.output import Output
from dynamicrag.rows.records import count_rows, read_rows
from dynamicrag.rows.row import STAGE_KEYS
from dynamicrag.stage import UserError, log

PUBLISHED_SFT_ROWS = 70_000
PUBLISHED_ROWS = 120_000
NEEDS = STAGE_KEYS["split_for_sft_dpo"].reads


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = stage.ArgumentParser(__doc__)
    files = parser.add_argument_group("files")
    files.add_argument("--input_file", default="training_data/retrieval_data_rerank_normal.jsonl", help="labelled rows")
    files.add_argument("--sft_file", default="training_data/training_data_sft.jsonl", help="rows for generator SFT")
    files.add_argument("--dpo_file", default="training_data/training_data_dpo.jsonl", help="rows for DPO")
    files.add_argument("--dev_file", default="training_data/training_data_dev.jsonl", help="held-out rows")
    sizes = parser.add_argument_group("sizes")
    sizes.add_argument("--sft_size", type=int, help="rows for SFT (default: 70,000, or three fifths of a smaller data set)")
    sizes.add_argument("--dpo_size", type=int, help="maximum number of rows for DPO (default: all others)")
    sizes.add_argument("--dev_size", type=int, default=0, help="number of held-out rows")
    stage.add_common_flags(parser)
    args = parser.parse_args(argv)
    if args.dev_size < 0:
        parser.error("--dev_size must be at least 0")
    return args


def places(rows: int, sft_size: int | None, dpo_size: int | None, dev_size: int) -> tuple[range, range, range]:
    """Return the places of the SFT, DPO and held-out parts in the random order of the rows.

    Raises UserError if the SFT or DPO part would be empty.
    """
    left = max(rows - dev_size, 0)
    rest, dev = range(rows)[:left], range(rows)[left:]
    if sft_size is None:
        sft_size = PUBLISHED_SFT_ROWS
        if rows < PUBLISHED_ROWS:
            sft_size = min(PUBLISHED_SFT_ROWS, max(1, round(left * 3 / 5)), max(left - 1, 0))
            log.warning("--sft_size: the %d rows are fewer than the published 120,000; %d are used for SFT, the others for DPO",
                        rows, sft_size)
    sft, dpo = rest[:sft_size], rest[sft_size:][:dpo_size]
    if not sft or not dpo:
        raise UserError(
            f"--sft_size: of {rows} rows, {len(sft)} would be for SFT, {len(dpo)} for DPO and {len(dev)} held out; lower --sft_size or --dev_size"
        )
    return sft, dpo, dev


def divide(rows: int, parts: Sequence[range], seed: int) -> bytearray:
    """Return for each row the number of its part, from 1; 0 for a row of no part. `parts` are places in a random order."""
    part_of = bytearray(rows)
    for place, row in enumerate(stage.shuffled(rows, random.Random(seed))):
        part_of[row] = next((number for number, part in enumerate(parts, start=1) if place in part), 0)
    return part_of


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    dev_file = [args.dev_file] if args.dev_size else []
    output = Output(vars(args), [args.sft_file, args.dpo_file, *dev_file], [args.input_file])
    if output.finished:
        return
    rows = count_rows(args.input_file, NEEDS, skip_malformed=bool(output.reject))
    parts = places(rows, args.sft_size, args.dpo_size, args.dev_size)
    part_of = divide(rows, parts, args.seed)
    files = [args.sft_file, args.dpo_file, *dev_file]
    numbered = zip(part_of, read_rows(args.input_file, NEEDS, reject=output.reject), strict=True)
    output.publish_each(files, ((files[number - 1], row) for number, row in numbered if number))
    sft, dpo, dev = map(len, parts)
    output.finish(sft=sft, dpo=dpo, dev=dev)


if __name__ == "__main__":
    stage.run(main)
