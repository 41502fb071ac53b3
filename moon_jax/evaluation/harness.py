"""Anyone's model behind one small protocol: what embeds texts and images is all that is asked of it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import SafetensorError

from moon_jax.config import UserError
from moon_jax.data import parse
from moon_jax.data.images import BadImage, crop_box, decode
from moon_jax.data.pipeline import Alteration
from moon_jax.data.text import keep_words
from moon_jax.hub import folder as folder_lib
from moon_jax.types import VIEWS, Product

CONTRASTIVE = ("clip", "siglip", "siglip2")
"""Models of transformers that have a tower for texts and one for images."""

BATCH = 64
"""Items that such a model embeds at once."""


class Embedder(Protocol):
    """Products in, unit vectors out: serving.Embedder is one.

    One that has `rank`, of similarity.top_k's form, may make anything of an item that `rank` then compares. `sees` says
    whether it embeds texts and images ("t", "i"), if not both; `fixed`, that a product's vectors are given, whatever
    its text now is.
    """

    name: str
    """Model and weights, in a word or two: vectors of equal names compare."""

    def encode(self, items: Sequence[Product]) -> np.ndarray:
        """f32[items,D], rows of unit length. An item has a text, an image, or both."""

    def encode_views(
        self,
        products: Sequence[Product],
        alteration: Alteration | None = None,
        seed: int = 0,
        advance: Callable[[int], None] = lambda count: None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """All three views of each product, f32[products,3,D] and bool[products,3]: serving.Embedder tells it."""


class ByItem:
    """The views of products from `encode` alone. What sees only text, or only images, takes those for both."""

    sees: tuple[str, ...] = ("t", "i")
    max_pixels: int

    def encode(self, items: Sequence[Product]) -> np.ndarray:
        """See Embedder."""
        raise NotImplementedError

    def encode_views(
        self,
        products: Sequence[Product],
        alteration: Alteration | None = None,
        seed: int = 0,
        advance: Callable[[int], None] = lambda count: None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """See Embedder; of a product's images the first is seen."""
        vectors, present = None, np.zeros((len(products), len(VIEWS)), bool)
        for start in range(0, len(products), BATCH):
            numbers = range(start, min(start + BATCH, len(products)))
            items, places = [], []
            for number in numbers:
                product = products[number]
                try:
                    if alteration:
                        product = altered(product, alteration, np.random.default_rng((seed, number)), self.max_pixels)
                    found = list(self._views(product))
                except BadImage as error:
                    raise UserError(f"product {product.id}: image: {error}") from None
                items += [item for _, item in found]
                places += [(number, view) for view, _ in found]
            if items:
                encoded = self.encode(items)
                if vectors is None:
                    vectors = np.zeros((len(products), len(VIEWS), *encoded.shape[1:]), encoded.dtype)
                row, view = np.array(places).T
                vectors[row, view], present[row, view] = encoded, True
            advance(len(numbers))
        return np.zeros((len(products), len(VIEWS), 1), np.float32) if vectors is None else vectors, present

    def _views(self, product: Product) -> Any:
        """(index of the view, item) of those views that the product has and the model sees."""
        text = (product.text or "").strip() or None if "t" in self.sees else None
        images = product.images[:1] if "i" in self.sees else ()
        if text:
            yield 0, Product(text=text)
        if images:
            yield 1, Product(images=images)
        if (product.text or "").strip() and product.images:
            yield 2, Product(text=text, images=images)


def altered(product: Product, alteration: Alteration, rng: np.random.Generator, max_pixels: int) -> Product:
    """A product as a query: words left out and its first image cropped, by the draws of data.pipeline.Reader."""
    text, images = (product.text or "").strip(), product.images[:1]
    if text:
        text = keep_words(text, alteration.keep_word, alteration.least_words, rng)
    if images:
        picture = decode(images[0], max_pixels)
        left, top, right, bottom = crop_box(picture.width, picture.height, alteration.crop, rng)
        # No pixel of the box's edges is lost, and there is one at least.
        images = (picture.crop((int(left), int(top), max(int(right + 0.999), 1), max(int(bottom + 0.999), 1))),)
    return Product(text=text or None, images=images, id=product.id)


