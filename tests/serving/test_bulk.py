"""Vectors of a catalogue: what is written, what goes on, what is refused, and what search finds in it."""

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


def test_every_view_of_every_product_is_there_once(everything, prepared):
    folder, manifest, own = everything
    rows = rows_of(folder)
    assert [*own] == [(row["id"], row["view"]) for row in rows]
    for row in rows:
        np.testing.assert_allclose(row["vector"], own[row["id"], row["view"]], atol=1e-6)
    told = {
        name: manifest[name] for name in ("model", "views", "dtype", "width", "template", "pooling", "products", "rows")
    }
    assert told == {
        "model": "moon_jax f00d", "views": ["t", "i", "mm"], "dtype": "float32", "width": 24, "template": "bare",
        "pooling": "mean", "products": 60, "rows": len(own),
    }  # fmt: skip
    assert manifest == json.loads((folder / "manifest.json").read_text())
    assert len(manifest["shards"]) == 4 and sorted(path.name for path in folder.iterdir()) == sorted(
        ["manifest.json", "source.json", *(shard["file"] for shard in manifest["shards"])]
    )


def test_a_product_is_embedded_by_all_it_has(everything, embedder, prepared, tmp_path):
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
    if dtype == "int8":  # the largest entry of a vector takes all the room
        assert all(max(map(abs, row["vector"])) == 127 for row in rows_of(tmp_path / "v"))


def test_half_embedded_it_goes_on_and_gives_the_same(everything, embedder, prepared, tmp_path):
    folder, _, _ = everything
    options, asked = bulk.Options(views=VIEWS), []

    class Failing(Embedder):
        def __init__(self):
            self.__dict__ = embedder.__dict__

        def encode_views(self, products, **more):
            asked.append(products[0].id)
            if len(asked) == 3:
                raise KeyboardInterrupt
            return super().encode_views(products, **more)

    with pytest.raises(KeyboardInterrupt):
        bulk.embed(Failing(), prepared, tmp_path / "v", options)
    with pytest.raises(UserError, match="holds what was begun from another source"):
        bulk.embed(embedder, prepared, tmp_path / "v", bulk.Options(views=("t",)))
    bulk.embed(Failing(), prepared, tmp_path / "v", options)
    assert len(asked) == 3 + 2  # two of four files stood already
    assert killing.content(tmp_path / "v") == killing.content(folder)
    bulk.embed(Failing(), prepared, tmp_path / "v", options)
    assert len(asked) == 5
    with pytest.raises(UserError, match="was made from another source"):
        bulk.embed(Colours(10**6), prepared, tmp_path / "v", options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (bulk.Options(("text",)), "--views text: give product, or some of t, i and mm"),
        (bulk.Options(("product", "t")), "give it alone"),
        (bulk.Options(("t", "t")), "each once"),
        (bulk.Options(dtype="float64"), "must be float32, float16 or int8"),
        (bulk.Options(width=25), "--width 25: the model gives 24"),
        (bulk.Options(width=-1), "give 1 or more"),
    ],
)
def test_options_that_cannot_be_are_refused(embedder, prepared, tmp_path, options, said):
    with pytest.raises(UserError, match=said):
        bulk.embed(embedder, prepared, tmp_path / "v", options)
    assert not (tmp_path / "v").exists() or not [*(tmp_path / "v").glob("*.parquet")]


def test_search_is_a_full_sort(everything, embedder):
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


def test_mixed_spaces_are_refused(everything, embedder, tmp_path):
    folder, manifest, _ = everything
    with pytest.raises(UserError, match="vectors of moon_jax f00d; what colour histogram makes"):
        Index(folder, "i").search(Colours(10**6), ["x"])
    with pytest.raises(UserError, match="holds t, i, mm of a product; choose one by --view"):
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
    with pytest.raises(UserError, match="vectors of another 1, the others are of moon_jax f00d"):
        Index(other, "t")
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match="damaged"):
        Index(other, "t")
    with pytest.raises(UserError, match="nothing that moon-jax embed finished"):
        Index(tmp_path)


def copied(folder, other):
    other.mkdir()
    for path in folder.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    return other


@pytest.mark.parametrize("damage", ["missing", "cut", "flipped", "manifest"])
def test_what_is_damaged_is_refused_and_made_again(everything, embedder, prepared, tmp_path, damage):
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
    said = "nothing that moon-jax embed finished" if damage == "manifest" else "damaged .*; give embed the same command"
    with pytest.raises(UserError, match=said):
        Index(other, "t")
    asked = []

    class Counting(Embedder):
        def __init__(self):
            self.__dict__ = embedder.__dict__

        def encode_views(self, products, **more):
            asked.append(len(products))
            return super().encode_views(products, **more)

    bulk.embed(Counting(), prepared, other, bulk.Options(views=VIEWS))
    assert killing.content(other) == killing.content(folder)
    assert len(asked) == (4 if damage == "manifest" else 1)


