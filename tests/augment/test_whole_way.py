"""Catalogues of several kinds go the whole way by the commands of docs/data.md: prepare, train and judge, augment by
what was trained, train and judge again."""

import json

import numpy as np
import pytest

from moon_jax import cli
from tests.conftest import COLOURS, ROOT, THINGS, jpeg, overrides, tiny

PRODUCTS = 80


def things():
    """(number, title, category, colour, picture) of products."""
    for number in range(PRODUCTS):
        colour, thing = list(COLOURS)[number % 4], THINGS[number // 4 % 5]
        picture = jpeg(COLOURS[colour], (40, 48), number)
        yield number, f"plain {colour} {thing} number {number // 2}", thing, colour, picture


def mbe(folder):
    """A file of MBE's documented columns, its images beside it."""
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
    """Products, and who clicked on what: a page of six for each query, one of them chosen."""
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
            pytest.skip(f"shared/data/{name} is not there")
        return ["--data", str(path)]

    return source


def whole_way(source, folder, steps):
    given = folder / "source"
    given.mkdir()
    config = overrides(tiny(training__steps=steps, training__save_every=steps, experts__dispatch="grouped"))

    def moon_jax(*arguments):
        assert cli.main([str(argument) for argument in arguments]) == 0

    def judged(data, workdir):
        moon_jax("quickstart", "--data", data, "--workdir", workdir, *config)
        return json.loads((workdir / "metrics.json").read_text())

    moon_jax("prepare", *source(given), "--output", folder / "p", "--processes", 1)
    first = judged(folder / "p", folder / "first")
    moon_jax("augment", "--data", folder / "p", "--output", folder / "a", "--model", folder / "first")
    second = judged(folder / "a", folder / "second")
    manifest = json.loads((folder / "a" / "manifest.json").read_text())
    told = manifest["augmented"]
    for kind in ("text", "image"):
        assert told[kind]["added"] > 0
        assert told[kind]["made"] == told[kind]["added"] + sum(told[kind]["left_out"].values())
        assert told[kind]["left_out"]["disagrees"] == int(0.1 * told[kind]["made"]) or kind == "text"
    # The same queries and candidates were asked of both.
    assert first["retrieval"].keys() == second["retrieval"].keys()
    assert manifest["fingerprint"] == json.loads((folder / "second/data/manifest.json").read_text())["fingerprint"]
    return first, second


@pytest.mark.slow
@pytest.mark.parametrize("source", [mbe, log])
def test_the_whole_way(source, tmp_path):
    whole_way(source, tmp_path, 3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fashion", "grocery", "flipkart"])
def test_the_whole_way_of_real_products(name, tmp_path):
    whole_way(shared(name), tmp_path, 3)
