"""Text on the host: the tokenizer, and the random removal of words."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer as BaseTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from moon_jax import config as config_lib
from moon_jax.errors import UserError

PAD, VISION_START, VISION_END, IMAGE_PAD = "<|endoftext|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"
VIDEO_PAD = "<|video_pad|>"  # unused here, but Qwen3-VL's processor requires it
SPECIAL = (PAD, VISION_START, VISION_END, IMAGE_PAD, VIDEO_PAD)


@dataclasses.dataclass(frozen=True)
class Template:
    """Token ids before and after those of a view."""

    prefix: np.ndarray  # i32[n]
    suffix: np.ndarray  # i32[n]

    @property
    def length(self) -> int:
        return len(self.prefix) + len(self.suffix)


BARE = Template(np.zeros(0, np.int32), np.zeros(0, np.int32))


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A fast tokenizer and the ids of its special tokens."""

    base: BaseTokenizer
    pad: int
    vision_start: int
    vision_end: int
    image_pad: int
    video_pad: int

    @classmethod
    def of(cls, base: BaseTokenizer, where: str) -> Tokenizer:
        ids = [base.token_to_id(token) for token in SPECIAL]
        if None in ids:
            raise UserError(f"{where}: no token {SPECIAL[ids.index(None)]}; use the tokenizer.json of a Qwen-VL model")
        # Special tokens spelled out in a title become ordinary tokens, so that a title cannot forge an image.
        base.encode_special_tokens = True
        return cls(base, *ids)

    @classmethod
    def load(cls, path: str | Path, vocab: int | None = None) -> Tokenizer:
        """Loads a tokenizer.json.

        Args:
            vocab: number of rows of the token embedding, if it is to be checked.

        Raises:
            UserError: it lacks the special tokens of Qwen-VL, or has more tokens than `vocab`.
        """
        try:
            base = BaseTokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{path}: not a readable tokenizer.json ({error})") from None
        tokenizer = cls.of(base, str(path))
        if vocab is not None and tokenizer.size > vocab:
            raise UserError(f"{path}: {tokenizer.size} tokens, more than config.language.vocab = {vocab}")
        return tokenizer

    def save(self, path: str | Path) -> None:
        self.base.save(str(path))

    @property
    def size(self) -> int:
        return max(self.base.get_vocab().values()) + 1

    def encode(self, texts: Iterable[str], longest: int) -> list[np.ndarray]:
        """Token ids i32[n] of each text, truncated to n ≤ `longest`."""
        texts = list(texts)
        if len(texts) == 1:  # encode_batch would start threads
            encoded = [self.base.encode(texts[0], add_special_tokens=False)]
        else:
            encoded = self.base.encode_batch(texts, add_special_tokens=False)
        return [np.array(item.ids[:longest], np.int32) for item in encoded]

    def template(self, name: str) -> Template:
        """The template named in `config.TEMPLATES`, or the given template text, with the tokenizer's own added tokens.

        Raises:
            UserError: the template's tokens change when text is inserted; servers tokenize the whole as one string.
        """
        # In a template, special tokens are intended.
        self.base.encode_special_tokens = False
        try:
            before, after = config_lib.TEMPLATES.get(name, name).split("{}")
            prefix, suffix = self._ids(before), self._ids(after)
            ends = None
            for probe in ("red", "9", "-x", "é", "红"):
                whole = self.base.encode(before + probe + after).ids
                bare = prefix + self._ids(probe) + suffix
                starts = [at for at in range(len(whole) - len(bare) + 1) if whole[at : at + len(bare)] == bare]
                found = (whole[: starts[0]], whole[starts[0] + len(bare) :]) if starts else None
                if found is None or found != (ends or found):
                    raise UserError(f"config.data.template: {name!r} merges with the text in this tokenizer; use bare")
                ends = found
        finally:
            self.base.encode_special_tokens = True
        return Template(np.array(ends[0] + prefix, np.int32), np.array(suffix + ends[1], np.int32))

    def _ids(self, text: str) -> list[int]:
        return self.base.encode(text, add_special_tokens=False).ids


def train(texts: Iterable[str], vocab: int) -> Tokenizer:
    """Trains a lower-casing byte-level BPE of at most `vocab` tokens; it can encode any text."""
    base = BaseTokenizer(models.BPE())
    base.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    # A word has the same tokens at the start of a text as elsewhere.
    base.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    base.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    base.train_from_iterator(texts, trainer)
    return Tokenizer.of(base, "the trained tokenizer")


def keep_words(text: str, probability: float, least: int, rng: np.random.Generator) -> str:
    """Keeps each word with `probability`, in order; at least `least` words, or all if there are fewer."""
    words = text.split()
    kept = rng.random(len(words)) < probability
    missing = min(least, len(words)) - int(kept.sum())
    if missing > 0:
        kept[rng.choice(np.flatnonzero(~kept), missing, replace=False)] = True
    return " ".join(word for word, stays in zip(words, kept, strict=True) if stays)
