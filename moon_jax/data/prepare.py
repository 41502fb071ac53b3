"""From a catalogue to what training and evaluation read: products, triplets as indices, splits, a manifest.

Whatever is filtered is filtered here, so that the training batch stays a function of (seed, step).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from moon_jax import config as config_lib
from moon_jax.config import UserError
from moon_jax.data import sources, triplets
from moon_jax.data.images import BadImage, ResizeRule, decode
from moon_jax.interrupt import thread_pool
from moon_jax.types import Product, Triplet


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A catalogue ready for use. Indices point into `products`."""

    products: list[Product]
    group: np.ndarray  # i32[products]: number of the title group, -1 without a title
    triplets: list[Triplet]  # training
    train: list[int]  # training products
    val: list[int]  # candidates of the evaluation
    val_queries: list[tuple[int, int]]  # query, the product it seeks
    quarantine: list[sources.Quarantined]  # by file and number
    synthetic: bool  # rendered, not sold
    fingerprint: str  # of products, split and triplets

    def save(self, folder: Path, workdir: object) -> None:
        """Writes manifest.json, triplets.parquet and quarantine.jsonl; the products stay where they are.

        Args:
            workdir: whose folder it is, for errors.

        Raises:
            UserError: the folder holds the manifest of other data.
        """
        manifest = {
            "fingerprint": self.fingerprint,
            "synthetic": self.synthetic,
            "products": len(self.products),
            "train": len(self.train),
            "val": len(self.val),
            "val_queries": len(self.val_queries),
            "triplets": len(self.triplets),
            "triplets_without_negative": sum(t.negative is None for t in self.triplets),
            "without_text": sum(p.text is None for p in self.products),
            "without_image": sum(not p.images for p in self.products),
            "quarantined": dict(sorted(Counter(entry.reason for entry in self.quarantine).items())),
        }
        path = folder / "manifest.json"
        if path.exists():
            held = json.loads(path.read_text(encoding="utf-8"))
            if held["fingerprint"] != self.fingerprint:
                raise UserError(
                    f"--workdir {workdir}: holds a run on other data than is given now;"
                    " take another workdir, or remove this one"
                )
            return
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "quarantine.jsonl").open("w", encoding="utf-8") as file:
            for entry in self.quarantine:
                file.write(json.dumps(dataclasses.asdict(entry)) + "\n")
        columns = zip(*self.triplets, strict=True)
        kinds = (pa.int64(), pa.int64(), pa.int64(), pa.float32())
        arrays = [pa.array(column, kind) for column, kind in zip(columns, kinds, strict=True)]
        table = pa.table(arrays, names=list(Triplet._fields), metadata={"synthetic": str(self.synthetic).lower()})
        pq.write_table(table, folder / "triplets.parquet")
        # The manifest comes last: where it stands, the rest is whole.
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        temporary.replace(path)


def _verify(product: Product, rule: ResizeRule) -> tuple[str, bytes]:
    """Decodes all images. Returns why the product cannot be used (or nothing), and a digest of its content."""
    labels = (product.category, product.brand, sorted(product.attributes.items()))
    digest = hashlib.blake2b(repr((product.id, product.text, labels)).encode(), digest_size=16)
    for number, image in enumerate(product.images, start=1):
        which = f"image {number}: " if isinstance(image, bytes) else f"{image}: "
        try:
            content = image if isinstance(image, bytes) else image.read_bytes()
            digest.update(content)
            picture = decode(content, rule.source_pixels)
            rule.check(picture.height, picture.width)
        except OSError as error:
            return f"{which}{error.strerror or error}", digest.digest()
        except BadImage as error:
            return f"{which}{error}", digest.digest()
    return "", digest.digest()


def _title_groups(products: Sequence[Product]) -> np.ndarray:
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(p.group, len(numbers)) if p.group else -1 for p in products], np.int32)


def _split(products: Sequence[Product], fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Train and val indices. A title group (a lone product, if it has no title) goes to one side, by a hash of it."""

    def key(product: Product) -> str:
        return product.group or f"id {product.id}"

    def order(name: str) -> bytes:
        return hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest()

    groups = sorted({key(product) for product in products}, key=order)
    held_out = set(groups[: max(1, round(fraction * len(groups)))])
    sides: tuple[list[int], list[int]] = [], []
    for index, product in enumerate(products):
        sides[key(product) in held_out].append(index)
    return sides


def prepare(
    config: config_lib.Config,
    track: Callable[[Iterable, int], Iterable] = lambda work, total: work,
    catalogue: sources.Catalogue | None = None,
) -> Prepared:
    """Reads and verifies `config.data.path`, and makes the training triplets.

    Args:
        track: wraps the iterable of verified records, whose number it is told, to show progress.
        catalogue: what that path holds, if it was read already.

    Raises:
        UserError: nothing is left to train on or to find.
    """
    catalogue = catalogue or sources.read(config.data.path)
    parts = ("products", "train", "val", "train_queries", "val_queries")
    everything = [(part, record) for part in parts for record in getattr(catalogue, part)]
    rule = ResizeRule.of(config)
    quarantine, digests = list(catalogue.quarantine), hashlib.blake2b(digest_size=16)
    products: list[Product] = []
    kept: dict[str, list[tuple[int, sources.Record]]] = {part: [] for part in parts}

    def leave_out(record: sources.Record, reason: str, detail: str) -> None:
        quarantine.append(sources.Quarantined(record.file, record.number, record.product.id, reason, detail))

    with thread_pool(config.data.threads) as pool:
        found = pool.map(lambda item: _verify(item[1].product, rule), everything)
        for (part, record), (problem, digest) in track(zip(everything, found, strict=True), len(everything)):
            digests.update(digest)
            if problem:
                leave_out(record, "bad image", problem)
            else:
                kept[part].append((len(products), record))
                products.append(record.product)

    train, val, whole = ([index for index, _ in kept[part]] for part in ("train", "val", "products"))
    if not val and not kept["val_queries"]:
        # Nothing is kept apart: a part of the titles is. Else all that has no split of its own is for training.
        split = whole or train
        train = train if whole else []
        for side, chosen in zip(
            (train, val), _split([products[i] for i in split], config.data.val_fraction, config.seed), strict=True
        ):
            side += [split[index] for index in chosen]
    else:
        train = train + whole
    val = val or train

    def pairs(part: str, side: list[int]) -> list[tuple[int, int]]:
        """Queries with what they seek; those that seek nothing on their side of the split are left out."""
        place, made = {products[index].id: index for index in side}, []
        for index, record in kept[part]:
            if record.target in place:
                made.append((index, place[record.target]))
            else:
                leave_out(record, "unknown product", f"no usable product {record.target} on its side of the split")
        return made

    train_queries, val_queries = pairs("train_queries", train), pairs("val_queries", val)
    if not train or not val:
        side = "train on" if not train else "evaluate on"
        raise UserError(
            f"--data {config.data.path}: no product left to {side}; at least two different titles are needed;"
            f" {sources.summary(quarantine) or 'nothing was left out'}"
        )
    if not any(products[index].text and products[index].images for index in train):
        raise UserError(f"--data {config.data.path}: no product to train on has both a title and an image")
    made = triplets.from_catalogue(products, train, train_queries, config.seed)
    digests.update(repr((train, val, val_queries, made)).encode())
    return Prepared(
        products=products,
        group=_title_groups(products),
        triplets=made,
        train=train,
        val=val,
        val_queries=val_queries,
        quarantine=sorted(quarantine, key=lambda entry: (entry.file, entry.number)),
        synthetic=catalogue.synthetic,
        fingerprint=digests.hexdigest(),
    )
