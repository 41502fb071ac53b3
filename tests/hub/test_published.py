"""Published model sizes, checked without their memory: config.json (from public documentation) → our shapes."""

import json
import math
import shutil
from pathlib import Path

import flax.linen as nn
import jax
import pytest

from moon_jax import config as config_lib
from moon_jax.data import rows as rows_lib
from moon_jax.hub import folder, keys
from moon_jax.model.encoder import initialize

PUBLISHED = Path(__file__).parent / "published"
TOTALS = {"2b": 2_127_532_032, "4b": 4_437_815_808, "8b": 8_767_123_696, "30b_a3b": 31_070_754_032}
"""Parameters of the checkpoints on the Hugging Face hub, including the untied head of the larger two."""


def shapes(config):
    rows = rows_lib.pack([[]], rows_lib.Layout.of(config), 0)
    return keys.flatten(nn.unbox(jax.eval_shape(lambda: initialize(config, jax.random.key(0), rows))))


def parameters(config):
    return sum(math.prod(leaf.shape) for leaf in shapes(config).values())


@pytest.mark.parametrize("name", TOTALS)
def test_parameter_totals_equal_the_published(tmp_path, name):
    shutil.copy(PUBLISHED / f"{name}.json", tmp_path / "config.json")
    config = folder.config(tmp_path, {})
    held = json.loads((PUBLISHED / f"{name}.json").read_text())
    head = 0 if held["tie_word_embeddings"] else config.language.vocab * config.language.width
    assert parameters(config) + head == TOTALS[name]
    # The table has a row for every layer of every leaf.
    rows = list(keys.table(config))
    for path, leaf in shapes(config).items():
        indices = [row.stack_index for row in rows if row.ours == path]
        assert indices == ([None] if indices == [None] else list(range(leaf.shape[0]))), path


# name → (its checkpoint, billions of parameters, billions of active parameters), as the config's docstring states
SHIPPED = {
    "moon2_qwen3vl_2b": ("2b", 9.5, 3.2),
    "moon2_qwen3vl_4b": ("4b", 13.9, 5.8),
    "moon2_qwen3vl_8b": ("8b", 27.2, 10.9),
    "moon2_qwen3vl_2b_dense": ("2b", 2.1, 2.1),
}


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_config_fits_its_checkpoint_and_states_its_size(tmp_path, name):
    published, total, active = SHIPPED[name]
    shutil.copy(PUBLISHED / f"{published}.json", tmp_path / "config.json")
    config = config_lib.load(name)
    folder.check(config, tmp_path)
    leaves = shapes(config)
    everything = sum(math.prod(leaf.shape) for leaf in leaves.values())
    experts = sum(math.prod(leaf.shape) for path, leaf in leaves.items() if path.endswith(("/gate_up", "/down")))
    used = everything - experts
    if config.experts.count:
        used += experts * config.experts.per_token // config.experts.count
    assert (round(everything / 1e9, 1), round(used / 1e9, 1)) == (total, active)
    doc = (config_lib.shipped_configs() / f"{name}.py").read_text()
    assert f"{total} B" in doc and f"{active} B" in doc
    # As in the docstring: 6 FLOPs per parameter and token or patch, full rows, three products per triplet.
    vision = sum(math.prod(leaf.shape) for path, leaf in leaves.items() if path.startswith("vision/"))
    decoder = used - vision - config.language.vocab * config.language.width
    layout = rows_lib.Layout.of(config)
    flops = 6 * 3 * config.data.batch * (decoder * layout.length + vision * layout.patches)
    assert f"about {round(flops / 1e15)} PFLOP" in doc.replace("\n", " ")
    assert f"{round(3 * 4 * everything / 1e9)} GB" in doc.replace("\n", " ")
    assert config.training.learning_rate == 1e-5 and config.data.batch == 256  # the paper's
