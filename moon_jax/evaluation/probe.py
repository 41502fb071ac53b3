"""Labels predicted from labelled vectors: by nearest neighbours, and by a linear probe."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from scipy import optimize

from moon_jax import similarity
from moon_jax.types import Array

NEIGHBOURS, TEMPERATURE = 20, 0.07
"""Number of neighbours that vote; each has weight exp(similarity / TEMPERATURE) (arXiv 1805.01978)."""

DECAY = 1e-2
"""Weight decay of the probe: DECAY / 2 · |W|² is added to the mean loss."""


def nearest(known: np.ndarray, truth: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """The labels that the neighbours vote for, i64[Q]; ties go to the lowest label.

    Args:
        known: f32[N,D], unit length; truth: i64[N], their labels.
        vectors: f32[Q,D], unit length.
    """
    scores, found = similarity.top_k(vectors, known, min(NEIGHBOURS, len(known)))
    votes = np.zeros((len(vectors), int(truth.max()) + 1))
    weights = np.exp((scores.astype(np.float64) - 1) / TEMPERATURE)
    np.add.at(votes, (np.arange(len(vectors))[:, None], truth[found]), weights)
    return votes.argmax(axis=1)


def linear(known: np.ndarray, truth: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """The labels i64[Q] that a logistic regression predicts after fitting on the known vectors.

    Coordinates are standardized to mean 0 and variance 1 on the known vectors. L-BFGS minimizes the convex loss.

    Args: see `nearest`.
    """
    labels, target = np.unique(truth, return_inverse=True)
    mean, spread = known.mean(axis=0), known.std(axis=0)
    spread = np.where(spread > 0, spread, 1.0).astype(np.float32)
    inputs, shape = (known - mean) / spread, (known.shape[1] + 1, len(labels))

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = _loss(parameters.reshape(shape).astype(np.float32), inputs, target)
        return float(value), np.asarray(gradient, np.float64).ravel()

    solved = optimize.minimize(loss, np.zeros(shape).ravel(), jac=True, method="L-BFGS-B", options={"maxiter": 200}).x
    weights = solved.reshape(shape)
    return labels[((vectors - mean) / spread @ weights[1:] + weights[0]).argmax(axis=1)]


@jax.jit
@jax.value_and_grad
def _loss(parameters: Array, inputs: Array, target: Array) -> Array:
    """Loss and gradient of bias and weights f32[1+D,labels] on inputs f32[N,D] and targets i64[N]."""
    logits = jnp.einsum("nd,dl->nl", inputs, parameters[1:], precision=similarity.PRECISION) + parameters[0]
    right = jnp.take_along_axis(jax.nn.log_softmax(logits), target[:, None], axis=1)
    return DECAY / 2 * (parameters[1:] ** 2).sum() - right.mean()
