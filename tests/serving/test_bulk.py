"""Bulk embedding and search: the files written, resuming, errors, and search results."""

import dataclasses
import json
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moon_jax import cli
from moon_jax.embedders.colours import Colours
from moon_jax.embedders.protocol import ByItem
from moon_jax.embedders.vectors import Vectors
from moon_jax.errors import UserError
from moon_jax.ingest.synthetic import SCHEMA
from moon_jax.outputs import checksum
from moon_jax.serving import bulk
from moon_jax.serving.embedder import Embedder
from moon_jax.serving.search import Index
from moon_jax.types import VIEWS, Product
from tests import killing
from tests.conftest import jpeg, prepared_from, random_params, records, tiny


@pytest.fixture(scope="module")
def embedder(tokenizer):
    config = tiny()
    return Embedder(config, random_params(config, tokenizer), tokenizer, "f00d", 1)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(bulk, "SHARD", 16)


def rows_of(folder):
    return [row for path in sorted(folder.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


@pytest.fixture(scope="module")
def everything(embedder, prepared, tmp_path_factory):
    """All views in float32, and the same vectors from the embedder itself."""
    folder = tmp_path_factory.mktemp("vectors") / "v"
    patch = pytest.MonkeyPatch()
    patch.setattr(bulk, "SHARD", 16)
    manifest = bulk.embed(embedder, prepared, folder, bulk.Options(views=VIEWS))
    patch.undo()
    products = [prepared.products[index] for index in sorted({*prepared.train, *prepared.val})]
    vectors, present = embedder.encode_views(products)
    own = {(products[n].id, VIEWS[v]): vectors[n, v] for n, v in zip(*np.nonzero(present), strict=True)}
    return folder, manifest, own


def test_every_view_of_every_product_is_written_once(everything, prepared):
    folder, manifest, own = everything
    rows = rows_of(folder)
    assert [*own] == [(row["id"], row["view"]) for row in rows]
    for row in rows:
        np.testing.assert_allclose(row["vector"], own[row["id"], row["view"]], atol=1e-6)
    fields = ("model", "views", "dtype", "width", "template", "pooling", "products", "rows")
    assert {name: manifest[name] for name in fields} == {
        "model": "moon_jax f00d", "views": ["t", "i", "mm"], "dtype": "float32", "width": 24, "template": "bare",
        "pooling": "mean", "products": 60, "rows": len(own),
    }  # fmt: skip
    assert manifest == json.loads((folder / "manifest.json").read_text())
    assert len(manifest["shards"]) == 4 and sorted(path.name for path in folder.iterdir()) == sorted(
        ["manifest.json", "source.json", *(shard["file"] for shard in manifest["shards"])]
    )


def test_by_default_a_product_is_embedded_from_everything_it_has(everything, embedder, prepared, tmp_path):
    _, _, own = everything
    bulk.embed(embedder, prepared, tmp_path / "v")
    rows = rows_of(tmp_path / "v")
    assert len(rows) == len({row["id"] for row in rows}) == 60
    assert {row["view"] for row in rows} == {"t", "i", "mm"}
    for row in rows:
        best = next(view for view in ("mm", "i", "t") if (row["id"], view) in own)
        assert row["view"] == best
        np.testing.assert_allclose(row["vector"], own[row["id"], best], atol=1e-6)


@pytest.mark.parametrize(("dtype", "most"), [("float16", 5e-4), ("int8", 4e-3)])
def test_smaller_dtypes_keep_the_vectors(everything, embedder, prepared, tmp_path, dtype, most):
    _, _, own = everything
    bulk.embed(embedder, prepared, tmp_path / "v", bulk.Options(("i",), dtype, 8))
    index = Index(tmp_path / "v")
    field = pq.read_schema(next((tmp_path / "v").glob("*.parquet"))).field("vector").type
    assert (field.list_size, str(field.value_type)) == (8, {"float16": "halffloat"}.get(dtype, dtype))
    expected = np.stack([own[identity, "i"][:8] for identity in index.ids])
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    error = np.abs(index[: len(index)] - expected).max()
    assert 0 < error < most
    np.testing.assert_allclose(np.linalg.norm(index[: len(index)], axis=1), 1, atol=1e-6)  # cosines are cosines
    if dtype == "int8":  # the largest entry of a vector uses the whole range
        assert all(max(map(abs, row["vector"])) == 127 for row in rows_of(tmp_path / "v"))


def test_an_interrupted_embed_resumes_with_identical_files(everything, embedder, prepared, tmp_path):
    folder, _, _ = everything
    options, calls = bulk.Options(views=VIEWS), []

    class Failing(Embedder):
        def __init__(self):
            self.__dict__ = embedder.__dict__

        def encode_views(self, products, **more):
            calls.append(products[0].id)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return super().encode_views(products, **more)

    with pytest.raises(KeyboardInterrupt):
        bulk.embed(Failing(), prepared, tmp_path / "v", options)
    with pytest.raises(UserError, match="holds unfinished work from another or a changed source"):
        bulk.embed(embedder, prepared, tmp_path / "v", bulk.Options(views=("t",)))
    bulk.embed(Failing(), prepared, tmp_path / "v", options)
    assert len(calls) == 3 + 2  # two of the four files existed already
    assert killing.content(tmp_path / "v") == killing.content(folder)
    bulk.embed(Failing(), prepared, tmp_path / "v", options)
    assert len(calls) == 5
    with pytest.raises(UserError, match="was made from another or a changed source"):
        bulk.embed(Colours(10**6), prepared, tmp_path / "v", options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (bulk.Options(("text",)), "--views text: give product, or some of t, i and mm"),
        (bulk.Options(("product", "t")), "give it alone"),
        (bulk.Options(("t", "t")), "each once"),
        (bulk.Options(dtype="float64"), "must be float32, float16 or int8"),
        (bulk.Options(width=25), "--width 25: the model has 24 dimensions"),
        (bulk.Options(width=-1), "give 1 or more"),
    ],
)
def test_invalid_options_are_refused(embedder, prepared, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        bulk.embed(embedder, prepared, tmp_path / "v", options)
    assert not (tmp_path / "v").exists() or not [*(tmp_path / "v").glob("*.parquet")]


def test_search_equals_a_full_sort(everything, embedder):
    folder, _, own = everything
    index = Index(folder, "mm")
    products = [Product(text="red shirt"), "blue bag"]
    found = index.search(embedder, products, 7)
    names, vectors = zip(*((name, vector) for (name, view), vector in own.items() if view == "mm"), strict=True)
    scores = embedder.encode(products) @ np.stack(vectors).T
    for row, ranked in zip(scores, found, strict=True):
        order = np.argsort(-row, kind="stable")[:7]
        assert [identity for identity, _ in ranked] == [names[n] for n in order]
        np.testing.assert_allclose([score for _, score in ranked], row[order], atol=1e-6)
    assert len(index.search(embedder, ["x"], 1000)[0]) == len(index)


def test_vectors_of_different_models_are_refused(everything, embedder, tmp_path):
    folder, manifest, _ = everything
    message = "vectors of moon_jax f00d, which do not compare with those of colour histogram"
    with pytest.raises(UserError, match=message):
        Index(folder, "i").search(Colours(10**6), ["x"])
    with pytest.raises(UserError, match="contains the views t, i, mm; choose one with --view"):
        Index(folder)
    other = tmp_path / "v"
    other.mkdir()
    for path in folder.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    path = other / manifest["shards"][1]["file"]
    pq.write_table(pq.read_table(path).replace_schema_metadata({"model": "another 1"}), path)
    changed = json.loads((other / "manifest.json").read_text())
    changed["shards"][1] |= {"bytes": path.stat().st_size, "checksum": checksum(path)}
    (other / "manifest.json").write_text(json.dumps(changed))
    with pytest.raises(UserError, match="vectors of another 1, but others of moon_jax f00d"):
        Index(other, "t")
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match="damaged"):
        Index(other, "t")
    with pytest.raises(UserError, match="not a complete output of moon-jax embed"):
        Index(tmp_path)


def copied(folder, other):
    other.mkdir()
    for path in folder.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    return other


@pytest.mark.parametrize("damage", ["missing", "cut", "flipped", "manifest"])
def test_damaged_files_are_refused_and_embedded_again(everything, embedder, prepared, tmp_path, damage):
    folder, manifest, _ = everything
    other = copied(folder, tmp_path / "v")
    path = other / manifest["shards"][2]["file"]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "missing":
        path.unlink()
    elif damage == "manifest":
        (other / "manifest.json").write_text("{}")
    else:
        path.write_bytes(content if damage == "flipped" else content[:-9])
    manifest_damaged = damage == "manifest"
    message = (
        "not a complete output of moon-jax embed" if manifest_damaged else "damaged .*; run the same embed command"
    )
    with pytest.raises(UserError, match=message):
        Index(other, "t")
    calls = []

    class Counting(Embedder):
        def __init__(self):
            self.__dict__ = embedder.__dict__

        def encode_views(self, products, **more):
            calls.append(len(products))
            return super().encode_views(products, **more)

    bulk.embed(Counting(), prepared, other, bulk.Options(views=VIEWS))
    assert killing.content(other) == killing.content(folder)
    assert len(calls) == (4 if manifest_damaged else 1)


def test_a_file_damaged_before_resuming_is_embedded_again(everything, embedder, prepared, tmp_path):
    folder, manifest, _ = everything

    class Failing(Embedder):
        def __init__(self):
            self.__dict__ = embedder.__dict__
            self.calls = 0

        def encode_views(self, products, **more):
            self.calls += 1
            if self.calls == 3:
                raise KeyboardInterrupt
            return super().encode_views(products, **more)

    options = bulk.Options(views=VIEWS)
    with pytest.raises(KeyboardInterrupt):
        bulk.embed(Failing(), prepared, tmp_path / "v", options)
    path = tmp_path / "v" / manifest["shards"][0]["file"]
    path.write_bytes(path.read_bytes()[:-9])
    bulk.embed(embedder, prepared, tmp_path / "v", options)
    assert killing.content(tmp_path / "v") == killing.content(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"shards": None},
        {"views": "t"},
        {"width": "24"},
        {"model": None},
        {"shards": [{"file": "x"}]},
        {"shards": "twice"},
        {"shards": "fewer"},
        {"shards": "elsewhere"},
    ],
)
def test_invalid_manifests_are_refused_in_one_line(everything, tmp_path, change):
    folder, manifest, _ = everything
    other, shards = copied(folder, tmp_path / "v"), manifest["shards"]
    odd = {
        "twice": [*shards, shards[0]],
        "fewer": shards[1:],
        "elsewhere": [shards[0] | {"file": f"../v/{shards[0]['file']}"}, *shards[1:]],
    }
    changed = {name: odd.get(value, value) if isinstance(value, str) else value for name, value in change.items()}
    (other / "manifest.json").write_text(json.dumps(manifest | changed))
    with pytest.raises(UserError, match=r"--index .*: not a complete output of moon-jax embed"):
        Index(other, "t")
    (other / "manifest.json").write_text(json.dumps(manifest | {"schema": 99}))
    with pytest.raises(UserError, match="format 99, but this version reads 1"):
        Index(other, "t")


