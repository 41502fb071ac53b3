"""The text half of co-augmentation: T⁺ = MLLM_text(T, I, E) (MOON2.0, arXiv 2511.12449).

Entities E are what a product's title, description, brand, category and attributes say of it. The enriched title T⁺ is
made of them by rules, or by a multimodal language model behind a server of OpenAI's protocol under a controlled,
versioned prompt. Whoever made it, it may say nothing that the product does not (`flaw`).
"""

from __future__ import annotations

import itertools
import re
import unicodedata

from moon_jax.evaluation.labels import UNSPACED, words
from moon_jax.types import Product

_UNIT = (
    "(?:[mck]?m|inch(?:es)?|in|ft|feet|yd|[mk]?g|gms?|oz|lbs?|[mc]?l|lit(?:re|er)s?|ltr|gal|m?ah|k?v|k?w|[kmg]?hz|"
    "[kmgt]b|mp|px|dpi|ct|cts|carats?|denier|gsm|tog|%|°[cf]?|毫米|厘米|米|英?寸|千?克|公?斤|毫?升|伏|瓦|码)"
)
_NUMBER = r"\d+(?:[.,/]\d+)*"
# Not within a code. In scripts without spaces a word may touch the number.
_BEFORE, _AFTER = rf"(?<![^\W{UNSPACED.pattern[1:-1]}])(?<![.,])", rf"(?![^\W{UNSPACED.pattern[1:-1]}])"
_MEASURE = re.compile(rf"{_BEFORE}({_NUMBER})\s*({_UNIT}){_AFTER}", re.IGNORECASE)
_DIMENSIONS = re.compile(rf"{_BEFORE}{_NUMBER}(?:\s*[x×*]\s*{_NUMBER})+{_AFTER}", re.IGNORECASE)
_LETTER_SIZE = re.compile(r"(?<!\w)(?:X{0,5}[SL]|M|\d+X[SL])(?!\w|['’])")
YES, NO = frozenset({"yes", "true"}), frozenset({"no", "none", "false", "na", "n/a", "nil", "-", "unknown", "other"})
"""Values that say whether, not what."""

MOST_FACTS, MOST_VALUES, LONGEST_FACT, LONGEST_NAME = 8, 2, 4, 2
"""Facts of an enriched title; of them, those of one name; words of a fact; words of a name that is told with it."""

LONGEST_TITLE = 300
"""Characters of an enriched title."""

FLAWS = ("empty", "several lines", "too long", "language", "number", "size", "brand", "nothing new")
"""Why an enriched title is refused (`flaw`)."""


def entities(product: Product) -> dict[str, tuple[str, ...]]:
    """E: the facts of a product by name: brand, category, its attributes, and the sizes of title and description."""
    found: dict[str, tuple[str, ...]] = {}
    if product.brand:
        found["brand"] = (product.brand,)
    for name, value in product.attributes.items():
        found.setdefault(name, (value,))
    if product.category:
        found["category"] = tuple(reversed(product.category))
    sizes = _sizes(f"{product.text or ''}\n{product.description}")
    if sizes:
        found["size in the text"] = tuple(dict.fromkeys(shown for shown in sizes.values()))
    return found


def _sizes(text: str) -> dict[str, str]:
    """The sizes that a text gives: in a form that compares → as written."""
    text = unicodedata.normalize("NFKC", text)
    found = {}
    for match in _MEASURE.finditer(text):
        found[f"{match[1]} {match[2].casefold()}"] = match[0]
    for match in itertools.chain(_DIMENSIONS.finditer(text), _LETTER_SIZE.finditer(text)):
        found[re.sub(r"\s|×|\*", lambda sign: "" if sign[0].isspace() else "x", match[0]).casefold()] = match[0]
    return found


def enriched(product: Product) -> str:
    """T⁺ by rules: the title, and behind it what else is known, each fact once. Empty where nothing else is.

    A fact is a short value; of a number, or of one that says whether, the name is told. Codes are no facts.
    """
    facts: list[str] = []
    for name, values in entities(product).items():
        for value in values[:MOST_VALUES]:
            fact = _fact(name, " ".join(value.split()))
            told = "\n".join([product.text or "", *facts])
            if not fact or not _beyond(fact, told) or len(facts) == MOST_FACTS:
                continue
            if name == "brand":
                facts.insert(0, fact)
            else:
                facts.append(fact)
    title = " ".join((product.text or "").split())
    kept = list(facts)
    while kept and len(", ".join([title, *kept])) > LONGEST_TITLE:
        kept.pop()
    return ", ".join([title, *kept]) if kept else ""


