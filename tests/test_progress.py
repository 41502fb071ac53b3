"""Progress bars."""

import io
import re

from rich.console import Console

from moon_jax import progress


def test_the_time_left_is_shown_for_slow_steps():
    """For steps of a minute each, as in a large evaluation."""
    seconds = 0.0
    console = Console(file=io.StringIO(), force_terminal=True, width=120, get_time=lambda: seconds)
    with progress.Terminal(console=console).progress("evaluating", 9) as advance:
        for _ in range(4):
            seconds += 60.0
            advance()
    assert "0:05:00 left" in re.sub(r"\x1b\[[\d;?]*\w", "", console.file.getvalue())
