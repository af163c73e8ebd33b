"""Encode the questions of a search. It runs in a process of its own, so that all its memory is free before the search."""

from dataclasses import dataclass
from itertools import islice

from dynamicrag.models.encoder_settings import QUERY, Settings
from dynamicrag.rows.records import read_rows
from dynamicrag.rows.row import Row
from dynamicrag.stage import UserError

# Number of questions that are sorted by length together.
QUESTIONS_ENCODED = 1024


@dataclass(frozen=True)
class QuestionOptions:
    """The questions of a search and their encoder: flags of retriever.py, which describes them."""

    query: str
    dataset: str | None
    on_error: str
    model_name_or_path: str
    pooling: str | None
    normalize: bool
    query_prompt: str | None
    max_length: int | None
    batch_tokens: int | None
    dtype: str
    device: str


def search_text(row: Row) -> str:
    """Return the text that is searched with."""
    return row.get("retrieved_question") or row["question"]


def query_settings(options: QuestionOptions) -> Settings:
    """Return the settings for encoding questions, without loading the model."""
    from dynamicrag.models.encoder import encoder_settings

    return encoder_settings(options.model_name_or_path, QUERY, options.normalize, options.pooling, options.query_prompt)[0]


def encode_questions(options: QuestionOptions, path: str, count: int) -> str:
    """Write the vectors of all questions to `path`, .npy float32 [count, width]. Returns a description of the encoding."""
    import numpy as np
    from tqdm import tqdm

    from dynamicrag.models.encoder import Encoder

    encoder = Encoder(
        options.model_name_or_path, options.device, options.dtype, options.max_length, options.normalize, options.pooling,
        options.query_prompt, QUERY,
    )
    rows = read_rows(options.query, dataset=options.dataset, reject=(lambda _: None) if options.on_error == "skip" else None)
    with open(path, "wb") as file, tqdm(total=count, desc="encoding", unit="question") as progress:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (count, encoder.hidden_size)})
        while texts := [search_text(row) for row in islice(rows, QUESTIONS_ENCODED)]:
            vectors = encoder.encode(texts, options.batch_tokens)
            if not np.isfinite(vectors).all():
                raise UserError(f"{options.model_name_or_path}: the vector of a question is not finite; try "
                                "--dtype float32")
            file.write(vectors.tobytes())
            progress.update(len(texts))
    return encoder.said()