def _fact(name: str, value: str) -> str:
    """What a value tells, as a few words; empty if it tells nothing by itself."""
    short = len(name.split()) <= LONGEST_NAME and name not in ("brand", "category")
    if value.casefold() in YES:
        return name if short else ""
    if value.casefold() in NO or value.endswith(("...", "…")) or len(value.split()) > LONGEST_FACT:
        return ""
    code = any(
        len(word) > 4 and re.search(r"\d", word) and re.search(r"[^\W\d_]", word) for word in re.findall(r"\w+", value)
    )
    if code and not _sizes(value):
        return ""
    if not re.search(r"[^\W\d_]", value):
        return f"{name} {value}" if short and re.search(r"\d", value) else ""
    return value


def cleaned(answer: str) -> str:
    """A model's answer without the quotation marks and spaces that some put around it."""
    answer = answer.strip()
    while len(answer) > 1 and (answer[0], answer[-1]) in (('"', '"'), ("'", "'"), ("“", "”"), ("`", "`"), ("「", "」")):
        answer = answer[1:-1].strip()
    return answer


def source_text(product: Product) -> str:
    """All that a product says of itself in words."""
    pairs = itertools.chain.from_iterable(product.attributes.items())
    return "\n".join([product.text or "", product.description, product.brand, *product.category, *pairs])


def flaw(title: str, product: Product, brands: frozenset[str] = frozenset()) -> str:
    """Why a title is no enriched one of this product, one of FLAWS; empty if it is one.

    Args:
        brands: names of the catalogue's brands, as `brand_key` gives them.

    A number, a size, and whatever looks like a name (a word that begins with a capital, or a brand of the catalogue)
    must stand in what the product says of itself. Its language is that of the product if the script is, and if at least
    half of its words stand there.
    """
    if not title.strip():
        return "empty"
    if any(unicodedata.category(sign) in ("Cc", "Zl", "Zp", "Cs", "Co", "Cn") for sign in title):
        return "several lines"
    if len(title) > LONGEST_TITLE:
        return "too long"
    title, text = (unicodedata.normalize("NFKC", given) for given in (title, source_text(product)))
    new, pieces = _beyond(title, text), _pieces(title)
    if _scripts(title) - _scripts(text):
        return "language"
    codes = [piece for piece in new if re.search(r"\d", piece) and not piece.isdigit() and not _sizes(piece)]
    if codes or set(re.findall(_NUMBER, title)) - set(re.findall(_NUMBER, text)):
        return "number"
    if set(_sizes(title)) - set(_sizes(text)):
        return "size"
    if any(piece[0].isupper() for piece in new) or _named(title, brands) - _named(text, brands):
        return "brand"
    if sum(not re.search(r"\d", piece) for piece in new) > len(pieces) / 2:
        return "language"
    return "" if _beyond(title, product.text or "") else "nothing new"


def _pieces(text: str) -> list[str]:
    """The words of a text; in scripts without spaces, its signs."""
    tokens = re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", text))
    return [
        piece for token in tokens for piece in (re.findall(r"\d+|\D", token) if UNSPACED.search(token) else [token])
    ]


def _beyond(title: str, text: str) -> list[str]:
    """The words of a title that a text does not hold, but for case and plural endings, as one word or as two."""
    known, folded = words(text), unicodedata.normalize("NFKC", text).casefold()
    return [
        piece
        for piece in _pieces(title)
        if not words(piece) <= known and not (UNSPACED.search(piece) and piece.casefold() in folded)
    ]


def _scripts(text: str) -> set[str]:
    """The scripts of a text's letters, by their Unicode names."""
    letters = (sign for sign in set(unicodedata.normalize("NFKC", text)) if sign.isalpha())
    return {unicodedata.name(sign, "?").split()[0] for sign in letters}


def brand_key(name: str) -> str:
    """A brand's name in a form that compares; empty for what is no name."""
    parts = re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", name).casefold())
    return " ".join(parts) if any(re.search(r"[^\W\d]", part) for part in parts) else ""


def _named(text: str, brands: frozenset[str]) -> set[str]:
    """The brands that stand in a text, as whole words."""
    tokens = brand_key(text).split()
    spans = (tokens[start : start + length] for length in range(1, 5) for start in range(len(tokens) - length + 1))
    within = "".join(tokens)
    unspaced = (
        {brand for brand in brands if UNSPACED.search(brand) and brand in within} if UNSPACED.search(text) else set()
    )
    return brands.intersection(map(" ".join, spans)) | unspaced
