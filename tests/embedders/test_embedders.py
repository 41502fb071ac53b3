"""Third-party embedders, compared with transformers on the same texts and images."""

import io

import numpy as np
import pytest
from PIL import Image

from moon_jax.embedders import contrastive, registry
from moon_jax.embedders.sentence_transformers import SentenceTransformer
from moon_jax.errors import UserError
from moon_jax.types import Product
from tests.conftest import jpeg

TEXTS = ["red canvas sneaker", "blue mug", "a " * 60, "x"]
IMAGES = [jpeg((200, 30, 30), (40, 30), 0), jpeg((20, 30, 200), (24, 60), 1)]
TOWERS = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def write_tokenizer(path):
    """Writes a tokenizer with the words of TEXTS as its vocabulary."""
    from tests.reference import transformers

    words = sorted({word for text in TEXTS for word in text.split()})
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    base = Tokenizer(
        models.WordLevel({"<s>": 0, "</s>": 1, "<unk>": 2} | {w: 3 + n for n, w in enumerate(words)}, "<unk>")
    )
    base.pre_tokenizer = pre_tokenizers.Whitespace()
    base.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=base, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )
    fast.save_pretrained(path)


def folder_of(kind, path):
    """Writes a folder with a tiny random model of that kind, its tokenizer and its image processor."""
    from tests.reference import torch, transformers

    write_tokenizer(path)
    text = TOWERS | {
        "vocab_size": 40,
        "max_position_embeddings": 12,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    vision = TOWERS | {"image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    if kind == "clip":
        model = transformers.CLIPModel(
            transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
        )
        processor = transformers.CLIPImageProcessorPil(
            size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
        )
    elif kind == "siglip":
        model = transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=vision))
        processor = transformers.SiglipImageProcessorPil(size={"height": 32, "width": 32})
    else:
        vision = TOWERS | {"num_patches": 16, "patch_size": 8}
        model = transformers.Siglip2Model(transformers.Siglip2Config(text_config=text, vision_config=vision))
        processor = transformers.Siglip2ImageProcessorPil(patch_size=8, max_num_patches=16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    model.eval().save_pretrained(path)
    processor.save_pretrained(path)
    return model, transformers.AutoTokenizer.from_pretrained(path), processor


@pytest.mark.parametrize("kind", contrastive.MODEL_TYPES)
def test_contrastive_models_equal_transformers(kind, tmp_path, monkeypatch):
    """Similarities equal the model's own logits after removing bias and scale."""
    from tests.reference import torch

    model, tokenizer, processor = folder_of(kind, tmp_path)
    monkeypatch.setattr(contrastive, "BATCH", 3)
    embedder = registry.open_embedder(str(tmp_path), 10**6)
    texts = embedder.encode([Product(text=text) for text in TEXTS])
    images = embedder.encode([Product(images=(image,)) for image in IMAGES])
    assert texts.dtype == np.float32 and np.allclose(np.linalg.norm(texts, axis=1), 1, atol=1e-6)
    inputs = dict(
        processor(images=[Image.open(io.BytesIO(image)).convert("RGB") for image in IMAGES], return_tensors="pt")
    )
    padding = "longest" if kind == "clip" else "max_length"
    inputs |= tokenizer(TEXTS, padding=padding, max_length=12, truncation=True, return_tensors="pt")
    inputs.pop("token_type_ids", None)
    with torch.no_grad():
        logits = model(**inputs).logits_per_text
        own = (logits - getattr(model, "logit_bias", 0)) / model.logit_scale.exp()
    np.testing.assert_allclose(texts @ images.T, own.numpy(), atol=2e-5)
    both = embedder.encode([Product(text=TEXTS[0], images=IMAGES[:1])])
    mean = texts[0] + images[0]
    np.testing.assert_allclose(both[0], mean / np.linalg.norm(mean), atol=1e-5)
    with pytest.raises(UserError, match="item 1: neither text nor image"):
        embedder.encode([Product(text="x"), Product()])
    assert embedder.name.startswith(f"{kind} ")
    with torch.no_grad():
        next(model.parameters()).add_(1)
    model.save_pretrained(tmp_path)
    assert registry.open_embedder(str(tmp_path), 10**6).name != embedder.name


def test_pickled_and_damaged_weights_are_refused(tmp_path):
    from tests.reference import torch

    model, _, _ = folder_of("clip", tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match=str(tmp_path)):
        registry.open_embedder(str(tmp_path), 10**6)
    weights.unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=str(tmp_path)):
        registry.open_embedder(str(tmp_path), 10**6)


def test_open_embedder_returns_our_embedder_for_a_workdir(tmp_path, tokenizer, monkeypatch):
    from moon_jax.serving import embedder as serving
    from tests.conftest import random_params, tiny

    config = tiny()
    own = serving.Embedder(config, random_params(config, tokenizer), tokenizer, "f00d", 1)
    monkeypatch.setattr(serving, "load", lambda model: own)
    ours = registry.open_embedder(str(tmp_path), 10**6)
    items = [Product(text="red shirt"), Product(images=IMAGES[:1])]
    np.testing.assert_array_equal(ours.encode(items), own.encode(items))
    assert ours.name == "moon_jax f00d"


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        registry.open_embedder("nowhere", 10**6)
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(UserError, match=str(tmp_path)):
        registry.open_embedder(str(tmp_path), 10**6)


def test_sentence_transformers_models_embed_texts(tmp_path):
    """A bare encoder with mean pooling, like most; a product with text and image is embedded from its text."""
    from tests.reference import torch, transformers

    library = pytest.importorskip("sentence_transformers", reason="pip install sentence-transformers")
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    write_tokenizer(tmp_path / "encoder")
    torch.manual_seed(0)
    settings = TOWERS | {"vocab_size": 40, "max_position_embeddings": 12}
    encoder = transformers.BertModel(transformers.BertConfig(**settings)).eval()
    encoder.save_pretrained(tmp_path / "encoder")
    body = Transformer(str(tmp_path / "encoder"))
    library.SentenceTransformer(modules=[body, Pooling(TOWERS["hidden_size"])], device="cpu").save(str(tmp_path / "m"))
    model = registry.open_embedder(str(tmp_path / "m"), 10**6)
    assert isinstance(model, SentenceTransformer) and model.sees == ("t",)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "encoder")
    expected = []
    for text in TEXTS[:2]:
        with torch.no_grad():
            hidden = encoder(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0).numpy()
        expected.append(hidden / np.linalg.norm(hidden))
    products = [Product(text=TEXTS[0], images=(IMAGES[0],)), Product(text=TEXTS[1]), Product(images=(IMAGES[1],))]
    vectors, present = model.encode_views(products)
    np.testing.assert_array_equal(present, [[True, False, True], [True, False, False], [False, False, False]])
    np.testing.assert_allclose(vectors[:2, 0], expected, atol=1e-5)
    np.testing.assert_allclose(vectors[0, 2], expected[0], atol=1e-5)
    with pytest.raises(UserError, match="item 0: neither text nor image"):
        model.encode([Product()])
