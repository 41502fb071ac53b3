"""Tensors on disk → leaves on devices: regions, shardings, dtypes, upcycling, and refused weights."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from moon_jax import config as config_lib
from moon_jax import sharding
from moon_jax.data import pipeline
from moon_jax.data import rows as rows_lib
from moon_jax.errors import UserError
from moon_jax.hub import keys, weights
from moon_jax.model.encoder import Encoder
from moon_jax.serving.embedder import abstract_params
from moon_jax.training.checkpoints import on_one_device
from moon_jax.training.loop import abstract_state
from moon_jax.types import VIEWS, Product
from tests.conftest import random_params, tiny


def whole(lazy):
    return lazy.read(tuple(slice(0, size) for size in lazy.shape))


def lazy_of(array):
    return weights.Lazy(array.shape, array.__getitem__)


NOISE = weights.noise((1, 2), (slice(0, 600), slice(0, 530)))


def cases():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 6, 8)).astype(np.float32)
    experts = rng.normal(size=(3, 6, 8)).astype(np.float32)
    kernel = rng.normal(size=(5, 3, 2, 4, 4)).astype(np.float32)
    drawn = weights.reinitialized(lazy_of(a), 1, 0.5, (0, 1), (2,), lambda: (0.0, 1.0))
    return {
        "transposed": (weights.transposed(lazy_of(a)), a.T),
        "pair": (weights.pair(lazy_of(experts)), np.stack([experts[..., :4], experts[..., 4:]], 1)),
        "stacked": (weights.stacked([lazy_of(a), lazy_of(b)]), np.stack([a, b])),
        "patches": (weights.patch_kernel(lazy_of(kernel)), kernel.transpose(2, 1, 3, 4, 0).reshape(2, 48, 5)),
        "of all": (
            weights.stacked([weights.stacked([weights.transposed(lazy_of(a)), weights.transposed(lazy_of(b))])]),
            np.stack([a.T, b.T])[None],
        ),
        "reinitialized": (drawn, whole(drawn)),
        "noise": (weights.Lazy((600, 530), lambda region: weights.noise((1, 2), region)), NOISE),
    }


@pytest.mark.parametrize("name", cases())
def test_a_region_is_that_part_of_the_whole(name):
    lazy, expected = cases()[name]
    assert lazy.shape == expected.shape
    rng = np.random.default_rng(1)
    for _ in range(30):
        edges = [np.sort(rng.choice(size + 1, 2, replace=False)) for size in lazy.shape]
        region = tuple(slice(int(start), int(stop)) for start, stop in edges)
        np.testing.assert_array_equal(lazy.read(region), expected[region])
        np.testing.assert_array_equal(weights.read_region(lazy, region, np.dtype(np.float32)), expected[region])


def test_noise_is_normal_and_does_not_repeat():
    assert abs(NOISE.mean()) < 0.01 and abs(NOISE.std() - 1) < 0.01
    assert len(np.unique(NOISE)) > 0.99 * NOISE.size  # no tile comes twice
    assert (weights.noise((1, 3), (slice(0, 9), slice(0, 9))) != NOISE[:9, :9]).all()


def test_reinitialization_changes_the_given_share_of_the_units_only():
    rng = np.random.default_rng(0)
    matrix = rng.normal(3.0, 0.5, size=(40, 60)).astype(np.float32)
    normal = lambda: weights.statistics(lazy_of(matrix))  # noqa: E731
    columns = whole(weights.reinitialized(lazy_of(matrix), 1, 0.5, (7,), (3,), normal))
    rows = whole(weights.reinitialized(lazy_of(matrix.T), 0, 0.5, (8,), (3,), normal))
    changed = (columns != matrix).any(0)
    assert changed.sum() == 30 and (columns != matrix)[:, changed].all()
    # Equal `units` make equal choices: an expert's gate, up and down lose the same inner units.
    np.testing.assert_array_equal((rows != matrix.T).any(1), changed)
    assert abs(columns[:, changed].mean() - 3.0) < 0.1 and abs(columns[:, changed].std() - 0.5) < 0.05
    np.testing.assert_array_equal(columns, whole(weights.reinitialized(lazy_of(matrix), 1, 0.5, (7,), (3,), normal)))


def write(folder, config, params):
    """A folder's weights in one file, under published names."""
    flat = keys.flatten(jax.tree.map(np.asarray, params))
    held = {}
    for row in keys.table(config):
        array = flat[row.ours] if row.stack_index is None else flat[row.ours][row.stack_index]
        held[f"model.{row.theirs}"] = np.ascontiguousarray(keys.to_theirs(array, row.transform))
    folder.mkdir(parents=True, exist_ok=True)
    save_file(held, folder / "model.safetensors")
    return held


