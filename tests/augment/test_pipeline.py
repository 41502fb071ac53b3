"""Augmented data: additions, unchanged parts, the filter, provenance, and the engines."""

import dataclasses
import functools
import importlib.util
import json
import shutil
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moon_jax import outputs
from moon_jax.augment import candidates, engines, pipeline, text
from moon_jax.augment.options import Options
from moon_jax.data import editing
from moon_jax.data import prepared as prepared_lib
from moon_jax.data.images import decode
from moon_jax.errors import Unavailable, UserError
from moon_jax.ingest import prepare, workers
from moon_jax.types import Product
from tests.conftest import SCHEMA, jpeg, prepared_from, records

LOCAL = engines.Local(functools.partial(workers.pool, 1), 1)
PIXELS = 10**7


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """60 products, about 6 of them held out, some with two images or a small one. Units are small, and shards start
    and end inside them."""
    folder, rows = tmp_path_factory.mktemp("data"), records(60)
    for number, row in enumerate(rows):
        if number % 5 == 0:
            row["images"] = [*row["images"], {"bytes": jpeg((90, 200, 90), (30, 30), number), "path": ""}]
        if number % 9 == 8:
            row["images"] = [{"bytes": jpeg((90, 90, 200), (40, 15), number), "path": ""}]
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), folder / "products.parquet")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(candidates, "UNIT", 7)
        patched.setattr(prepare, "SHARD_BYTES", 9_000)
        found = prepared_from(folder / "products.parquet", folder / "p")
        sizes = np.cumsum([shard["records"] for shard in found.manifest["shards"]])
        assert len(sizes) > 4 and (sizes % 7 != 0).any()
        yield folder / "p"


def augmented(data, output, engine=LOCAL, **options):
    return pipeline.augment(data, output, Options(**options), PIXELS, engine, 2)


class Fake:
    """An embedder with known similarities: each vector is computed from the item's letters or pixels."""

    name = "fake"

    def encode(self, items):
        found = []
        for item in items:
            value = sum(item.text.encode()) if item.text else int(np.asarray(decode(item.images[0], PIXELS)).sum())
            angle = np.random.default_rng(value).uniform(0, 1)
            found.append([np.cos(angle), np.sin(angle)])
        return np.array(found, np.float32)


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(pipeline.registry, "open_embedder", lambda model, max_pixels: Fake())
    return Fake()


@pytest.fixture(scope="module")
def plain(data, tmp_path_factory):
    return augmented(data, tmp_path_factory.mktemp("plain") / "a")


def results(prepared):
    return pq.read_table(prepared.folder / pipeline.RESULTS).to_pylist()


def test_only_training_products_change(data, plain):
    before = prepared_lib.open_prepared(data)
    assert len(plain.products) == len(before.products) and plain.fingerprint != before.fingerprint
    gained = 0
    for index, (old, new) in enumerate(zip(before.products, plain.products, strict=True)):
        assert dataclasses.replace(new, enriched_texts=(), expanded_images=()) == old
        if index in before.train:
            expected = text.enriched(old) if old.text else ""
            assert new.enriched_texts == ((expected,) if expected else ())
            large = old.images and min(decode(old.images[0], PIXELS).size) >= editing.LEAST_SIDE
            assert len(new.expanded_images) == (2 if large else 0)
            gained += bool(new.expanded_images)
        else:
            assert new == old
    assert gained > 30
    for name in (prepared_lib.GROUPS, prepared_lib.TRIPLETS, prepared_lib.VAL_QUERIES):
        assert (data / name).read_bytes() == (plain.folder / name).read_bytes()
    vals = [path.name for path in data.glob("moon_jax-val.*")]
    assert vals and all((data / name).read_bytes() == (plain.folder / name).read_bytes() for name in vals)
    assert not (plain.folder / ".work").exists()


