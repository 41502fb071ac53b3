"""Ablation: one dense model per seed is trained first; from it, the method and the method without each of its parts
train on, for equally many steps. Prints one table like the paper's.

    python -m benchmarks.ablation --data path/to/fashion --output ablation/fashion
    python -m benchmarks.ablation --data path/to/fashion --output ablation/fashion --minutes 100
    python -m benchmarks.ablation --data path/to/fashion --output ablation/fashion --device --minutes 9     on a GPU
    python -m benchmarks.ablation_tables docs/ablation/fashion.json     prints the tables of earlier runs

The same command again resumes: it trains the runs that are missing or have other options. --minutes starts no run after
that time. --device trains all seeds of a row at once. Nothing is tuned for any row; each differs from `full` only by
what its name says. `results.json` in the output holds all that the tables show.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import fcntl
import hashlib
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from benchmarks.ablation_tables import COMMON, NOISE, START, START_ROW, Row, rows, tables

BATCHES = 400
"""Different batches of a data setting; a run repeats them in an order of its own."""

CHUNK = 25
"""Steps between two looks at a run."""


BACKGROUND = "photos_background"
"""The set of queries of the column background."""


def noisy_copy(folder: Path, output: Path) -> None:
    """Copies the prepared `folder` with a share of its purchases corrupted; records are symlinked, not copied."""
    from moon_jax.data.prepared import MANIFEST, TRIPLETS

    if (output / MANIFEST).is_file():
        return
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    for path in folder.iterdir():
        if path.name not in (MANIFEST, TRIPLETS):
            (output / path.name).symlink_to(path.resolve())
    triplets, rng = np.load(folder / TRIPLETS), np.random.default_rng(0)
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    items = np.unique(triplets["positive"])
    wrong = np.flatnonzero(rng.random(len(triplets)) < NOISE)
    for row in wrong:
        taken = (triplets["positive"][row], triplets["negative"][row])
        triplets["positive"][row] = rng.choice(items[~np.isin(items, taken)])
    np.save(output / TRIPLETS, triplets, allow_pickle=False)
    manifest["fingerprint"] = f"{manifest['fingerprint']}-noise-{NOISE}"
    (output / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")


def command(*words: str) -> None:
    """Runs a moon-jax command in a separate process."""
    subprocess.run([sys.executable, "-m", "moon_jax.cli", *words], check=True)


class Data:
    """The batches of a data setting. They are made once, by all cores, and kept in the output."""

    def __init__(self, output: Path, config: Any, noisy: bool):
        from moon_jax.data import pipeline
        from moon_jax.data import rows as rows_lib
        from moon_jax.data.prepared import open_prepared
        from moon_jax.data.text import BARE, Tokenizer

        self.folder = output / ("noisy" if noisy else "augmented")
        self.prepared = open_prepared(self.folder)
        self.tokenizer = Tokenizer.load(output / "tokenizer.json")
        reader = pipeline.Reader(config, self.tokenizer)
        # Rows only as long as this catalogue needs.
        self.config = pipeline.fitted(config, self.prepared, reader)
        # Everything that batches depend on, so that they are never those of another setting.
        prefix = rows_lib.prefix_is_view(BARE, config.experts.router_term)
        known = (self.prepared.fingerprint, self.config.data, config.vision, config.seed, prefix)
        self.store = output / "batches" / f"{self.folder.name}-{config.data.augmented}-{digest(known)}"

    def batch(self, number: int) -> Any:
        """The Batch of a step, as numpy arrays (data/pipeline.py)."""
        from moon_jax import config as config_lib
        from moon_jax.data import pipeline

        reader = pipeline.Reader(self.config, self.tokenizer)
        return pipeline.batches(self.prepared, reader, range(config_lib.batch_rows(self.config)))[number]

    def all(self, count: int) -> Any:
        """The first `count` batches: a Batch whose leaves have a leading axis of that length, mapped from disk."""
        import jax

        leaves, treedef = jax.tree.flatten(self.batch(0))
        store = self.store.with_name(f"{self.store.name}-{count}")
        if not store.is_dir():
            temporary = store.with_suffix(".tmp")
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            for number, leaf in enumerate(leaves):
                shape = (count, *leaf.shape)
                np.lib.format.open_memmap(temporary / f"{number}.npy", "w+", leaf.dtype, shape).flush()
            workers = os.cpu_count() or 1
            context = multiprocessing.get_context("spawn")
            parts = [(self, temporary, range(first, count, workers)) for first in range(workers)]
            with concurrent.futures.ProcessPoolExecutor(workers, context, _on_cpu) as pool:
                list(track(pool.map(_write, parts), f"batches {store.name}", workers))
            temporary.rename(store)
        files = sorted(store.glob("*.npy"), key=lambda path: int(path.stem))
        return jax.tree.unflatten(treedef, [np.load(path, mmap_mode="r") for path in files])


def _on_cpu() -> None:
    os.environ["JAX_PLATFORMS"] = "cpu"


def _write(part: tuple[Data, Path, range]) -> None:
    """Makes some batches of a data setting, in a process of its own."""
    import jax

    data, folder, numbers = part
    for number in numbers:
        for leaf, value in enumerate(jax.tree.leaves(data.batch(number))):
            np.lib.format.open_memmap(folder / f"{leaf}.npy", "r+")[number] = value


def order(seed: int, steps: int, count: int) -> np.ndarray:
    """i32[steps]: which batch each step reads; all of them, in another order each time."""
    rng = np.random.default_rng((seed, steps))
    passes = [rng.permutation(count) for _ in range(-(-steps // count))]
    return np.concatenate(passes)[:steps].astype(np.int32)


class Trainer:
    """Trains models of one config that differ in their seeds, side by side. Compiles once.

    `states` is a TrainState whose leaves have a leading axis of seeds; `batches` is the result of `Data.all`.
    """

    def __init__(self, config: Any, batches: Any, seeds: Sequence[int]):
        import jax
        import jax.numpy as jnp

        from moon_jax import backend, sharding
        from moon_jax.training import loop
        from moon_jax.training.step import train_step

        self.config, self.seeds = config, seeds
        self.mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
        self.count = len(jax.tree.leaves(batches)[0])
        self.batches = jax.tree.map(jnp.asarray, batches)
        one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), self.batches)
        with jax.set_mesh(self.mesh):
            self.abstract = loop.abstract_state(config, one.rows, self.mesh)

        def chunk(states: Any, batches: Any, indices: Any) -> tuple[Any, Any]:
            def step(states: Any, index: Any) -> tuple[Any, Any]:
                chosen = jax.tree.map(lambda x: x[index], batches)
                return jax.vmap(lambda state, batch: train_step(state, batch, config))(states, chosen)

            states, found = jax.lax.scan(step, states, indices)
            return states, jax.tree.map(lambda x: x[-1], found)

        self._chunk = jax.jit(chunk, donate_argnums=0, compiler_options=backend.compiler_options())
        self.states: Any = None

    def start(self, encoders: Sequence[Any] | None = None, source: Any = None) -> None:
        """Creates the models: random ones, or from `encoders` of the config `source`, one for each seed."""
        import flax.linen as nn
        import jax
        import jax.numpy as jnp

        from moon_jax import config as config_lib
        from moon_jax.hub import weights
        from moon_jax.training.step import initial_state

        blank = jax.tree.map(lambda x: jnp.zeros(x.shape[1:], x.dtype), self.batches.rows)
        states = []
        with jax.set_mesh(self.mesh):
            for number, seed in enumerate(self.seeds):
                seeded = config_lib.replace(self.config, {"seed": seed})
                encoder = None
                if encoders is not None:
                    dense = jax.tree.map(jnp.asarray, encoders[number])
                    held = weights.Held(Path("the dense model"), source, dense)
                    encoder = weights.placed(held, seeded, self.abstract.params["encoder"])
                states.append(jax.jit(lambda e, c=seeded: nn.unbox(initial_state(c, blank, e)))(encoder))
        self.states = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)

    def encoder(self, number: int) -> Any:
        """The encoder of the model of that number."""
        import jax

        return jax.tree.map(lambda x: x[number], self.states.params["encoder"])

    def train(self, steps: int) -> Iterator[tuple[int, Any]]:
        """Yields after every CHUNK steps the step, and its metrics with a leading axis of seeds."""
        import jax

        indices = np.stack([order(seed, steps, self.count) for seed in self.seeds], axis=1)
        with jax.set_mesh(self.mesh):
            for first in range(0, steps, CHUNK):
                part = indices[first : first + CHUNK]
                self.states, found = self._chunk(self.states, self.batches, part)
                yield first + len(part), jax.device_get(found)


class Evaluator:
    """Evaluates models of a config in COLUMNS, in percent. Compiles once."""

    def __init__(self, config: Any, data: Data):
        from moon_jax.evaluation import labels
        from moon_jax.serving.embedder import Embedder

        self.embedder = Embedder(config, None, data.tokenizer, "", 0)
        self.prepared = data.prepared
        self.tasks = labels.tasks(data.prepared)

    def scores(self, encoder: Any) -> dict[str, float]:
        from moon_jax.evaluation import labels, retrieval

        embedder = self.embedder.of(encoder)
        own = bool(self.prepared.val_queries)  # the catalogue's own queries say more than products seen in training
        encoded = retrieval.encode(embedder, self.prepared, photos=() if own else (BACKGROUND,))
        found: dict[str, float] = {}
        for group, name, _, measured in retrieval.directions(encoded):
            if group == ("queries" if own else "products"):
                found[name] = float(measured["R@10"].mean())
            elif (group, name) == (BACKGROUND, "i→i"):
                found["background"] = float(measured["R@10"].mean())
        directions = [score for name, score in found.items() if "→" in name]
        found["mean"] = float(np.mean(directions))
        if own:
            return found
        accuracies: dict[str, list[float]] = {"category": [], "attribute": []}
        for task in self.tasks:
            # From the image alone, because titles often contain the label.
            named = labels.label_vectors(embedder, task.labels, labels.PROMPTS)
            none_known = encoded.candidates[:0], encoded.present[:0]
            answers = labels.Answers(task, named, encoded.candidates, encoded.present, *none_known)
            kind = "category" if task.name.startswith("category") else "attribute"
            accuracies[kind].append(labels.measure(answers)["i"]["accuracy"])
        return found | {name: float(np.mean(values)) for name, values in accuracies.items() if values}


def sizes(encoder: Any, experts: Any) -> tuple[int, int]:
    """The number of parameters, and of those that serve one token."""
    import jax

    total = active = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(encoder):
        total += leaf.size
        routed = {"gate_up", "down"} & {key.key for key in path} if experts.count else ()
        active += leaf.size * experts.per_token // experts.count if routed else leaf.size
    return total, active


@dataclasses.dataclass
class Runs:
    """The runs of an output folder, and how missing ones are made."""

    output: Path
    seeds: Sequence[int]
    steps: int
    points: int  # evaluations of a learning curve
    batches: int
    results: dict[str, Any]

    def config(self, row: Row) -> Any:
        """The config of a row's runs, but for their seeds."""
        from moon_jax import config as config_lib

        common = START if row.name == START_ROW.name else COMMON | {"training.steps": self.steps}
        return config_lib.replace(config_lib.load("quickstart"), common | row.options)

    def options(self, row: Row) -> dict[str, Any]:
        """All that determines a run beside its seed: the options that differ from their defaults, the batches, and
        digests of the whole config and of its start.
        """
        from moon_jax import config as config_lib

        defaults, held = config_lib.leaves(config_lib.Config()), config_lib.leaves(self.config(row))
        changed = {name: value for name, value in held.items() if value != defaults[name]}
        own = changed | {"noisy": row.noisy, "batches": self.batches, "config": digest(held)}
        if row.name != START_ROW.name:
            own["start"] = digest(self.options(START_ROW))
        return json.loads(json.dumps(own))

    def missing(self, row: Row) -> list[int]:
        """The seeds whose runs have to be made."""
        wanted = self.options(row)
        held = {r["seed"] for r in self.results["runs"] if r["row"] == row.name and r["options"] == wanted}
        if row.name == START_ROW.name:
            held = {seed for seed in held if self.start(seed).is_file()}
        return [seed for seed in self.seeds if seed not in held]

    def start(self, seed: int) -> Path:
        """The file with the dense model of that seed."""
        return self.output / f"start-{seed}.npz"

    def make(self, row: Row, seeds: Sequence[int]) -> None:
        """Trains and evaluates the runs of a row with these seeds side by side."""
        import jax

        from moon_jax import config as config_lib
        from moon_jax.hub import keys
        from moon_jax.training import metrics

        config, options = self.config(row), self.options(row)
        data = Data(self.output, config, row.noisy)
        trainer = Trainer(data.config, data.all(self.batches), seeds)
        evaluator = Evaluator(config, data)
        starts = [self.start(seed) for seed in seeds]
        if row.name == START_ROW.name:
            trainer.start()
        else:
            source = config_lib.replace(config, {"experts.count": 0, "experts.router_term": "none"})
            loaded = [np.load(path) for path in starts]
            trainer.start([keys.unflatten({name: file[name] for name in file.files}) for file in loaded], source)
        steps = config.training.steps
        every = steps // self.points if row.curve else steps
        curves: list[list[dict[str, Any]]] = [[] for _ in seeds]
        last, seconds, began = None, 0.0, time.perf_counter()
        for step, last in trainer.train(steps):  # noqa: B007
            # The first chunk compiles.
            seconds = seconds if step <= CHUNK else seconds + time.perf_counter() - began
            if step % every == 0:
                for number, curve in enumerate(curves):
                    scores = evaluator.scores(trainer.encoder(number))
                    curve.append({"step": step, "mean": scores["mean"], "scores": scores})
            began = time.perf_counter()
        for number, seed in enumerate(seeds):
            line = metrics.line(steps, jax.tree.map(lambda x, n=number: x[n], last), config)
            encoder = trainer.encoder(number)
            if row.name == START_ROW.name:
                np.savez(starts[number], **keys.flatten(jax.device_get(encoder)))
            total, active = sizes(encoder, config.experts)
            made = {
                "row": row.name,
                "seed": seed,
                "options": options,
                "scores": curves[number][-1]["scores"],
                "curve": [{"step": point["step"], "mean": point["mean"]} for point in curves[number]],
                "loss": line["loss"],
                "omega": list(line["omega"].values()),
                "bits": line["modality_information"],
                "phi_low": line["phi_below_threshold"],
                "parameters": total,
                "active": active,
                "seconds_per_step": seconds / max(steps - CHUNK, 1) / len(seeds),
                "machine": f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores, jax {jax.__version__}",
            }
            runs = self.results["runs"]
            self.results["runs"] = [r for r in runs if (r["row"], r["seed"]) != (row.name, seed)] + [made]
        save(self.output / "results.json", self.results)


