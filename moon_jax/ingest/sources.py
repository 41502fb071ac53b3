"""Sources of catalogues and logs: finds their files and what each holds.

Supported: Parquet and Arrow (as saved by Hugging Face's datasets) with images as bytes; JSONL, CSV and TSV with images
as paths or URLs; tar shards of webdataset; datasets on the Hugging Face hub; TensorFlow Datasets builders. A column map
(columns.py) maps columns to fields; files.py describes what file names mean.
"""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

from moon_jax.errors import UserError
from moon_jax.ingest import readers, tfds
from moon_jax.ingest.columns import ColumnMap
from moon_jax.ingest.files import HUB, SUFFIXES, TFDS, File, Source, confined, describe
from moon_jax.ingest.parse import BadRecord


def open_source(source: str | Path, columns: ColumnMap) -> Source:
    """Finds the files of a source; downloads hf://datasets/owner/name unless it is in Hugging Face's cache.

    Raises:
        UserError: there is nothing to read, or a required column is missing.
    """
    source = str(source)
    if (Path(source) / "triplets.npy").is_file():
        raise UserError(f"--data {source}: is prepared already; pass it to train or quickstart")
    if source.startswith(TFDS) or (Path(source) / "features.json").is_file():
        return tfds.open_source(source, columns)
    hub = source.startswith(HUB)
    root = _snapshot(source) if hub else Path(source)
    files = _files(root, source, columns, hub)
    for file in files:
        if file.format in ("parquet", "arrow"):
            columns.check(file.kind, readers.schema_of(file).names, str(file.path))
    synthetic = any(
        file.format == "parquet" and b"synthetic" in (readers.schema_of(file).metadata or {}) for file in files
    )
    return Source(
        source, files, lambda: itertools.chain.from_iterable(readers.chunks(file, columns) for file in files), synthetic
    )


def _snapshot(source: str) -> Path:
    """Downloads a dataset of the Hugging Face hub; returns its folder in the cache."""
    import huggingface_hub

    name, _, revision = source.removeprefix(HUB).partition("@")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or ".." in name:
        raise UserError(f"--data {source}: not a dataset name; write {HUB}owner/name[@revision]")
    patterns = [f"*{suffix}{zipped}" for suffix in SUFFIXES for zipped in ("", ".gz")]
    try:
        return Path(
            huggingface_hub.snapshot_download(
                name, repo_type="dataset", revision=revision or None, allow_patterns=patterns
            )
        )
    except Exception as error:  # from the network, the hub or its cache; all have a useful message
        raise UserError(f"--data {source}: {str(error).splitlines()[0] or type(error).__name__}") from None


def _files(root: Path, source: str, columns: ColumnMap, deep: bool) -> list[File]:
    try:
        if not root.exists():
            raise UserError(f"--data {source}: no such file or folder")
        if root.is_file():
            found = [(root, root.name)]
        elif (root / "dataset_dict.json").is_file() or (root / "state.json").is_file():
            found = [(path, str(path.relative_to(root))) for path in _saved(root)]
        else:
            patterns = columns.files or (("**/*",) if deep else ("*",))
            paths = {path for pattern in patterns for path in root.glob(pattern) if path.is_file()}
            found = [(path, str(path.relative_to(root))) for path in sorted(paths)]
    except PermissionError as error:
        raise UserError(f"--data {source}: no permission to read {error.filename}; ask its owner for access") from None
    files = []
    for path, name in found:
        bare = path.with_suffix("") if path.suffix.lower() == ".gz" else path
        format = columns.format or SUFFIXES.get(bare.suffix.lower())
        if format and not path.name.startswith("."):
            label = name if deep or format == "arrow" else path.name
            files.append(describe(path, name, label, format, root if root.is_dir() else root.parent))
    if not files:
        known = ", ".join(SUFFIXES)
        wrong = f"not one of {known}" if root.is_file() else f"no {' or '.join(columns.files)}" if columns.files else ""
        raise UserError(
            f"--data {source}: {wrong or f'no file that ends with one of {known}'}; subfolders are not searched;"
            " docs/data.md describes the files"
        )
    return files


def _saved(root: Path) -> list[Path]:
    """The files of a dataset saved by Hugging Face's datasets, split by split, without the caches beside them."""
    found = []
    for state in sorted(root.glob("**/state.json")):
        try:
            named = [entry["filename"] for entry in json.loads(state.read_text(encoding="utf-8"))["_data_files"]]
            found += [confined(state.parent, name) for name in named]
        except (ValueError, KeyError, TypeError, BadRecord) as error:
            raise UserError(f"{state}: not written by Hugging Face datasets ({error})") from None
    return found
