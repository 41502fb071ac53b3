"""Values and gradients of every formula against an oracle: float64 numpy with loops, written from the paper."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import optimize

from moon_jax import config as config_lib
from moon_jax.objectives import alignment, balance, filtering, weighting
from moon_jax.types import Batch, EncoderOutput, Rows
from tests.conftest import tiny

B, D, L, E, M = 6, 5, 2, 4, 5
Q, P, N = 0, 1, 2
T, I, MM = 0, 1, 2
KNOWN = np.array([[-1, -1], [4, 9], [-1, -1], [0, -1], [-1, -1], [3, 7]], np.int32)
"""Rows after the queries that each query is known to want; row 9 is the first negative of triplet 3."""


def unit(x):
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def example(seed=0, absent=((Q, 0, T), (Q, 1, I), (P, 2, I), (N, 3, T), (N, 4, None)), negatives=1):
    """Embeddings f64[2+N,B,3,D] and the rest of a batch. `absent` lists (role, b, view) to remove; None: all views."""
    rng = np.random.default_rng(seed)
    roles = 2 + negatives
    embedding = unit(rng.normal(size=(roles, B, 3, D)))
    present = np.ones((roles, B, 3), bool)
    for role, b, view in absent:
        gone = [view, MM] if view is not None else [T, I, MM]
        present[role, b, gone] = False
    embedding[~present] = 0
    tokens = rng.integers(1, 9, (roles, B, 3)) * present
    gate = rng.dirichlet(np.ones(E), (L, roles, B, 3)) * tokens[None, ..., None]
    product = np.array([[0, 1, 2, 3, 4, 5], [10, 11, 12, 13, 14, 10], [20, 21, 22, 23, -1, 12]])
    group = np.array([[0, 1, 2, 3, 4, 5], [50, 51, 52, 53, 51, 50], [60, 61, 62, -1, -1, 52]])
    for more in range(negatives - 1):
        product = np.concatenate([product, [np.arange(B) + 30 + 10 * more]])
        group = np.concatenate([group, [np.arange(B) + 70 + 10 * more]])
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
        known=KNOWN,
    )


def oracle(x, config, step):
    """The total loss and its parts, from the paper's formulas, in float64 with loops."""
    o = config.objective
    e, present = x["embedding"], x["present"]
    items = [(role, b) for role in range(P, len(e)) for b in range(B)]
    epsilon, intra_epsilon = o.temperature
    progress = step / config.training.steps
    margin = o.margin[1] + (o.margin[0] - o.margin[1]) * (1 + np.cos(np.pi * progress)) / 2

    phi = np.full(B, np.nan)
    for b in range(B):
        views = [v for v in (MM, I, T) if present[Q, b, v]]
        against = [e[role, b, MM] for role in range(N, len(e)) if present[role, b, MM]]
        if views and present[P, b, MM] and against:
            r = e[Q, b, views[0]]
            hardest = max(r @ n for n in against)
            phi[b] = 1 / (1 + np.exp(-o.phi_slope * (r @ e[P, b, MM] - hardest - margin)))
    w = x["weight"].copy()
    for b in range(B):
        if phi[b] < o.phi_threshold:
            w[b] *= phi[b] / o.phi_threshold

    def ids(role, b):
        return x["product"][role, b], x["group"][role, b]

    def wants(b, item):
        return items.index(item) in x["known"][b].tolist()

    def mean_over_widths(parts):
        return np.mean([loss for loss, _, _ in parts]), *parts[-1][1:]

    def contrast(anchor, own, candidates, temperature, further=()):
        """The loss of an anchor, its number of negatives and of those that the limit on the similarity excludes.

        Args:
            own: vector and ids of the own candidate.
            candidates: the vector and ids of all others that exist, and whether the query is known to want them.
            further: vectors of further positives.
        """
        return mean_over_widths(
            [contrast_at(width, anchor, own, candidates, temperature, further) for width in (*o.matryoshka, D)]
        )

    def contrast_at(width, anchor, own, candidates, temperature, further):
        cut = lambda vector: unit(vector[:width]) if width < D else vector  # noqa: E731
        mine = cut(anchor) @ cut(own[0])
        others, excluded = [], 0
        for vector, theirs, known in candidates:
            same = any(one == other and one >= 0 for one, other in zip(own[1], theirs, strict=True))
            if same or known:
                continue
            similar = cut(anchor) @ cut(vector)
            if o.similar_margin and similar > mine + o.similar_margin:
                excluded += 1
            else:
                others.append(np.exp(similar / temperature))
        positives = [mine, *(cut(anchor) @ cut(vector) for vector in further)]
        each = [-np.log(np.exp(s / temperature) / (np.exp(s / temperature) + sum(others))) for s in positives]
        return np.mean(each), len(others), excluded

    def item_candidates(own, view, query=None):
        return [
            (e[item][view], ids(*item), query is not None and wants(query, item))
            for item in items
            if item != own and present[item][view]
        ]

    loss, count, routing = np.zeros(M), np.zeros(M, int), np.zeros((L, M, E))
    negatives, excluded, chance = np.full(B, -1), np.zeros(B, int), np.full(M, np.log(2.0))
    mean_gate = x["gate"] / np.maximum(x["tokens"], 1)[None, ..., None]
    for m, view in enumerate((T, I, MM)):
        served = [b for b in range(B) if present[Q, b, view] and present[P, b, MM]]
        parts = {}
        for b in served:
            own = (e[P, b, MM], ids(P, b))
            further = []
            if o.known == "positive":
                wished = [item for item in items if wants(b, item)][: o.further]
                further = [e[item][MM] for item in wished if present[item][MM]]
            parts[b] = contrast(e[Q, b, view], own, item_candidates((P, b), MM, b), epsilon, further)
            if o.symmetric == "all":
                queries = [
                    (e[Q, other, view], ids(P, other), wants(other, (P, b)))
                    for other in range(B)
                    if other != b and present[Q, other, view]
                ]
                back = contrast(e[P, b, MM], (e[Q, b, view], ids(P, b)), queries, epsilon)
                parts[b] = ((parts[b][0] + back[0]) / 2, *parts[b][1:])
        count[m] = len(served)
        if served:
            loss[m] = sum(w[b] * parts[b][0] for b in served) / sum(w[b] for b in served)
            routing[:, m] = np.mean([mean_gate[:, Q, b, view] for b in served], axis=0)
            chance[m] = np.mean([np.log(1 + parts[b][1]) for b in served])
        for b in served:
            negatives[b], excluded[b] = parts[b][1:]
    for m, roles in ((3, [P]), (4, range(N, len(e)))):
        served = [item for item in items if item[0] in roles and present[item][I] and present[item][T]]
        parts = []
        for item in served:
            part = contrast(e[item][I], (e[item][T], ids(*item)), item_candidates(item, T), intra_epsilon)
            if o.symmetric != "none":
                back = contrast(e[item][T], (e[item][I], ids(*item)), item_candidates(item, I), intra_epsilon)
                part = ((part[0] + back[0]) / 2, *part[1:])
            parts.append(part)
        count[m] = len(served)
        if served:
            loss[m] = np.mean([part[0] for part in parts])
            chance[m] = np.mean([np.log(1 + part[1]) for part in parts])
            routing[:, m] = np.mean([(mean_gate[:, *item, I] + mean_gate[:, *item, T]) / 2 for item in served], axis=0)

    # A query counts for three samples, divided among its views by |B_m|; a pair of image and text counts for one.
    queries = sum(any(present[Q, b, view] for view in (T, I, MM)) and present[P, b, MM] for b in range(B))
    pairs = [count[3], count[4] / (len(e) - 2)]  # the negatives of a triplet together count for one
    share = np.array([3 * queries * n / max(sum(count[:3]), 1) for n in count[:3]] + pairs)
    share = share / (share.sum() or 1)
    active = count > 0
    p = np.where(active, np.exp(x["dual"]), 0)
    p = p / np.maximum(p.sum(-1, keepdims=True), 1e-300)
    if o.weighting == "uniform":
        omega = active / max(active.sum(), 1)
    elif o.weighting == "samples":
        omega = share
    else:
        omega = np.mean([(p[layer].T * routing[layer]).sum(1) for layer in range(L)], axis=0)
        omega = omega / max(omega.sum(), 1e-300)
    sparsity = np.mean([-(p[layer] * np.log(np.where(p[layer] > 0, p[layer], 1))).sum() / E for layer in range(L)])
    f, prob = x["load"] / (config.experts.per_token * x["valid"]), x["prob"] / x["valid"]
    balanced = np.mean([E * (f[layer] * prob[layer]).sum() for layer in range(L)])
    warm = step >= max(round(config.training.warmup * config.training.steps), config.training.min_warmup)
    total = (omega * loss).sum() + o.balance * balanced + (o.sparsity if warm else 0) * sparsity
    total += o.router_z * np.mean(x["z"] / x["valid"])
    return (
        dict(
            total=total,
            loss=loss,
            weight=omega,
            count=count,
            balance=balanced,
            sparsity=sparsity,
            phi=phi,
            negatives=negatives,
            known=(x["known"] >= 0).sum(1),
            excluded=excluded,
        ),
        chance,
        share,
    )


