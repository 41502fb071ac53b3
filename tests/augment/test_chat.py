"""Titles from a real OpenAI-compatible server: `transformers serve` on loopback, with a tiny random model."""

import base64
import functools
import io
import json
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from moon_jax.augment import candidates, chat, engines, pipeline, text
from moon_jax.augment.options import Options
from moon_jax.data import text as text_lib
from moon_jax.errors import Unavailable, UserError
from moon_jax.hub import export
from moon_jax.ingest import workers
from moon_jax.types import Product
from tests.augment.server import free_port, served
from tests.conftest import SCHEMA, prepared_from, random_params, records, tiny

NOWHERE = "http://127.0.0.1:9/v1"  # never reached
RETRY_AFTER, PRODUCTS = 0.3, 40
WORDS = ["red", "green", "blue", "yellow", "shirt", "shoe", "bag", "hat", "watch", "plain"]
TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% for part in message.content -%}
{%- if part.type == 'text' -%}{{ part.text }}{%- else -%}<|vision_start|><|image_pad|><|vision_end|>{%- endif -%}
{%- endfor -%}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% endif -%}"""

openai = pytest.importorskip("openai", reason="the openai client is not installed: pip install -e '.[openai]'")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A random model that can only output WORDS and stop: all other tokens have zero embeddings."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = text_lib.train([row["title"] for row in records(60) if row["title"]] * 3, 330)
    config = tiny(experts__count=0, data__visual_tokens=24, data__text_tokens=40, language__vocab=330)
    params = random_params(config, tokenizer)
    words = [ids[0] for ids in (tokenizer.base.encode(word, add_special_tokens=False).ids for word in WORDS)]
    assert len({*words}) == len(WORDS)
    table = np.zeros_like(params["token_embedding"])
    kept = [*words, tokenizer.pad]
    table[kept] = np.random.default_rng(4).normal(size=(len(kept), table.shape[1]))
    params = dict(params) | {"token_embedding": table}
    path = folder / "tokenizer.json"
    tokenizer.save(path)
    fields = dict(config=config, encoder=params, alignment=None, tokenizer=path, fingerprint="f", step=1)
    export.export(export.Trained(**fields), folder / "model")
    (folder / "model" / "chat_template.jinja").write_text(TEMPLATE)
    return folder / "model"


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    for part in ("torch", "transformers", "fastapi", "uvicorn"):
        pytest.importorskip(part, reason=f"{part}, which transformers serve needs, is not installed")
    with served(model, free_port(), tmp_path_factory.mktemp("log") / "log") as url:
        yield url


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Short answers, and one retry."""
    monkeypatch.setattr(chat, "MOST_TOKENS", 6)
    monkeypatch.setattr(chat.Chat.__init__, "__defaults__", (chat.SECONDS, 1))
    candidates._client.cache_clear()


