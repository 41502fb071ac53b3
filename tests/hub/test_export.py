"""Exported models embed in transformers and sentence-transformers exactly as in moon_jax."""

import dataclasses
import io
import json

import jax
import ml_dtypes
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

import moon_jax
from moon_jax import config as config_lib
from moon_jax.embedders.sentence_transformers import SentenceTransformer
from moon_jax.errors import UserError
from moon_jax.evaluation import verify
from moon_jax.hub import export, keys
from moon_jax.serving import embedder as serving
from tests.conftest import but_slow, random_params, tiny

CONFIGS = {
    "experts": tiny(data__visual_tokens=24, data__text_tokens=40),
    "dense": tiny(experts__count=0, data__visual_tokens=24, data__text_tokens=40),
    "some layers": tiny(
        language__norm_eps=1e-2,
        language__layers=4,
        experts__every=2,
        experts__dense_layers=(1,),
        data__visual_tokens=24,
        data__text_tokens=40,
    ),
    "as Qwen3-VL-Embedding": tiny(
        experts__count=0,
        language__pooling="last",
        data__template="qwen3_vl_embedding",
        data__visual_tokens=24,
        data__text_tokens=40,
    ),
}


@pytest.fixture(scope="module")
def chat_tokenizer():
    from tests.reference import qwen_tokenizer

    return qwen_tokenizer()


def trained(config, tokenizer, folder, **differences):
    path = folder / "tokenizer.json"
    tokenizer.save(path)
    layers = sum(config_lib.sparse_layers(config))
    rng = np.random.default_rng(1)
    alignment = {
        "dual": rng.normal(size=(layers, config.experts.count, 5)).astype(np.float32),
        "log_temperature": np.log([0.05, 0.07]).astype(np.float32),
    }
    encoder = random_params(config, tokenizer)
    fields = dict(config=config, encoder=encoder, alignment=alignment, tokenizer=path, fingerprint="f00d", step=12)
    return export.Trained(**(fields | differences))


@pytest.fixture(scope="module")
def case(request, tmp_path_factory, tokenizer, chat_tokenizer):
    """The model and its exported folder. `experts` has a tokenizer that moon_jax trained."""
    config = CONFIGS[request.param]
    folder = tmp_path_factory.mktemp("exported")
    model = trained(config, tokenizer if request.param == "experts" else chat_tokenizer, folder)
    export.export(model, folder / "model")
    return model, folder / "model"


def jpeg_of_3_by_4():
    rows, columns = np.mgrid[0:80, 0:60]
    pixels = np.stack([127 + 90 * np.sin(rows / (5 + k)) * np.cos(columns / 9) for k in range(3)], -1)
    stream = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(stream, "JPEG")
    return stream.getvalue()


def opened(image):
    return image if isinstance(image, Image.Image) else Image.open(io.BytesIO(image))


def pil_processor(folder):
    """transformers' processor with its Pillow image processor, which resizes as moon_jax does."""
    from tests.reference import transformers

    processor = transformers.AutoProcessor.from_pretrained(folder)
    processor.image_processor = transformers.Qwen2VLImageProcessorPil.from_pretrained(folder)
    return processor


ITEMS = [
    {"image": jpeg_of_3_by_4(), "text": " Red canvas sneaker, size 42 "},
    {"image": jpeg_of_3_by_4()},
    {"image": Image.fromarray(np.full((16, 1600, 3), 90, np.uint8)), "text": "ribbon"},  # exceeds the budget
    "blue mug, 红色",
    "b",
]


@pytest.mark.parametrize("case", CONFIGS, indirect=True)
def test_load_is_bit_equal(case):
    model, folder = case
    read = serving.read(folder)
    assert read.config.language == model.config.language and read.config.vision == model.config.vision
    assert config_lib.sparse_layers(read.config) == config_lib.sparse_layers(model.config)
    assert read.config.data.template == model.config.data.template
    assert read.config.data.visual_tokens == model.config.data.visual_tokens
    jax.tree.map(np.testing.assert_array_equal, read.encoder, model.encoder)
    jax.tree.map(np.testing.assert_array_equal, read.alignment, model.alignment)
    assert (read.step, read.tokenizer.read_bytes()) == (12, model.tokenizer.read_bytes())


