"""Optimisers by name, learning rates by path, and freezing."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rich.console import Console

from moon_jax import sharding
from moon_jax.data import pipeline
from moon_jax.errors import UserError
from moon_jax.training import loop, provenance
from moon_jax.training import optimizer as lib
from moon_jax.training import step as step_lib
from tests.conftest import tiny

FROZEN = "encoder/vision/*=0"


@pytest.fixture(scope="module")
def batch(prepared, tokenizer):
    return pipeline.batches(prepared, pipeline.Reader(tiny(), tokenizer))[0]


@pytest.fixture(scope="module")
def params(batch):
    return jax.jit(lambda: nn.unbox(step_lib.initial_state(tiny(), batch.rows)).params)()


def test_adamw_equals_the_formulas_of_the_paper(params):
    """Three updates, written out in float64: clipping, moments, bias correction, decoupled decay, warm-up."""
    options = tiny(training__weight_decay=0.1, training__learning_rate=0.5, training__min_warmup=2).training
    rng = np.random.default_rng(0)
    kernel = {"encoder": {"kernel": rng.normal(size=(3, 4))}}
    gradients = [rng.normal(size=(3, 4)) * 5 for _ in range(3)]
    optimizer = lib.make_optimizer(options)
    held = jax.tree.map(jnp.float32, kernel)
    state = optimizer.init(held)
    w, m, v = kernel["encoder"]["kernel"].copy(), 0.0, 0.0
    for step, gradient in enumerate(gradients):
        updates, state = optimizer.update({"encoder": {"kernel": jnp.float32(gradient)}}, state, held)
        held = optax.apply_updates(held, updates)
        g = gradient * min(1.0, options.clip / np.linalg.norm(gradient))
        m, v = 0.9 * m + 0.1 * g, 0.98 * v + 0.02 * g * g
        direction = (m / (1 - 0.9 ** (step + 1))) / (np.sqrt(v / (1 - 0.98 ** (step + 1))) + 1e-8)
        w = w - 0.5 * min(step / 2, 1) * (direction + 0.1 * w)
    np.testing.assert_allclose(held["encoder"]["kernel"], w, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor", "sgd", "rmsprop", "muon", "adabelief"])
def test_optax_optimizers_by_name(name):
    """Each minimises a quadratic, and decays weights although most of them have no weight decay."""
    rates = dict(training__learning_rate=0.05, training__warmup=0.0, training__clip=1e9)
    options = tiny(training__optimizer=name, training__steps=200, **rates)
    optimizer = lib.make_optimizer(options.training)
    target = jnp.asarray(np.random.default_rng(0).normal(size=(4, 6)), jnp.float32)
    held = {"encoder": {"kernel": jnp.ones((4, 6))}}
    distance = lambda held: jnp.square(held["encoder"]["kernel"] - target).sum()  # noqa: E731

    @jax.jit
    def step(held, state):
        updates, state = optimizer.update(jax.grad(distance)(held), state, held)
        return optax.apply_updates(held, updates), state

    state, first = optimizer.init(held), float(distance(held))
    for _ in range(100):
        held, state = step(held, state)
    assert float(distance(held)) < 0.2 * first
    still = jax.tree.map(jnp.zeros_like, held)
    state = optimizer.init(held)
    for _ in range(3):
        updates, state = optimizer.update(still, state, held)
    np.testing.assert_allclose(updates["encoder"]["kernel"], -0.05 * 0.05 * held["encoder"]["kernel"], rtol=1e-3)


@pytest.mark.slow
def test_an_optimizer_with_factored_state_on_a_mesh(batch):
    """Adafactor's state has other shapes than the sharded parameters."""
    small = {"language__layers": 1, "vision__depth": 1, "experts__dispatch": "dense"}
    config = tiny(training__optimizer="adafactor", mesh__data=1, mesh__fsdp=2, training__learning_rate=3e-2, **small)
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:2])
    with jax.set_mesh(mesh):
        abstract = loop.abstract_state(config, batch.rows, mesh)
        placed = jax.tree.map(lambda leaf: leaf.sharding, abstract)
        state = jax.jit(lambda: nn.unbox(step_lib.initial_state(config, batch.rows)), out_shardings=placed)()
        step = jax.jit(functools.partial(step_lib.train_step, config=config), out_shardings=(placed, None))
        given = sharding.place(mesh, batch, range(len(batch.product)))
        losses = []
        for _ in range(6):
            state, metrics = step(state, given)
            losses.append(float(metrics["objectives"].total))
    assert losses[-1] < losses[1], losses


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor", "muon", "sgd", "optimistic_adam"])
def test_any_optimizer_state_can_be_sharded_and_saved(batch, name):
    """Some optimisers skip parameters, or keep flags."""
    config = tiny(training__optimizer=name, mesh__data=1, mesh__fsdp=8)
    state = loop.abstract_state(config, batch.rows, sharding.make_mesh(config.mesh))
    assert all(leaf.sharding is not None for leaf in jax.tree.leaves(state))
    for leaf in jax.tree.leaves(state.opt_state):
        assert jax.eval_shape(provenance.digest, leaf).shape == (2,)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("adamm", "adamm is not an optimizer of optax; the closest is adam"),
        ("clip", "clip is not an optimizer of optax"),
        ("lbfgs", "lbfgs needs more than gradients"),
        ("noisy_sgd", "noisy_sgd needs more than gradients (a random key"),
    ],
)
def test_an_unsuitable_optimizer_is_reported_in_one_line(name, message):
    with pytest.raises(UserError, match=re.escape(f"config.training.optimizer: {message}")) as error:
        lib.named(name)
    assert "\n" not in str(error.value)


