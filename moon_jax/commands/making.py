"""The commands that make data and models."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import re
import shlex
import time
from pathlib import Path

from moon_jax import config as config_lib
from moon_jax import interrupt, places
from moon_jax.commands.shared import expand, hush
from moon_jax.config import UserError


def _configured(parsed: argparse.Namespace, overrides: list[str], name: str, init: str = "") -> config_lib.Config:
    """The config of a run: the defaults, what the model to begin from decides, the config's differences, the flags."""
    for flag in ("data", "workdir"):
        if getattr(parsed, flag) == "":
            raise UserError(f"--{flag}: empty; give a path, or leave the flag out")
        given = getattr(parsed, flag) or ""
        if places.is_address(given) and (flag == "data" or parsed.command == "quickstart"):
            hint = "; moon-jax train takes gs://" if flag == "workdir" else ""
            raise UserError(f"--{flag} {given}: not a folder of this machine; mount it, and give that path{hint}")
    if parsed.steps is not None and parsed.steps < 1:
        raise UserError(f"--steps {parsed.steps}: give 1 or more")
    base = {}
    if init:
        base = _begun(init, parsed.workdir)
    config = config_lib.load(name, base)
    given = {"data.path": parsed.data, "training.steps": parsed.steps, "training.init": init}
    config = config_lib.replace(config, {name: value for name, value in given.items() if value})
    return config_lib.override(config, overrides)


def _begun(init: str, workdir: str) -> dict[str, object]:
    """The options that the model to begin from decides. A run that goes on asks its own config, and needs no folder."""
    from moon_jax.hub import folder

    place = places.Place(workdir)
    place.pull(["config.json"])
    own = place.files / "config.json"
    if own.is_file() and config_lib.read_json(own).training.init == init:
        return folder.of_run(own)
    run = folder.run_at(init)
    if run:
        return folder.of_run(run.files / "config.json")
    return folder.settings(folder.locate(init))


def run_train(parsed: argparse.Namespace, overrides: list[str]) -> None:
    """Trains, and nothing else."""
    init = parsed.init or ""
    init = init if places.is_address(init) or not init else str(Path(init))
    config = _configured(parsed, overrides, parsed.config, init)
    from moon_jax import hosts
    from moon_jax.evaluation import training
    from moon_jax.training import watch

    interrupt.check()
    hush()
    workdir = parsed.workdir
    watching = watch.Watching(parsed.profile and watch.parse_profile(parsed.profile), parsed.stall_minutes)
    hosts.start()
    training.train(config, workdir, watching)
    served = f"{Path(workdir).name if places.is_address(workdir) else workdir}-served"
    export = shlex.join(["moon-jax", "export", "--model", workdir, "--output", served])
    watch.Watch().line(f"the model is in {workdir}; to serve it: {export}")


def _processes(parsed: argparse.Namespace) -> int:
    processes = parsed.processes if parsed.processes is not None else len(os.sched_getaffinity(0))
    if processes < 1:
        raise UserError(f"--processes {processes}: give 1 or more")
    return processes


def run_prepare(parsed: argparse.Namespace, overrides: list[str]) -> None:
    """Prepares, with progress, and tells what came of it."""
    expand(parsed, ("hf://", "tfds://"))
    processes = _processes(parsed)
    config = config_lib.override(config_lib.Config(), overrides)
    from moon_jax.data import prepare, workers
    from moon_jax.training import watch

    interrupt.check()
    hush()
    options = prepare.Options.of(config, parsed.columns, parsed.fetch)
    report = watch.Watch()
    pool = functools.partial(workers.pool, processes)
    prepared = prepare.prepare(parsed.data, parsed.output, options, pool, processes, report.progress)
    manifest = prepared.manifest
    for kind, name in (("product", "products"), ("query", "queries"), ("log", "rows of logs")):
        if manifest["read"][kind]:
            report.line(f"{manifest['read'][kind]:,} {name} read, {manifest['kept'][kind]:,} kept")
    report.line(prepared.summary() or "nothing was left out")
    report.line(
        f"{manifest['splits']['train']:,} products to train on, {len(prepared.val):,} to find;"
        f" {len(prepared.triplets):,} triplets, {len(prepared.val_queries):,} queries of the evaluation"
    )
    train = shlex.join(
        ["moon-jax", "train", "--config", "quickstart", "--data", parsed.output, "--workdir", "runs/first"]
    )
    report.line(f"prepared in {parsed.output}; to train: {train}")


