"""What a run tells of its time and its chips, and how it reads its own log again."""

import io
import re
import sys
import time
from types import SimpleNamespace

import jax
import pytest
from rich.console import Console

import moon_jax
from moon_jax.config import UserError
from moon_jax.training import chips, watch
from tests.conftest import tiny
from tests.training.test_survival import arguments, on, start


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("TPU v4", "v4"),
        ("TPU v5", "v5p"),
        ("TPU v5p", "v5p"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5e", "v5e"),
        ("TPU v6 lite", "v6e"),
        ("NVIDIA H100 80GB HBM3", "NVIDIA H100 80GB HBM3"),
        ("TPU v9", None),
        ("cpu", None),
    ],
)
def test_a_chip_is_known_by_what_jax_calls_it(kind, name):
    assert chips.of_device(SimpleNamespace(device_kind=kind)) == (chips.CHIPS[name] if name else None)


def test_mfu_is_the_models_flops_over_the_chips_peak(monkeypatch):
    """On chips that would take a tenth of a second for a step, at five steps a second: one half."""
    config, clock = tiny(), [100.0]
    peak = chips.model_flops(config) / (4 * 0.1)
    monkeypatch.setattr(chips, "of_device", lambda device: SimpleNamespace(flops=peak))
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    times = watch.Times(config, 4, start=7)
    with times.of("data"):
        clock[0] += 0.4
    with times.of("device"):
        clock[0] += 1.2
    clock[0] += 0.4
    line = times.line(17)
    assert line["seconds"] == pytest.approx(0.2) and line["mfu"] == pytest.approx(0.5)
    assert line["data"] == pytest.approx(0.04) and line["device"] == pytest.approx(0.12)
    assert times.summary() == "of the time of a step: data 20.0%, device 60.0%"
    monkeypatch.setattr(chips, "of_device", lambda device: None)
    clock[0] += 1
    assert watch.Times(config, jax.device_count(), start=0).line(1)["mfu"] is None


@pytest.mark.parametrize("cut", [1, 2, 3, 20])
def test_a_log_line_that_was_cut_short_is_struck(tmp_path, cut):
    """Wherever it was cut, in the middle of a letter too."""
    path = tmp_path / "metrics.jsonl"
    whole = '{"step": 1, "loss": {"q_t→p_mm": 1.0}}\n'
    path.write_bytes(whole.encode() + '{"step": 2, "loss": {"q_t→'.encode()[:-cut])
    assert [line["step"] for line in watch._keep(path, 2)] == [1]
    assert path.read_text(encoding="utf-8") == whole


def test_a_stalled_step_shows_all_stacks(catalogue, tmp_path):
    """The second batch never comes."""
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
    told = ""
    for line in process.stderr:
        told += line
        if "stalled.py" in line and "from_step" in line:
            break
    process.kill()
    process.communicate()
    assert "no step for 0.03 minutes; all stacks:" in told and told.count("most recent call last:") > 2
    assert "Thread MainThread, most recent call last:" in told


def test_a_trace_has_the_steps_that_were_asked_for(tmp_path, monkeypatch):
    calls, told = [], []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: calls.append(("start", folder)))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    with watch.Watching(profile=(2, 3)).over(tmp_path, 0, 9, told.append) as alive:
        for step in range(5):
            alive(step, jax.numpy.zeros(()))
            calls.append(step + 1)
    assert calls == [1, ("start", str(tmp_path / "profile")), 2, 3, "stop", 4, 5] and not told
    with watch.Watching(profile=(2, 30)).over(tmp_path, 2, 9, told.append):
        pass
    assert told == ["--profile 2:30: step 2 is not among those to come, 3 to 9; no trace"]


def test_a_trace_of_chosen_steps(catalogue, tmp_path, monkeypatch):
    on(monkeypatch, 1)
    config = tiny(data__path=str(catalogue), training__steps=4)
    moon_jax.train(config, tmp_path / "w", watch.Watching(profile=(2, 3)))
    traces = list((tmp_path / "w" / "profile").rglob("*.xplane.pb"))
    assert len(traces) == 1 and traces[0].stat().st_size > 1000
    for wrong in ("3:2", "0:1", "5", "a:b"):
        with pytest.raises(UserError, match="write FIRST:LAST"):
            watch.parse_profile(wrong)


def test_the_time_left_is_told_of_long_pieces_of_work():
    """Of minutes each, as the directions of a large evaluation are."""
    seconds = 0.0
    console = Console(file=io.StringIO(), force_terminal=True, width=120, get_time=lambda: seconds)
    with watch.Watch(console=console).progress("evaluating", 9) as advance:
        for _ in range(4):
            seconds += 60.0
            advance()
    assert "0:05:00 left" in re.sub(r"\x1b\[[\d;?]*\w", "", console.file.getvalue())
