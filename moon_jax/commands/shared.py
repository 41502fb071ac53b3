"""What several commands do first."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings

from moon_jax import places
from moon_jax.config import UserError


def hush() -> None:
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


def expand(parsed: argparse.Namespace, addresses: tuple[str, ...]) -> None:
    """Data and output as paths of this machine, but for data at one of these kinds of addresses."""
    for flag in ("data", "output"):
        given = getattr(parsed, flag)
        if not given:
            raise UserError(f"--{flag}: empty; give a path")
        if places.is_address(given) and not given.startswith(addresses):
            raise UserError(f"--{flag} {given}: not a folder of this machine; mount it, and give that path")
        # As a shell leaves it in --output=~/x.
        setattr(parsed, flag, os.path.expanduser(given))