def inputs(x):
    """The example as EncoderOutput and Batch."""
    R = len(x["embedding"]) * B
    nothing = np.zeros((R, 1), np.int32)
    view = np.where(x["present"], np.array([1, 2, 3]), 0).reshape(R, 3)
    rows = Rows(*([nothing] * 9), view=view, owner=nothing)
    f32 = lambda a: jnp.asarray(a, jnp.float32)  # noqa: E731
    output = EncoderOutput(
        embedding=f32(x["embedding"]).reshape(R, 3, D),
        gate=f32(x["gate"]).reshape(L, R, 3, E),
        modality=jnp.zeros((L, 2, E)),
        tokens=jnp.asarray(x["tokens"].reshape(R, 3)),
        load=f32(x["load"]),
        prob=f32(x["prob"]),
        z=f32(x["z"]),
        dropped=jnp.zeros(L, jnp.int32),
        valid=jnp.int32(x["valid"]),
    )
    ids = x["product"].reshape(-1), x["group"].reshape(-1)
    known = (x["known"][..., None] == np.arange(R - B)).any(1)
    return output, Batch(rows, *ids, f32(x["weight"]), np.arange(B), np.packbits(known, axis=1, bitorder="little"))


def parameters(x, config):
    return {
        "dual": jnp.asarray(x["dual"], jnp.float32),
        "log_temperature": jnp.log(jnp.array(config.objective.temperature)),
    }


