"""Zero-shot classification and attribute prediction: the nearest label text.

A task is the category (its last, narrowest name) or one attribute; its labels are all values that the catalogue knows,
embedded as bare texts. A product is asked by its image, its text, and both.

Leaks: titles often name the colour or the kind, and then prediction from text is reading, not understanding. So for t
and mm every word that occurs in any label of the task is struck from the text first (plurals and hyphens aside;
synonyms stay), and `leak` says in how many texts the product's own label stood in full. The image is never altered.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from moon_jax import similarity
from moon_jax.data.prepare import Prepared
from moon_jax.data.sources import title_group
from moon_jax.evaluation.retrieval import Encoded
from moon_jax.serving.embedder import Embedder
from moon_jax.types import VIEWS, Product

MOST_LABELS = 200
"""An attribute of more values is free text (a model number, a size chart), not a label."""

LEAST_SHARE = 0.05
"""Share of the products that must have an attribute."""


@dataclasses.dataclass(frozen=True)
class Task:
    """One question about every product. Labels are as the catalogue first writes them."""

    name: str  # "category", or an attribute's name
    labels: tuple[str, ...]
    truth: np.ndarray  # i32[C], -1 where the product has none
    struck: dict[int, str]  # place among the C products → its text without the labels' words, where that differs
    leak: float  # percent of texts in which the product's own label stands in full


def tasks(prepared: Prepared) -> list[Task]:
    """The category and those attributes that have 2 to MOST_LABELS values, not all of them unique to one product.

    Args:
        prepared: labels come from all its products, truths from those to be found.
    """

    def values(product: Product) -> dict[str, str]:
        return {"category": product.category[-1] if product.category else ""} | {
            f"attribute {name}": value for name, value in product.attributes.items()
        }

    known: dict[str, dict[str, str]] = {}
    for index in (*prepared.train, *prepared.val):
        for name, value in values(prepared.products[index]).items():
            if title_group(value):
                known.setdefault(name, {}).setdefault(title_group(value), value)
    found = []
    for name, written in known.items():
        # More than half as many values as products: names, not labels.
        if not 2 <= len(written) <= min(MOST_LABELS, (len(prepared.train) + len(prepared.val)) // 2):
            continue
        number = {group: place for place, group in enumerate(written)}
        own = [values(prepared.products[index]).get(name, "") for index in prepared.val]
        truth = np.array([number.get(title_group(value), -1) for value in own], np.int32)
        if (truth >= 0).sum() >= max(2, LEAST_SHARE * len(truth)):
            found.append(_task(name, tuple(written.values()), truth, [prepared.products[i].text for i in prepared.val]))
    return found


def _task(name: str, labels: tuple[str, ...], truth: np.ndarray, texts: Sequence[str | None]) -> Task:
    forbidden = set().union(*map(words, labels))
    struck, leaks, told = {}, 0, 0
    for place in np.flatnonzero(truth >= 0).tolist():
        text = texts[place]
        if text:
            told += 1
            leaks += words(labels[truth[place]]) <= words(text)
            rest = strike(text, forbidden)
            if rest != " ".join(text.split()):
                struck[place] = rest
    return Task(name, labels, truth, struck, round(100.0 * leaks / max(told, 1), 4))


def _stem(word: str) -> str:
    """A word without its plural ending."""
    if word.endswith(("sses", "shes", "ches", "xes")):
        return word[:-2]
    return word[:-1] if word.endswith("s") and not word.endswith("ss") else word


def words(text: str) -> set[str]:
    """The words of a text in lower case, without plural endings; "T-shirts" is t, shirt and tshirt."""
    found = set()
    for token in text.casefold().split():
        parts = re.findall(r"\w+", token)
        found |= {_stem(part) for part in (*parts, "".join(parts)) if part}
    return found


def strike(text: str, forbidden: set[str]) -> str:
    """`text` without the tokens that hold a word of `forbidden`."""
    return " ".join(token for token in text.split() if not words(token) & forbidden)


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
    """A task's vectors, from which its scores follow."""

    task: Task
    labels: np.ndarray  # f32[labels,D]
    vectors: np.ndarray  # f32[C,3,D], the words of the labels struck from the texts
    present: np.ndarray  # bool[C,3]

    def truncated(self, width: int) -> Answers:
        """The same at `width` dimensions."""
        labels, vectors = (np.asarray(similarity.truncate(part, width)) for part in (self.labels, self.vectors))
        return dataclasses.replace(self, labels=labels, vectors=vectors)


def encode(
    embedder: Embedder,
    prepared: Prepared,
    encoded: Encoded,
    asked: Sequence[Task],
    advance: Callable[[int], None] = lambda count: None,
) -> list[Answers]:
    """Embeds labels, and those products anew whose text loses a word; `advance` is told of `count(asked)` in all.

    Args:
        encoded: the products' vectors, in the order of `prepared.val`.
    """
    answers = []
    for task in asked:
        vectors, present = encoded.candidates.copy(), encoded.present.copy()
        changed = sorted(task.struck)
        if changed:
            products = [
                dataclasses.replace(prepared.products[prepared.val[place]], text=task.struck[place] or None)
                for place in changed
            ]
            vectors[changed], present[changed] = embedder.encode_views(products, advance=advance)
        answers.append(Answers(task, embedder.encode(task.labels), vectors, present))
    return answers


def count(asked: Iterable[Task]) -> int:
    """Products that `encode` embeds."""
    return sum(len(task.struck) for task in asked)


def measure(answers: Answers) -> dict[str, float | dict[str, float]]:
    """The scores of a task by view; a view that no product has is left out.

    Returns:
        {"labels": …, "leak": percent of texts in which the own label stood, "i": {"accuracy": …, "precision": …,
        "recall": …, "F1": …, "majority": accuracy of always telling the commonest label, "products": …}, …}.
    """
    task = answers.task
    found: dict[str, float | dict[str, float]] = {"labels": len(task.labels), "leak": task.leak}
    for number, view in enumerate(VIEWS):
        chosen = answers.present[:, number] & (task.truth >= 0)
        if not chosen.any():
            continue
        truth = task.truth[chosen]
        _, nearest = similarity.top_k(answers.vectors[chosen, number], answers.labels, 1)
        majority = round(100.0 * float(np.bincount(truth).max()) / len(truth), 4)
        sizes = {"majority": majority, "products": len(truth)}
        found[view] = scores(truth, np.asarray(nearest)[:, 0]) | sizes
    return found
