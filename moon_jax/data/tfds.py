"""TensorFlow Datasets, both ways, without TensorFlow.

What prepare writes is laid out as TensorFlow Datasets lays out its own, so that
`tfds.builder_from_directory(DIR).as_data_source("train")` reads it, and with it whatever builds on that. The other way,
a builder's splits are a source; that needs `pip install -e '.[tfds]'`, the layout needs nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from moon_jax.config import UserError
from moon_jax.data import records, sources
from moon_jax.data.columns import ColumnMap

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


def _several(feature: dict[str, Any]) -> dict[str, Any]:
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
    """Writes FILES beside the shards.

    Args:
        splits: name → its shards, as records.Shard has them.
    """
    features = {
        "id": _text(),
        "title": _text(),
        "description": _text(),
        "category": _several(_text()),
        "brand": _text(),
        "attributes": _several(_named({"name": _text(), "value": _text()})),
        "images": _several(_image()),
        "enriched_texts": _several(_text()),
        "expanded_images": _several(_image()),
    }
    info = {
        "name": records.NAME,
        "version": "1.0.0",
        "description": "Products as moon-jax prepare wrote them; triplets are in triplets.npy.",
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


def open_source(source: str, columns: ColumnMap) -> sources.Opened:
    """The splits of a builder: tfds://name[/config][:version], prepared before as array_record, or its folder.

    Raises:
        UserError: tensorflow-datasets is not installed, or there is no such builder, or not in that format.
    """
    try:
        import tensorflow_datasets as tfds
    except ImportError:
        raise UserError(f"--data {source}: wants tensorflow-datasets; pip install -e '.[tfds]'") from None
    try:
        if source.startswith(sources.TFDS):
            builder = tfds.builder(source.removeprefix(sources.TFDS), try_gcs=False)
        else:
            builder = tfds.builder_from_directory(source)
        splits = sorted(builder.info.splits)
        if not splits:
            raise ValueError("it was not prepared yet: builder.download_and_prepare(file_format='array_record')")
        opened = {
            name: builder.as_data_source(split=name, decoders=_undecoded(builder.info.features)) for name in splits
        }
    except Exception as error:  # its errors are of many kinds, some of them of many lines
        told = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"--data {source}: {told}") from None
    root = Path(builder.data_path)
    names = sorted(_flat(builder.info.features))
    files = []
    for name in splits:
        shards = sorted(root.glob(f"*-{name}.*"))
        file = sources.describe(shards[0], name, "tfds")
        files.append(file)
        columns.check(file.kind, names, f"{source} {name}")

    def chunks() -> Iterator[sources.Chunk]:
        for file in files:
            data, features = opened[file.name], builder.info.features
            for start in range(0, len(data), sources.CHUNK_RECORDS // 10):
                stop = min(start + sources.CHUNK_RECORDS // 10, len(data))
                rows = [dict(_plain(features, example)) for example in data.__getitems__(list(range(start, stop)))]
                size = file.size * (stop - start) // max(len(data), 1)
                yield sources.Chunk(file, start + 1, rows, size=size)

    return sources.Opened(source, files, chunks)


def _undecoded(features: Any) -> Any:
    """Decoders that leave images as they are encoded."""
    import tensorflow_datasets as tfds

    if isinstance(features, tfds.features.FeaturesDict):
        found = {name: _undecoded(feature) for name, feature in features.items()}
        return {name: decoder for name, decoder in found.items() if decoder} or None
    inner = getattr(features, "feature", None)
    image = isinstance(inner if inner is not None else features, tfds.features.Image)
    return tfds.decode.SkipDecoding() if image else None


def _flat(features: Any, prefix: str = "") -> Iterator[str]:
    import tensorflow_datasets as tfds

    for name, feature in features.items():
        if isinstance(feature, tfds.features.FeaturesDict):
            yield from _flat(feature, f"{prefix}{name}/")
        else:
            yield prefix + name


def _plain(features: Any, example: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """An example's columns, nested ones as a/b: text for bytes of text, names for class labels, lists for arrays."""
    import tensorflow_datasets as tfds

    for name, feature in features.items():
        value = example[name]
        if isinstance(feature, tfds.features.FeaturesDict):
            yield from _plain(feature, value, f"{prefix}{name}/")
            continue
        inner = getattr(feature, "feature", feature)
        if isinstance(inner, tfds.features.FeaturesDict):  # a sequence of dicts comes as a dict of sequences
            first, second, *_ = [*value.values(), [], []]
            value = list(zip(map(_value, first), map(_value, second), strict=False))
        elif isinstance(inner, tfds.features.ClassLabel):
            value = feature.int2str(int(value)) if inner is feature else [inner.int2str(int(one)) for one in value]
        elif isinstance(inner, tfds.features.Image):
            value = bytes(value) if inner is feature else [bytes(one) for one in value]
        else:
            value = _value(value)
        yield prefix + name, value


def _value(value: Any) -> Any:
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, bytes):
        return value.decode("utf-8", "surrogateescape")
    return [_value(one) for one in value] if isinstance(value, list | tuple) else value
