"""How many documents the LLM is shown: one number, for the labels, the samples, the pairs and the answers."""

from collections.abc import Iterable

from dynamicrag.rows.records import Row
from dynamicrag.stage import UserError

DOCUMENTS_SHOWN = 40  # as published for a window of 8192 tokens; 20 for one of 4096
DOCUMENTS_HELP = "documents shown to the LLM, in every stage alike: 40 for a window of 8192 tokens, 20 for 4096"


def labelled_documents(row: Row) -> int | None:
    """How many documents process_training_data.py labelled, which are those shown; None for a row it has not seen."""
    lists = row.get("true_id"), row.get("false_id")
    return sum(map(len, lists)) if all(isinstance(positions, list) for positions in lists) else None


def check_shown(path: str, rows: Iterable[Row], flag: str, shown: int) -> None:
    """Raises UserError, naming both numbers, for a row that was labelled for another number of documents than will be shown."""
    for row in rows:
        labelled = labelled_documents(row)
        if labelled is not None and labelled != min(shown, len(row["docs"])):
            raise UserError(
                f"{path}: row {row['id']}: process_training_data.py labelled {labelled} documents (--n_docs), and {flag} {shown} would "
                f"show {min(shown, len(row['docs']))}; give {flag} {labelled}, or label again with --n_docs {shown}"
            )