def test_a_file_that_is_damaged_before_the_end_is_made_again(everything, embedder, prepared, tmp_path):
    folder, manifest, _ = everything

    class Failing(Embedder):
        def __init__(self):
            self.__dict__ = embedder.__dict__
            self.asked = 0

        def encode_views(self, products, **more):
            self.asked += 1
            if self.asked == 3:
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
def test_a_manifest_that_embed_did_not_write_is_one_line(everything, tmp_path, change):
    folder, manifest, _ = everything
    other, shards = copied(folder, tmp_path / "v"), manifest["shards"]
    odd = {
        "twice": [*shards, shards[0]],
        "fewer": shards[1:],
        "elsewhere": [shards[0] | {"file": f"../v/{shards[0]['file']}"}, *shards[1:]],
    }
    changed = {name: odd.get(value, value) if isinstance(value, str) else value for name, value in change.items()}
    (other / "manifest.json").write_text(json.dumps(manifest | changed))
    with pytest.raises(UserError, match=r"--index .*: nothing that moon-jax embed finished"):
        Index(other, "t")
    (other / "manifest.json").write_text(json.dumps(manifest | {"schema": 99}))
    with pytest.raises(UserError, match="of format 99"):
        Index(other, "t")


class Given(ByItem):
    """Random vectors of texts that are numbers; of anything else there is none."""

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
    """A catalogue of "photo 0" and so on to train on, which come first, and of texts "20" to "39" to be found."""
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
        with pytest.raises(UserError, match="no vector of view i there; leave --view out"):
            Index(folder, "i")
        vectors = Vectors(folder) if dtype == "float32" else None
        assert not vectors or vectors.encode_views(data.products)[1].sum() == len(index) == 20


def test_the_width_of_an_index_is_that_of_its_queries(embedder, tmp_path):
    """Truncated, in a catalogue whose last file has no row."""
    data = numbered(tmp_path / "c")
    manifest = bulk.embed(embedder, data, tmp_path / "v", bulk.Options(("mm",), width=16))
    assert manifest["width"] == 16 and manifest["shards"][-1]["rows"] == 0
    products = [data.products[index] for index in data.train]
    [found] = Index(tmp_path / "v").search(embedder, ["red"], 20)
    vectors = embedder.encode(products, truncate_dim=16)
    scores = vectors @ embedder.encode(["red"], truncate_dim=16)[0]
    expected = {product.id: score for product, score in zip(products, scores, strict=True)}
    assert dict(found) == {identity: pytest.approx(score, abs=1e-6) for identity, score in expected.items()}


def test_other_data_are_not_gone_on_with(embedder, prepared, tmp_path):
    bulk.embed(embedder, prepared, tmp_path / "v")
    other = dataclasses.replace(prepared, manifest={**prepared.manifest, "fingerprint": "other"})
    with pytest.raises(UserError, match="was made from another source"):
        bulk.embed(embedder, other, tmp_path / "v")


def test_a_vector_that_is_not_finite_is_refused(tmp_path):
    data = numbered(tmp_path / "c")

    with pytest.raises(UserError, match="product p30: its vector is not finite"):
        bulk.embed(Given(bad="30"), data, tmp_path / "v")


def test_faiss_finds_the_same(everything, embedder, tmp_path):
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
    for flags, said in {
        ("search", "--index", output): "give a text, an --image, or both",
        ("search", "--index", output, "--text", "x"): "give the model whose vectors these are (colour histogram)",
        ("search", "--index", output, "--model", "bm25", "--text", "x"): "does not compare",
        ("search", "--index", output, "--model", "colours", "--image", "no.jpg"): "--image no.jpg: No such file",
        ("search", "--index", output, "--model", "colours", "--text", "x", "-k", "0"): "-k 0: give 1 or more",
        ("search", "--index", output, "--model", "colours", "--text", " "): "give a text, an --image, or both",
        ("search", "--index", output, "--model", "colours", "--text", "\udcff"): "--text: not UTF-8",
        ("search", "--index", data, "--model", "colours", "--text", "x"): "nothing that moon-jax embed finished",
        ("embed", "--model", "bm25", "--data", data, "--output", output): "makes no vectors",
        ("embed", "--model", "colours", "--data", str(tmp_path), "--output", output): "not prepared data",
        ("embed", "--model", "colours", "--data", "nowhere", "--output", output): "--data nowhere: no such folder",
    }.items():
        assert cli.main([*flags]) == cli.MISTAKE, flags
        error = capsys.readouterr().err
        assert said in error and len(error.splitlines()) == 1, error


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    folder = tmp_path_factory.mktemp("many")
    (folder / "c").mkdir()
    pq.write_table(pa.Table.from_pylist(records(400), SCHEMA), folder / "c" / "products.parquet")
    prepared_from(folder / "c", folder / "p")
    return folder / "p"


@pytest.fixture(scope="module")
def undisturbed(many, tmp_path_factory):
    """What comes out, and how many seconds it takes."""
    output, began = tmp_path_factory.mktemp("undisturbed") / "v", time.monotonic()
    killing.finish(killing.start(["embed", "--model", "colours", "--data", many, "--output", output]))
    return killing.content(output), time.monotonic() - began


def killed(many, undisturbed, tmp_path, seed):
    arguments = ["embed", "--model", "colours", "--data", many]
    assert "embedded in" in killing.killed(arguments, tmp_path / "v", *undisturbed, seed, takes_processes=False)


@pytest.mark.slow
def test_killed_at_random_moments(many, undisturbed, tmp_path, kill_seed):
    killed(many, undisturbed, tmp_path, kill_seed)
