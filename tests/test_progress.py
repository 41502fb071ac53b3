"""Progress bars."""

import io
import re

from rich.console import Console

from moon_jax import progress


def test_the_time_left_is_told_of_long_pieces_of_work():
    """Of minutes each, as the directions of a large evaluation are."""
    seconds = 0.0
    console = Console(file=io.StringIO(), force_terminal=True, width=120, get_time=lambda: seconds)
    with progress.Terminal(console=console).progress("evaluating", 9) as advance:
        for _ in range(4):
            seconds += 60.0
            advance()
    assert "0:05:00 left" in re.sub(r"\x1b\[[\d;?]*\w", "", console.file.getvalue())
