"""The commands. Errors of the user's are one line and exit code 2."""

from __future__ import annotations

import argparse
import errno
import os
import re
import sys

from moon_jax import commands, flags, interrupt, places
from moon_jax import config as config_lib
from moon_jax.config import UserError


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
        parsed, overrides = flags.parse(arguments)
        commands.COMMANDS[parsed.command](parsed, overrides)
    except UserError as error:
        return _fail(str(error), AGAIN if isinstance(error, config_lib.Unavailable) else MISTAKE, error.shared)
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
        again = f"the same command {GOES_ON.get(parsed.command, 'goes on from here')}"
        if interrupt.TERMINATED.is_set():
            return _fail(f"stopped by SIGTERM; {again}", _stop_code(), shared=True)
        return _fail(f"interrupted; {again}", 130)
    return 0


GOES_ON = {
    **dict.fromkeys(("export", "plan", "evaluate", "search", "heatmap"), "starts anew"),
    "embed": "goes on with the files that are not whole",
}
"""What a command that was interrupted does when it is given again, where it does not go on from there."""

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
        from moon_jax import hosts

        if not hosts.first():
            return code
    print(f"moon-jax: {config_lib.printable(' '.join(message.split()))}", file=sys.stderr)
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
        places.remove_copies()
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
