"""Checkpoints on disk: damaged ones are reported and skipped, and the policy decides which ones are kept."""

import dataclasses
import json
import os
import shutil
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moon_jax import config as config_lib
from moon_jax import sharding, storage
from moon_jax.errors import Unavailable, UserError
from moon_jax.training import checkpoints as lib
from moon_jax.training import provenance
from moon_jax.types import TrainState
from tests.conftest import tiny

ABOUT = {"config": {}, "version": "test", "data": "catalogue"}


def state(number, shardings=None):
    """A state determined by `number`, with every dtype that a state can hold."""
    rng = np.random.default_rng(number)
    arrays = {
        "encoder": {"kernel": rng.normal(size=(8, 40, 30)), "scale": rng.normal(size=16).astype(jnp.bfloat16)},
        "alignment": {"log_temperature": rng.normal(size=2)},
    }
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16 if x.dtype == jnp.bfloat16 else jnp.float32), arrays)
    counter = jnp.int32(number)
    opt_state = ({"mu": params["encoder"]}, counter, jnp.bool_(number % 2))
    made = TrainState(counter, params, opt_state, counter, jnp.int32(0))
    return made if shardings is None else jax.device_put(made, shardings)


def like(made):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), made)


def equal(a, b):
    return all(
        jax.tree.leaves(jax.tree.map(lambda x, y: x.dtype == y.dtype and np.array_equal(x, y), a, b))
    ) and jax.tree.structure(a) == jax.tree.structure(b)


def training(**options):
    return dataclasses.replace(config_lib.Training(), **options)


def write(workdir, steps, options=None, scores=()):
    workdir.mkdir(exist_ok=True)
    opened = lib.Checkpoints(storage.Store(workdir).checkpoints, options or training())
    for step in steps:
        opened.save(state(step), step, ABOUT, dict(scores).get(step))
    opened.close()


def restore(workdir, expected=None, abstract=None):
    """The step and state, and the warnings."""
    warnings = []
    opened = lib.Checkpoints(storage.Store(workdir).checkpoints, training())
    try:
        return opened.restore(abstract or like(state(0)), expected or {"data": "catalogue"}, warnings.append), warnings
    finally:
        opened.close()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("two") / "w"
    write(workdir, (5, 7))
    return workdir


def test_a_restored_state_equals_the_saved_one(two):
    (step, found), warnings = restore(two)
    assert step == 7 and equal(found, state(7)) and not warnings
    reader = lib.Checkpoints(storage.Store(two).checkpoints)
    step, params = reader.restore_params(like(state(0).params), warnings.append)
    assert step == 7 and equal(params, state(7).params) and not warnings
    about = json.loads((two / "checkpoints" / "7" / "about" / "metadata").read_text())
    assert (
        about["version"] == "test" and about["step"] == 7 and about["arrays"]["params/encoder/kernel"][0] == [8, 40, 30]
    )


def test_parameters_can_be_restored_in_another_dtype(two):
    """As moon_jax.load does with training.param_dtype. The digests are verified before the cast."""
    half = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=x.sharding), like(state(0).params)
    )
    step, params = lib.latest_params(storage.Store(two).checkpoints, half)
    assert step == 7 and equal(params, jax.tree.map(lambda x: x.astype(jnp.bfloat16), state(7).params))


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def delete(path):
    path.unlink()


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("damage", [truncate, delete, flip])
def test_a_damaged_checkpoint_is_reported_and_skipped(two, tmp_path, damage):
    """Damages each file of the newest checkpoint in turn: it is either skipped or restored bit for bit."""
    files = [path.relative_to(two) for path in (two / "checkpoints" / "7").rglob("*") if path.is_file()]
    skipped = []
    for number, name in enumerate(files):
        workdir = tmp_path / str(number)
        shutil.copytree(two, workdir)
        if not (workdir / name).stat().st_size:
            continue
        damage(workdir / name)
        (step, found), warnings = restore(workdir)
        assert equal(found, state(step)), name
        if step == 5:
            skipped.append(name)
            assert len(warnings) == 1 and "\n" not in warnings[0], name
            assert warnings[0].startswith(f"{workdir / 'checkpoints' / '7'}: damaged checkpoint (")
            assert (workdir / "damaged" / "7").is_dir() and not (workdir / "checkpoints" / "7").exists()
        else:
            assert step == 7 and not warnings, name
    inside = {name: name.relative_to("checkpoints/7") for name in files}
    needed = {name for name, path in inside.items() if len(path.parts) > 1 and path.parts[1] in ("d", "manifest.ocdbt")}
    assert len(needed) >= 4  # files of the arrays; Orbax may or may not read its other files
    assert needed | {name for name, path in inside.items() if str(path) == "about/metadata"} <= {*skipped}


