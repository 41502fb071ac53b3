"""The command-line interface. Mistakes by the user end with one line and exit code 2."""

from __future__ import annotations

import argparse
import difflib
import errno
import os
import re
import sys
from typing import NoReturn

from moon_jax import commands, interrupt, storage
from moon_jax.errors import Unavailable, UserError, printable

DESCRIPTION = """\
MOON2.0 in JAX: one model embeds a product from its text, its image or both into one space.

examples:
  moon-jax quickstart                                              the whole method on a rendered catalogue
  moon-jax quickstart --data catalogue/ --workdir runs/first       on your own
  moon-jax prepare --data catalogue/ --output prepared             turn any catalogue or click log into records
  moon-jax augment --data prepared --output augmented              enriched titles and expanded images beside them
  moon-jax train --config moon2_qwen3vl_2b --init hf://Qwen/Qwen3-VL-2B-Instruct --data catalogue/ --workdir runs/2b
  moon-jax export --model runs/2b --output served --verify
  moon-jax evaluate --model runs/2b --data prepared --output scores   and compare it with others
  moon-jax embed --model runs/2b --data prepared --output vectors
  moon-jax search --index vectors --model runs/2b --text 'red shoe'
  moon-jax plan --config moon2_qwen3vl_2b --topology v5p:4x4x4     what a step costs there, before renting it
  moon-jax train --help
"""

RENAMED = {"--known": "--probe-products", "--shares": "--contributions"}
"""Former names of flags."""


class Parser(argparse.ArgumentParser):
    """Reports mistakes as a UserError, in one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; {self.prog} --help has examples")


def parse(arguments: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """The parsed command and flags, and the overrides `--config.a.b=value`.

    Raises:
        UserError: unknown arguments; the message names the closest flag.
    """
    layout = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = Parser("moon-jax", description=DESCRIPTION, **layout)
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in commands.NAMES:
        command = commands.load(name)
        command.add_arguments(subparsers.add_parser(name, help=command.HELP, description=command.DESCRIPTION, **layout))
    parsed, rest = parser.parse_known_args(arguments)
    flags = re.findall(r"(?<![\w-])--?[\w-]+", subparsers.choices[parsed.command].format_usage())
    for argument in rest:
        if not argument.startswith("--config.") or "=" not in argument:
            given = argument.partition("=")[0]
            if given in RENAMED:
                raise UserError(f"{given}: this flag is now called {RENAMED[given]}")
            raise UserError(f"{argument}: not understood; {_hint(given, flags, subparsers.choices)}")
    return parsed, rest


def _hint(given: str, flags: list[str], choices: dict[str, argparse.ArgumentParser]) -> str:
    """What to write instead of a flag that the command does not have."""
    close = difflib.get_close_matches(given, flags, n=1)
    others = [name for name, one in choices.items() if given in re.findall(r"--[\w-]+", one.format_usage())]
    if given.startswith("--") and others:
        return f"moon-jax {others[0]} has this flag"
    if close:
        return f"the closest flag is {close[0]}"
    return "options of the config are written --config.a.b=value"


def main(arguments: list[str] | None = None) -> int:
    """Runs a command.

    Returns:
        0, also after a stop by SIGTERM (unless STOP_CODE is set); USER_ERROR after a mistake by the user or an error
        of the system (disk, permissions); AGAIN if another process, a disk or a bucket did not respond; 130 after
        Ctrl-C.
    """
    with interrupt.remembered():
        return _main(arguments)


def _main(arguments: list[str] | None) -> int:
    try:
        parsed, overrides = parse(arguments)
        commands.load(parsed.command).run(parsed, overrides)
    except UserError as error:
        return _fail(str(error), AGAIN if isinstance(error, Unavailable) else USER_ERROR, error.shared)
    except OSError as error:
        if error.errno not in REMEDIES:
            raise
        return _fail(_refused(error, parsed), USER_ERROR)
    except RuntimeError as error:
        # In a multi-process run, losing another process shows up as an XLA error.
        if not interrupt.RELAY.is_set() or type(error).__name__ != "JaxRuntimeError" or not LOST.search(str(error)):
            raise
        why = str(error).splitlines()[0][:200]
        message = f"another process was lost ({why}); restart all processes: the run resumes from its newest checkpoint"
        return _fail(message, AGAIN)
    except KeyboardInterrupt:
        again = f"the same command {commands.load(parsed.command).AFTER_STOP}"
        if interrupt.TERMINATED.is_set():
            return _fail(f"stopped by SIGTERM; {again}", _stop_code(), shared=True)
        return _fail(f"interrupted; {again}", 130)
    return 0


USER_ERROR = 2
"""The exit code if a person must fix something."""

AGAIN = 1
"""The exit code if the same command may succeed later."""

STOP_CODE = "MOON_JAX_STOP_CODE"
"""The environment variable with the exit code after a stop by SIGTERM, 0 by default. Launchers set it to distinguish a
stopped run from a finished one.
"""

LOST = re.compile(
    "gloo|nccl|peer|connection|heartbeat|coordination|barrier|UNAVAILABLE|DEADLINE_EXCEEDED", re.IGNORECASE
)
"""Words in XLA errors about other processes. Errors about this one, such as out of memory, lack them."""


def _stop_code() -> int:
    text = os.environ.get(STOP_CODE, "")
    return int(text) if text.isdigit() and int(text) < 256 else 0


def _fail(message: str, code: int, shared: bool = False) -> int:
    """Prints the message in one line, a `shared` one only in the first process; returns the exit code."""
    if shared and interrupt.RELAY.is_set():
        from moon_jax import distributed

        if not distributed.is_primary():
            return code
    print(f"moon-jax: {printable(' '.join(message.split()))}", file=sys.stderr)
    return code


SPACE = "free some space and run the same command again"
PERMISSION = "get permission, or give another path"
REMEDIES = {
    errno.ENOSPC: SPACE,
    errno.EDQUOT: SPACE,
    errno.EFBIG: SPACE,
    errno.EACCES: PERMISSION,
    errno.EPERM: PERMISSION,
    errno.EROFS: "give a writable path",
    errno.EIO: "the disk does not respond; give another path",
}
"""System errors that the user can fix. Any other OSError is our bug, and shows its traceback."""


def _refused(error: OSError, parsed: argparse.Namespace) -> str:
    # An error while writing does not name its file: then it is our output.
    flag = next(flag for flag in ("output", "workdir", "json", "faiss") if hasattr(parsed, flag))
    path = error.filename or f"--{flag} {getattr(parsed, flag)}"
    return f"{path}: {os.strerror(error.errno)}; {REMEDIES[error.errno]}"


def console() -> None:
    """The entry point of the shell command."""
    _enable_huge_pages()
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    if code:
        # Library threads may still work on what failed: do not wait for them or for their messages at exit.
        storage.remove_copies()
        os._exit(code)


def _enable_huge_pages() -> None:
    """Restarts this process once with glibc's huge pages enabled.

    XLA's CPU client maps its buffers again in every step. With small pages, the page faults take a third of the time of
    the quickstart's step. glibc reads the setting only at process start. Results do not depend on it.
    """
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


if __name__ == "__main__":
    console()
