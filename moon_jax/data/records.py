"""Products as records of ArrayRecord shards: one `tf.train.Example` each, and arrays of indices beside them.

The folder's layout is that of TensorFlow Datasets, whose `builder_from_directory` reads it (tfds.py); the message is
declared here, so that neither TensorFlow nor its datasets is needed. Text features hold one value, empty for none.
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
"""Of the data set, as its files are named."""

SHARD_OPTIONS = "group_size:1,uncompressed"
"""ArrayRecord's: records are read one by one, and images are compressed already."""

TRIPLET = np.dtype([("query", "<i4"), ("positive", "<i4"), ("negative", "<i4"), ("weight", "<f4")])
"""A triplet on disk; −1 where there is no negative."""

PAIR = np.dtype([("query", "<i4"), ("positive", "<i4")])
"""A query of the evaluation, and a product that it seeks."""


def _example_class() -> Any:
    """The class of tf.train.Example, from a declaration in a pool of its own: TensorFlow may declare it, too."""
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
    """Products whose titles differ in case, spacing or Unicode form only share a group."""
    return " ".join(unicodedata.normalize("NFC", title).casefold().split())


def encode(product: Product) -> bytes:
    """A product as a serialised Example; the same product gives the same bytes. Images must be bytes."""
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
    """The inverse of `encode`."""
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
    """A file of records, as the manifest lists it."""

    file: str
    records: int
    bytes: int
    checksum: str  # blake2b of the file, in hex


def shard_name(split: str, number: int, count: int) -> str:
    """As TensorFlow Datasets names them."""
    return f"{NAME}-{split}.array_record-{number:05}-of-{count:05}"


class Records(Sequence[Product]):
    """The products of a folder, read when they are asked for; threads may share it.

    Not held: neither products nor, beyond a few bytes each, their places.
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
            return [self[place] for place in range(*index.indices(len(self)))]
        return decode(self.raw(index))

    def raw(self, index: int) -> bytes:
        """The record at `index`, undecoded.

        Raises:
            UserError: its shard is damaged.
        """
        [record] = self._read([index])
        return record

    def several(self, indices: Sequence[int]) -> list[Product]:
        """The products at `indices`, read at once: a record alone costs as much as dozens together.

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
            places = np.flatnonzero(numbers == number)
            rows = wanted[places] - self._first[number]
            for place, record in zip(places.tolist(), self._of_shard(number, rows.tolist()), strict=True):
                found[place] = record
        return found

    def _of_shard(self, number: int, rows: list[int]) -> list[bytes]:
        try:
            with self._lock:
                # The reader keeps a position of its own.
                if number not in self._readers:
                    path = self.folder / self.shards[number].file
                    self._readers[number] = ArrayRecordReader(str(path), "readahead_buffer_size:0")
                return self._readers[number].read(rows)
        except (ValueError, RuntimeError, IndexError, OSError) as error:
            told = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(
                f"{self.folder / self.shards[number].file}: damaged ({told}); prepare the data again"
            ) from None

    def __iter__(self) -> Iterator[Product]:
        return (self[index] for index in range(len(self)))

    def __getstate__(self) -> tuple[Path, tuple[Shard, ...]]:
        return self.folder, self.shards

    def __setstate__(self, state: tuple[Path, tuple[Shard, ...]]) -> None:
        self.__init__(*state)


class Chosen(Sequence[Product]):
    """Some products of many, in an order of their own, read when they are asked for."""

    def __init__(self, products: Sequence[Product], indices: Sequence[int], texts: Sequence[str | None] | None = None):
        """`texts`, where given, stand in for the products' own."""
        self._products, self._indices, self._texts = products, indices, texts

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, index: int) -> Product: ...
    @overload
    def __getitem__(self, index: slice) -> list[Product]: ...
    def __getitem__(self, index: int | slice) -> Product | list[Product]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        product = self._products[int(self._indices[index])]
        return product if self._texts is None else dataclasses.replace(product, text=self._texts[index])


def several(products: Sequence[Product], indices: Sequence[int]) -> list[Product]:
    """The products at `indices`; of Records, at once."""
    return products.several(indices) if isinstance(products, Records) else [products[index] for index in indices]


class Triplets(Sequence[Triplet]):
    """Triplets in an array of TRIPLET, which may lie on disk."""

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
