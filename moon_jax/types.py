"""The types that modules exchange, and the legend of axis letters. Read this file first.

Axis letters, the same in the whole code base:

    B triplets        R rows              S tokens of a row     G views of a row (spans)
    N images of a row P patches of a row  V merged visual tokens of a row
    H heads           L layers            D width               F expert width
    E experts         K experts per token T tokens              M objectives
    C capacity

Terms: a *product* has text, images and labels. A *triplet* is query, positive, negative. A *view* is the unit that gets
one embedding: `t` text, `i` image, `mm` both. A *segment* attends only to itself; a *row* is one sequence of several
segments; a *span* is the range of tokens over which a view is pooled. In training a row is one product in two segments,
[text] and [images then text]. Attention is causal, so the image prefix of the second segment *is* view `i`, and one
row yields all three embeddings.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import struct

Array = jax.Array | np.ndarray

VIEWS = ("t", "i", "mm")
"""The three views. In `Rows.view` a view is its index here plus one, and 0 means absent."""

OBJECTIVES = ("q_t→p_mm", "q_i→p_mm", "q_mm→p_mm", "p_i→p_t", "n_i→n_t")
"""The M = 5 alignment objectives: three inter-product ones, one per view of the query, then two intra-product ones."""


@dataclasses.dataclass(frozen=True)
class Product:
    """A product, a query, or anything else to embed: text, images, or both.

    Attributes:
        text: the title, or None.
        images: each one encoded bytes, a path, or a `PIL.Image.Image`.
        id: unique within a catalogue.
        group: shared by products with the same title; empty without a title.
        category: path of category names, broadest first.
        brand: brand name, or empty.
        attributes: free-form name → value.
        description: long text; used only by co-augmentation.
        enriched_texts, expanded_images: added by co-augmentation; used only in training.
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
    """Indices into a list of products. `negative` may be None; `weight` scales the inter-product objectives."""

    query: int
    positive: int
    negative: int | None
    weight: float = 1.0


@struct.dataclass
class Rows:
    """Packed sequences of static shape, made by data/rows.py. `owner` numbers the products in the given order."""

    tokens: Array  # i32[R,S]
    segment: Array  # i32[R,S]; 0 is padding
    position: Array  # i32[R,S,3]: M-RoPE time, row, column; restarts per segment
    visual: Array  # i32[R,S]: index of the merged visual token at this position, -1 for text
    patches: Array  # u8[R,P,3·patch²]: channel, row, column; in merge-block order
    patch_image: Array  # i32[R,P]: index of the patch's image in the row, -1 for padding
    patch_yx: Array  # i32[R,P,2]: row and column in the image's grid of patches
    image_hw: Array  # i32[R,N,2]: the grid's size in patches, 0 if there is no image
    span: Array  # i32[R,G,2]: first token and last + 1
    view: Array  # i8[R,G]: 0 absent, 1 t, 2 i, 3 mm; slot 3j + (view - 1) for the row's j-th product
    owner: Array  # i32[R,G]: index of the product, -1 where absent


@struct.dataclass
class Batch:
    """One training batch. The rows are all queries, then all positives, then all negatives: R = (2 + N) B, G = 3.

    N is the number of negatives per triplet (`data.negatives`): first the first negative of every triplet, and so on.
    """

    rows: Rows
    product: Array  # i32[R]: product index, -1 if there is none
    group: Array  # i32[R]: index of the title group, -1 if there is none
    weight: Array  # f32[B]
    triplet: Array  # i32[B]: index of the triplet in the training set
    known: Array  # u8[B,⌈(R-B)/8⌉]: bit c: row B + c is of something else that the query is known to want


@struct.dataclass
class EncoderOutput:
    """The encoder's output. Router quantities are sums, not means, so that parts of a batch add up exactly.

    L counts only layers with experts; a dense model has L = 0.
    """

    embedding: Array  # f32[R,G,D]: unit length, zero if the view is absent
    gate: Array  # f32[L,R,G,E]: G̃ summed over the span's tokens
    modality: Array  # f32[L,2,E]: G̃ summed over all text tokens, and over all visual tokens
    tokens: Array  # i32[R,G]: number of tokens of each span
    load: Array  # f32[L,E]: valid tokens routed to each expert
    prob: Array  # f32[L,E]: router probability summed over valid tokens
    z: Array  # f32[L]: squared logsumexp of the router logits, summed over valid tokens
    dropped: Array  # i32[L]: routes dropped for lack of capacity
    valid: Array  # i32[]: number of tokens that are not padding


@struct.dataclass
class Objectives:
    """The losses of a batch and their components (objectives/alignment.py)."""

    total: Array  # f32[]
    loss: Array  # f32[M]: mean loss of each objective
    weight: Array  # f32[M]: ω
    count: Array  # i32[M]: |B_m|
    balance: Array  # f32[]: L_aux
    sparsity: Array  # f32[]: L_sparsity
    phi: Array  # f32[B]: φ, NaN for a triplet without one
    negatives: Array  # i32[B]: number of unmasked negatives in the inter-product objectives; -1 if it serves none
    known: Array  # i32[B]: other known positives of the query in the batch, as in Batch.known
    excluded: Array  # i32[B]: candidates that were too similar to count as negatives (`objective.similar_margin`)


@struct.dataclass
class TrainState:
    """All state carried from step to step. The data position and all randomness follow from (seed, step)."""

    step: Array  # i32[]
    params: Any  # {"encoder": …, "alignment": {"dual" f32[L,E,M] if L > 0, "log_temperature" f32[2]}}
    opt_state: Any
    bad_steps: Array  # i32[]: number of skipped steps: loss, gradient or update not finite
    bad_in_a_row: Array  # i32[]: number of consecutive bad steps up to now
