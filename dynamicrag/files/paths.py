"""Paths as they are given: patterns that may be names, and links."""

import glob
import os
from pathlib import Path


def matching(pattern: str | Path, suffix: str = "") -> list[Path]:
    """The files and folders that a pattern names, sorted, each with `suffix` behind its name.

    What exists is never a pattern: a part of the path that is the name of a file or folder there (`data[1]`, `a*b`) means
    that one. Only the other parts are read as globs.
    """
    if not str(pattern):
        return []
    *folders, name = Path(pattern).parts or ["."]
    found = [Path()]
    for part in folders:
        found = [child for folder in found for child in _children(folder, part)]
    return sorted(child for folder in found for child in _children(folder, name, suffix))


def _children(folder: Path, part: str, suffix: str = "") -> list[Path]:
    if os.path.lexists(folder / part) or os.path.lexists(folder / f"{part}{suffix}"):
        return [path for path in [folder / f"{part}{suffix}"] if os.path.lexists(path)]
    return [Path(path) for path in glob.glob(os.path.join(glob.escape(str(folder)), f"{part}{suffix}"))]


def written_at(path: str | Path) -> Path:
    """Where the file `path` is written: at the end of the link if it is one, so that the link stays; else `path` itself."""
    path = Path(path)
    return Path(os.path.realpath(path)) if path.is_symlink() else path