class Given(ByItem):
    """Random vectors for texts that are numbers; none for anything else."""

    name, max_pixels = "given", 10**6

    def __init__(self, width=3, bad=None):
        self.width, self.bad = width, bad

    def _views(self, product):
        if (product.text or "").isdigit():
            yield 0, Product(text=product.text)

    def encode(self, items):
        vectors = np.random.default_rng(0).normal(size=(200, self.width))[[int(item.text) for item in items]]
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        vectors[[item.text == self.bad for item in items], 1] = np.inf
        return vectors.astype(np.float32)


def numbered(tmp_path):
    """A catalogue of training products "photo 0" to "photo 19", which come first, and held-out texts "20" to "39"."""
    tmp_path.mkdir()
    for name, numbers in (("train", range(20)), ("test", range(20, 40))):
        rows = [row for n, row in enumerate(records(40)) if n in numbers]
        for n, row in zip(numbers, rows, strict=True):
            photo = {"bytes": jpeg((9 * n, 9, 9), (20, 30), n), "path": None}
            row |= {"title": f"photo {n}", "images": [photo]} if n < 20 else {"title": str(n), "images": []}
        pq.write_table(pa.Table.from_pylist(rows, SCHEMA), tmp_path / f"{name}.parquet")
    return prepared_from(tmp_path, tmp_path / "p")


