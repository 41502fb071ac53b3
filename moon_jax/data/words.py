"""Splits text of any script into words; compares them without case, accents or English plurals."""

from __future__ import annotations

import itertools
import re
import unicodedata

UNSPACED = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u9fff\uf900-\ufaff]")
"""Characters of scripts without spaces between words: Thai, Lao, Burmese, Khmer, Chinese, Japanese."""


_MARKS = "".join(chr(code) for code in range(0x300, 0x10000) if unicodedata.category(chr(code)).startswith("M"))
WORD = re.compile(rf"[^\W_](?:[^\W_]|[\u200c\u200d{_MARKS}])*")
"""Letters and digits with their combining marks, such as the vowels of Indic scripts, Hebrew and Arabic."""

IRREGULAR = {
    "men": "man",
    "women": "woman",
    "children": "child",
    "feet": "foot",
    "teeth": "tooth",
    "mice": "mouse",
    "geese": "goose",
}
"""Irregular English plurals."""


def _stem(word: str) -> str:
    """A word without its plural ending, cut until singular and plural are equal: lens and lenses become len."""
    word = IRREGULAR.get(word, word)
    while len(word) > 3 and word[-1] in "se":
        word = word[:-1]
    word = IRREGULAR.get(word, word)
    if len(word) > 3 and word.endswith(("y", "v")):  # berry, berries; scarf, scarves
        return word[:-1] + ("i" if word[-1] == "y" else "f")
    return word[:-1] if word.endswith("zz") else word


def _fold(text: str) -> str:
    """Lower case without accents and possessive s: "Women's Café" becomes "women cafe"."""
    plain = re.sub("[\u0300-\u036f]", "", unicodedata.normalize("NFKD", text))
    return re.sub(r"['’]s\b", "", unicodedata.normalize("NFKC", plain).casefold())


def _parts(token: str) -> list[str]:
    return WORD.findall(_fold(token))


def words(text: str) -> set[str]:
    """Stems of a text's words and of adjacent words joined: "T-shirts" and "T shirts" give t, shirt and tshirt."""
    parts = _parts(text)
    joined = [first + second for first, second in itertools.pairwise(parts)]
    return set(map(_stem, (*parts, *joined)))


def holds(text: str, label: str) -> bool:
    """Whether the text contains all words of the label, separately or joined."""
    present, folded, parts = words(text), _fold(text), _parts(label)
    separately = all(_stem(part) in present or (UNSPACED.search(part) and part in folded) for part in parts)
    return bool(parts) and (separately or _stem("".join(parts)) in present)


def remove(text: str, forbidden: set[str]) -> str:
    """Removes the tokens that contain a word of `forbidden`, alone or joined with the next token.

    In scripts without spaces, removes only the word itself.
    """
    text = unicodedata.normalize("NFKC", text)
    unspaced = sorted((word for word in forbidden if UNSPACED.search(word)), key=len, reverse=True)
    if unspaced:
        text = re.sub("|".join(map(re.escape, unspaced)), " ", text, flags=re.IGNORECASE)
    tokens = text.split()
    removed = [bool(words(token) & forbidden) for token in tokens]
    for position, (first, second) in enumerate(itertools.pairwise(tokens)):
        ends = _parts(first)[-1:] + _parts(second)[:1]
        if len(ends) == 2 and _stem("".join(ends)) in forbidden:
            removed[position] = removed[position + 1] = True
    return " ".join(token for token, drop in zip(tokens, removed, strict=True) if not drop)
