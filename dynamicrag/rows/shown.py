"""The number of documents shown to the LLM, which must be the same for labels, samples, pairs and answers."""

from collections.abc import Iterable

from dynamicrag.rows.row import Row
from dynamicrag.stage import UserError

DOCUMENTS_SHOWN = 40  # as in the paper, for a window of 8192 tokens; 20 for a window of 4096
DOCUMENTS_HELP = "documents shown to the LLM, the same in every stage: 40 for a window of 8192 tokens, 20 for 4096"


def labelled_documents(row: Row) -> int | None:
    """Return how many documents process_training_data.py labelled; None for a row without its labels."""
    lists = row.get("true_id"), row.get("false_id")
    return sum(map(len, lists)) if all(isinstance(positions, list) for positions in lists) else None


def check_shown(path: str, rows: Iterable[Row], flag: str, shown: int) -> None:
    """Raise UserError if a row was labelled with a number of documents other than the `shown` of this stage."""
    for row in rows:
        labelled = labelled_documents(row)
        if labelled is not None and labelled != min(shown, len(row["docs"])):
            raise UserError(
                f"{path}: row {row['id']}: process_training_data.py labelled {labelled} documents (--n_docs), but "
                f"{flag} {shown} would show {min(shown, len(row['docs']))}; give {flag} {labelled}, or label again "
                f"with --n_docs {shown}"
            )
