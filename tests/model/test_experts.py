"""Routing, capacity and the strategies against float64 numpy, in values and gradients, on one device and on meshes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moon_jax import backend, sharding
from moon_jax import config as config_lib
from moon_jax.config import UserError
from moon_jax.model import bank, experts, router
from tests.conftest import tiny

T, D, F = 64, 8, 12
CASES = ("balanced", "skewed", "one expert", "none valid")
SIZES = [(1, 1), (4, 1), (4, 2), (8, 1), (8, 2), (8, 8), (64, 1), (64, 2), (64, 8)]


def setup(count, per_token, case, seed=0):
    """hidden, router kernel, gate_up, down and a cotangent in float64, and which tokens are valid."""
    rng = np.random.default_rng(seed)
    hidden, kernel = rng.normal(size=(T, D)), rng.normal(size=(D, count))
    if case == "skewed":
        hidden[:, 0] = 2.0
        kernel[0] = np.linspace(1.0, -1.0, count)
    if case == "one expert":
        hidden[:, 0] = 2.0
        kernel[0, 0] = 6.0
    valid = np.zeros(T, bool) if case == "none valid" else rng.random(T) < 0.8
    matrices = rng.normal(size=(count, 2, D, F)) / D**0.5, rng.normal(size=(count, F, D)) / F**0.5
    return (hidden, kernel, *matrices), valid, rng.normal(size=(T, D))


def chosen_routes(hidden, kernel, per_token, term=0.0):
    logits = hidden @ kernel + term
    prob = np.exp(logits - logits.max(axis=1, keepdims=True))
    prob /= prob.sum(axis=1, keepdims=True)
    return prob, np.argsort(-logits, axis=1, kind="stable")[:, :per_token]


def kept_routes(prob, index, valid, capacity, shards):
    """Route by route: an expert takes a shard's strongest first."""
    keep = np.zeros(index.shape, bool)
    size = len(valid) // shards
    for start in range(0, len(valid), size):
        tokens = range(start, start + size)
        room = dict.fromkeys(range(prob.shape[1]), capacity)
        routes = [(-prob[t, e], t, k) for t in tokens if valid[t] for k, e in enumerate(index[t])]
        for _, t, k in sorted(routes):
            if room[index[t, k]]:
                room[index[t, k]] -= 1
                keep[t, k] = True
    return keep


def oracle(arrays, valid, cotangent, per_token, capacity=T, shards=1):
    """y, its gradients and the kept routes, from the formulas of moon2.md and their derivatives."""
    hidden, kernel, gate_up, down = arrays
    prob, index = chosen_routes(hidden, kernel, per_token)
    keep = kept_routes(prob, index, valid, capacity, shards)
    chosen = np.zeros(prob.shape, bool)
    np.put_along_axis(chosen, index, True, axis=1)
    kept = np.zeros(prob.shape, bool)
    np.put_along_axis(kept, index, keep, axis=1)
    total = (prob * chosen).sum(axis=1, keepdims=True)
    gate = prob * chosen / total
    y, grads = np.zeros((T, D)), [np.zeros_like(array) for array in arrays]
    dgate = np.zeros_like(gate)
    for e in range(gate.shape[1]):
        rows = kept[:, e]
        x, weight = hidden[rows], gate[rows, e][:, None]
        first, up = x @ gate_up[e, 0], x @ gate_up[e, 1]
        sigmoid = 1 / (1 + np.exp(-first))
        activated = first * sigmoid * up
        out = activated @ down[e]
        y[rows] += weight * out
        dgate[rows, e] = (cotangent[rows] * out).sum(axis=1)
        dout = weight * cotangent[rows]
        dactivated = dout @ down[e].T
        dfirst = dactivated * up * (sigmoid + first * sigmoid * (1 - sigmoid))
        dup = dactivated * first * sigmoid
        grads[0][rows] += dfirst @ gate_up[e, 0].T + dup @ gate_up[e, 1].T
        grads[2][e] = x.T @ dfirst, x.T @ dup
        grads[3][e] = activated.T @ dout
    dprob = chosen * (dgate - (gate * dgate).sum(axis=1, keepdims=True)) / total
    dlogits = prob * (dprob - (prob * dprob).sum(axis=1, keepdims=True))
    grads[0] += dlogits @ kernel.T
    grads[1] = hidden.T @ dlogits
    return y, grads, keep