def settings(**more):
    return tiny(objective__temperature=(0.2, 0.3), training__steps=100, training__min_warmup=10, **more)


@pytest.mark.parametrize("step", [0, 40, 100])
@pytest.mark.parametrize("chunk", [5, 4096])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"phi_threshold": 0.0, "weighting": "stopped"},
        {"matryoshka": (2, 3)},
        {"symmetric": "all"},
        {"known": "positive"},
        {"known": "positive", "further": 1},
        {"similar_margin": 0.1, "matryoshka": (3,)},
        {"symmetric": "all", "known": "positive", "similar_margin": 0.1},
    ],
    ids=lambda options: " ".join(options) or "defaults",
)
@pytest.mark.parametrize("negatives", [1, 3])
def test_values_equal_the_oracle(step, chunk, options, negatives):
    x = example(negatives=negatives)
    more = {f"objective__{name}": value for name, value in options.items()}
    config = settings(objective__chunk=chunk, objective__router_z=0.1, **more)
    expected, *_ = oracle(x, config, step)
    output, batch = inputs(x)
    found = alignment.objectives(output, parameters(x, config), batch, config, jnp.int32(step))
    phi = expected["phi"]
    assert (phi < 0.6).any() and (phi > 0.6).any() and np.isnan(phi).any()  # all three kinds occur
    assert expected["excluded"].any() == bool(config.objective.similar_margin)
    for name, value in expected.items():
        np.testing.assert_allclose(getattr(found, name), value, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("samples", {}),
        ("uniform", {}),
        ("product", {}),
        ("stopped", {}),
        ("lagging", {}),
        ("routed", {}),
        ("lagging", {"matryoshka": (2, 3)}),
        ("uniform", {"symmetric": "all", "known": "positive"}),
        ("uniform", {"symmetric": "intra", "similar_margin": 0.1}),
    ],
)
def test_gradients_equal_finite_differences_of_the_oracle(mode, options):
    """The oracle holds fixed whatever the mode holds fixed, and uses float64."""
    more = {f"objective__{name}": value for name, value in options.items()}
    fixed = dict(objective__weighting=mode, objective__balance=0.0, objective__sparsity=0.0, **more)
    config = settings(**fixed)
    x = example(seed=3, negatives=2)
    step, size = 40, 1e-6
    base, chance, share = oracle(x, config, step)
    output, batch = inputs(x)

    def total(embedding, gate, dual):
        changed = output.replace(embedding=embedding, gate=gate)
        alignment_parameters = parameters(x, config) | {"dual": dual}
        return alignment.objectives(changed, alignment_parameters, batch, config, jnp.int32(step)).total

    by_embedding, by_gate, by_dual = jax.grad(total, argnums=(0, 1, 2))(
        output.embedding, output.gate, parameters(x, config)["dual"]
    )

    # ω is a constant for the embeddings. The filter is off; its weights have a test of their own.
    off = settings(**fixed, objective__phi_threshold=0.0)

    def total_off(embedding):
        changed = output.replace(embedding=embedding)
        return alignment.objectives(changed, parameters(x, off), batch, off, jnp.int32(step)).total

    off_gradient = np.asarray(jax.grad(total_off)(output.embedding)).reshape(x["embedding"].shape)
    base_off, *_ = oracle(x, off, step)
    rng, compared = np.random.default_rng(0), 0
    while compared < 12:
        role, b, view, d = rng.integers(len(x["embedding"])), rng.integers(B), rng.integers(3), rng.integers(D)
        if not x["present"][role, b, view]:
            continue
        up, down = dict(x), dict(x)
        up["embedding"], down["embedding"] = x["embedding"].copy(), x["embedding"].copy()
        up["embedding"][role, b, view, d] += size
        down["embedding"][role, b, view, d] -= size
        difference = oracle(up, off, step)[0]["loss"] - oracle(down, off, step)[0]["loss"]
        slope = (difference * base_off["weight"]).sum() / (2 * size)
        np.testing.assert_allclose(off_gradient[role, b, view, d], slope, rtol=2e-4, atol=2e-6)
        compared += 1

    def of_weights(y):
        """What the mode descends along W* and, in some modes, the router."""
        weight = oracle(y, config, step)[0]["weight"]
        if mode in ("lagging", "routed"):
            return -(weight * base["loss"] / chance).sum() - (share * np.log(weight)).sum()
        return (weight * base["loss"]).sum() if mode == "product" else 0.0

    def slopes(name, indices):
        found = {}
        for index in indices:
            up, down = dict(x, **{name: x[name].copy()}), dict(x, **{name: x[name].copy()})
            up[name][index] += size
            down[name][index] -= size
            found[index] = (of_weights(up) - of_weights(down)) / (2 * size)
        return found

    for index, slope in slopes("dual", np.ndindex(L, E, M)).items():
        np.testing.assert_allclose(by_dual[index], slope, rtol=1e-3, atol=1e-5)
    # Only `product` and `routed` pass a gradient to the router through ω.
    assert (np.abs(by_gate).max() > 1e-4) == (mode in ("product", "routed"))
    if mode in ("product", "routed"):
        by_gate = np.asarray(by_gate).reshape(x["gate"].shape)
        chosen = [
            (layer, role, b, view, 1) for layer in range(L) for role, b, view in ((Q, 2, T), (P, 0, I), (N, 1, T))
        ]
        for index, slope in slopes("gate", chosen).items():
            np.testing.assert_allclose(by_gate[index], slope, rtol=1e-3, atol=1e-6)
    assert np.isfinite(by_embedding).all()


