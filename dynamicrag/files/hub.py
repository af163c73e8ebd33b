"""Files of a model hub, or at a plain address: which there are, where each is, and how large.

huggingface_hub reads the variables HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE and HF_HUB_CACHE, finds files in its cache, and says
what the hub refuses.
"""

import contextlib
import fnmatch
import posixpath
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from dynamicrag.stage import UserError, log

SECONDS = 30  # without a byte, after which a connection counts as broken
TRY_AGAIN = {408, 429, 500, 502, 503, 504}  # answers of a server that a later request may not get
MAX_LISTED = 12  # file names in a message


@dataclass(frozen=True)
class Remote:
    """One file. `version` is what changes with its content: the commit of its repository, or an address's ETag."""

    name: str
    place: str
    url: str
    version: str
    size: int | None = None
    sha256: str | None = None
    local: Path | None = None  # where the cache of the hub has it
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)  # the token is among them


@contextlib.contextmanager
def explained(place: str) -> Iterator[None]:
    """Turn what huggingface_hub raises for a repository or a URL into a UserError of one line."""
    import httpx2
    from huggingface_hub import constants, errors, get_token

    page = f"{constants.ENDPOINT}/{place}"
    try:
        yield
    except errors.GatedRepoError as error:
        token = "the token has no access yet" if get_token() else "no token was sent"
        raise UserError(f"{place}: is gated, and {token}; accept its terms on {page} and set HF_TOKEN to a token of that account") from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"{place}: this revision does not exist; give another --revision, such as main") from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(f"{place}: there is no such repository, or it is private; see {page}, and set HF_TOKEN if it is yours") from error
    except errors.RemoteEntryNotFoundError as error:
        raise UserError(f"{place}: the file is not there; see {page}") from error
    except errors.OfflineModeIsEnabled as error:
        raise UserError(f"{place}: is not in the cache of the hub, and HF_HUB_OFFLINE=1 forbids a download; unset it") from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        advice = "run the same command again later" if status in TRY_AGAIN else "see whether the file has moved"
        raise UserError(f"{place}: the server answers {status}; {advice}") from error
    except errors.HFValidationError as error:
        raise UserError(f"{place}: is neither a folder nor the name of a repository, such as owner/name") from error
    except httpx2.TransportError as error:
        reason = str(error).strip() or type(error).__name__
        raise UserError(f"{place}: cannot be reached ({reason}); check the network, HF_ENDPOINT and the proxy, and run the same command again") from error


def no_network(error: BaseException) -> bool:
    """Return whether explained() raised an error because nothing could be reached."""
    import httpx2

    return isinstance(error.__cause__, httpx2.TransportError)


def hub_files(repo: str, repo_type: str, revision: str, patterns: Sequence[str]) -> tuple[str, list[Remote]]:
    """Return the commit and the files of a repository that match one of the patterns, by their path or their name.

    Without a network, or with HF_HUB_OFFLINE=1, these are the files in the hub's cache. Raises UserError, naming the repository,
    if it cannot be read or no file matches.
    """
    import httpx2
    from huggingface_hub import HfApi, errors, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.utils import build_hf_headers

    with explained(repo):
        try:
            describe = HfApi().dataset_info if repo_type == "dataset" else HfApi().model_info
            info = describe(repo, revision=revision, files_metadata=True, timeout=SECONDS)
        except (httpx2.TransportError, errors.OfflineModeIsEnabled):
            commit, cached = _cached(repo, repo_type, revision)
            if not (found := [name for name in cached if _matches(name, patterns)]):
                raise
            log.info("%s: taken from the cache of the hub, at %s", repo, commit)
            return commit, [Remote(name, repo, "", commit, cached[name].stat().st_size, local=cached[name]) for name in found]
    commit, headers, remotes = info.sha or revision, build_hf_headers(), []
    for file in info.siblings or ():
        if _matches(file.rfilename, patterns):
            path = try_to_load_from_cache(repo, file.rfilename, revision=commit, repo_type=repo_type)
            remotes.append(Remote(
                file.rfilename, repo, hf_hub_url(repo, file.rfilename, repo_type=repo_type, revision=commit), commit, file.size,
                file.lfs.sha256 if file.lfs else None, Path(path) if isinstance(path, str) else None, headers,
            ))
    if not remotes:
        names = sorted(file.rfilename for file in info.siblings or ())
        there = ", ".join(names[:MAX_LISTED]) + (f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else "")
        raise UserError(f"{repo}: has no file {' or '.join(patterns)} at {commit}; it has {there or 'none'}; try another --revision")
    return commit, remotes


def _cached(repo: str, repo_type: str, revision: str) -> tuple[str, dict[str, Path]]:
    """Return the commit and the files by name that the hub's cache has of a revision."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type=repo_type)
    reference = folder / "refs" / revision
    commit = reference.read_text().strip() if reference.is_file() else revision
    snapshot = folder / "snapshots" / commit
    return commit, {path.relative_to(snapshot).as_posix(): path for path in sorted(snapshot.rglob("*")) if path.is_file()}


def _matches(name: str, patterns: Sequence[str]) -> bool:
    """Return whether a pattern fits the path or the name of a file that lies within its repository."""
    safe = not posixpath.isabs(name) and ".." not in PurePosixPath(name).parts
    return safe and any(fnmatch.fnmatchcase(part, pattern) for part in (name, posixpath.basename(name)) for pattern in patterns)


def check_access(remote: Remote) -> None:
    """Ask for the file without its content. Raises UserError if the hub refuses it, as it does the files of a gated repository."""
    from huggingface_hub import get_hf_file_metadata

    if remote.headers:  # not at a plain address, whose server is not to see the token
        with explained(remote.place):
            get_hf_file_metadata(remote.url, headers=dict(remote.headers), timeout=SECONDS)


def url_file(url: str, sha256: str | None) -> Remote:
    """Return the file at a plain address. Raises UserError if it cannot be reached."""
    from huggingface_hub import get_session
    from huggingface_hub.utils import hf_raise_for_status

    with explained(url):
        response = get_session().head(url, headers={"Accept-Encoding": "identity"}, timeout=SECONDS)
        hf_raise_for_status(response)
    size = response.headers.get("Content-Length", "")
    version = response.headers.get("ETag") or response.headers.get("Last-Modified") or ""
    return Remote(posixpath.basename(url), url, url, version, int(size) if size.isdigit() else None, sha256)
