"""The training run: prepare, compile once, step, log and save. Calling it again resumes the run."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from moon_jax import backend, distributed, interrupt, progress, sharding, storage
from moon_jax import config as config_lib
from moon_jax.data import pipeline, text
from moon_jax.data import rows as rows_lib
from moon_jax.data.prepared import Prepared
from moon_jax.errors import UserError
from moon_jax.hub import weights
from moon_jax.training import checkpoints as checkpoints_lib
from moon_jax.training import health, optimizer, provenance, watchdog
from moon_jax.training import metrics as metrics_lib
from moon_jax.training import workdir as workdir_lib
from moon_jax.training.step import initial_state, train_step
from moon_jax.types import Batch, TrainState

PER_PROCESS = ("data.path", "data.threads")
"""Options that may differ between processes."""

Evaluate = Callable[[Any], dict[str, Any]]
"""Encoder parameters on the mesh → scores, including checkpoints.BEST. Every process must call it."""

MakeEvaluate = Callable[[config_lib.Config, Prepared, text.Tokenizer, jax.sharding.Mesh], Evaluate]


def abstract_batch(config: config_lib.Config, mesh: jax.sharding.Mesh, template: text.Template = text.BARE) -> Batch:
    """Shapes, dtypes and shardings of a training batch."""
    size, count = config.data.batch, config_lib.batch_rows(config)
    placed = sharding.rows(mesh)
    one = rows_lib.pack([[]], rows_lib.Layout.of(config, template), 0)

    def of(count: int, like: np.ndarray | None, dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((count, *(like.shape[1:] if like is not None else ())), dtype, sharding=placed)

    return Batch(
        rows=jax.tree.map(lambda array: of(count, array, array.dtype), one),
        product=of(count, None, jnp.int32),
        group=of(count, None, jnp.int32),
        weight=of(size, None, jnp.float32),
        triplet=of(size, None, jnp.int32),
        known=of(size, np.empty((1, -(-(count - size) // 8))), jnp.uint8),
    )


def abstract_state(config: config_lib.Config, rows: object, mesh: jax.sharding.Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the training state."""
    boxed = jax.eval_shape(functools.partial(initial_state, config), rows)
    shardings = sharding.of_variables(mesh, boxed)
    return jax.tree.map(
        lambda leaf, placed: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed), nn.unbox(boxed), shardings
    )


