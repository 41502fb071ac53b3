"""The training run: prepare, compile once, step, log, save; the same call again resumes where it stopped."""

from __future__ import annotations

import functools
import json
import shutil
import tempfile
import time
from pathlib import Path

import flax.linen as nn
import jax

from moon_jax import backend, interrupt, sharding
from moon_jax import config as config_lib
from moon_jax.config import UserError
from moon_jax.data import pipeline, prepare, sources, synthetic, text
from moon_jax.hub import folder, weights
from moon_jax.training import watch
from moon_jax.training.checkpoints import Checkpoints
from moon_jax.training.step import initial_state, train_step
from moon_jax.types import Batch, TrainState


def check_workdir(config: config_lib.Config, workdir: Path) -> None:
    """Refuses a workdir that belongs to another config or to anything else, or that cannot be written.

    Where the data lies and how many threads read it may change; the data itself is held to by its fingerprint.
    """
    path = workdir / "config.json"
    place = next(folder for folder in (workdir, *workdir.absolute().parents) if folder.exists())
    try:
        with tempfile.TemporaryFile(dir=place) as probe:
            probe.write(b"0")
    except OSError as error:
        raise UserError(f"--workdir {workdir}: {place}: {error.strerror}; give a folder that can be written") from None
    if not path.exists():
        others = [entry.name for entry in workdir.iterdir()] if workdir.is_dir() else []
        others = sorted(name for name in others if name not in ("catalogue", "run.log") and not name.startswith("."))
        if others:
            raise UserError(f"--workdir {workdir}: holds no run but {others[0]}; give a folder that is new or empty")
        return
    held = config_lib.leaves(config_lib.read_json(path))
    if bool(held["data.path"]) != bool(config.data.path):
        what = f"--data {held['data.path']}" if held["data.path"] else "the synthetic catalogue, without --data"
        raise UserError(f"--workdir {workdir}: holds a run on {what}; give the same, or take another workdir")
    for name, value in config_lib.leaves(config).items():
        if held[name] != value and name not in ("data.path", "data.threads"):
            raise UserError(
                f"--workdir {workdir}: holds a run with config.{name} = {held[name]!r}, not {value!r};"
                " take another workdir, or remove this one"
            )


def open_workdir(config: config_lib.Config, workdir: Path) -> None:
    """Makes the workdir the home of this config.

    Raises:
        UserError: it cannot be written.
    """
    path = workdir / "config.json"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            temporary = path.with_suffix(".tmp")
            temporary.write_text(config_lib.to_json(config), encoding="utf-8")
            temporary.replace(path)
    except OSError as error:
        raise UserError(f"--workdir {workdir}: {error.strerror}; give a folder that can be written") from None


def open_base(config: config_lib.Config, workdir: Path, report: watch.Watch) -> Path | None:
    """The folder of `training.init`, where a run is to begin from it; None where there is none, or the run goes on.

    Raises:
        UserError: no such folder, or its model is not of the config's sizes.
    """
    resumes = any(path.name.isdigit() for path in (workdir / "checkpoints").glob("*"))
    if not config.training.init or resumes:
        return None
    base = folder.locate(config.training.init)
    folder.check(config, base)
    weights.check(base, config)
    theirs = folder.config(base, {})
    for name in ("language.pooling", "data.template"):
        mine, other = (config_lib.leaves(one)[name] for one in (config, theirs))
        if mine != other:
            report.line(f"config.{name} is {mine!r}; {config.training.init} was trained with {other!r}")
    return base


def open_tokenizer(
    config: config_lib.Config, workdir: Path, prepared: prepare.Prepared, base: Path | None = None
) -> text.Tokenizer:
    """The run's tokenizer.json: the configured one, that of the model it begins from, or one trained on the catalogue.

    Raises:
        UserError: it has more tokens than `language.vocab`.
    """
    path = workdir / "tokenizer.json"
    if not path.exists():
        if config.data.tokenizer or base:
            given = config.data.tokenizer or folder.tokenizer(base)
            text.Tokenizer.load(given)
            temporary = path.with_suffix(".tmp")
            shutil.copyfile(given, temporary)  # byte by byte: the fingerprint is taken of it
            temporary.replace(path)
        else:
            titles = (prepared.products[index].text for index in prepared.train)
            temporary = path.with_suffix(".tmp")
            text.train((title for title in titles if title), config.language.vocab).save(temporary)
            temporary.replace(path)
    return text.Tokenizer.load(path, config.language.vocab)


