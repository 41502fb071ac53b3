"""The strategies against a loop over tokens in float64 numpy, in values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moon_jax.model import experts, router

T, D, F = 40, 6, 5


def setup(count, per_token, case, seed=0):
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(T, D))
    kernel = rng.normal(size=(D, count))
    if case == "skewed":
        hidden[:, 0] = 3.0
        kernel[0] = np.linspace(2.0, -2.0, count)
    if case == "one expert":
        hidden[:, 0] = 9.0
        kernel[0, 0] = 9.0
    valid = np.zeros(T, bool) if case == "none valid" else rng.random(T) < 0.8
    gate_up, down = rng.normal(size=(count, D, 2 * F)), rng.normal(size=(count, F, D))
    return hidden, kernel, valid, gate_up, down


def oracle(hidden, kernel, valid, gate_up, down, per_token):
    y = np.zeros((T, D))
    gates = np.zeros((T, kernel.shape[1]))
    for t in range(T):
        logits = hidden[t] @ kernel
        prob = np.exp(logits - logits.max())
        prob /= prob.sum()
        chosen = np.argsort(-prob, kind="stable")[:per_token]
        for e in chosen:
            gates[t, e] = prob[e] / prob[chosen].sum()
            if valid[t]:
                h = hidden[t] @ gate_up[e]
                y[t] += gates[t, e] * ((h[:F] / (1 + np.exp(-h[:F])) * h[F:]) @ down[e])
    return y, gates


def run(name, per_token, hidden, kernel, valid, gate_up, down):
    routing = router.route(hidden, kernel, per_token)
    return experts.DISPATCH[name](hidden, routing.gate, routing.index, jnp.asarray(valid), gate_up, down)


@pytest.mark.parametrize("case", ["balanced", "skewed", "one expert", "none valid"])
@pytest.mark.parametrize(("count", "per_token"), [(1, 1), (4, 1), (4, 2), (8, 8), (64, 2), (64, 8)])
@pytest.mark.parametrize("block", [8, 128])
def test_strategies_equal_the_oracle(monkeypatch, case, count, per_token, block):
    monkeypatch.setattr(experts, "BLOCK", block)
    x = setup(count, per_token, case)
    valid = x[2]
    expected, gates = oracle(*x, per_token)
    hidden, kernel, _, gate_up, down = (jnp.asarray(a, jnp.float32) for a in x)
    np.testing.assert_allclose(router.route(hidden, kernel, per_token).gate, gates, rtol=2e-5, atol=1e-6)

    weights = np.random.default_rng(1).normal(size=(T, D)).astype(np.float32)
    values, gradients = {}, {}
    for name in experts.DISPATCH:
        f = lambda *a, name=name: (run(name, per_token, *a[:2], valid, *a[2:]) * weights).sum()  # noqa: E731
        values[name] = run(name, per_token, hidden, kernel, valid, gate_up, down)
        gradients[name] = jax.grad(f, argnums=(0, 1, 2, 3))(hidden, kernel, gate_up, down)
        np.testing.assert_allclose(values[name], expected, rtol=1e-4, atol=1e-4)
    for a, b in zip(gradients["grouped"], gradients["dense"], strict=True):
        scale = max(float(jnp.abs(b).max()), 1.0)
        np.testing.assert_allclose(a / scale, b / scale, atol=1e-5)
    if case != "none valid":
        assert all(float(jnp.abs(g).max()) > 1e-3 for g in gradients["dense"][:1] + gradients["dense"][2:])


def test_dense_gradients_equal_finite_differences_in_float64():
    x = setup(4, 2, "balanced", seed=5)
    hidden, kernel, valid, gate_up, down = x
    weights = np.random.default_rng(1).normal(size=(T, D))
    value = lambda *a: (oracle(a[0], a[1], valid, a[2], a[3], 2)[0] * weights).sum()  # noqa: E731
    arguments = [hidden, kernel, gate_up, down]
    f = lambda *a: (run("dense", 2, a[0], a[1], valid, a[2], a[3]) * weights).sum()  # noqa: E731
    found = jax.grad(f, argnums=(0, 1, 2, 3))(*(jnp.asarray(a, jnp.float32) for a in arguments))
    rng = np.random.default_rng(2)
    for number, (argument, gradient) in enumerate(zip(arguments, found, strict=True)):
        for _ in range(5):
            index = tuple(rng.integers(size) for size in argument.shape)
            up, down_ = list(arguments), list(arguments)
            up[number], down_[number] = argument.copy(), argument.copy()
            up[number][index] += 1e-6
            down_[number][index] -= 1e-6
            slope = (value(*up) - value(*down_)) / 2e-6
            np.testing.assert_allclose(gradient[index], slope, rtol=1e-3, atol=1e-3)
