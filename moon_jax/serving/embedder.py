"""The embedder that a user loads and calls: products in, unit vectors out."""

from __future__ import annotations

import collections
import contextlib
import copy
import dataclasses
import functools
import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import load_file

from moon_jax import backend, interrupt, sharding, similarity, storage
from moon_jax import config as config_lib
from moon_jax.data import rows as rows_lib
from moon_jax.data.images import BadImage
from moon_jax.data.pipeline import Alteration, Reader
from moon_jax.data.text import Tokenizer
from moon_jax.errors import UserError
from moon_jax.hub import folder as folder_lib
from moon_jax.hub import weights
from moon_jax.hub.export import Trained
from moon_jax.model.encoder import Encoder
from moon_jax.training import checkpoints
from moon_jax.training.step import initial_state
from moon_jax.types import VIEWS, Array, Product, Rows

BATCHES = (1, 8)
"""Batch sizes compiled in addition to the largest."""

AHEAD = 3
"""Batches read ahead while the device works."""


def as_product(item: Any) -> Product:
    """Converts a Product, a string (the text), or {"text": …, "image": …} (or "images", a list) into a Product.

    Raises:
        UserError: the item has another type, an unknown key, or a text that is not a string.
    """
    if isinstance(item, str):
        return Product(text=item)
    if isinstance(item, dict):
        unknown = set(item) - {"text", "image", "images"}
        if unknown:
            raise UserError(f'{sorted(unknown)[0]!r}: unknown key; use "text", "image" or "images"')
        images = item.get("image") if item.get("image") is not None else item.get("images")
        item = Product(text=item.get("text"), images=() if images is None else images)
    if isinstance(item, Product):
        if item.text is not None and not isinstance(item.text, str):
            raise UserError(f"text: {item.text!r} is of type {type(item.text).__name__}; give a string")
        images = item.images if isinstance(item.images, list | tuple) else (item.images,)
        return dataclasses.replace(item, text=(item.text or "").strip() or None, images=tuple(images))
    raise UserError(f"an item of type {type(item).__name__} cannot be embedded; give a Product, a string or a dict")


