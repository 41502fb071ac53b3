"""Weights of a Hugging Face folder → our parameters, loaded directly onto the devices.

Each of our leaves is a view of tensors on disk: stacked, transposed, repeated (upcycling). `Lazy` describes such a view
without reading it. Loading reads the region of one device at a time, in pieces. So besides the parameters that are
already loaded, the host never holds more than one device's part of one leaf.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import ml_dtypes  # noqa: F401  bfloat16 for numpy
import numpy as np
from jax.experimental import multihost_utils
from safetensors import SafetensorError, safe_open

from moon_jax import config as config_lib
from moon_jax.errors import UserError
from moon_jax.hub import keys
from moon_jax.model import router

Region = tuple[slice, ...]
Normal = Callable[[], tuple[float, float]]

FLOATS = ("F32", "BF16", "F16", "F64")
LM_HEAD = "lm_head.weight"
"""The language-model head. An embedder does not use it, so it is not loaded."""


@dataclasses.dataclass(frozen=True)
class Lazy:
    """An array that is read by region. `read` takes one slice per axis, with explicit start and stop."""

    shape: tuple[int, ...]
    read: Callable[[Region], np.ndarray]


def transposed(source: Lazy) -> Lazy:
    """`source` with its last two axes swapped."""

    def read(region: Region) -> np.ndarray:
        *lead, rows, columns = region
        return source.read((*lead, columns, rows)).swapaxes(-1, -2)

    *lead, rows, columns = source.shape
    return Lazy((*lead, columns, rows), read)


def patch_kernel(source: Lazy) -> Lazy:
    """[Dv,3,frames,h,w] → [frames,3·h·w,Dv]. It is small, so every read loads all of it."""
    width, channels, frames, high, wide = source.shape

    def read(region: Region) -> np.ndarray:
        whole = source.read(tuple(slice(0, size) for size in source.shape))
        return whole.transpose(2, 1, 3, 4, 0).reshape(frames, -1, width)[region]

    return Lazy((frames, channels * high * wide, width), read)


def pair(source: Lazy) -> Lazy:
    """[E,D,2F] → [E,2,D,F]."""
    experts, width, inner = source.shape

    def read(region: Region) -> np.ndarray:
        expert, halves, rows, columns = region
        starts = [half * (inner // 2) for half in range(halves.start, halves.stop)]
        parts = [source.read((expert, rows, slice(at + columns.start, at + columns.stop))) for at in starts]
        return np.stack(parts, axis=1)

    return Lazy((experts, 2, width, inner // 2), read)


def stacked(parts: list[Lazy]) -> Lazy:
    """`parts` stacked along a new first axis."""

    def read(region: Region) -> np.ndarray:
        first, *rest = region
        return np.stack([parts[number].read(tuple(rest)) for number in range(first.start, first.stop)])

    return Lazy((len(parts), *parts[0].shape), read)


TILE = 256
"""Side of the tiles of noise. Each tile has its own generator, so a region draws little more than it needs."""


def noise(seed: tuple[int, ...], region: Region) -> np.ndarray:
    """f32: a region of an infinite N(0, 1) matrix whose values depend on seed and position alone."""
    out = np.empty([part.stop - part.start for part in region], np.float32)
    rows, columns = (range(part.start // TILE, -(-part.stop // TILE)) for part in region)
    for tile in ((row, column) for row in rows for column in columns):
        drawn = np.random.default_rng((*seed, *tile)).standard_normal((TILE, TILE), np.float32)
        starts = [max(part.start, TILE * at) for part, at in zip(region, tile, strict=True)]
        stops = [min(part.stop, TILE * at + TILE) for part, at in zip(region, tile, strict=True)]
        into = tuple(slice(a - part.start, b - part.start) for a, b, part in zip(starts, stops, region, strict=True))
        out[into] = drawn[
            tuple(slice(a - TILE * at, b - TILE * at) for a, b, at in zip(starts, stops, tile, strict=True))
        ]
    return out


def reinitialized(
    source: Lazy, axis: int, share: float, seed: tuple[int, ...], units: tuple[int, ...], normal: Normal
) -> Lazy:
    """`source`, a matrix, with `share` of its slices along `axis` reinitialized from a normal distribution.

    Args:
        seed: for the values.
        units: seed for the choice of slices. The three matrices of an expert must share it, to choose the same units.
        normal: returns mean and standard deviation of the values.
    """
    size = source.shape[axis]
    chosen = np.zeros(size, bool)
    chosen[np.random.default_rng(units).permutation(size)[: round(share * size)]] = True

    def read(region: Region) -> np.ndarray:
        mean, deviation = normal()
        fresh = chosen[region[axis]] if axis else chosen[region[axis]][:, None]
        return np.where(fresh, mean + deviation * noise(seed, region), source.read(region).astype(np.float32))

    return Lazy(source.shape, read)


def statistics(source: Lazy) -> tuple[float, float]:
    """Mean and standard deviation of a matrix, which is read whole."""
    array = np.asarray(source.read(tuple(slice(0, size) for size in source.shape)), np.float32)
    return float(array.mean()), float(array.std())


class Held:
    """The tensors of a model in memory, by name, like Files."""

    def __init__(self, folder: Path, config: config_lib.Config, params: Any):
        """
        Args:
            folder: where the model is from, for messages.
            params: the encoder's parameters. Every process must call this; each gets all of them.
        """
        self.folder = folder
        leaves = {}
        for path, leaf in keys.flatten(params).items():
            whole = leaf if leaf.is_fully_addressable else multihost_utils.process_allgather(leaf, tiled=True)
            leaves[path] = np.asarray(whole)
        self._arrays = {}
        for row in keys.table(config):
            leaf = leaves[row.ours]
            array = leaf if row.stack_index is None else leaf[row.stack_index]
            self._arrays[row.theirs] = np.ascontiguousarray(keys.to_theirs(array, row.transform))

    def names(self) -> set[str]:
        return set(self._arrays)

    def __getitem__(self, name: str) -> Lazy:
        array = self._arrays[name]
        return Lazy(array.shape, array.__getitem__)


class Files:
    """The tensors of a folder's safetensors files by name, without the prefix `model.`. Nothing is unpickled."""

    def __init__(self, folder: Path, stack: contextlib.ExitStack):
        """
        Raises:
            UserError: there are no safetensors, or a file cannot be read.
        """
        self.folder = folder
        self._slices: dict[str, tuple[str, Any]] = {}
        for name in self._names():
            try:
                handle = stack.enter_context(safe_open(folder / name, framework="np"))
                parts = [(key.removeprefix("model."), handle.get_slice(key)) for key in handle.keys()]  # noqa: SIM118
            except (SafetensorError, OSError) as error:
                reason = f"not a readable safetensors file ({error})"
                raise UserError(f"{folder / name}: {reason}; download it again") from None
            for key, part in parts:
                if key in self._slices:
                    raise UserError(f"{folder}: {key} is both in {self._slices[key][0]} and in {name}")
                self._slices[key] = (name, part)

    def _names(self) -> list[str]:
        index = self.folder / "model.safetensors.index.json"
        if index.is_file():
            try:
                names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            except (ValueError, KeyError, AttributeError, TypeError) as error:
                raise UserError(f"{index}: not an index of safetensors files ({error!r})") from None
            for name in names:
                if not isinstance(name, str) or Path(name).name != name:
                    raise UserError(f"{index}: names {name!r}, which is not a file of this folder")
                if not (self.folder / name).is_file():
                    raise UserError(f"{self.folder}: {name} is missing, although its index lists it; download it again")
            return names
        if (self.folder / "model.safetensors").is_file():
            return ["model.safetensors"]
        raise UserError(f"{self.folder}: no model.safetensors and no index file; other formats are not supported")

    def names(self) -> set[str]:
        return set(self._slices)

    def __getitem__(self, name: str) -> Lazy:
        """
        Raises:
            UserError: the tensor is not floating point.
        """
        file, part = self._slices[name]
        if part.get_dtype() not in FLOATS:
            raise UserError(
                f"{self.folder / file}: {name} has dtype {part.get_dtype()}; quantised weights are not supported"
            )
        return Lazy(tuple(part.get_shape()), lambda region: part[region])


