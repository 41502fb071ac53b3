"""BM25, the text baseline."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np

from moon_jax.data.words import UNSPACED, WORD
from moon_jax.embedders.protocol import ByItem
from moon_jax.errors import UserError
from moon_jax.types import Product


class BM25(ByItem):
    """Lucene's BM25 over titles, k1 = 1.5 and b = 0.75, by the library bm25s. An item is encoded as its title."""

    name = "BM25"
    sees = ("t",)

    def __init__(self, max_pixels: int):
        """
        Raises:
            UserError: bm25s is not installed.
        """
        try:
            import bm25s
        except ImportError:
            raise UserError("bm25: needs bm25s; pip install -e '.[baselines]'") from None
        logging.getLogger("bm25s").setLevel(logging.WARNING)  # it logs every step
        self._library, self.max_pixels = bm25s, max_pixels

    def encode(self, items: Sequence[Product]) -> np.ndarray:
        return np.array([item.text for item in items], object)

    def rank(self, queries: Sequence[str], candidates: Sequence[str], k: int) -> tuple[np.ndarray, np.ndarray]:
        """Like similarity.top_k, for titles: scores f32[Q,k] and candidates i32[Q,k]."""
        index = self._library.BM25(k1=1.5, b=0.75, method="lucene")
        index.index([_words(text) or [""] for text in candidates], show_progress=False)
        known = index.vocab_dict
        scores, found = np.zeros((len(queries), k), np.float32), np.zeros((len(queries), k), np.int32)
        for number, query in enumerate(queries):
            words = [word for word in _words(query) if word in known]
            score = index.get_scores(words) if words else np.zeros(len(candidates), np.float32)
            found[number] = np.argsort(-score, kind="stable")[:k]
            scores[number] = score[found[number]]
        return scores, found


def _words(text: str) -> list[str]:
    """Lower-case words; in scripts without spaces, each character is a word."""
    spaced = UNSPACED.sub(lambda sign: f" {sign.group()} ", text.casefold())
    return WORD.findall(spaced)