class Contrastive(ByItem):
    """CLIP, SigLIP or SigLIP 2 by transformers. An item with both text and image gets the mean of the two vectors."""

    def __init__(self, folder: Path, max_pixels: int):
        """
        Raises:
            UserError: transformers is not installed, or cannot read the folder.
        """
        try:
            import torch
            from transformers import AutoImageProcessor, AutoModel, AutoTokenizer
        except ImportError as error:
            raise UserError(f"{folder}: wants transformers ({error}); pip install -e '.[hf]'") from None
        try:
            self._model = AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True).eval()
            self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            # Pillow's resizing is the one that such models were trained with.
            self._processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True, backend="pil")
        except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
            raise UserError(f"{folder}: {' '.join(str(error).split())[:300]}") from None
        self._torch, self.max_pixels = torch, max_pixels
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model.to(self._device)
        kind = self._model.config.model_type
        # SigLIP was trained on texts that are filled up; CLIP masks what fills them.
        self._padding = "longest" if kind == "clip" else "max_length"
        self.name = f"{kind} {_digest(folder)}"

    def encode(self, items: Sequence[Product]) -> np.ndarray:
        found = []
        for start in range(0, len(items), BATCH):
            batch = items[start : start + BATCH]
            sums: list[Any] = [0.0] * len(batch)
            for has, features in ((lambda item: item.text, self._texts), (lambda item: item.images, self._images)):
                chosen = [place for place, item in enumerate(batch) if has(item)]
                for place, vector in zip(chosen, features([batch[p] for p in chosen]) if chosen else (), strict=True):
                    sums[place] = sums[place] + vector
            for place, vector in enumerate(sums):
                if isinstance(vector, float):
                    raise UserError(f"item {start + place}: neither text nor image; nothing to embed")
                found.append(vector / np.linalg.norm(vector))
        return np.array(found, np.float32)

    def _texts(self, items: Sequence[Product]) -> np.ndarray:
        longest = self._model.config.text_config.max_position_embeddings
        inputs = self._tokenizer(
            [item.text for item in items],
            padding=self._padding,
            truncation=True,
            max_length=longest,
            return_tensors="pt",
        )
        return self._unit(self._model.get_text_features, inputs)

    def _images(self, items: Sequence[Product]) -> np.ndarray:
        pictures = [decode(item.images[0], self.max_pixels) for item in items]
        return self._unit(self._model.get_image_features, self._processor(images=pictures, return_tensors="pt"))

    def _unit(self, features: Any, inputs: Any) -> np.ndarray:
        with self._torch.inference_mode():
            given = features(**inputs.to(self._device)).pooler_output.float().cpu().numpy()
        return given / np.linalg.norm(given, axis=1, keepdims=True)


