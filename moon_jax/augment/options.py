"""The options of `moon-jax augment`."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Options:
    """Everything besides the data that the result depends on. The numbers are ours; the paper states none."""

    text: str = "rules"  # enriched titles: rules, none, or the URL of an OpenAI-compatible server
    text_model: str = ""  # the model to request from it
    images: str = "classical"  # expanded images: classical, none, or a diffusers pipeline
    image_steps: int = 0  # steps of that pipeline; 0 uses its default
    expansions: int = 2  # n_c, expanded images per product
    model: str = ""  # the embedder of the consistency filter; empty: no filter
    quantile: float = 0.1  # share of the results that the filter drops: the least consistent ones
    seed: int = 0

    @property
    def uses_server(self) -> bool:
        return self.text not in ("rules", "none")

    @property
    def uses_pipeline(self) -> bool:
        return self.images not in ("classical", "none")
