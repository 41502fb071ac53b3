"""The training step on one and eight devices, its schedule, parameter groups, and handling of non-finite numbers."""

import functools
import json
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import moon_jax
from moon_jax import config as config_lib
from moon_jax import sharding
from moon_jax.data import pipeline
from moon_jax.errors import UserError
from moon_jax.model import experts, router
from moon_jax.model.encoder import Encoder
from moon_jax.training import loop
from moon_jax.training import optimizer as optimizer_lib
from moon_jax.training import step as step_lib
from moon_jax.types import TrainState
from tests.conftest import but_slow, tiny


@pytest.fixture(scope="module")
def batch(prepared, tokenizer):
    return pipeline.batches(prepared, pipeline.Reader(tiny(), tokenizer))[0]


def fresh(config, batch):
    return jax.jit(lambda: nn.unbox(step_lib.initial_state(config, batch.rows)))()


@functools.cache
def jitted(config):
    """The training step of a config, compiled once for all tests of a process."""
    return jax.jit(functools.partial(step_lib.train_step, config=config))


LONGER = tiny(training__steps=60)


def test_the_loss_falls_and_all_parameters_change(batch):
    config = LONGER
    state = fresh(config, batch)
    start = jax.device_get(state.params)
    step = jitted(config)
    losses = []
    for _ in range(25):
        state, metrics = step(state, batch)
        losses.append(float(metrics["objectives"].total))
    assert losses[-1] < 0.7 * losses[0]
    unchanged = [
        jax.tree_util.keystr(path)
        for (path, old), new in zip(
            jax.tree_util.tree_flatten_with_path(start)[0], jax.tree.leaves(state.params), strict=True
        )
        if np.array_equal(old, new)
    ]
    assert unchanged == ["['alignment']['log_temperature']"]  # its learning rate is 0
    assert int(state.step) == 25 and int(state.bad_steps) == 0


def test_learning_rates_by_group_and_decay_by_name(batch):
    config = tiny()
    params = fresh(config, batch).params
    groups, decayed = {}, set()
    for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]:
        groups.setdefault(optimizer_lib.parameter_group(path), []).append(jax.tree_util.keystr(path))
        if optimizer_lib.is_decayed(path):
            decayed.add(optimizer_lib._names(path)[-1])
    assert {name: len(paths) for name, paths in groups.items() if name != "backbone"} == {
        "dual": 1,
        "temperature": 1,
        "router": 1,
    }
    term = [jax.tree_util.DictKey("encoder"), jax.tree_util.DictKey("router_term")]
    assert optimizer_lib.parameter_group(tuple(term)) == "router" and not optimizer_lib.is_decayed(tuple(term))
    assert decayed == {"kernel", "gate_up", "down", "router", "token_embedding", "positions", "patch_kernel"}
    # With a constant gradient Adam's direction is 1 per entry, so the update is the group's learning rate.
    grads = jax.tree.map(lambda x: jnp.full_like(x, 1e-3), params)
    options = tiny(training__weight_decay=0.0, training__clip=1e9, training__temperature_learning_rate=0.5).training
    optimizer = optimizer_lib.make_optimizer(options)
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for _ in range(3):  # with 2 warm-up steps, the third update is at the peak
        updates, state = update(grads, state, params)
    rates = {
        optimizer_lib.parameter_group(path): -float(np.mean(update))
        for path, update in jax.tree_util.tree_flatten_with_path(updates)[0]
    }
    expected = {"backbone": 1e-3, "router": 1e-4, "dual": 1e-2, "temperature": 0.5}
    assert rates == pytest.approx(expected, rel=1e-2)


