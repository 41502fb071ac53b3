"""Classification and attribute prediction: by nearest label text (zero-shot), nearest neighbours and a linear probe.

A task is the category (the deepest level whose values are labels, not names) or one attribute. Its labels are all
values in the catalogue, embedded as bare texts or averaged over several prompts. They are predicted from a product's
image, its text, and both. Neighbours and probe are fitted on some training products, drawn with a fixed seed.

Leaks: titles often name the colour or the kind; predicting it from such a text is reading, not understanding. So for t
and mm, every word of any of the task's labels is removed from the text first, in singular or plural (English), with or
without accents and hyphens; synonyms and inflections of other languages remain. `leak` is the percentage of texts that
contained their own label. The image is never altered.
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
"""An attribute with more values is free text (a model number, a size chart), not a label."""

MOST_ATTRIBUTES = 8
"""Attributes evaluated, the commonest first: each costs embedding all texts from which a word was removed."""

SEED = 0
"""Draws the products that neighbours and probe are fitted on."""

PROMPTS = ("{}",)
"""Default template of a label's text: the bare label."""

LEAST_PRODUCTS, LEAST_SHARE = 4, 0.05
"""Minimum number, and minimum share, of held-out products that must have an attribute."""


@dataclasses.dataclass(frozen=True)
class Task:
    """One prediction task over all products. Labels are spelled as where the catalogue first has them."""

    name: str  # "category", or an attribute's name
    labels: tuple[str, ...]
    truth: np.ndarray  # i32[C], label index; -1 if the product has none
    stripped: dict[int, str]  # index among the C products → its text without label words, if that differs
    leak: float  # percentage of texts that contain the product's whole label
    known: np.ndarray  # i32[N], labels of the products that neighbours and probe are fitted on; -1 if none
    known_stripped: dict[int, str]  # like `stripped`, for these N products


def known(prepared: Prepared, most: int) -> list[int]:
    """Indices of up to `most` training products for neighbours and probe; none if training products are evaluated."""
    if prepared.val == prepared.train:
        return []
    train = np.array(prepared.train)
    return np.sort(np.random.default_rng(SEED).permutation(train)[:most]).tolist()


def tasks(prepared: Prepared, known: Sequence[int] = ()) -> list[Task]:
    """The category, at the deepest level whose values products share, and the MOST_ATTRIBUTES commonest attributes.

    Labels come from all products of `prepared`, truths from the held-out ones. If there are more values than half of
    the products, the values are names, not labels.

    Args:
        known: indices of the products that neighbours and probe are fitted on.
    """
    everything = sorted({*prepared.train, *prepared.val})
    products = {index: _without_images(prepared.products[index]) for index in everything}
    deepest = max((len(product.category) for product in products.values()), default=0)
    category: Task | None = None
    for depth in range(deepest):  # keeps the deepest level that makes a task
        values = {index: _level(product, depth) for index, product in products.items()}
        category = _task("category", products, values, prepared.val, known) or category
    names = sorted({name for product in products.values() for name in product.attributes})
    found = []
    for name in names:
        values = {index: product.attributes.get(name, "") for index, product in products.items()}
        found.append(_task(f"attribute {name}", products, values, prepared.val, known))
    attributes = sorted((task for task in found if task), key=lambda task: -(task.truth >= 0).sum())
    return ([category] if category else []) + attributes[:MOST_ATTRIBUTES]


def _without_images(product: Product) -> Product:
    """What tasks need of a product; the images of a whole catalogue would not fit into memory."""
    return Product(text=product.text, category=product.category, attributes=product.attributes)


def _level(product: Product, depth: int) -> str:
    return product.category[depth] if depth < len(product.category) else ""