def lower_step(config: config_lib.Config, state: TrainState, batch: Batch) -> jax.stages.Lowered:
    """Lowers the training step for the mesh in use, from an abstract state and batch.

    The devices of the mesh need not exist on this machine.
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    # The state keeps its sharding. Without this, XLA may shard norm scales, which the next step would then reject. The
    # metrics are replicated, so that every process has all of them.
    mesh = batch.weight.sharding.mesh
    out = (shardings, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    jitted = jax.jit(train_step, static_argnames="config", donate_argnames="state", out_shardings=out)
    platform = {"gpu": "cuda"}.get(backend.platform(), backend.platform())
    return jitted.trace(state, batch, config=config).lower(lowering_platforms=(platform,))


def creation(config: config_lib.Config, abstract: TrainState, rows: Any) -> jax.stages.Wrapped:
    """A jitted function from the base model's parameters (arguments of `initial_state`, possibly none) to the state of
    step 0. Every array is created sharded: no host or device ever holds the whole model.

    Args:
        abstract: the result of `abstract_state`.
        rows: abstract rows of the training layout.
    """

    def make(params: dict[str, Any]) -> TrainState:
        blank = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), rows)  # only shapes matter
        return nn.unbox(initial_state(config, blank, **params))

    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    return jax.jit(make, out_shardings=shardings, donate_argnames="params")


def _initialize(
    config: config_lib.Config, opened: workdir_lib.Opened, abstract: TrainState, rows: Any, terminal: progress.Terminal
) -> TrainState:
    """The state of step 0."""
    params: dict[str, Any] = {}
    init = config.training.init
    if opened.base and opened.base.checkpoints:
        theirs = config_lib.read_json(opened.base.files / "config.json")
        # Experts that a dense run starts are copies of its feed-forward.
        upcycled = config.experts.count > 0 and theirs.experts.count == 0
        dense = {"experts.count": 0, "experts.router_term": "none", "language.mlp_width": theirs.language.mlp_width}
        saved_config = config_lib.replace(config, dense) if upcycled else config
        mesh = abstract.step.sharding.mesh
        like = abstract_state(saved_config, rows, mesh).params if upcycled else abstract.params
        with terminal.busy(f"loading {init}"):
            saved = checkpoints_lib.Checkpoints(opened.base.checkpoints)
            found = saved.restore_params(like, terminal.line)
            saved.close()
        if not found:
            raise UserError(f"--init {init}: no checkpoint was saved yet; train it for longer, or give another model")
        params = found[1]
        if upcycled:
            held = weights.Held(Path(init), saved_config, params["encoder"])
            config = config_lib.replace(config, {"language.mlp_width": theirs.language.mlp_width})
            params = params | {"encoder": weights.placed(held, config, abstract.params["encoder"])}
    elif opened.base:
        track = functools.partial(terminal.track, f"loading {init}")
        params = {"encoder": weights.load(opened.base.files, config, abstract.params["encoder"], track)}

    return creation(config, abstract, rows)(params)


def train(
    config: config_lib.Config,
    workdir: str | Path,
    make_evaluate: MakeEvaluate,
    watch: watchdog.Watchdog = watchdog.Watchdog(),  # noqa: B008
) -> Prepared:
    """Trains on `config.data.path` up to step `config.training.steps`; resumes from the newest checkpoint, if any.

    Args:
        config: determines the run. A workdir belongs to one config.
        workdir: a local folder, or gs://bucket/folder. Receives config.json, tokenizer.json, data/, checkpoints/,
            metrics.jsonl, speed.jsonl, tensorboard/ and run.log; without `config.data.path` also catalogue/, the
            synthetic catalogue.
        make_evaluate: makes the function that evaluates every `config.evaluation.every` steps.
        watch: stall warnings and profiler traces.

    Returns:
        The prepared data, for evaluation.

    Raises:
        UserError: the workdir holds a run of another config or of other data; the data cannot be used; or
            `config.training.max_bad_steps` steps in a row were not finite.
        KeyboardInterrupt: a stop was requested; the progress so far is saved.
    """
    if not isinstance(config, config_lib.Config):
        raise UserError(f"config: {config!r} is not a Config; moon_jax.config.load returns one by name")
    store = storage.Store(workdir)
    if jax.distributed.is_initialized():
        interrupt.RELAY.set()
    with interrupt.remembered():
        store.pull()
        try:
            prepared = _train(config, store, make_evaluate, watch)
        except BaseException:
            with contextlib.suppress(UserError):  # report what ended the run, not a failure to push
                store.push()
            raise
        store.push()
    return prepared


def _train(
    config: config_lib.Config, store: storage.Store, make_evaluate: MakeEvaluate, watch: watchdog.Watchdog
) -> Prepared:
    """Opens the workdir, creates or restores the state, compiles, and trains."""
    shared = {name: value for name, value in config_lib.leaves(config).items() if name not in PER_PROCESS}
    distributed.require_equal("config", shared)
    mesh, steps, options, given = sharding.make_mesh(config.mesh), config.training.steps, config.training, config
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.set_mesh(mesh))
        with distributed.fail_together():
            workdir_lib.check(config, store)
            sharding.check(config, mesh)
            held = sharding.share(mesh, config_lib.batch_rows(config))
            # Parameters do not depend on the template, which needs the tokenizer, opened later.
            abstract = abstract_state(config, abstract_batch(config, mesh).rows, mesh)
            optimizer.check(options, abstract.params)
        terminal = progress.Terminal(store.files)
        opened = workdir_lib.open_run(config, store, terminal)
        prepared = opened.prepared
        with distributed.fail_together():
            stack.enter_context(workdir_lib.locked(store))
        checkpoints = stack.enter_context(checkpoints_lib.Checkpoints(store.checkpoints, options))
        restored = checkpoints.restore(abstract, {"data": prepared.fingerprint}, terminal.line)
        start, state = restored or (0, None)
        if start >= steps:
            terminal.line(f"{store} is already trained: its newest checkpoint is of step {start}")
            return prepared
        if restored:
            terminal.line(f"resuming {store} at step {start} of {steps}")
        reader = pipeline.Reader(config, opened.tokenizer)
        if config.data.fit:
            config = pipeline.fitted(config, prepared, reader)
            reader = pipeline.Reader(config, opened.tokenizer)
            fit = config.data
            sizes = f"{fit.text_tokens} text and {fit.visual_tokens} visual tokens each"
            terminal.line(f"inputs fitted to the catalogue: {sizes}")
        placed = abstract_batch(config, mesh, reader.template)
        began = time.monotonic()
        with terminal.busy("compiling the training step"):
            compiled = lower_step(config, abstract, placed).compile(compiler_options=backend.compiler_options())
        compiling = time.monotonic() - began
        if state is None:
            state = _initialize(config, opened, abstract, placed.rows, terminal)
        parameters = sum(leaf.size for leaf in jax.tree.leaves(abstract.params))
        drawn = "" if restored or options.init else ", randomly initialised,"
        processes = f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
        terminal.table(optimizer.table(options, abstract.params))
        terminal.line(
            f"{parameters:,} parameters{drawn} on {mesh.size} {jax.devices()[0].platform} device(s){processes};"
            f" compiled in {compiling:.1f} s"
        )
        evaluate = make_evaluate(given, prepared, opened.tokenizer, mesh) if config.evaluation.every else None
        batches = pipeline.from_step(pipeline.batches(prepared, reader, held), start, config.data.threads)
        put = functools.partial(sharding.place, mesh, held=held)
        run = Run(config, given, store, prepared, checkpoints, compiled, put, evaluate)
        state = _steps(run, state, start, batches, terminal, watch)
    terminal.line(
        f"training step compiled {backend.COMPILATIONS['train_step']} time(s); bad steps: {int(state.bad_steps)}"
    )
    return prepared


@dataclasses.dataclass(frozen=True)
class Run:
    """What stays the same through all steps of a run."""

    config: config_lib.Config
    described: config_lib.Config  # as given, before its rows are fitted to the catalogue
    store: storage.Store
    prepared: Prepared
    checkpoints: checkpoints_lib.Checkpoints
    step: Callable[[TrainState, Batch], tuple[TrainState, dict[str, Any]]]
    put: Callable[[Batch], Batch]  # places a batch on the devices
    evaluate: Evaluate | None


def _steps(
    run: Run,
    state: TrainState,
    start: int,
    batches: Iterator[Batch],
    terminal: progress.Terminal,
    watch: watchdog.Watchdog,
) -> TrainState:
    """Steps, logs, evaluates and saves, until the last step or a requested stop."""
    config, options, store, steps = run.config, run.config.training, run.store, run.config.training.steps
    described = provenance.describe(run.described, run.prepared.fingerprint)
    times = metrics_lib.Times(config, jax.device_count(), start)
    batch, metrics, note = None, None, ""

    def bad_in_a_row(step: int) -> int:
        """Waits for the newest step. Ends the run if too many steps in a row were not finite."""
        count = 0 if metrics is None else int(metrics["bad_in_a_row"])
        if count >= options.max_bad_steps:
            health.dump(config, store.files, state, batch, run.put(batch), run.prepared, step)
            raise UserError(
                f"step {step}: no finite loss, gradient or update for {options.max_bad_steps} steps in a row, all"
                f" skipped; {store}/{health.FILE} lists the last one's triplets and norms; try a lower learning rate"
            )
        return count

    # Not interruptible: a requested stop waits until the end of a step, where the state is saved.
    bar = terminal.progress("training", steps, start, interruptible=False)
    watched = watch.over(store.files, start, steps, terminal.line)
    with contextlib.closing(metrics_lib.MetricLog(store.files, start)) as log, bar as advance, watched as alive:
        for step in range(start, steps):
            alive(step, metrics)
            with times.of("data"):
                following = next(batches)
            with times.of("device"):
                # The device computes one step while the next batch is read. Never run further ahead than that.
                bad_in_a_row(step)
                batch = following
                state, metrics = run.step(state, run.put(batch))
            done = step + 1
            evaluated = run.evaluate is not None and done % config.evaluation.every == 0
            line, best = None, {}
            if done % options.log_every == 0 or done == steps or evaluated:
                with times.of("device"):
                    line = metrics_lib.line(done, jax.device_get(metrics), config)
                line |= {"synthetic": run.prepared.synthetic}
                note = f"loss {line['total']:.3f} at {done}" if line["finite"] else f"step {done} not finite, skipped"
            if evaluated:
                with times.of("evaluation"):
                    scores = run.evaluate(state.params["encoder"])
                line |= {"evaluation": scores}
                best = {checkpoints_lib.BEST: scores[checkpoints_lib.BEST]}
                note += f", {checkpoints_lib.BEST} {scores[checkpoints_lib.BEST]:.1f}"
            if line:  # before the save, so that a run resumed from it finds the line
                log.write(line, times.line(done))
            stopping = distributed.should_stop(done)
            ending = stopping or done == steps
            due = done % options.save_every == 0 or (evaluated and options.keep_best)
            with times.of("checkpoint"):
                # During bad steps do not save: saving the same state again would push older checkpoints out.
                if (due or ending) and (bad_in_a_row(done) == 0 or ending):
                    if distributed.is_primary():
                        store.push()  # first, so that a run resumed from the checkpoint finds all earlier lines
                    run.checkpoints.save(state, done, described, best)
                run.checkpoints.check()
            if stopping:
                run.checkpoints.close()
                terminal.line(f"saved at step {done} of {steps}")
                interrupt.check()
            advance(note=note)
    run.checkpoints.close()
    terminal.line(times.summary())
    return state
