"""Errors shown to the user, each one line: what is wrong, what was expected, and what to do."""

from __future__ import annotations


class UserError(Exception):
    """A mistake by the user. The message is one line: the flag or file, what is wrong, and what to do."""

    shared = False  # True if every process of a run raises it: then only the first one prints it


class Unavailable(UserError):
    """A disk, bucket or other process does not respond: the same command may succeed later."""


def printable(text: str) -> str:
    """`text` with control characters replaced: they could move a terminal's cursor or worse."""
    return "".join(character if character.isprintable() or character in "\n\t" else "�" for character in text)