def load(folder, config, tokenizer):
    return weights.load(folder, config, jax.tree.map(on_one_device, abstract_params(config, tokenizer)["encoder"]))


MESHES = {"fsdp and tensor": dict(fsdp=2, tensor=2), "experts": dict(expert=4, fsdp=2), "replicated": {}}


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("every", [1, 2])
def test_leaves_land_in_their_sharding(tmp_path, tokenizer, mesh, every):
    config = tiny(language__layers=4, experts__every=every, **{f"mesh__{k}": v for k, v in MESHES[mesh].items()})
    params = random_params(config, tokenizer)
    write(tmp_path, config, params)
    devices = sharding.make_mesh(config.mesh)
    with jax.set_mesh(devices):
        rows = rows_lib.pack([[]] * 8, rows_lib.Layout.of(config), tokenizer.pad)
        like = abstract_state(config, rows, devices).params["encoder"]
        found = weights.load(tmp_path, config, like)
    for path, leaf in keys.flatten(found).items():
        assert leaf.sharding == keys.flatten(like)[path].sharding, path
        np.testing.assert_array_equal(leaf, keys.flatten(params)[path], err_msg=path)
    sharded = [leaf for leaf in jax.tree.leaves(found) if not leaf.sharding.is_fully_replicated]
    assert bool(sharded) == (mesh != "replicated")


@pytest.mark.parametrize(("held", "wanted"), [("bfloat16", "float32"), ("float32", "bfloat16"), ("float16", "float32")])
def test_weights_take_the_dtype_of_the_config(tmp_path, tokenizer, held, wanted):
    config = tiny(experts__count=0, training__param_dtype=wanted)
    params = jax.tree.map(lambda leaf: leaf.astype(held), random_params(config, tokenizer))
    write(tmp_path, config, params)
    found = load(tmp_path, config, tokenizer)
    for leaf, expected in zip(jax.tree.leaves(found), jax.tree.leaves(params), strict=True):
        assert leaf.dtype == wanted
        np.testing.assert_array_equal(np.asarray(leaf), expected.astype(wanted))


def test_leaves_are_read_in_small_pieces(tmp_path, tokenizer, monkeypatch):
    """The host holds one device's part of one leaf and a piece of it: a sixteenth, rounded up to a row."""
    config = tiny(language__layers=4, mesh__fsdp=8)
    write(tmp_path, config, random_params(config, tokenizer))
    pieces = []
    plain = weights.Files.__getitem__

    def spied(files, name):
        lazy = plain(files, name)

        def read(region):
            array = lazy.read(region)
            pieces.append((name, array.size))
            return array

        return weights.Lazy(lazy.shape, read)

    monkeypatch.setattr(weights.Files, "__getitem__", spied)
    mesh = sharding.make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        rows = rows_lib.pack([[]] * 8, rows_lib.Layout.of(config), tokenizer.pad)
        like = abstract_state(config, rows, mesh).params["encoder"]
        weights.load(tmp_path, config, like)
    embedding = [size for name, size in pieces if name.endswith("embed_tokens.weight")]
    part = config.language.vocab * config.language.width // 8
    assert len(embedding) >= 8 * 16 and max(embedding) <= part // 16 + config.language.width


