"""Words of a text in any script, compared without case, accents or English plurals."""

from __future__ import annotations

import itertools
import re
import unicodedata

UNSPACED = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u9fff\uf900-\ufaff]")
"""Characters of scripts without spaces between words: Thai, Lao, Burmese, Khmer, Chinese, Japanese."""


_MARKS = "".join(chr(code) for code in range(0x300, 0x10000) if unicodedata.category(chr(code)).startswith("M"))
WORD = re.compile(rf"[^\W_](?:[^\W_]|[\u200c\u200d{_MARKS}])*")
"""Letters and digits with the marks that belong to them: the vowels of Indic scripts, of Hebrew and of Arabic."""

IRREGULAR = {
    "men": "man",
    "women": "woman",
    "children": "child",
    "feet": "foot",
    "teeth": "tooth",
    "mice": "mouse",
    "geese": "goose",
}
"""English plurals without an ending."""


def _stem(word: str) -> str:
    """A word without its plural ending, cut so far that singular and plural meet: lens and lenses are len."""
    word = IRREGULAR.get(word, word)
    while len(word) > 3 and word[-1] in "se":
        word = word[:-1]
    word = IRREGULAR.get(word, word)
    if len(word) > 3 and word.endswith(("y", "v")):  # berry, berries; scarf, scarves
        return word[:-1] + ("i" if word[-1] == "y" else "f")
    return word[:-1] if word.endswith("zz") else word


def _fold(text: str) -> str:
    """Small letters without accents, and no possessive s: "Women's Café" is women cafe."""
    plain = re.sub("[\u0300-\u036f]", "", unicodedata.normalize("NFKD", text))
    return re.sub(r"['’]s\b", "", unicodedata.normalize("NFKC", plain).casefold())


def _parts(token: str) -> list[str]:
    return WORD.findall(_fold(token))


def words(text: str) -> set[str]:
    """The stems of a text's words, and of neighbours joined: "T-shirts" and "T shirts" are t, shirt and tshirt."""
    parts = _parts(text)
    joined = [first + second for first, second in itertools.pairwise(parts)]
    return set(map(_stem, (*parts, *joined)))


def holds(text: str, label: str) -> bool:
    """Whether all words of the label stand in the text, apart or joined."""
    there, folded, parts = words(text), _fold(text), _parts(label)
    apart = all(_stem(part) in there or (UNSPACED.search(part) and part in folded) for part in parts)
    return bool(parts) and (apart or _stem("".join(parts)) in there)


def remove(text: str, forbidden: set[str]) -> str:
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