def test_files_without_rows_and_every_view_of_an_index(tmp_path):
    data = numbered(tmp_path / "c")

    for dtype in ("float32", "int8"):
        folder = tmp_path / dtype
        manifest = bulk.embed(Given(), data, folder, bulk.Options(dtype=dtype))
        assert manifest["width"] == 3 and 0 in [shard["rows"] for shard in manifest["shards"]]
        index = Index(folder)
        assert len(index) == manifest["rows"] > 0
        [found] = index.search(Given(), [Product(text="25")], 1)
        assert found[0][0] == "p25" and found[0][1] == pytest.approx(1, abs=1e-2)
        assert len(Index(folder, "product")) == len(index)
        views = [row["view"] for row in rows_of(folder)]
        for view in {*views}:
            assert len(Index(folder, view)) == views.count(view)
        with pytest.raises(UserError, match="contains no vector of view i; leave --view out"):
            Index(folder, "i")
        vectors = Vectors(folder) if dtype == "float32" else None
        assert not vectors or vectors.encode_views(data.products)[1].sum() == len(index) == 20


def test_queries_are_truncated_to_the_width_of_the_index(embedder, tmp_path):
    """In a catalogue whose last file has no rows."""
    data = numbered(tmp_path / "c")
    manifest = bulk.embed(embedder, data, tmp_path / "v", bulk.Options(("mm",), width=16))
    assert manifest["width"] == 16 and manifest["shards"][-1]["rows"] == 0
    products = [data.products[index] for index in data.train]
    [found] = Index(tmp_path / "v").search(embedder, ["red"], 20)
    vectors = embedder.encode(products, truncate_dim=16)
    scores = vectors @ embedder.encode(["red"], truncate_dim=16)[0]
    expected = {product.id: score for product, score in zip(products, scores, strict=True)}
    assert dict(found) == {identity: pytest.approx(score, abs=1e-6) for identity, score in expected.items()}


