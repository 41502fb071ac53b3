"""An output folder that a long job fills, in one run or in several.

During the job, the subfolder WORK records the source, holds unfinished work, and is locked. Finished work is kept: the
next run continues with it, and refuses to mix it with work from another source.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from moon_jax.errors import Unavailable, UserError

WORK = ".work"
"""The folder within the output that holds unfinished work."""

SOURCE = "source.json"
"""The file that records what the output was made from: the source with its files, and the options."""

LOCK = "lock"
"""The lock file in WORK, held by the working process."""


def is_from(folder: Path, source: str) -> bool:
    """Whether a folder, or its WORK, was made from `source`, the content of SOURCE."""
    path = folder / SOURCE
    return path.is_file() and path.read_text(encoding="utf-8") == source


def is_empty(output: Path, parts: Sequence[str]) -> bool:
    """Whether a folder holds no more than a run leaves that was killed right after its start.

    Args:
        parts: the subfolders of WORK.
    """
    ours = {
        output / WORK,
        *(output / WORK / name for name in (LOCK, f"{SOURCE}.tmp")),
        *(output / WORK / part for part in parts),
    }
    return all(path in ours for path in output.rglob("*"))


@contextlib.contextmanager
def claim(output: Path, source: str, parts: Sequence[str]) -> Iterator[Path]:
    """Creates and locks the folder and its WORK for this job and process; yields WORK.

    The system releases the lock when the process ends, however it ends.

    Args:
        source: the content of SOURCE.
        parts: the subfolders of WORK.

    Raises:
        UserError: the folder holds other files, or unfinished work from another source.
        Unavailable: another process is working there.
    """
    work = output / WORK
    if (work / SOURCE).is_file():
        if not is_from(work, source):
            raise UserError(
                f"--output {output}: holds unfinished work from another or a changed source, or with other options;"
                " remove it to start from scratch"
            )
    elif output.exists() and (not output.is_dir() or not is_empty(output, parts)):
        raise UserError(f"--output {output}: holds other files; give a new or empty folder")
    try:
        for part in parts:
            (work / part).mkdir(parents=True, exist_ok=True)
    except (NotADirectoryError, FileNotFoundError, PermissionError) as error:
        raise UserError(f"--output {output}: {error.strerror}; give a folder that can be created") from None
    with (work / LOCK).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Unavailable(f"--output {output}: another process is working there; wait for it, or stop it") from None
        except OSError:  # a file system without locks
            pass
        for old in [*work.glob("*/*.tmp"), *output.glob("*.tmp")]:
            old.unlink(missing_ok=True)
        write_atomic(work / SOURCE, source)
        try:
            yield work
        except Unavailable:
            raise
        except UserError:
            # If nothing was done yet, release the folder, so that a corrected command can use it.
            if not any(path.is_file() for part in parts for path in (work / part).rglob("*")):
                shutil.rmtree(work, ignore_errors=True)
            raise


def conflict(output: Path) -> UserError:
    """The error for a finished output that was made from another source."""
    return UserError(
        f"--output {output}: was made from another or a changed source, or with other options; give another folder, or"
        " remove this one"
    )


def write_atomic(path: Path, text: str) -> None:
    """Writes a file atomically."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def checksum(path: Path) -> str:
    """The BLAKE2b-128 checksum of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