def _digest(folder: Path) -> str:
    """Of weights and settings."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted([*folder.rglob("*.safetensors"), *folder.rglob("*.json")]):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


class SentenceTransformer(ByItem):
    """A model of sentence-transformers: of texts, or of texts and images."""

    def __init__(self, folder: Path, max_pixels: int):
        """
        Raises:
            UserError: sentence-transformers is not installed, or cannot read the folder.
        """
        try:
            import sentence_transformers
        except ImportError as error:
            need = f"wants sentence-transformers ({error}); pip install -e '.[hf]'"
            raise UserError(f"{folder}: {need}") from None
        try:
            self._model = sentence_transformers.SentenceTransformer(
                str(folder), local_files_only=True, trust_remote_code=False, model_kwargs={"use_safetensors": True}
            )
        except (OSError, ValueError, ImportError, RuntimeError, KeyError, SafetensorError) as error:
            raise UserError(f"{folder}: {' '.join(str(error).split())[:300]}") from None
        self.max_pixels = max_pixels
        self.sees = ("t", "i") if self._model.supports("image") else ("t",)
        self.name = f"sentence-transformers {_digest(folder)}"

    def encode(self, items: Sequence[Product]) -> np.ndarray:
        given: list[Any] = []
        for number, item in enumerate(items):
            image = decode(item.images[0], self.max_pixels) if item.images else None
            if not item.text and image is None:
                raise UserError(f"item {number}: neither text nor image; nothing to embed")
            both = {"text": item.text, "image": image}
            given.append(item.text if image is None else {name: part for name, part in both.items() if part})
        return self._model.encode(given, batch_size=BATCH, normalize_embeddings=True, show_progress_bar=False)


class Vectors:
    """Vectors from anywhere: Parquet files of a folder with the columns id, view (t, i or mm) and vector.

    They are brought to unit length. Altered products cannot be asked for: directions and labels that need them are left
    out.
    """

    sees: tuple[str, ...] = ()
    fixed = True

    def __init__(self, folder: str | Path):
        """
        Raises:
            UserError: no such folder or files, another column or width, or an id twice.
        """
        if not Path(folder).is_dir():
            raise UserError(f"--vectors {folder}: no such folder")
        files = sorted(Path(folder).rglob("*.parquet"))
        if not files:
            raise UserError(f"--vectors {folder}: no .parquet file there")
        self._rows: dict[tuple[str, str], int] = {}
        parts, digest = [], hashlib.blake2b(digest_size=8)
        for path in files:
            try:
                table = pq.read_table(path, columns=["id", "view", "vector"])
                part = np.stack(table["vector"].to_numpy()).astype(np.float32) if len(table) else np.zeros((0, 1))
                if part.ndim != 2:
                    raise ValueError("vector: no list of numbers")
            except (OSError, ValueError, TypeError, pa.ArrowException) as error:
                raise UserError(f"{path}: {str(error).splitlines()[0][:200]}; wants id, view and vector") from None
            for identity, view in zip(table["id"].to_pylist(), table["view"].to_pylist(), strict=True):
                try:
                    key = parse.label(identity, "id"), view
                except parse.BadRecord as bad:
                    raise UserError(f"{path}: {bad.detail}") from None
                if not key[0]:
                    raise UserError(f"{path}: an id is empty")
                if view not in VIEWS:
                    raise UserError(f"{path}: view {view!r} is none of t, i and mm")
                if key in self._rows:
                    raise UserError(f"{path}: view {view} of {key[0]!r} is there twice")
                self._rows[key] = len(self._rows)
                digest.update(repr(key).encode())
            if not len(part):
                continue
            parts.append(part)
            if part.shape[1] != parts[0].shape[1]:
                raise UserError(f"{path}: vectors of width {part.shape[1]}, others have {parts[0].shape[1]}")
            digest.update(part.tobytes())
        self._vectors = np.concatenate(parts) if parts else np.zeros((0, 1), np.float32)
        largest = np.abs(self._vectors).max(axis=1, initial=0.0, keepdims=True)
        if not np.isfinite(largest).all() or not largest.all():
            raise UserError(f"--vectors {folder}: some vectors are zero, or not finite; leave these views out")
        self._vectors = self._vectors / largest  # whose squares float32 holds
        self._vectors = self._vectors / np.linalg.norm(self._vectors, axis=1, keepdims=True)
        self.name = f"vectors {digest.hexdigest()}"

    def encode(self, items: Sequence[Product]) -> np.ndarray:
        """Nothing can be embedded."""
        raise UserError("--vectors: vectors alone embed nothing; give a model")

    def encode_views(
        self,
        products: Sequence[Product],
        alteration: Alteration | None = None,
        seed: int = 0,
        advance: Callable[[int], None] = lambda count: None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """See Embedder; by the products' ids."""
        vectors = np.zeros((len(products), len(VIEWS), self._vectors.shape[1]), np.float32)
        present = np.zeros((len(products), len(VIEWS)), bool)
        for number in range(len(products)) if alteration is None else ():
            for place, view in enumerate(VIEWS):
                row = self._rows.get((products[number].id, view))
                if row is not None:
                    vectors[number, place], present[number, place] = self._vectors[row], True
        advance(len(products))
        return vectors, present


def open_embedder(model: str, max_pixels: int, flag: str = "--model") -> Embedder:
    """The embedder of a workdir; of a Hugging Face folder, or hf://owner/name, of ours, Qwen3-VL(-Embedding), CLIP,
    SigLIP, SigLIP 2 or sentence-transformers; or one of baselines.NAMES.

    Args:
        flag: by which it was given, for errors.

    Raises:
        UserError: there is no model, or one that cannot be read.
    """
    try:
        return _open(model, max_pixels)
    except UserError as error:
        raise type(error)(f"{flag} {error}") from None


def _open(model: str, max_pixels: int) -> Embedder:
    from moon_jax.evaluation import baselines

    if model in baselines.NAMES and not Path(model).exists():
        return baselines.NAMES[model](max_pixels)
    if (
        model.startswith(folder_lib.HUB)
        or folder_lib.is_folder(Path(model))
        or (Path(model) / "modules.json").is_file()
    ):
        folder = folder_lib.locate(model)
        kind = folder_lib.read_json(folder / "config.json").get("model_type", "")
        if kind in CONTRASTIVE:
            return Contrastive(folder, max_pixels)
        if (folder / "modules.json").is_file() and not kind.startswith("qwen3_vl"):
            return SentenceTransformer(folder, max_pixels)
    from moon_jax.serving import embedder  # imports JAX

    return embedder.load(model)
