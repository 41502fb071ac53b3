"""What `moon-jax augment` is asked for."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Options:
    """All that the result depends on, beside the data. The numbers are ours; the paper states none."""

    text: str = "rules"  # enriched titles: rules, none, or the URL of a server of OpenAI's protocol
    text_model: str = ""  # the model that is asked there
    images: str = "classical"  # expanded images: classical, none, or a diffusers pipeline
    image_steps: int = 0  # steps of that pipeline; 0 leaves its own number
    expansions: int = 2  # n_c, expanded images of a product
    model: str = ""  # the embedder of the consistency filter; without one, nothing is filtered
    quantile: float = 0.1  # share of the results, those that agree least, that the filter drops
    seed: int = 0

    @property
    def asks_server(self) -> bool:
        return self.text not in ("rules", "none")

    @property
    def asks_pipeline(self) -> bool:
        return self.images not in ("classical", "none")
