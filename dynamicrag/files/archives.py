"""Unpack what others publish as an archive: one corpus from a zip file, shards of embeddings from a tar file."""

import contextlib
import gzip
import itertools
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from dynamicrag.files.atomic import atomic_writer
from dynamicrag.files.downloads import check_space, full_disk
from dynamicrag.stage import UserError

BLOCK = 1 << 24
CORPUS = (".jsonl", ".json", ".tsv")


@contextlib.contextmanager
def _reading(archive: Path) -> Iterator[None]:
    try:
        yield
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, gzip.BadGzipFile, EOFError, NotImplementedError) as error:
        raise UserError(f"{archive}: a broken archive ({error}); remove it and run the same command again") from error


def unpack_corpus(archive: Path, path: Path, limit: int | None) -> None:
    """Write the one corpus file that a zip archive holds to `path`; with `limit`, its first lines.

    Raises UserError for a broken archive, and for one with no such file or several.
    """
    with _reading(archive), zipfile.ZipFile(archive) as packed:
        members = [member for member in packed.infolist() if member.filename.endswith(CORPUS) and not PurePosixPath(member.filename).name.startswith(".")]
        if len(members) != 1:
            raise UserError(f"{archive}: holds {len(members)} files of {', '.join(CORPUS)}; expected 1")
        check_space(path.parent, members[0].file_size if limit is None else 0, str(path))
        with packed.open(members[0]) as source, full_disk(path), atomic_writer(path) as file:
            if limit is None:
                shutil.copyfileobj(source, file, BLOCK)
            else:
                file.writelines(itertools.islice(source, limit))


def unpack_shards(archive: Path, folder: Path) -> int:
    """Write the regular files of a tar archive to a new folder, without the folders in the archive. Returns their number.

    The folder exists completely or not at all. Raises UserError for a broken archive, and for two files of one name.
    """
    building = folder.with_name(f"{folder.name}.building")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    with _reading(archive), tarfile.open(archive) as packed:
        for member in packed:
            name = PurePosixPath(member.name).name
            if not member.isfile() or name.startswith("."):
                continue
            target, source = building / name, packed.extractfile(member)
            if target.exists() or source is None:
                raise UserError(f"{archive}: holds two files {name}; expected shards of different names")
            check_space(building, member.size, str(target))
            with source, full_disk(target), target.open("wb") as file:
                shutil.copyfileobj(source, file, BLOCK)
    shards = len(list(building.iterdir()))
    if not shards:
        raise UserError(f"{archive}: holds no file; expected shards of embeddings")
    building.replace(folder)
    return shards
