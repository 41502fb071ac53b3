"""End to end through the command line: public weights, training, export, serving."""

import json
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import moon_jax
from moon_jax import cli
from moon_jax import config as config_lib
from moon_jax.errors import UserError
from moon_jax.evaluation import verify
from moon_jax.hub import export
from moon_jax.serving import embedder as serving
from tests.conftest import ROOT, environment, overrides, tiny
from tests.hub.test_export import trained

WITHOUT_TORCH = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers", "torchvision", "sentence_transformers"):
            raise ModuleNotFoundError(f"{name} is blocked", name=name)

sys.meta_path.insert(0, Blocked())
from moon_jax import cli
import moon_jax
assert cli.main(sys.argv[3:]) == 0
assert cli.main(["export", "--model", sys.argv[1], "--output", sys.argv[2]]) == 0
print(moon_jax.load(sys.argv[2]).encode("red mug").shape)
assert cli.main(["export", "--model", sys.argv[1], "--output", sys.argv[2] + "2", "--verify"]) == 2
"""


@pytest.mark.slow
def test_from_public_weights_through_the_command_line(tmp_path, catalogue):
    """A public folder is upcycled, trained, exported and used to embed, all without torch."""
    from tests.reference import published, qwen_tokenizer

    sizes = dict(experts__width=tiny().language.mlp_width, data__path=str(catalogue), training__steps=2)
    config = tiny(**sizes, training__save_every=2)
    published(tmp_path / "public", tiny(**sizes, experts__count=0), qwen_tokenizer())
    (tmp_path / "public" / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    (tmp_path / "config.py").write_text(
        "from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict({})\n"
    )
    workdir, output = tmp_path / "run", tmp_path / "served"
    # The folder determines all sizes but those of the experts, so these are not given.
    given = [item for item in overrides(config) if not item.startswith(("--config.vision", "--config.language"))]
    train = ["train", "--config", str(tmp_path / "config.py"), "--init", str(tmp_path / "public"), "--data"]
    train += [str(catalogue), "--workdir", str(workdir), *given]
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, str(workdir), str(output), *train],
        env=environment(),
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert result.returncode == 0, result.stderr
    assert "(1, 24)" in result.stdout and "loading" in result.stdout
    assert "moon-jax: --verify: needs torch, which is not installed; pip install" in result.stderr
    assert json.loads((workdir / "base.json").read_text())["licence"] == "apache-2.0"
    card = (output / "README.md").read_text()
    assert "license: apache-2.0" in card and "public" in card and str(tmp_path) not in card
    for path in output.rglob("*.json"):
        assert str(tmp_path) not in path.read_text(), path
    embedder = moon_jax.load(workdir)
    assert embedder.fingerprint == moon_jax.load(output).fingerprint
    assert embedder.config.language.layers == 2 and embedder.config.experts.count == 4
    assert cli.main(["export", "--model", str(workdir), "--output", str(tmp_path / "again"), "--verify"]) == 0

    # Verification notices a changed model: one expert's matrix is doubled on disk.
    again = tmp_path / "again" / "model.safetensors"
    held = load_file(again)
    name = "model.language_model.layers.1.mlp.experts.down_proj"
    held[name] = 2 * held[name]
    save_file(held, again, metadata={"format": "pt"})
    prompts, ours = verify.ours(serving.read(workdir))
    with pytest.raises(UserError, match="embeddings of transformers differ: cosine"):
        verify.check((ours * verify.theirs(tmp_path / "again", prompts)).sum(axis=1))
    with pytest.raises(UserError, match="embeddings of transformers differ: cosine nan"):
        verify.check(np.array([1.0, np.nan, 1.0]))


@pytest.mark.slow
def test_from_an_own_export_through_the_command_line(tmp_path, catalogue, tokenizer):
    """Started by --init with a config.json, and resumed by the same command after the folder is gone."""
    config = tiny(language__layers=4, experts__every=2, data__path=str(catalogue), training__steps=2)
    config = config_lib.replace(config, {"training.save_every": 1, "training.learning_rate": 0.0})
    export.export(trained(config, tokenizer, tmp_path), tmp_path / "own")
    (tmp_path / "run.json").write_text(config_lib.to_json(config))
    command = ["train", "--config", str(tmp_path / "run.json"), "--init", f"{tmp_path / 'own'}/"]
    command += ["--data", str(catalogue), "--workdir", str(tmp_path / "run")]
    assert cli.main(command) == 0
    held = serving.read(tmp_path / "run")
    start = serving.read(tmp_path / "own")
    matrix = lambda one: np.asarray(one.encoder["vision"]["positions"])  # noqa: E731
    np.testing.assert_array_equal(matrix(held), matrix(start))
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "2")
    (tmp_path / "own").rename(tmp_path / "moved")
    assert cli.main(command) == 0
    assert (tmp_path / "run" / "checkpoints" / "2").is_dir()


@pytest.mark.slow
def test_the_folder_is_the_base_and_the_run_resumes_without_it(tmp_path, catalogue):
    from tests.reference import published, qwen_tokenizer

    sizes = dict(experts__count=0, training__steps=3, training__save_every=1, data__path=str(catalogue))
    config = tiny(**sizes, training__init=str(tmp_path / "public"))
    published(tmp_path / "public", config, qwen_tokenizer())
    with pytest.raises(UserError, match=r"config.language.layers: 4, but .*public has 2"):
        moon_jax.train(config_lib.replace(config, {"language.layers": 4}), tmp_path / "other")
    assert not (tmp_path / "other" / "checkpoints").exists()
    moon_jax.train(config_lib.replace(config, {"training.learning_rate": 0.0}), tmp_path / "still")
    start, _ = serving.read(tmp_path / "public"), None
    held = serving.read(tmp_path / "still")
    jax.tree.map(np.testing.assert_array_equal, start.encoder, held.encoder)  # it started from those weights
    moon_jax.train(config, tmp_path / "run")
    whole = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    # Killed after the first step, and resumed after the folder is gone.
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    for step in (2, 3):
        shutil.rmtree(tmp_path / "again" / "checkpoints" / str(step))
    (tmp_path / "public").rename(tmp_path / "moved")
    moon_jax.train(config, tmp_path / "again")
    assert (tmp_path / "again" / "metrics.jsonl").read_bytes() == whole
    with pytest.raises(UserError, match="public: no such folder"):
        moon_jax.train(config, tmp_path / "new")


@pytest.mark.slow
@pytest.mark.parametrize(
    "experts",
    [
        dict(experts__width=40),
        dict(experts__count=8, experts__per_token=2, experts__width=20, experts__router_term="token_hard"),
    ],
    ids=["copies", "slices"],
)
def test_a_dense_run_goes_on_with_experts(tmp_path, catalogue, capsys, experts):
    """`--init WORKDIR` upcycles it: until a step changes something, the vectors are those of the dense run. It was
    refused as "a checkpoint of another architecture".
    """
    dense, sparse = tmp_path / "dense", tmp_path / "sparse"
    learned = {"objective__temperature": (0.07, 0.08)}
    base = tiny(experts__count=0, training__steps=3, training__learning_rate=1e-2, **learned)
    assert cli.main(["train", *_flags(base), "--data", str(catalogue), "--workdir", str(dense)]) == 0
    still = {f"training__{name}": 0.0 for name in ("learning_rate", "router_learning_rate", "dual_learning_rate")}
    config = tiny(training__steps=1, **experts, **still)
    command = ["train", *_flags(config), "--data", str(catalogue), "--workdir", str(sparse), "--init", str(dense)]
    assert cli.main(command) == 0, capsys.readouterr().err
    products = [moon_jax.Product(text="a red shoe"), "green bag", "blue"]
    np.testing.assert_allclose(moon_jax.load(sparse).encode(products), moon_jax.load(dense).encode(products), atol=1e-5)
    alignment = serving.read(sparse).alignment
    np.testing.assert_allclose(np.exp(alignment["log_temperature"]), [0.07, 0.08], rtol=1e-6)
    assert np.asarray(alignment["dual"]).any()  # new


def _flags(config):
    """As the command line gives a config that differs from quickstart's."""
    whole, base = config_lib.leaves(config), config_lib.leaves(config_lib.load("quickstart"))
    return ["--config", "quickstart", *(f"--config.{k}={v!r}" for k, v in whole.items() if v != base[k])]