def abstract_state(config: config_lib.Config, rows: object, mesh: jax.sharding.Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state."""
    boxed = jax.eval_shape(functools.partial(initial_state, config), rows)
    shardings = sharding.of_variables(mesh, boxed)
    return jax.tree.map(
        lambda leaf, placed: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed), nn.unbox(boxed), shardings
    )


def lower_step(config: config_lib.Config, state: TrainState, batch: Batch) -> jax.stages.Lowered:
    """The training step for the mesh in use, which may be of devices that this machine lacks; both abstract."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    # The state comes out as it goes in; left to itself XLA would divide norms, and the next step refuse them.
    jitted = jax.jit(train_step, static_argnames="config", donate_argnames="state", out_shardings=(shardings, None))
    platform = {"gpu": "cuda"}.get(backend.platform(), backend.platform())
    return jitted.trace(state, batch, config=config).lower(lowering_platforms=(platform,))


def train(config: config_lib.Config, workdir: str | Path) -> prepare.Prepared:
    """Trains on `config.data.path` until `config.training.steps`, from the newest checkpoint if there is one.

    Args:
        config: the run is a function of it. A workdir belongs to one config.
        workdir: receives config.json, tokenizer.json, data/, checkpoints/, metrics.jsonl, tensorboard/ and run.log;
            without `config.data.path` also catalogue/, the synthetic one.

    Returns:
        The prepared data, for evaluation.

    Raises:
        UserError: the workdir holds a run of another config or of other data; the data cannot be used.
    """
    if not isinstance(config, config_lib.Config):
        raise UserError(f"config: {config!r} is no Config; moon_jax.config.load gives one by name")
    workdir = Path(workdir)
    check_workdir(config, workdir)
    mesh = sharding.make_mesh(config.mesh)
    sharding.check(config, mesh)
    if config.data.tokenizer:
        text.Tokenizer.load(config.data.tokenizer)  # one that cannot be read is told before the data is
    report = watch.Watch(workdir)
    base = open_base(config, workdir, report)
    prepared = prepare_data(config, workdir, report)
    open_workdir(config, workdir)
    prepared.save(workdir / "data")
    tokenizer = open_tokenizer(config, workdir, prepared, base)
    if base:
        about = {"model": config.training.init, "licence": folder.licence(base)}
        if config.training.init.startswith(folder.HUB):
            about["commit"] = base.name  # of the hub's cache
        (workdir / "base.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    dataset = pipeline.batches(prepared, pipeline.Reader(config, tokenizer))

    steps = config.training.steps
    with jax.set_mesh(mesh):
        sample: Batch = dataset[0]
        abstract = abstract_state(config, sample.rows, mesh)
        checkpoints = Checkpoints(workdir, config.training)
        newest = checkpoints.latest()
        start = newest or 0
        if start >= steps:
            checkpoints.close()
            report.line(f"{workdir} is trained already: its newest checkpoint is of step {start}")
            return prepared
        if newest is not None:
            state = checkpoints.restore(newest, abstract)
            report.line(f"resuming {workdir} at step {start} of {steps}")

        placed = jax.tree.map(
            lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding.rows(mesh)), sample
        )
        began = time.monotonic()
        with report.busy("compiling the training step"):
            shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
            compiled = lower_step(config, abstract, placed).compile(compiler_options=backend.compiler_options())
        compiling = time.monotonic() - began
        if newest is None:
            encoder = None
            if base:
                track = functools.partial(report.track, f"loading {config.training.init}")
                encoder = weights.load(base, config, abstract.params["encoder"], track)
            create = jax.jit(
                lambda encoder: nn.unbox(initial_state(config, sample.rows, encoder)),
                out_shardings=shardings,
                donate_argnames="encoder",
            )
            state = create(encoder)
        parameters = sum(leaf.size for leaf in jax.tree.leaves(abstract.params))
        drawn = "" if config.training.init else ", drawn at random,"
        report.line(
            f"{parameters:,} parameters{drawn} on {mesh.size} {jax.devices()[0].platform} device(s);"
            f" compiled in {compiling:.1f} s"
        )

        log = watch.MetricLog(workdir / "metrics.jsonl", start, workdir / "tensorboard")
        batches = pipeline.from_step(dataset, start, config.data.threads)
        metrics, note = None, ""
        with report.progress("training", steps, start) as advance:
            for step in range(start, steps):
                batch = jax.device_put(next(batches), sharding.rows(mesh))
                # The device works on one step while the next one's data is read; never further ahead.
                jax.block_until_ready(metrics)
                state, metrics = compiled(state, batch)
                done = step + 1
                if done % config.training.log_every == 0 or done == steps:
                    line = watch.describe(done, jax.device_get(metrics), config)
                    log.write(line | {"synthetic": prepared.synthetic})
                    note = (
                        f"loss {line['total']:.3f} at {done}" if line["finite"] else f"step {done} not finite, skipped"
                    )
                stopping = interrupt.REQUESTED.is_set()
                checkpoints.save(state, done, last=stopping or done == steps)
                if stopping:
                    checkpoints.close()
                    report.line(f"saved at step {done} of {steps}")
                advance(note=note)
        log.close()
        checkpoints.close()
        report.line(f"training step compiled {watch.COMPILED['train_step']} time(s); bad steps: {int(state.bad_steps)}")
    return prepared


def prepare_data(config: config_lib.Config, workdir: Path, report: watch.Watch) -> prepare.Prepared:
    """`prepare.prepare` with progress shown and the quarantine summed up; without a path, of a rendered catalogue."""
    if not config.data.path:
        path = workdir / "catalogue" / "synthetic.parquet"
        report.line(f"no --data given: a synthetic catalogue of rendered products, {path}")
        if not synthetic.stands(path, config.data.synthetic, config.seed):
            track = functools.partial(report.track, "rendering")
            synthetic.write(path, config.data.synthetic, config.seed, config.data.threads, track)
        config = config_lib.replace(config, {"data.path": str(path)})
    with report.busy("opening the catalogue"):
        catalogue = sources.read(config.data.path)
    prepared = prepare.prepare(config, functools.partial(report.track, "reading"), catalogue)
    products = [prepared.products[index] for index in {*prepared.train, *prepared.val}]
    without_text = sum(product.text is None for product in products)
    without_image = sum(not product.images for product in products)
    asked = len({triplet.query for triplet in prepared.triplets} - {*prepared.train}) + len(prepared.val_queries)
    kind = "synthetic products" if prepared.synthetic else "products"
    report.line(
        f"{len(prepared.train):,} {kind} to train on, {len(prepared.val):,} to find"
        f" ({without_text:,} without text, {without_image:,} without image), {asked:,} queries of the catalogue's own;"
        f" {sources.summary(prepared.quarantine) or '0 left out'}"
    )
    if prepared.quarantine:
        report.line(f"what was left out is listed in {workdir / 'data' / 'quarantine.jsonl'}")
    if len(prepared.val) <= 10:
        report.line(f"only {len(prepared.val)} products to find: R@10 says nothing; give a larger catalogue")
    return prepared
