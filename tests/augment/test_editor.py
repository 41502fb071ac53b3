"""Expanded images from a diffusers pipeline: a tiny random InstructPix2Pix."""

import functools
import inspect
import json
import shutil
import threading
import time
from collections import Counter

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from moon_jax.augment import candidates, editor, engines, pipeline
from moon_jax.augment.options import Options
from moon_jax.data.images import decode
from moon_jax.errors import UserError
from moon_jax.ingest import workers
from tests.conftest import prepared_from

reference = pytest.importorskip("tests.reference", reason="torch and transformers are not installed")
diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: pip install -e '.[diffusers]'")
torch, transformers = reference.torch, reference.transformers


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("pipeline")
    torch.manual_seed(0)
    letters = [chr(number) for number in range(33, 127)]
    vocabulary = {token: n for n, token in enumerate([*letters, *(f"{letter}</w>" for letter in letters)])}
    vocabulary |= {"<|startoftext|>": len(vocabulary), "<|endoftext|>": len(vocabulary) + 1}
    (path / "vocab.json").write_text(json.dumps(vocabulary))
    (path / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)
    text = transformers.CLIPTextConfig(
        hidden_size=16,
        intermediate_size=16,
        num_attention_heads=2,
        num_hidden_layers=1,
        vocab_size=len(vocabulary),
        bos_token_id=len(vocabulary) - 2,
        eos_token_id=len(vocabulary) - 1,
        pad_token_id=len(vocabulary) - 1,
    )
    made = diffusers.StableDiffusionInstructPix2PixPipeline(
        vae=diffusers.AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4,
            latent_channels=4,
        ),
        text_encoder=transformers.CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=diffusers.UNet2DConditionModel(
            sample_size=16,
            in_channels=8,
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=16,
            attention_head_dim=4,
        ),
        scheduler=diffusers.EulerDiscreteScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    made.save_pretrained(path / "model", safe_serialization=True)
    return path / "model"