def test_bit_flips_in_the_data_are_detected(two, tmp_path):
    """Flips 25 random bits, one at a time, in the largest file with array data."""
    data = [path.relative_to(two) for path in (two / "checkpoints" / "7").rglob("d/*") if path.is_file()]
    largest = max(data, key=lambda name: (two / name).stat().st_size)
    rng, detected = np.random.default_rng(0), 0
    for number in range(25):
        workdir = tmp_path / str(number)
        shutil.copytree(two, workdir)
        content = bytearray((workdir / largest).read_bytes())
        position = int(rng.integers(len(content)))
        content[position] ^= 1 << int(rng.integers(8))
        (workdir / largest).write_bytes(bytes(content))
        (step, found), _ = restore(workdir)
        assert equal(found, state(step))
        detected += step == 5
    assert detected >= 23  # a bit of the file format's own metadata may not matter


def test_a_swapped_array_is_detected_by_its_digest(two, tmp_path):
    """Orbax would silently read an array with the right name and shape but other numbers."""
    workdir = tmp_path / "w"
    shutil.copytree(two, workdir)
    shutil.rmtree(workdir / "checkpoints" / "7" / "params")
    shutil.copytree(workdir / "checkpoints" / "5" / "params", workdir / "checkpoints" / "7" / "params")
    (step, found), warnings = restore(workdir)
    assert step == 5 and equal(found, state(5))
    assert "alignment/log_temperature differs from what was saved" in warnings[0]


def test_changed_metadata_is_detected(two, tmp_path):
    workdir = tmp_path / "w"
    shutil.copytree(two, workdir)
    path = workdir / "checkpoints" / "7" / "about" / "metadata"
    path.write_text(path.read_text().replace('"catalogue"', '"catalogUe"'))
    (step, _), warnings = restore(workdir)
    assert step == 5 and "about differs from what was saved" in warnings[0]


def test_an_error_if_all_checkpoints_are_damaged(two, tmp_path):
    workdir = tmp_path / "w"
    shutil.copytree(two, workdir)
    for step in (5, 7):
        shutil.rmtree(workdir / "checkpoints" / str(step) / "params")
    with pytest.raises(UserError, match="all checkpoints are damaged: 7, 5") as error:
        restore(workdir)
    assert "\n" not in str(error.value)
    assert not (workdir / "damaged").exists()  # otherwise the next start would silently train from scratch
    with pytest.warns(UserWarning, match="damaged"), pytest.raises(UserError, match="all checkpoints are damaged"):
        lib.latest_params(storage.Store(workdir).checkpoints, like(state(0).params))


@pytest.fixture
def as_nobody():
    """A folder, and a test process without root privileges."""
    folder = Path(tempfile.mkdtemp())  # user nobody cannot enter pytest's own folders
    folder.chmod(0o777)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    yield folder
    if root:
        os.seteuid(0)
    shutil.rmtree(folder)


@pytest.mark.parametrize("name", ["params/d", "params/ocdbt.process_0", "params/manifest.ocdbt", "about/metadata"])
def test_an_unreadable_checkpoint_is_not_treated_as_damaged(as_nobody, name):
    workdir = as_nobody / "w"
    write(workdir, (5, 7))
    closed = workdir / "checkpoints" / "7" / name
    mode = closed.stat().st_mode
    closed.chmod(0)
    with pytest.raises(UserError, match=r"checkpoints/7: cannot be read now \(.*fix that and run the same") as error:
        restore(workdir)
    assert "\n" not in str(error.value)
    closed.chmod(mode)
    (step, found), warnings = restore(workdir)
    assert step == 7 and equal(found, state(7)) and not warnings


def test_a_reader_skips_damaged_checkpoints_without_moving_them(two, tmp_path):
    workdir = tmp_path / "w"
    shutil.copytree(two, workdir)
    shutil.rmtree(workdir / "checkpoints" / "7" / "params")
    with pytest.warns(UserWarning, match="checkpoints/7: damaged checkpoint"):
        step, params = lib.latest_params(storage.Store(workdir).checkpoints, like(state(0).params))
    assert step == 5 and equal(params, state(5).params) and (workdir / "checkpoints" / "7").is_dir()


def test_other_data_and_another_architecture_are_errors(two):
    with pytest.raises(UserError, match=r"was saved with other data \(catalogue, not other\)"):
        restore(two, {"data": "other"})
    other = like(state(0))
    kernel = jax.ShapeDtypeStruct((8, 40, 31), jnp.float32)
    other.params["encoder"]["kernel"] = kernel
    with pytest.raises(
        UserError, match=r"architecture: encoder/kernel has shape \(8, 40, 30\) there, and \(8, 40, 31\)"
    ):
        restore(two, abstract=other)
    assert (two / "checkpoints" / "7").is_dir() and not (two / "damaged").exists()


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        (dict(keep=2), [11, 12]),
        (dict(keep=1, keep_every=4), [4, 8, 12]),
        (dict(keep=1, keep_best=2), [3, 6, 12]),
        (dict(keep=2, keep_every=5, keep_best=1), [5, 6, 10, 11, 12]),
    ],
)
def test_which_checkpoints_are_kept(tmp_path, options, kept):
    scores = {step: {lib.BEST: float(10 * (step == 6) + 5 * (step == 3) + 0.1 * step)} for step in (3, 6, 9)}
    write(tmp_path / "w", range(1, 13), training(**options), scores)
    assert sorted(int(path.name) for path in (tmp_path / "w" / "checkpoints").iterdir()) == kept


