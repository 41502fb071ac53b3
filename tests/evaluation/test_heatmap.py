"""Attention heatmaps: attention compared with transformers, and the formulas of heat and contributions."""

import numpy as np
import pytest
from PIL import Image

from moon_jax import cli
from moon_jax.data.images import ResizeRule
from moon_jax.errors import UserError
from moon_jax.evaluation import heatmap, pictures, verify
from moon_jax.serving import embedder as serving
from moon_jax.serving.embedder import Embedder
from moon_jax.types import Product
from tests.conftest import but_slow, jpeg, random_params, tiny
from tests.hub.test_export import CONFIGS, case, chat_tokenizer  # noqa: F401

PHOTO = jpeg((200, 30, 30), (40, 60), 0)


@pytest.fixture(scope="module")
def embedder(tokenizer):
    config = tiny()
    return Embedder(config, random_params(config, tokenizer), tokenizer, "f00d", 1)


@pytest.mark.parametrize(
    "case",
    but_slow(CONFIGS, ["experts"]),
    indirect=True,
)
def test_attention_equals_that_of_transformers(case):  # noqa: F811
    """For a text, an image and both, in every layer and head; also compares the hidden states."""
    _, folder = case
    from tests.reference import torch, transformers

    model = transformers.AutoModel.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", local_files_only=True
    ).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    images = transformers.Qwen2VLImageProcessorPil.from_pretrained(folder)
    template = (folder / "chat_template.jinja").read_text()
    ours = serving.load(folder)
    longest = ours.config.data.text_tokens
    products = verify.products(
        lambda title: len(ours.reader.tokenizer.encode([title], longest + 1)[0]) <= longest,
        ResizeRule.of(ours.config).max_pixels,
    )
    for product in products:
        with torch.no_grad():
            theirs = model(**verify._inputs(product, tokenizer, images, template), output_attentions=True)
        attended = heatmap.attend(ours, product)
        expected = np.stack([layer[0].numpy() for layer in theirs.attentions])
        assert attended.attention.shape == expected.shape and expected.shape[-1] > 2
        np.testing.assert_allclose(attended.attention, expected, atol=2e-6)
        np.testing.assert_allclose(attended.hidden, theirs.last_hidden_state[0].numpy(), atol=2e-4)
        np.testing.assert_allclose(attended.embedding, ours.encode([product])[0], atol=1e-6)


def test_heat_is_the_mean_attention_to_a_token(embedder):
    attended = heatmap.attend(embedder, Product(text="red shirt", images=(PHOTO,)))
    assert {attended.heat.dtype, attended.attention.dtype} == {np.dtype(np.float32)}
    layers, heads, length, _ = attended.attention.shape
    assert (layers, heads) == (embedder.config.language.layers, embedder.config.language.heads)
    np.testing.assert_allclose(attended.attention.sum(-1), 1, atol=1e-5)
    for layer, head, token in ((0, 0, 0), (1, 3, 2), (0, 2, length - 1)):
        given = [attended.attention[layer, head, other, token] for other in range(token, length)]
        assert attended.heat[layer, head, token] == pytest.approx(np.mean(given), abs=1e-6)
        assert not attended.attention[layer, head, :token, token].any()  # earlier tokens do not attend to it
    np.testing.assert_allclose(attended.mean(), attended.heat.mean((0, 1)))
    np.testing.assert_allclose(attended.mean(1, 2), attended.heat[1, 2])
    np.testing.assert_allclose(attended.mean(head=1), attended.heat[:, 1].mean(0))
    with pytest.raises(UserError, match=r"--layer 2: the model has 2, counted from 0"):
        attended.mean(2)


def test_contributions_sum_to_the_similarity(embedder):
    query, item = (heatmap.attend(embedder, x) for x in ("red shirt", Product(text="a bag", images=(PHOTO,))))
    similarity = query.embedding @ item.embedding
    for one, other in ((query, item), (item, query)):
        contributions = one.contributions(other.embedding)
        assert contributions.sum() == pytest.approx(similarity, abs=1e-5) and len(contributions) == len(one.pieces)
        assert contributions.std() > 0


def test_with_last_token_pooling_heat_is_that_token_s_attention(tokenizer):
    config = tiny(language__pooling="last")
    model = Embedder(config, random_params(config, tokenizer), tokenizer, "f00d", 1)
    attended = heatmap.attend(model, "red shirt")
    np.testing.assert_array_equal(attended.heat, attended.attention[:, :, -1])
    contributions = attended.contributions(heatmap.attend(model, "blue bag").embedding)
    assert not contributions[:-1].any() and contributions[-1]
    with pytest.raises(UserError, match="--contributions: the model pools the last token only"):
        heatmap.maps(model, {"query": "red shirt", "item": "blue bag"}, None, None, True)