def test_filter_weights_carry_no_gradient():
    """The gradient equals the one with constant weights φ/0.6."""
    config = settings()
    x = example(seed=0)
    phi = oracle(x, config, 0)[0]["phi"]
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
    every = np.ones(5, bool)
    assert weighting.sparsity(np.zeros((1, 3, 5)), every) == pytest.approx(np.log(5))
    assert weighting.sparsity(np.zeros((1, 3, 5)), np.arange(5) < 3) == pytest.approx(np.log(3))
    settled = np.zeros((1, 3, 5))
    settled[:, :, 2] = 100.0
    assert weighting.sparsity(settled, every) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("active", [[1, 1, 1, 1, 1], [0, 1, 0, 1, 1], [0, 0, 1, 0, 0]])
def test_a_uniform_dual_gives_uniform_weights_for_any_routing(active):
    active = np.array(active, bool)
    routing = np.random.default_rng(0).dirichlet(np.ones(E), (L, M)) * active[:, None]
    found = weighting.omega(np.zeros((L, E, M)), routing, active)
    np.testing.assert_allclose(found, active / active.sum(), rtol=1e-6)


@pytest.mark.parametrize("relative", [[0.01, 0.3, 0.9, 1.2, 0.5], [0, 0, 0, 0, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 50]])
@pytest.mark.parametrize("share", [[0.2] * 5, [1 / 3, 0, 1 / 3, 1 / 3, 0], [0.01, 0.48, 0.01, 0.25, 0.25]])
def test_the_fixed_point_is_the_maximum_and_grows_with_the_loss(relative, share):
    """Against scipy's root for μ, and against every other point of the simplex that is tried."""
    relative, share = np.array(relative, float), np.array(share)
    found = np.asarray(weighting.fixed_point(jnp.asarray(relative, jnp.float32), share), np.float64)
    active = share > 0
    part, s = relative[active], share[active]
    root = optimize.brentq(lambda mu: (s / (mu - part)).sum() - 1, part.max() + 1e-9, part.max() + 1.1)
    np.testing.assert_allclose(found[active], s / (root - part), rtol=1e-5)
    assert not found[~active].any() and found.sum() == pytest.approx(1, abs=1e-5)
    order = np.argsort(part, kind="stable")
    assert (np.diff((found[active] / s)[order]) >= -1e-5).all()
    assert (found[active] >= s / (1 + part.max() - part) - 1e-6).all()

    def gain(omega):
        return (omega * part).sum() + (s * np.log(omega)).sum()

    others = np.random.default_rng(0).dirichlet(np.ones(len(part)), 2000)
    assert gain(found[active]) >= max(map(gain, others)) - 1e-6


