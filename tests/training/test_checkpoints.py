"""Checkpoints on real files: what is damaged is named and skipped, what is kept is what the policy says."""

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


def state(number, places=None):
    """A state whose numbers follow from `number`, of every dtype that a state holds."""
    rng = np.random.default_rng(number)
    arrays = {
        "encoder": {"kernel": rng.normal(size=(8, 40, 30)), "scale": rng.normal(size=16).astype(jnp.bfloat16)},
        "alignment": {"log_temperature": rng.normal(size=2)},
    }
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16 if x.dtype == jnp.bfloat16 else jnp.float32), arrays)
    counter = jnp.int32(number)
    opt_state = ({"mu": params["encoder"]}, counter, jnp.bool_(number % 2))
    made = TrainState(counter, params, opt_state, counter, jnp.int32(0))
    return made if places is None else jax.device_put(made, places)


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
    """Step and state, and what was told."""
    told = []
    opened = lib.Checkpoints(storage.Store(workdir).checkpoints, training())
    try:
        return opened.restore(abstract or like(state(0)), expected or {"data": "catalogue"}, told.append), told
    finally:
        opened.close()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("two") / "w"
    write(workdir, (5, 7))
    return workdir


def test_what_is_restored_is_what_was_saved(two):
    (step, found), told = restore(two)
    assert step == 7 and equal(found, state(7)) and not told
    reader = lib.Checkpoints(storage.Store(two).checkpoints)
    step, params = reader.restore_params(like(state(0).params), told.append)
    assert step == 7 and equal(params, state(7).params) and not told
    about = json.loads((two / "checkpoints" / "7" / "about" / "metadata").read_text())
    assert (
        about["version"] == "test" and about["step"] == 7 and about["arrays"]["params/encoder/kernel"][0] == [8, 40, 30]
    )


def test_parameters_may_be_read_in_another_dtype(two):
    """As moon_jax.load with training.param_dtype does; what is not what was saved is seen all the same."""
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
def test_a_damaged_checkpoint_is_named_and_skipped(two, tmp_path, damage):
    """Every file of the newest in turn: either all that is read is bit for bit what was saved, or it is skipped."""
    files = [path.relative_to(two) for path in (two / "checkpoints" / "7").rglob("*") if path.is_file()]
    skipped = []
    for number, name in enumerate(files):
        workdir = tmp_path / str(number)
        shutil.copytree(two, workdir)
        if not (workdir / name).stat().st_size:
            continue
        damage(workdir / name)
        (step, found), told = restore(workdir)
        assert equal(found, state(step)), name
        if step == 5:
            skipped.append(name)
            assert len(told) == 1 and "\n" not in told[0], name
            assert told[0].startswith(f"{workdir / 'checkpoints' / '7'}: a damaged checkpoint (")
            assert (workdir / "damaged" / "7").is_dir() and not (workdir / "checkpoints" / "7").exists()
        else:
            assert step == 7 and not told, name
    inside = {name: name.relative_to("checkpoints/7") for name in files}
    needed = {name for name, path in inside.items() if len(path.parts) > 1 and path.parts[1] in ("d", "manifest.ocdbt")}
    assert len(needed) >= 4  # of the arrays; the rest of what Orbax leaves may matter or not
    assert needed | {name for name, path in inside.items() if str(path) == "about/metadata"} <= {*skipped}


def test_flips_in_the_data_are_seen_wherever_they_are(two, tmp_path):
    """Fifty single bits of the files that hold the arrays."""
    data = [path.relative_to(two) for path in (two / "checkpoints" / "7").rglob("d/*") if path.is_file()]
    largest = max(data, key=lambda name: (two / name).stat().st_size)
    rng, seen = np.random.default_rng(0), 0
    for number in range(25):
        workdir = tmp_path / str(number)
        shutil.copytree(two, workdir)
        content = bytearray((workdir / largest).read_bytes())
        place = int(rng.integers(len(content)))
        content[place] ^= 1 << int(rng.integers(8))
        (workdir / largest).write_bytes(bytes(content))
        (step, found), _ = restore(workdir)
        assert equal(found, state(step))
        seen += step == 5
    assert seen >= 23  # a bit of a file's own bookkeeping may not matter


def test_what_orbax_would_read_without_a_word(two, tmp_path):
    """An array in its place, of its shape, and of other numbers: only the digest tells."""
    workdir = tmp_path / "w"
    shutil.copytree(two, workdir)
    shutil.rmtree(workdir / "checkpoints" / "7" / "params")
    shutil.copytree(workdir / "checkpoints" / "5" / "params", workdir / "checkpoints" / "7" / "params")
    (step, found), told = restore(workdir)
    assert step == 5 and equal(found, state(5))
    assert "alignment/log_temperature is not what was saved" in told[0]


def test_a_changed_about_is_seen(two, tmp_path):
    workdir = tmp_path / "w"
    shutil.copytree(two, workdir)
    path = workdir / "checkpoints" / "7" / "about" / "metadata"
    path.write_text(path.read_text().replace('"catalogue"', '"catalogUe"'))
    (step, _), told = restore(workdir)
    assert step == 5 and "about is not what was saved" in told[0]


def test_all_damaged_is_one_line(two, tmp_path):
    workdir = tmp_path / "w"
    shutil.copytree(two, workdir)
    for step in (5, 7):
        shutil.rmtree(workdir / "checkpoints" / str(step) / "params")
    with pytest.raises(UserError, match="no checkpoint is whole") as error:
        restore(workdir)
    assert "\n" not in str(error.value) and "7, 5" in str(error.value)
    assert not (workdir / "damaged").exists()  # else the next start would begin anew, without a word
    with pytest.warns(UserWarning, match="damaged"), pytest.raises(UserError, match="no checkpoint is whole"):
        lib.latest_params(storage.Store(workdir).checkpoints, like(state(0).params))


