"""Get published files: rows in this project's form, and corpora, embeddings and models in the form that the stages read.

Each result has a manifest with the version and the SHA-256 of what it was made from, and is not fetched again.
"""

import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

import orjson

from dynamicrag.files.archives import unpack_corpus, unpack_shards
from dynamicrag.files.atomic import atomic_writer
from dynamicrag.files.downloads import arrived, check_space, digest_of, first_lines, obtain, size_of
from dynamicrag.files.hub import Remote, check_access, hub_files, url_file
from dynamicrag.files.published import Published
from dynamicrag.rows.manifest import differences, identity, manifest_path, read_manifest, versions
from dynamicrag.rows.output import Output
from dynamicrag.rows.output_checks import check_paths, refuse_other_run
from dynamicrag.rows.published_rows import published_rows
from dynamicrag.rows.row import Row
from dynamicrag.stage import UserError, log

OTHER_FORMS = ("original", "onnx", "openvino")  # folders of a model repository that hold the weights again
WEIGHTS = (".safetensors", ".bin")  # the first that a repository has
LIMITED = ("questions", "corpus")
OF_A_PART = "not known of a part"


@dataclass(frozen=True)
class PrepareOptions:
    """Where published files go and how much of them is taken: flags of prepare_data.py, which describes them."""

    output_dir: str
    models_dir: str
    limit: int | None
    revision: str | None
    keep_downloads: bool
    seed: int
    on_error: str
    overwrite: bool


def remote_files(entry: Published, revision: str | None) -> tuple[str, list[Remote]]:
    """Return the version of a set, and its files: one, or those of a model that its loader reads. Raises UserError."""
    if entry.url:
        remote = url_file(entry.url, entry.sha256)
        return remote.version, [remote]
    version, remotes = hub_files(entry.place, entry.repo_type, revision or entry.revision, entry.files)
    if entry.kind == "model":
        parts = [(remote, PurePosixPath(remote.name)) for remote in remotes]
        remotes = [remote for remote, path in parts if path.parts[0] not in OTHER_FORMS and not path.name.startswith("consolidated")]
        suffix = next((suffix for suffix in WEIGHTS if any(remote.name.endswith(suffix) for remote in remotes)), None)
        if suffix is None:
            raise UserError(f"{entry.place}: has no weights ({', '.join(WEIGHTS)}) at {version}; give another --revision")
        of_weights = (*WEIGHTS, ".index.json")
        return version, [remote for remote in remotes if not remote.name.endswith(of_weights) or suffix in remote.name]
    if len(remotes) > 1:
        names = ", ".join(remote.name for remote in remotes)
        raise UserError(f"{entry.place}: {len(remotes)} files fit {' or '.join(entry.files)}: {names}; give another --revision")
    return version, [replace(remotes[0], sha256=entry.sha256 or remotes[0].sha256)]


@dataclass(frozen=True)
class Cost:
    """What a set costs to download, in bytes. `cut` means that --limit downloads only its beginning."""

    size: int | None
    there: int = 0
    cut: bool = False
    note: str = ""

    @property
    def missing(self) -> int | None:
        return None if self.size is None else 0 if self.cut else self.size - self.there


def cost_of(entry: Published, options: PrepareOptions) -> Cost:
    """Return what a set costs, by what its hub says now. Raises UserError if the hub refuses it or cannot be reached."""
    path = entry.path(options.output_dir, options.models_dir)
    if is_there(entry, path) and not options.overwrite:
        size = sum(file.stat().st_size for file in (path, *path.rglob("*")) if file.is_file())
        _, changed = differences(read_manifest(path) or {}, identity(arguments_of(entry, options), [str(path)], []))
        return Cost(size, size, note=f"complete, but with another {' and '.join(changed)}: needs --overwrite" if changed else "complete")
    _, remotes = remote_files(entry, options.revision)
    check_access(remotes[0])
    cut = bool(options.limit) and entry.kind in LIMITED and not is_packed(entry, remotes[0])
    note = f"only the beginning, for {options.limit} rows" if cut else "whole, in spite of --limit" if options.limit else ""
    there = sum((remote.size or 0) if remote.local else 0 if options.overwrite else arrived(download_path(entry, remote, options)) for remote in remotes)
    return Cost(sum(remote.size or 0 for remote in remotes), there, cut, note or ("in the cache of the hub" if all(remote.local for remote in remotes) else ""))


def download_path(entry: Published, remote: Remote, options: PrepareOptions) -> Path:
    """Return where a file is downloaded to: to its place, unless something else is made from it."""
    path = entry.path(options.output_dir, options.models_dir)
    if entry.kind == "model":
        return path / remote.name
    if entry.kind == "corpus" and not is_packed(entry, remote):
        return path
    return Path(options.output_dir) / "downloads" / entry.name / PurePosixPath(remote.name).name


def is_packed(entry: Published, remote: Remote) -> bool:
    """Return whether the file is an archive, which is downloaded whole and unpacked."""
    return entry.kind == "embeddings" or remote.name.endswith(".zip")


def is_there(entry: Published, path: Path) -> bool:
    """Return whether a set is complete."""
    return path.exists() and read_manifest(path) is not None


def arguments_of(entry: Published, options: PrepareOptions) -> dict[str, Any]:
    """Return what determines the content of a set, in the form of a stage's arguments."""
    return {
        "set": entry.name, "place": entry.place, "revision": options.revision or entry.revision, "limit": limit_of(entry, options),
        "on_error": options.on_error, "overwrite": options.overwrite,
    }


def limit_of(entry: Published, options: PrepareOptions) -> int | None:
    return options.limit if entry.kind in LIMITED else None


