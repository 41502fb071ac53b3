"""Metrics: step time, utilisation, and re-reading the log of a resumed run."""

import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from moon_jax.training import chips
from moon_jax.training import metrics as metrics_lib
from moon_jax.types import OBJECTIVES
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
def test_chips_are_recognised_by_their_jax_device_kind(kind, name):
    assert chips.of_device(SimpleNamespace(device_kind=kind)) == (chips.CHIPS[name] if name else None)


def test_mfu_is_model_flops_over_the_peak_of_the_chips(monkeypatch):
    """At peak the chips would take 0.1 s per step; at 0.2 s per step the MFU is one half."""
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
    assert times.summary() == "share of training time: data 20.0%, device 60.0%"
    monkeypatch.setattr(chips, "of_device", lambda device: None)
    clock[0] += 1
    assert metrics_lib.Times(config, jax.device_count(), start=0).line(1)["mfu"] is None


@pytest.mark.parametrize("cut", [1, 2, 3, 20])
def test_a_truncated_log_line_is_removed(tmp_path, cut):
    """Wherever it was cut, even inside a multi-byte character."""
    path = tmp_path / "metrics.jsonl"
    whole = '{"step": 1, "loss": {"q_t→p_mm": 1.0}}\n'
    path.write_bytes(whole.encode() + '{"step": 2, "loss": {"q_t→'.encode()[:-cut])
    assert [line["step"] for line in metrics_lib._keep(path, 2)] == [1]
    assert path.read_text(encoding="utf-8") == whole


def test_a_line_counts_what_serves_an_objective():
    """Triplets that serve none are left out, those whose negatives are all excluded are not; no samples: null."""
    config, count = tiny(), len(OBJECTIVES)
    result = SimpleNamespace(
        total=np.float32(2),
        loss=np.array([1.0, 0, 2, 3, 4]),
        weight=np.full(count, 0.25),
        count=np.array([3, 0, 3, 3, 3]),
        balance=np.float32(1),
        sparsity=np.float32(1),
        phi=np.array([0.5, np.nan, 0.7]),
        negatives=np.array([0, -1, 5]),
        excluded=np.array([10, 7, 2]),
        known=np.array([4, 0, 2]),
    )
    modality = np.array([[[5.0, 5, 0, 0], [0, 0, 1, 9]], [[1, 1, 1, 1], [2, 2, 2, 2]]])
    found = {"objectives": result, "modality": modality, "dropped": np.zeros(2), "grad_norm": 1.0, "finite": True}
    line = metrics_lib.line(1, found, config)
    assert (line["negatives_mean"], line["negatives_min"], line["negatives_excluded"]) == (2.5, 0, 6.0)
    assert line["known_mean"] == 2.0 and line["modality_information"] == pytest.approx([1, 0])
    assert list(line["loss"].values()) == [1.0, None, 2.0, 3.0, 4.0]
    result.negatives = np.full(3, -1)
    assert metrics_lib.line(1, found, config)["negatives_excluded"] is None


def test_mutual_information_of_modality_and_expert():
    """0 for equal shares, 1 bit for disjoint experts; a worked example between; scale does not matter."""
    information = metrics_lib.mutual_information
    assert information(np.array([[3.0, 1.0], [6.0, 2.0]])) == pytest.approx(0)
    assert information(np.array([[5.0, 5, 0, 0], [0, 0, 1, 9]])) == pytest.approx(1)
    # p = 3/8 and 1/8 twice each, margins 1/2: 2 (3/8 log2(3/2) + 1/8 log2(1/2)) = 0.188722
    assert information(np.array([[3.0, 1], [1, 3]])) == pytest.approx(0.188722, abs=1e-6)
    assert information(np.zeros((2, 4))) == 0
