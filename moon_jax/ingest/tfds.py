"""Reads and writes TensorFlow Datasets (TFDS), without TensorFlow.

Writing: prepared data has the layout of TFDS, so `tfds.builder_from_directory(DIR).as_data_source("train")` reads it.
This needs no further package. Reading: the splits of a TFDS builder are a source; this needs
`pip install -e '.[tfds]'`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from array_record.python.array_record_module import ArrayRecordReader
from google.protobuf.message import DecodeError

from moon_jax.data import records
from moon_jax.errors import UserError
from moon_jax.ingest import files as files_lib
from moon_jax.ingest import readers
from moon_jax.ingest.columns import ColumnMap

FILES = ("features.json", "dataset_info.json")
_PACKAGE = "tensorflow_datasets.core.features"


def _text() -> dict[str, Any]:
    return {"pythonClassName": f"{_PACKAGE}.text_feature.Text", "text": {}}


def _image() -> dict[str, Any]:
    shape = {"dimensions": ["-1", "-1", "3"]}
    return {
        "pythonClassName": f"{_PACKAGE}.image_feature.Image",
        "image": {"shape": shape, "dtype": "uint8"},
    }


def _sequence(feature: dict[str, Any]) -> dict[str, Any]:
    return {
        "pythonClassName": f"{_PACKAGE}.sequence_feature.Sequence",
        "sequence": {"feature": feature, "length": "-1"},
    }


def _named(features: dict[str, Any]) -> dict[str, Any]:
    return {
        "pythonClassName": f"{_PACKAGE}.features_dict.FeaturesDict",
        "featuresDict": {"features": features},
    }


def write(folder: Path, splits: dict[str, Sequence[dict[str, Any]]]) -> None:
    """Writes FILES, the metadata of TFDS, beside the shards.

    Args:
        splits: split name → its shards, with the fields of records.Shard.
    """
    features = {
        "id": _text(),
        "title": _text(),
        "description": _text(),
        "category": _sequence(_text()),
        "brand": _text(),
        "attributes": _sequence(_named({"name": _text(), "value": _text()})),
        "images": _sequence(_image()),
        "enriched_texts": _sequence(_text()),
        "expanded_images": _sequence(_image()),
    }
    info = {
        "name": records.NAME,
        "version": "1.0.0",
        "description": "Products written by moon-jax prepare; triplets are in triplets.npy.",
        "fileFormat": "array_record",
        "moduleName": "moon_jax",
        "splits": [
            {
                "name": name,
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
                "numBytes": str(sum(shard["bytes"] for shard in shards)),
                "shardLengths": [str(shard["records"]) for shard in shards],
            }
            for name, shards in splits.items()
            if shards
        ],
    }
    for name, content in zip(FILES, (_named(features), info), strict=True):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def open_source(source: str, columns: ColumnMap) -> files_lib.Source:
    """The splits of a builder, given as tfds://name[/config][:version] or by its folder. The builder must be prepared
    already, in the format array_record.

    Raises:
        UserError: tensorflow-datasets is not installed, or there is no such builder, or it is not prepared like this.
    """
    try:
        import tensorflow_datasets as tfds
    except ImportError:
        raise UserError(f"--data {source}: needs tensorflow-datasets; pip install -e '.[tfds]'") from None
    try:
        named = source.startswith(files_lib.TFDS)
        name = source.removeprefix(files_lib.TFDS)
        builder = tfds.builder(name, try_gcs=False) if named else tfds.builder_from_directory(source)
        splits = {name: [Path(path) for path in split.filepaths] for name, split in sorted(builder.info.splits.items())}
        kind = builder.info.file_format
        if not splits or kind is not tfds.core.FileFormat.ARRAY_RECORD:
            wrong = f"its format is {kind.value}" if splits else "it is not prepared yet"
            raise ValueError(f"{wrong}; call its builder's download_and_prepare(file_format='array_record') first")
    except Exception as error:  # TFDS raises many types, some with several lines
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"--data {source}: {reason}") from None
    features, root = builder.info.features, Path(builder.data_path)
    files, lengths = [], {}
    for name, paths in splits.items():
        for path, length in zip(paths, builder.info.splits[name].shard_lengths, strict=True):
            files.append(files_lib.describe(path, f"{name}/{path.name}", name, "tfds", root))
            lengths[path] = length
            columns.check("product", _columns(features), f"{source} {name}")

    def examples(file: files_lib.File) -> Iterator[tuple[dict[str, Any], int]]:
        try:
            reader = ArrayRecordReader(str(file.path))
            if reader.num_records() != lengths[file.path]:
                raise EOFError(f"{reader.num_records()} of {lengths[file.path]} records")
            for _ in range(reader.num_records()):
                record = reader.read()
                yield dict(_plain(features, records.Example.FromString(record).features.feature)), len(record)
        except (RuntimeError, ValueError, IndexError, DecodeError) as error:
            raise EOFError(str(error).splitlines()[0] if str(error) else type(error).__name__) from None

    def chunks() -> Iterator[files_lib.Chunk]:
        for file in files:
            yield from readers.grouped(file, examples(file))

    return files_lib.Source(source, files, chunks)


def _columns(features: Any, prefix: str = "") -> list[str]:
    """The column names of an example; nested names are written a/b."""
    from tensorflow_datasets.core.features import FeaturesDict

    found = []
    for name, feature in features.items():
        nested = isinstance(feature, FeaturesDict)
        found += _columns(feature, f"{prefix}{name}/") if nested else [prefix + name]
    return found


def _plain(features: Any, example: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the columns of an example: text, class names, encoded images, or lists of these if the feature is a
    sequence. A sequence of dicts with two features becomes a map.
    """
    from tensorflow_datasets.core.features import FeaturesDict, Image, Sequence

    for name, feature in features.items():
        key = prefix + name
        if isinstance(feature, FeaturesDict):
            yield from _plain(feature, example, f"{key}/")
        elif isinstance(feature, Sequence) and isinstance(feature.feature, FeaturesDict):
            # TFDS does not keep the order of features: the one named value… is the value.
            named = sorted(feature.feature.items(), key=lambda item: (item[0].startswith("value"), item[0]))
            parts = [_values(one, example[f"{key}/{part}"]) for part, one in named]
            if len(parts) == 2:
                yield key, list(zip(*parts, strict=False))
        elif isinstance(feature, Sequence):
            yield key, _values(feature.feature, example[key])
        else:
            values = _values(feature, example[key])
            scalar = isinstance(feature, Image) or not feature.shape
            yield key, next(iter(values), None) if scalar else values


def _values(feature: Any, found: Any) -> list[Any]:
    from tensorflow_datasets.core.features import ClassLabel, Image

    values = list(getattr(found, found.WhichOneof("kind") or "bytes_list").value)
    if isinstance(feature, Image):  # stays encoded
        return values
    if isinstance(feature, ClassLabel):
        return [feature.int2str(value) if value >= 0 else None for value in values]
    return [value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else value for value in values]
