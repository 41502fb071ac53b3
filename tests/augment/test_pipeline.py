"""Augmented data: what is added and what is left as it was, the filter, provenance, and who does the work."""

import dataclasses
import functools
import json
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest

from moon_jax.augment import candidates, engines, images, pipeline, text
from moon_jax.augment.options import Options
from moon_jax.config import Unavailable, UserError
from moon_jax.data import prepared as prepared_lib
from moon_jax.data import workers
from moon_jax.data.images import decode
from moon_jax.types import Product
from tests.conftest import prepared_from

LOCAL = engines.Local(functools.partial(workers.pool, 1), 1)
PIXELS = 10**7


@pytest.fixture(scope="module")
def data(tmp_path_factory, catalogue):
    """60 products, of which 6 or so are kept for evaluation; small units."""
    before, candidates.UNIT = candidates.UNIT, 7
    folder = tmp_path_factory.mktemp("data") / "p"
    prepared_from(catalogue, folder)
    yield folder
    candidates.UNIT = before


def augmented(data, output, engine=LOCAL, **options):
    candidates.opened.cache_clear()
    return pipeline.augment(data, output, Options(**options), PIXELS, engine, 2)


class Fake:
    """An embedder whose similarities are known: what was made from what is told by the pixels and the letters."""

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
    pipeline._embedder.cache_clear()
    monkeypatch.setattr(pipeline.harness, "open_embedder", lambda model, max_pixels: Fake())
    yield Fake()
    pipeline._embedder.cache_clear()


@pytest.fixture(scope="module")
def plain(data, tmp_path_factory):
    return augmented(data, tmp_path_factory.mktemp("plain") / "a")


def results(prepared):
    return pq.read_table(prepared.folder / pipeline.RESULTS).to_pylist()


def test_training_products_gain_and_nothing_else_changes(data, plain):
    before = prepared_lib.open_prepared(data)
    assert len(plain.products) == len(before.products) and plain.fingerprint != before.fingerprint
    gained = 0
    for index, (old, new) in enumerate(zip(before.products, plain.products, strict=True)):
        assert dataclasses.replace(new, enriched_texts=(), expanded_images=()) == old
        if index in before.train:
            expected = text.enriched(old) if old.text else ""
            assert new.enriched_texts == ((expected,) if expected else ())
            assert len(new.expanded_images) == (2 if old.images else 0)
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
    told = plain.manifest["augmented"]
    assert told["text"]["added"] + told["image"]["added"] == len(added)
    assert told["options"]["expansions"] == 2 and told["embedder"] == "" and told["thresholds"] == {}
    for row in added:
        product = plain.products[row["product"]]
        assert row["id"] == product.id and row["score"] is None
        if row["kind"] == "text":
            assert product.enriched_texts == (row["text"],) and row["backend"] == "rules"
        else:
            assert row["backend"] == "classical" and row["operation"] in images.OPERATIONS
            made = images.expand(decode(product.images[0], PIXELS), 2, np.random.default_rng(row["seed"]))
            assert product.expanded_images[row["number"]] == made[row["number"]][1]
    assert (plain.folder / pipeline.PICTURE).read_bytes().startswith(b"\x89PNG")


def test_the_filter_drops_the_lowest_of_each_kind(data, tmp_path, fake):
    """Against float64 numpy over all pairs; what has no counterpart has no score, and stays."""
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
    told = prepared.manifest["augmented"]
    for kind, judged in scores.items():
        assert len(judged) > 20
        dropped = int(0.25 * len(judged))
        lowest = sorted(score for score, _ in judged)
        assert told["thresholds"][kind] == lowest[dropped]
        assert {score for score, reason in judged if reason == pipeline.DISAGREES} == set(lowest[:dropped])
        assert told[kind]["left_out"] == {pipeline.DISAGREES: dropped}
        assert told[kind]["added"] == told[kind]["made"] - dropped
    assert any(row["score"] is None for row in rows)
    kept = sum(len(product.enriched_texts) + len(product.expanded_images) for product in prepared.products)
    assert kept == sum(row["reason"] is None for row in rows)


