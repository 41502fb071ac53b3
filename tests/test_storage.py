"""Workdirs in a bucket: pull, push, move, and error messages."""

from pathlib import Path

import pytest
from etils import epath

from moon_jax import storage
from moon_jax.errors import UserError


@pytest.fixture
def fs(bucket):
    import gcsfs

    return gcsfs.GCSFileSystem(skip_instance_cache=True)


def held(fs, address):
    fs.invalidate_cache()
    root = address.removeprefix("gs://")
    return {path.removeprefix(f"{root}/"): fs.cat_file(path).decode() for path in fs.find(root)}


def test_a_local_folder_is_used_in_place(tmp_path):
    store = storage.Store(tmp_path / "w")
    assert store.files == tmp_path / "w" and str(store) == str(tmp_path / "w") and not store.remote
    store.pull()
    store.push()
    assert not (tmp_path / "w").exists() and str(store.checkpoints) == str(tmp_path / "w" / "checkpoints")


def test_push_uploads_changed_files_and_removes_deleted_ones(bucket, fs):
    one = storage.Store(f"{bucket}/push/")
    assert str(one) == f"{bucket}/push" and str(one.checkpoints) == f"{bucket}/push/checkpoints"
    one.pull()
    (one.files / "data").mkdir()
    (one.files / "data" / "a").write_text("a")
    (one.files / "log").write_text("1")
    (one.files / "half.tmp").write_text("half")
    one.push()
    assert held(fs, f"{bucket}/push") == {"data/a": "a", "log": "1"}
    fs.pipe_file("shop/push/checkpoints/4/x", b"x")
    fs.pipe_file("shop/push/data/a", b"not written again")
    with (one.files / "log").open("a") as file:
        file.write("2")
    (one.files / "data" / "b").write_text("b")
    one.push()
    expected = {"data/a": "not written again", "data/b": "b", "log": "12", "checkpoints/4/x": "x"}
    assert held(fs, f"{bucket}/push") == expected
    other = storage.Store(f"{bucket}/push")
    other.pull()
    assert sorted(path.name for path in other.files.rglob("*") if path.is_file()) == ["a", "b", "log"]
    (other.files / "data" / "b").unlink()
    other.push()
    del expected["data/b"]
    assert held(fs, f"{bucket}/push") == expected
    few = storage.Store(f"{bucket}/push")
    few.pull(["data/a", "absent"])
    assert [path.name for path in few.files.rglob("*") if path.is_file()] == ["a"]


def test_files_are_pushed_in_the_order_of_writing(bucket, monkeypatch):
    """So an interrupted push never leaves a manifest without its data."""
    store = storage.Store(f"{bucket}/order")
    for name in ("triplets", "quarantine", "a_manifest"):
        (store.files / name).write_text(name)
    order = []
    monkeypatch.setattr(store._bucket, "put_file", lambda local, remote: order.append(remote.split("/")[-1]))
    store.push()
    assert order == ["triplets", "quarantine", "a_manifest"]


@pytest.mark.parametrize("where", ["bucket", "local"])
def test_move_replaces_the_target(bucket, tmp_path, where):
    root = epath.Path(f"{bucket}/move" if where == "bucket" else tmp_path)
    for name, text in (("a/x/1", "new"), ("a/2", "new"), ("aside/a/3", "old"), ("ab/1", "other")):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    storage.move(root / "a", root / "aside" / "a")
    there = [
        name
        for name in ("a/x/1", "a/2", "ab/1", *(f"aside/a/{n}" for n in ("x/1", "2", "3")))
        if (root / name).exists()
    ]
    assert there == ["ab/1", "aside/a/x/1", "aside/a/2"]


def test_local_copies_are_removed(bucket):
    store = storage.Store(f"{bucket}/copies")
    assert store.files.is_dir()
    storage.remove_copies()
    assert not store.files.exists()


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("gs://", "gs://: no folder in a bucket; write gs://bucket/folder"),
        ("gs://shop/", "gs://shop/: no folder in a bucket"),
        ("s3:/shop/run", "s3://shop/run: neither a local path nor gs://; mount it"),
    ],
)
def test_an_invalid_address_is_refused(address, message):
    with pytest.raises(UserError) as error:
        storage.Store(address)
    assert str(error.value).startswith(message)


def test_an_address_survives_conversion_to_a_path(bucket):
    assert str(storage.Store(Path(f"{bucket}/run"))) == f"{bucket}/run" and storage.is_remote(Path(f"{bucket}/run"))
    assert not storage.is_address("c/d:/e") and not storage.is_address(Path("/a/b"))


def test_a_missing_bucket_is_reported_in_one_line(bucket):
    for work in ("pull", "push"):
        store = storage.Store("gs://nowhere/run")
        (store.files / "log").write_text("1")
        with pytest.raises(UserError, match=r"^gs://nowhere/run: .*; check that the bucket exists") as error:
            getattr(store, work)()
        assert "\n" not in str(error.value)


def test_the_error_without_gcsfs_says_what_to_install(monkeypatch):
    monkeypatch.setattr(storage.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"gcsfs is not installed; pip install -e '.\[gcs\]'"):
        storage.Store("gs://shop/run")
