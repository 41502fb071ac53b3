"""The command line. Errors of the user's are one line and exit code 2."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

from moon_jax import config as config_lib
from moon_jax.config import UserError

QUICKSTART = """\
The main job, small: trains MOON2.0 from scratch on a catalogue, evaluates it zero-shot in all nine directions of
text, image and both, and leaves model, metrics and embeddings in the workdir. The same command again resumes.

examples:
  moon-jax quickstart --data catalogue/ --workdir runs/first
  moon-jax quickstart --data products.parquet --workdir runs/short --steps 50
  moon-jax quickstart --data catalogue/ --workdir runs/dense --config.experts.count=0
"""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "moon-jax", description="MOON2.0: multimodal product embeddings.", allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True)
    quickstart = commands.add_parser(
        "quickstart",
        help="train, evaluate and embed a catalogue in minutes",
        description=QUICKSTART,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    quickstart.add_argument("--data", required=True, help="a .parquet or .jsonl file of products, or a folder of them")
    quickstart.add_argument(
        "--workdir", default="moon-jax-quickstart", help="where the run lives (default: %(default)s)"
    )
    quickstart.add_argument(
        "--steps", type=int, help="training steps, in place of the config's; any option of it: --config.a.b=value"
    )
    quickstart.add_argument("--config", default="quickstart", help="a shipped config (quickstart), or a file")
    parsed, overrides = parser.parse_known_args(arguments)
    try:
        run_quickstart(parsed, overrides)
    except UserError as error:
        print(f"moon-jax: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "moon-jax: interrupted; the same command goes on from the newest checkpoint, or anew if there is none yet",
            file=sys.stderr,
        )
        return 130
    return 0


def run_quickstart(parsed: argparse.Namespace, overrides: list[str]) -> None:
    """Trains, evaluates, embeds; every part is skipped or resumed where its result stands already."""
    config = config_lib.replace(config_lib.load(parsed.config), {"data.path": parsed.data})
    if parsed.steps is not None:
        if parsed.steps < 1:
            raise UserError(f"--steps {parsed.steps}: give 1 or more")
        config = config_lib.replace(config, {"training.steps": parsed.steps})
    config = config_lib.override(config, overrides)
    workdir = Path(parsed.workdir)

    # Importing JAX takes seconds; mistakes on the command line are told before.
    from moon_jax.evaluation import retrieval
    from moon_jax.serving import embedder as serving
    from moon_jax.serving.catalogue import write_vectors
    from moon_jax.training import loop, watch

    began = time.monotonic()
    prepared = loop.train(config, workdir)
    report = watch.Watch(workdir)
    embedder = serving.load(workdir)
    count = 2 * len(prepared.val) + len(prepared.val_queries)
    with report.progress("embedding", count) as advance:
        results, (vectors, present) = retrieval.directions(embedder, prepared, advance)
    metrics = {"step": config.training.steps, "model": embedder.fingerprint, "retrieval": results}
    path = workdir / "metrics.json"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(metrics, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(path)
    ids = [prepared.products[index].id for index in prepared.val]
    write_vectors(workdir / "embeddings" / "val.parquet", ids, vectors, present, embedder.fingerprint)
    _show(report, results, workdir, time.monotonic() - began)


def _show(report, results: dict, workdir: Path, seconds: float) -> None:
    from rich.table import Table

    from moon_jax.types import VIEWS

    titles = {
        "products": "the products as queries (altered where query and candidate share a modality)",
        "products_trained_on": "the products as queries, themselves seen in training",
        "queries": "the catalogue's own queries",
    }
    for name, scores in results.items():
        if not scores:
            continue
        sizes = {entry["candidates"] for entry in scores.values()}
        table = Table(title=f"R@1 / R@5 / R@10 in percent: {titles[name]}; {max(sizes):,} candidates")
        table.add_column("query")
        for view in VIEWS:
            table.add_column(f"→ {view}", justify="right", no_wrap=True)
        for query in VIEWS:
            cells = []
            for candidate in VIEWS:
                entry = scores.get(f"{query}→{candidate}")
                cells.append(
                    " / ".join(f"{entry[f'R@{k}']:.1f}".replace("100.0", "100") for k in (1, 5, 10))
                    if entry
                    else "none"
                )
            table.add_row(query, *cells)
        report.console.print(table)
    report.line(f"done in {seconds:.0f} s")
    for what, place in (
        ("model", workdir / "checkpoints"),
        ("training metrics", workdir / "metrics.jsonl"),
        ("retrieval metrics", workdir / "metrics.json"),
        ("embeddings", workdir / "embeddings" / "val.parquet"),
        ("log", workdir / "run.log"),
    ):
        report.line(f"{what + ':':19}{place}")


def console() -> None:
    """What the shell calls."""
    _ask_for_huge_pages()
    sys.exit(main())


def _ask_for_huge_pages() -> None:
    """Restarts this process once with glibc's huge pages on.

    XLA's CPU client maps its buffers anew in every step; with small pages, faulting them in takes a third of the time
    of the quickstart's step. glibc reads the setting only when a process starts. Results do not depend on it.
    """
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


if __name__ == "__main__":
    console()
