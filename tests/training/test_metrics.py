"""Metric lines: time and utilisation of a step, and how a run reads its own log again."""

import time
from types import SimpleNamespace

import jax
import pytest

from moon_jax.training import chips
from moon_jax.training import metrics as metrics_lib
from tests.conftest import tiny


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
    times = metrics_lib.Times(config, 4, start=7)
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
    assert metrics_lib.Times(config, jax.device_count(), start=0).line(1)["mfu"] is None


@pytest.mark.parametrize("cut", [1, 2, 3, 20])
def test_a_truncated_log_line_is_removed(tmp_path, cut):
    """Wherever it was cut, in the middle of a letter too."""
    path = tmp_path / "metrics.jsonl"
    whole = '{"step": 1, "loss": {"q_t→p_mm": 1.0}}\n'
    path.write_bytes(whole.encode() + '{"step": 2, "loss": {"q_t→'.encode()[:-cut])
    assert [line["step"] for line in metrics_lib._keep(path, 2)] == [1]
    assert path.read_text(encoding="utf-8") == whole
