"""The first pass of augment: writes the candidate titles and images of each unit of products to a Parquet file.

Units are written atomically and depend on data and options alone. Each answer of a model is stored until its unit is
written, so no finished work is lost if a backend dies.
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
from moon_jax.augment import chat, editor, text
from moon_jax.augment.options import Options
from moon_jax.data import editing
from moon_jax.data.images import BadImage, check_shape, decode
from moon_jax.data.prepared import Prepared, open_prepared
from moon_jax.errors import UserError
from moon_jax.ingest import units
from moon_jax.types import Product

UNIT = 64
"""Products per unit."""

PROVENANCE = [
    ("product", pa.int32()),  # index into the prepared products
    ("id", pa.string()),
    ("kind", pa.string()),  # text or image
    ("number", pa.int32()),  # index among the product's results of this kind
    ("operation", pa.string()),  # of an image: background, viewpoint or detail
    ("backend", pa.string()),  # rules, chat, classical or diffusers
    ("model", pa.string()),
    ("prompt", pa.string()),  # the prompt's version
    ("seed", pa.int64()),
    ("reason", pa.string()),  # why it is not added; null if it is
    ("detail", pa.string()),
    ("text", pa.string()),
]
"""The columns for every result, added or not."""

CANDIDATES = pa.schema([*PROVENANCE, ("image", pa.binary())])

REFUSED, UNREADABLE = "not answered", "bad image"
"""The reasons if a backend refused a request or returned an unreadable image; those for titles are text.FLAWS."""


@functools.lru_cache(maxsize=1)
def opened(data: Path, fingerprint: str) -> Prepared:
    """The prepared data with this fingerprint, opened once per process.

    Raises:
        UserError: the folder now holds other data.
    """
    found = open_prepared(data)
    if found.fingerprint != fingerprint:
        raise UserError(f"--data {data}: changed while it was augmented; run the command again")
    return found


def unit_path(work: Path, unit: int) -> Path:
    """The file of a unit."""
    return work / "units" / f"{unit:08}.parquet"


def items(prepared: Prepared, unit: int, size: int) -> range:
    """The products of a unit. Only training products have units; they come first in the data."""
    return prepared.train[unit * size : (unit + 1) * size]


@dataclasses.dataclass(frozen=True)
class AnswerCache:
    """Answers in files, each written atomically."""

    folder: Path

    def __call__(self, name: str, make: Callable[[], bytes]) -> bytes:
        """The bytes stored under `name`; if there are none, the result of `make`, which is then stored."""
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
    """Generates units."""

    data: Path
    fingerprint: str  # of the data
    work: Path
    options: Options
    max_pixels: int
    size: int  # products per unit
    connections: int  # concurrent requests to a server; does not change the result

    def path(self, unit: int) -> Path:
        return unit_path(self.work, unit)

    def done(self, unit: int) -> bool:
        return self.path(unit).is_file()

    def __call__(self, unit: int) -> None:
        prepared = opened(self.data, self.fingerprint)
        chosen = items(prepared, unit, self.size)
        cache = AnswerCache(self.work / "answers" / f"{unit:08}")

        def results_of(index: int) -> list[dict[str, Any]]:
            interrupt.check()
            product = prepared.products[index]
            found = [*self._text(product, cache), *self._images(product, cache)]
            return [{"product": index, "id": product.id} | one for one in found]

        # Threads help only while waiting for a server.
        if self.options.uses_server:
            with interrupt.thread_pool(self.connections) as pool:
                results = list(pool.map(results_of, chosen))
        else:
            results = [results_of(index) for index in chosen]
        rows = [row for result in results for row in result]
        path = self.path(unit)
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        pq.write_table(pa.Table.from_pylist(rows, CANDIDATES), temporary, compression="none", write_statistics=False)
        temporary.replace(path)
        shutil.rmtree(cache.folder, ignore_errors=True)

    def _seed(self, product: Product, kind: str) -> int:
        return units.number("augment", self.options.seed, product.id, kind) >> 1  # Parquet's int64

    def _text(self, product: Product, cache: AnswerCache) -> Sequence[dict[str, Any]]:
        """The row of the enriched title. A product without a title gets none: that would give it a text view."""
        if self.options.text == "none" or not (product.text and product.text.strip()):
            return ()
        row: dict[str, Any] = {"kind": "text", "number": 0, "operation": "", "seed": 0}
        if not self.options.uses_server:
            title = text.enriched(product)
            row |= {"backend": "rules", "model": "", "prompt": ""}
            return [row | {"text": title, "reason": text.flaw(title, product) or None}] if title else ()
        seed = self._seed(product, "text")
        server = chat.Chat(self.options.text, self.options.text_model)
        row |= {"backend": "chat", "model": server.model, "prompt": chat.PROMPT_VERSION, "seed": seed}

        def request() -> bytes:
            try:
                answer = {"title": server.answer(_client(server), server.request(product, seed, self.max_pixels))}
            except chat.Refused as refused:
                answer = {"refused": str(refused)}
            return json.dumps(answer).encode()

        answer = json.loads(cache(f"{product.id} text", request))
        if "refused" in answer:
            return [row | {"text": "", "reason": REFUSED, "detail": answer["refused"]}]
        title = text.cleaned(answer["title"])
        return [
            row | {"text": title, "reason": text.flaw(title, product, _brands(self.work, self.fingerprint)) or None}
        ]

    def _images(self, product: Product, cache: AnswerCache) -> list[dict[str, Any]]:
        if self.options.images == "none" or not product.images or not self.options.expansions:
            return []
        picture = decode(product.images[0], self.max_pixels)
        if min(picture.size) < editing.LEAST_SIDE:
            return []
        seed, count = self._seed(product, "image"), self.options.expansions
        row = {"kind": "image", "backend": "classical", "model": "", "prompt": "", "seed": seed}
        if not self.options.uses_pipeline:
            found = editing.expand(picture, count, np.random.default_rng(seed))
            return [
                row | {"number": number, "operation": operation, "image": image}
                for number, (operation, image) in enumerate(found)
            ]
        pipeline = editor.Editor(self.options.images, self.options.image_steps)
        row |= {"backend": "diffusers", "model": pipeline.model, "prompt": editor.PROMPT_VERSION}
        edited = editor.expand(
            lambda *arguments: _edit(pipeline, *arguments),
            picture,
            product.text or "",
            count,
            seed,
            lambda name, make: cache(f"{product.id} image {name}", make),
        )
        return [
            row | _checked(image, self.max_pixels) | {"number": number, "operation": operation, "seed": own}
            for number, (operation, own, image) in enumerate(edited)
        ]


def _checked(image: bytes, max_pixels: int) -> dict[str, Any]:
    """The columns of a generated image, with a reason if training could not read it."""
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
"""A pipeline is stateful and fills the device."""


def _edit(pipeline: editor.Editor, *arguments: Any) -> Any:
    with _ONE_AT_A_TIME:
        return _loaded(pipeline, pipeline.signature())(*arguments)


@functools.lru_cache(maxsize=1)
def _loaded(pipeline: editor.Editor, signature: str) -> Any:
    del signature
    return pipeline.load()


BRANDS = "brands.json"
"""The file of the work folder that lists the catalogue's brands."""


