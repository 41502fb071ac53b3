"""How often a ranking that knows every word finds the right title from the words that a query of the evaluation keeps.

    python benchmarks/text_bound.py --data prepared [--seeds 5]

The ranking knows all words: titles that contain every word of the query come first, shorter ones before longer ones.
What is left are ties, and how they are broken decides. Products that share a title are one hit, so a ranking that
breaks ties by product covers more titles in its first ten places than one that puts products of a title side by side,
as every model must that gives equal texts equal vectors. BM25 breaks ties by product.
"""

from __future__ import annotations

import argparse

import numpy as np

from moon_jax.data import known
from moon_jax.data.prepared import open_prepared
from moon_jax.data.text import keep_words
from moon_jax.evaluation import metrics, retrieval


def scores(titles: list[str], queries: list[str]) -> np.ndarray:
    """f32[Q,C]: the more words of the query a title contains the higher, then the shorter the higher."""
    number = {word: index for index, word in enumerate(sorted({word for text in titles for word in text.split()}))}
    has = np.zeros((2, len(titles), len(number)), np.float32)
    for made, texts in zip(has, (queries, titles), strict=True):
        for row, text in zip(made, texts, strict=True):
            row[[number[word] for word in text.split()]] = 1
    return 1000 * (has[0] @ has[1].T) - has[1].sum(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="prepared data")
    parser.add_argument("--seeds", type=int, default=5, help="times that ties are broken at random")
    parsed = parser.parse_args()
    prepared = open_prepared(parsed.data)
    held_out = [index for index in prepared.val if prepared.products[index].text]
    titles = [prepared.products[index].text.strip() for index in held_out]
    altered = retrieval.ALTERATION
    queries = [
        keep_words(title, altered.keep_word, altered.least_words, np.random.default_rng((retrieval.SEED, number)))
        for number, title in enumerate(titles)
    ]
    score, key = scores(titles, queries), known.keys(prepared.group, np.array(held_out))
    relevant, group = metrics.Keys(key, key), np.unique(key, return_inverse=True)[1]
    print(f"{len(titles)} products, {group.max() + 1} titles; R@10 in percent, mean of {parsed.seeds}")
    for name, tied in (("product", np.arange(len(titles))), ("title", group)):
        found = []
        for seed in range(parsed.seeds):
            # Ties of integers: a fraction below one orders them, and nothing else.
            ordered = score + 0.9 * np.random.default_rng(seed).random(tied.max() + 1)[tied]
            first = np.argsort(-ordered, axis=1, kind="stable")[:, :10]
            found.append(100 * (relevant.gains(first) > 0).any(1).mean())
        print(f"ties broken by {name}: {np.mean(found):.1f}")


if __name__ == "__main__":
    main()
