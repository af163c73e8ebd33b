"""The account on a model hub: whether the hub can be reached, uploads, and their errors in one line each."""

import fnmatch
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from dynamicrag.files.hub import explained
from dynamicrag.stage import UserError

SECONDS = 5  # of the one request that asks whether the hub answers


def why_unreachable() -> str | None:
    """Return why the hub cannot be reached, or None. One quick request; the hub's client would retry for 20 s."""
    from urllib.error import HTTPError
    from urllib.request import Request, urlopen

    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "the hub is disabled (HF_HUB_OFFLINE)"
    try:
        urlopen(Request(constants.ENDPOINT, method="HEAD"), timeout=SECONDS).close()
    except HTTPError:
        return None  # the hub answers
    except (OSError, ValueError) as error:
        return f"{constants.ENDPOINT} cannot be reached ({error})"
    return None


@contextmanager
def hub_errors(place: str) -> Iterator[None]:
    """Turn an error of the hub or of its client into a UserError that begins with `place`: what explained() says, and what
    concerns the account.
    """
    from huggingface_hub import constants, errors

    with explained(place):
        try:
            yield
        except errors.OfflineModeIsEnabled as error:
            raise UserError(f"{place}: the hub is disabled; set HF_HUB_OFFLINE=0") from error
        except errors.LocalTokenNotFoundError as error:
            raise UserError(f"{place}: no token of the hub; set HF_TOKEN, or log in with: hf auth login") from error
        except errors.LocalEntryNotFoundError as error:
            raise UserError(f"{place}: {_line(error)}; check that the hub can be reached, then run the same command again") from error
        except errors.HfHubHTTPError as error:
            if isinstance(error, errors.RepositoryNotFoundError) or (status := error.response.status_code) not in (401, 403):
                raise
            what = "the hub does not know the token" if status == 401 else "the token has no right to this"
            raise UserError(f"{place}: {what}; set HF_TOKEN to a token that may write there, from {constants.ENDPOINT}/settings/tokens") from error


def check_account(repo: str) -> None:
    """Raise UserError if `repo` is not OWNER/NAME, or the hub does not know the user, before any work for an upload."""
    from huggingface_hub import whoami
    from huggingface_hub.utils import validate_repo_id

    with hub_errors(repo):
        validate_repo_id(repo)
        user = whoami()["name"]
    if "/" not in repo:  # the hub would make it, but not find it
        raise UserError(f"{repo}: names no owner; give --repo OWNER/NAME, such as {user}/{repo}")


def upload(repo: str, private: bool, files: Mapping[str, Path], ours: Iterable[str]) -> str:
    """Upload exactly these files, by name, to a model repository in one commit. Returns the commit's URL.

    The repository is made if it does not exist. The commit removes files of the repository that match the patterns `ours`
    and are not among `files`: those of an earlier upload. Raises UserError for every refusal of the hub, and if `private`
    is asked of a public repository.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi()
    try:
        with hub_errors(repo):
            api.create_repo(repo, private=private or None, exist_ok=True)
            info = api.model_info(repo)
            if private and not info.private:
                raise UserError(f"{repo}: is public, and --private was given; make it private on the hub, or give another --repo")
            there = [file.rfilename for file in info.siblings or ()]
            stale = [name for name in there if name not in files and any(_matches(name, pattern) for pattern in ours)]
            added = [CommitOperationAdd(name, str(path)) for name, path in files.items()]
            return api.create_commit(repo, [*added, *map(CommitOperationDelete, stale)], commit_message="Publish a DynamicRAG model").commit_url
    except (RuntimeError, ValueError) as error:  # of the storage; of metadata that the hub does not accept
        raise UserError(f"{repo}: the upload failed ({_line(error)}); run the same command again: files that arrived are not "
                        "sent again") from error


def _matches(name: str, pattern: str) -> bool:
    """Return whether a name matches a pattern in the same folder."""
    return Path(name).parent == Path(pattern).parent and fnmatch.fnmatchcase(name, pattern)


def _line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
