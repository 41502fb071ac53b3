"""Values and gradients of every formula against an oracle: float64 numpy with loops, written from the paper."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moon_jax.objectives import alignment, balance, filtering, weighting
from moon_jax.types import Batch, EncoderOutput, Rows
from tests.conftest import tiny

B, D, L, E, M = 6, 5, 2, 4, 5
Q, P, N = 0, 1, 2
T, I, MM = 0, 1, 2


def unit(x):
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def example(seed=0, absent=((Q, 0, T), (Q, 1, I), (P, 2, I), (N, 3, T), (N, 4, None))):
    """Embeddings f64[3,B,3,D] and the rest of a batch. `absent` lists (role, b, view) to remove; None: all views."""
    rng = np.random.default_rng(seed)
    embedding = unit(rng.normal(size=(3, B, 3, D)))
    present = np.ones((3, B, 3), bool)
    for role, b, view in absent:
        gone = [view, MM] if view is not None else [T, I, MM]
        present[role, b, gone] = False
    embedding[~present] = 0
    tokens = rng.integers(1, 9, (3, B, 3)) * present
    gate = rng.dirichlet(np.ones(E), (L, 3, B, 3)) * tokens[None, ..., None]
    product = np.array([[0, 1, 2, 3, 4, 5], [10, 11, 12, 13, 14, 10], [20, 21, 22, 23, -1, 12]])
    group = np.array([[0, 1, 2, 3, 4, 5], [50, 51, 52, 53, 51, 50], [60, 61, 62, -1, -1, 52]])
    weight = np.array([1.0, 2.0, 1.0, 0.5, 1.0, 1.0])
    load, prob = rng.random((L, E)) * 50, rng.random((L, E)) * 50
    dual = rng.normal(size=(L, E, M)) * 0.5
    return dict(
        embedding=embedding,
        present=present,
        tokens=tokens,
        gate=gate,
        product=product,
        group=group,
        weight=weight,
        load=load,
        prob=prob,
        dual=dual,
        valid=100,
        z=rng.random(L) * 300,
    )


def oracle(x, config, step):
    """The total loss and its parts, from the paper's formulas, in float64 with loops."""
    o = config.objective
    e, present = x["embedding"], x["present"]
    epsilon, intra_epsilon = o.temperature
    progress = step / config.training.steps
    margin = o.margin[1] + (o.margin[0] - o.margin[1]) * (1 + np.cos(np.pi * progress)) / 2

    phi = np.full(B, np.nan)
    for b in range(B):
        views = [v for v in (MM, I, T) if present[Q, b, v]]
        if views and present[P, b, MM] and present[N, b, MM]:
            r = e[Q, b, views[0]]
            phi[b] = 1 / (1 + np.exp(-o.phi_slope * (r @ e[P, b, MM] - r @ e[N, b, MM] - margin)))
    w = x["weight"].copy()
    for b in range(B):
        if phi[b] < o.phi_threshold:
            w[b] *= phi[b] / o.phi_threshold

    def contrast(anchor, role, b, view, temperature):
        """Loss and number of negatives of an anchor whose own candidate is view `view` of item (role, b)."""
        widths = (D, *o.matryoshka)
        parts = [contrast_at(width, anchor, role, b, view, temperature) for width in widths]
        return np.mean([loss for loss, _ in parts]), parts[0][1]

    def contrast_at(width, anchor, role, b, view, temperature):
        own = (x["product"][role, b], x["group"][role, b])
        cut = lambda vector: unit(vector[:width]) if width < D else vector  # noqa: E731
        anchor = cut(anchor)
        positive = np.exp(anchor @ cut(e[role, b, view]) / temperature)
        others = []
        for other_role in (P, N):
            for other in range(B):
                ids = (x["product"][other_role, other], x["group"][other_role, other])
                same = any(mine == theirs and mine >= 0 for mine, theirs in zip(own, ids, strict=True))
                if (other_role, other) != (role, b) and present[other_role, other, view] and not same:
                    others.append(np.exp(anchor @ cut(e[other_role, other, view]) / temperature))
        return -np.log(positive / (positive + sum(others))), len(others)

    loss, count, routing, negatives = np.zeros(M), np.zeros(M, int), np.zeros((L, M, E)), np.zeros(B, int)
    mean_gate = x["gate"] / np.maximum(x["tokens"], 1)[None, ..., None]
    for m, view in enumerate((T, I, MM)):
        served = [b for b in range(B) if present[Q, b, view] and present[P, b, MM]]
        parts = {b: contrast(e[Q, b, view], P, b, MM, epsilon) for b in served}
        loss[m] = sum(w[b] * parts[b][0] for b in served) / sum(w[b] for b in served)
        count[m] = len(served)
        routing[:, m] = np.mean([mean_gate[:, Q, b, view] for b in served], axis=0)
        for b in served:
            negatives[b] = parts[b][1]
    for m, role in ((3, P), (4, N)):
        served = [b for b in range(B) if present[role, b, I] and present[role, b, T]]
        loss[m] = np.mean([contrast(e[role, b, I], role, b, T, intra_epsilon)[0] for b in served])
        count[m] = len(served)
        routing[:, m] = np.mean([(mean_gate[:, role, b, I] + mean_gate[:, role, b, T]) / 2 for b in served], axis=0)

    p = np.exp(x["dual"]) / np.exp(x["dual"]).sum(-1, keepdims=True)
    omega = np.mean([(p[layer].T * routing[layer]).sum(1) for layer in range(L)], axis=0)
    sparsity = np.mean([-(p[layer] * np.log(p[layer])).sum() / E for layer in range(L)])
    f, prob = x["load"] / (config.experts.per_token * x["valid"]), x["prob"] / x["valid"]
    balanced = np.mean([E * (f[layer] * prob[layer]).sum() for layer in range(L)])
    warm = step >= max(round(config.training.warmup * config.training.steps), config.training.min_warmup)
    total = (omega * loss).sum() + o.balance * balanced + (o.sparsity if warm else 0) * sparsity
    total += o.router_z * np.mean(x["z"] / x["valid"])
    return dict(
        total=total,
        loss=loss,
        weight=omega,
        count=count,
        balance=balanced,
        sparsity=sparsity,
        phi=phi,
        negatives=negatives,
    )


