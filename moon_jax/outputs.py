"""A folder that a long work fills, in one try or in several.

While the work goes on, the folder's WORK tells what it is made from, holds what is half done, and is locked. What is
done is done for good: the next try goes on with it, and refuses to mix it with anything else.
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
"""The folder within the output that holds what is half done."""

SOURCE = "source.json"
"""What the output was made from: the source with its files, and the options."""

LOCK = "lock"
"""In WORK: held by the process that works."""


def is_from(folder: Path, told: str) -> bool:
    """Whether a folder, or the WORK of one, was made from what SOURCE tells."""
    path = folder / SOURCE
    return path.is_file() and path.read_text(encoding="utf-8") == told


def is_empty(output: Path, parts: Sequence[str]) -> bool:
    """Whether a folder holds nothing but what a try that was killed at once leaves.

    Args:
        parts: the folders of WORK.
    """
    ours = {
        output / WORK,
        *(output / WORK / name for name in (LOCK, f"{SOURCE}.tmp")),
        *(output / WORK / part for part in parts),
    }
    return all(path in ours for path in output.rglob("*"))


@contextlib.contextmanager
def claim(output: Path, told: str, parts: Sequence[str]) -> Iterator[Path]:
    """Makes the folder and its WORK the home of this work, and of no other process; yields WORK.

    The lock falls when the process ends, however it does.

    Raises:
        UserError: it holds other things, or what was begun from something else.
        Unavailable: another process works there.
    """
    work = output / WORK
    if (work / SOURCE).is_file():
        if not is_from(work, told):
            raise UserError(
                f"--output {output}: holds what was begun from another source, one that changed since, or with other"
                " options; remove it to begin anew"
            )
    elif output.exists() and (not output.is_dir() or not is_empty(output, parts)):
        raise UserError(f"--output {output}: holds other things; give a folder that is new or empty")
    try:
        for part in parts:
            (work / part).mkdir(parents=True, exist_ok=True)
    except (NotADirectoryError, FileNotFoundError, PermissionError) as error:
        raise UserError(f"--output {output}: {error.strerror}; give a folder that can be made") from None
    with (work / LOCK).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Unavailable(f"--output {output}: another process works there; wait for it, or end it") from None
        except OSError:  # a file system without locks
            pass
        for old in [*work.glob("*/*.tmp"), *output.glob("*.tmp")]:
            old.unlink(missing_ok=True)
        write_atomic(work / SOURCE, told)
        try:
            yield work
        except Unavailable:
            raise
        except UserError:
            # Where nothing was done yet, what was wrong may be mended, and the folder taken for that.
            if not any(path.is_file() for part in parts for path in (work / part).rglob("*")):
                shutil.rmtree(work, ignore_errors=True)
            raise


def conflict(output: Path) -> UserError:
    """Of an output that is finished, and was made from something else."""
    return UserError(
        f"--output {output}: was made from another source, one that changed since, or with other options; give another"
        " output, or remove this one"
    )


def write_atomic(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def checksum(path: Path) -> str:
    """BLAKE2b-128 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
