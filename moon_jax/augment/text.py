"""The text half of co-augmentation: T⁺ = MLLM_text(T, I, E) (MOON2.0, arXiv 2511.12449).

Entities E are the facts in a product's title, description, brand, category and attributes. The enriched title T⁺ is
built from them by rules, or by a multimodal language model behind an OpenAI-compatible server with a controlled,
versioned prompt. Either way it may state nothing that the product's own data does not state (`flaw`).
"""

from __future__ import annotations

import itertools
import re
import unicodedata

from moon_jax.data.words import UNSPACED, words
from moon_jax.types import Product

_UNITS = {
    "mm": "mm|millimet(?:er|re)s?|毫米",
    "cm": "cms?|centimet(?:er|re)s?|厘米",
    "m": "m|mtrs?|met(?:er|re)s?|米",
    "km": "km|kilomet(?:er|re)s?|公里",
    "inch": 'in|inch|inches|"|″|英寸|寸',
    "ft": "ft|foot|feet|'|′",
    "yd": "yds?|yards?",
    "mg": "mg|milligram(?:me)?s?",
    "g": "g|gms?|gram(?:me)?s?|克",
    "kg": "kgs?|kilos?|kilogram(?:me)?s?|千克|公斤",
    "oz": "oz|ounces?",
    "lb": "lbs?|pounds?|磅",
    "ml": "ml|millilit(?:er|re)s?|毫升",
    "cl": "cl",
    "l": "l|ltrs?|lit(?:er|re)s?|升",
    "gal": "gal|gallons?",
    "v": "v|volts?|伏",
    "w": "w|watts?|瓦",
    "kw": "kw",
    "mah": "mah|毫安",
    "hz": "hz",
    "khz": "khz",
    "mhz": "mhz",
    "ghz": "ghz",
    "kb": "kb",
    "mb": "mb",
    "gb": "gb",
    "tb": "tb",
    "mp": "mp|megapixels?",
    "px": "px|pixels?",
    "dpi": "dpi",
    "ct": "cts?|carats?|克拉",
    "gsm": "gsm",
    "den": "den(?:ier)?",
    "%": "%|percent",
    "°": "°[cf]?|degrees?",
}
"""Units that turn the number before them into a size, in all spellings."""

_NUMBER = r"\d+(?:[.,/]\d+)*"
# Not within a product code. In scripts without spaces a word may touch the number.
_BEFORE, _AFTER = rf"(?<![^\W{UNSPACED.pattern[1:-1]}])(?<![.,/])", rf"(?![^\W{UNSPACED.pattern[1:-1]}])"
_MEASURE = re.compile(rf"{_BEFORE}({_NUMBER})\s*({'|'.join(_UNITS.values())}){_AFTER}", re.IGNORECASE)
_DIMENSIONS = re.compile(rf"{_BEFORE}{_NUMBER}(?:\s*[x×*]\s*{_NUMBER})+{_AFTER}", re.IGNORECASE)
_LETTER_SIZE = re.compile(r"(?<![\w'’])(?:(?i:x+[sl]|\d+x[sl])|[SML])(?![\w'’])")
_UNIT_NAMES = {name: re.compile(pattern, re.IGNORECASE) for name, pattern in _UNITS.items()}

SIZE_WORDS = re.compile("small|medium|large|oversized|petite")
NUMBER_WORDS = re.compile("two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|dozen|hundred|double|triple|twin")
"""Words for sizes and numbers, in English only."""

YES = frozenset({"yes", "true"})
NO = frozenset({"no", "none", "nan", "null", "nil", "false", "na", "n/a", "n.a.", "not applicable", "-", "unknown"})
"""Values that only confirm or deny the attribute's name."""

MOST_FACTS, MOST_VALUES, LONGEST_FACT, LONGEST_NAME = 8, 2, 4, 2
"""Limits of an enriched title: facts; facts per name; words per fact; words of a name that may be added with a fact."""

LONGEST_TITLE = 300
"""Characters of an enriched title."""

FLAWS = ("empty", "signs", "too long", "language", "number", "size", "brand", "nothing new")
"""The reasons for rejecting an enriched title (`flaw`)."""


def entities(product: Product) -> dict[str, tuple[str, ...]]:
    """E: a product's facts by name: brand, category, attributes, and the sizes in title and description."""
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
    """The sizes in a text: normalised form → as written."""
    text = unicodedata.normalize("NFKC", text)
    found = {}
    for match in _MEASURE.finditer(text):
        unit = next(name for name, spelt in _UNIT_NAMES.items() if spelt.fullmatch(match[2]))
        found[f"{match[1]} {unit}"] = match[0]
    for match in itertools.chain(_DIMENSIONS.finditer(text), _LETTER_SIZE.finditer(text)):
        found[re.sub(r"\s|×|\*", lambda sign: "" if sign[0].isspace() else "x", match[0]).casefold()] = match[0]
    return found