def prepare(entry: Published, options: PrepareOptions) -> None:
    """Get one set, and remove what it was made from unless options.keep_downloads. Raises UserError."""
    (prepare_questions if entry.kind == "questions" else prepare_files)(entry, options)
    if not options.keep_downloads:
        shutil.rmtree(Path(options.output_dir) / "downloads" / entry.name, ignore_errors=True)


def raw_rows(entry: Published, options: PrepareOptions) -> tuple[Path, dict[str, str]]:
    """Return the published file of a set of questions, or its first lines, and what it is. Raises UserError if it cannot be had."""
    limit = limit_of(entry, options)
    version, [remote] = remote_files(entry, options.revision or entry.revision)
    whole = download_path(entry, remote, options)
    raw = whole.with_name(f"first_{limit}_{whole.name}")
    if limit and first_lines(remote, limit, raw):
        digest = remote.sha256 or OF_A_PART
    elif remote.local:
        raw, digest = remote.local, digest_of(remote.local)
    else:
        check_space(whole.parent, 2 * (remote.size or 0) - arrived(whole), f"{entry.name}, downloaded and converted,")
        raw, digest = whole, obtain(remote, whole, options.overwrite)
    return raw, {"version": version, "file": remote.name, "sha256": digest}


def prepare_questions(entry: Published, options: PrepareOptions) -> None:
    """Write the rows of a published file in the form of published_rows()."""
    path, limit = entry.path(options.output_dir, options.models_dir), limit_of(entry, options)
    check_paths([path], [])
    output = None if options.overwrite else Output(arguments_of(entry, options), [str(path)], [])
    if output and output.finished:
        return
    raw, resolved = raw_rows(entry, options)
    output = output or Output(arguments_of(entry, options), [str(path)], [])  # only now, because --overwrite removes what is there
    output.record(**resolved)
    counts = dict.fromkeys(("rows", "with_documents", "without_answers", "without_dataset"), 0)

    def counted() -> Iterator[Row]:
        from tqdm import tqdm

        rows = islice(published_rows(raw, entry.name, entry.dataset, output.reject), limit)
        for row in tqdm(rows, desc=entry.name, unit="row", total=limit or entry.rows):
            counts["rows"] += 1
            counts["with_documents"] += bool(row.get("docs"))
            counts["without_answers"] += not row.get("answers")
            counts["without_dataset"] += not row.get("dataset")
            yield row

    if not output.publish(str(path), counted()):
        raise UserError(f"{raw}: contains no usable row; {output.rejected_path} says why")
    if entry.rows and not limit and counts["rows"] != entry.rows:
        log.warning("%s: has %d rows, and %d were published before; the set has changed", path, counts["rows"], entry.rows)
    output.finish({"licence": entry.licence}, **counts)


def prepare_files(entry: Published, options: PrepareOptions) -> None:
    """Get a corpus (one file), embeddings (a folder of shards) or a model (a folder)."""
    path, limit = entry.path(options.output_dir, options.models_dir), limit_of(entry, options)
    started, made = time.monotonic(), identity(arguments_of(entry, options), [str(path)], [])
    manifest = read_manifest(path)
    if manifest and path.exists() and not options.overwrite:
        refuse_other_run(manifest, made, path)
        log.info("%s is already complete; nothing to do (--overwrite makes it again)", path)
        return
    check_paths([manifest_path(path)], [])
    version, remotes = remote_files(entry, options.revision or entry.revision)
    first, packed = remotes[0], is_packed(entry, remotes[0])
    if path.exists() and not options.overwrite and (packed or limit):
        raise UserError(f"{path}: exists, but is not the finished output of this stage; move it away or give --overwrite")
    manifest_path(path).unlink(missing_ok=True)
    if entry.kind == "model":
        check_space(path, sum((remote.size or 0) - arrived(path / remote.name) for remote in remotes), entry.name)
        digests = {remote.name: obtain(remote, download_path(entry, remote, options), options.overwrite) for remote in remotes}
        _check_weights(entry, path)
    elif packed:
        archive = download_path(entry, first, options)
        digests = {first.name: obtain(first, archive, options.overwrite)}
        if entry.kind == "corpus":
            unpack_corpus(archive, path, limit)
        else:
            shutil.rmtree(path, ignore_errors=True)
            unpack_shards(archive, path)
    elif limit:
        first_lines(first, limit + (".tsv" in first.name), path)  # a table has a header
        digests = {first.name: OF_A_PART}
    else:
        digests = {first.name: obtain(first, path, options.overwrite)}
    manifest = {
        **made, "outputs": [str(path)], "resolved": {"version": version}, "counts": {"files": len(digests)}, "sha256": digests,
        "summary": {"licence": entry.licence}, "seconds": round(time.monotonic() - started, 1), "versions": versions(),
    }
    with atomic_writer(manifest_path(path)) as file:
        file.write(orjson.dumps(manifest, option=orjson.OPT_INDENT_2))
    log.info("%s: %d files, %s", path, len(digests), size_of(sum(remote.size or 0 for remote in remotes)))


def _check_weights(entry: Published, folder: Path) -> None:
    """Raise UserError if an index of a model names a file that is not there: the hub's cache may have a part of a model."""
    for index in sorted(folder.glob("*.index.json")):
        try:
            weights = orjson.loads(index.read_bytes())["weight_map"].values()
        except (orjson.JSONDecodeError, LookupError, TypeError, AttributeError) as error:
            raise UserError(f"{index}: is no index of weights ({error}); give another --revision") from error
        missing = next((name for name in weights if not (folder / str(name)).is_file()), None)
        if missing:
            raise UserError(f"{folder}: {entry.place} has no {missing}, which {index.name} names; check the network and HF_HUB_OFFLINE")