@pytest.mark.parametrize("case", but_slow(CONFIGS, ["experts"]), indirect=True)
def test_transformers_gives_the_same_embeddings(case):
    _, folder = case
    from tests.reference import torch, transformers

    model, _ = case
    prompts, ours = verify.ours(model)
    assert (ours * verify.theirs(folder, prompts)).sum(1) == pytest.approx([1, 1, 1], abs=1e-6)
    processor = pil_processor(folder)
    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    assert type(processor).__name__ == "Qwen3VLProcessor"
    embedder = moon_jax.load(folder)
    for item in ITEMS:
        item = {"text": item} if isinstance(item, str) else item
        content = [{"type": "text", "text": item["text"]}] if "text" in item else []
        # The image comes after the text here; the template puts images first.
        content += [{"type": "image", "image": opened(item["image"])}] if "image" in item else []
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=True, return_dict=True, return_tensors="pt"
        )
        with torch.no_grad():
            hidden = model(**inputs).last_hidden_state[0]
        last = embedder.config.language.pooling == "last"
        expected = torch.nn.functional.normalize(hidden[-1] if last else hidden.mean(0), dim=0).numpy()
        np.testing.assert_allclose(embedder.encode(item)[0], expected, atol=2e-6)


@pytest.mark.parametrize("case", but_slow(["experts", "as Qwen3-VL-Embedding"], ["experts"]), indirect=True)
def test_sentence_transformers_gives_the_same_embeddings(case):
    """A 3:4 JPEG with a title, an image, a text; alone and in one batch. It resizes by torchvision, we by Pillow."""
    _, folder = case
    pytest.importorskip("torch", reason="torch is not installed: pip install -e '.[hf]'")
    library = pytest.importorskip("sentence_transformers", reason="pip install sentence-transformers")
    pytest.importorskip("torchvision", reason="torchvision, which its image processor needs, is not installed")
    items = [item if isinstance(item, str) else item | {"image": opened(item["image"])} for item in ITEMS]
    model = library.SentenceTransformer(str(folder), local_files_only=True, device="cpu")
    ours = moon_jax.load(folder).encode(ITEMS)
    for theirs in (model.encode(items), np.concatenate([model.encode([item]) for item in items])):
        np.testing.assert_allclose(np.linalg.norm(theirs, axis=1), 1, atol=1e-5)
        assert ((ours * theirs).sum(1) >= 0.9999).all()
    evaluated = SentenceTransformer(folder, 10**6)
    assert evaluated.sees == ("t", "i")
    assert ((ours * evaluated.encode([serving.as_product(item) for item in ITEMS])).sum(1) >= 0.9999).all()


@pytest.mark.parametrize("case", CONFIGS, indirect=True)
def test_the_chat_template_renders_exactly_the_view(case):
    model, folder = case
    from tests.reference import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    template = (folder / "chat_template.jinja").read_text()
    before, after = config_lib.TEMPLATES[model.config.data.template].split("{}")
    image, text = {"type": "image"}, {"type": "text", "text": "\n red {mug} <b> "}
    frame = "<|vision_start|><|image_pad|><|vision_end|>"

    def render(content):
        messages = [{"role": "user", "content": content}]
        return tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)

    assert render([text, image, image]) == f"{before}{frame}{frame}red {{mug}} <b>{after}"
    assert render([image]) == f"{before}{frame}{after}"
    assert render([text]) == render(text["text"]) == f"{before}red {{mug}} <b>{after}"
    with pytest.raises(Exception, match="trained without further instructions"):
        messages = [{"role": "system", "content": "You are"}, {"role": "user", "content": "red mug"}]
        tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
    # The processor finds the same template by itself.
    if model.config.experts.count:
        processor = transformers.AutoProcessor.from_pretrained(folder)
        assert processor.chat_template == template.removesuffix("\n") or processor.chat_template == template