def test_each_result_has_its_origin(plain):
    rows = results(plain)
    added = [row for row in rows if row["reason"] is None]
    summary = plain.manifest["augmented"]
    assert summary["text"]["added"] + summary["image"]["added"] == len(added)
    assert summary["options"]["expansions"] == 2 and summary["embedder"] == "" and summary["thresholds"] == {}
    for row in added:
        product = plain.products[row["product"]]
        assert row["id"] == product.id and row["score"] is None
        if row["kind"] == "text":
            assert product.enriched_texts == (row["text"],) and row["backend"] == "rules"
        else:
            assert row["backend"] == "classical" and row["operation"] in editing.OPERATIONS
            made = editing.expand(decode(product.images[0], PIXELS), 2, np.random.default_rng(row["seed"]))
            assert product.expanded_images[row["number"]] == made[row["number"]][1]
    assert (plain.folder / pipeline.PICTURE).read_bytes().startswith(b"\x89PNG")


def test_the_filter_drops_the_lowest_of_each_kind(data, tmp_path, fake):
    """Compared with float64 numpy over all pairs. A result without a counterpart has no score and is kept."""
    prepared = augmented(data, tmp_path / "a", model="m", quantile=0.25)
    rows, before = results(prepared), prepared_lib.open_prepared(data)
    unfiltered = augmented(data, tmp_path / "u")
    added = {(p.id, k): image for p in unfiltered.products for k, image in enumerate(p.expanded_images)}
    scores = {"text": [], "image": []}
    for row in rows:
        product = before.products[row["product"]]
        made, origin = Product(text=row["text"]), Product(images=product.images[:1])
        if row["kind"] == "image":
            made, origin = Product(images=(added[row["id"], row["number"]],)), Product(text=product.text)
        if not (origin.text or origin.images):
            assert row["score"] is None and row["reason"] is None
            continue
        vectors = fake.encode([made, origin]).astype(np.float64)
        assert row["score"] == pytest.approx(vectors[0] @ vectors[1], abs=1e-6)
        scores[row["kind"]].append((row["score"], row["reason"]))
    summary = prepared.manifest["augmented"]
    for kind, scored in scores.items():
        assert len(scored) > 20
        dropped = int(0.25 * len(scored))
        lowest = sorted(score for score, _ in scored)
        assert summary["thresholds"][kind] == lowest[dropped]
        assert {score for score, reason in scored if reason == pipeline.DISAGREES} == set(lowest[:dropped])
        assert summary[kind]["left_out"] == {pipeline.DISAGREES: dropped}
        assert summary[kind]["added"] == summary[kind]["made"] - dropped
    assert any(row["score"] is None for row in rows)
    kept = sum(len(product.enriched_texts) + len(product.expanded_images) for product in prepared.products)
    assert kept == sum(row["reason"] is None for row in rows)