@contextmanager
def between(url, answer, port=0):
    """A proxy in front of the server that records the requests.

    Args:
        answer: (number of the request) → status, headers and optionally content of a reply; None forwards the request.
    """
    requests = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            requests.append((time.monotonic(), body))
            reply = answer(len(requests))
            if reply:
                status, headers, content = (*reply, b'{"error": {"message": "refused by the test"}}')[:3]
            else:
                request = urllib.request.Request(f"{url}/chat/completions", body, {"Content-Type": "application/json"})
                with urllib.request.urlopen(request) as response:
                    status, headers, content = 200, {}, response.read()
            self.send_response(status)
            for name, value in ({"Content-Type": "application/json", "Content-Length": len(content)} | headers).items():
                self.send_header(name, str(value))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    proxy = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{proxy.server_port}/v1", requests
    finally:
        proxy.shutdown()
        proxy.server_close()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Products whose data contains all WORDS, and one title without an image."""
    folder = tmp_path_factory.mktemp("data")
    rows = [row | {"description": " ".join(WORDS), "brand": "Acmé Co"} for row in records(60)][:PRODUCTS]
    schema = SCHEMA.append(pa.field("description", pa.string()))
    pq.write_table(pa.Table.from_pylist(rows, schema), folder / "products.parquet")
    prepared_from(folder / "products.parquet", folder / "p")
    return folder / "p"


def augmented(data, output, url, model, connections=4):
    options = Options(text=url, text_model=str(model), images="none")
    engine = engines.Local(functools.partial(workers.pool, 1), 1)
    return pipeline.augment(data, output, options, 10**7, engine, connections)


def rows_of(prepared):
    return pq.read_table(prepared.folder / pipeline.RESULTS).to_pylist()


def test_the_request_depends_on_the_product_alone():
    wide = io.BytesIO()
    Image.new("RGB", (2000, 500), "red").save(wide, "PNG")
    product = Product(text="Red {mug}", images=(wide.getvalue(),), brand="Acme", attributes={"Material": "steel"})
    body = chat.Chat("http://x/v1", "m").request(product, 2**40 + 7, 10**7)
    assert body["model"] == "m" and body["temperature"] == 0 and body["seed"] == 7
    [message] = body["messages"]
    picture, prompt = message["content"]
    assert "Title: Red {mug}" in prompt["text"] and '{"brand": ["Acme"], "Material": ["steel"]}' in prompt["text"]
    kind, data = picture["image_url"]["url"].split(",")
    shown = Image.open(io.BytesIO(base64.b64decode(data)))
    assert kind == "data:image/jpeg;base64" and shown.format == "JPEG" and shown.size == (512, 128)
    [only] = chat.Chat("http://x/v1", "m").request(Product(text="mug"), 1, 10**7)["messages"][0]["content"]
    assert only["type"] == "text"


@pytest.mark.slow
def test_titles_come_from_the_server_and_pass_the_checks(data, model, server, tmp_path):
    prepared = augmented(data, tmp_path / "a", server, model)
    rows, direct = rows_of(prepared), chat.Chat(server, str(model))
    client = direct.client()
    assert len(rows) == sum(bool(prepared.products[index].text) for index in prepared.train)
    for row in rows:
        product = prepared.products[row["product"]]
        bare = Product(**{n: getattr(product, n) for n in ("text", "images", "brand", "category", "attributes", "id")})
        answer = direct.answer(client, direct.request(bare, row["seed"], 10**7))
        assert row["text"] == text.cleaned(answer) and set(row["text"].split()) <= set(WORDS)
        assert (row["reason"] or "") == text.flaw(row["text"], product)
        assert product.enriched_texts == (() if row["reason"] else (row["text"],))
        assert (row["backend"], row["model"], row["prompt"]) == ("chat", str(model), chat.PROMPT_VERSION)
    assert {row["reason"] for row in rows} >= {None}
    assert len({row["seed"] for row in rows}) == len(rows)


@pytest.mark.slow
def test_no_answer_is_lost_if_the_server_dies(data, model, server, tmp_path):
    """The server fails after 12 answers and is back for the next run. No answered title is requested again, and the
    result equals that of a server that stayed up."""
    with between(server, lambda number: (503, {}) if number > 12 else None) as (url, requests):
        with pytest.raises(Unavailable, match="finished work is kept"):
            augmented(data, tmp_path / "a", url, model)
        first = {body for _, body in requests[:12]}
    kept = (tmp_path / "a" / ".work" / "answers").rglob("*")
    assert sum(path.is_file() for path in kept) == 12
    assert json.loads((tmp_path / "a" / ".work" / candidates.BRANDS).read_text()) == ["acmeco"]
    with pytest.raises(UserError, match="other options"):
        augmented(data, tmp_path / "a", "http://127.0.0.1:1/v1", model)
    candidates._client.cache_clear()
    with between(server, lambda number: None, int(url.split(":")[2].split("/")[0])) as (url, requests):
        prepared = augmented(data, tmp_path / "a", url, model)
        again = [body for _, body in requests]
    assert not first & set(again) and len(again) + 12 == len(rows_of(prepared))
    undisturbed = augmented(data, tmp_path / "b", server, model)
    assert [p.enriched_texts for p in prepared.products] == [p.enriched_texts for p in undisturbed.products]


@pytest.mark.slow
def test_a_rate_limit_delays_the_retry(data, model, server, tmp_path, monkeypatch):
    monkeypatch.setattr(chat.Chat.__init__, "__defaults__", (chat.SECONDS, 3))
    refuse = lambda number: (429, {"Retry-After": "1"}) if number in (1, 2) else None  # noqa: E731
    with between(server, refuse) as (url, requests):
        prepared = augmented(data, tmp_path / "a", url, model, connections=1)
        times = [moment for moment, _ in requests]
    assert times[1] - times[0] >= 0.99 and times[2] - times[1] >= 0.99
    assert requests[0][1] == requests[1][1] == requests[2][1] and len(requests) == len(rows_of(prepared)) + 2


@pytest.mark.slow
def test_a_rejected_request_is_recorded_and_the_rest_continues(data, model, server, tmp_path):
    with between(server, lambda number: (400, {}) if number == 3 else None) as (url, _):
        rows = rows_of(augmented(data, tmp_path / "a", url, model))
    [left] = [row for row in rows if row["reason"] == candidates.REFUSED]
    assert "refused by the test" in left["detail"] and left["text"] == ""


def completion(choices):
    return json.dumps({"id": "1", "object": "x", "created": 1, "model": "m", "choices": choices}).encode()


@pytest.mark.parametrize(
    "content",
    [
        completion([{"index": 0}]),
        completion([]),
        completion(None),
        completion([{"index": 0, "message": {"role": "assistant", "content": ["a"]}}]),
        completion([{"index": 0, "message": {"role": "assistant", "content": "mug \ud800"}}]),
    ],
)
def test_a_malformed_answer_loses_one_title_only(data, tmp_path, content):
    good = completion([{"index": 0, "message": {"role": "assistant", "content": "plain red shirt"}}])
    with between(NOWHERE, lambda number: (200, {}, content if number == 3 else good)) as (url, _):
        rows = rows_of(augmented(data, tmp_path / "a", url, "m"))
    left = [row for row in rows if row["reason"] not in (None, *text.FLAWS)] or [
        row for row in rows if row["text"] == "mug ?"
    ]
    assert len(left) == 1 and left[0]["reason"]


@pytest.mark.parametrize(("content", "kind"), [(b"<html>", "text/html"), (b'{"a', "application/json")])
def test_another_kind_of_server_is_an_error(data, tmp_path, content, kind):
    with (
        between(NOWHERE, lambda number: (200, {"Content-Type": kind}, content)) as (url, _),
        pytest.raises(UserError, match="does not answer in OpenAI's format"),
    ):
        augmented(data, tmp_path / "a", url, "m", connections=1)


@pytest.mark.slow
def test_a_key_repeated_by_the_server_is_not_stored(data, model, server, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-of-mine")
    echo = b'{"error": {"message": "bad header Bearer sk-secret-of-mine"}}'
    with between(server, lambda number: (413, {}, echo) if number == 2 else None) as (url, _):
        prepared = augmented(data, tmp_path / "a", url, model)
    [left] = [row for row in rows_of(prepared) if row["reason"] == candidates.REFUSED]
    assert "bad header" in left["detail"] and "secret" not in left["detail"]


@pytest.mark.parametrize("status", [401, 404])
def test_no_permission_or_no_such_model_fails_at_once(data, tmp_path, status):
    with (
        between(NOWHERE, lambda number: (status, {})) as (url, requests),
        pytest.raises(UserError, match="--text-model") as caught,
    ):
        augmented(data, tmp_path / "a", url, "m", connections=1)
    # The thread that sends requests may send a few more until the main thread has seen the first error.
    assert len(requests) < PRODUCTS / 4 and not isinstance(caught.value, Unavailable) and "\n" not in str(caught.value)


@pytest.mark.slow
def test_the_key_is_sent_and_never_written(data, model, server, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-of-mine")
    prepared = augmented(data, tmp_path / "a", server, model)
    for path in prepared.folder.rglob("*"):
        assert not path.is_file() or b"sk-secret-of-mine" not in path.read_bytes()
    assert candidates._client(chat.Chat(server, str(model))).api_key == "sk-secret-of-mine"