def test_the_same_again_is_done_and_anything_else_is_refused(data, plain, tmp_path):
    before = {path.name: path.stat().st_mtime_ns for path in plain.folder.iterdir()}
    assert augmented(data, plain.folder).fingerprint == plain.fingerprint
    assert before == {path.name: path.stat().st_mtime_ns for path in plain.folder.iterdir()}
    with pytest.raises(UserError, match="other options"):
        augmented(data, plain.folder, seed=1)
    with pytest.raises(UserError, match="augmented already"):
        augmented(plain.folder, tmp_path / "twice")
    with pytest.raises(UserError, match="the same as --data"):
        augmented(data, data)
    with pytest.raises(UserError, match="not prepared data"):
        augmented(tmp_path, tmp_path / "x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("x")
    with pytest.raises(UserError, match="holds other things"):
        augmented(data, tmp_path / "full")


@pytest.mark.parametrize(
    "options, told",
    [
        ({"expansions": -1}, "--expansions"),
        ({"quantile": 1.0}, "--quantile"),
        ({"text": "none", "images": "none"}, "nothing to do"),
        ({"text": "none", "expansions": 0}, "nothing to do"),
        ({"text": "ftp://x"}, "give rules, none, or a server's URL"),
        ({"text": "http://127.0.0.1:9/v1"}, "--text-model"),
        ({"text_model": "m"}, "--text-model"),
        ({"images": "nowhere"}, "model_index.json"),
        ({"model": "nowhere"}, "nowhere"),
    ],
)
def test_an_option_that_cannot_be_is_told_before_any_work(data, tmp_path, options, told):
    with pytest.raises(UserError, match=told):
        augmented(data, tmp_path / "a", **options)
    assert not (tmp_path / "a").exists()


def test_what_is_not_installed_is_told_with_the_extra(data, tmp_path, monkeypatch):
    for module, options, extra in (
        ("cv2", {}, "augment"),
        ("openai", {"text": "http://127.0.0.1:9/v1", "text_model": "m"}, "openai"),
        ("diffusers", {"images": "x"}, "diffusers"),
    ):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(UserError, match=rf"pip install -e '\.\[{extra}\]'"):
            augmented(data, tmp_path / "a", **options)
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[beam\]'"):
        engines.load_beam([])


def test_kinds_can_be_left_out_and_seeds_differ(data, plain, tmp_path):
    bare = augmented(data, tmp_path / "t", images="none")
    assert {row["kind"] for row in results(bare)} == {"text"}
    other = augmented(data, tmp_path / "i", text="none", expansions=1, seed=5)
    assert {row["kind"] for row in results(other)} == {"image"}
    first = {p.id: p.expanded_images[0] for p in plain.products if p.expanded_images}
    assert all(first[p.id] != p.expanded_images[0] for p in other.products if p.expanded_images)


def test_beam_gives_the_same_bytes(data, plain, tmp_path):
    pytest.importorskip("apache_beam", reason="apache-beam is not installed: pip install -e '.[beam]'")
    other = augmented(data, tmp_path / "a", engines.Beam(("--runner=DirectRunner",)))
    names = {path.name for path in plain.folder.iterdir()}
    assert names == {path.name for path in other.folder.iterdir()}
    for name in names:
        assert (plain.folder / name).read_bytes() == (other.folder / name).read_bytes(), name


@dataclasses.dataclass(frozen=True)
class Failing:
    """Work that ends badly at number 3."""

    work: object
    error: Exception

    def done(self, number):
        return (self.work / str(number)).exists()

    def __call__(self, number):
        if number == 3:
            raise self.error
        (self.work / str(number)).touch()


@pytest.mark.parametrize("error", [UserError("the mug broke"), Unavailable("no answer")])
def test_what_fails_in_beam_is_told_in_one_line(tmp_path, error):
    pytest.importorskip("apache_beam", reason="apache-beam is not installed: pip install -e '.[beam]'")
    with pytest.raises(type(error), match=f"^{error}$"):
        engines.Beam(())("work", Failing(tmp_path, error), range(6), pipeline.silent)
    with pytest.raises(UserError, match=r"--beam: .*a bug"):
        engines.Beam(())("work", Failing(tmp_path, ValueError("a bug")), range(6), pipeline.silent)


def test_options_that_beam_does_not_have_are_told(data, tmp_path):
    pytest.importorskip("apache_beam", reason="apache-beam is not installed: pip install -e '.[beam]'")
    with pytest.raises(UserError, match="--beam runer: not an option of Apache Beam; the closest is runner"):
        augmented(data, tmp_path / "a", engines.Beam(("--runer=DirectRunner",)))
    with pytest.raises(UserError, match=r"--beam: .*NoRunner"):
        augmented(data, tmp_path / "b", engines.Beam(("--runner=NoRunner",)))


def test_a_stop_ends_the_work_and_what_is_done_stays(data, plain, tmp_path, monkeypatch):
    """Asked for in the middle, locally and in Beam; then the same command gives the same bytes."""
    from moon_jax import interrupt

    runs = [LOCAL]
    if "apache_beam" in sys.modules:
        runs.append(engines.Beam(()))
    for number, engine in enumerate(runs):
        output, calls = tmp_path / str(number), []
        make = images.expand

        def stop(*given, calls=calls, make=make):
            calls.append(0)
            if len(calls) == 20:
                interrupt.REQUESTED.set()
            return make(*given)

        monkeypatch.setattr(images, "expand", stop)
        with pytest.raises(KeyboardInterrupt):
            augmented(data, output, engine)
        interrupt.forget()
        monkeypatch.setattr(images, "expand", make)
        assert 0 < len(list((output / ".work" / "units").iterdir())) < 7 and not prepared_lib.is_prepared(output)
        augmented(data, output, engine)
        for path in plain.folder.iterdir():
            assert path.read_bytes() == (output / path.name).read_bytes(), path.name
    assert json.loads((plain.folder / "manifest.json").read_text())["augmented"]["of"]
