"""Where a workdir is stored: in a local folder, or in a bucket, gs://bucket/run.

Buckets can neither append to a file (which logs need) nor rename a folder (which atomic writes need). So only the
checkpoints of such a workdir are written to the bucket directly, by Orbax. Everything else is in a local copy, pulled
when a run opens, and pushed before each checkpoint is saved and when the run ends. A run resumes from a checkpoint, so
everything it needs is already in the bucket.
"""

from __future__ import annotations

import atexit
import functools
import importlib.util
import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from etils import epath

from moon_jax.errors import Unavailable, UserError

BUCKET = "gs://"

SCHEME = re.compile(r"([a-z][a-z0-9]+):/+")
"""The start of an address. pathlib.Path merges the two slashes into one."""

NOT_PULLED = ("checkpoints", "damaged", "profile")
"""Folders that are not pulled: checkpoints stay in the bucket, and nothing reads the others."""


def is_address(path: str | Path) -> bool:
    """Whether this is an address (scheme://…) rather than a local path."""
    return bool(SCHEME.match(str(path)))


def _address(path: str | Path) -> str:
    return SCHEME.sub(r"\1://", str(path), count=1) if is_address(path) else str(path)


def is_remote(path: str | Path) -> bool:
    """Whether this is an address in a bucket, gs://…"""
    return _address(path).startswith(BUCKET)


def _one_line_errors(work: Callable) -> Callable:
    """Turns errors of the bucket into UserErrors of one line."""

    @functools.wraps(work)
    def wrapped(self: Store, *arguments: Any) -> Any:
        try:
            return work(self, *arguments)
        except UserError:
            raise
        except Exception as error:  # of gcsfs, aiohttp, google.auth and their dependencies
            absent = isinstance(error, FileNotFoundError)
            cause = "not found" if absent else first_line(error)
            raise (UserError if absent else Unavailable)(
                f"{self.address}: {cause}; check that the bucket exists and that this machine may read and write it"
                " (gcloud auth application-default login)"
            ) from None

    return wrapped


def first_line(error: BaseException, longest: int = 200) -> str:
    """The first line of an error, at most `longest` characters."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:longest]


def _bucket() -> Any:
    """The file system of buckets. Disables listing caches, here and in Orbax's file system (epath).

    By default both cache every listing forever, and miss the changes of other processes and of each other.
    """
    import fsspec  # slow to import, and only needed here

    for name in ("gs", "gcs"):
        fsspec.config.conf.setdefault(name, {})["use_listings_cache"] = False
    return fsspec.filesystem("gcs")


def move(folder: epath.Path, target: epath.Path) -> None:
    """Moves a folder and replaces what is at `target`; in a bucket object by object."""
    target.rmtree(missing_ok=True)
    if is_remote(folder):
        _bucket().mv(str(folder), str(target), recursive=True)
    else:
        target.parent.mkdir(exist_ok=True)
        shutil.move(folder, target)


_COPIES: list[Path] = []


def temporary_folder() -> Path:
    """A temporary folder that is removed when this process ends."""
    _COPIES.append(Path(tempfile.mkdtemp(prefix="moon-jax-")))
    return _COPIES[-1]


@atexit.register
def remove_copies() -> None:
    """Removes this process's temporary folders; runs at exit."""
    while _COPIES:
        shutil.rmtree(_COPIES.pop(), ignore_errors=True)


class Store:
    """A workdir.

    Attributes:
        address: the path, or gs://bucket/folder.
        files: the local folder with everything but the checkpoints: the workdir itself, or a copy of it.
        checkpoints: the folder of the checkpoints.
    """

    def __init__(self, address: str | Path):
        """
        Raises:
            UserError: gs:// without a bucket and folder, another kind of address, or gcsfs is not installed.
        """
        self.address = _address(address)
        self._known: dict[str, tuple[int, int]] = {}
        if not is_remote(address):
            if is_address(address):
                raise UserError(f"{self.address}: neither a local path nor gs://; mount it and give that path")
            self.files = Path(address)
            self.checkpoints = epath.Path(self.files.absolute() / "checkpoints")
            return
        bucket, _, folder = self.address.removeprefix(BUCKET).strip("/").partition("/")
        if not bucket or not folder:
            raise UserError(f"{self.address}: no folder in a bucket; write gs://bucket/folder")
        if importlib.util.find_spec("gcsfs") is None:
            raise UserError(f"{self.address}: gcsfs is not installed; pip install -e '.[gcs]'")
        self._root = f"{bucket}/{folder}"
        self.address = BUCKET + self._root
        self._bucket = _bucket()
        self.files = temporary_folder()
        self.checkpoints = epath.Path(self.address) / "checkpoints"

    def __str__(self) -> str:
        return self.address

    @property
    def remote(self) -> bool:
        """Whether it is in a bucket."""
        return is_remote(self.address)

    @_one_line_errors
    def pull(self, names: Sequence[str] = ()) -> None:
        """Updates the local copy from the bucket. Does nothing if the workdir is a local folder.

        Args:
            names: the files to pull; by default all but NOT_PULLED.

        Raises:
            UserError: the bucket does not exist.
            Unavailable: it cannot be read now.
        """
        if not self.remote:
            return
        found = [path.removeprefix(f"{self._root}/") for path in self._bucket.find(self._root)]
        wanted = [name for name in found if (name in names if names else name.split("/")[0] not in NOT_PULLED)]
        self._bucket.get([f"{self._root}/{name}" for name in wanted], [str(self.files / name) for name in wanted])
        self._known = self._seen()

    @_one_line_errors
    def push(self) -> None:
        """Updates the bucket from the local copy, uploading and deleting what changed since the last pull or push."""
        if not self.remote:
            return
        seen = self._seen()
        changed = [name for name, state in seen.items() if self._known.get(name) != state]
        gone = [name for name in self._known if name not in seen]
        # In the order of writing: a file that marks others as complete comes last.
        for name in sorted(changed, key=lambda name: seen[name]):
            self._bucket.put_file(str(self.files / name), f"{self._root}/{name}")
        if gone:
            self._bucket.rm([f"{self._root}/{name}" for name in gone])
        self._known = seen

    def _seen(self) -> dict[str, tuple[int, int]]:
        """Modification time (ns) and size of every file in the copy."""
        files = (path for path in self.files.rglob("*") if path.is_file() and path.suffix != ".tmp")
        states = ((path, path.stat()) for path in files)
        return {path.relative_to(self.files).as_posix(): (state.st_mtime_ns, state.st_size) for path, state in states}
