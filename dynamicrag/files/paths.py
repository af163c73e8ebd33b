"""Paths given by the user: glob patterns and links."""

import glob
import os
from pathlib import Path


def matching(pattern: str | Path, suffix: str = "") -> list[Path]:
    """Return the files and folders that match a glob pattern, sorted, with `suffix` appended to the last part of the pattern.

    An existing name takes precedence over a pattern: a part such as `data[1]` or `a*b` means the file or folder of that
    name if there is one. All other parts are read as globs.
    """
    if not str(pattern):
        return []
    *folders, name = Path(pattern).parts or ["."]
    matches = [Path()]
    for part in folders:
        matches = [child for folder in matches for child in _children(folder, part)]
    return sorted(child for folder in matches for child in _children(folder, name, suffix))


def _children(folder: Path, part: str, suffix: str = "") -> list[Path]:
    if os.path.lexists(folder / part) or os.path.lexists(folder / f"{part}{suffix}"):
        return [path for path in [folder / f"{part}{suffix}"] if os.path.lexists(path)]
    return [Path(path) for path in glob.glob(os.path.join(glob.escape(str(folder)), f"{part}{suffix}"))]


def written_at(path: str | Path) -> Path:
    """Return the path to write to: the target if `path` is a link, so that the link stays; otherwise `path`."""
    path = Path(path)
    return Path(os.path.realpath(path)) if path.is_symlink() else path
