"""Mined negatives: against a plain loop, and from the command line into a training batch."""

import dataclasses
import json

import numpy as np
import pytest

from moon_jax import cli, progress
from moon_jax.augment import negatives
from moon_jax.data import pipeline
from moon_jax.data import prepared as prepared_lib
from moon_jax.embedders.vectors import Vectors
from moon_jax.errors import UserError
from moon_jax.serving import bulk
from moon_jax.types import Triplet
from tests.conftest import tiny


@pytest.fixture(scope="module")
def vectors(prepared, tmp_path_factory):
    """Random vectors of all training products but one, in view mm or what they have."""
    folder = tmp_path_factory.mktemp("vectors")
    rng = np.random.default_rng(0)
    ids = [prepared.products[n].id for n in list(prepared.train)[1:]]
    made = rng.normal(size=(len(ids), 3, 6)).astype(np.float32)
    made /= np.linalg.norm(made, axis=-1, keepdims=True)
    present = np.zeros((len(ids), 3), bool)
    present[:, 2] = True
    present[::5, 2], present[::5, 1] = False, True
    bulk.write_vectors(folder / "vectors.parquet", ids, made, present, "f00d", True)
    return folder


def title(prepared, index):
    return prepared.products[index].text or f"untitled {index}"


@pytest.mark.parametrize(
    "options",
    [
        negatives.Options(3, (1, 100), 0.95),
        negatives.Options(2, (4, 5), 0.5),
        negatives.Options(50, (1, 9), 2.0),
    ],
    ids=str,
)
def test_mined_negatives_equal_a_plain_loop(prepared, vectors, options, tmp_path, monkeypatch):
    """With a query that wants several products, a query that is none, and a product without vector."""
    monkeypatch.setattr(negatives, "ANCHORS", 16)
    train = list(prepared.train)
    query = len(prepared.products) - 1  # as if it were a query: it has no vector
    triplets = [*prepared.triplets, *(Triplet(query, train[n], None) for n in (5, 9, 12))]
    data = dataclasses.replace(prepared, triplets=triplets, train=range(len(train) - 2))
    opened = Vectors(vectors)
    found = negatives.mine(data, opened, options, tmp_path)
    monkeypatch.setattr(negatives.similarity, "top_k", None)  # what is mined already is not mined again
    np.testing.assert_array_equal(negatives.mine(data, opened, options, tmp_path), found)

    embedded, there = opened.encode_views([prepared.products[n] for n in data.train])
    vector = {n: embedded[k, 2 if there[k, 2] else 1] for k, n in enumerate(data.train) if there[k].any()}
    wants = {}
    for triplet in triplets:
        wants.setdefault(triplet.query, set()).add(title(prepared, triplet.positive))
    some = 0
    for row, triplet in zip(found, triplets, strict=True):
        own = triplet.query if triplet.query in vector else triplet.positive
        expected = []
        if own in vector:
            anchor, seen = vector[own], set()
            limit = options.bound * (anchor @ vector[triplet.positive] if triplet.positive in vector else 1.0)
            for other in sorted(vector, key=lambda n: -(anchor @ vector[n])):
                name = title(prepared, other)
                drawn = set() if triplet.negative is None else {title(prepared, triplet.negative)}
                if name not in wants[triplet.query] | drawn | seen and anchor @ vector[other] <= limit:
                    seen.add(name)
                    expected.append(other)
            expected = expected[options.ranks[0] - 1 : options.ranks[1]][: options.count]
        some += len(expected)
        assert row.tolist() == expected + [-1] * (options.count - len(expected))
    assert some > 50


