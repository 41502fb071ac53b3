"""The first pass of augment: a unit of products becomes a Parquet file of what might be added to them.

Units are written whole or not at all, and follow from data and options alone. What a model was asked and answered is
kept, answer by answer, until its unit is written: a backend that dies costs nothing that was done.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from moon_jax import interrupt
from moon_jax.augment import chat, editor, images, text
from moon_jax.augment.options import Options
from moon_jax.data.images import BadImage, check_shape, decode
from moon_jax.data.prepared import Prepared, open_prepared
from moon_jax.errors import UserError
from moon_jax.ingest import units
from moon_jax.types import Product

UNIT = 64
"""Products of a unit."""

PROVENANCE = [
    ("product", pa.int32()),  # index into the prepared products
    ("id", pa.string()),
    ("kind", pa.string()),  # text or image
    ("number", pa.int32()),  # among the product's of that kind
    ("operation", pa.string()),  # of an image: background, viewpoint or detail
    ("backend", pa.string()),  # rules, chat, classical or diffusers
    ("model", pa.string()),
    ("prompt", pa.string()),  # the prompt's version
    ("seed", pa.int64()),
    ("reason", pa.string()),  # why it is not added; null if it is
    ("detail", pa.string()),
    ("text", pa.string()),
]
"""What is known of each result, whether it is added or not."""

CANDIDATES = pa.schema([*PROVENANCE, ("image", pa.binary())])

REFUSED, UNREADABLE = "not answered", "bad image"
"""The reasons where a backend did not take a request, or made no image; those of titles are text.FLAWS."""


@functools.lru_cache(maxsize=1)
def opened(data: Path, fingerprint: str) -> Prepared:
    """The prepared data of this fingerprint, opened once in each process.

    Raises:
        UserError: other data lies there now.
    """
    found = open_prepared(data)
    if found.fingerprint != fingerprint:
        raise UserError(f"--data {data}: changed while it was augmented; give the command again")
    return found


def unit_path(work: Path, unit: int) -> Path:
    """The file of a unit."""
    return work / "units" / f"{unit:08}.parquet"


def items(prepared: Prepared, unit: int, size: int) -> range:
    """The products of a unit: of those to train on, which lie first."""
    return prepared.train[unit * size : (unit + 1) * size]


@dataclasses.dataclass(frozen=True)
class Kept:
    """Answers in files, each written whole or not at all."""

    folder: Path

    def __call__(self, name: str, make: Callable[[], bytes]) -> bytes:
        """What was kept under `name`, or else what `make` gives."""
        path = self.folder / hashlib.blake2b(name.encode(), digest_size=12).hexdigest()
        if path.is_file():
            return path.read_bytes()
        answer = make()
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
        temporary.write_bytes(answer)
        temporary.replace(path)
        return answer


@dataclasses.dataclass(frozen=True)
class Generate:
    """Makes units."""

    data: Path
    fingerprint: str  # of the data
    work: Path
    options: Options
    max_pixels: int
    size: int  # products of a unit
    connections: int  # requests to a server at a time; changes nothing of the unit

    def path(self, unit: int) -> Path:
        return unit_path(self.work, unit)

    def done(self, unit: int) -> bool:
        return self.path(unit).is_file()

    def __call__(self, unit: int) -> None:
        prepared = opened(self.data, self.fingerprint)
        chosen = items(prepared, unit, self.size)
        kept = Kept(self.work / "answers" / f"{unit:08}")

        def made(index: int) -> list[dict[str, Any]]:
            interrupt.check()
            product = prepared.products[index]
            found = [*self._text(product, kept), *self._images(product, kept)]
            return [{"product": index, "id": product.id} | one for one in found]

        # Several at a time only where a server is waited for.
        if self.options.asks_server:
            with interrupt.thread_pool(self.connections) as pool:
                results = list(pool.map(made, chosen))
        else:
            results = [made(index) for index in chosen]
        rows = [row for result in results for row in result]
        path = self.path(unit)
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        pq.write_table(pa.Table.from_pylist(rows, CANDIDATES), temporary, compression="none", write_statistics=False)
        temporary.replace(path)
        shutil.rmtree(kept.folder, ignore_errors=True)

    def _seed(self, product: Product, kind: str) -> int:
        return units.number("augment", self.options.seed, product.id, kind) >> 1  # Parquet's int64

    def _text(self, product: Product, kept: Kept) -> Sequence[dict[str, Any]]:
        """A product without a title gets none: it would have a view that it lacks."""
        if self.options.text == "none" or not (product.text and product.text.strip()):
            return ()
        told: dict[str, Any] = {"kind": "text", "number": 0, "operation": "", "seed": 0}
        if not self.options.asks_server:
            title = text.enriched(product)
            told |= {"backend": "rules", "model": "", "prompt": ""}
            return [told | {"text": title, "reason": text.flaw(title, product) or None}] if title else ()
        seed = self._seed(product, "text")
        server = chat.Chat(self.options.text, self.options.text_model)
        told |= {"backend": "chat", "model": server.model, "prompt": chat.PROMPT_VERSION, "seed": seed}

        def ask() -> bytes:
            try:
                answer = {"title": server.answer(_client(server), server.request(product, seed, self.max_pixels))}
            except chat.Refused as refused:
                answer = {"refused": str(refused)}
            return json.dumps(answer).encode()

        answer = json.loads(kept(f"{product.id} text", ask))
        if "refused" in answer:
            return [told | {"text": "", "reason": REFUSED, "detail": answer["refused"]}]
        title = text.cleaned(answer["title"])
        return [
            told | {"text": title, "reason": text.flaw(title, product, _brands(self.work, self.fingerprint)) or None}
        ]

    def _images(self, product: Product, kept: Kept) -> list[dict[str, Any]]:
        if self.options.images == "none" or not product.images or not self.options.expansions:
            return []
        picture = decode(product.images[0], self.max_pixels)
        if min(picture.size) < images.LEAST_SIDE:
            return []
        seed, count = self._seed(product, "image"), self.options.expansions
        told = {"kind": "image", "backend": "classical", "model": "", "prompt": "", "seed": seed}
        if not self.options.asks_pipeline:
            found = images.expand(picture, count, np.random.default_rng(seed))
            return [
                told | {"number": number, "operation": operation, "image": image}
                for number, (operation, image) in enumerate(found)
            ]
        pipeline = editor.Editor(self.options.images, self.options.image_steps)
        told |= {"backend": "diffusers", "model": pipeline.model, "prompt": editor.PROMPT_VERSION}
        edited = editor.expand(
            lambda *given: _edit(pipeline, *given),
            picture,
            product.text or "",
            count,
            seed,
            lambda name, make: kept(f"{product.id} image {name}", make),
        )
        return [
            told | _checked(image, self.max_pixels) | {"number": number, "operation": operation, "seed": own}
            for number, (operation, own, image) in enumerate(edited)
        ]


def _checked(image: bytes, max_pixels: int) -> dict[str, Any]:
    """An image that a model made, and a reason if training could not read it."""
    try:
        picture = decode(image, max_pixels)
        check_shape(picture.height, picture.width)
    except BadImage as bad:
        return {"image": image, "reason": UNREADABLE, "detail": str(bad)}
    return {"image": image}


@functools.cache
def _client(server: chat.Chat) -> Any:
    return server.client()


_ONE_AT_A_TIME = threading.Lock()
"""A pipeline has a state, and fills the device."""


def _edit(pipeline: editor.Editor, *given: Any) -> Any:
    with _ONE_AT_A_TIME:
        return _loaded(pipeline, pipeline.signature())(*given)


@functools.lru_cache(maxsize=1)
def _loaded(pipeline: editor.Editor, signature: str) -> Any:
    del signature
    return pipeline.load()


BRANDS = "brands.json"
"""In the work folder: the brands of the catalogue."""


@functools.lru_cache(maxsize=1)
def _brands(work: Path, fingerprint: str) -> frozenset[str]:
    del fingerprint
    return frozenset(json.loads((work / BRANDS).read_text(encoding="utf-8")))


def check(options: Options) -> None:
    """Tells at once what would fail later.

    Raises:
        UserError: an option that cannot be, or what is not installed.
    """
    if options.expansions < 0 or options.image_steps < 0:
        raise UserError("--expansions and --image-steps: give 0 or more")
    if not 0 <= options.quantile < 1:
        raise UserError(f"--quantile {options.quantile:g}: give a share from 0 to below 1")
    given = (("--image-steps", options.image_steps, options.asks_pipeline, "a diffusers pipeline as --images"),)
    given += (("--quantile", options.quantile != Options.quantile, options.model, "an embedder as --model"),)
    for flag, asked, wanted, what in given:
        if asked and not wanted:
            raise UserError(f"{flag}: wants {what}")
    if options.text == "none" and (options.images == "none" or not options.expansions):
        raise UserError("--text none --images none: nothing to do")
    if options.asks_server:
        chat.check(options.text, options.text_model)
    elif options.text_model:
        raise UserError("--text-model: names a server's model; give the server's URL as --text")
    if options.images == "classical":
        images.check()
    elif options.asks_pipeline:
        editor.check(options.images)
