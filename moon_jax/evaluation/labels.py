"""Zero-shot classification and attribute prediction: the nearest label text.

A task is the category (the narrowest level that is no name) or one attribute; its labels are all values that the
catalogue knows, embedded as bare texts. A product is asked by its image, its text, and both.

Leaks: titles often name the colour or the kind, and then prediction from text is reading, not understanding. So for t
and mm every word that occurs in any label of the task is struck from the text first, whatever its plural or hyphens
(synonyms stay), and `leak` says in how many texts the product's own label stood in full. The image is never altered.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from moon_jax import similarity
from moon_jax.data.prepared import Prepared
from moon_jax.data.records import title_group
from moon_jax.evaluation.retrieval import Encoded
from moon_jax.serving.embedder import Embedder
from moon_jax.types import VIEWS, Product

MOST_LABELS = 200
"""An attribute of more values is free text (a model number, a size chart), not a label."""

MOST_ATTRIBUTES = 8
"""Those that most products have: each costs the embedding of all texts that lose a word."""

LEAST_PRODUCTS, LEAST_SHARE = 4, 0.05
"""Products to be found that must have an attribute, and their share."""

UNSPACED = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u9fff\uf900-\ufaff]")
"""Characters of scripts without spaces between words: Thai, Lao, Burmese, Khmer, Chinese, Japanese."""


@dataclasses.dataclass(frozen=True)
class Task:
    """One question about every product. Labels are as the catalogue first writes them."""

    name: str  # "category", or an attribute's name
    labels: tuple[str, ...]
    truth: np.ndarray  # i32[C], -1 where the product has none
    struck: dict[int, str]  # place among the C products → its text without the labels' words, where that differs
    leak: float  # percent of texts in which the product's own label stands in full


def tasks(prepared: Prepared) -> list[Task]:
    """The category, at the deepest level whose names products share, and the MOST_ATTRIBUTES commonest attributes.

    Labels come from all products of `prepared`, truths from those to be found. What has more values than half of its
    products are names, not labels.
    """
    everything = sorted({*prepared.train, *prepared.val})
    deepest = max((len(prepared.products[index].category) for index in everything), default=0)
    category: Task | None = None
    for depth in range(deepest):  # the deepest one that will do stays
        category = _task("category", prepared, everything, functools.partial(_level, depth=depth)) or category
    names = sorted({name for index in everything for name in prepared.products[index].attributes})
    found = [_task(f"attribute {name}", prepared, everything, functools.partial(_value, name=name)) for name in names]
    attributes = sorted((task for task in found if task), key=lambda task: -(task.truth >= 0).sum())
    return ([category] if category else []) + attributes[:MOST_ATTRIBUTES]


def _level(product: Product, depth: int) -> str:
    return product.category[depth] if depth < len(product.category) else ""


def _value(product: Product, name: str) -> str:
    return product.attributes.get(name, "")


def _task(name: str, prepared: Prepared, everything: Sequence[int], value: Callable[[Product], str]) -> Task | None:
    """The task of telling `value`, or None if that is no label, or too few products to be found have one."""
    own = {index: value(prepared.products[index]) for index in everything}
    own = {index: text for index, text in own.items() if title_group(text)}
    # Case and spaces do not make another label; the first way of writing it is taken.
    written = {}
    for text in own.values():
        written.setdefault(title_group(text), text)
    if not 2 <= len(written) <= min(MOST_LABELS, len(own) // 2):
        return None
    number = {group: place for place, group in enumerate(written)}
    truth = np.array([number[title_group(own[i])] if i in own else -1 for i in prepared.val], np.int32)
    if (truth >= 0).sum() < max(LEAST_PRODUCTS, LEAST_SHARE * len(truth)):
        return None
    labels = tuple(written.values())
    forbidden = set().union(*map(words, labels))
    struck, leaks, told = {}, 0, 0
    for place in np.flatnonzero(truth >= 0).tolist():
        text = prepared.products[prepared.val[place]].text
        if text:
            told += 1
            leaks += _holds(text, labels[truth[place]])
            rest = strike(text, forbidden)
            if rest != " ".join(unicodedata.normalize("NFKC", text).split()):
                struck[place] = rest
    return Task(name, labels, truth, struck, round(100.0 * leaks / max(told, 1), 4))


def _stem(word: str) -> str:
    """A word without its plural ending."""
    if word.endswith(("ies", "ie")):
        return word.rstrip("s").removesuffix("ie") + "y"
    if word.endswith(("sses", "shes", "ches", "xes")):
        return word[:-2]
    return word[:-1] if word.endswith("s") and not word.endswith("ss") else word


def _parts(token: str) -> list[str]:
    return re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", token).casefold())


def words(text: str) -> set[str]:
    """The words of a text in lower case, without plural endings, and neighbours joined.

    "T-shirts" and "T shirts" are t, shirt and tshirt.
    """
    parts = _parts(text)
    joined = [first + second for first, second in itertools.pairwise(parts)]
    return set(map(_stem, (*parts, *joined)))


def _holds(text: str, label: str) -> bool:
    """Whether all words of the label stand in the text, apart or joined."""
    there, folded, parts = words(text), unicodedata.normalize("NFKC", text).casefold(), _parts(label)
    apart = all(_stem(part) in there or (UNSPACED.search(part) and part in folded) for part in parts)
    return bool(parts) and (apart or _stem("".join(parts)) in there)


def strike(text: str, forbidden: set[str]) -> str:
    """`text` without the tokens that hold a word of `forbidden`, alone or with the token that follows.

    In scripts without spaces, without the word itself.
    """
    text = unicodedata.normalize("NFKC", text)
    unspaced = sorted((word for word in forbidden if UNSPACED.search(word)), key=len, reverse=True)
    if unspaced:
        text = re.sub("|".join(map(re.escape, unspaced)), " ", text, flags=re.IGNORECASE)
    tokens = text.split()
    struck = [bool(words(token) & forbidden) for token in tokens]
    for place, (first, second) in enumerate(itertools.pairwise(tokens)):
        ends = _parts(first)[-1:] + _parts(second)[:1]
        if len(ends) == 2 and _stem("".join(ends)) in forbidden:
            struck[place] = struck[place + 1] = True
    return " ".join(token for token, gone in zip(tokens, struck, strict=True) if not gone)


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
