"""Errors that a user meets, each one line: what is at fault, what was expected, and what to do."""

from __future__ import annotations


class UserError(Exception):
    """A mistake of the user's. The message is one line that names the culprit, what was expected, and the remedy."""

    shared = False  # whether every process of a run raises it; only the first then prints it


class Unavailable(UserError):
    """A disk, a bucket or another process does not respond: the same command may succeed later."""


def printable(text: str) -> str:
    """`text` without control characters, which could move a terminal's cursor or worse."""
    return "".join(character if character.isprintable() or character in "\n\t" else "�" for character in text)
