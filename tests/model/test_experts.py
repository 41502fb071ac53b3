"""Routing, capacity and strategies against float64 numpy: values and gradients, on one device and on meshes."""

import functools
import sys
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from moon_jax import backend, sharding
from moon_jax import config as config_lib
from moon_jax.data import pipeline, text
from moon_jax.data import rows as rows_lib
from moon_jax.errors import UserError
from moon_jax.model import experts, grouped_matmul, router
from moon_jax.model.encoder import Encoder, initialize
from moon_jax.training.metrics import mutual_information
from moon_jax.types import VIEWS, Product
from tests.conftest import tiny

T, D, F = 64, 8, 12
CASES = ("balanced", "skewed", "one expert", "none valid")
SIZES = [(1, 1), (4, 1), (4, 2), (8, 1), (8, 2), (8, 8), (64, 1), (64, 2), (64, 8)]


def setup(count, per_token, case, seed=0):
    """(hidden, router kernel, gate_up, down) in float64, the valid tokens, and a cotangent."""
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
    """Route by route: an expert takes a shard's strongest routes first."""
    keep = np.zeros(index.shape, bool)
    size = len(valid) // shards
    for start in range(0, len(valid), size):
        tokens = range(start, start + size)
        free = dict.fromkeys(range(prob.shape[1]), capacity)
        routes = [(-prob[t, e], t, k) for t in tokens if valid[t] for k, e in enumerate(index[t])]
        for _, t, k in sorted(routes):
            if free[index[t, k]]:
                free[index[t, k]] -= 1
                keep[t, k] = True
    return keep


