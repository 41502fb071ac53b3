"""What each command does: reads its flags, calls the part that does the work, and tells what came of it."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import logging
import os
import re
import shlex
import sys
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from moon_jax import config as config_lib
from moon_jax import interrupt, places
from moon_jax.config import UserError

if TYPE_CHECKING:
    from moon_jax.evaluation import harness


def _hush() -> None:
    """What Orbax, its tasks and gcsfs log as an error comes to us as an exception, and is told in one line; what Pillow
    warns of in a broken image is in the quarantine.
    """
    warnings.filterwarnings("ignore", module="PIL")
    for name in ("absl", "asyncio", "gcsfs"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    sys.unraisablehook = _but_of_closed_loops


def _but_of_closed_loops(unraisable: sys.UnraisableHookArgs) -> None:
    """TensorStore's threads still report to Orbax when that has given a damaged checkpoint, or a full disk, up."""
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


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
    _hush()
    workdir = parsed.workdir
    watching = watch.Watching(parsed.profile and watch.parse_profile(parsed.profile), parsed.stall_minutes)
    hosts.start()
    training.train(config, workdir, watching)
    served = f"{Path(workdir).name if places.is_address(workdir) else workdir}-served"
    export = shlex.join(["moon-jax", "export", "--model", workdir, "--output", served])
    watch.Watch().line(f"the model is in {workdir}; to serve it: {export}")


def _expand(parsed: argparse.Namespace, addresses: tuple[str, ...]) -> None:
    """Data and output as paths of this machine, but for data at one of these kinds of addresses."""
    for flag in ("data", "output"):
        given = getattr(parsed, flag)
        if not given:
            raise UserError(f"--{flag}: empty; give a path")
        if places.is_address(given) and not given.startswith(addresses):
            raise UserError(f"--{flag} {given}: not a folder of this machine; mount it, and give that path")
        # As a shell leaves it in --output=~/x.
        setattr(parsed, flag, os.path.expanduser(given))


def _processes(parsed: argparse.Namespace) -> int:
    processes = parsed.processes if parsed.processes is not None else len(os.sched_getaffinity(0))
    if processes < 1:
        raise UserError(f"--processes {processes}: give 1 or more")
    return processes


def run_prepare(parsed: argparse.Namespace, overrides: list[str]) -> None:
    """Prepares, with progress, and tells what came of it."""
    _expand(parsed, ("hf://", "tfds://"))
    processes = _processes(parsed)
    config = config_lib.override(config_lib.Config(), overrides)
    from moon_jax.data import prepare, workers
    from moon_jax.training import watch

    interrupt.check()
    _hush()
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
    _expand(parsed, ())
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
    _hush()
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
    _hush()
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
    from moon_jax.evaluation import training
    from moon_jax.serving import embedder as serving
    from moon_jax.training import watch

    interrupt.check()
    _hush()
    began = time.monotonic()
    prepared = training.train(config, workdir)
    report = watch.Watch(workdir)
    metrics = report_lib.evaluate(serving.load(workdir), prepared, workdir, report)
    for table in report_lib.tables(metrics):
        report.console.print(table)
    given = {"--data": parsed.data, "--steps": parsed.steps, "--config": parsed.config}
    words = [str(word) for flag, value in given.items() if value for word in (flag, value)]
    again = ["moon-jax", "quickstart", *words, *overrides]
    for heading, lines in report_lib.last_screen(metrics, workdir, prepared, again):
        report.heading(heading)
        for line in lines:
            report.line(line)
    report.line(f"done in {time.monotonic() - began:.0f} s")