def inputs(x):
    """The example as EncoderOutput and Batch."""
    nothing = np.zeros((3 * B, 1), np.int32)
    view = np.where(x["present"], np.array([1, 2, 3]), 0).reshape(3 * B, 3)
    rows = Rows(*([nothing] * 9), view=view, owner=nothing)
    f32 = lambda a: jnp.asarray(a, jnp.float32)  # noqa: E731
    output = EncoderOutput(
        embedding=f32(x["embedding"]).reshape(3 * B, 3, D),
        gate=f32(x["gate"]).reshape(L, 3 * B, 3, E),
        tokens=jnp.asarray(x["tokens"].reshape(3 * B, 3)),
        load=f32(x["load"]),
        prob=f32(x["prob"]),
        z=f32(x["z"]),
        dropped=jnp.zeros(L, jnp.int32),
        valid=jnp.int32(x["valid"]),
    )
    batch = Batch(rows, x["product"].reshape(-1), x["group"].reshape(-1), f32(x["weight"]), np.arange(B))
    return output, batch


def parameters(x, config):
    return {
        "dual": jnp.asarray(x["dual"], jnp.float32),
        "log_temperature": jnp.log(jnp.array(config.objective.temperature)),
    }


def settings(**more):
    return tiny(objective__temperature=(0.2, 0.3), training__steps=100, training__min_warmup=10, **more)


