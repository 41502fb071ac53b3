"""A run's workdir: its config, base model, tokenizer and data.

All processes of a run see the same folder. The first process writes; the others read what it wrote.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from etils import epath

from moon_jax import config as config_lib
from moon_jax import distributed, interrupt, outputs, progress, storage
from moon_jax.data import prepared as prepared_lib
from moon_jax.data import text
from moon_jax.errors import Unavailable, UserError
from moon_jax.hub import folder, weights
from moon_jax.ingest import prepare, sources, synthetic
from moon_jax.ingest.files import Source
from moon_jax.training import checkpoints

LOCK_SECONDS = 5
"""How long a run waits for a previous one to end."""

FREE = ("data.path", "data.threads", "mesh.", "training.save_every", "training.keep", "training.max_bad_steps")
"""Prefixes of options that may change when a run resumes: they do not affect its results."""


def check(config: config_lib.Config, store: storage.Store) -> None:
    """Checks that the workdir is writable, and empty or of this config (apart from options in FREE).

    The data is checked later, by its fingerprint (`keep_data`).

    Raises:
        UserError: it is not.
    """
    workdir = store.files
    path = workdir / "config.json"
    there = next(folder for folder in (workdir, *workdir.absolute().parents) if folder.exists())
    try:
        with tempfile.TemporaryFile(dir=there) as probe:
            probe.write(b"0")
    except OSError as error:
        raise UserError(f"--workdir {store}: {there}: {error.strerror}; give a writable folder") from None
    if not path.exists():
        others = [entry.name for entry in workdir.iterdir()] if workdir.is_dir() else []
        others += ["checkpoints"] if store.remote and store.checkpoints.is_dir() else []
        ours = lambda name: name in ("catalogue", "run.log") or name.endswith(".tmp") or name.startswith(".")  # noqa: E731
        others = sorted(name for name in others if not ours(name))
        if others:
            raise UserError(f"--workdir {store}: holds {others[0]} but no run; give a new or empty folder")
        return
    held = config_lib.leaves(config_lib.read_json(path))
    if bool(held["data.path"]) != bool(config.data.path):
        what = f"--data {held['data.path']}" if held["data.path"] else "the synthetic catalogue, without --data"
        raise UserError(f"--workdir {store}: holds a run on {what}; give the same, or use another workdir")
    for name, value in config_lib.leaves(config).items():
        if held[name] != value and not name.startswith(FREE):
            further = name == "training.steps" and value > held[name]
            remedy = f"to train further, --init {store} in another workdir" if further else "use another workdir"
            raise UserError(
                f"--workdir {store}: holds a run with config.{name} = {held[name]!r}, not {value!r}; {remedy}"
            )


@contextlib.contextmanager
def locked(store: storage.Store) -> Iterator[None]:
    """Locks the workdir against other runs, on this machine or any other that shares the folder.

    It is a file lock, which the system releases however the process ends. In a bucket, and on a file system without
    locks, there is none.

    Raises:
        Unavailable: another run is using the workdir.
    """
    if store.remote or not distributed.is_primary():
        yield
        return
    store.files.mkdir(parents=True, exist_ok=True)
    with (store.files / ".lock").open("a") as file:
        for patience in reversed(range(LOCK_SECONDS)):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not patience:
                    raise Unavailable(
                        f"--workdir {store}: another process is training there; wait for it, stop it, or use another"
                        " workdir"
                    ) from None
                time.sleep(1)
            except OSError:
                break
            else:
                break
        yield


def claim(config: config_lib.Config, workdir: Path) -> None:
    """Writes config.json, unless it exists: from then on the workdir belongs to this config.

    Raises:
        UserError: the folder is not writable.
    """
    path = workdir / "config.json"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            temporary = path.with_suffix(".tmp")
            temporary.write_text(config_lib.to_json(config), encoding="utf-8")
            temporary.replace(path)
    except OSError as error:
        raise UserError(f"--workdir {workdir}: {error.strerror}; give a writable folder") from None


@dataclasses.dataclass(frozen=True)
class Base:
    """The model that a run starts from."""

    files: Path  # a Hugging Face folder, or the files of another run's workdir
    checkpoints: epath.Path | None = None  # of another run


def base_of(config: config_lib.Config, store: storage.Store, terminal: progress.Terminal) -> Base | None:
    """The model of `training.init`; None if that is empty, or if the run resumes from its own checkpoint.

    Raises:
        UserError: no such folder, or the sizes of its model differ from the config's.
    """
    init = config.training.init
    if not init or checkpoints.steps(store.checkpoints):
        return None
    run = folder.run_at(init)
    if run:
        base, theirs = Base(run.files, run.checkpoints), config_lib.read_json(run.files / "config.json")
    else:
        base = Base(folder.locate(init))
        folder.check(config, base.files)
        weights.check(base.files, config)
        theirs = folder.config(base.files, {})
    for name in ("language.pooling", "data.template"):
        mine, other = (config_lib.leaves(one)[name] for one in (config, theirs))
        if mine != other:
            terminal.line(f"config.{name} is {mine!r}; {init} was trained with {other!r}")
    return base


@dataclasses.dataclass(frozen=True)
class Opened:
    """The data, tokenizer and base model of a run."""

    prepared: prepared_lib.Prepared
    tokenizer: text.Tokenizer
    base: Base | None


def open_run(config: config_lib.Config, store: storage.Store, terminal: progress.Terminal) -> Opened:
    """Reads and verifies the data, and sets up the workdir for the run. All processes call this.

    Raises:
        UserError: the data cannot be used, is not the run's, or differs between processes; the base model does not fit.
    """
    workdir = store.files
    with distributed.fail_together():
        if config.data.tokenizer:
            text.Tokenizer.load(config.data.tokenizer)  # fail early, before the data is read
        base = base_of(config, store, terminal)
        if distributed.is_primary():
            render(config, store, terminal)
    _share(store)
    with distributed.fail_together():
        prepared = prepare_data(config, store, terminal)
    distributed.require_equal("--data", {"fingerprint": prepared.fingerprint})
    with distributed.fail_together():
        if distributed.is_primary():
            claim(config, workdir)
            prepared = keep_data(prepared, workdir / "data", store)
            write_tokenizer(config, workdir, prepared, base)
            if base and not base.checkpoints:
                about = {"model": config.training.init, "licence": folder.licence(base.files)}
                if config.training.init.startswith(folder.HUB):
                    about["commit"] = base.files.name  # of the snapshot in the hub's cache
                (workdir / "base.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
            elif base and (base.files / "base.json").is_file():  # the origin of that run is the origin of this one
                shutil.copyfile(base.files / "base.json", workdir / "base.json")
    _share(store)
    with distributed.fail_together():
        path = workdir / "tokenizer.json"
        if not path.is_file():
            raise UserError(f"--workdir {store}: not the folder that process 0 writes; give one that all hosts share")
        tokenizer = text.Tokenizer.load(path, config.language.vocab)
    return Opened(prepared, tokenizer, base)


def _share(store: storage.Store) -> None:
    """Makes what the first process wrote visible to all."""
    with distributed.fail_together():
        if distributed.is_primary():
            store.push()
    with distributed.fail_together():
        if not distributed.is_primary():
            store.pull()


def write_tokenizer(
    config: config_lib.Config, workdir: Path, prepared: prepared_lib.Prepared, base: Base | None
) -> None:
    """Writes the run's tokenizer.json: the configured one, the base model's, or one trained on the catalogue."""
    path = workdir / "tokenizer.json"
    if not path.exists():
        if config.data.tokenizer or base:
            given = config.data.tokenizer or folder.tokenizer(base.files)
            text.Tokenizer.load(given)
            temporary = path.with_suffix(".tmp")
            shutil.copyfile(given, temporary)  # byte for byte: the fingerprint includes it
            temporary.replace(path)
        else:
            titles = (prepared.products[index].text for index in prepared.train)
            temporary = path.with_suffix(".tmp")
            text.train((title for title in titles if title), config.language.vocab).save(temporary)
            temporary.replace(path)


PARTIAL = ".data"
"""Where data/ is prepared, until the workdir belongs to the run."""

CATALOGUE = "catalogue/synthetic.parquet"


def render(config: config_lib.Config, store: storage.Store, terminal: progress.Terminal) -> None:
    """Renders the synthetic catalogue, if no data is given and it does not exist yet."""
    if config.data.path:
        return
    path = store.files / CATALOGUE
    terminal.line(f"no --data given: a synthetic catalogue of rendered products, {store}/{CATALOGUE}")
    if not synthetic.is_complete(path, config.data.synthetic, config.seed):
        track = functools.partial(terminal.track, "rendering")
        synthetic.write(path, config.data.synthetic, config.seed, config.data.threads, track)


def prepare_data(config: config_lib.Config, store: storage.Store, terminal: progress.Terminal) -> prepared_lib.Prepared:
    """The data of a run, prepared earlier or prepared now in the workdir.

    If a process is not the first, or its workdir is a copy of a bucket, it prepares in a temporary folder.
    """
    path, own = config.data.path or str(store.files / CATALOGUE), store.files / "data"
    if prepared_lib.is_prepared(path):
        prepared = prepared_lib.open_prepared(path)
    else:
        with terminal.busy("opening the catalogue"):
            options = prepare.Options.of(config)
            opened = sources.open_source(path, options.columns)
        mine = distributed.is_primary() and not store.remote
        folder = (_home(store.files, opened, options) if mine else None) or storage.temporary_folder()
        try:
            pool = functools.partial(interrupt.thread_pool, config.data.threads)
            prepared = prepare.prepare(opened, folder, options, pool, config.data.threads, terminal.progress)
        except UserError:
            # Unusable data leaves nothing behind, not even a new workdir.
            if folder != own:
                shutil.rmtree(folder, ignore_errors=True)
                with contextlib.suppress(OSError):
                    folder.parent.rmdir()
            raise
    manifest = prepared.manifest
    terminal.line(
        f"{prepared.sides} ({manifest['without_text']:,} without text, {manifest['without_image']:,} without image),"
        f" {manifest['splits']['train_queries'] + manifest['splits']['val_queries']:,} queries of the catalogue's own;"
        f" {prepared.summary() or '0 left out'}"
    )
    added, mode = manifest.get("augmented"), config.data.augmented
    if added:
        counts = f"{added['text']['added']:,} enriched titles, {added['image']['added']:,} expanded images"
        terminal.line(f"augmented by {counts}; config.data.augmented = {mode!r} selects which of them training reads")
    elif mode != config_lib.Config().data.augmented:
        terminal.line(f"config.data.augmented is {mode!r}, but this data is not augmented; moon-jax augment does that")
    if prepared.quarantined:
        terminal.line(f"{store}/data/quarantine.jsonl lists what was left out")
    if len(prepared.val) <= 10:
        terminal.line(f"only {len(prepared.val)} held-out products: R@10 is meaningless; give a larger catalogue")
    return prepared


def _home(workdir: Path, opened: Source, options: prepare.Options) -> Path | None:
    """The folder of the workdir in which this source is or will be prepared; None if it holds other data."""
    own, half = workdir / "data", workdir / PARTIAL
    if (own / prepared_lib.MANIFEST).exists():
        return own if prepared_lib.is_prepared(own) and prepare.is_of(own, opened, options) else None
    if prepare.is_of(half, opened, options) or prepare.is_of(half / outputs.WORK, opened, options):
        return half
    if half.exists() and not any(
        (half / name).is_file() for name in (outputs.SOURCE, f"{outputs.WORK}/{outputs.SOURCE}")
    ):
        return half if outputs.is_empty(half, prepare.PARTS) else None  # else not ours
    shutil.rmtree(half, ignore_errors=True)
    return half


def keep_data(prepared: prepared_lib.Prepared, folder: Path, workdir: object) -> prepared_lib.Prepared:
    """Keeps the data in `folder`: all of it if it was prepared in the workdir, else only its manifest and quarantine.

    Args:
        folder: data/ in the workdir.
        workdir: its name, for errors.

    Raises:
        UserError: the folder holds the manifest of other data.
    """
    manifest = folder / prepared_lib.MANIFEST
    if manifest.exists():
        held = json.loads(manifest.read_text(encoding="utf-8"))
        if held["fingerprint"] != prepared.fingerprint:
            raise UserError(f"{workdir}: holds data other than that given; use another folder, or remove this one")
        return prepared
    if prepared.folder == folder.with_name(PARTIAL):
        shutil.rmtree(folder, ignore_errors=True)
        prepared.folder.rename(folder)
        return prepared_lib.open_prepared(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # The manifest comes last: if it exists, the rest is complete.
    for name in (prepared_lib.QUARANTINE, prepared_lib.MANIFEST):
        temporary = folder / f"{name}.tmp"
        shutil.copyfile(prepared.folder / name, temporary)
        temporary.replace(folder / name)
    return prepared