def oracle(arrays, valid, cotangent, per_token, capacity=T, shards=1):
    """y, its gradients and the kept routes, from the paper's formulas and their derivatives."""
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
    """For each strategy: y, gradients and the kept routes."""
    found = {}
    shards = sharding.shards()
    for name in strategies:

        def forward(hidden, kernel, gate_up, down, name=name):
            routing = router.route(hidden, kernel, per_token)
            limit = capacity if name == "expert_parallel" else T // shards
            keep = router.keep_strongest(routing, valid, limit, shards)
            y = experts.STRATEGIES[name](hidden, routing.gate, routing.index, keep, gate_up, down, limit)
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
    """Three meshes of eight devices; their axis `expert` divides `count` experts."""
    if count == 1:
        return dict(data=8), dict(fsdp=2, tensor=4), dict(data=2, fsdp=4)
    return dict(data=8), dict(fsdp=2, expert=2, tensor=2), dict(data=8 // min(count, 8), expert=min(count, 8))


def put(mesh, arrays, valid, cotangent):
    """The arrays, sharded as in a training step."""
    specs = [("data", "fsdp", "expert")], [None], ["expert", None, "fsdp", "tensor"], ["expert", "tensor", "fsdp"]
    place = lambda array, spec: jax.device_put(  # noqa: E731
        jnp.asarray(array), jax.NamedSharding(mesh, jax.P(*spec))
    )
    arrays = [place(array.astype(np.float32), spec) for array, spec in zip(arrays, specs, strict=True)]
    return arrays, place(valid, specs[0]), place(cotangent.astype(np.float32), specs[0])


def placed():
    """Every size on one device and on three meshes; some of them in the fast suite."""
    fast = {(1, 1): (None,), (4, 2): (None, 0, 1, 2), (8, 2): (1,), (64, 8): (None, 2)}
    for count, per_token in SIZES:
        for number, name in ((None, "one device"), (0, "mesh 1"), (1, "mesh 2"), (2, "mesh 3")):
            marks = [] if number in fast.get((count, per_token), ()) else [pytest.mark.slow]
            yield pytest.param(count, per_token, number, id=f"{name}-{count}-{per_token}", marks=marks)


@pytest.mark.parametrize(("count", "per_token", "number"), list(placed()))
def test_strategies_equal_the_oracle(count, per_token, number):
    """Dropless, and for expert_parallel also with a capacity of half the even share."""
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
            sharded = put(mesh, arrays, valid, cotangent)
            expected = oracle(arrays, valid, cotangent, per_token)
            for found in dropless(*sharded).values():
                check(found, expected)
            expected = oracle(arrays, valid, cotangent, per_token, tight, shards)
            check(dropping(*sharded)["expert_parallel"], expected)
            assert expected[2].any() == valid.any()
            assert case != "one expert" or expected[2].sum() < valid.sum() * per_token  # something was dropped


def both(count, per_token, case, platform, monkeypatch):
    """The results of the strategy `grouped` with a platform's implementation, and of the oracle."""
    monkeypatch.setattr(backend, "platform", lambda: platform)
    arrays, valid, cotangent = setup(count, per_token, case)
    example = [jnp.asarray(array, jnp.float32) for array in arrays], jnp.asarray(valid), jnp.asarray(cotangent)
    found = jax.jit(functools.partial(run, ("grouped",), per_token, T))(*example)["grouped"]
    return found, oracle(arrays, valid, cotangent, per_token)


@pytest.mark.parametrize("case", CASES)
def test_the_grouped_matmul_for_tpus_equals_the_oracle(case, monkeypatch):
    """In Pallas's interpreter."""
    monkeypatch.setattr(grouped_matmul, "INTERPRET", True)
    check(*both(8, 2, case, "tpu", monkeypatch))


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_the_grouped_matmul_for_gpus_equals_the_oracle(case, monkeypatch):
    check(*both(8, 2, case, "gpu", monkeypatch))


def test_a_gpu_without_tokamax_is_a_one_line_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokamax", None)
    with pytest.raises(UserError, match=r"on a GPU the grouped matmul needs tokamax; pip install -e '.\[cuda\]'"):
        both(4, 2, "balanced", "gpu", monkeypatch)


def test_a_tokamax_without_triton_is_a_one_line_error(monkeypatch):
    """As tokamax 0.0.17 was found on a GPU: its Triton kernels are missing if jax-triton is."""

    def ragged_dot(x, matrices, sizes, implementation):
        del x, matrices, sizes
        raise ValueError(f"Unknown implementation: {implementation}")

    monkeypatch.setitem(sys.modules, "tokamax", SimpleNamespace(ragged_dot=ragged_dot))
    with pytest.raises(UserError, match=r"tokamax needs triton and jax-triton; pip install -e '.\[cuda\]'"):
        both(4, 2, "balanced", "gpu", monkeypatch)


@pytest.mark.parametrize("sizes", [(0, 0, 0), (40, 0, 0), (0, 0, 40), (13, 1, 26), (3, 30, 0)])
def test_the_grouped_matmul_ignores_rows_after_the_last_group(sizes, monkeypatch):
    """Neither these rows nor their cotangents affect the gradients."""
    monkeypatch.setattr(grouped_matmul, "BLOCK", 16)
    rng = np.random.default_rng(0)
    x, cotangent = rng.normal(size=(2, 40, D)).astype(np.float32)
    gate_up, down = rng.normal(size=(3, 2, D, F)).astype(np.float32), rng.normal(size=(3, F, D)).astype(np.float32)
    total = sum(sizes)
    expert = np.repeat(np.arange(3), sizes)
    x[total:], cotangent[total:] = 1e3, 1e3
    y, pull = jax.vjp(lambda *arrays: grouped_matmul.swiglu(*arrays, jnp.array(sizes, jnp.int32)), x, gate_up, down)

    def plain(x, gate_up, down):
        x = x[:total, None]
        return ((jax.nn.silu(x @ gate_up[expert, 0]) * (x @ gate_up[expert, 1])) @ down[expert])[:, 0]

    expected, plain_pull = jax.vjp(plain, x, gate_up, down)
    found, expected = (y, *pull(cotangent)), (expected, *plain_pull(cotangent[:total]))
    for name, mine, theirs in zip(("y", "x", "gate_up", "down"), found, expected, strict=True):
        mine, theirs = (mine[:total], theirs[:total]) if name in "yx" else (mine, theirs)
        scale = max(np.abs(theirs).max(initial=0), 1.0)
        np.testing.assert_allclose(mine / scale, theirs / scale, atol=1e-5, err_msg=name)


def test_capacity_keeps_the_strongest_on_a_worked_example():
    """Two shards of three tokens, two experts, K = 1, C = 1."""
    prob = np.array([[0.6, 0.4], [0.9, 0.1], [0.2, 0.8], [0.7, 0.3], [0.7, 0.3], [0.45, 0.55]], np.float32)
    routing = router.Routing(gate=prob, index=prob.argmax(1)[:, None], prob=prob, logsumexp=np.zeros(6))
    everyone = np.ones(6, bool)
    # First shard: tokens 0 and 1 choose expert 0, and 1 is stronger. Second: 3 and 4 tie, so the earlier one is taken.
    kept = router.keep_strongest(routing, everyone, 1, 2)
    assert kept[:, 0].tolist() == [False, True, True, True, False, True]
    # One shard of six: the strongest of all, 0.9 and 0.8.
    assert router.keep_strongest(routing, everyone, 1, 1)[:, 0].tolist() == [False, True, True, False, False, False]
    # An invalid token uses no capacity.
    valid = np.array([True, False, True, True, True, True])
    assert router.keep_strongest(routing, valid, 1, 2)[:, 0].tolist() == [True, False, True, True, False, True]
    # Capacity for all.
    assert router.keep_strongest(routing, valid, 3, 2)[:, 0].tolist() == valid.tolist()


def test_capacity_is_a_multiple_of_the_even_share():
    # 100 tokens with K = 2 over 8 experts: 25 each. 1.25 times that is 31.25, rounded up to a multiple of 8.
    assert experts.capacity_of(100, 2, 8, 1.25) == 32
    assert experts.capacity_of(100, 2, 8, 1.0) == 32 and experts.capacity_of(96, 2, 8, 1.0) == 24
    assert experts.capacity_of(100, 2, 8, 0.0) == 100  # drops nothing
    assert experts.capacity_of(100, 2, 8, 9.0) == 100  # an expert has at most one route per token


def test_a_hard_term_keeps_compositions_apart():
    hidden, kernel = np.random.default_rng(0).normal(size=(30, D)), np.random.default_rng(1).normal(size=(D, 8))
    composition = np.arange(30) % 3
    term = router.hard_term(3, 8, 2)
    routing = router.route(jnp.asarray(hidden), jnp.asarray(kernel), 2, term[composition])
    assert (np.asarray(routing.index) // 2 % 3 == composition[:, None]).all()
    prob, index = chosen_routes(hidden, kernel, 2, term[composition])
    np.testing.assert_array_equal(routing.index, index)
    np.testing.assert_allclose(routing.prob, prob, atol=1e-6)
    assert np.isfinite(np.asarray(routing.gate)).all() and np.isfinite(np.asarray(routing.logsumexp)).all()
    gradient = jax.grad(lambda k: router.route(hidden, k, 2, term[composition]).gate[:, ::2].sum())(kernel)
    assert np.isfinite(gradient).all() and np.abs(gradient).max() > 1e-3


def test_experts_belong_to_views_or_to_text_and_image():
    """Groups of K consecutive experts stay together, and each kind gets one if there are enough."""

    def own(*sizes):
        return router.own_experts(*sizes).argmax(axis=0).tolist()

    assert own(2, 4, 2) == [0, 0, 1, 1] and own(2, 4, 1) == [0, 0, 1, 1] and own(2, 6, 2) == [0, 0, 0, 0, 1, 1]
    assert own(2, 5, 2) == [0, 0, 1, 1, 1]  # the one left over belongs to the last group
    assert own(3, 4, 1) == [0, 1, 2, 0] and own(3, 6, 2) == [0, 0, 1, 1, 2, 2] and own(3, 8, 2)[6:] == [0, 0]
    assert router.own_experts(3, 4, 2).sum(axis=0).tolist() == [1] * 4
    for kinds, count, per_token in [(2, 4, 2), (2, 5, 2), (3, 6, 2), (3, 8, 2)]:
        assert router.own_experts(kinds, count, per_token).sum(axis=1).min() >= per_token
    assert np.isneginf(router.hard_term(2, 4, 2)).tolist() == (~router.own_experts(2, 4, 2)).tolist()


@pytest.mark.parametrize(("term", "apart"), [("token_hard", True), ("token", False), ("none", False)])
def test_a_term_by_token_keeps_text_and_image_apart(term, apart):
    """An image token goes to the image experts, also inside the view mm, and padding to none."""
    config = tiny(experts__count=4, experts__per_token=2, experts__router_term=term)
    rng = np.random.default_rng(0)
    tokenizer = text.train(["red shoe"], 300)
    picture = Image.fromarray(rng.integers(0, 255, (30, 40, 3), dtype=np.uint8))
    reader = pipeline.Reader(config, tokenizer)
    segments = reader.read(Product(text="a red shoe", images=(picture,)), VIEWS)
    assert len(segments) == 2  # view i is still the prefix of mm
    rows = rows_lib.pack([[segments], []], rows_lib.Layout.of(config), tokenizer.pad)
    params = initialize(config, jax.random.key(0), rows)
    found = jax.jit(Encoder(config).apply)({"params": nn.unbox(params)}, rows)
    share = np.asarray(found.gate / np.maximum(found.tokens, 1)[None, :, :, None])[:, 0]
    only_text = share[:, 0]
    assert (only_text[:, 2:] == 0).all() == apart
    # Two of the image view's tokens, its start and end, are text tokens.
    images = (found.tokens[0, 1] - 2) / found.tokens[0, 1]
    assert np.allclose(share[:, 1, 2:].sum(-1), images, atol=1e-6) == apart
    assert not found.gate[:, 1].any()
    # Every text token counts as text, those of the image view, too.
    information = [mutual_information(layer) for layer in np.asarray(found.modality)]
    assert np.allclose(information, 1) if apart else max(information) < 0.99
    real, image = rows.segment[0] > 0, rows.visual[0] >= 0
    counted = np.asarray(found.modality).sum(-1)
    np.testing.assert_allclose(counted, np.broadcast_to([(real & ~image).sum(), image.sum()], counted.shape), rtol=1e-5)


def test_the_initial_term_favours_the_experts_of_the_own_kind():
    config = tiny(experts__count=4, experts__router_term="token", experts__term_init=1.5)
    rows = rows_lib.pack([[]], rows_lib.Layout.of(config), 0)
    params = nn.unbox(initialize(config, jax.random.key(0), rows))
    term = params["decoder"]["periods"]["layer_0"]["experts"]["router_term"]
    np.testing.assert_array_equal(term[0], 1.5 * router.own_experts(2, 4, 2))


def test_the_start_of_the_weights_gives_text_and_image_equal_parts():
    """Token embeddings have the scale of visual tokens, and branches add little: mm once began as its image alone, with
    a cosine of 0.95 to view i and next to none to view t.
    """
    config = config_lib.load("quickstart")
    tokenizer = text.train(["red canvas sneaker for men", "blue ceramic mug, large"], 300)
    rng, products = np.random.default_rng(0), []
    words = ["red", "canvas", "sneaker", "for", "men", "blue", "ceramic", "mug", "large"]
    for _ in range(16):
        picture = Image.fromarray(rng.integers(0, 255, (8, 6, 3), dtype=np.uint8)).resize((60, 80))
        products.append(Product(text=" ".join(rng.choice(words, 6)), images=(picture,)))
    reader = pipeline.Reader(config, tokenizer)
    segments = [[reader.read(product, VIEWS)] for product in products]
    rows = rows_lib.pack(segments, rows_lib.Layout.of(config), tokenizer.pad)
    params = nn.unbox(initialize(config, jax.random.key(0), rows))
    t, i, mm = np.moveaxis(np.asarray(Encoder(config).apply({"params": params}, rows).embedding), 1, 0)
    by_image, by_text = (i * mm).sum(-1).mean(), (t * mm).sum(-1).mean()
    assert by_text > 0.3 and by_image < 0.9
    # The text's embedding is nearly that of a bag of words: equal words in another order stay close.
    assert np.abs(params["token_embedding"]).mean() > 0.5


def test_a_learned_term_is_added():
    hidden, kernel = np.random.default_rng(0).normal(size=(30, D)), np.random.default_rng(1).normal(size=(D, 8))
    term = np.random.default_rng(2).normal(size=(3, 8))[np.arange(30) % 3]
    routing = router.route(jnp.asarray(hidden), jnp.asarray(kernel), 3, term)
    prob, index = chosen_routes(hidden, kernel, 3, term)
    np.testing.assert_array_equal(routing.index, index)
    np.testing.assert_allclose(routing.prob, prob, atol=1e-6)
    logits = hidden @ kernel + term
    np.testing.assert_allclose(routing.logsumexp, np.log(np.exp(logits).sum(1)), atol=1e-5)


def test_expert_parallel_needs_a_mesh():
    with pytest.raises(ValueError, match="no mesh is set"):
        experts.expert_parallel(*[None] * 6, capacity=1)