@pytest.mark.parametrize("step", [0, 40, 100])
@pytest.mark.parametrize("chunk", [5, 4096])
@pytest.mark.parametrize(("threshold", "matryoshka"), [(0.6, ()), (0.0, ()), (0.6, (2, 3))])
def test_values_equal_the_oracle(step, chunk, threshold, matryoshka):
    x = example()
    config = settings(
        objective__chunk=chunk,
        objective__phi_threshold=threshold,
        objective__router_z=0.1,
        objective__matryoshka=matryoshka,
    )
    expected = oracle(x, config, step)
    output, batch = inputs(x)
    found = alignment.objectives(output, parameters(x, config), batch, config, jnp.int32(step))
    assert (expected["phi"] < 0.6).sum() == 1 and np.isnan(expected["phi"]).sum() == 3  # all three kinds occur
    for name, value in expected.items():
        np.testing.assert_allclose(getattr(found, name), value, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    ("mode", "matryoshka"),
    [("balanced", ()), ("product", ()), ("stopped", ()), ("balanced", (2, 3))],
)
def test_gradients_equal_finite_differences_of_the_oracle(mode, matryoshka):
    """The oracle holds fixed whatever the mode holds fixed, and uses float64."""
    fixed = dict(objective__weighting=mode, objective__balance=0.0, objective__sparsity=0.0)
    config = settings(**fixed, objective__matryoshka=matryoshka)
    x = example(seed=3)
    step, size = 40, 1e-6
    base = oracle(x, config, step)
    output, batch = inputs(x)

    def total(embedding, gate, dual):
        changed = output.replace(embedding=embedding, gate=gate)
        alignment_parameters = parameters(x, config) | {"dual": dual}
        return alignment.objectives(changed, alignment_parameters, batch, config, jnp.int32(step)).total

    by_embedding, by_gate, by_dual = jax.grad(total, argnums=(0, 1, 2))(
        output.embedding, output.gate, parameters(x, config)["dual"]
    )

    # ω is a constant for the embeddings. The filter is off; its weights have a test of their own.
    off = settings(**fixed, objective__matryoshka=matryoshka, objective__phi_threshold=0.0)

    def total_off(embedding):
        changed = output.replace(embedding=embedding)
        return alignment.objectives(changed, parameters(x, off), batch, off, jnp.int32(step)).total

    off_gradient = np.asarray(jax.grad(total_off)(output.embedding)).reshape(3, B, 3, D)
    base_off = oracle(x, off, step)
    rng = np.random.default_rng(0)
    for _ in range(12):
        role, b, view, d = rng.integers(3), rng.integers(B), rng.integers(3), rng.integers(D)
        if not x["present"][role, b, view]:
            continue
        up, down = dict(x), dict(x)
        up["embedding"], down["embedding"] = x["embedding"].copy(), x["embedding"].copy()
        up["embedding"][role, b, view, d] += size
        down["embedding"][role, b, view, d] -= size
        slope = ((oracle(up, off, step)["loss"] - oracle(down, off, step)["loss"]) * base_off["weight"]).sum() / (
            2 * size
        )
        np.testing.assert_allclose(off_gradient[role, b, view, d], slope, rtol=2e-4, atol=1e-6)

    def omega_and_barrier(y):
        after = oracle(y, config, step)
        value = (after["weight"] * base["loss"]).sum()
        return value - np.log(M * after["weight"]).sum() / M if mode == "balanced" else value

    expected = np.zeros((L, E, M))
    for index in np.ndindex(L, E, M):
        up, down = dict(x, dual=x["dual"].copy()), dict(x, dual=x["dual"].copy())
        up["dual"][index] += size
        down["dual"][index] -= size
        expected[index] = (omega_and_barrier(up) - omega_and_barrier(down)) / (2 * size)
    if mode == "stopped":
        expected[:] = 0
    np.testing.assert_allclose(by_dual, expected, rtol=1e-3, atol=1e-5)
    # Only `product` passes a gradient to the router through ω.
    assert (np.abs(by_gate).max() > 1e-4) == (mode == "product")
    assert np.isfinite(by_embedding).all()