def run_evaluate(parsed: argparse.Namespace, overrides: list[str]) -> None:
    """Judges a model, or vectors, and compares it with another."""
    if bool(parsed.model) == bool(parsed.vectors):
        raise UserError("--model: give a model, or --vectors; one of the two")
    _expand(parsed, ())
    if parsed.known < 0:
        raise UserError(f"--known {parsed.known}: give 0 or more")
    if bool(parsed.queries) != bool(parsed.qrels):
        raise UserError("--queries: go with --qrels; give both or neither")
    prompts = parsed.prompt or ["{}"]
    for prompt in prompts:
        if prompt.count("{}") != 1:
            raise UserError(f"--prompt {prompt!r}: write {{}} where the label belongs, once")
    config = config_lib.override(config_lib.Config(), [*overrides, f"--config.data.path={parsed.data!r}"])
    from moon_jax.evaluation import report as report_lib
    from moon_jax.training import watch, workdir

    interrupt.check()
    _hush()
    output = places.Place(parsed.output)
    report = watch.Watch(output.files)
    with report.busy("opening the model"):
        ours = _opened(parsed.model, parsed.vectors, config)
    prepared = workdir.prepare_data(config, output, report)
    prepared = workdir.keep_data(prepared, output.files / "data", output)
    said = {"known": parsed.known, "prompts": prompts}
    if parsed.queries:
        from moon_jax.data import columns
        from moon_jax.evaluation import judged as judged_lib

        with report.busy("reading queries and judgements"):
            own = columns.load(parsed.columns)
            judged = judged_lib.read(parsed.queries, parsed.qrels, prepared, own, config.data.max_pixels)
        if parsed.vectors and judged.shared:
            raise UserError(f"--vectors: {judged.shared!r} is a query's id and a product's; call one of them otherwise")
        prepared, said["judgements"] = judged.prepared, judged.relevance
        report.line(f"{judged.relevance.queries:,} queries; left out: {judged.left_out or 'nothing'}")
    other = Path(parsed.compare).expanduser()
    judged_before = bool(parsed.compare) and report_lib.is_judged(other)
    if judged_before:
        report_lib.check_comparable(other, prepared.fingerprint)
    metrics = report_lib.evaluate(ours, prepared, output.files, report, **said)
    for table in (*report_lib.tables(metrics), *report_lib.details(metrics)):
        report.console.print(table)
    if parsed.compare:
        if not judged_before:
            theirs = _opened(parsed.compare, "", config)
            other = output.files / "compared"
            report.line(f"{theirs.name}, to compare with:")
            report_lib.evaluate(theirs, prepared, other, watch.Watch(other), **said)
        compared = report_lib.compare(output.files, other)
        for table in report_lib.differences(compared, parsed.model or parsed.vectors, parsed.compare):
            report.console.print(table)
        told = json.dumps(compared, indent=2, ensure_ascii=False) + "\n"
        (output.files / "compared.json").write_text(told, encoding="utf-8")
    report.line(
        f"all scores: {parsed.output}/{report_lib.METRICS}; of every query: {parsed.output}/{report_lib.QUERIES}"
    )


def run_embed(parsed: argparse.Namespace, overrides: list[str]) -> None:
    """Embeds a prepared catalogue."""
    if overrides:
        raise UserError(f"{overrides[0]}: embed runs no config; leave this out")
    _expand(parsed, ())
    from moon_jax.data import prepared as prepared_lib
    from moon_jax.serving import catalogue
    from moon_jax.training import watch

    interrupt.check()
    _hush()
    if not prepared_lib.is_prepared(parsed.data):
        made = shlex.join(
            ["moon-jax", "prepare", "--data", parsed.data, "--output", f"{parsed.data.rstrip('/')}-prepared"]
        )
        raise UserError(f"--data {parsed.data}: not prepared data; this makes it: {made}")
    options = catalogue.Options(tuple(parsed.views.split(",")), parsed.dtype, parsed.width)
    report = watch.Watch()
    with report.busy("opening the model"):
        embedder = _opened(parsed.model, "", config_lib.Config())
        if hasattr(embedder, "rank"):
            raise UserError(f"--model {parsed.model}: makes no vectors; give another")
    prepared = prepared_lib.open_prepared(parsed.data)
    manifest = catalogue.embed(embedder, prepared, parsed.output, options, report.progress)
    size = sum(shard["bytes"] for shard in manifest["shards"])
    report.line(
        f"{manifest['rows']:,} vectors of {manifest['products']:,} products, {manifest['width']} × {manifest['dtype']},"
        f" {size / 1e6:,.1f} MB"
    )
    search = shlex.join(["moon-jax", "search", "--index", parsed.output, "--model", parsed.model, "--text", "red shoe"])
    report.line(f"embedded in {parsed.output}; to search: {search}")


def _readable(parsed: argparse.Namespace, *flags: str) -> None:
    """Refuses bytes that are no text: a shell hands them on as they are."""
    for flag in flags:
        try:
            getattr(parsed, flag.replace("-", "_")).encode()
        except UnicodeEncodeError:
            raise UserError(f"--{flag}: not UTF-8; give text in that encoding") from None