@pytest.mark.parametrize("template", ["bare", "qwen3_vl_embedding"])
def test_tokens_that_the_tokenizer_appends_are_kept(tmp_path, template):
    """Qwen's text embedders append <|endoftext|>; with last-token pooling that token is the embedding."""
    from tokenizers import processors

    from tests.reference import qwen_tokenizer

    tokenizer = qwen_tokenizer()
    tokenizer.base.post_processor = processors.TemplateProcessing(
        single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", tokenizer.pad)]
    )
    config = tiny(experts__count=0, language__pooling="last", data__template=template, data__text_tokens=40)
    model = trained(config, tokenizer, tmp_path)
    assert tokenizer.template(template).suffix[-1] == tokenizer.pad
    export.export(model, tmp_path / "model")
    prompts, ours = verify.ours(model)
    assert (ours * verify.theirs(tmp_path / "model", prompts)).sum(1) == pytest.approx([1, 1, 1], abs=1e-6)


def test_a_template_that_merges_with_the_text_is_refused(tokenizer):
    """The quickstart's tokenizer puts a space before a text's first word, and nowhere else."""
    with pytest.raises(UserError, match=r"config.data.template: 'find {}' merges with the text"):
        tokenizer.template("find {}")


def test_a_template_may_hold_any_character(tmp_path):
    from tests.reference import qwen_tokenizer, transformers

    template = "😀 \"{{ x }}' %} \\ {}<|im_end|>\n".replace("{{ x }}", "x")
    export.export(trained(tiny(data__template=template), qwen_tokenizer(), tmp_path), tmp_path / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    chat = (tmp_path / "model" / "chat_template.jinja").read_text()
    messages = [{"role": "user", "content": "mug"}]
    rendered = tokenizer.apply_chat_template(messages, chat_template=chat, tokenize=False)
    assert rendered == template.replace("{}", "mug")


@pytest.mark.parametrize(
    "differences",
    [
        {"experts.per_token": 1},
        {"language.rope_theta": 99.0},
        {"language.norm_eps": 1e-3},
        {"language.pooling": "last"},
        {"data.template": "<|image_pad|>{}"},
        {"training.param_dtype": "bfloat16"},
        {"experts.router_term": "hard"},
    ],
    ids=str,
)
def test_models_of_another_space_have_another_fingerprint(tmp_path, tokenizer, differences):
    config = tiny(experts__per_token=1) if "experts.router_term" in differences else tiny()
    export.export(trained(config, tokenizer, tmp_path), tmp_path / "model")
    one, same = (serving.read(tmp_path / "model", extra) for extra in ({}, {"training.dtype": "bfloat16"}))
    assert one.fingerprint == same.fingerprint
    assert serving.read(tmp_path / "model", differences).fingerprint != one.fingerprint


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(tmp_path, tokenizer):
    model = trained(tiny(), tokenizer, tmp_path)
    export.export(model, tmp_path / "model")
    tokenizer = serving.Tokenizer.load(tmp_path / "model" / "tokenizer.json")
    tokenizer.base.add_tokens([f"word{number}" for number in range(400)])
    tokenizer.save(tmp_path / "model" / "tokenizer.json")
    with pytest.raises(UserError, match=r"tokenizer.json: \d+ tokens, more than config.language.vocab = 300"):
        moon_jax.load(tmp_path / "model")


def test_exporting_an_export_gives_the_same_files(tmp_path, tokenizer):
    model = trained(
        tiny(),
        tokenizer,
        tmp_path,
        data=dict(synthetic=False, splits=dict(train=5, val=3), triplets=4, fingerprint="d"),
    )
    export.export(model, tmp_path / "model")
    export.export(serving.read(tmp_path / "model"), tmp_path / "again")
    for name in ("config.json", "chat_template.jinja", "moon_jax/config.json", "model.safetensors"):
        assert (tmp_path / "model" / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name
    assert "of 8 triplets" in (tmp_path / "again" / "README.md").read_text()
    assert "5 products and 4 triplets" in (tmp_path / "again" / "README.md").read_text()


def test_all_files_have_the_same_permissions(tmp_path, tokenizer):
    export.export(trained(tiny(), tokenizer, tmp_path), tmp_path / "model")
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "model").rglob("*") if path.is_file()}
    assert len(modes) == 1