def test_filter_weights_carry_no_gradient():
    """The gradient equals the one with constant weights φ/0.6."""
    config = settings()
    x = example(seed=0)
    phi = oracle(x, config, 0)["phi"]
    assert (phi < 0.6).any()
    output, batch = inputs(x)

    def gradient(config, batch):
        def total(embedding):
            changed = output.replace(embedding=embedding)
            return alignment.objectives(changed, parameters(x, config), batch, config, jnp.int32(0)).total

        return jax.grad(total)(output.embedding)

    constant = np.where(phi < 0.6, phi / 0.6, 1.0)
    weighted = batch.replace(weight=jnp.asarray(x["weight"] * constant, jnp.float32))
    off = settings(objective__phi_threshold=0.0)
    np.testing.assert_allclose(gradient(config, batch), gradient(off, weighted), rtol=1e-4, atol=1e-6)


def test_an_objective_without_samples_is_zero_and_finite():
    """No product has an image: of the queries only q_t is left, and it has no p_mm."""
    x = example(absent=[(role, b, I) for role in range(3) for b in range(B)])
    config = settings()
    output, batch = inputs(x)

    def total(embedding, dual):
        found = alignment.objectives(
            output.replace(embedding=embedding), parameters(x, config) | {"dual": dual}, batch, config, jnp.int32(0)
        )
        return found.total, found

    (_, found), gradients = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(
        output.embedding, parameters(x, config)["dual"]
    )
    np.testing.assert_array_equal(found.count, np.zeros(M))
    np.testing.assert_array_equal(found.loss, np.zeros(M))
    assert np.isnan(found.phi).all()
    assert all(np.isfinite(gradient).all() for gradient in gradients)


def test_load_balance_on_a_worked_example():
    # E = 4, K = 2, 10 tokens, 20 routes. If all go to experts 0 and 1, f = (1/2, 1/2, 0, 0), and with probabilities
    # (1/2, 1/2, 0, 0) the loss is 4 · (1/4 + 1/4) = 2. If they are even, f = P = 1/4 each: 4 · 4 · 1/16 = 1.
    skewed, even = np.array([10.0, 10, 0, 0]), np.full(4, 5.0)
    np.testing.assert_allclose(balance.load_balance(skewed[None], skewed[None] / 2, 10, 2), 2.0)
    np.testing.assert_allclose(balance.load_balance(even[None], even[None] / 2, 10, 2), 1.0)
    both = np.stack([skewed, even])
    np.testing.assert_allclose(balance.load_balance(both, both / 2, 10, 2), 1.5)
    assert balance.load_balance(skewed[None], skewed[None], 0, 2) >= 0  # no valid tokens: no division by zero


def test_router_z_on_a_worked_example():
    # logits (0, 0): logsumexp = log 2, squared 0.480453; over 4 tokens the sum is 1.921812.
    np.testing.assert_allclose(balance.router_z(np.array([1.921812]), 4), 0.480453, rtol=1e-6)


def test_sparsity_on_a_worked_example():
    assert weighting.sparsity(np.zeros((1, 3, 5))) == pytest.approx(np.log(5))
    settled = np.zeros((1, 3, 5))
    settled[:, :, 2] = 100.0
    assert weighting.sparsity(settled) == pytest.approx(0.0, abs=1e-6)


def test_a_uniform_dual_gives_uniform_weights_for_any_routing():
    routing = np.random.default_rng(0).dirichlet(np.ones(E), (L, M))
    np.testing.assert_allclose(weighting.omega(np.zeros((L, E, M)), routing), np.full(M, 1 / M), rtol=1e-6)