def test_the_best_checkpoint_is_kept_across_restarts(tmp_path):
    scores = {step: {lib.BEST: 50.0 if step == 3 else 10.0} for step in (3, 6)}
    for steps in (range(1, 5), range(5, 9)):
        write(tmp_path / "w", steps, training(keep=1, keep_best=1), scores)
    assert sorted(int(path.name) for path in (tmp_path / "w" / "checkpoints").iterdir()) == [3, 8]


def test_the_step_of_a_damaged_checkpoint_is_saved_again(two, tmp_path):
    workdir = tmp_path / "w"
    shutil.copytree(two, workdir)
    truncate(next((workdir / "checkpoints" / "7" / "params" / "d").iterdir()))
    opened = lib.Checkpoints(storage.Store(workdir).checkpoints, training())
    assert opened.restore(like(state(0)), {"data": "catalogue"}, lambda _: None)[0] == 5
    opened.save(state(7), 7, ABOUT)
    opened.close()
    (step, found), warnings = restore(workdir)
    assert step == 7 and equal(found, state(7)) and not warnings


def test_lack_of_disk_space_is_reported_before_anything_is_written(two, tmp_path, monkeypatch):
    workdir = tmp_path / "w"
    shutil.copytree(two, workdir)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: type("", (), {"free": 1000}))
    with pytest.raises(UserError, match=r"No space left on device: a checkpoint needs 0.1 MB and 0.0 MB are free"):
        write(workdir, (9,))
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["5", "7"]


def test_processes_wait_until_they_see_the_same_checkpoints(two, monkeypatch):
    """A shared folder may show a new checkpoint to some processes later. They fail if it never appears."""
    seen = [["[5]"], ["[5]"], ["[5, 7]"]]
    monkeypatch.setattr(lib.time, "sleep", lambda _: None)
    monkeypatch.setattr(lib.distributed, "allgather", lambda own: [own, *(seen.pop(0) if seen else ["[5, 7]"])])
    opened = lib.Checkpoints(storage.Store(two).checkpoints)
    assert opened._agreed() == [5, 7] and not seen
    monkeypatch.setattr(lib.distributed, "allgather", lambda own: [own, "[5]"])
    with pytest.raises(Unavailable, match=r"process 1 sees checkpoints \[5\], process 0 sees \[5, 7\]; give all"):
        opened._agreed()


def test_a_pending_save_is_finished_after_a_user_error(tmp_path):
    """It would be lost when the process ends."""
    (tmp_path / "w").mkdir()
    with pytest.raises(UserError), lib.Checkpoints(storage.Store(tmp_path / "w").checkpoints, training()) as opened:
        opened.save(state(3), 3, ABOUT)
        raise UserError("numbers went bad")
    assert (tmp_path / "w" / "checkpoints" / "3").is_dir()


def test_the_digest_depends_on_every_bit_but_not_on_the_devices():
    mesh = sharding.make_mesh(tiny(mesh__data=2, mesh__fsdp=4).mesh)
    made = state(1)
    spread = jax.tree.map(
        lambda x: jax.device_put(x, sharding.rows(mesh)) if x.ndim == 3 else jax.device_put(x, jax.devices()[0]), made
    )
    kernel = spread.params["encoder"]["kernel"]
    assert len(kernel.sharding.device_set) == 8
    digest = jax.jit(provenance.digest)
    assert np.array_equal(digest(kernel), digest(made.params["encoder"]["kernel"]))
    for array, unsigned in (
        (made.params["encoder"]["scale"], np.uint16),
        (made.params["encoder"]["kernel"][0, 0], np.uint32),
    ):
        bits = np.asarray(array).view(unsigned)
        width = 8 * bits.itemsize
        seen = {tuple(np.asarray(digest(array)).tolist())}
        for position in range(8):
            for bit in range(width):
                changed = bits.copy()
                changed[position] ^= unsigned(1 << bit)
                seen.add(tuple(np.asarray(digest(jnp.asarray(changed.view(array.dtype)))).tolist()))
        assert len(seen) == 1 + 8 * width
    assert not np.array_equal(digest(kernel), digest(kernel[::-1]))


def test_a_checkpoint_can_be_restored_on_another_mesh(tmp_path):
    from jax.sharding import NamedSharding, PartitionSpec

    def placed(mesh):
        one = NamedSharding(mesh, PartitionSpec())
        many = NamedSharding(mesh, PartitionSpec("data", "fsdp"))
        return jax.tree.map(lambda x: many if x.ndim == 3 else one, state(0))

    meshes = [sharding.make_mesh(config_lib.Mesh(data=d, fsdp=f), jax.devices()[: d * f]) for d, f in ((2, 2), (8, 1))]
    workdir = tmp_path / "w"
    workdir.mkdir()
    opened = lib.Checkpoints(storage.Store(workdir).checkpoints, training())
    opened.save(state(3, placed(meshes[0])), 3, ABOUT)
    opened.close()
    (step, found), warnings = restore(workdir, abstract=like(state(0, placed(meshes[1]))))
    assert step == 3 and equal(found, state(3)) and not warnings
    assert found.params["encoder"]["kernel"].sharding.num_devices == 8