def digest(value: Any) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:12]


def save(path: Path, results: dict[str, Any]) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(path)


def prepare(data: str, output: Path) -> None:
    """Prepares, augments and corrupts the catalogue, and learns the tokenizer."""
    from moon_jax import config as config_lib
    from moon_jax.data import text
    from moon_jax.data.prepared import open_prepared

    command("prepare", "--data", data, "--output", str(output / "prepared"))
    command("augment", "--data", str(output / "prepared"), "--output", str(output / "augmented"))
    noisy_copy(output / "augmented", output / "noisy")
    if not (output / "tokenizer.json").is_file():
        prepared = open_prepared(output / "prepared")
        titles = (prepared.products[index].text for index in prepared.train)
        text.train((title for title in titles if title), config_lib.load("quickstart").language.vocab).save(
            output / "tokenizer.json"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a catalogue")
    parser.add_argument("--output", type=Path, required=True, help="folder of the runs; needs up to 20 GB for batches")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=1000, help="training steps of a run (default: %(default)s)")
    parser.add_argument("--batches", type=int, default=BATCHES, help="different batches (default: %(default)s)")
    parser.add_argument("--rows", help="train only rows with one of these texts in their names, separated by |")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no run after that time")
    parser.add_argument("--device", action="store_true", help="train all seeds of a row at once, for a GPU or TPU")
    parsed = parser.parse_args()
    if parsed.steps % CHUNK:
        parser.error(f"--steps {parsed.steps}: give a multiple of {CHUNK}")
    parts = parsed.rows.split("|") if parsed.rows else [""]
    unknown = [part for part in parts if not any(part in row.name for row in rows())]
    if unknown:
        parser.error(f"--rows {unknown[0]}: no such row; the rows are {' | '.join(row.name for row in rows())}")
    began, output = time.monotonic(), parsed.output
    output.mkdir(parents=True, exist_ok=True)
    lock = (output / "lock").open("a")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        parser.error(f"--output {output}: another process is working there; wait for it, or stop it")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str((output / "cache").resolve()))
    try:
        prepare(parsed.data, output)
    except subprocess.CalledProcessError as error:  # the command has said why
        sys.exit(error.returncode)
    path = output / "results.json"
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"runs": []}
    results["title"] = (
        f"{Path(parsed.data).name}: R@10 and accuracy in percent, {parsed.steps} steps from a dense model of"
        f" {START['training.steps']}; mean ± standard error over (seeds); ↑ ↓ significant at 95%, · not;"
        " in brackets: the paper's own result"
    )
    points = next(count for count in (4, 2, 1) if parsed.steps % (CHUNK * count) == 0)
    runs = Runs(output, range(parsed.seeds), parsed.steps, points, parsed.batches, results)
    chosen = [row for row in rows() if any(part in row.name for part in parts)]
    listed = [START_ROW, *chosen]
    groups = [list(runs.seeds)] if parsed.device else [[seed] for seed in runs.seeds]
    for group in groups:  # all rows of a seed first, so that partial results compare
        for row in listed:
            seeds = [seed for seed in runs.missing(row) if seed in group]
            if not seeds:
                continue
            if time.monotonic() - began > 60 * parsed.minutes:
                print(f"stopped after {parsed.minutes:g} minutes; the same command goes on")
                return
            print(f"{time.monotonic() - began:.0f} s: {row.name}, seeds {', '.join(map(str, seeds))}", flush=True)
            runs.make(row, seeds)
    for table in tables(runs.results):
        Console(width=240).print(table)


if __name__ == "__main__":
    main()
