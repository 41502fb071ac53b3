"""The mesh, the rules, and the sharding of every parameter of the published configs."""

import math
from pathlib import Path
from types import SimpleNamespace

import flax.linen as nn
import jax
import pytest

from moon_jax import config as config_lib
from moon_jax import sharding
from moon_jax.data import rows as rows_lib
from moon_jax.errors import UserError
from moon_jax.hub import keys
from moon_jax.training.step import initial_state
from tests.conftest import tiny

GOLDEN = Path(__file__).parent / "golden"
PUBLISHED = ("moon2_qwen3vl_2b", "moon2_qwen3vl_2b_dense", "moon2_qwen3vl_4b", "moon2_qwen3vl_8b")


def state_of(config):
    """The abstract state with its partitioning boxes."""
    rows = rows_lib.pack([[]], rows_lib.Layout.of(config), 0)
    return jax.eval_shape(lambda: initial_state(config, rows))


def listing(config, mesh):
    """One line per parameter: path, shape and sharding."""
    boxed = state_of(config).params
    leaves, shardings = keys.flatten(nn.unbox(boxed)), keys.flatten(sharding.of_variables(mesh, boxed))
    show = lambda spec: "(" + ", ".join(axis or "-" for axis in spec) + ")" if spec else "replicated"  # noqa: E731
    return [f"{path}  {'x'.join(map(str, leaf.shape))}  {show(shardings[path].spec)}" for path, leaf in leaves.items()]


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_parameter_is_sharded_as_in_the_golden_listing(name):
    """To change it on purpose: rm tests/golden/*.txt, run this twice, and review the diff."""
    mesh = sharding.make_mesh(config_lib.Mesh(data=1, fsdp=2, expert=2, tensor=2))
    found = "\n".join(listing(config_lib.load(name), mesh)) + "\n"
    path = GOLDEN / f"{name}.txt"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        path.write_text(found)
        pytest.fail(f"{path} did not exist and was written; run this again, and commit it")
    assert found == path.read_text()


@pytest.mark.parametrize("name", PUBLISHED)
def test_no_large_array_of_the_state_is_replicated(name):
    """Weights and both moments, on a mesh with two devices each along fsdp, expert and tensor."""
    mesh = sharding.make_mesh(config_lib.Mesh(data=1, fsdp=2, expert=2, tensor=2))
    boxed = state_of(config_lib.load(name))
    shardings = sharding.of_variables(mesh, boxed)
    seen, held, total = 0, 0, 0
    for (path, leaf), placed in zip(
        jax.tree_util.tree_flatten_with_path(nn.unbox(boxed))[0], jax.tree.leaves(shardings), strict=True
    ):
        mine, size = math.prod(placed.shard_shape(leaf.shape)), math.prod(leaf.shape)
        held, total = held + mine, total + size
        where = jax.tree_util.keystr(path)
        if size > 200_000:
            seen += 1
            assert mine <= size / 2, f"{where} {leaf.shape} is replicated"
            if "gate_up" in where or "down'" in where:
                assert mine == size / 8, f"{where} {leaf.shape} does not use all three axes"
    assert seen > 50
    assert held < 0.3 * total


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        (
            dict(fsdp=1, expert=8, data=1),
            "config.mesh.expert: 8 does not divide 4, an axis of encoder/decoder/periods/",
        ),
        (dict(tensor=8, data=1), "config.mesh.tensor: 8 does not divide"),
    ],
)
def test_an_axis_that_does_not_divide_is_reported_in_one_line(mesh, message):
    config = tiny(**{f"mesh__{axis}": size for axis, size in mesh.items()})
    with pytest.raises(UserError, match=message) as error:
        sharding.of_variables(sharding.make_mesh(config.mesh), state_of(config))
    assert "\n" not in str(error.value)


def test_a_mesh_takes_axes_of_size_one_and_the_rest():
    shape = lambda **axes: dict(sharding.make_mesh(config_lib.Mesh(**axes)).shape)  # noqa: E731
    assert shape() == dict(data=8, fsdp=1, expert=1, tensor=1)
    assert shape(data=1, fsdp=-1, tensor=2) == dict(data=1, fsdp=4, expert=1, tensor=2)
    assert shape(data=2, fsdp=2, expert=2) == dict(data=2, fsdp=2, expert=2, tensor=1)


class Device:
    """A device of a slice, with the attributes that a mesh reads."""

    platform, device_kind = "cpu", "cpu"

    def __init__(self, number, slice_index):
        self.id, self.slice_index, self.process_index = number, slice_index, slice_index

    def __repr__(self):
        return f"{self.slice_index}:{self.id}"


def test_only_the_data_axis_spans_slices():
    devices = [Device(number, number % 2) for number in range(16)]
    mesh = sharding.make_mesh(config_lib.Mesh(data=-1, fsdp=2, expert=2), devices)
    assert dict(mesh.shape) == dict(data=4, fsdp=2, expert=2, tensor=1)
    for part in mesh.devices:  # one index along data
        assert len({device.slice_index for device in part.flat}) == 1
    assert {device.slice_index for device in mesh.devices[:2].flat} == {0}
    with pytest.raises(UserError, match=r"config.mesh.data: 1 does not divide over 2 slices"):
        sharding.make_mesh(config_lib.Mesh(data=1, fsdp=16), devices)


def test_unequal_shares_are_refused(monkeypatch):
    """Two rows of six in one process, four in the other."""
    parts = [(0, 0, 2), (1, 2, 4), (1, 4, 6)]
    devices = [type("Device", (), {"process_index": process})() for process, _, _ in parts]
    slices = {device: (slice(a, b),) for device, (_, a, b) in zip(devices, parts, strict=True)}
    monkeypatch.setattr(sharding, "rows", lambda mesh: SimpleNamespace(devices_indices_map=lambda shape: slices))
    with pytest.raises(UserError, match=r"not divide evenly over processes \(2 in process 0, 4 in process 1\)"):
        sharding.share(None, 6)
