"""The commands. Errors of the user's are one line and exit code 2."""

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
  moon-jax prepare --data catalogue/ --output prepared             any catalogue or log, into records
  moon-jax augment --data prepared --output augmented              enriched titles and expanded images beside them
  moon-jax train --config moon2_qwen3vl_2b --init hf://Qwen/Qwen3-VL-2B-Instruct --data catalogue/ --workdir runs/2b
  moon-jax export --model runs/2b --output served --verify
  moon-jax evaluate --model runs/2b --data prepared --output judged  and compare it with others
  moon-jax embed --model runs/2b --data prepared --output vectors
  moon-jax search --index vectors --model runs/2b --text 'red shoe'
  moon-jax plan --config moon2_qwen3vl_2b --topology v5p:4x4x4     what a step costs there, before renting it
  moon-jax train --help
"""

RENAMED = {"--known": "--probe-products", "--shares": "--contributions"}
"""Flags that had another name once."""


class Parser(argparse.ArgumentParser):
    """Mistakes are one line, as everywhere."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; {self.prog} --help has examples")


def parse(arguments: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """The command with its flags, and the overrides `--config.a.b=value`.

    Raises:
        UserError: anything else on the command line; the message names the closest flag.
    """
    layout = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = Parser("moon-jax", description=DESCRIPTION, **layout)
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in commands.NAMES:
        command = commands.load(name)
        command.add_arguments(subparsers.add_parser(name, help=command.HELP, description=command.DESCRIPTION, **layout))
    parsed, rest = parser.parse_known_args(arguments)
    flags = [f"--{name.replace('_', '-')}" for name in vars(parsed) if name != "command"]
    for argument in rest:
        if not argument.startswith("--config.") or "=" not in argument:
            raise UserError(f"{argument}: not understood; {_hint(argument, flags, subparsers.choices)}")
    return parsed, rest


def _hint(argument: str, flags: list[str], choices: dict[str, argparse.ArgumentParser]) -> str:
    """What to write in place of an argument that the command does not have."""
    given = argument.partition("=")[0]
    if given in RENAMED:
        return f"this flag is called {RENAMED[given]} now"
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
        0, also after a stop by SIGTERM (STOP_CODE); MISTAKE after a mistake of the user's or a refusal of the system's
        (disk, permissions); AGAIN where another process, a disk or a bucket did not answer; 130 after Ctrl-C.
    """
    with interrupt.remembered():
        return _main(arguments)


def _main(arguments: list[str] | None) -> int:
    try:
        parsed, overrides = parse(arguments)
        commands.load(parsed.command).run(parsed, overrides)
    except UserError as error:
        return _fail(str(error), AGAIN if isinstance(error, Unavailable) else MISTAKE, error.shared)
    except OSError as error:
        if error.errno not in REMEDIES:
            raise
        return _fail(_refused(error, parsed), MISTAKE)
    except RuntimeError as error:
        # Several processes compute as one: what the others do not give ends as an error of XLA's.
        if not interrupt.RELAY.is_set() or type(error).__name__ != "JaxRuntimeError" or not LOST.search(str(error)):
            raise
        why = str(error).splitlines()[0][:200]
        told = f"another process was lost ({why}); start all again: the run goes on from its newest checkpoint"
        return _fail(told, AGAIN)
    except KeyboardInterrupt:
        again = f"the same command {commands.load(parsed.command).AFTER_STOP}"
        if interrupt.TERMINATED.is_set():
            return _fail(f"stopped by SIGTERM; {again}", _stop_code(), shared=True)
        return _fail(f"interrupted; {again}", 130)
    return 0


MISTAKE = 2
"""The exit code where a person must mend something."""

AGAIN = 1
"""The exit code where the same command may go well later."""

STOP_CODE = "MOON_JAX_STOP_CODE"
"""An environment variable: the exit code after a stop by SIGTERM, 0 by default. A launcher, which must tell a run that
was stopped from one that is done, sets it.
"""

LOST = re.compile(
    "gloo|nccl|peer|connection|heartbeat|coordination|barrier|UNAVAILABLE|DEADLINE_EXCEEDED", re.IGNORECASE
)
"""What XLA says of other processes; it says other things of this one, such as that memory is short."""


def _stop_code() -> int:
    text = os.environ.get(STOP_CODE, "")
    return int(text) if text.isdigit() and int(text) < 256 else 0


def _fail(message: str, code: int, shared: bool = False) -> int:
    """Tells it in one line, but what is `shared` in one process only; gives the exit code."""
    if shared and interrupt.RELAY.is_set():
        from moon_jax import distributed

        if not distributed.is_primary():
            return code
    print(f"moon-jax: {printable(' '.join(message.split()))}", file=sys.stderr)
    return code


ROOM = "make room, then give the same command again"
PERMISSION = "ask for permission, or give another place"
REMEDIES = {
    errno.ENOSPC: ROOM,
    errno.EDQUOT: ROOM,
    errno.EFBIG: ROOM,
    errno.EACCES: PERMISSION,
    errno.EPERM: PERMISSION,
    errno.EROFS: "give a place that can be written",
    errno.EIO: "the disk does not answer; give another place",
}
"""What the system refuses for the user to mend. Any other OSError is a bug of ours, and shows its stack."""


def _refused(error: OSError, parsed: argparse.Namespace) -> str:
    # What fails in the middle of a file does not say which: it is ours, where we write.
    flag = next(flag for flag in ("output", "workdir", "json", "faiss") if hasattr(parsed, flag))
    place = error.filename or f"--{flag} {getattr(parsed, flag)}"
    return f"{place}: {os.strerror(error.errno)}; {REMEDIES[error.errno]}"


def console() -> None:
    """What the shell calls."""
    _ask_for_huge_pages()
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    if code:
        # Threads of libraries may still work on what failed: they are not waited for, nor what they say at the end.
        storage.remove_copies()
        os._exit(code)


def _ask_for_huge_pages() -> None:
    """Restarts this process once with glibc's huge pages on.

    XLA's CPU client maps its buffers anew in every step; with small pages, faulting them in takes a third of the time
    of the quickstart's step. glibc reads the setting only when a process starts. Results do not depend on it.
    """
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


if __name__ == "__main__":
    console()
