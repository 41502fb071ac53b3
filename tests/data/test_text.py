import numpy as np

from moon_jax.data import text

TITLES = ["Red canvas sneaker", "Blue denim jacket", "red denim shirt", "Größe 42 – été"] * 3


def test_training_is_deterministic_and_saving_lossless(tmp_path):
    first, second = text.train(TITLES, 300), text.train(TITLES, 300)
    first.save(tmp_path / "a.json")
    second.save(tmp_path / "b.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    loaded = text.Tokenizer.load(tmp_path / "a.json")
    for a, b in zip(first.encode(TITLES, 99), loaded.encode(TITLES, 99), strict=True):
        np.testing.assert_array_equal(a, b)
    assert loaded.size <= 300


def test_a_title_cannot_forge_an_image():
    tokenizer = text.train(TITLES, 300)
    (ids,) = tokenizer.encode(["red <|image_pad|> <|vision_start|>"], 99)
    special = {tokenizer.pad, tokenizer.vision_start, tokenizer.vision_end, tokenizer.image_pad}
    assert not special & set(ids.tolist())
    assert len(special) == 4


def test_any_text_can_be_encoded_and_is_truncated():
    tokenizer = text.train(TITLES, 300)
    (ids,) = tokenizer.encode(["日本語 🎈 \x00"], 99)
    assert tokenizer.base.decode(ids.tolist()).strip() == "日本語 🎈 \x00"
    assert len(tokenizer.encode(["a b c d e f g"], 3)[0]) == 3


def test_keep_words_keeps_order_and_a_minimum():
    rng = np.random.default_rng(0)
    words = ["a", "b", "c", "d", "e", "f"]
    lengths = set()
    for _ in range(200):
        kept = text.keep_words("a b c d e f", 0.5, 2, rng).split()
        assert kept == [word for word in words if word in kept] and len(kept) >= 2
        lengths.add(len(kept))
    assert lengths == {2, 3, 4, 5, 6}
    assert text.keep_words("a b c", 0.0, 2, rng).count(" ") == 1
    assert text.keep_words("alone", 0.0, 2, rng) == "alone"
