"""Classification and attribute prediction: by the nearest label text (zero-shot), by neighbours, by a linear probe.

A task is the category (the narrowest level that is no name) or one attribute; its labels are all values that the
catalogue knows, embedded as bare texts, or as the mean over several prompts. A product is asked by its image, its text,
and both. Neighbours and probe know some of the products to train on, drawn by a fixed seed.

Leaks: titles often name the colour or the kind, and then prediction from text is reading, not understanding. So for t
and mm every word that occurs in any label of the task is struck from the text first, whatever its English plural,
accents or hyphens (synonyms, and other languages' endings, stay), and `leak` says in how many texts the product's own
label stood in full. The image is never altered.
"""

from __future__ import annotations

import dataclasses
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from moon_jax import similarity
from moon_jax.data import records
from moon_jax.data.prepared import Prepared
from moon_jax.data.records import title_group
from moon_jax.data.words import holds, remove, words
from moon_jax.embedders.protocol import Embedder
from moon_jax.evaluation import probe
from moon_jax.evaluation.retrieval import Encoded
from moon_jax.types import VIEWS, Product

MOST_LABELS = 200
"""An attribute of more values is free text (a model number, a size chart), not a label."""

MOST_ATTRIBUTES = 8
"""Those that most products have: each costs the embedding of all texts that lose a word."""

SEED = 0
"""Of the choice of known products."""

PROMPTS = ("{}",)
"""How a label is put to a model, if nothing else is said: bare."""

LEAST_PRODUCTS, LEAST_SHARE = 4, 0.05
"""Products to be found that must have an attribute, and their share."""


@dataclasses.dataclass(frozen=True)
class Task:
    """One question about every product. Labels are as the catalogue first writes them."""

    name: str  # "category", or an attribute's name
    labels: tuple[str, ...]
    truth: np.ndarray  # i32[C], -1 where the product has none
    struck: dict[int, str]  # place among the C products → its text without the labels' words, where that differs
    leak: float  # percent of texts in which the product's own label stands in full
    known: np.ndarray  # i32[N], labels of the known products, -1 where one has none
    known_struck: dict[int, str]  # as `struck`, of the known products


def known(prepared: Prepared, most: int) -> list[int]:
    """Indices of the products that neighbours and probe know: some to train on; none where these are judged."""
    if prepared.val == prepared.train:
        return []
    train = np.array(prepared.train)
    return np.sort(np.random.default_rng(SEED).permutation(train)[:most]).tolist()


def tasks(prepared: Prepared, known: Sequence[int] = ()) -> list[Task]:
    """The category, at the deepest level whose names products share, and the MOST_ATTRIBUTES commonest attributes.

    Labels come from all products of `prepared`, truths from those to be found. What has more values than half of its
    products are names, not labels. `known` are products that neighbours and probe know.
    """
    everything = sorted({*prepared.train, *prepared.val})
    products = {index: _without_images(prepared.products[index]) for index in everything}
    deepest = max((len(product.category) for product in products.values()), default=0)
    category: Task | None = None
    for depth in range(deepest):  # the deepest one that will do stays
        told = {index: _level(product, depth) for index, product in products.items()}
        category = _task("category", products, told, prepared.val, known) or category
    names = sorted({name for product in products.values() for name in product.attributes})
    found = []
    for name in names:
        told = {index: product.attributes.get(name, "") for index, product in products.items()}
        found.append(_task(f"attribute {name}", products, told, prepared.val, known))
    attributes = sorted((task for task in found if task), key=lambda task: -(task.truth >= 0).sum())
    return ([category] if category else []) + attributes[:MOST_ATTRIBUTES]


def _without_images(product: Product) -> Product:
    """What the labels need: the images of a catalogue would not fit into memory."""
    return Product(text=product.text, category=product.category, attributes=product.attributes)


def _level(product: Product, depth: int) -> str:
    return product.category[depth] if depth < len(product.category) else ""