def test_clipping_and_decay(batch):
    """The second moment holds the square of the clipped gradient; with a zero gradient only the decay acts."""
    options = tiny(training__clip=0.5, training__weight_decay=0.1, training__learning_rate=1e-2).training
    params = {"encoder": {"kernel": jnp.full((2, 2), 3.0), "scale": jnp.full(2, 3.0)}}
    optimizer = optimizer_lib.make_optimizer(options)
    state = optimizer.init(params)
    grads = {
        "encoder": {"kernel": jnp.full((2, 2), 10.0), "scale": jnp.zeros(2)}
    }  # norm 20, so clipped by a factor of 40
    _, state = optimizer.update(grads, state, params)
    moment = next(leaf for leaf in jax.tree.leaves(state, is_leaf=lambda x: hasattr(x, "nu")) if hasattr(leaf, "nu"))
    np.testing.assert_allclose(moment.nu["encoder"]["kernel"], (1 - options.betas[1]) * 0.25**2, rtol=1e-5)

    zero, state = jax.tree.map(jnp.zeros_like, params), optimizer.init(params)
    for _ in range(3):  # the third update is at the peak
        updates, state = optimizer.update(zero, state, params)
    np.testing.assert_allclose(updates["encoder"]["kernel"], -1e-2 * 0.1 * 3.0, rtol=1e-5)
    np.testing.assert_array_equal(updates["encoder"]["scale"], np.zeros(2))


def test_a_non_finite_step_only_changes_the_counters(batch):
    config = LONGER
    state = fresh(config, batch)
    step = jitted(config)
    poisoned = state.replace(params=jax.tree.map(lambda x: x.at[0].set(jnp.nan), state.params))
    for before, given in ((poisoned, batch), (state, batch.replace(weight=batch.weight * jnp.nan))):
        after, metrics = step(before, given)
        assert not bool(metrics["finite"])
        assert int(after.bad_steps) == 1 and int(after.step) == 1
        kept, old = (jax.tree.leaves((s.params, s.opt_state)) for s in (after, before))
        for a, b in zip(kept, old, strict=True):
            np.testing.assert_array_equal(a, b)
    again, metrics = step(after, batch.replace(weight=batch.weight * jnp.nan))
    assert int(again.bad_steps) == int(again.bad_in_a_row) == int(metrics["bad_in_a_row"]) == 2
    good, metrics = step(again, batch)
    assert int(good.bad_steps) == 2 and int(good.bad_in_a_row) == int(metrics["bad_in_a_row"]) == 0