def descend(mode, loss, share, steps=400):
    """ω after Adam on W* with constant losses, at first and at last."""
    loss, share, chance = jnp.array(loss), jnp.array(share), jnp.full(M, 4.0)
    routing = jnp.array(np.random.default_rng(1).dirichlet(np.ones(E), (L, M)), jnp.float32)
    dual = jnp.array(0.02 * np.random.default_rng(0).normal(size=(L, E, M)), jnp.float32)
    adam = optax.adam(1e-2)

    def value(dual):
        return weighting.weighted_sum(dual, routing, loss, share, chance, mode)

    @jax.jit
    def step(dual, state):
        gradient, omega = jax.grad(value, has_aux=True)(dual)
        updates, state = adam.update(gradient, state)
        return dual + updates, state, omega

    state, omegas = adam.init(dual), []
    for _ in range(steps):
        dual, state, omega = step(dual, state)
        omegas.append(omega)
    return np.asarray(omegas[0]), np.asarray(omegas[-1])


SOLVED, UNSOLVED = 2, 3
LOSSES = [0.5, 1.0, 0.03, 2.96, 2.9]
"""At the end of a quickstart on fashion, by an earlier weighting: q_mm→p_mm is solved, p_i→p_t is not."""


def test_what_lags_gets_more_weight():
    """W* ends at the fixed point, from where it started, uniform. Earlier, what was solved got most."""
    first, last = descend("lagging", LOSSES, [1 / M] * M)
    np.testing.assert_allclose(first, 1 / M, atol=0.01)
    np.testing.assert_allclose(last, weighting.fixed_point(jnp.array(LOSSES) / 4, np.full(M, 1 / M)), atol=0.01)
    assert last.argmax() == UNSOLVED and last.argmin() == SOLVED
    _, product = descend("product", LOSSES, [1 / M] * M)
    assert product.argmax() == SOLVED  # the paper's formula, followed by plain gradient, does the opposite