def test_margin_and_weight_on_a_worked_example():
    # m̄ goes from 0.1 to -0.2, through -0.05 in the middle. φ ≥ 0.6 means a difference ≥ m̄ + ln(1.5)/10 = m̄ + 0.0405.
    margins = [filtering.margin_at((0.1, -0.2), jnp.float32(p)) for p in (0.0, 0.5, 1.0)]
    np.testing.assert_allclose(margins, [0.1, -0.05, -0.2], atol=1e-7)
    q, p, n = np.array([[1.0, 0.0]]), np.array([[0.1406, 0.0]]), np.zeros((1, 2))
    assert filtering.phi(q, p, n, 10.0, 0.1)[0] == pytest.approx(0.6, abs=1e-3)
    np.testing.assert_allclose(
        filtering.sample_weight(jnp.array([0.9, 0.6, 0.3, jnp.nan]), 0.6), [1.0, 1.0, 0.5, 1.0], rtol=1e-6
    )


@pytest.mark.parametrize(("levels", "kept"), [("inter", [0, 1, 2]), ("mm→mm", [2])])
def test_objectives_that_do_not_train_have_no_effect(levels, kept):
    """p is a softmax over the objectives that train; the others affect neither embeddings, router nor W*."""
    x, config = example(seed=3), settings(objective__levels=levels)
    everything = oracle(x, config, 40)
    few = oracle(dict(x, dual=x["dual"]), config, 40)
    p = np.exp(x["dual"][..., kept]) / np.exp(x["dual"][..., kept]).sum(-1, keepdims=True)
    mean_gate = x["gate"] / np.maximum(x["tokens"], 1)[None, ..., None]
    omega = np.zeros(M)
    for column, m in enumerate(kept):
        served = [b for b in range(B) if x["present"][Q, b, m] and x["present"][P, b, MM]]
        routing = np.mean([mean_gate[:, Q, b, m] for b in served], axis=0)
        omega[m] = np.mean([(p[layer, :, column] * routing[layer]).sum() for layer in range(L)])
    entropy = np.mean([-(p[layer] * np.log(p[layer])).sum() / E for layer in range(L)])
    total = (omega * everything["loss"]).sum() + config.objective.balance * few["balance"]
    total += config.objective.sparsity * entropy
    output, batch = inputs(x)

    def value(embedding, dual):
        found = alignment.objectives(
            output.replace(embedding=embedding), parameters(x, config) | {"dual": dual}, batch, config, jnp.int32(40)
        )
        return found.total, found

    (_, found), (by_embedding, by_dual) = jax.value_and_grad(value, argnums=(0, 1), has_aux=True)(
        output.embedding, parameters(x, config)["dual"]
    )
    np.testing.assert_allclose(found.total, total, rtol=1e-5)
    np.testing.assert_allclose(found.weight, omega, rtol=1e-5)
    off = [m for m in range(M) if m not in kept]
    assert not np.asarray(found.loss)[off].any() and not np.asarray(found.count)[off].any()
    np.testing.assert_allclose(np.asarray(found.loss)[kept], everything["loss"][kept], rtol=1e-5)
    assert not np.asarray(by_dual)[..., off].any()
    queries = np.asarray(by_embedding).reshape(3, B, 3, D)[Q]
    assert [bool(queries[:, view].any()) for view in (T, I, MM)] == [m in kept for m in range(3)]
    if len(kept) > 1:
        assert np.asarray(by_dual)[..., kept].any()


def test_counted_weights_are_a_mean_over_queries():
    x, config = example(seed=3), settings(objective__weighting="counted", objective__sparsity=0.0)
    expected = oracle(x, config, 40)
    queries = expected["count"][:3]
    omega = np.array([*(3 / M * queries / queries.sum()), 1 / M, 1 / M])
    assert len(set(omega)) > 2
    output, batch = inputs(x)

    def value(dual):
        changed = parameters(x, config) | {"dual": dual}
        found = alignment.objectives(output, changed, batch, config, jnp.int32(40))
        return found.total, found

    (total, found), by_dual = jax.value_and_grad(value, has_aux=True)(parameters(x, config)["dual"])
    np.testing.assert_allclose(found.weight, omega, rtol=1e-6)
    balanced = config.objective.balance * expected["balance"]
    np.testing.assert_allclose(total, (omega * expected["loss"]).sum() + balanced, rtol=1e-5)
    assert not np.asarray(by_dual).any()
