"""What every stage does besides its algorithm and its files: flags, logging, errors, seeds."""

import argparse
import errno
import hashlib
import logging
import signal
import sys

log = logging.getLogger("dynamicrag")


class UserError(Exception):
    """Something the user can mend. The message says what was wrong, where, and what to do; no stack trace is shown."""


# ---------------------------------------------------------------- flags


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of a stage's docstring and shows every default, unless the help says it in words or there is none."""

    def _get_help_string(self, action):
        if action.default is None or "(default" in action.help:
            return action.help
        return super()._get_help_string(action)


class ArgumentParser(argparse.ArgumentParser):
    """Flags in full only, and dashes and underscores in their names mean the same: --input-file is --input_file."""

    def __init__(self, description: str):
        super().__init__(description=description, formatter_class=_HelpFormatter, allow_abbrev=False)

    def parse_known_args(self, args=None, namespace=None):
        spelling = {flag.replace("_", "-"): flag for flag in self._option_string_actions}
        given = []
        for word in sys.argv[1:] if args is None else args:
            flag, equals, value = word.partition("=")
            if flag.startswith("--"):
                word = spelling.get(flag.replace("_", "-"), flag) + equals + value
            given.append(word)
        return super().parse_known_args(given, namespace)


def add_seed_flag(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """The flag every stage has."""
    group = parser.add_argument_group("run")
    group.add_argument("--seed", type=int, default=42, help="seed of every random choice")
    return group


def add_common_flags(parser: argparse.ArgumentParser) -> None:
    """The flags every stage has that writes rows. What only scores them writes anew each time, and leaves none out."""
    group = add_seed_flag(parser)
    group.add_argument("--overwrite", action="store_true", help="discard an existing output or partial output")
    group.add_argument(
        "--on_error", choices=["fail", "skip"], default="fail",
        help="a malformed row ends the run, or is set aside in <output>.rejected.jsonl and counted",
    )


class _Terminated(KeyboardInterrupt):
    """SIGTERM, as a cluster sends it before it takes the machine away; handled like Ctrl-C."""


# What an OSError of these says is the disk's, and for the user to mend.
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}


MOST_SAID = 1000  # characters of an error


def run(main) -> None:
    """Call a stage's main(), with logs to stderr, each line above a progress bar and never on it.

    A UserError and a disk that is full or may not be written are one line and exit status 2; an interrupt is status 130,
    SIGTERM 143.
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
        sys.exit(_fail(f"error: {error.filename or 'a file'}: {error.strerror or error}; finished rows are kept: mend this, then run "
                       "the same command again", 2))


def _fail(message: str, status: int) -> int:
    """Say it on one line of bounded length: what it quotes may be long, and hold what a terminal would obey."""
    from tqdm import tqdm

    line = " ".join(message.split())
    if len(line) > MOST_SAID:
        line = f"{line[: MOST_SAID * 3 // 4]} ... {line[-MOST_SAID // 4 :]}"
    # A bar that the error has left open would share the line of a plain print.
    tqdm.write("".join(character if character.isprintable() else ascii(character)[1:-1] for character in line), file=sys.stderr)
    return status


# ---------------------------------------------------------------- seeds


def derive_seed(seed: int, *parts: object) -> int:
    """A 31-bit seed for one purpose, from the run's seed and what the purpose is about (a row's id, say).

    Random choices made with it depend neither on batching, nor on order, nor on how the rows are sharded.
    """
    text = "\x1f".join(map(str, (seed, *parts)))
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=4).digest(), "big") >> 1