def run(strategies, per_token, capacity, arrays, valid, cotangent):
    """For each strategy y, gradients and the kept routes."""
    found = {}
    shards = sharding.shards()
    for name in strategies:

        def forward(hidden, kernel, gate_up, down, name=name):
            routing = router.route(hidden, kernel, per_token)
            room = capacity if name == "expert_parallel" else T // shards
            keep = router.keep_strongest(routing, valid, room, shards)
            y = experts.STRATEGIES[name](hidden, routing.gate, routing.index, keep, gate_up, down, room)
            return (y * cotangent).sum(), (y, keep)

        gradients, (y, keep) = jax.grad(forward, argnums=(0, 1, 2, 3), has_aux=True)(*arrays)
        found[name] = y, gradients, keep
    return found


def check(found, expected):
    y, gradients, keep = expected
    np.testing.assert_array_equal(found[2], keep)
    for name, mine, theirs in zip(
        ("y", "tokens", "router", "gate_up", "down"), (found[0], *found[1]), (y, *gradients), strict=True
    ):
        scale = max(np.abs(theirs).max(), 1.0)
        np.testing.assert_allclose(np.asarray(mine) / scale, theirs / scale, atol=1e-5, err_msg=name)


def meshes(count):
    """Three meshes of eight devices whose axis `expert` divides so many experts."""
    if count == 1:
        return dict(data=8), dict(fsdp=2, tensor=4), dict(data=2, fsdp=4)
    return dict(data=8), dict(fsdp=2, expert=2, tensor=2), dict(data=8 // min(count, 8), expert=min(count, 8))


def put(mesh, arrays, valid, cotangent):
    """Arrays where a training step has them."""
    specs = [("data", "fsdp", "expert")], [None], ["expert", None, "fsdp", "tensor"], ["expert", "tensor", "fsdp"]
    place = lambda array, spec: jax.device_put(  # noqa: E731
        jnp.asarray(array), jax.NamedSharding(mesh, jax.P(*spec))
    )
    arrays = [place(array.astype(np.float32), spec) for array, spec in zip(arrays, specs, strict=True)]
    return arrays, place(valid, specs[0]), place(cotangent.astype(np.float32), specs[0])


@pytest.mark.parametrize(("count", "per_token"), SIZES)
@pytest.mark.parametrize("number", [None, 0, 1, 2], ids=["one device", "mesh 1", "mesh 2", "mesh 3"])
def test_strategies_equal_the_oracle(count, per_token, number):
    """Dropless ones, and expert_parallel with a capacity of half the even share too."""
    axes = dict(data=1) if number is None else meshes(count)[number]
    options = config_lib.Mesh(**({"data": 1} | axes))
    mesh = sharding.make_mesh(options, jax.devices()[:1] if number is None else None)
    with jax.set_mesh(mesh):
        shards = T // (T // sharding.shards())
        tight = max(1, T // shards * per_token // count // 2)
        dropless = jax.jit(functools.partial(run, tuple(experts.STRATEGIES), per_token, T // shards))
        dropping = jax.jit(functools.partial(run, ("expert_parallel",), per_token, tight))
        for case in CASES:
            arrays, valid, cotangent = setup(count, per_token, case)
            given = put(mesh, arrays, valid, cotangent)
            expected = oracle(arrays, valid, cotangent, per_token)
            for found in dropless(*given).values():
                check(found, expected)
            expected = oracle(arrays, valid, cotangent, per_token, tight, shards)
            check(dropping(*given)["expert_parallel"], expected)
            assert expected[2].any() == valid.any()
            assert case != "one expert" or expected[2].sum() < valid.sum() * per_token  # something was dropped
