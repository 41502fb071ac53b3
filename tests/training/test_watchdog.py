"""A stalled step prints all stacks; a profiler trace covers the chosen steps."""

import sys

import jax
import pytest

import moon_jax
from moon_jax.errors import UserError
from moon_jax.training import watchdog
from tests.conftest import tiny
from tests.training.test_survival import arguments, on, start


@pytest.mark.slow
def test_a_stalled_step_prints_all_stacks(catalogue, tmp_path):
    """The third batch never comes."""
    script = tmp_path / "stalled.py"
    script.write_text(
        "import sys, time\nfrom moon_jax import cli\nfrom moon_jax.data import pipeline\n"
        "read = pipeline.from_step\n"
        "def from_step(*arguments):\n"
        "    batches = read(*arguments)\n    yield next(batches)\n    yield next(batches)\n    time.sleep(60)\n"
        "pipeline.from_step = from_step\nsys.exit(cli.main(sys.argv[1:]))\n"
    )
    command = [sys.executable, script, *arguments(catalogue, tmp_path / "w", "--stall-minutes", "0.03")]
    process = start(command)
    printed = ""
    for line in process.stderr:
        printed += line
        if "stalled.py" in line and "from_step" in line:
            break
    process.kill()
    process.communicate()
    assert "no step for 0.03 minutes; all stacks:" in printed and printed.count("most recent call last:") > 2
    assert "Thread MainThread, most recent call last:" in printed


def test_a_trace_covers_the_requested_steps(tmp_path, monkeypatch):
    calls, warnings = [], []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: calls.append(("start", folder)))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    with watchdog.Watchdog(profile=(2, 3)).over(tmp_path, 0, 9, warnings.append) as alive:
        for step in range(5):
            alive(step, jax.numpy.zeros(()))
            calls.append(step + 1)
    assert calls == [1, ("start", str(tmp_path / "profile")), 2, 3, "stop", 4, 5] and not warnings
    with watchdog.Watchdog(profile=(2, 30)).over(tmp_path, 2, 9, warnings.append):
        pass
    assert warnings == ["--profile 2:30: no trace: step 2 is not one of 3 to 9"]


@pytest.mark.slow
def test_training_writes_a_profiler_trace(catalogue, tmp_path, monkeypatch):
    on(monkeypatch, 1)
    config = tiny(data__path=str(catalogue), training__steps=4)
    moon_jax.train(config, tmp_path / "w", watchdog.Watchdog(profile=(2, 3)))
    traces = list((tmp_path / "w" / "profile").rglob("*.xplane.pb"))
    assert len(traces) == 1 and traces[0].stat().st_size > 1000
    for wrong in ("3:2", "0:1", "5", "a:b"):
        with pytest.raises(UserError, match="write FIRST:LAST"):
            watchdog.parse_profile(wrong)