def _task(
    name: str, products: dict[int, Product], own: dict[int, str], val: Sequence[int], known: Sequence[int]
) -> Task | None:
    """The task of predicting the values `own`; None if they are not labels, or too few held-out products have one."""
    own = {index: text for index, text in own.items() if title_group(text)}
    # Values that differ in case or spaces are one label, spelled as it first occurs.
    written: dict[str, str] = {}
    for text in own.values():
        written.setdefault(title_group(text), text)
    if not 2 <= len(written) <= min(MOST_LABELS, len(own) // 2):
        return None
    number = {group: index for index, group in enumerate(written)}

    def truths(indices: Sequence[int]) -> np.ndarray:
        return np.array([number[title_group(own[i])] if i in own else -1 for i in indices], np.int32)

    truth = truths(val)
    if (truth >= 0).sum() < max(LEAST_PRODUCTS, LEAST_SHARE * len(truth)):
        return None
    labels = tuple(written.values())
    forbidden = set().union(*map(words, labels))

    def stripped(indices: Sequence[int], labelled: np.ndarray) -> dict[int, str]:
        found = {}
        for position in np.flatnonzero(labelled >= 0).tolist():
            text = products[indices[position]].text
            rest = remove(text, forbidden) if text else ""
            if text and rest != " ".join(unicodedata.normalize("NFKC", text).split()):
                found[position] = rest
        return found

    labelled = [(products[val[n]].text, labels[truth[n]]) for n in np.flatnonzero(truth >= 0).tolist()]
    leaks = [holds(text, label) for text, label in labelled if text]
    leak, of_known = round(100.0 * sum(leaks) / max(len(leaks), 1), 4), truths(known)
    return Task(name, labels, truth, stripped(val, truth), leak, of_known, stripped(known, of_known))


def scores(truth: Sequence[int], predicted: Sequence[int]) -> dict[str, float]:
    """Accuracy, and macro-averaged precision, recall and F1, in percent.

    The labels are those that occur in `truth` or `predicted`. A ratio with denominator 0 is 0, as with scikit-learn's
    zero_division=0.
    """
    truth, predicted = np.asarray(truth), np.asarray(predicted)
    labels = np.union1d(truth, predicted)
    hit = np.array([((truth == label) & (predicted == label)).sum() for label in labels], np.float64)
    claimed = np.array([(predicted == label).sum() for label in labels])
    real = np.array([(truth == label).sum() for label in labels])
    measures = {
        "accuracy": (truth == predicted).mean(),
        "precision": (hit / np.maximum(claimed, 1)).mean(),
        "recall": (hit / np.maximum(real, 1)).mean(),
        "F1": (2 * hit / (claimed + real)).mean(),  # claimed + real > 0 for every label here
    }
    return {name: round(100.0 * float(value), 4) for name, value in measures.items()}


@dataclasses.dataclass(frozen=True)
class Answers:
    """A task's vectors, from which its scores are computed. Label words are removed from the texts."""

    task: Task
    labels: np.ndarray | None  # f32[labels,D]; None if the embedder cannot embed text
    vectors: np.ndarray  # f32[C,3,D]
    present: np.ndarray  # bool[C,3]
    known: np.ndarray  # f32[N,3,D]
    known_present: np.ndarray  # bool[N,3]

    def truncated(self, width: int) -> Answers:
        """The same, truncated to `width` dimensions."""
        parts = {name: getattr(self, name) for name in ("labels", "vectors", "known")}
        cut = {
            name: None if part is None else np.asarray(similarity.truncate(part, width)) for name, part in parts.items()
        }
        return dataclasses.replace(self, **cut)


def encode(
    embedder: Embedder,
    prepared: Prepared,
    encoded: Encoded,
    tasks: Sequence[Task],
    known: Sequence[int] = (),
    prompts: Sequence[str] = PROMPTS,
    advance: Callable[[int], None] = lambda count: None,
) -> list[Answers]:
    """Embeds labels, the `known` products, and again every product from whose text a label word was removed.

    Args:
        encoded: the products' vectors, in the order of `prepared.val`.
        known: the same as for the function `tasks`.
        prompts: templates of a label's text; {} stands for the label. A label's vector is the mean over them.
        advance: called with numbers of embedded products, in total `count(tasks, known)`.
    """
    val = list(prepared.val)
    mine, mine_present = encoded.candidates[:0], encoded.present[:0]
    if known:
        mine, mine_present = embedder.encode_views(records.Subset(prepared.products, known), advance=advance)
    answers = []
    for task in tasks:
        old = encoded.candidates, encoded.present
        vectors, present = _reembedded(embedder, prepared, val, task.stripped, *old, advance)
        ours = _reembedded(embedder, prepared, known, task.known_stripped, mine, mine_present, advance)
        named = label_vectors(embedder, task.labels, prompts) if "t" in getattr(embedder, "sees", VIEWS) else None
        answers.append(Answers(task, named, vectors, present, *ours))
    return answers


def _reembedded(
    embedder: Embedder,
    prepared: Prepared,
    indices: Sequence[int],
    stripped: dict[int, str],
    vectors: np.ndarray,
    present: np.ndarray,
    advance: Callable[[int], None],
) -> tuple[np.ndarray, np.ndarray]:
    """Copies of `vectors` and `present`, with the products in `stripped` embedded again from their stripped texts."""
    if not stripped:
        return vectors, present
    changed, vectors, present = sorted(stripped), vectors.copy(), present.copy()
    texts = [stripped[position] or None for position in changed]
    if getattr(embedder, "fixed", False):
        # Fixed vectors are of texts with label words. Texts without any are few and not representative: drop all.
        present[:, [VIEWS.index("t"), VIEWS.index("mm")]] = False
        advance(len(changed))
        return vectors, present
    chosen = records.Subset(prepared.products, [indices[position] for position in changed], texts)
    vectors[changed], present[changed] = embedder.encode_views(chosen, advance=advance)
    return vectors, present


def label_vectors(embedder: Embedder, labels: Sequence[str], prompts: Sequence[str]) -> np.ndarray:
    """f32[labels,D], unit length: the embedding of each label, averaged over prompts."""
    texts = [Product(text=prompt.replace("{}", label)) for prompt in prompts for label in labels]
    vectors = embedder.encode(texts).reshape(len(prompts), len(labels), -1).mean(axis=0)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def count(tasks: Iterable[Task], known: Sequence[int] = ()) -> int:
    """The number of products that `encode` embeds."""
    return len(known) + sum(len(task.stripped) + len(task.known_stripped) for task in tasks)


def measure(answers: Answers) -> dict[str, Any]:
    """The scores of a task by view; views that no product has are left out.

    Returns:
        {"labels": number of labels, "leak": percentage of texts that contained their own label, "known": number of
        products that neighbours and probe are fitted on, "i": {"accuracy": …, "precision": …, "recall": …, "F1": …,
        "neighbours": accuracy of their vote, "probe": accuracy of the linear probe, "majority": accuracy of the
        majority-class baseline, "products": number of products evaluated}, …}.
    """
    task = answers.task
    found: dict[str, Any] = {"labels": len(task.labels), "leak": task.leak, "known": int((task.known >= 0).sum())}
    for number, view in enumerate(VIEWS):
        chosen = answers.present[:, number] & (task.truth >= 0)
        if not chosen.any():
            continue
        truth, vectors = task.truth[chosen], answers.vectors[chosen, number]
        measures = {}
        if answers.labels is not None:
            _, nearest = similarity.top_k(vectors, answers.labels, 1)
            measures = scores(truth, nearest[:, 0])
        usable = answers.known_present[:, number] & (task.known >= 0)
        if len(set(task.known[usable].tolist())) > 1:
            fitted_on = answers.known[usable, number], task.known[usable]
            for name, predict in (("neighbours", probe.nearest), ("probe", probe.linear)):
                measures[name] = round(100.0 * float((predict(*fitted_on, vectors) == truth).mean()), 4)
        majority = round(100.0 * float(np.bincount(truth).max()) / len(truth), 4)
        found[view] = measures | {"majority": majority, "products": len(truth)}
    return found