def run_augment(parsed: argparse.Namespace, overrides: list[str]) -> None:
    """Augments, with progress, and tells what came of it."""
    if overrides:
        raise UserError(f"{overrides[0]}: augment runs no config; leave this out")
    expand(parsed, ())
    if parsed.beam and parsed.processes is not None:
        raise UserError("--processes: Beam has an option of its own for its workers")
    processes = _processes(parsed)
    if parsed.connections < 1:
        raise UserError(f"--connections {parsed.connections}: give 1 or more")
    from moon_jax.augment import engines, pipeline
    from moon_jax.augment.options import Options
    from moon_jax.data import workers
    from moon_jax.training import watch

    interrupt.check()
    hush()
    options = Options(**{field.name: getattr(parsed, field.name) for field in dataclasses.fields(Options)})
    max_pixels = config_lib.Config().data.max_pixels
    if options.asks_server or options.asks_pipeline:
        processes = 1  # which waits for the server with threads, and has the device to itself
    if parsed.beam:
        engine: engines.Engine = engines.Beam(tuple(f"--{option.removeprefix('--')}" for option in parsed.beam))
        engines.load_beam(engine.arguments)
    else:
        engine = engines.Local(functools.partial(workers.pool, processes), processes)
    report = watch.Watch()
    prepared = pipeline.augment(
        parsed.data, parsed.output, options, max_pixels, engine, parsed.connections, report.progress
    )
    told = prepared.manifest["augmented"]
    for kind, name in (("text", "enriched titles"), ("image", "expanded images")):
        left = ", ".join(f"{count:,} {reason}" for reason, count in told[kind]["left_out"].items()) or "none"
        report.line(f"{name}: {told[kind]['added']:,} added of {told[kind]['made']:,} made; left out: {left}")
        if told[kind]["made"] and not told[kind]["added"]:
            report.line(f"none of the {name} was good enough: {pipeline.RESULTS} tells why, one by one")
    if not options.model:
        report.line("the filter was off: it wants an embedder, --model")
    report.line(f"where each came from: {parsed.output}/{pipeline.RESULTS}")
    report.line(f"some to look at: {parsed.output}/{pipeline.PICTURE}")
    train = shlex.join(
        ["moon-jax", "train", "--config", "quickstart", "--data", parsed.output, "--workdir", "runs/augmented"]
    )
    report.line(f"augmented in {parsed.output}; to train: {train}")


def run_export(parsed: argparse.Namespace, overrides: list[str]) -> None:
    """Writes the folder; with --verify holds it against transformers."""
    if overrides:
        raise UserError(f"{overrides[0]}: a model is exported as it was trained; leave this out")
    output = Path(parsed.output).resolve()
    from moon_jax.hub import export
    from moon_jax.serving import embedder
    from moon_jax.training import watch

    export.refuse_taken(output)
    interrupt.check()
    hush()
    report = watch.Watch()
    trained = embedder.read(parsed.model, track=functools.partial(report.track, "loading"))
    if parsed.dtype:
        trained = embedder.cast(trained, parsed.dtype)
    if parsed.verify:
        from moon_jax.evaluation import verify

        with report.busy("embedding a text, an image and both"):
            asked, ours = verify.ours(trained)
    export.export(trained, output, functools.partial(report.track, "writing"))
    size = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    report.line(f"{output}: {size / 1e6:,.1f} MB")
    if parsed.verify:
        del trained
        with report.busy("embedding them with transformers"):
            cosines = (ours * verify.theirs(output, asked)).sum(axis=1)
        told = ", ".join(
            f"{name} {cosine:.7f}" for name, cosine in zip(("text", "image", "both"), cosines, strict=True)
        )
        report.line(f"cosines of our embeddings and transformers': {told}")
        verify.check(cosines)