def test_an_output_that_cannot_be_created_is_a_one_line_error(tmp_path, tokenizer):
    model = trained(tiny(), tokenizer, tmp_path)
    with pytest.raises(UserError, match=r"--output .*tokenizer.json/model: Not a directory; give a folder"):
        export.export(model, tmp_path / "tokenizer.json" / "model")


def test_the_layout_is_the_published_one(tmp_path, tokenizer):
    config = tiny(language__layers=3, experts__dense_layers=(1,))
    export.export(trained(config, tokenizer, tmp_path), tmp_path / "model")
    held = load_file(tmp_path / "model" / "model.safetensors")
    width, inner, count = config.language.width, config.experts.width, config.experts.count
    layer = "model.language_model.layers.0.mlp"
    assert held[f"{layer}.experts.gate_up_proj"].shape == (count, width, 2 * inner)
    assert held[f"{layer}.experts.down_proj"].shape == (count, inner, width)
    assert held[f"{layer}.gate.weight"].shape == (count, width)
    assert held["model.language_model.layers.1.mlp.gate_proj.weight"].shape == (config.language.mlp_width, width)
    assert held["model.visual.patch_embed.proj.weight"].shape == (16, 3, 2, 8, 8)
    assert all(name.startswith(("model.visual.", "model.language_model.")) for name in held)
    written = json.loads((tmp_path / "model" / "config.json").read_text())
    text = written["text_config"]
    assert written["model_type"] == "qwen3_vl_moe" and written["tie_word_embeddings"] is True
    assert (text["norm_topk_prob"], text["decoder_sparse_step"], text["mlp_only_layers"]) == (True, 1, [1])
    assert text["rope_theta"] == text["rope_parameters"]["rope_theta"] == 10_000.0
    assert text["rope_scaling"]["mrope_section"] == text["rope_parameters"]["mrope_section"] == [2, 2, 2]
    pixels = json.loads((tmp_path / "model" / "preprocessor_config.json").read_text())
    assert pixels["size"] == {"shortest_edge": 2 * 256, "longest_edge": 6 * 256}
    bert = json.loads((tmp_path / "model" / "sentence_bert_config.json").read_text())
    assert set(bert["modality_config"]) == {"text", "image", "message"}