@pytest.mark.parametrize(
    "differences",
    [
        dict(experts__count=4, experts__per_token=2),
        dict(experts__count=4, experts__per_token=1, experts__every=2),
        pytest.param(
            dict(experts__count=3, experts__per_token=3, experts__dense_layers=(0, 3)), marks=pytest.mark.slow
        ),
        dict(experts__count=1, experts__per_token=1),
        dict(experts__count=4, experts__per_token=2, experts__router_term="learned"),
        dict(experts__count=4, experts__per_token=2, experts__width=20),
        dict(experts__count=8, experts__per_token=2, experts__width=20, experts__router_term="token_hard"),
        dict(
            experts__count=8,
            experts__per_token=2,
            experts__width=20,
            experts__router_term="token",
            experts__term_init=2.0,
            experts__every=2,
        ),
    ],
    ids=str,
)
def test_an_upcycled_model_equals_the_dense_one_at_step_0(tmp_path, tokenizer, differences):
    sizes = dict(language__layers=4, experts__width=tiny().language.mlp_width)
    dense = tiny(**sizes, experts__count=0)
    write(tmp_path, dense, random_params(dense, tokenizer))
    config = tiny(**(sizes | differences))
    rng = np.random.default_rng(0)
    products = [[rows_lib.segments(rng.integers(0, 300, 9).astype(np.int32), (), tokenizer, 2)[0]] for _ in range(3)]
    if config.experts.router_term == "learned":
        assert not load(tmp_path, config, tokenizer)["decoder"]["periods"]["layer_0"]["experts"]["router_term"].any()
    if config.experts.router_term == "token":
        term = load(tmp_path, config, tokenizer)["decoder"]["periods"]["layer_1"]["experts"]["router_term"]
        np.testing.assert_array_equal(term[0], 2.0 * np.array([[1, 1, 1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1, 1, 1]]))
    rows = rows_lib.pack([[parts] for parts in products], rows_lib.Layout.of(config), tokenizer.pad)

    def embed(config):
        params = load(tmp_path, config, tokenizer)
        return jax.jit(Encoder(config).apply)({"params": params}, rows).embedding

    expected = embed(dense)
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(embed(config), expected, atol=1e-6)
    if config.experts.count > 1:  # partly reinitialized, it is another model
        other = embed(config_lib.replace(config, {"experts.reinitialized": 0.5}))
        assert np.abs(other - expected).max() > 1e-2


