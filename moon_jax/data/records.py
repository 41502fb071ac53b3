"""Stores products as records of ArrayRecord shards, one `tf.train.Example` each, and index arrays beside them.

The folder has the layout of TensorFlow Datasets, whose `builder_from_directory` reads it (ingest/tfds.py). The message
type is declared here, so neither TensorFlow nor TensorFlow Datasets is needed. Text features hold one value; an empty
one means that there is none.
"""

from __future__ import annotations

import dataclasses
import threading
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from moon_jax.errors import UserError
from moon_jax.types import Product, Triplet

NAME = "moon_jax"
"""Name of the dataset in its file names."""

SHARD_OPTIONS = "group_size:1,uncompressed"
"""Options of ArrayRecord: records are read one by one, and images are already compressed."""

TRIPLET = np.dtype([("query", "<i4"), ("positive", "<i4"), ("negative", "<i4"), ("weight", "<f4")])
"""A triplet on disk; negative is −1 if there is none."""

JUDGEMENT = np.dtype([("query", "<i4"), ("positive", "<i4"), ("weight", "<f4")])
"""An evaluation query, a relevant product, and its grade."""


def _example_class() -> Any:
    """The class of tf.train.Example, declared in its own descriptor pool: TensorFlow may declare it too."""
    file = descriptor_pb2.FileDescriptorProto(name="moon_jax/example.proto", package="tensorflow", syntax="proto3")
    field = descriptor_pb2.FieldDescriptorProto
    lists = {"BytesList": field.TYPE_BYTES, "FloatList": field.TYPE_FLOAT, "Int64List": field.TYPE_INT64}
    for name, kind in lists.items():
        file.message_type.add(name=name).field.add(name="value", number=1, type=kind, label=field.LABEL_REPEATED)
    feature = file.message_type.add(name="Feature")
    feature.oneof_decl.add(name="kind")
    for number, name in enumerate(lists, start=1):
        feature.field.add(
            name=f"{name[:-4].lower()}_list",
            number=number,
            type=field.TYPE_MESSAGE,
            type_name=f".tensorflow.{name}",
            label=field.LABEL_OPTIONAL,
            oneof_index=0,
        )
    features = file.message_type.add(name="Features")
    entry = features.nested_type.add(name="FeatureEntry")
    entry.options.map_entry = True
    entry.field.add(name="key", number=1, type=field.TYPE_STRING, label=field.LABEL_OPTIONAL)
    entry.field.add(
        name="value", number=2, type=field.TYPE_MESSAGE, type_name=".tensorflow.Feature", label=field.LABEL_OPTIONAL
    )
    features.field.add(
        name="feature",
        number=1,
        type=field.TYPE_MESSAGE,
        type_name=".tensorflow.Features.FeatureEntry",
        label=field.LABEL_REPEATED,
    )
    example = file.message_type.add(name="Example")
    example.field.add(
        name="features",
        number=1,
        type=field.TYPE_MESSAGE,
        type_name=".tensorflow.Features",
        label=field.LABEL_OPTIONAL,
    )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("tensorflow.Example"))


Example = _example_class()


def title_group(title: str) -> str:
    """The key of a title group: titles that differ only in case, spacing or Unicode form have the same key."""
    return " ".join(unicodedata.normalize("NFC", title).casefold().split())


def encode(product: Product) -> bytes:
    """Serialises a product as an Example, deterministically. Images must be bytes."""
    features = {
        "id": (product.id,),
        "title": (product.text or "",),
        "description": (product.description,),
        "category": product.category,
        "brand": (product.brand,),
        "attributes/name": tuple(product.attributes),
        "attributes/value": tuple(product.attributes.values()),
        "images": product.images,
        "enriched_texts": product.enriched_texts,
        "expanded_images": product.expanded_images,
    }
    example = Example()
    for name, values in features.items():
        values = [value if isinstance(value, bytes) else value.encode() for value in values]
        example.features.feature[name].bytes_list.value.extend(values)
    return example.SerializeToString(deterministic=True)


def decode(record: bytes) -> Product:
    """Deserialises a product; the inverse of `encode`."""
    features = Example.FromString(record).features.feature

    def texts(name: str) -> tuple[str, ...]:
        return tuple(map(bytes.decode, features[name].bytes_list.value))

    title = texts("title")[0] or None
    return Product(
        text=title,
        images=tuple(features["images"].bytes_list.value),
        id=texts("id")[0],
        group=title_group(title) if title else "",
        category=texts("category"),
        brand=texts("brand")[0],
        attributes=dict(zip(texts("attributes/name"), texts("attributes/value"), strict=True)),
        description=texts("description")[0],
        enriched_texts=texts("enriched_texts"),
        expanded_images=tuple(features["expanded_images"].bytes_list.value),
    )