def test_several_files_have_an_index(tmp_path, tokenizer):
    config = tiny()
    model = trained(config, tokenizer, tmp_path)
    tensors = [(name, array) for name, array in export._tensors(model, keys.table(config))]
    export.write_weights(tmp_path, tensors, file_bytes=20_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(files) > 3 and sorted(set(index["weight_map"].values())) == files
    assert index["metadata"]["total_size"] == sum(array.nbytes for _, array in tensors)
    held = {}
    for file in files:
        part = load_file(tmp_path / file)
        assert all(index["weight_map"][name] == file for name in part)
        held |= part
    for name, array in tensors:
        np.testing.assert_array_equal(held[name], array)


@pytest.mark.parametrize("own", ["bfloat16", "float32"])
def test_bfloat16_round_trip(tmp_path, tokenizer, own):
    config = tiny(training__param_dtype=own)
    model = trained(config, tokenizer, tmp_path)
    cast = serving.cast(model, "bfloat16")
    export.export(cast, tmp_path / "model")
    held = load_file(tmp_path / "model" / "model.safetensors")
    assert {array.dtype for array in held.values()} == {np.dtype(ml_dtypes.bfloat16)}
    read = serving.read(tmp_path / "model")
    for ours, leaf in zip(jax.tree.leaves(read.encoder), jax.tree.leaves(model.encoder), strict=True):
        assert ours.dtype == "bfloat16"
        np.testing.assert_array_equal(np.asarray(ours), leaf.astype(ml_dtypes.bfloat16))
    wide = serving.read(tmp_path / "model", {"training.param_dtype": "float32"})
    assert jax.tree.leaves(wide.encoder)[0].dtype == "float32"
    # The written model is not the float32 one, so its fingerprint differs.
    written = json.loads((tmp_path / "model" / "moon_jax" / "model.json").read_text())["fingerprint"]
    assert written == cast.fingerprint == read.fingerprint
    assert written in (tmp_path / "model" / "README.md").read_text()


def test_folders_saved_by_transformers_are_read(tmp_path):
    """They have transposed experts, another spelling of the config, and no prefix `model.` for the base model."""
    from tests.reference import qwen_tokenizer, reference_model

    config, tokenizer = tiny(), qwen_tokenizer()
    model = reference_model(config, tokenizer)
    for name, part in (("whole", model), ("base", model.model)):
        part.save_pretrained(tmp_path / name)
        tokenizer.save(tmp_path / name / "tokenizer.json")
        found = keys.flatten(serving.read(tmp_path / name).encoder)
        theirs = model.model.state_dict()
        for row in keys.table(config):
            leaf = found[row.ours] if row.stack_index is None else found[row.ours][row.stack_index]
            array = theirs[row.theirs].numpy()
            array = array.transpose(0, 2, 1) if ".experts." in row.theirs else array
            np.testing.assert_array_equal(keys.to_theirs(np.asarray(leaf), row.transform), array, err_msg=row.theirs)


def test_a_router_term_is_refused_with_the_reason(tmp_path, tokenizer):
    for term in ("learned", "hard"):
        model = trained(tiny(experts__router_term=term, experts__per_token=1), tokenizer, tmp_path)
        with pytest.raises(UserError, match=f"router_term: {term} cannot be exported: the router of") as error:
            export.export(model, tmp_path / "model")
        assert "\n" not in str(error.value)
    assert not (tmp_path / "model").exists() and not (tmp_path / "model.part").exists()


def test_an_existing_folder_is_not_overwritten(tmp_path, tokenizer):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "precious").write_text("x")
    with pytest.raises(UserError, match=r"--output .*model: exists already; give a new or empty folder"):
        export.export(trained(tiny(), tokenizer, tmp_path), tmp_path / "model")
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["precious"]


def test_a_failed_export_leaves_nothing_behind(tmp_path, tokenizer):
    model = trained(tiny(), tokenizer, tmp_path)

    def broken(rows, total):
        del total
        yield from list(rows)[:5]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export.export(model, tmp_path / "model", track=broken)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokenizer.json"]


@pytest.mark.parametrize("width", [24, 12])
def test_widths_with_ambiguous_layouts_are_refused(width):
    with pytest.raises(UserError, match=r"experts\.width must be neither language\.width nor half of it"):
        tiny(experts__width=width)


def test_the_card_states_base_licence_data_and_metrics(tmp_path, tokenizer):
    data = dict(synthetic=True, splits=dict(train=3607, val=393), triplets=3607, fingerprint="abcd")
    row = {"R@1": 1.5, "R@5": 5.0, "R@10": 10.0, "chance@10": 2.5, "queries": 393, "candidates": 400}
    model = trained(
        tiny(),
        tokenizer,
        tmp_path,
        base="hf://Qwen/Qwen3-VL-2B-Instruct@main",
        licence="apache-2.0",
        data=data,
        metrics={"retrieval": {"products": {"t→i": row}}},
    )
    card = export.model_card(model)
    assert (
        card.startswith("---\n") and "license: apache-2.0" in card and "base_model: Qwen/Qwen3-VL-2B-Instruct\n" in card
    )
    assert "| t→i | 1.5 | 5.0 | 10.0 | 2.5 | 393 | 400 |" in card
    assert "synthetic, rendered products: 3,607 products" in card and "`abcd`" in card
    scratch = export.model_card(dataclasses.replace(model, base="", licence="", data={}, metrics={}))
    assert "none, random weights" in scratch and "not recorded" in scratch and "Not evaluated" in scratch
    local = export.model_card(dataclasses.replace(model, base="/home/someone/secret/Qwen3-VL-2B"))
    assert "secret" not in local and "Qwen3-VL-2B" in local