def test_upcycling_is_seeded_and_the_same_on_any_mesh(tmp_path, tokenizer):
    sizes = dict(experts__width=tiny().language.mlp_width, experts__reinitialized=0.5)
    dense = tiny(**sizes, experts__count=0)
    write(tmp_path, dense, random_params(dense, tokenizer))
    config = tiny(**sizes, mesh__expert=4, mesh__tensor=2)
    one = load(tmp_path, config, tokenizer)
    mesh = sharding.make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        rows = rows_lib.pack([[]] * 8, rows_lib.Layout.of(config), tokenizer.pad)
        many = weights.load(tmp_path, config, abstract_state(config, rows, mesh).params["encoder"])
    jax.tree.map(np.testing.assert_array_equal, one, many)
    experts = one["decoder"]["periods"]["layer_0"]["experts"]
    assert np.abs(experts["router"]).min() > 0  # a zero router would tie the experts
    assert 0.015 < float(jnp.std(experts["router"])) < 0.025
    # Each expert is reinitialized in half of its inner units, the same ones in gate, up and down.
    gate_up, down = np.asarray(experts["gate_up"]), np.asarray(experts["down"])
    assert (experts["router"][0] != experts["router"][1]).all()  # nor are layers
    plain = load(tmp_path, config_lib.replace(config, {"experts.reinitialized": 0.0}), tokenizer)
    plain = plain["decoder"]["periods"]["layer_0"]["experts"]
    fresh, also = np.moveaxis((gate_up != plain["gate_up"]).any(-2), -2, 0)  # [layers, E, F], of gate and of up
    assert (fresh.sum(-1) == config.experts.width // 2).all()
    np.testing.assert_array_equal(fresh, also)
    np.testing.assert_array_equal(fresh, (down != plain["down"]).any(-1))
    assert (fresh[0, 0] != fresh[0, 1]).any() and (fresh[0, 0] != fresh[1, 0]).any()
    gate, up = (half[:, fresh[0, 0]] for half in gate_up[0, 0])
    assert gate.size > 200 and abs(np.corrcoef(gate.ravel(), up.ravel())[0, 1]) < 0.3  # independent values
    drawn = fresh[0, 0] & fresh[1, 0]
    noise = [(gate_up[layer, 0, 0] - plain["gate_up"][layer, 0, 0].mean())[:, drawn] for layer in (0, 1)]
    assert drawn.any() and (np.abs(noise[0] - noise[1]) > 1e-6).all()
    wide = load(tmp_path, config_lib.replace(config, {"experts.router_init": 0.2}), tokenizer)
    assert 0.15 < float(jnp.std(wide["decoder"]["periods"]["layer_0"]["experts"]["router"])) < 0.25
    other = load(tmp_path, config_lib.replace(config, {"seed": 1}), tokenizer)
    assert (np.asarray(other["decoder"]["periods"]["layer_0"]["experts"]["router"]) != experts["router"]).any()


def damaged(held, damage):
    held = dict(held)
    name = "model.language_model.layers.1.self_attn.q_proj.weight"
    if damage == "missing":
        del held[name]
    elif damage == "left over":
        held["model.language_model.layers.2.self_attn.q_proj.weight"] = held[name]
    elif damage == "shape":
        held[name] = held[name][:-1]
    elif damage == "axes":
        held[name] = held[name][None]
    elif damage == "all of a shape":
        for layer in range(2):
            key = f"model.language_model.layers.{layer}.self_attn.q_proj.weight"
            held[key] = held[key][:-1]
    elif damage == "integers":
        held[name] = held[name].astype(np.int8)
    elif damage == "head":
        held["lm_head.weight"] = np.ones((300, 24), np.float32)
    return held


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("missing", "layers.1.self_attn.q_proj.weight is missing"),
        ("left over", "layers.2.self_attn.q_proj.weight is left over"),
        ("shape", r"layers.1.self_attn.q_proj.weight has shape \(24, 47\), other layers \(24, 48\)"),
        ("axes", "layers.1.self_attn.q_proj.weight has shape .* 2 axes are expected"),
        (
            "all of a shape",
            r"layers.0.self_attn.q_proj.weight gives .* shape \(2, 24, 47\), but the config needs \(2, 24, 48\)",
        ),
        ("integers", "layers.1.self_attn.q_proj.weight has dtype I8; quantised"),
        ("head", ""),
    ],
)
def test_the_error_names_a_missing_leftover_or_misshapen_weight(tmp_path, tokenizer, damage, message):
    config = tiny(experts__count=0)
    held = write(tmp_path, config, random_params(config, tokenizer))
    save_file(damaged(held, damage), tmp_path / "model.safetensors")
    if not message:  # the language-model head is ignored
        load(tmp_path, config, tokenizer)
        return
    with pytest.raises(UserError, match=message) as error:
        load(tmp_path, config, tokenizer)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("width", "count"), [(16, 4), (20, 3)])
def test_upcycling_needs_the_width_of_the_dense_feed_forward(tmp_path, tokenizer, width, count):
    dense = tiny(experts__count=0)
    write(tmp_path, dense, random_params(dense, tokenizer))
    message = rf"config.experts.width: {width}, .* give --config.experts.width=40, or 20 and a multiple of 2 experts"
    with pytest.raises(UserError, match=message):
        load(tmp_path, tiny(experts__width=width, experts__count=count, experts__per_token=2), tokenizer)


def test_slices_of_the_dense_feed_forward_start_as_equal_groups(tmp_path, tokenizer):
    """Virtual groups (arXiv 2410.07524): each group of K experts holds the K slices and shares a router column."""
    dense = tiny(experts__count=0)
    write(tmp_path, dense, random_params(dense, tokenizer))
    config = tiny(experts__count=6, experts__per_token=2, experts__width=20)
    whole = load(tmp_path, dense, tokenizer)["decoder"]["periods"]["layer_0"]["mlp"]
    experts = load(tmp_path, config, tokenizer)["decoder"]["periods"]["layer_0"]["experts"]
    for expert in range(6):
        part = slice(20 * (expert % 2), 20 * (expert % 2) + 20)
        np.testing.assert_array_equal(experts["gate_up"][:, expert, 0], whole["gate_proj"]["kernel"][..., part])
        np.testing.assert_array_equal(experts["gate_up"][:, expert, 1], whole["up_proj"]["kernel"][..., part])
        np.testing.assert_array_equal(experts["down"][:, expert], 2 * whole["down_proj"]["kernel"][:, part])
    router = np.asarray(experts["router"])
    np.testing.assert_array_equal(router[..., ::2], router[..., 1::2])
    assert (router[..., 0] != router[..., 2]).all()


