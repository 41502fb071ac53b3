"""The command line. Errors of the user's are one line and exit code 2."""

from __future__ import annotations

import argparse
import difflib
import errno
import logging
import os
import sys
import time
from pathlib import Path
from typing import NoReturn

from moon_jax import config as config_lib
from moon_jax import interrupt
from moon_jax.config import UserError

DESCRIPTION = """\
MOON2.0 in JAX: one model embeds a product from its text, its image or both into one space.

examples:
  moon-jax quickstart                                              the whole method on a rendered catalogue
  moon-jax quickstart --data catalogue/ --workdir runs/first       on your own
  moon-jax quickstart --help
"""

QUICKSTART = """\
The main job, small: trains MOON2.0 from scratch on a catalogue, judges it zero-shot (retrieval in all nine directions
of text, image and both; categories and attributes by label texts), and leaves model, scores, pictures and the vectors
of what was to be found in the workdir. 160 steps, about four minutes on two CPU cores. Without --data it renders a
synthetic catalogue first. The same command again resumes.

examples:
  moon-jax quickstart
  moon-jax quickstart --data catalogue/ --workdir runs/first
  moon-jax quickstart --data products.parquet --workdir runs/short --steps 50
  moon-jax quickstart --data catalogue/ --workdir runs/dense --config.experts.count=0
  moon-jax quickstart --workdir runs/nested '--config.objective.matryoshka=(32,64)'

--config.a.b=VALUE changes any option of the config; moon_jax/config.py has them all with their meaning.
"""


class Parser(argparse.ArgumentParser):
    """Mistakes are one line, as everywhere."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; {self.prog} --help has examples")


def parse(arguments: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """The command with its flags, and the overrides `--config.a.b=value`.

    Raises:
        UserError: anything else that was given; names the closest flag.
    """
    layout = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = Parser("moon-jax", description=DESCRIPTION, **layout)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    quickstart = commands.add_parser(
        "quickstart", help="train on a catalogue and judge the model, in minutes", description=QUICKSTART, **layout
    )
    quickstart.add_argument(
        "--data", help="a .parquet or .jsonl file of products, or a folder of them; default: rendered ones"
    )
    quickstart.add_argument(
        "--workdir", default="moon-jax-quickstart", help="where the run lives (default: %(default)s)"
    )
    quickstart.add_argument("--steps", type=int, help="training steps, in place of the config's")
    quickstart.add_argument("--config", help="a config that is shipped (quickstart, the default), or a file")
    parsed, rest = parser.parse_known_args(arguments)
    flags = [f"--{name}" for name in vars(parsed) if name != "command"]
    for argument in rest:
        if not argument.startswith("--config.") or "=" not in argument:
            close = difflib.get_close_matches(argument.partition("=")[0], flags, n=1)
            hint = (
                f"the closest flag is {close[0]}" if close else "options of the config are written --config.a.b=value"
            )
            raise UserError(f"{argument}: not understood; {hint}")
    return parsed, rest


def main(arguments: list[str] | None = None) -> int:
    """Runs a command.

    Returns:
        0; 2 after a mistake of the user's or a refusal of the system's (disk, permissions), 130 after Ctrl-C.
    """
    try:
        with interrupt.remembered():
            parsed, overrides = parse(arguments)
            run_quickstart(parsed, overrides)
    except UserError as error:
        return _fail(str(error))
    except OSError as error:
        if error.errno not in REMEDIES:
            raise
        return _fail(_refused(error, parsed.workdir))
    except KeyboardInterrupt:
        _fail("interrupted; the same command goes on from here")
        return 130
    return 0


def _fail(message: str) -> int:
    print(f"moon-jax: {config_lib.printable(' '.join(message.split()))}", file=sys.stderr)
    return 2


ROOM = "make room, then give the same command again: it goes on from the newest checkpoint"
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


def _refused(error: OSError, workdir: str) -> str:
    # What fails in the middle of a file does not say which: it is ours, in the workdir.
    return f"{error.filename or f'--workdir {workdir}'}: {os.strerror(error.errno)}; {REMEDIES[error.errno]}"


def run_quickstart(parsed: argparse.Namespace, overrides: list[str]) -> None:
    """Trains, judges, embeds; training is skipped or resumed where its result stands already."""
    for flag in ("data", "workdir"):
        if getattr(parsed, flag) == "":
            raise UserError(f"--{flag}: empty; give a path, or leave the flag out")
    config = config_lib.load(parsed.config or "quickstart")
    if parsed.data:
        config = config_lib.replace(config, {"data.path": parsed.data})
    if parsed.steps is not None:
        if parsed.steps < 1:
            raise UserError(f"--steps {parsed.steps}: give 1 or more")
        config = config_lib.replace(config, {"training.steps": parsed.steps})
    config = config_lib.override(config, overrides)
    workdir = Path(parsed.workdir)

    # Importing JAX takes seconds; mistakes on the command line are told before.
    from moon_jax.evaluation import report as report_lib
    from moon_jax.serving import embedder as serving
    from moon_jax.training import loop, watch

    interrupt.check()
    # What Orbax logs as an error comes to us as an exception, and is told in one line.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    began = time.monotonic()
    prepared = loop.train(config, workdir)
    report = watch.Watch(workdir)
    metrics = report_lib.evaluate(serving.load(workdir), prepared, workdir, report)
    for table in report_lib.tables(metrics):
        report.console.print(table)
    given = {"--data": parsed.data, "--steps": parsed.steps, "--config": parsed.config}
    words = [str(word) for flag, value in given.items() if value for word in (flag, value)]
    again = ["moon-jax", "quickstart", *words, *overrides]
    for heading, lines in report_lib.last_screen(metrics, workdir, prepared, again):
        report.heading(heading)
        for line in lines:
            report.line(line)
    report.line(f"done in {time.monotonic() - began:.0f} s")


def console() -> None:
    """What the shell calls."""
    _ask_for_huge_pages()
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    if code:
        # Threads of libraries may still work on what failed: they are not waited for, nor what they say at the end.
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
