"""Retrieved documents to share, so that nobody has to search a corpus of 60 GB to repeat a result.

A shared run is a folder named like the run, in a folder or in a data set repository of a model hub:

    rows.jsonl.gz      the questions with their documents, texts included
    run.trec           the same documents as a TREC run, for retriever.py --run and other systems
    shared_run.json    corpus, encoder, k, number of questions, and the SHA-256 of both files
"""

import gzip
import itertools
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson

from dynamicrag.files.atomic import atomic_writer
from dynamicrag.files.downloads import digest_of, obtain
from dynamicrag.files.hub import hub_files
from dynamicrag.files.jsonio import dump_line
from dynamicrag.rows.manifest import read_manifest
from dynamicrag.rows.output import Output
from dynamicrag.rows.output_checks import check_paths
from dynamicrag.rows.preparation import PrepareOptions
from dynamicrag.rows.records import read_rows
from dynamicrag.rows.row import STAGE_KEYS
from dynamicrag.rows.trec import Run, write_run
from dynamicrag.stage import UserError

ROWS, RUN, DESCRIPTION = "rows.jsonl.gz", "run.trec", "shared_run.json"
NEEDS = STAGE_KEYS["prepare_data"].reads_with["--export_run"]
SAID = ("corpus", "encoder", "k", "questions", "files")


def export_run(rows: str, name: str, folder: str | Path, corpus: str | None, encoder: str | None) -> Path:
    """Write the retrieved rows of a file as the shared run `name` in `folder`. Returns the new folder.

    Corpus and encoder come from the manifest of the search unless they are given. Raises UserError if they are not known, for rows
    without documents or scores, and if there is such a run already.
    """
    check_name(name)
    target = Path(folder) / name
    if (target / DESCRIPTION).exists():
        raise UserError(f"{target}: is a shared run already; give another --run_name or --output_dir")
    searched = _search_of(rows)
    said = {
        "corpus": corpus or _public(searched.get("passages")), "encoder": encoder or _public(searched.get("model_name_or_path")),
        "index": searched.get("index"), "fused_with_runs": len(searched.get("run") or ()),
    }
    for key in ("corpus", "encoder"):
        if not said[key]:
            raise UserError(f"--{key}: the manifest of {rows} does not say it; give its name")
    target.mkdir(parents=True, exist_ok=True)
    write_run(target / RUN, read_rows(rows, NEEDS), "score", name)
    questions = most = 0
    with atomic_writer(target / ROWS) as file, gzip.GzipFile(filename="", fileobj=file, mode="wb", mtime=0) as packed:
        for row in read_rows(rows, NEEDS):
            packed.write(dump_line(row))
            questions, most = questions + 1, max(most, len(row["docs"]))
    files = {path: digest_of(target / path) for path in (ROWS, RUN)}
    with atomic_writer(target / DESCRIPTION) as file:
        file.write(orjson.dumps({"name": name, **said, "k": most, "questions": questions, "files": files}, option=orjson.OPT_INDENT_2))
    return target


def import_run(place: str, name: str, options: PrepareOptions) -> None:
    """Write the rows and the TREC run of a shared run to `options.output_dir`. `place` is a folder of shared runs, or a data set repository.

    Raises UserError if a file is missing, or is not the one that was exported.
    """
    check_name(name)
    path = Path(options.output_dir) / f"{name}.jsonl"
    arguments = {
        "place": place, "name": name, "revision": options.revision, "seed": options.seed, "on_error": options.on_error, "overwrite": options.overwrite,
    }
    outputs = [str(path), str(path.with_suffix(".trec"))]
    check_paths([path], [])
    output = None if options.overwrite else Output(arguments, outputs, [])
    if output and output.finished:
        return
    folder, version = Path(place) / name, "a folder"
    if not Path(place).is_dir():
        folder = Path(options.output_dir) / "downloads" / name
        version, remotes = hub_files(place, "dataset", options.revision or "main", [f"{name}/{file}" for file in (ROWS, RUN, DESCRIPTION)])
        for remote in remotes:
            obtain(remote, folder / Path(remote.name).name, overwrite=True)
    said = check_run(folder)
    output = output or Output(arguments, outputs, [])  # only now, because --overwrite removes what is there
    output.record(version=version, **{key: str(said[key]) for key in ("corpus", "encoder", "k")})
    rows = output.publish(path, read_rows(folder / ROWS, NEEDS))
    with atomic_writer(path.with_suffix(".trec")) as file:
        file.write((folder / RUN).read_bytes())
    output.finish({"shared_run": said}, rows=rows)
    if version != "a folder" and not options.keep_downloads:
        shutil.rmtree(folder)


def read_description(path: Path) -> dict[str, Any]:
    """Return what shared_run.json says. Raises UserError if it does not say all."""
    try:
        said = orjson.loads(path.read_bytes())
    except (OSError, orjson.JSONDecodeError) as error:
        raise UserError(f"{path}: cannot be read as the description of a shared run ({error}); export the run again") from error
    missing = [key for key in SAID if not isinstance(said, dict) or said.get(key) is None]
    if missing or not isinstance(said["files"], dict) or not {ROWS, RUN} <= said["files"].keys():
        raise UserError(f"{path}: key '{(missing or ['files'])[0]}': missing; export the run again")
    return said


def check_run(folder: Path) -> dict[str, Any]:
    """Return the description of a shared run whose files are those that were exported, and agree. Raises UserError, naming the file."""
    said = read_description(folder / DESCRIPTION)
    for name in (ROWS, RUN):
        if not (folder / name).is_file():
            raise UserError(f"{folder / name}: is missing; a shared run needs {ROWS}, {RUN} and {DESCRIPTION}")
        if (digest := digest_of(folder / name)) != said["files"][name]:
            raise UserError(f"{folder / name}: has the SHA-256 {digest}, not {said['files'][name]}; fetch it again")
    run = Run(folder / RUN)
    for row in read_rows(folder / ROWS, NEEDS):
        ranked = [doc_id for doc_id, _ in run.ranking(row["id"])]
        if sorted(ranked) != sorted(doc["id"] for doc in row["docs"]):
            raise UserError(f"{folder / RUN}: query {row['id']!r}: has other documents than {ROWS}; export the run again")
    return said


def check_name(name: str) -> None:
    """Raise UserError for a name that cannot be a folder and the tag of a TREC run."""
    if not re.fullmatch(r"\w[\w.+-]*", name):
        raise UserError(f"--run_name {name!r}: expected letters, digits and ._+- alone")


def _search_of(rows: str) -> Mapping[str, Any]:
    """Return the arguments of the search that wrote a file, or the parts that it was put together from; none if nobody knows."""
    for path in itertools.chain([rows], (read_manifest(rows) or {"inputs": {}})["inputs"]):
        arguments = (read_manifest(path) or {}).get("arguments", {})
        if "passages" in arguments:
            return arguments
    return {}


def _public(name: object) -> str | None:
    """Return a hub name or a file's name, without the folders of this machine."""
    if not isinstance(name, str):
        return None
    return Path(name).name if Path(name).is_absolute() or Path(name).exists() else name
