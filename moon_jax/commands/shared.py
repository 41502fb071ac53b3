"""Code shared by the commands: reading flags, opening models, silencing libraries."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from typing import TYPE_CHECKING

from moon_jax import config as config_lib
from moon_jax import storage
from moon_jax.errors import UserError

if TYPE_CHECKING:
    from moon_jax.embedders.protocol import Embedder


def silence_libraries() -> None:
    """Silences library messages that are reported elsewhere: errors of Orbax and gcsfs arrive as exceptions, and the
    quarantine lists Pillow's broken images.
    """
    warnings.filterwarnings("ignore", module="PIL")
    for name in ("absl", "asyncio", "gcsfs"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    sys.unraisablehook = _ignore_closed_loops


def _ignore_closed_loops(unraisable: sys.UnraisableHookArgs) -> None:
    """TensorStore's threads still report to Orbax after it has given up on a damaged checkpoint or a full disk."""
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def expand(parsed: argparse.Namespace, addresses: tuple[str, ...]) -> None:
    """Turns --data and --output into paths of this machine; --data may start with one of `addresses` instead."""
    for flag in ("data", "output"):
        given = getattr(parsed, flag)
        if not given:
            raise UserError(f"--{flag}: empty; give a path")
        if storage.is_address(given) and not given.startswith(addresses):
            raise UserError(f"--{flag} {given}: not a local path; mount it and give that path")
        # A shell does not expand ~ in --output=~/x.
        setattr(parsed, flag, os.path.expanduser(given))


def configured(parsed: argparse.Namespace, overrides: list[str], name: str, init: str = "") -> config_lib.Config:
    """The config of a run: the defaults, then the base model's options, the config's differences, and the flags."""
    for flag in ("data", "workdir"):
        if getattr(parsed, flag) == "":
            raise UserError(f"--{flag}: empty; give a path, or leave the flag out")
        given = getattr(parsed, flag) or ""
        if storage.is_address(given) and (flag == "data" or parsed.command == "quickstart"):
            hint = "; moon-jax train accepts gs://" if flag == "workdir" else ""
            raise UserError(f"--{flag} {given}: not a local path; mount it and give that path{hint}")
    if parsed.steps is not None and parsed.steps < 1:
        raise UserError(f"--steps {parsed.steps}: give 1 or more")
    base = {}
    if init:
        base = _base_options(init, parsed.workdir)
    config = config_lib.load(name, base)
    given = {"data.path": parsed.data, "training.steps": parsed.steps, "training.init": init}
    config = config_lib.replace(config, {name: value for name, value in given.items() if value})
    return config_lib.override(config, overrides)


def _base_options(init: str, workdir: str) -> dict[str, object]:
    """The options that the base model determines. A resumed run reads them from its own config.json instead."""
    from moon_jax.hub import folder

    store = storage.Store(workdir)
    store.pull(["config.json"])
    own = store.files / "config.json"
    if own.is_file() and config_lib.read_json(own).training.init == init:
        return folder.of_run(own)
    run = folder.run_at(init)
    if run:
        return folder.of_run(run.files / "config.json")
    return folder.settings(folder.locate(init))


def process_count(parsed: argparse.Namespace) -> int:
    """--processes, by default one for each core that this process may use. Raises UserError below 1."""
    processes = parsed.processes if parsed.processes is not None else len(os.sched_getaffinity(0))
    if processes < 1:
        raise UserError(f"--processes {processes}: give 1 or more")
    return processes


def opened(flag: str, model: str, config: config_lib.Config) -> Embedder:
    """Opens an embedder of any kind; our own models on all devices."""
    from moon_jax.embedders import registry

    found = registry.open_embedder(model, config.data.max_pixels, flag)
    return found.on_all_devices() if hasattr(found, "on_all_devices") else found


def readable(parsed: argparse.Namespace, *flags: str) -> None:
    """Rejects flags that are not valid UTF-8: a shell passes any bytes."""
    for flag in flags:
        try:
            getattr(parsed, flag.replace("-", "_")).encode()
        except UnicodeEncodeError:
            raise UserError(f"--{flag}: not UTF-8; give text in that encoding") from None


def image(flag: str, given: str) -> tuple[str, ...]:
    """The image given by a flag, as `Product.images`.

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
