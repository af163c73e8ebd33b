"""Encode the questions of a search. It runs in a process of its own, so that all its memory is free before the search."""

from argparse import Namespace
from itertools import islice

from dynamicrag.models.encoder_settings import QUERY, Settings
from dynamicrag.rows.records import read_rows
from dynamicrag.rows.row import Row
from dynamicrag.stage import UserError

# Number of questions that are sorted by length together.
QUESTIONS_ENCODED = 1024


def search_text(row: Row) -> str:
    """Return the text that is searched with."""
    return row.get("retrieved_question") or row["question"]


def query_settings(args: Namespace) -> Settings:
    """Return the settings for encoding questions, without loading the model."""
    from dynamicrag.models.encoder import encoder_settings

    return encoder_settings(args.model_name_or_path, QUERY, args.normalize, args.pooling, args.query_prompt)[0]


def encode_questions(args: Namespace, path: str, count: int) -> str:
    """Write the vectors of all questions to `path`, .npy float32 [count, width]. Returns a description of the encoding."""
    import numpy as np
    from tqdm import tqdm

    from dynamicrag.models.encoder import Encoder

    encoder = Encoder(
        args.model_name_or_path, args.device, args.dtype, args.max_length, args.normalize, args.pooling, args.query_prompt, QUERY
    )
    rows = read_rows(args.query, dataset=args.dataset, reject=(lambda _: None) if args.on_error == "skip" else None)
    with open(path, "wb") as file, tqdm(total=count, desc="encoding", unit="question") as progress:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (count, encoder.hidden_size)})
        while texts := [search_text(row) for row in islice(rows, QUESTIONS_ENCODED)]:
            vectors = encoder.encode(texts, args.batch_tokens)
            if not np.isfinite(vectors).all():
                raise UserError(f"{args.model_name_or_path}: the vector of a question is not finite; try "
                                "--dtype float32")
            file.write(vectors.tobytes())
            progress.update(len(texts))
    return encoder.said()