def test_a_repeat_does_nothing_and_other_options_are_refused(data, plain, tmp_path):
    before = {path.name: path.stat().st_mtime_ns for path in plain.folder.iterdir()}
    assert augmented(data, plain.folder).fingerprint == plain.fingerprint
    assert before == {path.name: path.stat().st_mtime_ns for path in plain.folder.iterdir()}
    with pytest.raises(UserError, match="other options"):
        augmented(data, plain.folder, seed=1)
    with pytest.raises(UserError, match="already augmented"):
        augmented(plain.folder, tmp_path / "twice")
    for output in (data, data / "sub"):
        with pytest.raises(UserError, match="inside --data"):
            augmented(data, output)
    with pytest.raises(UserError, match="not prepared data"):
        augmented(tmp_path, tmp_path / "x")
    with pytest.raises(UserError, match="no such folder"):
        augmented(tmp_path / "nowhere", tmp_path / "x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("x")
    with pytest.raises(UserError, match="holds other files"):
        augmented(data, tmp_path / "full")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"expansions": -1}, "--expansions"),
        ({"quantile": 1.0}, "--quantile"),
        ({"text": "none", "images": "none"}, "nothing to do"),
        ({"text": "none", "expansions": 0}, "nothing to do"),
        ({"text": "ftp://x"}, "give rules, none, or a server's URL"),
        ({"text": "http://127.0.0.1:9/v1"}, "--text-model"),
        ({"text_model": "m"}, "--text-model"),
        ({"text": "http://me:secret@x/v1", "text_model": "m"}, "must not contain a password"),
        ({"images": "nowhere"}, "model_index.json"),
        ({"image_steps": 4}, "--image-steps: needs"),
        ({"quantile": 0.3}, "--quantile: needs"),
        ({"model": "nowhere"}, "nowhere"),
    ],
)
def test_an_invalid_option_is_an_error_before_any_work(data, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        augmented(data, tmp_path / "a", **options)
    assert not (tmp_path / "a").exists()


def test_the_error_for_a_missing_package_names_the_extra(data, tmp_path, monkeypatch):
    for module, options, extra in (
        ("openai", {"text": "http://127.0.0.1:9/v1", "text_model": "m"}, "openai"),
        ("diffusers", {"images": "hf://a/b"}, "diffusers"),
    ):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(UserError, match=rf"pip install -e '\.\[{extra}\]'"):
            augmented(data, tmp_path / "a", **options)
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[beam\]'"):
        engines.load_beam([])


def test_another_model_is_not_resumed(data, tmp_path, fake, monkeypatch):
    augmented(data, tmp_path / "a", model="m")
    monkeypatch.setattr(Fake, "name", "another")
    with pytest.raises(UserError, match="other options"):
        augmented(data, tmp_path / "a", model="m")
    other = augmented(data, tmp_path / "b", model="m")
    assert other.manifest["augmented"]["embedder"] == "another"
    monkeypatch.setattr(Fake, "encode", lambda self, items: np.full((len(items), 2), np.nan, np.float32))
    with pytest.raises(UserError, match="not finite"):
        augmented(data, tmp_path / "c", model="m")


def test_data_prepared_again_at_the_same_path_is_read_again(tmp_path):
    for number, title in enumerate(("old", "new")):
        rows = [row | {"title": f"{title} {row['product_id']}"} for row in records(20)]
        shutil.rmtree(tmp_path / "p", ignore_errors=True)
        pq.write_table(pa.Table.from_pylist(rows, SCHEMA), tmp_path / "products.parquet")
        prepared_from(tmp_path / "products.parquet", tmp_path / "p")
        found = augmented(tmp_path / "p", tmp_path / str(number), images="none")
        assert {product.text.split()[0] for product in found.products} == {title}
        assert {product.enriched_texts[0].split()[0] for product in found.products if product.enriched_texts} == {title}


def test_the_remains_of_a_killed_run_are_removed(tmp_path):
    """Killed at its first file, and with half-written files."""
    output = tmp_path / "o"
    (output / outputs.WORK / "units").mkdir(parents=True)
    (output / outputs.WORK / f"{outputs.SOURCE}.tmp").write_text("{")
    with outputs.claim(output, "source", ("units",)) as work:
        for path in (work / "units" / "7.3.tmp", output / "shard.9.tmp"):
            path.write_text("half")
    with outputs.claim(output, "source", ("units",)):
        assert not list(output.rglob("*.tmp"))


def test_kinds_can_be_left_out_and_seeds_differ(data, plain, tmp_path):
    bare = augmented(data, tmp_path / "t", images="none")
    assert {row["kind"] for row in results(bare)} == {"text"}
    other = augmented(data, tmp_path / "i", text="none", expansions=1, seed=5)
    assert {row["kind"] for row in results(other)} == {"image"}
    generate = candidates.Generate(data, "", tmp_path, Options(), PIXELS, 7, 1)
    assert generate._seed(plain.products[0], "text") != generate._seed(plain.products[0], "image")
    first = {p.id: p.expanded_images[0] for p in plain.products if p.expanded_images}
    assert all(first[p.id] != p.expanded_images[0] for p in other.products if p.expanded_images)


def test_beam_writes_the_same_bytes(data, plain, tmp_path):
    pytest.importorskip("apache_beam", reason="apache-beam is not installed: pip install -e '.[beam]'")
    other = augmented(data, tmp_path / "a", engines.Beam(("--runner=DirectRunner",)))
    names = {path.name for path in plain.folder.iterdir()}
    assert names == {path.name for path in other.folder.iterdir()}
    for name in names:
        assert (plain.folder / name).read_bytes() == (other.folder / name).read_bytes(), name


@dataclasses.dataclass(frozen=True)
class Failing:
    """Work that fails at item 3."""

    work: object
    error: Exception

    def done(self, number):
        return (self.work / str(number)).exists()

    def __call__(self, number):
        if number == 3:
            raise self.error
        (self.work / str(number)).touch()


@pytest.mark.parametrize("error", [UserError("the mug broke"), Unavailable("no answer")])
def test_a_failure_in_beam_becomes_a_one_line_error(tmp_path, error):
    pytest.importorskip("apache_beam", reason="apache-beam is not installed: pip install -e '.[beam]'")
    with pytest.raises(type(error), match=f"^{error}$"):
        engines.Beam(())("work", Failing(tmp_path, error), range(6), pipeline.silent)
    arguments = ("--direct_running_mode=multi_threading", "--direct_num_workers=2")
    for options in ((), arguments):
        with pytest.raises(UserError, match=r"--beam: .*a bug"):
            engines.Beam(options)("work", Failing(tmp_path, ValueError("a bug")), range(6), pipeline.silent)


def test_beam_does_nothing_twice(tmp_path):
    pytest.importorskip("apache_beam", reason="apache-beam is not installed: pip install -e '.[beam]'")
    work = Failing(tmp_path, ValueError("done already"))
    (tmp_path / "3").touch()
    engines.Beam(())("work", work, range(6), pipeline.silent)
    engines._one(work, 3)
    assert all(map(work.done, range(6)))


def test_an_option_unknown_to_beam_is_an_error(data, tmp_path):
    pytest.importorskip("apache_beam", reason="apache-beam is not installed: pip install -e '.[beam]'")
    with pytest.raises(UserError, match="--beam runer: not an option of Apache Beam; the closest is runner"):
        augmented(data, tmp_path / "a", engines.Beam(("--runer=DirectRunner",)))
    with pytest.raises(UserError, match=r"--beam: .*NoRunner"):
        augmented(data, tmp_path / "b", engines.Beam(("--runner=NoRunner",)))


def test_a_stop_request_keeps_finished_work(data, plain, tmp_path, monkeypatch):
    """Requested in the middle, locally and in Beam. The same command then resumes and writes the same bytes."""
    from moon_jax import interrupt

    runs = [LOCAL]
    if importlib.util.find_spec("apache_beam"):
        runs.append(engines.Beam(()))
    for number, engine in enumerate(runs):
        output, calls = tmp_path / str(number), []
        make = editing.expand

        def stop(*arguments, calls=calls, make=make):
            calls.append(0)
            if len(calls) == 20:
                interrupt.REQUESTED.set()
            return make(*arguments)

        monkeypatch.setattr(editing, "expand", stop)
        with pytest.raises(KeyboardInterrupt):
            augmented(data, output, engine)
        interrupt.forget()
        monkeypatch.setattr(editing, "expand", make)
        assert 0 < len(list((output / ".work" / "units").iterdir())) < 7 and not prepared_lib.is_prepared(output)
        augmented(data, output, engine)
        for path in plain.folder.iterdir():
            assert path.read_bytes() == (output / path.name).read_bytes(), path.name
    assert (
        json.loads((plain.folder / "manifest.json").read_text())["augmented"]["of"]
        == prepared_lib.open_prepared(data).fingerprint
    )
