"""What a command says that is stopped, or that the system refuses: one line, and what the same command does then."""

import errno
import os

import pytest

from moon_jax import cli, interrupt

GIVEN = {
    "train": ["--config", "quickstart", "--workdir", "w"],
    "embed": ["--model", "m", "--data", "d", "--output", "o"],
    "evaluate": ["--model", "m", "--data", "d", "--output", "o"],
    "search": ["--index", "v", "--faiss", "f"],
    "heatmap": ["--model", "m", "--text", "x", "--output", "o.png"],
}


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("train", "the same command goes on from here"),
        ("embed", "the same command goes on with the files that are not whole"),
        ("evaluate", "the same command starts anew"),
        ("search", "the same command starts anew"),
        ("heatmap", "the same command starts anew"),
    ],
)
def test_an_interrupt_says_what_the_same_command_does(monkeypatch, capsys, command, said):
    def interrupted(parsed, overrides):
        raise KeyboardInterrupt

    def stopped(parsed, overrides):
        interrupt.terminate()
        interrupt.check()

    for stop, code, how in ((interrupted, 130, "interrupted"), (stopped, 0, "stopped by SIGTERM")):
        monkeypatch.setattr(f"moon_jax.commands.{command}.run", stop)
        assert cli.main([command, *GIVEN[command]]) == code
        assert capsys.readouterr().err == f"moon-jax: {how}; {said}\n"


@pytest.mark.parametrize(("command", "place"), [("search", "--faiss f"), ("heatmap", "--output o.png")])
def test_a_disk_that_is_full_is_one_line(monkeypatch, capsys, command, place):
    def full(parsed, overrides):
        raise OSError(errno.ENOSPC, "no room")

    monkeypatch.setattr(f"moon_jax.commands.{command}.run", full)
    assert cli.main([command, *GIVEN[command]]) == cli.MISTAKE
    told = f"moon-jax: {place}: {os.strerror(errno.ENOSPC)}; make room, then give the same command again\n"
    assert capsys.readouterr().err == told
