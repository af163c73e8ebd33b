"""The table of published data sets, corpora, embeddings and models, and where each goes. The entries are in published.yaml."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit

TABLE = Path(__file__).with_suffix(".yaml")
KINDS = ("questions", "corpus", "embeddings", "model")


@dataclass(frozen=True)
class Published:
    """One entry. published.yaml explains the keys."""

    name: str
    group: str
    kind: str
    licence: str
    stage: str
    source_of: str
    unverified: str
    repo: str | None = None
    repo_type: str = "model"
    url: str | None = None
    revision: str = "main"
    files: tuple[str, ...] = ()
    output: str | None = None
    dataset: str | None = None
    rows: int | None = None
    bytes: int | None = None
    about_bytes: int | None = None
    sha256: str | None = None

    @property
    def place(self) -> str:
        """The repository or the URL, for messages."""
        return self.repo or self.url or self.name

    @property
    def server(self) -> str:
        """What must be reached for it: the host of its URL, or "" for the hub."""
        return urlsplit(self.url).netloc if self.url else ""

    def path(self, output_dir: str | Path, models_dir: str | Path) -> Path:
        """Return the file or folder that it becomes."""
        if self.kind == "model":
            return Path(models_dir) / (self.repo or self.name).split("/")[-1]
        return Path(output_dir) / (self.output or f"{self.name}.jsonl")


@cache
def published() -> dict[str, Published]:
    """Return every entry by name, in the order of the table."""
    import yaml

    table = yaml.safe_load(TABLE.read_text(encoding="utf-8"))
    known = {field.name for field in fields(Published)}
    entries = {}
    for name, own in table["sets"].items():
        keys = {**table["sources"].get(own.get("from"), {}), **own}
        keys.pop("from", None)
        assert keys.keys() <= known and keys["kind"] in KINDS and ("repo" in keys) != ("url" in keys), f"{TABLE}: {name}"
        entries[name] = Published(name=name, **{**keys, "files": tuple(keys.get("files", ()))})
    return entries


def chosen(names: Sequence[str]) -> list[Published]:
    """Return the entries of these names, in the order of the table. A name may also be that of a group, or `all`.

    Raises KeyError with the first unknown name.
    """
    entries = published().values()
    for name in names:
        if name != "all" and not any(name in (entry.name, entry.group) for entry in entries):
            raise KeyError(name)
    return [entry for entry in entries if {"all", entry.name, entry.group} & {*names}]


def similar(name: str) -> list[str]:
    """Return the names of sets that somebody who writes `name` may mean: `nq` is dynamicrag_nq or flashrag_nq."""
    known = {other.lower(): other for other in published()}
    ends = [other for other in known if f"_{other}".endswith(f"_{name.lower()}")]
    return [known[other] for other in ends or difflib.get_close_matches(name.lower(), known, n=1)]
