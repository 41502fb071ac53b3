"""PatchDropout: a dropped visual token is as if it had never been in the row."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moon_jax.data import pipeline
from moon_jax.errors import UserError
from moon_jax.model.encoder import Encoder, drop_patches
from moon_jax.training import step as step_lib
from tests.conftest import random_params, tiny


@pytest.fixture(scope="module")
def batch(prepared, tokenizer):
    return pipeline.batches(prepared, pipeline.Reader(tiny(), tokenizer))[0]


def without(rows, dropped, merge):
    """`rows` with the tokens and patches that `dropped` lacks taken out in numpy; what remains moves to the left."""
    fields = {field.name: np.array(getattr(rows, field.name)) for field in dataclasses.fields(rows)}
    fields["segment"][:], fields["patch_image"][:], fields["visual"][:] = 0, -1, -1
    for r in range(len(rows.tokens)):
        keep = ~((rows.segment[r] > 0) & (np.asarray(dropped.segment[r]) == 0))
        patches = np.flatnonzero(np.asarray(dropped.patch_image[r]) >= 0)
        for name in ("tokens", "segment", "position"):
            fields[name][r, : keep.sum()] = getattr(rows, name)[r][keep]
        for name in ("patches", "patch_image", "patch_yx"):
            fields[name][r, : len(patches)] = getattr(rows, name)[r][patches]
        place = {int(old): new for new, old in enumerate(np.unique(patches // merge**2))}
        seen = rows.visual[r][keep]
        fields["visual"][r, : keep.sum()] = [place[int(old)] if old >= 0 else -1 for old in seen]
        fields["span"][r] = np.concatenate([[0], np.cumsum(keep)])[rows.span[r]]
    return type(rows)(**fields)


def test_dropped_patches_are_as_if_they_had_never_been_there(batch, tokenizer):
    """Embeddings, the router's sums, and gradients."""
    config, rows = tiny(), batch.rows
    params, merge = random_params(config, tokenizer), config.vision.merge
    dropped = jax.tree.map(np.asarray, drop_patches(jax.tree.map(jnp.asarray, rows), 0.4, jax.random.key(5), merge))
    shorter = without(rows, dropped, merge)
    assert (shorter.segment > 0).sum() < (rows.segment > 0).sum()
    rng = np.random.default_rng(0)

    def value(params, rows):
        output = Encoder(config).apply({"params": params}, rows)
        return (output.embedding * cotangent).sum(), output

    cotangent = rng.normal(size=(*rows.view.shape, config.language.width))
    both = jax.jit(jax.value_and_grad(value, has_aux=True))
    (_, found), by_found = both(params, dropped)
    (_, expected), by_expected = both(params, shorter)
    for name in ("embedding", "gate", "tokens", "load", "prob", "valid"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=1e-4, atol=2e-6, err_msg=name)
    flat = jax.tree_util.tree_flatten_with_path(by_found)[0]
    for (path, a), b in zip(flat, jax.tree.leaves(by_expected), strict=True):
        norm = np.linalg.norm(b)
        assert np.linalg.norm(np.asarray(a) - b) <= 2e-5 * norm, jax.tree_util.keystr(path)
        assert norm > 0, jax.tree_util.keystr(path)


def test_each_step_drops_its_share_of_the_patches(batch):
    rows = jax.tree.map(lambda x: jnp.repeat(jnp.asarray(x), 40, axis=0), batch.rows)
    present = np.asarray(rows.visual) >= 0
    shares = []
    for seed in (0, 1):
        dropped = drop_patches(rows, 0.3, jax.random.key(seed), 2)
        hidden = (np.asarray(dropped.segment) == 0) & (np.asarray(rows.segment) > 0)
        assert not (hidden & ~present).any()  # text, and the tokens around images, stay
        shares.append(hidden)
    assert (shares[0] != shares[1]).any()
    # A row's visual tokens drop independently, so the share has a standard deviation below 0.01.
    assert shares[0].sum() / (present & (np.asarray(rows.segment) > 0)).sum() == pytest.approx(0.3, abs=0.04)


def test_only_training_drops_and_every_step_drops_others(batch, tokenizer):
    config = tiny(training__patch_dropout=0.5)
    params = {"encoder": random_params(config, tokenizer), "alignment": {}}
    params["alignment"] = step_lib.initial_state(config, batch.rows, params["encoder"]).params["alignment"]
    jitted = jax.jit(lambda params, batch, step: step_lib.loss(params, batch, config, step)[1]["objectives"].loss)
    loss = functools.partial(jitted, params, batch)
    assert (loss(3) == loss(3)).all() and (loss(3) != loss(4)).all()
    evaluated = [
        Encoder(which).apply({"params": params["encoder"]}, batch.rows).embedding for which in (config, tiny())
    ]
    np.testing.assert_array_equal(*evaluated)


def test_all_patches_cannot_drop():
    with pytest.raises(UserError, match=r"training\.patch_dropout must lie below 1"):
        tiny(training__patch_dropout=1.0)