@pytest.mark.parametrize(("term", "count"), [("none", 4), ("learned", 4), ("hard", 6), ("token", 4), ("token_hard", 6)])
def test_slices_leave_the_function_unchanged(tmp_path, tokenizer, term, count):
    """Whatever the router's term: the slices of a feed-forward are always chosen together."""
    dense = tiny(experts__count=0)
    params = random_params(dense, tokenizer)
    config = tiny(
        experts__count=count, experts__per_token=2, experts__width=20, experts__router_term=term, experts__term_init=3.0
    )
    like = jax.tree.map(on_one_device, abstract_params(config, tokenizer)["encoder"])
    held = weights.Held(tmp_path, dense, jax.tree.map(jnp.asarray, params))
    upcycled = weights.placed(held, config, like)
    reader = pipeline.Reader(config, tokenizer)
    pixels = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    segments = reader.read(Product(text="a red shoe", images=(Image.fromarray(pixels),)), VIEWS)
    rows = rows_lib.pack([[segments]], rows_lib.Layout.of(config), tokenizer.pad)
    before, after = (Encoder(c).apply({"params": p}, rows).embedding for c, p in ((dense, params), (config, upcycled)))
    np.testing.assert_allclose(after, before, atol=1e-5)


def test_a_dense_model_in_memory_is_upcycled_like_its_folder(tmp_path, tokenizer):
    dense = tiny(experts__count=0)
    params = random_params(dense, tokenizer)
    write(tmp_path, dense, params)
    config = tiny(experts__width=40, experts__reinitialized=0.5)
    like = jax.tree.map(on_one_device, abstract_params(config, tokenizer)["encoder"])
    held = weights.Held(tmp_path, dense, jax.tree.map(jnp.asarray, params))
    jax.tree.map(np.testing.assert_array_equal, weights.placed(held, config, like), load(tmp_path, config, tokenizer))


def test_reinitialization_without_upcycling_is_refused(tmp_path, tokenizer):
    config = tiny(experts__reinitialized=0.5)
    write(tmp_path, config, random_params(config, tokenizer))
    with pytest.raises(UserError, match=r"config.experts.reinitialized: .* has experts already"):
        load(tmp_path, config, tokenizer)


def test_the_error_names_a_weight_that_is_in_two_files(tmp_path, tokenizer):
    config = tiny(experts__count=0)
    held = write(tmp_path, config, random_params(config, tokenizer))
    name = "model.language_model.norm.weight"
    save_file({name: held[name]}, tmp_path / "other.safetensors")
    index = {"weight_map": {"a": "model.safetensors", "b": "other.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"language_model.norm.weight is both in model.safetensors and in other"):
        load(tmp_path, config, tokenizer)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no model.safetensors and no index"),
        ({"weight_map": {"a": "../model.safetensors"}}, "is not a file of this folder"),
        ({"weight_map": {"a": "/etc/passwd"}}, "is not a file of this folder"),
        ({"weight_map": {"a": 3}}, "not an index|is not a file"),
        ({"weight_map": {"a": "gone.safetensors"}}, "gone.safetensors is missing"),
        ({"weights": {}}, "not an index"),
        ([], "not an index"),
        ("cut", "not a readable safetensors file"),
        ("pickle", "no model.safetensors and no index"),
    ],
)
def test_files_that_cannot_be_read_are_named(tmp_path, tokenizer, content, message):
    config = tiny(experts__count=0)
    if content == "cut":
        write(tmp_path, config, random_params(config, tokenizer))
        path = tmp_path / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-100])
    elif content == "pickle":
        (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04N.")
    elif content is not None:
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=message) as error:
        load(tmp_path, config, tokenizer)
    assert "\n" not in str(error.value)
