"""The commands that ask a model: how good it is, what a catalogue's vectors are, what is like what, where it looks."""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from moon_jax import config as config_lib
from moon_jax import interrupt, places
from moon_jax.commands.shared import expand, hush
from moon_jax.config import UserError

if TYPE_CHECKING:
    from moon_jax.evaluation.harness import Embedder


def run_evaluate(parsed: argparse.Namespace, overrides: list[str]) -> None:
    """Judges a model, or vectors, and compares it with another."""
    if bool(parsed.model) == bool(parsed.vectors):
        raise UserError("--model: give a model, or --vectors; one of the two")
    expand(parsed, ())
    if parsed.known < 0:
        raise UserError(f"--known {parsed.known}: give 0 or more")
    if bool(parsed.queries) != bool(parsed.qrels):
        raise UserError("--queries, --qrels: they go together; give both or neither")
    if not parsed.queries and parsed.columns != "own":
        raise UserError(f"--columns {parsed.columns}: of --queries and --qrels; of --data, moon-jax prepare takes it")
    if parsed.queries and parsed.prompt:
        raise UserError("--prompt: of labels, which are not told with --queries; leave it out")
    other = Path(parsed.compare).expanduser()
    if parsed.compare and other.resolve() == Path(parsed.output).resolve():
        raise UserError(f"--compare {parsed.compare}: is the output as well; give another output")
    prompts = parsed.prompt or ["{}"]
    for prompt in prompts:
        if prompt.count("{}") != 1:
            raise UserError(f"--prompt {prompt!r}: write {{}} where the label belongs, once")
    config = config_lib.override(config_lib.Config(), [*overrides, f"--config.data.path={parsed.data!r}"])
    if not Path(parsed.data).exists():
        raise UserError(f"--data {parsed.data}: no such file or folder")
    from moon_jax.evaluation import harness, screen
    from moon_jax.evaluation import report as report_lib
    from moon_jax.training import watch, workdir

    interrupt.check()
    hush()
    output = places.Place(parsed.output)
    older = report_lib.check_output(output.files)
    log = None
    if parsed.queries:
        from moon_jax.data import columns
        from moon_jax.evaluation import judged as judged_lib

        log = judged_lib.read(parsed.queries, parsed.qrels, columns.load(parsed.columns), config.data.max_pixels)
    report = watch.Watch(output.files)
    with report.busy("opening the model" if parsed.model else "reading the vectors"):
        ours = harness.Vectors(parsed.vectors) if parsed.vectors else _opened("--model", parsed.model, config)
    prepared = workdir.prepare_data(config, output, report)
    prepared = workdir.keep_data(prepared, output.files / "data", output)
    said = {"known": parsed.known, "prompts": prompts}
    if log:
        judged = judged_lib.of(log, prepared)
        if parsed.vectors and judged.shared:
            raise UserError(f"--vectors: {judged.shared!r} is a query's id and a product's; call one of them otherwise")
        prepared, said["judgements"] = judged.prepared, judged.relevance
        number = judged.relevance.queries
        report.line(
            f"{number:,} {'query' if number == 1 else 'queries'} to be asked; left out: {judged.left_out or 'nothing'}"
        )
    judged_before = bool(parsed.compare) and report_lib.is_judged(other)
    if judged_before:
        report_lib.check_comparable(other, prepared.fingerprint)
    if older:
        report.line(f"the older scores in {output} give way")
    metrics = report_lib.evaluate(ours, prepared, output.files, report, **said)
    compared_before = output.files / "compared"
    if other.resolve() != compared_before.resolve():
        shutil.rmtree(compared_before, ignore_errors=True)
    for table in (*screen.tables(metrics), *screen.details(metrics)):
        report.console.print(table)
    if parsed.compare:
        if not judged_before:
            theirs = _opened("--compare", parsed.compare, config)
            other = output.files / "compared"
            report.line(f"{theirs.name}, to compare with:")
            report_lib.evaluate(theirs, prepared, other, watch.Watch(other), **said)
        report.line(f"scores of {parsed.compare}, {other}/{report_lib.METRICS}:")
        for table in screen.tables(report_lib.read(other)[0]):
            report.console.print(table)
        compared = report_lib.compare(output.files, other)
        for table in screen.differences(compared, parsed.model or parsed.vectors, parsed.compare):
            report.console.print(table)
        told = json.dumps(compared, indent=2, ensure_ascii=False) + "\n"
        (output.files / report_lib.COMPARED).write_text(told, encoding="utf-8")
        alone = screen.not_compared(compared, metrics)
        if alone:
            report.line(f"not compared, for the other had not the same queries and candidates: {alone}")
    report.line(
        f"all scores: {parsed.output}/{report_lib.METRICS}; of every query: {parsed.output}/{report_lib.QUERIES}"
    )