def test_from_the_command_line_into_a_batch(prepared, vectors, tokenizer, tmp_path, capsys):
    arguments = ["prepare", "--data", str(prepared.folder), "--negatives", str(vectors), "--negative-count", "2"]
    assert cli.main([*arguments, "--output", str(tmp_path / "mined")]) == 0
    said = capsys.readouterr().out
    opened = prepared_lib.open_prepared(tmp_path / "mined")
    mined = opened.manifest["mined"]
    assert f"{mined['negatives']:,} negatives mined, for {mined['triplets']:,} of {len(opened.triplets):,}" in said
    assert "--config.data.negatives=3" in said
    assert mined["negatives"] == (opened.negatives >= 0).sum() > 20 and opened.negatives.shape[1] == 2
    assert opened.fingerprint != prepared.fingerprint
    config = tiny(data__negatives=3)
    batch = pipeline.batches(opened, pipeline.Reader(config, tokenizer))[0]
    for b, triplet in enumerate(batch.triplet):
        assert batch.product[b :: config.data.batch].tolist()[3:] == opened.negatives[triplet].tolist()
    path = tmp_path / "mined" / prepared_lib.NEGATIVES
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(UserError, match=r"negatives.npy: has .* bytes"):
        prepared_lib.open_prepared(tmp_path / "mined")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--negative-ranks", "ten"], "--negative-ranks ten: give two ranks, such as 1-100"),
        (["--negative-ranks", "9-3"], "count and ranks start at 1, the ranks rise"),
        (["--negative-bound", "0"], "the bound is positive"),
        (["--data", "{tmp}/nothing"], "not prepared data; --negatives adds to what moon-jax prepare wrote"),
        (["--output", "{data}"], "was made from another or a changed source"),
        (["--negatives", "{tmp}/x"], "--negatives {tmp}/x: no such folder; it is the output of moon-jax embed"),
        (["--columns", "own"], "--columns: has no effect, because --negatives prepares nothing anew; leave it out"),
        (
            ["--config.prepare.longest_side=9"],
            "--config.prepare.longest_side=9: has no effect, because --negatives prepares nothing anew",
        ),
        (["--negative-bound", "nan"], "the bound is positive"),
    ],
)
def test_mistakes_are_one_line(prepared, vectors, tmp_path, capsys, more, message):
    arguments = [
        "prepare",
        "--data",
        str(prepared.folder),
        "--negatives",
        str(vectors),
        "--output",
        str(tmp_path / "m"),
    ]
    more = [word.format(tmp=tmp_path, data=prepared.folder) for word in more]
    assert cli.main([*arguments, *more]) == 2
    said = capsys.readouterr().err.strip()
    assert message.format(tmp=tmp_path) in said and "\n" not in said
    assert not (tmp_path / "m" / "manifest.json").exists()


def test_flags_of_mining_need_it(prepared, tmp_path, capsys):
    arguments = ["prepare", "--data", str(prepared.folder), "--output", str(tmp_path / "m"), "--negative-count", "7"]
    assert cli.main(arguments) == 2
    assert "--negative-count: has no effect, because --negatives is missing" in capsys.readouterr().err


def test_mining_goes_on_where_it_was_stopped(prepared, vectors, tmp_path, monkeypatch):
    """The same command again: stopped while mining and while writing, then finished, then with other options."""
    monkeypatch.setattr(negatives, "ANCHORS", 16)
    options, output = negatives.Options(), tmp_path / "m"
    about = negatives.write(prepared.folder, tmp_path / "whole", vectors, options, progress.silent)

    def stop(*arguments, **more):
        raise KeyboardInterrupt

    searched = []
    top_k = negatives.similarity.top_k

    def count(*arguments):
        searched.append(arguments)
        return stop() if len(searched) == 3 else top_k(*arguments)

    for name, instead in (("top_k", count), ("with_negatives", stop)):
        module = negatives.similarity if name == "top_k" else negatives.prepare
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(module, name, instead)
            negatives.write(prepared.folder, output, vectors, options, progress.silent)
    assert not prepared_lib.is_prepared(output)
    for _ in range(2):
        assert negatives.write(prepared.folder, output, vectors, options, progress.silent)["count"] == about["count"]
    files = {path.name: path.read_bytes() for path in output.iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    with pytest.raises(UserError, match="was made from another"):
        negatives.write(prepared.folder, output, vectors, negatives.Options(2), progress.silent)


def test_augmented_data_keep_their_mined_negatives(prepared, vectors, tmp_path):
    negatives.write(prepared.folder, tmp_path / "m", vectors, negatives.Options(), progress.silent)
    command = ["augment", "--data", str(tmp_path / "m"), "--output", str(tmp_path / "a"), "--processes", "1"]
    assert cli.main(command) == 0
    mined, augmented = (prepared_lib.open_prepared(tmp_path / name) for name in ("m", "a"))
    np.testing.assert_array_equal(augmented.negatives, mined.negatives)
    assert augmented.manifest["mined"] == mined.manifest["mined"] and augmented.manifest["augmented"]
    assert augmented.fingerprint != mined.fingerprint


def test_nothing_mined_recommends_nothing(prepared, vectors, tmp_path, capsys):
    arguments = ["prepare", "--data", str(prepared.folder), "--negatives", str(vectors), "--negative-bound", "1e-9"]
    assert cli.main([*arguments, "--output", str(tmp_path / "m"), "--negative-ranks", "90-100"]) == 0
    said = capsys.readouterr().out
    assert "0 negatives mined" in said and "without further negatives" in said and "data.negatives" not in said


def test_the_manifest_is_complete(prepared, vectors, tmp_path):
    about = negatives.write(prepared.folder, tmp_path / "m", vectors, negatives.Options(), progress.silent)
    manifest = json.loads((tmp_path / "m" / "manifest.json").read_text())
    assert manifest["mined"] == json.loads(json.dumps(about))
    assert set(manifest["files"]) == {path.name for path in (tmp_path / "m").iterdir()} - {
        "manifest.json",
        "source.json",
    }
