"""Who writes an output: of several runs with the same output, on any machines, one has it and the others are refused.

A run holds the lock of `<output>.partial` from its first row until its manifest is written. `<output>.partial.manifest.json`
names its holder. On NFS, a client may believe for up to one minute that a file exists that another machine has removed,
or that it does not exist. A client asks again when it has changed the folder itself. Therefore a run changes the folder
before it looks for finished files; and it first takes the lock, then writes the manifest of the started run, and only
then looks whether another run has finished in the meantime.
"""

import contextlib
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import orjson

from dynamicrag.files.atomic import atomic_writer
from dynamicrag.files.locks import locked
from dynamicrag.rows.manifest import manifest_path, parse_manifest
from dynamicrag.stage import UserError


def look_again(folder: Path) -> None:
    """Change a folder on NFS, so that the client asks the server for its files. A local folder is not changed."""
    with contextlib.suppress(OSError), tempfile.TemporaryFile(dir=folder):
        pass


def hold(partial: Path, begun: Path, create: bool = True) -> BinaryIO:
    """Open and lock the partial file of an output.

    Raises UserError, naming the run that holds it, and FileNotFoundError if there is none and it is not to be created.
    """
    try:
        return locked(partial, create)
    except BlockingIOError as error:
        held_by = None
        with contextlib.suppress(OSError, UserError):
            held_by = parse_manifest(begun).get("held_by")
        raise UserError(f"{partial}: another run writes this output ({held_by or 'it has just begun'}); wait for it or stop it (the locks of a "
                        "lost machine end when its file server notices that)") from error


def begin(begun: Path, manifest: dict, output: Path, partial: Path | None, held: BinaryIO) -> None:
    """Write the manifest of a started run, which holds the lock of the file `held`.

    Raises UserError if another run has finished the output since this one looked. It then removes `begun` and `partial`,
    and gives up the lock.
    """
    with atomic_writer(begun) as file:
        file.write(orjson.dumps(manifest))
    if manifest_path(output).exists():
        for path in (begun, partial):
            if path:
                path.unlink(missing_ok=True)
        held.close()
        raise UserError(f"{output}: another run has finished it in the meantime; run the same command again to use it")


def discard(files: Iterable[Path], partial: Path, begun: Path) -> None:
    """Remove files of earlier runs. Raises UserError if a run writes them now."""
    with contextlib.ExitStack() as held:
        with contextlib.suppress(FileNotFoundError):
            held.enter_context(hold(partial, begun, create=False))
        for path in files:
            path.unlink(missing_ok=True)
