"""How the suite itself behaves: the tests marked gpu run with --gpu, and only then."""

import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

MARKED = ["tests/model/test_attention.py", "tests/model/test_experts.py"]


ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "MOON_JAX_TEST_GPU"}


def collect(*options, start=("-m", "pytest"), **variables):
    """Collects: a line for each test, and how many there are."""
    command = [sys.executable, *start, "-n0", "--collect-only", *options, *MARKED]
    return subprocess.run(command, cwd=ROOT, env=ENVIRONMENT | variables, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("options", "variables"), [(["--gpu"], {}), ([], {"MOON_JAX_TEST_GPU": "1"})], ids=["option", "variable"]
)
def test_without_an_accelerator_gpu_tests_fail_rather_than_skip(options, variables):
    """Whatever platform JAX is told to use elsewhere, here there is a CPU alone."""
    done = collect(*options, **variables, JAX_PLATFORMS="cpu")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "--gpu: JAX finds no accelerator here" in done.stderr


def test_an_option_that_comes_too_late_is_refused():
    done = collect(PYTEST_ADDOPTS="--gpu")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR and "set MOON_JAX_TEST_GPU=1" in done.stderr


def test_a_plain_run_has_no_gpu_test_and_one_on_a_gpu_has_no_other():
    plain = collect("-m", "")
    assert plain.returncode == 0 and "cudnn" not in plain.stdout and "(7 deselected)" in plain.stdout
    pretended = "import jax, pytest, sys; jax.default_backend = lambda: 'gpu'; sys.exit(pytest.main(sys.argv[1:]))"
    done = collect("--gpu", start=("-c", pretended))
    assert done.returncode == 0 and "7/" in done.stdout, done.stdout + done.stderr
    assert done.stdout.count("test_cudnn_equals_the_reference") + done.stdout.count("for_gpus_equals_the_oracle") == 7