def enriched(product: Product) -> str:
    """T⁺ by rules: the title followed by further facts, each once; empty if there are none.

    A fact is a short value. A number is given with its attribute's name; for a value such as "yes" the name is used
    alone. Product codes are left out.
    """
    facts: list[str] = []
    for name, values in entities(product).items():
        for value in values[:MOST_VALUES]:
            fact = _fact(name, " ".join(value.split()))
            stated = "\n".join([product.text or "", *facts])
            if not fact or not _beyond(fact, stated) or len(facts) == MOST_FACTS:
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
    """A value as a few words, with its name if it needs one; empty if it is not informative by itself."""
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
    """A model's answer without surrounding quotation marks and spaces."""
    answer = answer.strip()
    while len(answer) > 1 and (answer[0], answer[-1]) in (('"', '"'), ("'", "'"), ("“", "”"), ("`", "`"), ("「", "」")):
        answer = answer[1:-1].strip()
    return answer


def source_text(product: Product) -> str:
    """All text of a product, one field per line."""
    pairs = itertools.chain.from_iterable(product.attributes.items())
    return "\n".join([product.text or "", product.description, product.brand, *product.category, *pairs])


def flaw(title: str, product: Product, brands: frozenset[str] = frozenset()) -> str:
    """Why a title is rejected as an enriched title of this product: one of FLAWS, or empty if it is accepted.

    Args:
        brands: the catalogue's brands, as `brand_key` returns them.

    "signs" are characters that control a terminal, or markup. Every number, size and apparent name (a capitalised
    word, or a brand of the catalogue) must occur in the product's own text. The language counts as the product's if
    the scripts match and at least half of the title's distinct words occur in that text.
    """
    if not title.strip():
        return "empty"
    if len(title) > LONGEST_TITLE:
        return "too long"
    if any(unicodedata.category(sign) in _CONTROLS and sign not in _JOINERS for sign in title):
        return "signs"
    title, text = (_plain(given) for given in (title, source_text(product)))
    if set("<>{}[]|\\`") & set(title) - set(text):
        return "signs"
    if _scripts(title) - _scripts(text):
        return "language"
    new, pieces = _beyond(title, text), _pieces(title)
    codes = [piece for piece in new if re.search(r"\d", piece) and not piece.isdigit() and not _sizes(piece)]
    numbers = set(re.findall(_NUMBER, title)) - set(re.findall(_NUMBER, text))
    if codes or numbers or any(NUMBER_WORDS.fullmatch(piece.casefold()) for piece in new):
        return "number"
    counted = {match[1].casefold() for match in re.finditer(rf"{_NUMBER}[\s-]*([^\W\d_]+)", title)}
    sized = {word for word in map(str.casefold, new) if SIZE_WORDS.fullmatch(word) or word in counted}
    known = {piece.casefold() for size in _sizes(title) for piece in _pieces(_sizes(title)[size])}
    if set(_sizes(title)) - set(_sizes(text)) or sized - known:
        return "size"
    if any(any(map(str.isupper, piece)) for piece in new if not _sizes(piece)) or (
        _named(title, brands) - _named(text, brands)
    ):
        return "brand"
    words_new = {piece.casefold() for piece in new if not re.search(r"\d", piece)}
    if len(words_new) > len({piece.casefold() for piece in pieces}) / 2:
        return "language"
    return "" if _beyond(title, product.text or "") else "nothing new"


_CONTROLS, _JOINERS = ("Cc", "Cf", "Zl", "Zp", "Cs", "Co", "Cn"), "\u200c\u200d"
"""Unicode categories of invisible characters, and the exceptions that Persian, Indian scripts and emoji need."""


def _plain(text: str) -> str:
    """A text normalised for comparison: compatible characters (NFKC) unified, joiners removed."""
    text = unicodedata.normalize("NFKC", text)
    return "".join(sign for sign in text if unicodedata.category(sign) != "Cf")


def _pieces(text: str) -> list[str]:
    """The words of a text; in scripts without spaces, its characters."""
    tokens = re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", text))
    return [
        piece for token in tokens for piece in (re.findall(r"\d+|\D", token) if UNSPACED.search(token) else [token])
    ]


def _beyond(title: str, text: str) -> list[str]:
    """The words of a title that do not occur in a text, ignoring case, plurals and one-word or two-word spelling."""
    known, folded = words(text), unicodedata.normalize("NFKC", text).casefold()
    return [
        piece
        for piece in _pieces(title)
        if not words(piece) <= known and not (UNSPACED.search(piece) and piece.casefold() in folded)
    ]


def _scripts(text: str) -> set[str]:
    """The scripts of a text's letters, from their Unicode names."""
    letters = (sign for sign in set(unicodedata.normalize("NFKC", text)) if sign.isalpha())
    return {unicodedata.name(sign, "?").split()[0] for sign in letters}


MOST_WORDS, MOST_SIGNS = 8, 16
"""Longest brand name, in words, or in characters for scripts without spaces."""


def brand_key(name: str) -> str:
    """A brand's name normalised for comparison, without spaces, case and accents; empty if it is not a name."""
    apart = unicodedata.normalize("NFKD", _plain(name)).casefold()
    key = "".join(sign for sign in apart if sign.isalnum())
    return key if re.search(r"[^\W\d_]", key) else ""


def _named(text: str, brands: frozenset[str]) -> set[str]:
    """The brands that occur in a text as whole words, or anywhere in scripts without spaces."""
    if not brands:
        return set()
    tokens = [key for key in map(brand_key, _pieces(text)) if key]
    longest = MOST_SIGNS if UNSPACED.search(text) else MOST_WORDS
    spans = (tokens[start : start + length] for start in range(len(tokens)) for length in range(1, longest + 1))
    return set(brands.intersection(map("".join, spans)))