def run_plan(parsed: argparse.Namespace, overrides: list[str]) -> None:
    """Compiles one layout after the other, and shows them side by side."""
    config = config_lib.override(config_lib.load(parsed.config), overrides)
    layouts = [config_lib.replace(config, _axes(mesh)) for mesh in parsed.mesh or ()] or [config]
    if parsed.slices < 1 or (parsed.slices > 1 and not parsed.topology):
        raise UserError(f"--slices {parsed.slices}: give 1 or more, and --topology for what each is")
    if parsed.json and not Path(parsed.json).parent.is_dir():
        raise UserError(f"--json {parsed.json}: there is no folder {Path(parsed.json).parent}; make it first")
    if parsed.topology:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")  # libtpu compiles; it shall not look for a TPU
    from moon_jax.training import plan, watch

    report = watch.Watch()
    for one in layouts:  # all mistakes before the first compilation
        plan.check(one, parsed.topology, parsed.slices)
    plans, refused = [], []
    for one in layouts:
        try:
            plans.append(plan.plan(one, parsed.config, parsed.topology, parsed.slices, report.busy))
        except UserError as error:  # of one layout that does not fit a chip; the others are told all the same
            refused.append(error)
    if not plans:
        raise refused[0]
    report.console.print(plan.table(plans))
    for error in refused:
        report.line(str(error))
    if parsed.json:
        text = json.dumps([plan.to_json(one) for one in plans], indent=2) + "\n"
        Path(parsed.json).write_text(text, encoding="utf-8")


def _axes(mesh: str) -> dict[str, object]:
    """Options of the mesh from data=-1,fsdp=4; the axes that are not named are 1."""
    axes = {f"mesh.{axis}": 1 for axis in ("data", "fsdp", "expert", "tensor")}
    for part in mesh.split(","):
        axis, _, size = part.partition("=")
        if f"mesh.{axis}" not in axes or not re.fullmatch(r"-?\d+", size):
            raise UserError(
                f"--mesh {mesh}: {part} is not understood; write data=-1,fsdp=4,expert=4,tensor=1 or part of it"
            )
        axes[f"mesh.{axis}"] = int(size)
    return axes


def run_quickstart(parsed: argparse.Namespace, overrides: list[str]) -> None:
    """Trains, judges, embeds; training is skipped or resumed where its result stands already."""
    config = _configured(parsed, overrides, parsed.config or "quickstart")
    workdir = Path(parsed.workdir)

    # Importing JAX takes seconds; mistakes on the command line are told before.
    from moon_jax.evaluation import report as report_lib
    from moon_jax.evaluation import screen, training
    from moon_jax.serving import embedder as serving
    from moon_jax.training import watch

    interrupt.check()
    hush()
    began = time.monotonic()
    prepared = training.train(config, workdir)
    report = watch.Watch(workdir)
    metrics = report_lib.evaluate(serving.load(workdir), prepared, workdir, report)
    for table in screen.tables(metrics):
        report.console.print(table)
    given = {"--data": parsed.data, "--steps": parsed.steps, "--config": parsed.config}
    words = [str(word) for flag, value in given.items() if value for word in (flag, value)]
    again = ["moon-jax", "quickstart", *words, *overrides]
    for heading, lines in screen.last_screen(metrics, workdir, prepared, again):
        report.heading(heading)
        for line in lines:
            report.line(line)
    report.line(f"done in {time.monotonic() - began:.0f} s")
