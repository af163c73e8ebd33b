"""Command-line flags, logging, error handling and seeds shared by every stage."""

import argparse
import errno
import hashlib
import logging
import random
import re
import signal
import sys
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import fields
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Options = TypeVar("Options", bound="DataclassInstance")
log = logging.getLogger("dynamicrag")


class UserError(Exception):
    """An error that the user can fix. The message gives the place, the problem and the remedy; no stack trace is shown."""


# ---------------------------------------------------------------- flags

FLAG = re.compile(r"(?<![\w-])--[a-z][\w-]*")


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keep the line breaks of the stage's docstring.

    Append the default to each help text unless the text states it or it is None.
    """

    def _get_help_string(self, action):
        if action.default is None or "(default" in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


# Flags of earlier versions, which are still accepted -> their names now. Both with underscores.
RENAMED_FLAGS = {"max_pairs_a_question": "max_pairs_per_question", "questions_a_pass": "questions_per_pass"}


class ArgumentParser(argparse.ArgumentParser):
    """Accept flags in full only, with dashes or underscores: --input-file is the same as --input_file.

    Help and usage show all flags with dashes, those in the stage's docstring too.
    """

    def __init__(self, description: str | None):
        super().__init__(description=description, formatter_class=_HelpFormatter, allow_abbrev=False)

    def format_help(self) -> str:
        return FLAG.sub(lambda flag: flag[0].replace("_", "-"), super().format_help())

    def format_usage(self) -> str:
        return FLAG.sub(lambda flag: flag[0].replace("_", "-"), super().format_usage())

    def parse_known_args(self, args: Iterable[str] | None = None, namespace: Any = None) -> tuple[Any, list[str]]:
        spelling = {flag.replace("-", "_"): flag for flag in self._option_string_actions}
        given = []
        for word in sys.argv[1:] if args is None else args:
            flag, equals, value = word.partition("=")
            if flag.startswith("--"):
                name = flag.removeprefix("--").replace("-", "_")
                word = spelling.get(f"__{RENAMED_FLAGS.get(name, name)}", flag) + equals + value
            given.append(word)
        return super().parse_known_args(given, namespace)


def add_seed_flag(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Add --seed, the flag shared by every stage."""
    group = parser.add_argument_group("run")
    group.add_argument("--seed", type=int, default=42, help="seed of every random choice")
    return group


def add_common_flags(parser: argparse.ArgumentParser) -> None:
    """Flags shared by every stage that writes rows. Scoring scripts always rewrite their output and never skip a row."""
    group = add_seed_flag(parser)
    group.add_argument("--overwrite", action="store_true", help="discard an existing output or partial output")
    group.add_argument(
        "--on_error", choices=["fail", "skip"], default="fail",
        help="what to do with a malformed row: end the run, or set it aside in <output>.rejected.jsonl and count it",
    )


def options_from(args: argparse.Namespace, kind: type[Options]) -> Options:
    """Return a dataclass of the given kind, with each field taken from the flag of the same name."""
    return kind(**{field.name: getattr(args, field.name) for field in fields(kind)})


class _Terminated(KeyboardInterrupt):
    """SIGTERM, which a cluster sends before it reclaims the machine. It is handled like Ctrl-C."""


# Errors of the disk or its permissions, which the user can fix.
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}


MAX_SAID = 1000  # maximum length of an error message in characters


def run(main) -> None:
    """Call a stage's main(). Logs go to stderr, above any progress bar.

    A UserError, a full disk or a missing permission ends the process with one line and exit status 2. An interrupt
    gives status 130, SIGTERM 143.
    """

    from tqdm.contrib.logging import logging_redirect_tqdm

    def terminated(*_: object) -> None:
        raise _Terminated

    signal.signal(signal.SIGTERM, terminated)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    log.setLevel(logging.INFO)
    try:
        with logging_redirect_tqdm():
            main()
    except UserError as error:
        sys.exit(_fail(f"error: {error}", 2))
    except KeyboardInterrupt as interrupt:
        status = 143 if isinstance(interrupt, _Terminated) else 130
        sys.exit(_fail("interrupted; finished rows are kept, run the same command again to continue", status))
    except BrokenPipeError:
        sys.exit(1)
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        sys.exit(_fail(f"error: {error.filename or 'a file'}: {error.strerror or error}; finished rows are "
                       "kept: fix the problem, then run the same command again", 2))


def _fail(message: str, status: int) -> int:
    """Print the message to stderr as one line of limited length, with unprintable characters escaped. Return `status`."""
    from tqdm import tqdm

    line = " ".join(message.split())
    if len(line) > MAX_SAID:
        line = f"{line[: MAX_SAID * 3 // 4]} ... {line[-MAX_SAID // 4 :]}"
    # A plain print would continue the line of a progress bar that the error left open.
    tqdm.write("".join(character if character.isprintable() else ascii(character)[1:-1] for character in line), file=sys.stderr)
    return status


# ---------------------------------------------------------------- seeds


def derive_seed(seed: int, *parts: object) -> int:
    """Return a 31-bit seed for one purpose, derived from the run's seed and the parts that identify the purpose (such as a row id).

    Random choices made with it do not depend on batching, on the order of the rows or on sharding.
    """
    text = "\x1f".join(map(str, (seed, *parts)))
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=4).digest(), "big") >> 1


def shuffled(count: int, rng: random.Random) -> Iterator[int]:
    """Yield the numbers below `count` in random order: that of rng.sample(range(count), count), in 4 bytes per number."""
    numbers = array("I", range(count))
    for left in range(count, 0, -1):
        place = rng.randrange(left)
        yield numbers[place]
        numbers[place] = numbers[left - 1]