@dataclasses.dataclass(frozen=True)
class Shard:
    """A file of records, as listed in the manifest."""

    file: str
    records: int
    bytes: int
    checksum: str  # BLAKE2b-128 of the file, in hexadecimal


def shard_name(split: str, number: int, count: int) -> str:
    """File name of a shard, as in TensorFlow Datasets."""
    return f"{NAME}-{split}.array_record-{number:05}-of-{count:05}"


class Records(Sequence[Product]):
    """The products of a folder, read from disk on access. Thread-safe.

    Neither products nor an index of them (beyond a few bytes each) is held in memory.
    """

    def __init__(self, folder: Path, shards: Sequence[Shard]):
        self.folder, self.shards = folder, tuple(shards)
        self._first = np.cumsum([0, *(shard.records for shard in shards)])
        self._readers: dict[int, ArrayRecordReader] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return int(self._first[-1])

    @overload
    def __getitem__(self, index: int) -> Product: ...
    @overload
    def __getitem__(self, index: slice) -> list[Product]: ...
    def __getitem__(self, index: int | slice) -> Product | list[Product]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return decode(self.raw(index))

    def raw(self, index: int) -> bytes:
        """The undecoded record at `index`.

        Raises:
            UserError: its shard is damaged.
        """
        [record] = self._read([index])
        return record

    def read_many(self, indices: Sequence[int]) -> list[Product]:
        """The products at `indices`, read in one batch: a single read costs as much as a batch of dozens.

        Raises:
            UserError: a shard is damaged.
        """
        return list(map(decode, self._read(indices)))

    def _read(self, indices: Sequence[int]) -> list[bytes]:
        wanted = np.asarray(indices, np.int64)
        if len(wanted) and not (-len(self) <= wanted.min() and wanted.max() < len(self)):
            raise IndexError(next(index for index in indices if not -len(self) <= index < len(self)))
        wanted %= max(len(self), 1)
        numbers = np.searchsorted(self._first, wanted, side="right") - 1
        found: list[bytes] = [b""] * len(wanted)
        for number in np.unique(numbers).tolist():
            positions = np.flatnonzero(numbers == number)
            rows = wanted[positions] - self._first[number]
            for position, record in zip(positions.tolist(), self._of_shard(number, rows.tolist()), strict=True):
                found[position] = record
        return found

    def _of_shard(self, number: int, rows: list[int]) -> list[bytes]:
        try:
            with self._lock:
                # A reader has a file position, so threads must take turns.
                if number not in self._readers:
                    path = self.folder / self.shards[number].file
                    self._readers[number] = ArrayRecordReader(str(path), "readahead_buffer_size:0")
                return self._readers[number].read(rows)
        except (ValueError, RuntimeError, IndexError, OSError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(
                f"{self.folder / self.shards[number].file}: damaged ({reason}); prepare the data again"
            ) from None

    def __iter__(self) -> Iterator[Product]:
        return (self[index] for index in range(len(self)))

    def __getstate__(self) -> tuple[Path, tuple[Shard, ...]]:
        return self.folder, self.shards

    def __setstate__(self, state: tuple[Path, tuple[Shard, ...]]) -> None:
        self.__init__(*state)


class Subset(Sequence[Product]):
    """A selection of products in a given order, read on access."""

    def __init__(self, products: Sequence[Product], indices: Sequence[int], texts: Sequence[str | None] | None = None):
        """`texts`, if given, replace the products' own titles."""
        self._products, self._indices, self._texts = products, indices, texts

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, index: int) -> Product: ...
    @overload
    def __getitem__(self, index: slice) -> list[Product]: ...
    def __getitem__(self, index: int | slice) -> Product | list[Product]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        product = self._products[int(self._indices[index])]
        return product if self._texts is None else dataclasses.replace(product, text=self._texts[index])


def read_many(products: Sequence[Product], indices: Sequence[int]) -> list[Product]:
    """The products at `indices`; reads Records in one batch."""
    return products.read_many(indices) if isinstance(products, Records) else [products[index] for index in indices]


class Triplets(Sequence[Triplet]):
    """Triplets in an array of dtype TRIPLET, which may be memory-mapped."""

    def __init__(self, array: np.ndarray):
        self.array = array

    def __len__(self) -> int:
        return len(self.array)

    @overload
    def __getitem__(self, index: int) -> Triplet: ...
    @overload
    def __getitem__(self, index: slice) -> Triplets: ...
    def __getitem__(self, index: int | slice) -> Triplet | Triplets:
        if isinstance(index, slice):
            return Triplets(self.array[index])
        query, positive, negative, weight = self.array[index].item()
        return Triplet(query, positive, negative if negative >= 0 else None, weight)

    @classmethod
    def of(cls, triplets: Sequence[Triplet]) -> Triplets:
        rows = [(t.query, t.positive, -1 if t.negative is None else t.negative, t.weight) for t in triplets]
        return cls(np.array(rows, TRIPLET))
