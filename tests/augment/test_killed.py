"""Augment, killed at a random moment and run again, writes the same bytes."""

import time

import pytest

from tests import killing
from tests.conftest import prepared_from


@pytest.fixture(scope="module")
def data(tmp_path_factory, catalogue):
    folder = tmp_path_factory.mktemp("data") / "p"
    prepared_from(catalogue, folder)
    return folder


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    """The output of an uninterrupted run, and its seconds."""
    output, began = tmp_path_factory.mktemp("undisturbed") / "a", time.monotonic()
    killing.finish(killing.start(["augment", "--data", data, "--output", output, "--expansions", 9, "--processes", 2]))
    return killing.content(output), time.monotonic() - began


def killed(data, undisturbed, tmp_path, seed):
    arguments = ["augment", "--data", data, "--expansions", 9]
    assert "enriched titles" in killing.killed(arguments, tmp_path / "a", *undisturbed, seed)


@pytest.mark.slow
def test_killed_at_random_moments(data, undisturbed, tmp_path, kill_seed):
    killed(data, undisturbed, tmp_path, kill_seed)
