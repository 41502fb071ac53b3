"""moon-jax evaluate: evaluates any model on a catalogue."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from moon_jax import config as config_lib
from moon_jax import interrupt, storage
from moon_jax.commands.shared import expand, opened, silence_libraries
from moon_jax.errors import UserError

HELP = "evaluate a model of any kind"

DESCRIPTION = """\
Evaluates a model on the held-out products of a catalogue: retrieval in all directions of text, image and both;
categories and attributes by label text, by nearest neighbours and by a linear probe. --model is a workdir, a Hugging
Face folder (ours, Qwen3-VL, Qwen3-VL-Embedding, CLIP, SigLIP, SigLIP 2 or sentence-transformers), or one of the
baselines bm25 and colours. --vectors evaluates precomputed vectors. docs/evaluation.md describes the measures.

examples:
  moon-jax evaluate --model runs/first --data prepared --output scores/first
  moon-jax evaluate --model models/siglip2 --data catalogue/ --output scores/siglip2
  moon-jax evaluate --model runs/first --data prepared --output scores/first --compare bm25
  moon-jax evaluate --model runs/first --data prepared --output scores/first --compare scores/siglip2
  moon-jax evaluate --vectors vectors/ --data prepared --output scores/theirs
  moon-jax evaluate --model runs/first --data prepared --output scores/log --queries queries.jsonl --qrels qrels.tsv
  moon-jax evaluate --model models/clip --data prepared --output scores/clip --prompt 'a photo of {}' --prompt '{}'
"""

AFTER_STOP = "starts from scratch"
"""What the same command does after it was interrupted."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="", help="a workdir, a Hugging Face folder, hf://…, bm25 or colours")
    parser.add_argument("--vectors", default="", help="instead of a model: Parquet files with id, view and vector")
    parser.add_argument("--data", required=True, help="prepared data, or a file or folder of products")
    parser.add_argument("--output", required=True, help="a folder for scores, pictures and vectors")
    parser.add_argument("--compare", default="", help="another model, or the output of its evaluation")
    parser.add_argument("--queries", default="", metavar="FILE", help="your own queries, instead of generated ones")
    parser.add_argument(
        "--qrels", default="", metavar="FILE", help="relevant products of the queries, optionally graded"
    )
    parser.add_argument("--columns", default="own", help="column map of these two files: own (default), beir or a file")
    parser.add_argument(
        "--probe-products",
        type=int,
        default=2000,
        help="training products that the neighbours and the linear probe are fitted on (default: %(default)s)",
    )
    parser.add_argument("--prompt", action="append", help="template of a label's text; {} stands for the label")


def run(parsed: argparse.Namespace, overrides: list[str]) -> None:
    """Evaluates a model, or vectors, and compares it with another."""
    if bool(parsed.model) == bool(parsed.vectors):
        raise UserError("--model: give a model, or --vectors; one of the two")
    expand(parsed, ())
    if parsed.probe_products < 0:
        raise UserError(f"--probe-products {parsed.probe_products}: give 0 or more")
    if bool(parsed.queries) != bool(parsed.qrels):
        raise UserError("--queries, --qrels: give both or neither")
    if not parsed.queries and parsed.columns != "own":
        raise UserError(
            f"--columns {parsed.columns}: applies to --queries and --qrels; for --data, use moon-jax prepare --columns"
        )
    if parsed.queries and parsed.prompt:
        raise UserError("--prompt: applies to labels, which are not evaluated with --queries; leave it out")
    other = Path(parsed.compare).expanduser()
    if parsed.compare and other.resolve() == Path(parsed.output).resolve():
        raise UserError(f"--compare {parsed.compare}: is also the output; give another output")
    prompts = parsed.prompt or ["{}"]
    for prompt in prompts:
        if prompt.count("{}") != 1:
            raise UserError(f"--prompt {prompt!r}: write {{}} once, where the label belongs")
    config = config_lib.override(config_lib.Config(), [*overrides, f"--config.data.path={parsed.data!r}"])
    if not Path(parsed.data).exists():
        raise UserError(f"--data {parsed.data}: no such file or folder")
    from moon_jax import progress
    from moon_jax.embedders.vectors import Vectors
    from moon_jax.evaluation import report as report_lib
    from moon_jax.evaluation import tables
    from moon_jax.training import workdir

    interrupt.check()
    silence_libraries()
    output = storage.Store(parsed.output)
    older = report_lib.check_output(output.files)
    log = None
    if parsed.queries:
        from moon_jax.evaluation import qrels as qrels_lib
        from moon_jax.ingest import columns

        log = qrels_lib.read(parsed.queries, parsed.qrels, columns.load(parsed.columns), config.data.max_pixels)
    terminal = progress.Terminal(output.files)
    with terminal.busy("opening the model" if parsed.model else "reading the vectors"):
        ours = Vectors(parsed.vectors) if parsed.vectors else opened("--model", parsed.model, config)
    prepared = workdir.prepare_data(config, output, terminal)
    prepared = workdir.keep_data(prepared, output.files / "data", output)
    options = {"probe_products": parsed.probe_products, "prompts": prompts}
    if log:
        own = qrels_lib.collection(log, prepared)
        if parsed.vectors and own.shared:
            raise UserError(f"--vectors: {own.shared!r} is the id of a query and of a product; rename one of them")
        prepared, options["qrels"] = own.prepared, own.qrels
        number = own.qrels.queries
        terminal.line(
            f"{number:,} {'query' if number == 1 else 'queries'} evaluated; left out: {own.left_out or 'nothing'}"
        )
    evaluated_before = bool(parsed.compare) and report_lib.is_evaluated(other)
    if evaluated_before:
        report_lib.check_comparable(other, prepared.fingerprint)
    if older:
        terminal.line(f"replacing the older scores in {output}")
    metrics = report_lib.evaluate(ours, prepared, output.files, terminal, **options)
    compared_before = output.files / "compared"
    if other.resolve() != compared_before.resolve():
        shutil.rmtree(compared_before, ignore_errors=True)
    for table in (*tables.scores(metrics), *tables.details(metrics)):
        terminal.table(table)
    if parsed.compare:
        if not evaluated_before:
            theirs = opened("--compare", parsed.compare, config)
            other = output.files / "compared"
            terminal.line(f"comparing with {theirs.name}:")
            report_lib.evaluate(theirs, prepared, other, progress.Terminal(other), **options)
        terminal.line(f"scores of {parsed.compare}, {other}/{report_lib.METRICS}:")
        for table in tables.scores(report_lib.read(other)[0]):
            terminal.table(table)
        compared = report_lib.compare(output.files, other)
        for table in tables.differences(compared, parsed.model or parsed.vectors, parsed.compare):
            terminal.table(table)
        content = json.dumps(compared, indent=2, ensure_ascii=False) + "\n"
        (output.files / report_lib.COMPARED).write_text(content, encoding="utf-8")
        alone = tables.not_compared(compared, metrics)
        if alone:
            terminal.line(f"not compared, since queries or candidates differ: {alone}")
    terminal.line(f"scores: {parsed.output}/{report_lib.METRICS}; per query: {parsed.output}/{report_lib.QUERIES}")
