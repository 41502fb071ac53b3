"""The commands of moon-jax, a file each. A new command is a new file here, and a line of `NAMES`.

A command's file has HELP (one line), DESCRIPTION (with examples), AFTER_STOP, `add_arguments(parser)` and
`run(parsed, overrides)`. It imports at the top what is quick to import; the rest, JAX above all, inside `run`.
"""

from __future__ import annotations

import importlib
from types import ModuleType

NAMES = (
    "quickstart",
    "prepare",
    "augment",
    "train",
    "export",
    "plan",
    "evaluate",
    "embed",
    "search",
    "heatmap",
)
"""In the order in which `moon-jax --help` lists them."""


def load(name: str) -> ModuleType:
    """The module of a command."""
    return importlib.import_module(f"moon_jax.commands.{name}")
