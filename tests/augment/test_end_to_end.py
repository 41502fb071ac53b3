"""Catalogues of several kinds run end to end with the commands of docs/data.md and docs/augmentation.md: prepare, train
and evaluate, augment with the trained model, train and evaluate again."""

import json

import numpy as np
import pytest

from moon_jax import cli
from tests.conftest import COLOURS, ROOT, THINGS, jpeg, overrides, tiny

PRODUCTS = 80


def things():
    """(number, title, category, colour, image) of each product."""
    for number in range(PRODUCTS):
        colour, thing = list(COLOURS)[number % 4], THINGS[number // 4 % 5]
        picture = jpeg(COLOURS[colour], (40, 48), number)
        yield number, f"plain {colour} {thing} number {number // 2}", thing, colour, picture


def mbe(folder):
    """A file with MBE's documented columns, and its images."""
    rows = []
    for number, title, thing, colour, picture in things():
        (folder / f"{number}.jpg").write_bytes(picture)
        cates = {f"doc_cate{level}_name": name for level, name in enumerate(("goods", thing, "", ""), start=1)}
        attributes = f"colour:{colour}!!!plain,,material:cotton"
        row = {"id": number, "doc_title": title, "doc_image": f"{number}.jpg", "doc_industry_name": "shop"}
        rows.append(row | cates | {"doc_attributes": attributes})
    (folder / "mbe.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return ["--data", str(folder / "mbe.jsonl"), "--columns", "mbe"]


def log(folder):
    """Products and a click log: a page of six results per query, with a click on one of them."""
    rows, events, rng = [], [], np.random.default_rng(0)
    for number, title, thing, colour, picture in things():
        (folder / f"{number}.jpg").write_bytes(picture)
        row = {"product_id": f"p{number}", "title": title, "images": [f"{number}.jpg"], "category": ["goods", thing]}
        rows.append(row | {"attributes": {"colour": colour, "Finish": "matt"}})
    for time in range(300):
        shown = rng.permutation(PRODUCTS)[:6]
        for position, number in enumerate(shown):
            event = {"query": rows[shown[-1]]["title"].split(" number")[0], "session": str(time), "time": time}
            events.append(event | {"product_id": f"p{number}", "position": position, "event": "impression"})
        events.append(events[-1] | {"event": "click"})
    (folder / "products.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "log.jsonl").write_text("\n".join(map(json.dumps, events)))
    return ["--data", str(folder)]


def shared(name):
    def source(_):
        path = ROOT.parent / "shared" / "data" / name
        if not path.is_dir():
            pytest.skip(f"shared/data/{name} is missing")
        return ["--data", str(path)]

    return source


def end_to_end(source, folder, steps):
    original = folder / "source"
    original.mkdir()
    config = overrides(tiny(training__steps=steps, training__save_every=steps, experts__dispatch="grouped"))

    def moon_jax(*arguments):
        assert cli.main([str(argument) for argument in arguments]) == 0

    def trained(data, workdir):
        moon_jax("quickstart", "--data", data, "--workdir", workdir, *config)
        return json.loads((workdir / "metrics.json").read_text())

    moon_jax("prepare", *source(original), "--output", folder / "p", "--processes", 1)
    first = trained(folder / "p", folder / "first")
    moon_jax("augment", "--data", folder / "p", "--output", folder / "a", "--model", folder / "first")
    second = trained(folder / "a", folder / "second")
    manifest = json.loads((folder / "a" / "manifest.json").read_text())
    summary = manifest["augmented"]
    for kind in ("text", "image"):
        assert summary[kind]["added"] > 0
        assert summary[kind]["made"] == summary[kind]["added"] + sum(summary[kind]["left_out"].values())
        assert summary[kind]["left_out"]["disagrees"] == int(0.1 * summary[kind]["made"]) or kind == "text"
    # Both runs are evaluated on the same queries and candidates.
    assert first["retrieval"].keys() == second["retrieval"].keys()
    assert manifest["fingerprint"] == json.loads((folder / "second/data/manifest.json").read_text())["fingerprint"]
    return first, second


@pytest.mark.slow
@pytest.mark.parametrize("source", [mbe, log])
def test_end_to_end(source, tmp_path):
    end_to_end(source, tmp_path, 3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fashion", "grocery", "flipkart"])
def test_end_to_end_on_real_products(name, tmp_path):
    end_to_end(shared(name), tmp_path, 3)
