"""The types at the boundaries, and the legend of axis letters. Read this file first.

Axis letters, one legend for the whole code base:

    B triplets        R rows              S tokens of a row     G views of a row (spans)
    N images of a row P patches of a row  V merged visual tokens of a row
    H heads           L layers            D width               F expert width
    E experts         K experts per token T tokens              M objectives
    C capacity

Words: a *product* has text, images and labels. A *triplet* is query, positive, negative. A *view* is what gets one
embedding: `t` text, `i` image, `mm` both. A *segment* attends to itself and nothing else; a *row* is one sequence
that holds several segments; a *span* is the range of tokens over which a view is pooled. In training a row is one
product in two segments, [text] and [images then text]. Attention is causal, so the image prefix of the second
segment *is* view `i`, and one row gives all three embeddings.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import struct

Array = jax.Array | np.ndarray

VIEWS = ("t", "i", "mm")
"""The three views; the code of a view in `Rows.view` is its index here plus one, and 0 means absent."""

OBJECTIVES = ("q_t→p_mm", "q_i→p_mm", "q_mm→p_mm", "p_i→p_t", "n_i→n_t")
"""The alignment objectives, M = 5: three inter-product ones, one per view of the query, then two intra-product ones."""


@dataclasses.dataclass(frozen=True)
class Product:
    """A product, a query, or anything else that is embedded: text, images, or both.

    Attributes:
        text: the title, or None.
        images: encoded bytes, a path, or a `PIL.Image.Image` each.
        id: unique within a catalogue.
        group: products with equal titles share a group; empty without a title.
        category: path of category names, the broadest first.
        brand: brand name, or empty.
        attributes: free-form name → value.
        description: long text; co-augmentation reads it, and nothing else.
        enriched_texts, expanded_images: what co-augmentation adds; read in training only.
    """

    text: str | None = None
    images: tuple[Any, ...] = ()
    id: str = ""
    group: str = ""
    category: tuple[str, ...] = ()
    brand: str = ""
    attributes: dict[str, str] = dataclasses.field(default_factory=dict)
    description: str = ""
    enriched_texts: tuple[str, ...] = ()
    expanded_images: tuple[Any, ...] = ()


class Triplet(NamedTuple):
    """Indices into a list of products. `negative` is None where none is known; `weight` scales the inter objectives."""

    query: int
    positive: int
    negative: int | None
    weight: float = 1.0


@struct.dataclass
class Rows:
    """Packed sequences, static in shape (data/rows.py makes them; `owner` counts the products in the order given)."""

    tokens: Array  # i32[R,S]
    segment: Array  # i32[R,S]; 0 is padding
    position: Array  # i32[R,S,3]: M-RoPE time, row, column; restarts per segment
    visual: Array  # i32[R,S]: index of the merged visual token that stands here, -1 for text
    patches: Array  # u8[R,P,3·patch²]: channel, row, column; in merge-block order
    patch_image: Array  # i32[R,P]: image of the row that a patch belongs to, -1 for padding
    patch_yx: Array  # i32[R,P,2]: row and column in the image's grid of patches
    image_hw: Array  # i32[R,N,2]: the grid's size in patches, 0 where there is no image
    span: Array  # i32[R,G,2]: first token and last + 1
    view: Array  # i8[R,G]: 0 absent, 1 t, 2 i, 3 mm; slot 3j + (view - 1) for the row's j-th product
    owner: Array  # i32[R,G]: index of the product, -1 where absent


@struct.dataclass
class Batch:
    """One training batch. Rows come as all queries, then all positives, then all negatives: R = 3B, G = 3."""

    rows: Rows
    product: Array  # i32[R]: product index, -1 where there is none
    group: Array  # i32[R]: index of the title group, -1 where there is none
    weight: Array  # f32[B]
    triplet: Array  # i32[B]: index of the triplet in the training set


@struct.dataclass
class EncoderOutput:
    """What the encoder gives. Router quantities are sums, not means: a batch taken in pieces then adds up exactly.

    The L here counts the layers that hold experts; without any, L = 0.
    """

    embedding: Array  # f32[R,G,D]: unit length, zero where the view is absent
    gate: Array  # f32[L,R,G,E]: G̃ summed over the span's tokens
    tokens: Array  # i32[R,G]: tokens of each span
    load: Array  # f32[L,E]: valid tokens routed to each expert
    prob: Array  # f32[L,E]: router probability summed over valid tokens
    z: Array  # f32[L]: squared logsumexp of the router logits, summed over valid tokens
    dropped: Array  # i32[L]: routes dropped for want of capacity
    valid: Array  # i32[]: tokens that are not padding


@struct.dataclass
class Objectives:
    """The losses of a batch, and what they were made of (objectives/alignment.py)."""

    total: Array  # f32[]
    loss: Array  # f32[M]: mean loss of each objective
    weight: Array  # f32[M]: ω
    count: Array  # i32[M]: |B_m|
    balance: Array  # f32[]: L_aux
    sparsity: Array  # f32[]: L_sparsity
    phi: Array  # f32[B]: φ, NaN for a triplet that has none
    negatives: Array  # i32[B]: negatives of the inter objectives that were not masked


@struct.dataclass
class TrainState:
    """All that training carries from step to step. The data position and the randomness follow from (seed, step)."""

    step: Array  # i32[]
    params: Any  # {"encoder": …, "alignment": {"dual" f32[L,E,M] if L > 0, "log_temperature" f32[2]}}
    opt_state: Any
    bad_steps: Array  # i32[]: steps skipped because the loss or a gradient was not finite
    bad_in_a_row: Array  # i32[]: those of them that nothing finite has followed yet
