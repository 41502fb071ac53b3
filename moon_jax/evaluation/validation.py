"""Training with periodic evaluation on the held-out products."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np

from moon_jax import config as config_lib
from moon_jax.data.prepared import Prepared
from moon_jax.data.text import Tokenizer
from moon_jax.evaluation import retrieval
from moon_jax.serving.embedder import Embedder
from moon_jax.training import loop, watchdog
from moon_jax.training.checkpoints import BEST


def make_evaluate(
    config: config_lib.Config, prepared: Prepared, tokenizer: Tokenizer, mesh: jax.sharding.Mesh
) -> loop.Evaluate:
    """A function of parameters that computes R@10 in percent on held-out products, by direction and their mean."""
    embedder = Embedder(config, None, tokenizer, fingerprint="", step=0, mesh=mesh)

    def scores(params: Any) -> dict[str, Any]:
        encoded = retrieval.encode(embedder.of(params), prepared)
        found = {
            f"{name} {direction}": round(float(measures["R@10"].mean()), 4)
            for name, direction, _, measures in retrieval.directions(encoded)
        }
        return {BEST: round(float(np.mean([*found.values()])), 4), "directions": found}

    return scores


def train(config: config_lib.Config, workdir: str | Path, watch: watchdog.Watchdog = watchdog.Watchdog()) -> Prepared:  # noqa: B008
    """Trains `config` in `workdir`; resumes from the newest checkpoint, if any. This is `moon-jax train` from Python.

    Args, returns, raises: see `loop.train`.
    """
    return loop.train(config, workdir, make_evaluate, watch)