@pytest.mark.parametrize("mode", ["samples", "uniform", "lagging", "routed", "product", "stopped"])
def test_weight_does_not_flow_to_objectives_without_samples(mode):
    """Photo queries only: no q_t and no q_mm. Σ ω over the rest stays 1; it fell to 0.27 when all took part."""
    for omega in descend(mode, [0.0, 1.0, 0.0, 2.0, 2.0], [0, 0.6, 0, 0.2, 0.2]):
        assert omega.sum() == pytest.approx(1, abs=1e-5)
        assert not omega[[0, 2]].any()


def test_shares_are_a_mean_over_samples():
    """A query counts for three samples, whichever views it has; an objective with few samples weighs little."""

    def found(count, queries, inter=3):
        return np.asarray(weighting.shares(jnp.array(count), jnp.array(queries), inter))

    np.testing.assert_allclose(found([9, 9, 9, 9, 9], 9), [1 / 5] * 5, rtol=1e-6)
    np.testing.assert_allclose(found([0, 9, 0, 9, 9], 9), [0, 3 / 5, 0, 1 / 5, 1 / 5], rtol=1e-6)
    # 12:3:2: each query has one view, so each objective has the weight of its queries.
    np.testing.assert_allclose(found([3, 12, 2, 17, 17], 17), np.array([9, 36, 6, 17, 17]) / 85, rtol=1e-6)
    # Photo queries, of which 3 are products; few products have a photo.
    np.testing.assert_allclose(
        found([3, 128, 3, 12, 9], 128),
        np.array([384 * 3 / 134, 384 * 128 / 134, 384 * 3 / 134, 12, 9]) / 405,
        rtol=1e-6,
    )
    np.testing.assert_allclose(found([0, 5], 5, 1), [0, 1], rtol=1e-6)
    assert not found([0, 0, 0, 0, 0], 0).any()


def test_a_dense_model_weights_by_the_same_rule():
    """Without W*, `lagging` is the fixed point itself, so that a dense model compares with a mixture of experts."""
    dual, routing, loss = jnp.zeros((0, 0, M)), jnp.zeros((0, M, 0)), jnp.array(LOSSES)
    chance = jnp.full(M, 4.0)
    total, weight = weighting.weighted_sum(dual, routing, loss, jnp.full(M, 1 / M), chance, "lagging")
    np.testing.assert_allclose(weight, weighting.fixed_point(loss / chance, np.full(M, 1 / M)), rtol=1e-6)
    np.testing.assert_allclose(total, (weight * loss).sum(), rtol=1e-6)
    uniform = weighting.weighted_sum(dual, routing, loss, jnp.full(M, 1 / M), chance, "uniform")[1]
    np.testing.assert_allclose(uniform, np.full(M, 1 / M), rtol=1e-6)


def test_the_filter_still_doubts_at_the_end_of_training():
    """A wrong purchase is as often less similar to its query than the negative is as it is more. At least these, half
    of the wrong purchases, must count less at every step; m̄ once fell so far that a third of them counted fully.
    """
    options = config_lib.Config().objective
    for progress in np.linspace(0, 1, 11):
        margin = filtering.margin_at(options.margin, jnp.float32(progress))
        query, same = np.array([[1.0, 0.0]]), np.array([[0.6, 0.8]])
        phi = filtering.phi(query, same, same, options.phi_slope, margin)
        assert filtering.sample_weight(phi, options.phi_threshold)[0] < 1


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
    x, config = example(seed=3), settings(objective__levels=levels, objective__weighting="stopped")
    everything, *_ = oracle(x, config, 40)
    p = np.exp(x["dual"][..., kept]) / np.exp(x["dual"][..., kept]).sum(-1, keepdims=True)
    mean_gate = x["gate"] / np.maximum(x["tokens"], 1)[None, ..., None]
    omega = np.zeros(M)
    for column, m in enumerate(kept):
        served = [b for b in range(B) if x["present"][Q, b, m] and x["present"][P, b, MM]]
        routing = np.mean([mean_gate[:, Q, b, m] for b in served], axis=0)
        omega[m] = np.mean([(p[layer, :, column] * routing[layer]).sum() for layer in range(L)])
    omega /= omega.sum()
    entropy = np.mean([-(p[layer] * np.log(p[layer])).sum() / E for layer in range(L)])
    total = (omega * everything["loss"]).sum() + config.objective.balance * everything["balance"]
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