def run_embed(parsed: argparse.Namespace, overrides: list[str]) -> None:
    """Embeds a prepared catalogue."""
    if overrides:
        raise UserError(f"{overrides[0]}: embed runs no config; leave this out")
    expand(parsed, ())
    from moon_jax.data import prepared as prepared_lib
    from moon_jax.serving import catalogue
    from moon_jax.training import watch

    interrupt.check()
    hush()
    if not Path(parsed.data).is_dir():
        raise UserError(f"--data {parsed.data}: no such folder")
    if not prepared_lib.is_prepared(parsed.data):
        made = shlex.join(
            ["moon-jax", "prepare", "--data", parsed.data, "--output", f"{parsed.data.rstrip('/')}-prepared"]
        )
        raise UserError(f"--data {parsed.data}: not prepared data; this makes it: {made}")
    options = catalogue.Options(tuple(parsed.views.split(",")), parsed.dtype, parsed.width)
    report = watch.Watch()
    with report.busy("opening the model"):
        embedder = _opened("--model", parsed.model, config_lib.Config())
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

    hush()
    report = watch.Watch()
    index = search.Index(parsed.index, parsed.view)
    if parsed.faiss:
        index.write_faiss(parsed.faiss)
        report.line(f"{len(index):,} vectors in {parsed.faiss}, their ids in {parsed.faiss}.ids.json")
    if parsed.text.strip() or parsed.image:
        if not parsed.model:
            raise UserError(f"--model: give the model whose vectors these are ({index.model})")
        item = Product(text=parsed.text.strip() or None, images=_image("--image", parsed.image))
        embedder = _opened("--model", parsed.model, config_lib.Config())
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
    if parsed.shares and (parsed.layer, parsed.head) != (None, None):
        raise UserError("--shares: are of no layer or head; leave --layer and --head out")
    output = Path(parsed.output).expanduser()
    if output.suffix != ".png":
        raise UserError(f"--output {output}: give a file that ends in .png")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {output}: {error.strerror}; give a file in a folder that can be made") from None
    from moon_jax.evaluation import heatmap
    from moon_jax.training import watch
    from moon_jax.types import Product

    hush()
    report = watch.Watch()
    items = {
        name: Product(text=text or None, images=_image(flag, image))
        for (name, (text, image)), flag in zip(asked.items(), ("--image", "--item-image"), strict=True)
        if text or image
    }
    if len(items) == 1:  # compared with nothing
        items = {"item": next(iter(items.values()))}
    columns, arrays = [], {}
    for number, model in enumerate([parsed.model, parsed.compare] if parsed.compare else [parsed.model]):
        with report.busy(f"looking with {model}"):
            embedder = _ours("--compare" if number else "--model", model)
            shown = heatmap.seen(embedder, items, parsed.layer, parsed.head, parsed.shares)
        arrays |= {f"{number}/{name}": entry for name, entry in zip(items, shown, strict=True)}
        columns.append((f"{Path(model).name}\nmodel {embedder.fingerprint}", shown))
    layer, head = ("mean" if number is None else number for number in (parsed.layer, parsed.head))
    which = "what each token adds to the cosine" if parsed.shares else f"attention, layer {layer}, head {head}"
    footer = f"{which}; of patches and the title's tokens, not of the template's"
    heatmap.draw(output, columns, config_lib.Config().data.max_pixels, footer, parsed.shares)
    heatmap.save(output.with_suffix(".npz"), arrays)
    report.line(f"{output}; what is drawn, and all layers and heads, as arrays: {output.with_suffix('.npz')}")


def _opened(flag: str, model: str, config: config_lib.Config) -> Embedder:
    """An embedder of any kind; one of ours on all devices."""
    from moon_jax.evaluation import harness

    found = harness.open_embedder(model, config.data.max_pixels, flag)
    return found.on_all_devices() if hasattr(found, "on_all_devices") else found


def _ours(flag: str, model: str) -> Embedder:
    """A model of ours."""
    from moon_jax.evaluation import baselines
    from moon_jax.serving import embedder

    if model in baselines.NAMES and not Path(model).exists():
        raise UserError(f"{flag} {model}: cannot be looked into; give a model of ours, or of Qwen3-VL")
    try:
        return embedder.load(model)
    except UserError as error:
        raise type(error)(f"{flag} {error}") from None


def _image(flag: str, given: str) -> tuple[str, ...]:
    """The image of a flag, as a product has it.

    Raises:
        UserError: it cannot be read.
    """
    from moon_jax.data.images import BadImage, decode

    try:
        if given:
            decode(given, config_lib.Config().data.max_pixels)
    except BadImage as error:
        raise UserError(f"{flag} {error}") from None
    return (given,) if given else ()