def test_tokens_have_their_text_and_grid_positions(embedder):
    attended = heatmap.attend(embedder, Product(text="red shirt", images=(PHOTO, PHOTO)))
    assert "".join(attended.pieces).split() == ["red", "shirt"]
    values = np.arange(len(attended.pieces), dtype=np.float32)
    high, wide = (size // 2 for size in embedder.reader.image(PHOTO, None, None).hw)
    picture = heatmap.image(attended, values)
    assert picture.shape == (high, wide)
    # Visual tokens come row by row after the image's opening token.
    np.testing.assert_array_equal(picture.ravel(), 1 + np.arange(high * wide))
    assert heatmap.image(attended, values, 1).size == 0  # only one image of a product is read
    assert heatmap.image(heatmap.attend(embedder, "red shirt"), values[:3]).size == 0


def test_characters_of_several_tokens_are_not_split(embedder):
    title = "红 ☕"
    pieces = heatmap.attend(embedder, title).pieces
    assert "".join(pieces).strip() == title and len(pieces) > len(title.split())
    assert embedder.reader.tokenizer.base.encode(title).ids != [] and not any("\ufffd" in piece for piece in pieces)


def test_the_command_draws_pairs_and_models(embedder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(serving, "load", lambda model: embedder)
    (tmp_path / "x.jpg").write_bytes(PHOTO)
    flags = ["--model", "m", "--text", "red shirt $5", "--item-text", "bag", "--item-image", str(tmp_path / "x.jpg")]
    pair = {"query": Product(text="red shirt $5"), "item": Product(text="bag", images=(PHOTO,))}
    for number, more in enumerate(([], ["--compare", "n", "--layer", "1", "--head", "0"], ["--contributions"])):
        path = tmp_path / f"{number}.png"
        assert cli.main(["heatmap", *flags, "--output", str(path), *more]) == 0
        with Image.open(path) as picture:
            assert min(picture.size) > 300
        arrays = np.load(path.with_suffix(".npz"), allow_pickle=False)
        assert arrays["0/query/attention"].shape[:2] == arrays["0/item/heat"].shape[:2] == (2, 4)
        assert ("1/item/grid" in arrays) == ("--compare" in more)
        seen = {name: heatmap.attend(embedder, item) for name, item in pair.items()}
        layers, heads = (1, 0) if "--layer" in more else (slice(None), slice(None))
        for name, other in (("query", "item"), ("item", "query")):
            drawn = seen[name].heat[layers, heads].reshape(-1, seen[name].heat.shape[-1]).mean(0)
            if "--contributions" in more:
                drawn = seen[name].contributions(seen[other].embedding)
            np.testing.assert_allclose(arrays[f"0/{name}/drawn"], drawn, atol=1e-6)
    capsys.readouterr()
    out = str(tmp_path / "o.png")
    for given, message in (
        (["--model", "m", "--output", out], "give a text, an --image, or both"),
        (["--model", "m", "--text", "x", "--output", "o.jpg"], "give a file that ends in .png"),
        (
            ["--model", "m", "--text", "x", "--output", str(tmp_path / "x.jpg" / "o.png")],
            "in a folder that can be created",
        ),
        (["--model", "m", "--text", "x", "--output", out, "--contributions"], "needs a query and an item"),
        (["--model", "m", "--text", "x", "--output", out, "--head", "9"], "--head 9: the model has 4"),
        (["--model", "m", "--image", "no.jpg", "--output", out], "--image no.jpg: No such file"),
        (["--model", "m", "--item-image", "no.jpg", "--output", out], "--item-image no.jpg: No such file"),
        ([*flags, "--output", out, "--contributions", "--layer", "1"], "leave --layer and --head out"),
    ):
        assert cli.main(["heatmap", *given]) == cli.USER_ERROR
        assert message in capsys.readouterr().err


def test_a_single_input_is_an_item_and_text_alone_makes_a_low_picture(embedder, tmp_path, monkeypatch):
    monkeypatch.setattr(serving, "load", lambda model: embedder)
    (tmp_path / "x.jpg").write_bytes(PHOTO)
    sizes = []
    for given in (["--text", "red shirt"], ["--image", str(tmp_path / "x.jpg")]):
        path = tmp_path / "o.png"
        assert cli.main(["heatmap", "--model", "m", *given, "--output", str(path)]) == 0
        names = {name.split("/")[1] for name in np.load(path.with_suffix(".npz"), allow_pickle=False)}
        assert names == {"item"}
        with Image.open(path) as picture:
            sizes.append(picture.height)
    assert sizes[0] < 0.6 * sizes[1]


def test_third_party_models_are_refused_with_the_flag_in_the_error(tmp_path, capsys):
    flags = ["heatmap", "--text", "x", "--output", str(tmp_path / "o.png"), "--model"]
    assert cli.main([*flags, "nowhere"]) == cli.USER_ERROR
    assert "--model nowhere: no such folder" in capsys.readouterr().err
    assert cli.main([*flags, "bm25"]) == cli.USER_ERROR
    assert "--model bm25: has no attention to draw" in capsys.readouterr().err


@pytest.mark.parametrize("contributions", [False, True])
def test_words_and_patches_share_a_scale_that_shows_negative_values(embedder, tmp_path, monkeypatch, contributions):
    figures, save = [], pictures.Figure.savefig
    monkeypatch.setattr(pictures.Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k)))
    item = Product(text="red shirt", images=(PHOTO,))
    attended = heatmap.attend(embedder, item)
    values = np.linspace(-0.5 if contributions else 0, 1, len(attended.pieces)).astype(np.float32)
    heatmap.draw(tmp_path / "x.png", [("m", [("item", item, attended, values)])], 10**6, "", contributions)
    over, below, bar = figures[-1].subfigs[0].axes
    heat = heatmap.image(attended, values)
    # The colour of each patch and each word is that of its value on the common colour bar.
    least, most = (float(end) for end in bar.get_ylim())
    words = [text.get_bbox_patch().get_facecolor() for text in below.texts]
    drawn = [value for value, piece in zip(values, attended.pieces, strict=True) if piece.strip()]
    assert len(words) == len(drawn) >= 2
    extreme = max(np.abs(heat).max(), np.abs(drawn).max())
    np.testing.assert_allclose((least, most), (-extreme if contributions else 0, extreme), rtol=1e-6)
    colours = heatmap.ScalarMappable(heatmap.Normalize(least, most), "PuOr_r" if contributions else "YlOrRd")
    np.testing.assert_allclose(over.images[1].get_array(), colours.to_rgba(heat), atol=1e-6)
    for value, colour in zip(drawn, words, strict=True):
        np.testing.assert_allclose(colour, colours.to_rgba(value, alpha=0.6), atol=1e-6)