@functools.lru_cache(maxsize=1)
def _brands(work: Path, fingerprint: str) -> frozenset[str]:
    del fingerprint
    return frozenset(json.loads((work / BRANDS).read_text(encoding="utf-8")))


def check(options: Options) -> None:
    """Checks options and installed packages before any work starts.

    Raises:
        UserError: an option is invalid, or a package that it needs is not installed.
    """
    if options.expansions < 0 or options.image_steps < 0:
        raise UserError("--expansions and --image-steps: give 0 or more")
    if not 0 <= options.quantile < 1:
        raise UserError(f"--quantile {options.quantile:g}: give a share from 0 to below 1")
    needs = (("--image-steps", options.image_steps, options.uses_pipeline, "a diffusers pipeline as --images"),)
    needs += (("--quantile", options.quantile != Options.quantile, options.model, "an embedder as --model"),)
    for flag, is_set, available, what in needs:
        if is_set and not available:
            raise UserError(f"{flag}: needs {what}")
    if options.text == "none" and (options.images == "none" or not options.expansions):
        raise UserError("--text none --images none: nothing to do")
    if options.uses_server:
        chat.check(options.text, options.text_model)
    elif options.text_model:
        raise UserError("--text-model: names a server's model; give the server's URL as --text")
    if options.uses_pipeline:
        editor.check(options.images)
