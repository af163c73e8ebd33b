"""Embed a corpus: passages -> shards of vectors for the retriever.

A sentence-transformers folder gives pooling, normalisation, the prompt before a passage and the maximum length. A plain
folder uses --pooling, by default the mean, like Contriever (Izacard et al., 2022, arXiv 2112.09118). The settings are
logged and stored in the shard's manifest; a search with other settings is refused. Several machines or GPUs can share a
corpus with --num_shards N, each with its own --shard_id.

Reads    data/psgs_w100.tsv                              a corpus: TSV with the header id, text, title; JSONL; Parquet
Writes   data/wikipedia_embeddings/passages_00.npy       float16, one row per passage
         data/wikipedia_embeddings/passages_00.ids.npy   their ids

    python generate_passage_embeddings.py --model_name_or_path models/retriever --passages data/psgs_w100.tsv \\
        --output_dir data/wikipedia_embeddings
"""

import argparse
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from dynamicrag import stage
from dynamicrag.models.batches import BATCH_TOKENS_HELP
from dynamicrag.models.device import DEVICES, DTYPES, device_flag, place
from dynamicrag.models.encoder_settings import POOLINGS, record
from dynamicrag.rows.ahead import prepared_ahead
from dynamicrag.rows.output import Output

# Passages are sorted by length within a window. A run continues after the last whole window.
WINDOW = 2048


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = stage.ArgumentParser(__doc__)
    group = parser.add_argument_group("files")
    group.add_argument("--model_name_or_path", default="models/retriever", help="encoder: a folder or a hub name")
    group.add_argument("--passages", default="data/psgs_w100.tsv", help="corpus: TSV, JSONL or Parquet, or a folder")
    group.add_argument("--passage_store",
                       default=None, help="folder of the memory-mapped corpus (default: <passages>.store)")
    group.add_argument("--output_dir", default="data/wikipedia_embeddings", help="folder of the shards")
    group.add_argument("--shard_id", type=int, default=0, help="number of the part of the corpus to embed, from 0")
    group.add_argument("--num_shards", type=int, default=1, help="number of parts")
    group = parser.add_argument_group("encoder")
    group.add_argument("--pooling", choices=POOLINGS, default=None,
                       help="pooling of a plain folder (default: mean); cls is the first token")
    group.add_argument("--normalize", action="store_true",
                       help="scale vectors to length 1, even if the folder does not specify it")
    group.add_argument("--passage_prompt", default=None,
                       help="prefix of each passage, such as E5's 'passage: ' (default: as given by the folder)")
    group.add_argument("--max_length", type=int, default=None,
                       help="maximum tokens of a passage (default: as given by the folder, or 512)")
    group.add_argument("--batch_tokens", type=int, default=None, help=BATCH_TOKENS_HELP)
    group.add_argument("--dtype", choices=DTYPES, default="auto", help="auto is bfloat16 if the hardware supports it")
    group.add_argument("--device", type=device_flag, default="auto", help=DEVICES)
    stage.add_common_flags(parser)
    args = parser.parse_args(argv)
    if not 0 <= args.shard_id < args.num_shards:
        parser.error(f"--shard_id must be in 0..{args.num_shards - 1}")
    return args


def windows(start: int, stop: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield the bounds of windows of `size` within start..stop, at fixed positions."""
    for first in range(start, stop, size):
        yield first, min(first + size, stop)


def open_rows(file, count: int, width: int) -> int:
    """Prepare a partial .npy file of [count, width] float16 for appending.

    Returns the number of rows in its whole windows.
    """
    import numpy as np

    header = {"descr": "<f2", "fortran_order": False, "shape": (count, width)}
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    try:
        np.lib.format.read_magic(file)
        np.lib.format.read_array_header_1_0(file)
    except ValueError:  # empty, or incomplete header
        file.truncate(0)
        np.lib.format.write_array_header_1_0(file, header)
        file.flush()
        return 0
    done = (size - file.tell()) // (2 * width) // WINDOW * WINDOW
    file.truncate(file.tell() + done * 2 * width)
    return done


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    from dynamicrag.search.shards import ids_path, save_ids, shard_bounds

    # End if an earlier run is complete
    shard = Path(args.output_dir) / f"passages_{args.shard_id:02d}.npy"
    inputs = [args.passages]
    if Path(args.model_name_or_path).exists():
        inputs.append(args.model_name_or_path)
    output = Output(vars(args), [str(shard), str(ids_path(shard))], inputs)
    if output.finished:
        return

    import time

    import numpy as np
    from tqdm import tqdm

    from dynamicrag.models.encoder import Encoder
    from dynamicrag.search.passages import open_passages

    # Corpus and encoder
    store = open_passages(args.passages, args.passage_store)
    start, stop = shard_bounds(len(store), args.shard_id, args.num_shards)
    if start == stop:
        raise stage.UserError(f"{args.passages}: {len(store)} passages cannot fill {args.num_shards} shards; use fewer")
    encoder = Encoder(
        args.model_name_or_path, args.device, args.dtype, args.max_length, args.normalize, args.pooling, args.passage_prompt
    )
    output.record(**place(args.device, args.dtype))
    stage.log.info("%s, for passages: %s", args.model_name_or_path, encoder.said())
    # Embed the windows that are missing
    file = output.begin()
    done = open_rows(file, stop - start, encoder.hidden_size)
    began = time.monotonic()

    def tokenized(window: tuple[int, int]) -> tuple[list[str], list[list[int]]]:
        columns = store.slice(*window)
        texts = [f"{title} {text}".strip() for title, text in zip(columns["title"], columns["text"], strict=True)]
        return columns["id"], encoder.tokenize(texts)

    with tqdm(total=stop - start, initial=done, desc=shard.name, unit=" passages", unit_scale=True) as progress:
        for ids, tokens in prepared_ahead(tokenized, windows(start + done, stop, WINDOW)):
            vectors = encoder.encode_tokens(tokens, args.batch_tokens, progress.update).astype(np.float16)
            if not np.isfinite(vectors).all():
                row = int(np.flatnonzero(~np.isfinite(vectors).all(axis=1))[0])
                raise stage.UserError(f"{args.model_name_or_path}: the float16 vector of passage {ids[row]!r} is not "
                                      "finite; try --normalize or --dtype float32")
            output.append([vectors.tobytes()])
    # Ids, and the settings that a search must share
    save_ids(ids_path(shard), store.ids(start, stop))
    output.rows = stop - start
    rate = (stop - start - done) / (time.monotonic() - began)
    padding = 1 - encoder.seen_tokens / max(encoder.padded_tokens, 1)
    settings = record(encoder.settings, encoder.max_length)
    output.finish(settings, width=encoder.hidden_size, rate=f"{rate:.1f} passages/s", padding=f"{padding:.1%}")


if __name__ == "__main__":
    stage.run(main)
