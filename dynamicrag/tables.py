"""Tables of results: one line a system, in Markdown whose columns line up in a terminal too."""

from pathlib import Path


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    widths = [max(len(line[column]) for line in [header, *rows]) for column in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    padded = ([cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


def system_names(results_files: list[str]) -> list[str]:
    """File names without suffix, or whole paths where several are called the same."""
    stems = [Path(path).stem for path in results_files]
    return stems if len(set(stems)) == len(stems) else results_files