def _task(
    name: str, products: dict[int, Product], own: dict[int, str], val: Sequence[int], known: Sequence[int]
) -> Task | None:
    """The task of telling `own`, or None if that is no label, or too few products to be found have one."""
    own = {index: text for index, text in own.items() if title_group(text)}
    # Case and spaces do not make another label; the first way of writing it is taken.
    written: dict[str, str] = {}
    for text in own.values():
        written.setdefault(title_group(text), text)
    if not 2 <= len(written) <= min(MOST_LABELS, len(own) // 2):
        return None
    number = {group: place for place, group in enumerate(written)}

    def truths(indices: Sequence[int]) -> np.ndarray:
        return np.array([number[title_group(own[i])] if i in own else -1 for i in indices], np.int32)

    truth = truths(val)
    if (truth >= 0).sum() < max(LEAST_PRODUCTS, LEAST_SHARE * len(truth)):
        return None
    labels = tuple(written.values())
    forbidden = set().union(*map(words, labels))

    def struck(indices: Sequence[int], labelled: np.ndarray) -> dict[int, str]:
        found = {}
        for place in np.flatnonzero(labelled >= 0).tolist():
            text = products[indices[place]].text
            rest = remove(text, forbidden) if text else ""
            if text and rest != " ".join(unicodedata.normalize("NFKC", text).split()):
                found[place] = rest
        return found

    told = [(products[val[place]].text, labels[truth[place]]) for place in np.flatnonzero(truth >= 0).tolist()]
    leaks = [holds(text, label) for text, label in told if text]
    leak, of_known = round(100.0 * sum(leaks) / max(len(leaks), 1), 4), truths(known)
    return Task(name, labels, truth, struck(val, truth), leak, of_known, struck(known, of_known))


def scores(truth: Sequence[int], predicted: Sequence[int]) -> dict[str, float]:
    """Accuracy, and precision, recall and F1 averaged over labels (macro), in percent.

    The labels are those that occur in either; a ratio of nothing is 0 (scikit-learn's zero_division=0).
    """
    truth, predicted = np.asarray(truth), np.asarray(predicted)
    labels = np.union1d(truth, predicted)
    hit = np.array([((truth == label) & (predicted == label)).sum() for label in labels], np.float64)
    told = np.array([(predicted == label).sum() for label in labels])
    real = np.array([(truth == label).sum() for label in labels])
    measures = {
        "accuracy": (truth == predicted).mean(),
        "precision": (hit / np.maximum(told, 1)).mean(),
        "recall": (hit / np.maximum(real, 1)).mean(),
        "F1": (2 * hit / (told + real)).mean(),  # told + real > 0 for every label here
    }
    return {name: round(100.0 * float(value), 4) for name, value in measures.items()}


@dataclasses.dataclass(frozen=True)
class Answers:
    """A task's vectors, from which its scores follow. The words of the labels are struck from the texts."""

    task: Task
    labels: np.ndarray | None  # f32[labels,D]; None of an embedder that cannot be asked
    vectors: np.ndarray  # f32[C,3,D]
    present: np.ndarray  # bool[C,3]
    known: np.ndarray  # f32[N,3,D]
    known_present: np.ndarray  # bool[N,3]

    def truncated(self, width: int) -> Answers:
        """The same at `width` dimensions."""
        parts = {name: getattr(self, name) for name in ("labels", "vectors", "known")}
        cut = {
            name: None if part is None else np.asarray(similarity.truncate(part, width)) for name, part in parts.items()
        }
        return dataclasses.replace(self, **cut)


def encode(
    embedder: Embedder,
    prepared: Prepared,
    encoded: Encoded,
    asked: Sequence[Task],
    known: Sequence[int] = (),
    prompts: Sequence[str] = PROMPTS,
    advance: Callable[[int], None] = lambda count: None,
) -> list[Answers]:
    """Embeds labels, known products, and all products anew whose text loses a word; `advance` is told of
    `count(asked, known)` in all.

    Args:
        encoded: the products' vectors, in the order of `prepared.val`.
        known: what `tasks` was given.
        prompts: texts with {} in them, where a label is put; a label's vector is the mean over them.
    """
    val = list(prepared.val)
    mine, mine_present = encoded.candidates[:0], encoded.present[:0]
    if known:
        mine, mine_present = embedder.encode_views(records.Chosen(prepared.products, known), advance=advance)
    answers = []
    for task in asked:
        vectors, present = _anew(embedder, prepared, val, task.struck, encoded.candidates, encoded.present, advance)
        ours = _anew(embedder, prepared, known, task.known_struck, mine, mine_present, advance)
        named = label_vectors(embedder, task.labels, prompts) if "t" in getattr(embedder, "sees", VIEWS) else None
        answers.append(Answers(task, named, vectors, present, *ours))
    return answers


def _anew(
    embedder: Embedder,
    prepared: Prepared,
    indices: Sequence[int],
    struck: dict[int, str],
    vectors: np.ndarray,
    present: np.ndarray,
    advance: Callable[[int], None],
) -> tuple[np.ndarray, np.ndarray]:
    """Vectors and presence with those of the struck texts put in their places."""
    if not struck:
        return vectors, present
    changed, vectors, present = sorted(struck), vectors.copy(), present.copy()
    texts = [struck[place] or None for place in changed]
    if getattr(embedder, "fixed", False):
        # Of texts that hold the labels' words. Those that hold none are few, and not like the others.
        present[:, [VIEWS.index("t"), VIEWS.index("mm")]] = False
        advance(len(changed))
        return vectors, present
    chosen = records.Chosen(prepared.products, [indices[place] for place in changed], texts)
    vectors[changed], present[changed] = embedder.encode_views(chosen, advance=advance)
    return vectors, present


def label_vectors(embedder: Embedder, labels: Sequence[str], prompts: Sequence[str]) -> np.ndarray:
    """f32[labels,D]: the mean over prompts of what the embedder makes of a label, of unit length."""
    texts = [Product(text=prompt.replace("{}", label)) for prompt in prompts for label in labels]
    vectors = embedder.encode(texts).reshape(len(prompts), len(labels), -1).mean(axis=0)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def count(asked: Iterable[Task], known: Sequence[int] = ()) -> int:
    """Products that `encode` embeds."""
    return len(known) + sum(len(task.struck) + len(task.known_struck) for task in asked)


def measure(answers: Answers) -> dict[str, Any]:
    """The scores of a task by view; a view that no product has is left out.

    Returns:
        {"labels": …, "leak": percent of texts in which the own label stood, "known": products that neighbours and
        probe know, "i": {"accuracy": …, "precision": …, "recall": …, "F1": …, "neighbours": accuracy of their vote,
        "probe": accuracy of the linear probe, "majority": accuracy of always telling the commonest label, "products":
        …}, …}.
    """
    task = answers.task
    found: dict[str, Any] = {"labels": len(task.labels), "leak": task.leak, "known": int((task.known >= 0).sum())}
    for number, view in enumerate(VIEWS):
        chosen = answers.present[:, number] & (task.truth >= 0)
        if not chosen.any():
            continue
        truth, vectors = task.truth[chosen], answers.vectors[chosen, number]
        told = {}
        if answers.labels is not None:
            _, nearest = similarity.top_k(vectors, answers.labels, 1)
            told = scores(truth, nearest[:, 0])
        taught = answers.known_present[:, number] & (task.known >= 0)
        if len(set(task.known[taught].tolist())) > 1:
            lesson = answers.known[taught, number], task.known[taught]
            for name, guess in (("neighbours", probe.nearest), ("probe", probe.linear)):
                told[name] = round(100.0 * float((guess(*lesson, vectors) == truth).mean()), 4)
        majority = round(100.0 * float(np.bincount(truth).max()) / len(truth), 4)
        found[view] = told | {"majority": majority, "products": len(truth)}
    return found