def test_vectors_of_other_data_are_refused(embedder, prepared, tmp_path):
    bulk.embed(embedder, prepared, tmp_path / "v")
    other = dataclasses.replace(prepared, manifest={**prepared.manifest, "fingerprint": "other"})
    with pytest.raises(UserError, match="was made from another or a changed source"):
        bulk.embed(embedder, other, tmp_path / "v")


def test_a_vector_that_is_not_finite_is_refused(tmp_path):
    data = numbered(tmp_path / "c")

    with pytest.raises(UserError, match="product p30: its vector is not finite"):
        bulk.embed(Given(bad="30"), data, tmp_path / "v")


def test_faiss_returns_the_same_results(everything, embedder, tmp_path):
    faiss = pytest.importorskip("faiss", reason="faiss-cpu is not installed")
    folder, _, _ = everything
    index = Index(folder, "i")
    index.write_faiss(tmp_path / "x.faiss")
    names = json.loads((tmp_path / "x.faiss.ids.json").read_text())
    scores, found = faiss.read_index(str(tmp_path / "x.faiss")).search(embedder.encode(["red bag"]), 5)
    ours = index.search(embedder, ["red bag"], 5)[0]
    assert [names[n] for n in found[0]] == [identity for identity, _ in ours]
    np.testing.assert_allclose(scores[0], [score for _, score in ours], atol=1e-6)
    for path in (tmp_path / "nowhere" / "x.faiss", tmp_path):
        with pytest.raises(UserError, match=f"--faiss {path}"):
            index.write_faiss(path)
    assert not [*tmp_path.glob("*.tmp")]


def test_the_commands_embed_and_search(prepared, tmp_path, capsys):
    data, output = str(prepared.folder), str(tmp_path / "v")
    assert cli.main(["embed", "--model", "colours", "--data", data, "--output", output]) == 0
    picture = tmp_path / "p.jpg"
    product = next(prepared.products[index] for index in prepared.val if prepared.products[index].images)
    picture.write_bytes(product.images[0])
    capsys.readouterr()
    assert cli.main(["search", "--index", output, "--model", "colours", "--image", str(picture), "-k", "3"]) == 0
    first = capsys.readouterr().out.splitlines()[0].split()
    assert first == ["1", "1.0000", product.id]
    for flags, message in {
        ("search", "--index", output): "give a text, an --image, or both",
        ("search", "--index", output, "--text", "x"): "give the model that made these vectors (colour histogram)",
        ("search", "--index", output, "--model", "bm25", "--text", "x"): "which do not compare with those of BM25",
        ("search", "--index", output, "--model", "colours", "--image", "no.jpg"): "--image no.jpg: No such file",
        ("search", "--index", output, "--model", "colours", "--text", "x", "-k", "0"): "-k 0: give 1 or more",
        ("search", "--index", output, "--model", "colours", "--text", " "): "give a text, an --image, or both",
        ("search", "--index", output, "--model", "colours", "--text", "\udcff"): "--text: not UTF-8",
        ("search", "--index", data, "--model", "colours", "--text", "x"): "not a complete output of moon-jax embed",
        ("embed", "--model", "bm25", "--data", data, "--output", output): "produces no vectors",
        ("embed", "--model", "colours", "--data", str(tmp_path), "--output", output): "not prepared data",
        ("embed", "--model", "colours", "--data", "nowhere", "--output", output): "--data nowhere: no such folder",
    }.items():
        assert cli.main([*flags]) == cli.USER_ERROR, flags
        error = capsys.readouterr().err
        assert message in error and len(error.splitlines()) == 1, error


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    folder = tmp_path_factory.mktemp("many")
    (folder / "c").mkdir()
    pq.write_table(pa.Table.from_pylist(records(400), SCHEMA), folder / "c" / "products.parquet")
    prepared_from(folder / "c", folder / "p")
    return folder / "p"


@pytest.fixture(scope="module")
def uninterrupted(many, tmp_path_factory):
    """The files of an uninterrupted run, and the seconds it takes."""
    output, began = tmp_path_factory.mktemp("uninterrupted") / "v", time.monotonic()
    killing.finish(killing.start(["embed", "--model", "colours", "--data", many, "--output", output]))
    return killing.content(output), time.monotonic() - began


def killed(many, uninterrupted, tmp_path, seed):
    arguments = ["embed", "--model", "colours", "--data", many]
    assert "embedded in" in killing.killed(arguments, tmp_path / "v", *uninterrupted, seed, takes_processes=False)


@pytest.mark.slow
def test_killed_at_random_moments(many, uninterrupted, tmp_path, kill_seed):
    killed(many, uninterrupted, tmp_path, kill_seed)