@pytest.fixture
def as_nobody():
    """A folder for a process without root's powers, which the test then is."""
    folder = Path(tempfile.mkdtemp())  # pytest's own are closed to nobody
    folder.chmod(0o777)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    yield folder
    if root:
        os.seteuid(0)
    shutil.rmtree(folder)


@pytest.mark.parametrize("name", ["params/d", "params/ocdbt.process_0", "params/manifest.ocdbt", "about/metadata"])
def test_what_cannot_be_read_is_not_taken_for_damaged(as_nobody, name):
    workdir = as_nobody / "w"
    write(workdir, (5, 7))
    closed = workdir / "checkpoints" / "7" / name
    mode = closed.stat().st_mode
    closed.chmod(0)
    with pytest.raises(UserError, match=r"checkpoints/7: cannot be read now \(.*mend that and give the same") as error:
        restore(workdir)
    assert "\n" not in str(error.value)
    closed.chmod(mode)
    (step, found), told = restore(workdir)
    assert step == 7 and equal(found, state(7)) and not told


def test_a_reader_skips_and_moves_nothing(two, tmp_path):
    workdir = tmp_path / "w"
    shutil.copytree(two, workdir)
    shutil.rmtree(workdir / "checkpoints" / "7" / "params")
    with pytest.warns(UserWarning, match="checkpoints/7: a damaged checkpoint"):
        step, params = lib.latest_params(storage.Store(workdir).checkpoints, like(state(0).params))
    assert step == 5 and equal(params, state(5).params) and (workdir / "checkpoints" / "7").is_dir()


def test_other_data_and_another_architecture_are_refused_not_skipped(two):
    with pytest.raises(UserError, match="was saved with another data, catalogue; this is other"):
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
def test_what_is_kept(tmp_path, options, kept):
    scores = {step: {lib.BEST: float(10 * (step == 6) + 5 * (step == 3) + 0.1 * step)} for step in (3, 6, 9)}
    write(tmp_path / "w", range(1, 13), training(**options), scores)
    assert sorted(int(path.name) for path in (tmp_path / "w" / "checkpoints").iterdir()) == kept


def test_the_best_is_kept_over_restarts(tmp_path):
    scores = {step: {lib.BEST: 50.0 if step == 3 else 10.0} for step in (3, 6)}
    for steps in (range(1, 5), range(5, 9)):
        write(tmp_path / "w", steps, training(keep=1, keep_best=1), scores)
    assert sorted(int(path.name) for path in (tmp_path / "w" / "checkpoints").iterdir()) == [3, 8]


def test_a_step_that_was_set_aside_is_saved_anew(two, tmp_path):
    workdir = tmp_path / "w"
    shutil.copytree(two, workdir)
    truncate(next((workdir / "checkpoints" / "7" / "params" / "d").iterdir()))
    opened = lib.Checkpoints(storage.Store(workdir).checkpoints, training())
    assert opened.restore(like(state(0)), {"data": "catalogue"}, lambda _: None)[0] == 5
    opened.save(state(7), 7, ABOUT)
    opened.close()
    (step, found), told = restore(workdir)
    assert step == 7 and equal(found, state(7)) and not told


def test_too_little_room_is_told_before_anything_is_written(two, tmp_path, monkeypatch):
    workdir = tmp_path / "w"
    shutil.copytree(two, workdir)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: type("", (), {"free": 1000}))
    with pytest.raises(UserError, match=r"No space left on device: a checkpoint needs 0.1 MB and 0.0 MB are free"):
        write(workdir, (9,))
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["5", "7"]


def test_processes_that_see_other_checkpoints_wait_and_then_refuse(two, monkeypatch):
    """As where a shared folder shows one of them a new one later."""
    seen = [["[5]"], ["[5]"], ["[5, 7]"]]
    monkeypatch.setattr(lib.time, "sleep", lambda _: None)
    monkeypatch.setattr(lib.hosts, "gather", lambda said: [said, *(seen.pop(0) if seen else ["[5, 7]"])])
    opened = lib.Checkpoints(storage.Store(two).checkpoints)
    assert opened._agreed() == [5, 7] and not seen
    monkeypatch.setattr(lib.hosts, "gather", lambda said: [said, "[5]"])
    with pytest.raises(Unavailable, match=r"process 1 sees checkpoints \[5\] and process 0 \[5, 7\]; give all"):
        opened._agreed()


def test_an_error_of_the_users_waits_for_a_save_under_way(tmp_path):
    """Which would be lost with the process."""
    (tmp_path / "w").mkdir()
    with pytest.raises(UserError), lib.Checkpoints(storage.Store(tmp_path / "w").checkpoints, training()) as opened:
        opened.save(state(3), 3, ABOUT)
        raise UserError("numbers went bad")
    assert (tmp_path / "w" / "checkpoints" / "3").is_dir()


def test_the_digest_does_not_depend_on_the_devices_and_sees_every_bit():
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
        for place in range(8):
            for bit in range(width):
                changed = bits.copy()
                changed[place] ^= unsigned(1 << bit)
                seen.add(tuple(np.asarray(digest(jnp.asarray(changed.view(array.dtype)))).tolist()))
        assert len(seen) == 1 + 8 * width
    assert not np.array_equal(digest(kernel), digest(kernel[::-1]))


def test_saved_on_one_mesh_restored_on_another(tmp_path):
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
    (step, found), told = restore(workdir, abstract=like(state(0, placed(meshes[1]))))
    assert step == 3 and equal(found, state(3)) and not told
    assert found.params["encoder"]["kernel"].sharding.num_devices == 8