class Embedder:
    """A trained model. Vectors are float32 rows of unit length, compared by dot product.

    The vector of a product does not depend on the other products of its batch.
    """

    def __init__(
        self,
        config: config_lib.Config,
        params: Any,
        tokenizer: Tokenizer,
        fingerprint: str,
        step: int,
        mesh: jax.sharding.Mesh | None = None,
    ):
        """
        Args:
            params: parameters of the encoder.
            step: number of training steps.
            fingerprint: hash of weights and tokenizer; vectors with equal fingerprints are in the same space.
            mesh: the devices of the parameters, if there are several. Every process that holds a part of them must make
                the same calls.
        """
        self.config = config
        self.fingerprint = fingerprint
        self.step = step
        self.name = f"moon_jax {fingerprint}"
        self.seconds = {"data": 0.0, "device": 0.0}  # time spent waiting for batches and for the device
        # Resizes images by Qwen's own rule, so that vectors equal those of the exported model in any server.
        self.reader = Reader(self.config, tokenizer, within_budget=False)
        self._params = params
        encoder = Encoder(self.config)
        self._mesh = mesh
        with self._placed():
            self._encode = jax.jit(
                lambda params, rows: encoder.apply({"params": params}, rows).embedding,
                out_shardings=NamedSharding(mesh, PartitionSpec()) if mesh else None,
                compiler_options=backend.compiler_options(),
            )

    @property
    def template(self) -> str:
        """The name of the template around a view's text and images (`data.template`)."""
        return self.config.data.template

    @property
    def pooling(self) -> str:
        """How hidden states are pooled into a view's embedding (`language.pooling`)."""
        return self.config.language.pooling

    def on_all_devices(self) -> Embedder:
        """The same embedder with parameters replicated and rows split over all devices of this process."""
        devices = jax.local_devices()
        if len(devices) == 1 or self._mesh:
            return self
        mesh = sharding.make_mesh(config_lib.Mesh(), devices)
        params = jax.device_put(self._params, NamedSharding(mesh, PartitionSpec()))
        return Embedder(self.config, params, self.reader.tokenizer, self.fingerprint, self.step, mesh)

    def _placed(self) -> contextlib.AbstractContextManager:
        return jax.set_mesh(self._mesh) if self._mesh else contextlib.nullcontext()

    def of(self, params: Any) -> Embedder:
        """The same embedder with other parameters; does not compile again."""
        other = copy.copy(self)
        other._params = params
        return other

    @property
    def dimension(self) -> int:
        """D, the width of a vector."""
        return self.config.language.width

    def encode(
        self,
        items: Iterable[Any] | Any,
        *,
        batch_size: int | None = None,
        truncate_dim: int | None = None,
        advance: Callable[[int], None] = lambda count: None,
    ) -> np.ndarray:
        """One vector per item, from everything it has: text, images, or both.

        Args:
            items: one item or an iterable of items: Products, strings, or dicts with "text" and "image" (a path, bytes
                or a PIL image).
            batch_size: rows encoded at once; `config.evaluation.batch` by default.
            truncate_dim: keeps the first `truncate_dim` dimensions, normalized to unit length again.
            advance: called with the number of items done since the last call.

        Returns:
            f32[items,D], or f32[items,truncate_dim].

        Raises:
            UserError: an item is empty, of a wrong type, or has an unreadable image (the error names it); or
                `truncate_dim` is out of range.
        """
        if isinstance(items, str | dict | Product):
            items = [items]
        elif isinstance(items, bytes) or not isinstance(items, Iterable):
            kind = type(items).__name__
            raise UserError(
                f'an item of type {kind} cannot be embedded; give {{"image": …}}, a Product, a string or a list'
            )
        items = list(items)
        products = []
        for number, item in enumerate(items):
            try:
                products.append(as_product(item))
            except UserError as error:
                raise UserError(f"item {number}: {error}") from None
        if truncate_dim is not None and not 1 <= truncate_dim <= self.dimension:
            raise UserError(f"truncate_dim={truncate_dim}: must be between 1 and {self.dimension}")

        def read(number: int) -> list[rows_lib.Segment]:
            try:
                return self._richest(products[number])
            except UserError as error:
                raise UserError(f"item {number}: {error}") from None

        vectors = np.zeros((len(products), self.dimension), np.float32)
        # Rows without patches are a separate program, which skips the vision tower for text-only items.
        for with_images in (False, True):
            chosen = [n for n, product in enumerate(products) if bool(product.images) == with_images]
            layout = rows_lib.Layout.of(self.config, self.reader.template, with_images, all_views=False)
            embeddings = self._run(chosen, read, layout, batch_size, advance)
            # A row has one view; absent views are zero.
            vectors[chosen] = embeddings.sum(axis=1)
        return np.asarray(similarity.truncate(vectors, truncate_dim or self.dimension))

    def states(self, item: Any) -> tuple[Rows, dict[str, Any]]:
        """One item's row, as `encode` packs it, and the network's intermediate values.

        Returns:
            The row (R = 1) as numpy arrays, and the encoder's collection "intermediates"; model/language.py and
            model/encoder.py document its contents.

        Raises:
            UserError: see `encode`.
        """
        product = as_product(item)
        segments = self._richest(product)
        layout = rows_lib.Layout.of(self.config, self.reader.template, bool(product.images), all_views=False)
        rows = rows_lib.pack([[segments]], layout.holding([segments]), self.reader.tokenizer.pad)
        encoder = Encoder(self.config)
        apply = jax.jit(lambda params, rows: encoder.apply({"params": params}, rows, mutable=["intermediates"])[1])
        return rows, jax.device_get(apply(self._params, rows)["intermediates"])

    def _richest(self, product: Product) -> list[rows_lib.Segment]:
        """The segments of the richest view of a product: mm, or else i or t.

        Raises:
            UserError: it has neither text nor image, or an image cannot be read.
        """
        richest = "mm" if product.text and product.images else "i" if product.images else "t"
        try:
            segments = self.reader.read(product, (richest,))
        except BadImage as error:
            raise UserError(f"image: {error}") from None
        if not segments:
            raise UserError("neither text nor image; give one")
        return segments

    # Queries and documents share one encoder; retrieval code expects these two names.
    encode_query = encode
    encode_document = encode

    @staticmethod
    def similarity(queries: np.ndarray, documents: np.ndarray) -> np.ndarray:
        """Cosine similarities f32[Q,C] of unit vectors f32[Q,D] and f32[C,D].

        Raises:
            UserError: their widths differ.
        """
        queries, documents = np.asarray(queries), np.asarray(documents)
        if queries.shape[-1] != documents.shape[-1]:
            raise UserError(f"vectors of width {queries.shape[-1]} and {documents.shape[-1]}: the widths must be equal")
        return queries @ documents.T

    def encode_views(
        self,
        products: Sequence[Product],
        alteration: Alteration | None = None,
        seed: int = 0,
        advance: Callable[[int], None] = lambda count: None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """The three views of each product.

        Args:
            alteration: how each product is altered; the draws depend on `seed` and the index of the product only.
            advance: called with the number of products done since the last call.

        Returns:
            f32[products,3,D], zero for absent views, and bool[products,3], which views are present.

        Raises:
            UserError: an image cannot be read; the error names the product.
        """

        def read(number: int) -> list[rows_lib.Segment]:
            rng = np.random.default_rng((seed, number))
            try:
                return self.reader.read(products[number], VIEWS, alteration, rng)
            except BadImage as error:
                raise UserError(f"product {products[number].id}: image: {error}") from None

        layout = rows_lib.Layout.of(self.config, self.reader.template)
        vectors = self._run(range(len(products)), read, layout, None, advance)
        return vectors, np.any(vectors != 0, axis=-1)

    def _run(
        self,
        numbers: Sequence[int],
        read: Callable[[int], list[rows_lib.Segment]],
        layout: rows_lib.Layout,
        batch_size: int | None,
        advance: Callable[[int], None],
    ) -> np.ndarray:
        """f32[numbers,G,D]; one product per row, in batches of a few sizes padded with empty rows."""
        largest = batch_size or self.config.evaluation.batch
        with self._placed():
            parts = sharding.shards()  # all get equally many rows
        wanted = (*(size for size in BATCHES if size < largest), largest)
        sizes = sorted({-(-size // parts) * parts for size in wanted})
        results = [np.zeros((0, len(VIEWS), self.dimension), np.float32)]

        def packed(start: int, pool: ThreadPoolExecutor) -> Rows:
            segments = list(pool.map(read, numbers[start : start + largest]))
            size = next(size for size in sizes if size >= len(segments))
            rows = [[parts] for parts in segments] + [[]] * (size - len(segments))
            return rows_lib.pack(rows, layout.holding(segments), self.reader.tokenizer.pad)

        starts = range(0, len(numbers), largest)
        with ThreadPoolExecutor(self.config.data.threads) as pool, ThreadPoolExecutor(1) as packer:
            # Batches are read ahead, and the next one is sent to the device before the last one's vectors are fetched.
            ahead = collections.deque(packer.submit(packed, start, pool) for start in starts[:AHEAD])
            running: collections.deque[tuple[int, Array]] = collections.deque()
            try:
                for number, start in enumerate(starts):
                    interrupt.check()
                    with self._timed("data"):
                        rows = ahead.popleft().result()
                    if number + AHEAD < len(starts):
                        ahead.append(packer.submit(packed, starts[number + AHEAD], pool))
                    with self._timed("device"), self._placed():
                        rows = sharding.spread(self._mesh, rows) if self._mesh else rows
                        running.append((min(largest, len(numbers) - start), self._encode(self._params, rows)))
                        if number:
                            self._fetch(running, results, advance)
                with self._timed("device"):
                    while running:
                        self._fetch(running, results, advance)
            finally:
                for future in ahead:
                    future.cancel()
        return np.concatenate(results)

    @staticmethod
    def _fetch(
        running: collections.deque[tuple[int, Array]], results: list[np.ndarray], advance: Callable[[int], None]
    ) -> None:
        count, vectors = running.popleft()
        results.append(np.asarray(vectors)[:count])
        advance(count)

    @contextlib.contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.seconds[what] += time.monotonic() - began


def load(model: str | Path, options: dict[str, Any] | None = None) -> Embedder:
    """Loads an Embedder from a workdir, a Hugging Face folder, or hf://owner/name.

    Args:
        model: the workdir of a run; a folder that `moon-jax export` wrote; or public weights of Qwen3-VL, dense or with
            experts, or of Qwen3-VL-Embedding, with pooling and template from the folder.
        options: changes to the model's config by dotted name, such as {"training.dtype": "bfloat16",
            "training.param_dtype": "bfloat16", "data.visual_tokens": 512}.

    Raises:
        UserError: there is no model, or moon_jax cannot read it; the error says why.
    """
    trained = read(model, options)
    tokenizer = Tokenizer.load(trained.tokenizer)
    return Embedder(trained.config, trained.encoder, tokenizer, trained.fingerprint, trained.step)


def read(
    model: str | Path,
    options: dict[str, Any] | None = None,
    track: Callable[[Iterable, int], Iterable] = lambda work, total: work,
) -> Trained:
    """Everything that a workdir or a Hugging Face folder contains of a model; the parameters are on the first device.

    Args, raises: see `load`.
        track: shows progress: (iterable over a folder's leaves, their number) → the same iterable.
    """
    if str(model).startswith(folder_lib.HUB) or folder_lib.is_folder(Path(model)):
        return _from_folder(str(model), options or {}, track)
    if storage.is_address(model) and not storage.is_remote(model):
        raise UserError(f"{model}: {folder_lib.missing_model(str(model))}; give a workdir or a Hugging Face folder")
    return _from_workdir(folder_lib.run_at(model) or storage.Store(model), options or {})


def _from_workdir(store: storage.Store, options: dict[str, Any]) -> Trained:
    workdir = store.files
    if not workdir.is_dir():
        raise UserError(f"{workdir}: {folder_lib.missing_model(str(workdir))}; give a workdir or a Hugging Face folder")
    missing = [name for name in ("config.json", "tokenizer.json") if not (workdir / name).is_file()]
    if missing:
        within = (workdir.parent / missing[0]).is_file()
        hint = f"try {workdir.parent}" if within else "give a workdir or a Hugging Face folder"
        raise UserError(f"{store}: no {' and no '.join(missing)} in this folder; {hint}")
    config = config_lib.replace(config_lib.read_json(workdir / "config.json"), options)
    path = workdir / "tokenizer.json"
    tokenizer = Tokenizer.load(path, config.language.vocab)
    like = jax.tree.map(checkpoints.on_one_device, abstract_params(config, tokenizer))
    step, params = checkpoints.latest_params(store.checkpoints, like)
    base = folder_lib.read_json(workdir / "base.json")
    return Trained(
        config=config,
        encoder=params["encoder"],
        alignment=params["alignment"],
        tokenizer=path,
        fingerprint=_fingerprint(config, params["encoder"], path),
        step=step,
        base=base.get("model", "") + (f"@{base['commit']}" if "commit" in base and "@" not in base["model"] else ""),
        licence=base.get("licence", ""),
        data=folder_lib.read_json(workdir / "data" / "manifest.json"),
        metrics=folder_lib.read_json(workdir / "metrics.json"),
    )


def _from_folder(model: str, options: dict[str, Any], track: Callable[[Iterable, int], Iterable]) -> Trained:
    folder = folder_lib.locate(model)
    config = folder_lib.config(folder, options)
    path = folder_lib.tokenizer(folder)
    like = abstract_params(config, Tokenizer.load(path, config.language.vocab))["encoder"]
    encoder = weights.load(folder, config, jax.tree.map(checkpoints.on_one_device, like), track)
    sidecar = folder / folder_lib.SIDECAR
    alignment = sidecar / "alignment.safetensors"
    about = folder_lib.read_json(sidecar / "model.json")
    return Trained(
        config=config,
        encoder=encoder,
        alignment=load_file(alignment) if alignment.is_file() else None,
        tokenizer=path,
        fingerprint=_fingerprint(config, encoder, path),
        step=int(about.get("step", 0)),
        base=str(about.get("base", "")) if about else model,
        licence=folder_lib.licence(folder),
        data=about.get("data", {}),
        metrics=about.get("metrics", {}),
    )


def cast(trained: Trained, dtype: str) -> Trained:
    """The model with parameters of another dtype; it is another model and gets another fingerprint."""
    config = config_lib.replace(trained.config, {"training.param_dtype": dtype})
    encoder = jax.tree.map(lambda leaf: leaf.astype(dtype), trained.encoder)
    fingerprint = _fingerprint(config, encoder, trained.tokenizer)
    return dataclasses.replace(trained, config=config, encoder=encoder, fingerprint=fingerprint)


def _fingerprint(config: config_lib.Config, encoder: Any, tokenizer: Path) -> str:
    """A hash of everything that determines the embedding space: tokenizer, architecture, pooling, template and weights.

    It excludes limits on how much of an item is read (pixel budget, maximum text length): vectors with different limits
    differ but still compare.
    """
    digest = hashlib.blake2b(tokenizer.read_bytes(), digest_size=8)
    routing = (config.experts.per_token, config.experts.router_term, config_lib.sparse_layers(config))
    digest.update(repr((config.vision, config.language, config.data.template, *routing)).encode())
    for leaf in jax.tree.leaves(encoder):
        for part in leaf if leaf.ndim > 1 else [leaf]:  # fetches stacked layers one at a time
            digest.update(np.ascontiguousarray(part).tobytes())
    return digest.hexdigest()


def abstract_params(config: config_lib.Config, tokenizer: Tokenizer) -> Any:
    """Shapes and dtypes of a run's parameters, without allocating them."""
    layout = rows_lib.Layout.of(config, tokenizer.template(config.data.template))
    rows = rows_lib.pack([[]], layout, tokenizer.pad)
    return nn.unbox(jax.eval_shape(functools.partial(initial_state, config, rows))).params