def is_upcycled(config: config_lib.Config, names: set[str]) -> bool:
    """Whether the weights are dense and the config has experts."""
    return config.experts.count > 0 and not any(".mlp.experts." in name for name in names)


def sources(config: config_lib.Config, files: Files | Held) -> dict[str, Lazy]:
    """Path → leaf of the encoder's parameters, from a folder's weights; dense weights are upcycled.

    Upcycling (arXiv 2212.05055) copies the dense feed-forward into every expert. The gates of a token add up to one, so
    the function is unchanged for any router. The router starts from N(0, `experts.router_init`), because a zero router
    would send every token to the first K experts. `experts.reinitialized` draws part of each expert again (arXiv
    2502.19261), with the mean and standard deviation of its matrix.

    If `experts.width` is 1/K of the dense feed-forward, experts are slices of it, and the FLOPs stay those of the dense
    model ("virtual groups", arXiv 2410.07524): K consecutive experts hold the K slices, their outputs scaled by K, and
    share a column of the router. Their logits tie, so a token starts with one whole group, each slice weighing 1/K: the
    function is unchanged.

    Raises:
        UserError: a weight is missing, left over, or does not have the config's shape; names it.
    """
    held = files.names()
    upcycled = is_upcycled(config, held)
    used: set[str] = set()
    normal = functools.cache(lambda name: statistics(files[name]))

    def take(name: str, axes: int | None = None) -> Lazy:
        used.add(name)
        if name not in held:
            raise UserError(f"{files.folder}: {name} is missing; the folder is incomplete, or does not fit the config")
        lazy = files[name]
        if axes not in (None, len(lazy.shape)):
            raise UserError(f"{files.folder}: {name} has shape {lazy.shape}, but {axes} axes are expected")
        return lazy

    def experts_of(row: keys.Row) -> Lazy:
        """A leaf of one layer's experts, built from the dense feed-forward."""
        layer = int(row.theirs.split(".")[2])
        if row.ours.endswith("router"):
            shape = (config.language.width, config.experts.count // slices)
            rng = np.random.default_rng((config.seed, layer))
            kernel = rng.normal(0.0, config.experts.router_init, shape).astype(np.float32).repeat(slices, axis=1)
            return Lazy(kernel.shape, kernel.__getitem__)
        names = ("gate_proj", "up_proj") if row.ours.endswith("gate_up") else ("down_proj",)
        names = [f"language_model.layers.{layer}.mlp.{name}.weight" for name in names]
        parts = [take(name, 2) for name in names]
        if len({part.shape for part in parts}) > 1:
            raise UserError(f"{files.folder}: gate and up of layer {layer} differ in shape")
        inner = 1 if row.ours.endswith("gate_up") else 0  # the axis of F after transposing

        def slice_of(matrix: Lazy, number: int) -> Lazy:
            """The slice of expert `number` of a matrix [D,F], or of [F,D], scaled."""
            first = number % slices * config.experts.width
            shape = list(matrix.shape)
            shape[inner] = config.experts.width

            def read(region: Region) -> np.ndarray:
                moved = [*region]
                moved[inner] = slice(first + region[inner].start, first + region[inner].stop)
                return matrix.read(tuple(moved)) * (1 if inner else slices)

            return Lazy(tuple(shape), read)

        def joined(matrices: list[Lazy]) -> Lazy:
            return stacked(matrices) if len(matrices) > 1 else matrices[0]

        def expert(number: int) -> Lazy:
            units = (config.seed, layer, number)
            return joined(
                [
                    reinitialized(
                        slice_of(transposed(part), number) if slices > 1 else transposed(part),
                        inner,
                        config.experts.reinitialized,
                        (*units, *name.encode()),
                        units,
                        functools.partial(normal, name),
                    )
                    for name, part in zip(names, parts, strict=True)
                ]
            )

        if not config.experts.reinitialized and slices == 1:
            return _repeated(joined([transposed(part) for part in parts]), config.experts.count)
        return stacked([expert(number) for number in range(config.experts.count)])

    if config.experts.reinitialized and not upcycled:
        raise UserError(
            f"config.experts.reinitialized: {files.folder} has experts already, so none are created by upcycling;"
            " leave this out"
        )
    whole, part = config.language.mlp_width, config.experts.per_token
    slices = part if upcycled and config.experts.width * part == whole else 1
    if upcycled and (config.experts.width * slices != whole or config.experts.count % slices):
        raise UserError(
            f"config.experts.width: {config.experts.width}, but upcycling copies the dense feed-forward of"
            f" {files.folder}; give --config.experts.width={whole}, or {whole // part} and a multiple of {part} experts"
            " for slices of it"
        )
    transforms = {
        keys.KEEP: (None, lambda lazy: lazy),
        keys.TRANSPOSE: (2, transposed),
        keys.PATCH: (5, patch_kernel),
        keys.PAIR: (3, pair),
    }
    leaves: dict[str, list[Lazy] | Lazy] = {}
    for row in keys.table(config):
        if upcycled and "/experts/" in row.ours:
            lazy = experts_of(row)
        else:
            axes, transform = transforms[row.transform]
            lazy = transform(_oriented(take(row.theirs, axes), row, config))
        if row.stack_index is None:
            leaves[row.ours] = lazy
        else:
            layers = leaves.setdefault(row.ours, [])
            if layers and layers[0].shape != lazy.shape:
                raise UserError(f"{files.folder}: {row.theirs} has shape {lazy.shape}, other layers {layers[0].shape}")
            layers.append(lazy)
    if config.experts.router_term in ("learned", "token"):  # no folder has it
        own = router.own_experts(
            router.TERMS[config.experts.router_term], config.experts.count, config.experts.per_token
        )
        term = (config.experts.term_init * own).astype(np.float32)
        for path in [path for path in leaves if path.endswith("experts/router")]:
            leaves[f"{path}_term"] = [Lazy(term.shape, term.__getitem__)] * len(leaves[path])
    left = sorted(held - used - {LM_HEAD})
    if left:
        more = f", and {len(left) - 1} more" if left[1:] else ""
        raise UserError(f"{files.folder}: {left[0]} is left over{more}; the config has no such parameter")
    return {path: stacked(leaf) if isinstance(leaf, list) else leaf for path, leaf in leaves.items()}


def _oriented(lazy: Lazy, row: keys.Row, config: config_lib.Config) -> Lazy:
    """Experts in the published layout, [E,D,2F] and [E,F,D]; transformers saves them as [E,2F,D] and [E,D,F]."""
    width, inner = config.language.width, config.experts.width
    swapped = {"experts/gate_up": (2 * inner, width), "experts/down": (width, inner)}
    return transposed(lazy) if lazy.shape[1:] == swapped.get("/".join(row.ours.split("/")[-2:])) else lazy


def _repeated(source: Lazy, count: int) -> Lazy:
    """`source` repeated `count` times along a new first axis."""

    def read(region: Region) -> np.ndarray:
        first, *rest = region
        array = source.read(tuple(rest))
        return np.broadcast_to(array, (first.stop - first.start, *array.shape))

    return Lazy((count, *source.shape), read)


def _pieces(region: Region, largest: int) -> Iterator[Region]:
    """`region` in pieces of at most `largest` elements, split along the first axes."""
    size = int(np.prod([part.stop - part.start for part in region]))
    axis = next((axis for axis, part in enumerate(region) if part.stop - part.start > 1), None)
    if size <= largest or axis is None:
        yield region
        return
    part = region[axis]
    step = max(1, (part.stop - part.start) * largest // size)
    for start in range(part.start, part.stop, step):
        piece = (*region[:axis], slice(start, min(start + step, part.stop)), *region[axis + 1 :])
        yield from _pieces(piece, largest)


def read_region(source: Lazy, region: Region, dtype: np.dtype) -> np.ndarray:
    """The region as a new array, read in sixteenths; each piece is cast before the next is read."""
    out = np.empty([part.stop - part.start for part in region], dtype)
    for piece in _pieces(region, max(1, out.size // 16)):
        into = tuple(
            slice(part.start - whole.start, part.stop - whole.start) for part, whole in zip(piece, region, strict=True)
        )
        out[into] = source.read(piece)
    return out


def place(source: Lazy, like: jax.ShapeDtypeStruct) -> jax.Array:
    """Puts a leaf on its devices, one device's part at a time, with the shape, dtype and sharding of `like`."""
    regions: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}
    for device, index in like.sharding.addressable_devices_indices_map(like.shape).items():
        bounds = tuple(part.indices(size)[:2] for part, size in zip(index, like.shape, strict=True))
        regions.setdefault(bounds, []).append(device)
    parts = {}
    for bounds, devices in regions.items():
        array = read_region(source, tuple(slice(*edges) for edges in bounds), like.dtype)
        for device in devices:
            parts[device] = jax.block_until_ready(jax.device_put(array, device))
        del array
    return jax.make_array_from_single_device_arrays(like.shape, like.sharding, list(parts.values()))


def check(folder: Path, config: config_lib.Config) -> None:
    """Checks for missing and leftover weights. Reads names and shapes only.

    Raises:
        UserError: as `load` does.
    """
    with contextlib.ExitStack() as stack:
        sources(config, Files(folder, stack))


def load(
    folder: Path,
    config: config_lib.Config,
    like: Any,
    track: Callable[[Iterable, int], Iterable] = lambda work, total: work,
) -> Any:
    """The encoder's parameters from a folder, upcycled if the config has experts and the folder is dense.

    Args:
        like: abstract parameters with the target's dtypes and shardings.
        track: (leaves, their number) → the same iterable, wrapped to show progress.

    Raises:
        UserError: a weight is missing, left over or of the wrong shape.
    """
    with contextlib.ExitStack() as stack:
        return placed(Files(folder, stack), config, like, track)


def placed(
    files: Files | Held,
    config: config_lib.Config,
    like: Any,
    track: Callable[[Iterable, int], Iterable] = lambda work, total: work,
) -> Any:
    """Like `load`, for opened files or a model in memory."""
    targets, found = keys.flatten(like), sources(config, files)
    for path, target in targets.items():
        if found[path].shape != target.shape:
            theirs = next(row.theirs for row in keys.table(config) if row.ours == path)
            raise UserError(
                f"{files.folder}: {theirs} gives {path} shape {found[path].shape}, but the config needs {target.shape}"
            )
    return keys.unflatten({path: place(found[path], targets[path]) for path in track(targets, len(targets))})
