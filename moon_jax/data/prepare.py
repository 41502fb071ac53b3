"""From a catalogue to what training and evaluation read: products, triplets as indices, splits, a manifest.

Whatever is filtered is filtered here, so that the training batch stays a function of (seed, step).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from moon_jax import config as config_lib
from moon_jax.config import UserError
from moon_jax.data import sources, triplets
from moon_jax.data.images import BadImage, ResizeRule, decode
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
    quarantine: list[sources.Quarantined]
    fingerprint: str  # of all of the above

    def save(self, folder: Path) -> None:
        """Writes manifest.json, triplets.parquet and quarantine.jsonl; the products stay where they are.

        Raises:
            UserError: the folder holds the manifest of other data.
        """
        manifest = {
            "fingerprint": self.fingerprint,
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
                raise UserError(f"{folder}: made from other data than is given now; take another workdir")
            return
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "quarantine.jsonl").open("w", encoding="utf-8") as file:
            for entry in self.quarantine:
                file.write(json.dumps(dataclasses.asdict(entry), ensure_ascii=False) + "\n")
        columns = zip(*self.triplets, strict=True)
        kinds = (pa.int64(), pa.int64(), pa.int64(), pa.float32())
        arrays = [pa.array(column, kind) for column, kind in zip(columns, kinds, strict=True)]
        pq.write_table(pa.table(arrays, names=list(Triplet._fields)), folder / "triplets.parquet")
        # The manifest comes last: where it stands, the rest is whole.
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        temporary.replace(path)


def _verify(product: Product, rule: ResizeRule) -> tuple[str, bytes]:
    """Decodes all images. Returns why the product cannot be used (or nothing), and a digest of its content."""
    digest = hashlib.blake2b(repr((product.id, product.text, product.category)).encode(), digest_size=16)
    for image in product.images:
        try:
            content = image if isinstance(image, bytes) else image.read_bytes()
            digest.update(content)
            picture = decode(content, rule.source_pixels)
            rule.size(picture.height, picture.width)
        except OSError as error:
            return f"{image}: {error.strerror}", digest.digest()
        except BadImage as error:
            return str(error), digest.digest()
    return "", digest.digest()


def _title_groups(products: Sequence[Product]) -> np.ndarray:
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(p.group, len(numbers)) if p.group else -1 for p in products], np.int32)


def _split(products: Sequence[Product], fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Train and val indices. A title group (a lone product, if it has no title) goes to one side, by a hash of it."""

    def held_out(product: Product) -> bool:
        key = hashlib.blake2b(f"{seed} {product.group or product.id}".encode(), digest_size=8).digest()
        return int.from_bytes(key, "big") < fraction * 2**64

    val = [index for index, product in enumerate(products) if held_out(product)]
    kept = set(val)
    return [index for index in range(len(products)) if index not in kept], val


def prepare(
    config: config_lib.Config, track: Callable[[Iterable, int], Iterable] = lambda work, total: work
) -> Prepared:
    """Reads and verifies `config.data.path`, and makes the training triplets.

    Args:
        track: wraps the iterable of verified records, whose number it is told, to show progress.

    Raises:
        UserError: nothing is left to train on or to find.
    """
    catalogue = sources.read(config.data.path)
    parts = {
        "products": catalogue.products,
        "train": catalogue.train,
        "val": catalogue.val,
        "train_queries": [query.product for query in catalogue.train_queries],
        "val_queries": [query.product for query in catalogue.val_queries],
    }
    everything = [(part, number) for part, members in parts.items() for number in range(len(members))]
    rule = ResizeRule.of(config)
    quarantine, digests = list(catalogue.quarantine), hashlib.blake2b(digest_size=16)
    products: list[Product] = []
    place: dict[tuple[str, int], int] = {}
    with ThreadPoolExecutor(config.data.threads) as pool:
        found = pool.map(lambda key: _verify(parts[key[0]][key[1]], rule), everything)
        for key, (problem, digest) in track(zip(everything, found, strict=True), len(everything)):
            product = parts[key[0]][key[1]]
            digests.update(digest)
            if problem:
                quarantine.append(sources.Quarantined(key[0], product.id, "bad image", problem))
            else:
                place[key] = len(products)
                products.append(product)

    def indices(part: str) -> list[int]:
        return [place[part, number] for number in range(len(parts[part])) if (part, number) in place]

    train, val = indices("train"), indices("val")
    if whole := indices("products"):
        if catalogue.val_queries or val:
            train += whole  # queries, or a split of its own, judge it
        else:
            chosen = [products[index] for index in whole]
            kept, held_out = _split(chosen, config.data.val_fraction, config.seed)
            train += [whole[index] for index in kept]
            val += [whole[index] for index in held_out]
    if not val and catalogue.val_queries:
        val = train
    elif not val:
        kept, held_out = _split([products[index] for index in train], config.data.val_fraction, config.seed)
        train, val = [train[index] for index in kept], [train[index] for index in held_out]

    by_id = {products[index].id: index for index in [*train, *val]}

    def pairs(part: str, queries: list[sources.Query]) -> list[tuple[int, int]]:
        made = []
        for number, query in enumerate(queries):
            if (part, number) not in place:
                continue
            if query.target not in by_id:
                detail = f"no usable product {query.target}"
                quarantine.append(sources.Quarantined(part, query.product.id, "unknown product", detail))
                continue
            made.append((place[part, number], by_id[query.target]))
        return made

    train_queries = pairs("train_queries", catalogue.train_queries)
    val_queries = pairs("val_queries", catalogue.val_queries)
    if not train or not val:
        side = "train on" if not train else "evaluate on"
        raise UserError(f"--data {config.data.path}: no product left to {side} ({len(quarantine)} quarantined)")
    made = triplets.from_catalogue(products, train, train_queries, config.seed)
    digests.update(repr((train, val, val_queries, made)).encode())
    return Prepared(
        products=products,
        group=_title_groups(products),
        triplets=made,
        train=train,
        val=val,
        val_queries=val_queries,
        quarantine=quarantine,
        fingerprint=digests.hexdigest(),
    )