def test_learning_rate_factors_by_path(params):
    options = tiny(
        training__learning_rate_factors=("encoder/vision/layers/*=0", "encoder/vision/*=0.5", "*/router=3")
    ).training
    peaks = {
        "/".join(lib._names(path)): lib.peak(options, path) for path, _ in jax.tree_util.tree_leaves_with_path(params)
    }
    assert peaks["encoder/vision/layers/block/qkv/kernel"] == 0  # the first match wins
    assert peaks["encoder/vision/merger/fc1/kernel"] == pytest.approx(0.5e-3)
    assert peaks["encoder/decoder/periods/layer_0/experts/router"] == pytest.approx(3e-4)
    assert peaks["encoder/token_embedding"] == pytest.approx(1e-3) and peaks["alignment/dual"] == 1e-2
    lib.check(options, params)
    with pytest.raises(UserError, match=r"encoder/visoin/\* matches no parameter; the closest is encoder/vision/"):
        lib.check(tiny(training__learning_rate_factors=("encoder/visoin/*=0",)).training, params)
    with pytest.raises(UserError, match=r"training.learning_rate_factors must be of the form PATTERN=FACTOR"):
        tiny(training__learning_rate_factors=("encoder/vision/*",))


def test_the_table_of_trained_parameters(params):
    console = Console(width=100, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(lib.table(tiny(training__learning_rate_factors=(FROZEN,)).training, params))
    text = console.export_text()
    vision = sum(leaf.size for leaf in jax.tree.leaves(params["encoder"]["vision"]))
    assert re.search(rf"│ encoder/vision +│ {vision:,} │ +frozen │ +- │", text)
    norms = 24 * 5  # two in each of two layers, and the last; the q and k norms count as attention
    assert re.search(rf"│ encoder/decoder/norms +│ +{norms} │ +0.001 │ +0% │", text), text
    assert "trained with adamw" in text


def test_frozen_parameters_do_not_change_and_have_no_state(batch):
    config = tiny(
        training__learning_rate_factors=(FROZEN,), language__layers=1, vision__depth=1, experts__dispatch="dense"
    )
    make = jax.jit(lambda: nn.unbox(step_lib.initial_state(config, batch.rows)))
    state = make()
    before = jax.device_get(state.params)
    names = {"/".join(lib._names(path)) for path, _ in jax.tree_util.tree_leaves_with_path(state.opt_state)}
    assert any("token_embedding" in name for name in names) and not any("vision" in name for name in names)
    step = jax.jit(functools.partial(step_lib.train_step, config=config))
    for _ in range(3):
        state, metrics = step(state, batch)
    same = jax.tree.map(np.array_equal, before, jax.device_get(state.params))
    assert all(jax.tree.leaves(same["encoder"]["vision"])) and not same["encoder"]["token_embedding"]
    # The gradient norm covers only trained parameters.
    gradient = jax.jit(jax.grad(lambda params, batch: step_lib.loss(params, batch, config, jnp.int32(0))[0]))
    alone = gradient(jax.tree.map(jnp.asarray, before), batch)
    alone["encoder"].pop("vision")
    alone["alignment"].pop("log_temperature")
    _, metrics = step(make(), batch)
    assert float(metrics["grad_norm"]) == pytest.approx(float(optax.tree.norm(alone)), rel=1e-4)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_a_frozen_vision_tower_stores_no_activations(remat):
    """None of the residuals for the backward pass has an axis of patches."""
    patches = 28  # no other axis has this size

    def stored(factors):
        config = tiny(training__remat=remat, training__learning_rate_factors=factors, data__visual_tokens=patches // 4)
        batch = loop.abstract_batch(config, sharding.make_mesh(config.mesh))
        assert batch.rows.patches.shape[1] == patches
        params = nn.unbox(jax.eval_shape(functools.partial(step_lib.initial_state, config), batch.rows)).params

        def residuals(params, batch):
            def loss(trained):
                return step_lib.loss(lib.merge(trained, params), batch, config, jnp.int32(0))[0]

            # The residuals are the leaves of the function that vjp returns.
            return jax.tree.leaves(jax.vjp(loss, lib.trained(config.training, params))[1])

        found = jax.eval_shape(residuals, params, batch)
        return sum(x.size for x in found if patches in x.shape and jnp.issubdtype(x.dtype, jnp.floating))

    assert stored(()) > 20_000
    assert stored((FROZEN,)) == 0