@pytest.mark.parametrize("what", ["loss", "update"])
def test_a_non_finite_loss_or_update_alone_is_a_bad_step(monkeypatch, what):
    """A model of three numbers with a finite gradient."""
    options = {"training__optimizer": "sgd", "training__clip": 1e30, "training__min_warmup": 1, "training__warmup": 0.0}
    config = tiny(**options, training__learning_rate=1e38 if what == "update" else 1e-3)
    params = {"encoder": {"scale": jnp.ones(3)}, "alignment": {"log_temperature": jnp.zeros(2)}}
    trained = optimizer_lib.trained(config.training, params)
    opt_state, zero = optimizer_lib.make_optimizer(config.training).init(trained), jnp.int32(0)

    def loss(params, batch, config, step):
        total = 1e3 * params["encoder"]["scale"].sum()
        return total + jnp.nan if what == "loss" else total, {}

    monkeypatch.setattr(step_lib, "loss", loss)
    state = TrainState(zero, params, opt_state, zero, zero)
    for number in range(1, 3):  # the first step's learning rate is 0
        before = state
        state, metrics = step_lib.train_step(state, None, config)
        assert np.isfinite(metrics["grad_norm"]) and bool(metrics["finite"]) == (what == "update" and number == 1)
    assert int(state.bad_in_a_row) == (1 if what == "update" else 2)
    for a, b in zip(*(jax.tree.leaves((s.params, s.opt_state)) for s in (state, before)), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.fixture(scope="module")
def on_one_device(batch):
    """Parameters, the loss and its gradients with dense dispatch, the reference."""
    config = tiny(experts__dispatch="dense")
    state = fresh(config, batch)
    value = jax.jit(jax.value_and_grad(lambda p, b: step_lib.loss(p, b, config, jnp.int32(3))[0]))
    return (state.params, *value(state.params, batch))


LAYOUTS = [
    ("grouped", dict(data=8)),
    ("grouped", dict(data=1, fsdp=2, expert=2, tensor=2)),
    ("expert_parallel", dict(data=1, fsdp=2, expert=2, tensor=2)),
    ("expert_parallel", dict(data=2, expert=4)),
]


@pytest.mark.parametrize(("dispatch", "mesh"), but_slow(LAYOUTS, [LAYOUTS[1], LAYOUTS[3]]))
def test_loss_and_gradients_on_eight_devices_equal_those_on_one(batch, on_one_device, dispatch, mesh):
    """Without dropping. The gradient's relative error is below 1e-6, that of each tensor at most 5e-6."""
    axes = {f"mesh__{axis}": size for axis, size in mesh.items()}
    config = tiny(experts__dispatch=dispatch, experts__capacity=0.0, **axes)
    params, expected_loss, expected = on_one_device
    devices = sharding.make_mesh(config.mesh)
    with jax.set_mesh(devices):
        abstract = loop.abstract_state(config, batch.rows, devices)
        placed = jax.tree.map(lambda x, a: jax.device_put(x, a.sharding), params, abstract.params)
        spread = {leaf.sharding.spec for leaf in jax.tree.leaves(placed)}
        assert len(spread) > 1 or mesh == dict(data=8)
        value = jax.jit(jax.value_and_grad(lambda p, b: step_lib.loss(p, b, config, jnp.int32(3))[0]))
        loss, gradients = value(placed, jax.device_put(batch, sharding.rows(devices)))
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
    off = jax.tree.map(lambda a, b: np.asarray(a, np.float64) - np.asarray(b), gradients, expected)
    assert optax.tree.norm(off) < 1e-6 * optax.tree.norm(expected)
    for (path, a), b in zip(jax.tree_util.tree_flatten_with_path(off)[0], jax.tree.leaves(expected), strict=True):
        assert np.linalg.norm(a) <= 5e-6 * np.linalg.norm(b), jax.tree_util.keystr(path)


def test_a_mesh_that_does_not_fit_is_reported_in_one_line():
    with pytest.raises(UserError, match="data=3 x fsdp=1 x expert=1 x tensor=1 does not fit 8 devices"):
        sharding.make_mesh(tiny(mesh__data=3).mesh)


@pytest.mark.slow
def test_losses_on_a_mesh_of_all_axes_equal_data_parallel_ones(catalogue, tmp_path):
    """Several steps of the real loop: the state must leave a step with the sharding that the next one expects."""
    losses = []
    for name, mesh in (("data", {}), ("all", dict(mesh__data=1, mesh__fsdp=2, mesh__expert=2, mesh__tensor=2))):
        config = tiny(data__path=str(catalogue), training__steps=4, training__save_every=4, **mesh)
        moon_jax.train(config, tmp_path / name)
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["total"] for line in lines])
    assert len(losses[0]) == 4 and len(set(losses[0])) == 4
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)


def test_only_training_drops_routes(batch):
    """With capacity for a fraction of the routes, training reports the dropped share; inference drops nothing."""
    config = tiny(experts__dispatch="expert_parallel", experts__capacity=0.3, mesh__expert=4, mesh__data=2)
    state = fresh(tiny(), batch)
    mesh = sharding.make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        placed = jax.device_put(batch, sharding.rows(mesh))
        _, metrics = jax.jit(lambda p, b: step_lib.loss(p, b, config, jnp.int32(0)))(state.params, placed)
        encode = jax.jit(lambda p, rows: Encoder(config).apply({"params": p}, rows))
        served = encode(state.params["encoder"], placed.rows)
    dropped = np.asarray(metrics["dropped"])
    assert dropped.shape == (2,) and (dropped > 0.2).all() and (dropped < 0.9).all()
    assert not np.asarray(served.dropped).any()
    alone = jax.jit(Encoder(config).apply)(
        {"params": state.params["encoder"]}, batch.rows
    )  # without a mesh, as in serving
    np.testing.assert_allclose(served.embedding, alone.embedding, atol=1e-5)