def run_search(parsed: argparse.Namespace, overrides: list[str]) -> None:
    """Searches, and shows what it found."""
    if overrides:
        raise UserError(f"{overrides[0]}: search runs no config; leave this out")
    if not (parsed.text.strip() or parsed.image or parsed.faiss):
        raise UserError("--text: give a text, an --image, or both")
    _readable(parsed, "text")
    if parsed.k < 1:
        raise UserError(f"-k {parsed.k}: give 1 or more")
    from moon_jax.serving import search
    from moon_jax.training import watch
    from moon_jax.types import Product

    _hush()
    report = watch.Watch()
    index = search.Index(parsed.index, parsed.view)
    if parsed.faiss:
        index.write_faiss(parsed.faiss)
        report.line(f"{len(index):,} vectors in {parsed.faiss}, their ids in {parsed.faiss}.ids.json")
    if parsed.text.strip() or parsed.image:
        if not parsed.model:
            raise UserError(f"--model: give the model whose vectors these are ({index.model})")
        embedder = _opened(parsed.model, "", config_lib.Config())
        item = Product(text=parsed.text.strip() or None, images=(parsed.image,) if parsed.image else ())
        [found] = index.search(embedder, [item], parsed.k)
        for rank, (identity, score) in enumerate(found, start=1):
            report.line(f"{rank:3}  {score:.4f}  {identity}")


def run_heatmap(parsed: argparse.Namespace, overrides: list[str]) -> None:
    """Draws where models look in a query, an item, or both."""
    if overrides:
        raise UserError(f"{overrides[0]}: heatmap runs no config; leave this out")
    _readable(parsed, "text", "item-text")
    asked = {"query": (parsed.text.strip(), parsed.image), "item": (parsed.item_text.strip(), parsed.item_image)}
    if not any(part for parts in asked.values() for part in parts):
        raise UserError("--text: give a text, an --image, or both; --item-text and --item-image for what is compared")
    if parsed.shares and not all(any(parts) for parts in asked.values()):
        raise UserError("--shares: of the similarity of two; give a query and an item")
    output = Path(parsed.output).expanduser()
    if output.suffix != ".png":
        raise UserError(f"--output {output}: give a file that ends in .png")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {output}: {error.strerror}; give a file in a folder that can be made") from None
    from moon_jax.evaluation import heatmap
    from moon_jax.serving import embedder as serving
    from moon_jax.training import watch
    from moon_jax.types import Product

    _hush()
    report = watch.Watch()
    items = {
        name: Product(text=text or None, images=(image,) if image else ())
        for name, (text, image) in asked.items()
        if text or image
    }
    columns, arrays = [], {}
    for number, model in enumerate([parsed.model, parsed.compare] if parsed.compare else [parsed.model]):
        with report.busy(f"looking with {model}"):
            embedder = serving.load(model)
            shown = heatmap.seen(embedder, items, parsed.layer, parsed.head, parsed.shares)
        arrays |= {f"{number}/{name}": entry[2] for name, entry in zip(items, shown, strict=True)}
        columns.append((f"{model} ({embedder.fingerprint})", shown))
    layer, head = ("mean" if number is None else number for number in (parsed.layer, parsed.head))
    which = "shares of tokens in the similarity" if parsed.shares else f"attention, layer {layer}, head {head}"
    footer = f"{which}; bright, and of words dark, is most"
    heatmap.draw(output, columns, config_lib.Config().data.max_pixels, footer)
    heatmap.save(output.with_suffix(".npz"), arrays)
    report.line(f"{output}; all layers and heads as arrays: {output.with_suffix('.npz')}")


def _opened(model: str, vectors: str, config: config_lib.Config) -> harness.Embedder:
    """An embedder of any kind; one of ours on all devices."""
    from moon_jax.evaluation import harness

    if vectors:
        return harness.Vectors(vectors)
    found = harness.open_embedder(model, config.data.max_pixels)
    return found.on_all_devices() if hasattr(found, "on_all_devices") else found


COMMANDS = {
    "quickstart": run_quickstart,
    "prepare": run_prepare,
    "augment": run_augment,
    "train": run_train,
    "export": run_export,
    "plan": run_plan,
    "evaluate": run_evaluate,
    "embed": run_embed,
    "search": run_search,
    "heatmap": run_heatmap,
}
