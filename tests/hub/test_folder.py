"""Settings read from Hugging Face folders, and refused folders."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

import moon_jax
from moon_jax import config as config_lib
from moon_jax.errors import UserError
from moon_jax.hub import folder
from tests.conftest import ROOT
from tests.hub.test_published import PUBLISHED


@pytest.fixture
def published(tmp_path):
    """A folder with the config of the published 2B."""
    shutil.copy(PUBLISHED / "2b.json", tmp_path / "config.json")
    return tmp_path


def edit(path, *keys, **values):
    held = json.loads(path.read_text())
    part = held
    for key in keys:
        part = part[key]
    part.update(values)
    path.write_text(json.dumps(held))


def test_sizes_are_the_folders(published):
    found = folder.settings(published)
    ours = config_lib.leaves(config_lib.Config())  # its defaults are the 2B's
    for name, value in found.items():
        assert ours[name] == value, name
    assert sum(name.startswith(("vision.", "language.")) for name in found) == 18
    assert folder.config(published, {}).experts.count == 0


def test_both_spellings_of_the_rope_settings(published):
    before = folder.settings(published)
    path = published / "config.json"
    held = json.loads(path.read_text())
    language = held["text_config"]
    language["rope_parameters"] = language.pop("rope_scaling") | {"rope_theta": language.pop("rope_theta")}
    path.write_text(json.dumps(held))
    assert folder.settings(published) == before


@pytest.mark.parametrize(
    ("keys", "values", "message"),
    [
        ((), {"model_type": "qwen2_vl"}, "model_type 'qwen2_vl' is not supported; give qwen3_vl or qwen3_vl_moe"),
        ((), {"quantization_config": {"bits": 4}}, "quantization_config"),
        (("text_config",), {"hidden_act": "gelu"}, "text_config.hidden_act is 'gelu'; moon_jax supports 'silu' only"),
        (("text_config",), {"attention_bias": True}, "attention_bias"),
        (("text_config", "rope_scaling"), {"rope_type": "yarn"}, "rope_type is 'yarn'"),
        (("text_config", "rope_scaling"), {"mrope_interleaved": False}, "mrope_interleaved"),
        (("text_config",), {"norm_topk_prob": False}, "norm_topk_prob"),
        (("vision_config",), {"out_hidden_size": 99}, "out_hidden_size is 99; moon_jax supports 2048 only"),
        ((), {"vision_config": {}}, "'depth' is missing"),
        ((), {"text_config": None}, "are not those of a qwen3_vl"),
        (("vision_config",), {"patch_size": 0}, "must be positive"),
        (("text_config",), {"num_attention_heads": 0, "head_dim": None}, "are not those of a qwen3_vl"),
        (("vision_config",), {"patch_size": "16"}, "are not those of a qwen3_vl|is not a whole number"),
        (("text_config",), {"num_attention_heads": 15}, "language.heads must be a multiple"),
    ],
)
def test_another_model_is_refused_by_name(published, keys, values, message):
    edit(published / "config.json", *keys, **values)
    with pytest.raises(UserError, match=message) as error:
        folder.config(published, {})
    assert "\n" not in str(error.value)


def test_experts_are_the_folders(tmp_path):
    shutil.copy(PUBLISHED / "30b_a3b.json", tmp_path / "config.json")
    experts = folder.config(tmp_path, {}).experts
    assert (experts.count, experts.per_token, experts.width, experts.every) == (128, 8, 768, 1)
    edit(tmp_path / "config.json", "text_config", mlp_only_layers=[3, 1], decoder_sparse_step=2)
    config = folder.config(tmp_path, {})
    sparse = config_lib.sparse_layers(config)
    assert not any(sparse[:5]) and all(sparse[5::2]) and not any(sparse[::2])
    with pytest.raises(UserError, match=r"config.experts.count: 8, but .* has 128"):
        folder.check(config_lib.replace(config, {"experts.count": 8}), tmp_path)


def test_two_settings_may_describe_the_same_expert_layers(tmp_path):
    shutil.copy(PUBLISHED / "30b_a3b.json", tmp_path / "config.json")
    edit(tmp_path / "config.json", "text_config", mlp_only_layers=list(range(0, 48, 2)))
    config = folder.config(tmp_path, {})
    folder.check(config_lib.replace(config, {"experts.every": 2, "experts.dense_layers": ()}), tmp_path)
    with pytest.raises(UserError, match=r"config.experts.every and dense_layers: in .* other layers hold experts"):
        folder.check(config_lib.replace(config, {"experts.dense_layers": ()}), tmp_path)


def test_a_config_may_restore_the_defaults(published, tmp_path_factory):
    embedding_folder(published, LAST)
    path = tmp_path_factory.mktemp("config") / "mean.py"
    path.write_text("def get_config():\n    return {'language': {'pooling': 'mean'}, 'data': {'template': 'bare'}}\n")
    config = config_lib.load(str(path), folder.settings(published))
    assert (config.language.pooling, config.data.template) == ("mean", "bare")


def test_a_workdir_is_refused(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.json").write_text(config_lib.to_json(config_lib.Config()))
    with pytest.raises(UserError, match="a workdir; moon-jax export turns it into a Hugging Face folder"):
        folder.settings(tmp_path)


def test_a_dense_folder_may_be_upcycled_and_other_sizes_may_not(published):
    folder.check(config_lib.Config(), published)  # 8 experts in every layer
    with pytest.raises(UserError, match=r"config.language.layers: 14, but .* has 28"):
        folder.check(config_lib.replace(config_lib.Config(), {"language.layers": 14}), published)


def test_the_pixel_budget_is_the_folders_up_to_the_default(published):
    path = published / "preprocessor_config.json"
    tokens = lambda: [folder.settings(published)[f"data.{name}visual_tokens"] for name in ("", "min_")]  # noqa: E731
    assert tokens() == [256, 4]
    path.write_text(json.dumps({"size": {"longest_edge": 16777216, "shortest_edge": 65536}}))  # Qwen3-VL's
    assert tokens() == [256, 64]
    path.write_text(json.dumps({"min_pixels": 4096, "max_pixels": 131072}))
    assert tokens() == [128, 4]
    path.unlink()
    nested = {"image_processor": {"size": {"longest_edge": 65536, "shortest_edge": 4096}}}
    (published / "processor_config.json").write_text(json.dumps(nested))
    assert tokens() == [64, 4]
    path.write_text(json.dumps({"image_mean": [0.48, 0.45, 0.40]}))
    with pytest.raises(UserError, match=r"image_mean \[0.48, 0.45, 0.4\]; moon_jax supports \[0.5, 0.5, 0.5\] only"):
        folder.settings(published)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("preprocessor_config.json", {"size": [1]}, "are not those of a qwen3_vl"),
        ("preprocessor_config.json", {"size": {"longest_edge": "9"}}, "are not those of a qwen3_vl"),
        ("preprocessor_config.json", {"do_resize": False}, "do_resize False; moon_jax supports True only"),
        ("preprocessor_config.json", {"merge_size": 3}, "merge_size 3; moon_jax supports 2 only"),
        ("preprocessor_config.json", {"resample": 2}, "resample 2; moon_jax supports 3 only"),
        ("preprocessor_config.json", {"rescale_factor": 1}, "rescale_factor 1"),
        ("preprocessor_config.json", {"max_pixels": -5}, "must be positive"),
        ("processor_config.json", {"image_processor": None}, "are not those of a qwen3_vl"),
        ("modules.json", [{"type": "x.Pooling", "path": "../2_Pooling"}], "is not a subfolder"),
        ("modules.json", {"type": 3}, "are not those of a qwen3_vl"),
        ("config.json", "[" * 200_000, "not a JSON object"),
        ("config.json", "{", "not a JSON object"),
        ("chat_template.jinja", b"\xff\xfe", "are not those of a qwen3_vl"),
    ],
    ids=str,
)
def test_malformed_files_give_a_one_line_error(published, name, content, message):
    if name == "chat_template.jinja":
        embedding_folder(published, LAST)
    path = published / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(UserError, match=message) as error:
        folder.config(published, {})
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_only_what_is_read_is_fetched():
    from huggingface_hub.utils import filter_repo_objects

    held = ["config.json", "1_Pooling/config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json"]
    held += ["chat_template.jinja", "README.md", "moon_jax/alignment.safetensors"]
    left = [
        "modeling.py",
        "moon_jax/evil.py",
        "moon_jax/x.pkl",
        "pytorch_model.bin",
        "onnx/model.safetensors",
        "a.gguf",
    ]
    assert list(filter_repo_objects(held + left, allow_patterns=list(folder.FETCHED))) == held


def test_a_sidecar_that_contradicts_is_refused(published):
    (published / "moon_jax").mkdir()
    other = config_lib.replace(config_lib.Config(), {"experts.count": 0, "language.rope_theta": 10_000.0})
    (published / "moon_jax" / "config.json").write_text(config_lib.to_json(other))
    with pytest.raises(UserError, match=r"language.rope_theta is 10000.0, but .*config.json gives 5000000.0"):
        folder.settings(published)


CHAT = "{% for message in messages %}<|im_start|>{{ message.role }}…"


def embedding_folder(path, pooling, prompts=None, generation=None, chat=CHAT):
    (path / "1_Pooling").mkdir()
    (path / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    (path / "chat_template.json").write_text(json.dumps({"chat_template": chat}))
    if prompts is not None:
        (path / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    if generation is not None:
        kwargs = {"processing_kwargs": {"chat_template": {"add_generation_prompt": generation}}}
        (path / "sentence_bert_config.json").write_text(json.dumps(kwargs))


LAST = {"word_embedding_dimension": 2048, "pooling_mode_mean_tokens": False, "pooling_mode_lasttoken": True}


@pytest.mark.parametrize(
    ("pooling", "options", "expected"),
    [
        (LAST, {}, ("last", "qwen3_vl_embedding")),
        ({"pooling_mode": "lasttoken"}, {"generation": True}, ("last", "qwen3_vl_embedding")),
        (
            {"pooling_mode": "lasttoken"},
            {"prompts": {"prompts": {"document": "Represent it."}, "default_prompt_name": "document"}},
            (
                "last",
                "<|im_start|>system\nRepresent it.<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n",
            ),
        ),
        ({"pooling_mode": "mean"}, {}, ("mean", "<|im_start|>user\n{}<|im_end|>\n")),
    ],
)
def test_pooling_and_template_come_from_the_folder(published, pooling, options, expected):
    embedding_folder(published, pooling, **options)
    found = folder.settings(published)
    assert (found["language.pooling"], found["data.template"]) == expected
    # As the documentation of Qwen3-VL-Embedding renders it.
    if expected[1] == "qwen3_vl_embedding":
        assert config_lib.TEMPLATES["qwen3_vl_embedding"].format("red mug") == (
            "<|im_start|>system\nRepresent the user's input.<|im_end|>\n"
            "<|im_start|>user\nred mug<|im_end|>\n<|im_start|>assistant\n"
        )


def test_pooling_is_found_with_and_without_modules_json(published):
    embedding_folder(published, LAST)
    (published / "1_Pooling").rename(published / "7_Pooling")
    assert "language.pooling" not in folder.settings(published)
    modules = [{"type": "a.Transformer", "path": ""}, {"type": "a.Pooling", "path": "7_Pooling"}]
    (published / "modules.json").write_text(json.dumps(modules))
    assert folder.settings(published)["language.pooling"] == "last"
    # A conversion that lost these files is recognised by the instruction in its chat template.
    shutil.rmtree(published / "7_Pooling")
    (published / "modules.json").unlink()
    (published / "chat_template.json").write_text(json.dumps({"chat_template": CHAT + " Represent the user's input."}))
    found = folder.settings(published)
    assert (found["language.pooling"], found["data.template"]) == ("last", "qwen3_vl_embedding")


@pytest.mark.parametrize(
    ("pooling", "chat", "message"),
    [
        ({"pooling_mode": "max"}, CHAT, "pools by max"),
        ({"pooling_mode_cls_token": True, "pooling_mode_lasttoken": True}, CHAT, "supports mean and last-token"),
        (LAST, "[INST]", "chat template is not Qwen's"),
    ],
)
def test_another_pooling_is_refused(published, pooling, chat, message):
    embedding_folder(published, pooling, chat=chat)
    with pytest.raises(UserError, match=message):
        folder.settings(published)


def test_a_model_that_is_not_an_embedder_is_pooled_as_in_the_paper(published):
    config = folder.config(published, {})
    assert (config.language.pooling, config.data.template) == ("mean", "bare")


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("---\nlicense: apache-2.0\ntags: []\n---\n# Qwen", "apache-2.0"),
        ("---\r\nlicense: 'mit'\r\n---\r\n", "mit"),
        ("# none\nlicense: mit", ""),
        (None, ""),
    ],
)
def test_the_licence_is_the_cards(tmp_path, card, expected):
    if card:
        (tmp_path / "README.md").write_text(card)
    assert folder.licence(tmp_path) == expected


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("nowhere/at-all", "nowhere/at-all: no such folder; for a model of the Hugging Face hub, give hf://nowhere"),
        ("https://huggingface.co/Qwen/Qwen3-VL-2B-Instruct", "give hf://Qwen/Qwen3-VL-2B-Instruct"),
        ("hf://only-a-name", "not a model's name; give hf://owner/name"),
        ("hf://../../etc/passwd", "not a model's name; give hf://owner/name"),
    ],
)
def test_a_missing_model_is_an_error_with_a_suggestion(monkeypatch, tmp_path, model, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        moon_jax.load(model)
    assert "\n" not in str(error.value)


HUB = """
import huggingface_hub.constants as constants
from moon_jax.hub import folder
from moon_jax.errors import UserError
found = folder.locate("hf://owner/name")
print(sorted(path.name for path in found.iterdir()))
try:
    folder.locate("hf://owner/other")