def test_each_shard_drops_by_its_own_capacity(batch):
    """Capacity is per shard, not per global batch: counted here from the routing."""
    config = tiny(experts__dispatch="expert_parallel", experts__capacity=0.3, mesh__expert=4, mesh__data=2)
    tokens = batch.rows.tokens.size // 8
    capacity = -(-math.ceil(0.3 * tokens * 2 / 4) // 8) * 8
    gate = jnp.asarray(np.random.default_rng(0).dirichlet(np.ones(4), batch.rows.tokens.size), jnp.float32)
    index = jax.lax.top_k(gate, 2)[1]
    routing = router.Routing(gate=gate, index=index, prob=gate, logsumexp=gate[:, 0])
    mesh = sharding.make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        assert sharding.shards() == 8
        assert experts.capacity_of(tokens, 2, 4, 0.3) == capacity < tokens
        keep = np.asarray(router.keep_strongest(routing, jnp.ones(index.shape[0], bool), capacity, sharding.shards()))
    kept = np.where(keep, np.asarray(index), -1).reshape(8, -1)
    assert all((kept == expert).sum(axis=1).max() == capacity for expert in range(4))


@pytest.mark.parametrize("term", but_slow(["learned", "hard"], ["hard"]))
def test_a_router_term_trains(prepared, tokenizer, term):
    config = tiny(experts__router_term=term, experts__per_token=1)
    batch = pipeline.batches(prepared, pipeline.Reader(config, tokenizer))[0]
    assert batch.rows.segment.max() == 3
    state = fresh(config, batch)
    step = jitted(config)
    for _ in range(3):
        state, metrics = step(state, batch)
    assert bool(metrics["finite"]) and not np.asarray(metrics["dropped"]).any()
    experts = state.params["encoder"]["decoder"]["periods"]["layer_0"]["experts"]
    assert ("router_term" in experts) == (term == "learned")
    if term == "learned":
        assert np.abs(experts["router_term"]).min() > 0  # through L_aux
    else:  # each view uses only its own experts, e mod 3, and view t has no visual tokens
        text, image = np.moveaxis(np.asarray(metrics["modality"]), 1, 0)
        assert image[:, [0, 3]].sum() == 0 < image[:, [1, 2]].sum(1).min() and (text.sum(0) > 0).all()


def test_the_state_is_created_sharded():
    """On eight devices each creates an eighth of the quickstart's state, and never holds more."""
    config = config_lib.replace(config_lib.load("quickstart"), {"mesh.data": 1, "mesh.fsdp": 8})
    mesh = sharding.make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        rows = loop.abstract_batch(config, mesh).rows
        state = loop.abstract_state(config, rows, mesh)
        memory = loop.creation(config, state, rows).lower({}).compile().memory_analysis()
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    assert memory.output_size_in_bytes + memory.temp_size_in_bytes < 1.1 * whole / 8


def test_remat_policies_order_by_recomputation(batch):
    """The gradient has the fewest matmuls if all is stored, and the most if every layer is recomputed."""

    def matmuls(remat):
        config = tiny(training__remat=remat)
        params = jax.eval_shape(functools.partial(step_lib.initial_state, config), batch.rows)
        value = jax.grad(lambda p: step_lib.loss(p, jax.tree.map(jnp.asarray, batch), config, jnp.int32(0))[0])
        return str(jax.make_jaxpr(value)(nn.unbox(params).params)).count("dot_general")

    none, selective, full = map(matmuls, ("none", "selective", "full"))
    assert none < selective < full
