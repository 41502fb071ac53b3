"""Commands that are stopped or meet a system error: one line, which says what the same command does next."""

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
    ("command", "message"),
    [
        ("train", "the same command resumes from here"),
        ("embed", "the same command resumes with the unfinished files"),
        ("evaluate", "the same command starts from scratch"),
        ("search", "the same command starts from scratch"),
        ("heatmap", "the same command starts from scratch"),
    ],
)
def test_an_interrupt_says_what_the_same_command_does(monkeypatch, capsys, command, message):
    def interrupted(parsed, overrides):
        raise KeyboardInterrupt

    def stopped(parsed, overrides):
        interrupt.terminate()
        interrupt.check()

    for stop, code, how in ((interrupted, 130, "interrupted"), (stopped, 0, "stopped by SIGTERM")):
        monkeypatch.setattr(f"moon_jax.commands.{command}.run", stop)
        assert cli.main([command, *GIVEN[command]]) == code
        assert capsys.readouterr().err == f"moon-jax: {how}; {message}\n"


@pytest.mark.parametrize(("command", "path"), [("search", "--faiss f"), ("heatmap", "--output o.png")])
def test_a_full_disk_is_reported_in_one_line(monkeypatch, capsys, command, path):
    def full(parsed, overrides):
        raise OSError(errno.ENOSPC, "no room")

    monkeypatch.setattr(f"moon_jax.commands.{command}.run", full)
    assert cli.main([command, *GIVEN[command]]) == cli.USER_ERROR
    message = f"moon-jax: {path}: {os.strerror(errno.ENOSPC)}; free some space and run the same command again\n"
    assert capsys.readouterr().err == message
