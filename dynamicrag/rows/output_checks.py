"""Checks of an output before any work: its folder, its inputs, and the run that wrote what is already there."""

import os
from collections.abc import Iterable
from pathlib import Path

from dynamicrag.files.jsonio import refuse_pipe
from dynamicrag.rows.manifest import differences, read_manifest
from dynamicrag.stage import UserError


def _make_folder_of(path: Path) -> None:
    """Create the folder of an output. Raises UserError if it cannot be written or `path` itself is a folder."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path.parent}: the output folder cannot be created: {error.strerror}; give a folder that you may write") from error
    if path.is_dir():
        raise UserError(f"{path}: is a folder; give the path of a file")
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"{path.parent}: the output folder is not writable; change its permissions")


def check_paths(outputs: list[Path], inputs: list[str]) -> None:
    """Raise UserError if an output cannot be written, or an input is missing, a pipe, or one of the outputs."""
    for path in outputs:
        _make_folder_of(path)
    for name in inputs:
        if not Path(name).exists():
            raise UserError(f"{name}: no such file; this stage needs it as input")
        refuse_pipe(Path(name))
    refuse_overlap(outputs, inputs)


def refuse_other_owner(outputs: list[Path], given: str) -> None:
    """Raise UserError if an output belongs to another run, which --overwrite would destroy.

    `given` is the path of the first output as the user gave it.
    """
    first = outputs[0]
    for path in outputs:
        owner = (read_manifest(path) or {}).get("outputs", [str(first)])[0]
        if Path(owner).name not in (first.name, Path(given).name) and os.path.realpath(owner) != os.path.realpath(first):
            raise UserError(f"{path}: belongs to the run that wrote {owner}; give another output path")


def refuse_other_run(made: dict, identity: dict, path: Path) -> None:
    """Raise UserError if `path` was made with the identity `made`, whose arguments or inputs differ from `identity`."""
    what, changed = differences(made, identity)
    if changed:
        before, now = next(iter(changed.values()))
        detail = f" ({before!r} before, {now!r} now)" if what == "arguments" else ""
        raise UserError(
            f"{path}: was made from different {what}: {', '.join(changed)}{detail}; "
            "give --overwrite to replace it, or another output path to keep both"
        )


def refuse_overlap(outputs: Iterable[str | Path], inputs: Iterable[str]) -> None:
    """Raise UserError if an output is the same file as an input or another output, under whatever name or link."""
    # os.path.realpath, because Path.resolve fails for a link to itself; the code that reads the file reports that
    # better.
    read, written = {os.path.realpath(name) for name in inputs}, set()
    for path in outputs:
        real = os.path.realpath(path)
        if real in read:
            raise UserError(f"{path}: is both input and output of this stage; give another output path")
        if real in written:
            raise UserError(f"{path}: is given for two outputs of this stage; give each its own path")
        written.add(real)
