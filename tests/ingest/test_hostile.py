"""2,000 hostile records: no crash, no wrong content, and counts that add up."""

import io
import json
import resource
import warnings

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moon_jax.data.images import decode
from moon_jax.ingest import parse
from tests.conftest import jpeg, prepared_from, quarantine
from tests.ingest import hostile

COUNT = 2000
PHOTO = jpeg((9, 9, 200), (16, 16), 0)


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns about broken tags
        yield


@pytest.fixture(scope="module")
def made():
    return list(hostile.records(0, COUNT))


def check(found, made):
    """Every record is either a product or an entry of the quarantine, and its content is unchanged."""
    listed = {entry["number"]: entry for entry in quarantine(found)}
    products = {product.id: product for product in found.products}
    assert len(listed) == sum(found.quarantined.values()) == found.manifest["read"]["product"] - len(products)
    assert found.manifest["read"]["product"] == len(made) and found.manifest["kept"]["product"] == len(products)
    assert {entry["reason"] for entry in listed.values()} <= set(parse.REASONS)
    kept, many = 0, 0
    for number, (_, expected, record, content) in enumerate(made, start=1):
        entry = listed.get(number)
        if record and record.get("product_id") == "id of many":
            many += entry is None  # only the first one is kept
            kept += entry is None
            continue
        assert (entry is not None) == (expected == "bad") or expected == "either", (number, entry, record)
        if entry is None:
            kept += 1
            product = products[record["product_id"]]
            title = record["title"]
            assert product.text == (title.strip() if isinstance(title, str) else None)
            assert product.images == ((content,) if record["images"][0] else ())
            for image in product.images:
                decode(image, 10**6)
    assert kept == len(products) and many == 1
    assert sum(expected == "good" for _, expected, _, _ in made) <= len(products)


def test_hostile_lines_and_files(made, tmp_path):
    folder = tmp_path / "in" / "data"
    (folder / "images").mkdir(parents=True)
    hostile.surroundings(folder, PHOTO)
    for number, (_, _, record, content) in enumerate(made):
        if record:
            (folder / "images" / str(number)).write_bytes(content)
    (folder / "products.jsonl").write_bytes(b"\n".join(line for line, _, _, _ in made))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # A flipped bit may make an image very long. With this limit no image is downscaled, so all bytes are kept.
    found = prepared_from(folder, tmp_path / "p", prepare__longest_side=10**6)
    # A single decoded bomb would take 2.7 GB.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20
    check(found, made)
    counts = found.quarantined
    assert {"not readable", "no id", "duplicate id", "bad text", "text too long", "bad image"} <= set(counts)
    assert "image not fetched" in counts and "no text and no image" in counts
    # Messages contain no control characters that a terminal would interpret.
    assert found.summary().isprintable()
    assert all(json.dumps(entry).isprintable() for entry in quarantine(found))


def test_hostile_bytes_in_parquet(made, tmp_path):
    """Only the images, as bytes in Parquet."""
    plain = [(e, c, r["product_id"]) for n, (_, e, r, c) in enumerate(made) if r and r == hostile.plain(n)]
    assert len(plain) > 600 and {expected for expected, _, _ in plain} == {"good", "bad", "either"}
    rows = [{"product_id": identity, "title": identity, "images": [content]} for _, content, identity in plain]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet", row_group_size=300)
    found = prepared_from(tmp_path / "p.parquet", tmp_path / "p", prepare__longest_side=10**6)
    listed = {entry["number"] for entry in quarantine(found)}
    products = {product.id: product for product in found.products}
    assert len(listed) + len(products) == len(plain) == found.manifest["read"]["product"]
    for number, (expected, content, identity) in enumerate(plain, start=1):
        assert (number in listed) == (expected == "bad") or expected == "either"
        assert number in listed or products[identity].images == (content,)


def test_only_large_images_are_downscaled(tmp_path):
    from PIL import Image

    gradient = hostile.encoded(Image.linear_gradient("L").resize((3000, 500)), "PNG")
    rows = [{"product_id": str(n), "title": f"t{n}", "images": [image]} for n, image in enumerate([gradient, PHOTO])]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet")
    found = prepared_from(tmp_path / "p.parquet", tmp_path / "p", prepare__longest_side=600)
    by_id = {product.id: product.images[0] for product in found.products}
    made = Image.open(io.BytesIO(by_id["0"]))
    assert made.size == (600, 100) and made.format == "JPEG" and made.mode == "RGB"
    assert by_id["1"] == PHOTO