except UserError as error:
    print(error)
"""


def test_a_hub_id_resolves_to_its_snapshot(tmp_path):
    """Hugging Face's own client, without a network and with one repository in its cache."""
    commit = "0" * 40
    repository = tmp_path / "hub" / "models--owner--name"
    (repository / "snapshots" / commit).mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots" / commit / "config.json").write_text("{}")
    result = subprocess.run(
        [sys.executable, "-c", HUB],
        env={"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PATH": "", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert result.stderr == ""
    held, refused = result.stdout.splitlines()
    assert held == "['config.json']"
    assert refused.startswith("hf://owner/other: cannot be downloaded (")


def test_the_network_is_used_for_hub_ids_only(published):
    """The hub's client is imported for `hf://` only."""
    code = (
        "import sys; from pathlib import Path; from moon_jax.hub import folder;"
        f"folder.config(folder.locate({str(published)!r}), {{}}); print('huggingface_hub' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stdout == "False\n"


def test_a_config_may_differ_from_the_folder_it_starts_from(published):
    embedding_folder(published, LAST)
    config = config_lib.load("moon2_qwen3vl_2b", folder.settings(published))
    assert (config.language.pooling, config.data.template, config.training.dtype) == (
        "last",
        "qwen3_vl_embedding",
        "bfloat16",
    )
    assert config.experts.count == 8 and np.isclose(config.training.learning_rate, 1e-5)