def picture():
    noise = np.random.default_rng(0).integers(0, 255, (24, 32, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def test_an_edit_equals_the_pipelines_and_depends_on_the_seed(folder):
    edit = editor.Editor(str(folder), 2).load()
    first, again, other = (edit(picture(), "a mug", seed) for seed in (1, 1, 2))
    assert first.tobytes() == again.tobytes() != other.tobytes()
    assert first.tobytes() != edit(picture(), "a shoe", 1).tobytes()
    own = diffusers.StableDiffusionInstructPix2PixPipeline.from_pretrained(folder)
    own.set_progress_bar_config(disable=True)
    generator = torch.Generator("cpu").manual_seed(1)
    expected = own(image=picture(), prompt="a mug", generator=generator, num_inference_steps=2).images[0]
    assert first.tobytes() == expected.tobytes()


def test_expansions_are_edits_of_the_subject():
    """I_m = edit(I), I_k = edit(I_m, T, prompt_k); each has its own seed and its own name in the cache."""
    calls, names = [], []

    def edit(base, prompt, seed):
        calls.append((base.getpixel((8, 8)), prompt, seed))
        return Image.new("RGB", (32, 32), (10 * len(calls),) * 3)

    def cache(name, make):
        names.append(name)
        return make()

    made = editor.expand(edit, Image.new("RGB", (32, 32), (200, 200, 200)), "blue {mug}", 4, 70, cache)
    assert [name for name, _, _ in made] == ["background", "viewpoint", "detail", "background"]
    assert names == ["subject", "1", "2", "3", "4"] and [seed for _, _, seed in calls] == [70, 71, 72, 73, 74]
    assert [base[0] for base, _, _ in calls] == [200, 10, 10, 10, 10]
    assert all("blue {mug}" in prompt for _, prompt, _ in calls)
    assert [decode(image, 10**6).getpixel((0, 0))[0] for _, _, image in made] == [20, 30, 40, 50]
    assert [seed for _, seed, _ in made] == [71, 72, 73, 74]


@pytest.mark.slow
def test_a_crash_loses_no_edited_image(folder, catalogue, tmp_path, monkeypatch):
    data = tmp_path / "p"
    prepared_from(catalogue, data)
    options = Options(text="none", images=str(folder), image_steps=1, expansions=1)
    engine = engines.Local(functools.partial(workers.pool, 1), 1)
    edits = Counter()
    load = editor.Editor.load

    def broken(self, after):
        edit = load(self)

        def counted(picture, prompt, seed):
            if sum(edits.values()) == after:
                raise MemoryError("the device is gone")
            edits[prompt, seed] += 1
            return edit(picture, prompt, seed)

        return counted

    candidates._loaded.cache_clear()
    with monkeypatch.context() as patched:
        patched.setattr(editor.Editor, "load", lambda self: broken(self, 7))
        with pytest.raises(MemoryError):
            pipeline.augment(data, tmp_path / "a", options, 10**7, engine, 1)
        candidates._loaded.cache_clear()
        patched.setattr(editor.Editor, "load", lambda self: broken(self, -1))
        prepared = pipeline.augment(data, tmp_path / "a", options, 10**7, engine, 1)
    assert set(edits.values()) == {1}
    candidates._loaded.cache_clear()
    undisturbed = pipeline.augment(data, tmp_path / "b", options, 10**7, engine, 1)
    assert list(prepared.products) == list(undisturbed.products)
    made = [p for p in prepared.products if p.expanded_images]
    assert len(made) == sum(bool(prepared.products[index].images) for index in prepared.train)
    assert len(edits) == 2 * len(made) and all(decode(p.expanded_images[0], 10**6) for p in made)


@pytest.mark.parametrize("name", ["QwenImageEditPipeline", "QwenImageEditPlusPipeline", "FluxKontextPipeline"])
def test_the_recommended_pipelines_share_one_signature(name):
    parameters = inspect.signature(getattr(diffusers, name).__call__).parameters
    assert {"image", "prompt", "generator", "num_inference_steps"} <= set(parameters)


def test_a_pipeline_with_code_or_pickles_is_refused(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "code")
    (tmp_path / "code" / "unet" / "mine.py").write_text("raise SystemExit('ran')")
    with pytest.raises(UserError, match=r"contains code \(unet/mine\.py\), which is never run"):
        editor.Editor(str(tmp_path / "code")).load()
    shutil.copytree(folder, tmp_path / "pickled")
    weights = next((tmp_path / "pickled" / "unet").glob("*.safetensors"))
    torch.save({}, weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(UserError, match="--images"):
        editor.Editor(str(tmp_path / "pickled")).load()


def test_one_pipeline_edits_one_image_at_a_time_beside_a_server(folder, catalogue, tmp_path, monkeypatch):
    """Several threads request titles, but the pipeline is loaded once. An image that training could not read is left
    out, and each row has the seed of its edit."""
    from moon_jax.augment import chat

    busy, seeds, loads = threading.Lock(), [], []

    def load(self):
        loads.append(self)

        def edit(picture, prompt, seed):
            assert busy.acquire(blocking=False), "two at a time"
            time.sleep(0.002)
            seeds.append(seed)
            busy.release()
            elongated = len(seeds) > 20 and "everyday" in prompt
            return Image.new("RGB", (600, 2) if elongated else (24, 24), (seed % 256, 0, 0))

        return edit

    monkeypatch.setattr(editor.Editor, "load", load)
    monkeypatch.setattr(chat.Chat, "answer", lambda self, client, request: "")
    candidates._loaded.cache_clear()
    prepared_from(catalogue, tmp_path / "p")
    options = Options(text="http://127.0.0.1:9/v1", text_model="m", images=str(folder), expansions=1)
    engine = engines.Local(functools.partial(workers.pool, 1), 1)
    prepared = pipeline.augment(tmp_path / "p", tmp_path / "a", options, 10**7, engine, 8)
    candidates._loaded.cache_clear()
    rows = pq.read_table(prepared.folder / pipeline.RESULTS).to_pylist()
    images = [row for row in rows if row["kind"] == "image"]
    assert len(loads) == 1 and len(seeds) == 2 * len(images)
    assert {row["seed"] for row in images} == set(seeds) - {row["seed"] - 1 for row in images}
    assert {row["prompt"] for row in images} == {editor.PROMPT_VERSION}
    left = [row for row in images if row["reason"]]
    assert left and all(row["reason"] == "bad image" and "elongated" in row["detail"] for row in left)
    assert sum(len(product.expanded_images) for product in prepared.products) == len(images) - len(left) > 0


def test_a_folder_that_is_not_a_pipeline_is_an_error(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "Nothing"}')
    with pytest.raises(UserError, match="--images"):
        editor.Editor(str(tmp_path)).load()


@pytest.mark.slow
def test_qwen_image_edit_itself(tmp_path):
    """The pipeline that the docs recommend, tiny and random: it loads and edits, and its output is scaled down."""
    kept = json.loads(reference.qwen_tokenizer(320).base.to_str())["model"]
    names = ["<|image_pad|>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>"]
    tokenizer = transformers.Qwen2Tokenizer(vocab=kept["vocab"], merges=[tuple(pair) for pair in kept["merges"]])
    tokenizer.add_special_tokens({"additional_special_tokens": [*names, "<|im_start|>", "<|im_end|>"]})
    image, start, end, video = tokenizer.convert_tokens_to_ids(names)
    widths = {"hidden_size": 16, "intermediate_size": 16}
    text = widths | {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 330}
    rope = {"mrope_section": [1, 1, 2], "rope_type": "default", "rope_theta": 1e6}
    config = transformers.Qwen2_5_VLConfig(
        text_config=text | {"rope_parameters": rope, "max_position_embeddings": 4096},
        vision_config=widths | {"depth": 1, "num_heads": 2, "out_hidden_size": 16, "fullatt_block_indexes": [0]},
        image_token_id=image,
        vision_start_token_id=start,
        vision_end_token_id=end,
        video_token_id=video,
    )
    torch.manual_seed(0)
    made = diffusers.QwenImageEditPipeline(
        transformer=diffusers.QwenImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            axes_dims_rope=(8, 4, 4),
        ),
        vae=diffusers.AutoencoderKLQwenImage(
            base_dim=8, z_dim=4, num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        text_encoder=transformers.Qwen2_5_VLForConditionalGeneration(config),
        tokenizer=tokenizer,
        processor=transformers.Qwen2VLProcessor(
            image_processor=transformers.Qwen2VLImageProcessor(min_pixels=28**2, max_pixels=64 * 28**2),
            tokenizer=tokenizer,
            video_processor=transformers.Qwen2VLVideoProcessor(),
        ),
    )
    made.save_pretrained(tmp_path / "model", safe_serialization=True)
    edited = editor.Editor(str(tmp_path / "model"), 1).load()(picture(), "a mug", 3)
    assert max(edited.size) == editor.LONGEST_SIDE and edited.mode == "RGB"
