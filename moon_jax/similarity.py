"""Similarities of unit vectors: top-k and logsumexp in chunks, so that memory stays constant; truncation.

The losses, retrieval and search share these functions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moon_jax.types import Array

PRECISION = jax.lax.Precision.HIGHEST  # the default on TPU is bfloat16, which reorders near ties


def truncate(vectors: Array, width: int) -> Array:
    """The first `width` dimensions, renormalised to unit length (Matryoshka, arXiv 2205.13147); zero stays zero.

    Args:
        vectors: f32[…,D], unit or zero.

    Returns:
        f32[…,width]; `vectors` itself if width is D.
    """
    if width == vectors.shape[-1]:
        return vectors
    short = jnp.asarray(vectors)[..., :width]
    square = (short**2).sum(axis=-1, keepdims=True)
    # Absent views are zero: neither they nor their gradient may become infinite.
    return short * jnp.where(square > 0, jax.lax.rsqrt(jnp.where(square > 0, square, 1.0)), 0.0)


def _chunks(candidates: Array, chunk: int) -> tuple[Array, Array]:
    """f32[C,D] → f32[C/chunk,chunk,D], zero-padded, and the column indices i32[C/chunk,chunk]."""
    count = candidates.shape[0]
    pad = -count % chunk
    padded = jnp.pad(candidates, ((0, pad), (0, 0)))
    columns = jnp.arange(count + pad, dtype=jnp.int32)
    return padded.reshape(-1, chunk, candidates.shape[1]), columns.reshape(-1, chunk)


def masked_logsumexp(
    queries: Array, candidates: Array, keep: Callable[[Array, Array], tuple[Array, Array]], scale: Array, chunk: int
) -> tuple[Array, Array, Array]:
    """log Σ_c exp(scale · q·c) over the candidates that `keep` selects.

    Args:
        queries: f32[Q,D].
        candidates: f32[C,D].
        keep: column indices i32[c] and similarities f32[Q,c] (without gradient) → two masks bool[Q,c]: what is kept,
            and what is only counted.
        scale: f32[], the inverse temperature.
        chunk: candidates whose similarities are in memory at once; the backward pass recomputes them.

    Returns:
        f32[Q], -inf if no candidate is kept; and i32[Q] twice, the number of candidates in each mask.
    """
    total = candidates.shape[0]

    @jax.checkpoint
    def step(carry: tuple[Array, ...], part: tuple[Array, Array]) -> tuple[tuple[Array, ...], None]:
        largest, summed, kept, counted = carry
        block, columns = part
        similar = jnp.einsum("qd,cd->qc", queries, block, precision=PRECISION)
        mask, other = (chosen & (columns < total) for chosen in keep(columns, jax.lax.stop_gradient(similar)))
        logits = jnp.where(mask, similar * scale, -jnp.inf)
        # The running maximum only prevents overflow: its gradient would cancel out, so none is computed.
        new = jnp.maximum(largest, jax.lax.stop_gradient(logits.max(axis=1)))
        base = jnp.where(jnp.isneginf(new), 0.0, new)
        # Mask before exp as well: exp(-inf) would give 0 · inf in the backward pass.
        terms = jnp.where(mask, jnp.exp(jnp.where(mask, logits, base[:, None]) - base[:, None]), 0.0)
        summed = summed * jnp.exp(largest - base) + terms.sum(axis=1)
        kept, counted = (
            number + chosen.sum(axis=1, dtype=jnp.int32) for number, chosen in ((kept, mask), (counted, other))
        )
        return (new, summed, kept, counted), None

    size = queries.shape[0]
    start = (jnp.full(size, -jnp.inf), jnp.zeros(size), *(jnp.zeros(size, jnp.int32) for _ in range(2)))
    (largest, summed, kept, counted), _ = jax.lax.scan(step, start, _chunks(candidates, min(chunk, total)))
    some = kept > 0
    value = jnp.where(some, jnp.where(some, largest, 0.0) + jnp.log(jnp.where(some, summed, 1.0)), -jnp.inf)
    return value, kept, counted


QUERIES, CHUNK, GROUP = 1024, 32768, 64
"""For top_k: queries per batch, candidates per chunk, and candidates per group (see `_search`)."""

CHUNKS = 8
"""Chunks that are sent to each device at once."""


class Resident:
    """Candidates, f32, that stay on the devices for many searches. Pass it to `top_k` instead of an array.

    Each device holds a part; together they must have enough memory for all.
    """

    def __init__(self, candidates: Any, devices: Sequence[jax.Device] | None = None):
        """`candidates` and `devices` as in `top_k`."""
        self.devices = tuple(devices or jax.local_devices())
        self.chunk = max(min(CHUNK, _power(len(candidates))), 128)
        self._total = len(candidates)
        self.blocks = list(_blocks(candidates, self.chunk, self.devices))

    def __len__(self) -> int:
        return self._total


def top_k(
    queries: Array, candidates: Any, k: int, devices: Sequence[jax.Device] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The k most similar candidates of each query. Ties: the lowest index comes first.

    The search is exact: it compares every candidate, in float32, in constant memory. Shapes are padded to a few sizes,
    so no bit of a similarity depends on the number of candidates, queries or devices.

    Args:
        queries: f32[Q,D].
        candidates: a Resident, or anything of length C with slices that numpy converts to f32[c,D]; k ≤ C.
        devices: share the candidates; by default all devices of this process, or those of the Resident.

    Returns:
        similarities f32[Q,k], descending; and indices i32[Q,k].

    Raises:
        ValueError: k is not in 1…C, or larger than a chunk of the Resident.
    """
    total = len(candidates)
    if not 1 <= k <= total:
        raise ValueError(f"top_k: k={k} of {total} candidates")
    if isinstance(candidates, Resident):
        if k > candidates.chunk:
            raise ValueError(f"top_k: k={k} of candidates in chunks of {candidates.chunk}")
        devices, chunk, blocks = candidates.devices, candidates.chunk, candidates.blocks
    else:
        devices = tuple(devices or jax.local_devices())
        chunk = max(min(CHUNK, _power(total)), 128, _power(k))
        blocks = _blocks(candidates, chunk, devices)
    size = min(QUERIES, max(8, _power(len(queries))), max(8, QUERIES * CHUNK // chunk))
    mesh = _mesh(devices)
    search, whole = _search(mesh, k, chunk, min(GROUP, chunk // _power(k))), NamedSharding(mesh, PartitionSpec())
    parts = [
        jax.device_put(_filled(np.asarray(queries[start : start + size], np.float32), size), whole)
        for start in range(0, len(queries), size)
    ]
    nothing = np.full((size, k), -np.inf, np.float32), np.zeros((size, k), np.int32)
    best, first = [jax.device_put(nothing, whole) for _ in parts], 0
    # During training another mesh, that of the run, is set.
    with jax.set_mesh(mesh):
        for block in blocks:
            for number, part in enumerate(parts):
                best[number] = search(part, block, best[number], np.int32(first), np.int32(total))
            first += sum(len(part) for part in block) * chunk
    found = [np.concatenate([np.asarray(entry[part]) for entry in best] or [nothing[part][:0]]) for part in (0, 1)]
    return found[0][: len(queries)], found[1][: len(queries)]


def _mesh(devices: Sequence[jax.Device]) -> Mesh:
    return Mesh(np.array(devices), ("device",))


def _blocks(candidates: Any, chunk: int, devices: Sequence[jax.Device]) -> Iterator[tuple[Array, ...]]:
    """The candidates, zero-padded, in blocks: tuples of f32[devices,chunk,D], sharded over the devices.

    The candidates that a device gets from one block are consecutive.
    """
    total, own = len(candidates), NamedSharding(_mesh(devices), PartitionSpec("device"))
    # Few enough chunks per device that none is idle.
    chunks = min(CHUNKS, -(-total // (chunk * len(devices))))
    step = chunks * chunk * len(devices)
    for first in range(0, total, step):
        block = _filled(np.asarray(candidates[first : first + step], np.float32), step)
        block = block.reshape(len(devices), chunks, chunk, -1)
        yield tuple(jax.device_put(block[:, number], own) for number in range(chunks))


def _power(number: int) -> int:
    """The smallest power of two that is at least `number`."""
    return 1 << max(number - 1, 0).bit_length()


def _filled(array: np.ndarray, length: int) -> np.ndarray:
    return array if len(array) == length else np.pad(array, ((0, length - len(array)), (0, 0)))


@functools.lru_cache(maxsize=64)
def _search(mesh: Mesh, k: int, chunk: int, group: int) -> Callable[..., tuple[Array, Array]]:
    """A jitted function that merges the best k of a block of candidates (sharded over devices) into the best so far."""

    def merge(best: tuple[Array, Array], scores: Array, indices: Array) -> tuple[Array, Array]:
        # The best so far have lower indices and come first; lax.top_k keeps the order of ties.
        scores, indices = jnp.concatenate([best[0], scores], 1), jnp.concatenate([best[1], indices], 1)
        scores, where = jax.lax.top_k(scores, k)
        return scores, jnp.take_along_axis(indices, where, axis=1)

    def of_device(queries: Array, block: tuple[Array, ...], first: Array, total: Array) -> tuple[Array, Array]:
        size = queries.shape[0]
        first = first + jax.lax.axis_index("device") * len(block) * chunk
        best = jnp.full((size, k), -jnp.inf), jnp.zeros((size, k), jnp.int32)
        # Not a scan over one array: the compiler would copy every chunk out of it.
        for number, [part] in enumerate(block):
            start = first + number * chunk
            scores = jnp.einsum("qd,cd->qc", queries, part, precision=PRECISION).reshape(size, -1, group)
            exists = (start + jnp.arange(chunk) < total).reshape(-1, group)
            # The best k are in the k groups with the highest maxima (ties: the lowest group first). Taking maxima is
            # cheaper than sorting similarities. The groups are sorted so that ties keep their order.
            _, chosen = jax.lax.top_k(jnp.where(exists, scores, -jnp.inf).max(axis=2), k)
            chosen = jnp.sort(chosen, axis=1)
            indices = start + chosen[:, :, None] * group + jnp.arange(group)
            scores = jnp.take_along_axis(scores, chosen[:, :, None], axis=1)
            scores = jnp.where(indices < total, scores, -jnp.inf)
            best = merge(best, scores.reshape(size, -1), indices.reshape(size, -1))
        return best

    everywhere = jax.shard_map(
        of_device,
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec("device"), PartitionSpec(), PartitionSpec()),
        out_specs=PartitionSpec(None, "device"),
        check_vma=False,
    )
    whole = NamedSharding(mesh, PartitionSpec())

    @functools.partial(jax.jit, donate_argnums=2, out_shardings=(whole, whole))
    def search(
        queries: Array, block: Array, best: tuple[Array, Array], first: Array, total: Array
    ) -> tuple[Array, Array]:
        return merge(best, *everywhere(queries, block, first, total))

    return search
