"""Against a real server on loopback, which is no public address: the tests that let it be asked say so."""

import asyncio
import dataclasses
import functools
import json
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest

aiohttp_web = pytest.importorskip("aiohttp.web", reason="aiohttp is not installed (the extra fetch)")

from moon_jax import config as config_lib  # noqa: E402
from moon_jax.config import UserError  # noqa: E402
from moon_jax.ingest import fetch, prepare  # noqa: E402
from moon_jax.ingest.parse import BadRecord  # noqa: E402
from tests.conftest import jpeg, prepared_from, quarantine  # noqa: E402

PHOTO = jpeg((200, 30, 30), (24, 24), 0)


@pytest.fixture(scope="module")
def server():
    """Address of a server, what it was asked, and the most it answered at once."""
    asked, now, most = Counter(), [0], [0]

    async def answer(request):
        asked[request.path] += 1
        now[0] += 1
        most[0] = max(most[0], now[0])
        try:
            name = request.path.strip("/")
            if name.startswith("photo"):
                await asyncio.sleep(0.02)
                return aiohttp_web.Response(body=PHOTO)
            if name == "twice":
                return aiohttp_web.Response(status=503) if asked[request.path] < 3 else aiohttp_web.Response(body=PHOTO)
            if name == "patient":
                headers = {"Retry-After": "1000"}
                return aiohttp_web.Response(status=429, headers=headers)
            if name == "page":
                return aiohttp_web.Response(text="<html>not here")
            if name == "packed":
                return aiohttp_web.Response(body=PHOTO, headers={"Content-Encoding": "gzip"})
            if name == "gone":
                return aiohttp_web.Response(status=404)
            if name == "huge":
                response = aiohttp_web.StreamResponse()
                await response.prepare(request)
                while True:
                    await response.write(b"x" * (1 << 20))
            if name == "slow":
                await asyncio.sleep(1)
            if name == "cut":
                response = aiohttp_web.StreamResponse(headers={"Content-Length": "100000"})
                await response.prepare(request)
                await response.write(b"x")
                request.transport.close()
                return response
            if name == "round":
                return aiohttp_web.Response(status=302, headers={"Location": "/round"})
            if name.startswith("to"):
                return aiohttp_web.Response(status=302, headers={"Location": request.query["url"]})
            return aiohttp_web.Response(status=500)
        finally:
            now[0] -= 1

    loop, ready, address, runners = asyncio.new_event_loop(), threading.Event(), [], []

    async def start():
        app = aiohttp_web.Application()
        app.router.add_get("/{any:.*}", answer)
        runner = aiohttp_web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True)
        runners.append(runner)
        await runner.setup()
        site = aiohttp_web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        address.append(site._server.sockets[0].getsockname()[1])
        ready.set()

    def run():
        asyncio.set_event_loop(loop)
        loop.run_until_complete(start())
        loop.run_forever()
        loop.run_until_complete(asyncio.sleep(0.1))  # what was cancelled ends

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert ready.wait(30)
    yield f"http://localhost:{address[0]}", asked, most
    asyncio.run_coroutine_threadsafe(runners[0].cleanup(), loop).result(30)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(30)


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("MOON_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fetch, "WAIT", 0.01)


def ask(*urls, hosts=("localhost",), public=lambda address: True, **options):
    found = fetch.fetch(urls, hosts, public=public, **options)
    assert list(found) == list(urls)
    return [found[url].detail if isinstance(found[url], BadRecord) else found[url].read_bytes() for url in urls]


def test_what_is_fetched_is_kept_and_never_asked_for_again(server):
    address, asked, _ = server
    urls = [f"{address}/photo/{n}" for n in range(30)]
    assert ask(*urls) == [PHOTO] * 30
    assert ask(*urls) == [PHOTO] * 30
    assert all(asked[f"/photo/{n}"] == 1 for n in range(30))


def test_a_host_is_asked_by_a_few_connections_at_a_time(server):
    address, _, most = server
    most[0] = 0
    ask(*(f"{address}/photo/few/{n}" for n in range(40)), connections=3)
    assert 2 <= most[0] <= 3


def test_what_may_go_well_later_is_tried_again(server):
    address, asked, _ = server
    assert ask(f"{address}/twice") == [PHOTO] and asked["/twice"] == 3
    [told] = ask(f"{address}/broken")
    assert "the server answers 500" in told and asked["/broken"] == fetch.TRIES
    [told] = ask(f"{address}/gone")
    assert "the server answers 404" in told and asked["/gone"] == 1
    [told] = ask(f"{address}/page")
    assert told.endswith("the answer is no image") and not fetch.path_of(f"{address}/page").exists()
    assert ask(f"{address}/packed") == [PHOTO]  # as it came: nothing is unpacked
    [told] = ask(f"{address}/patient")
    assert "the server answers 429" in told and asked["/patient"] == 1  # it asks for a quarter of an hour
    [told] = ask(f"{address}/cut")
    assert asked["/cut"] == fetch.TRIES and told.startswith(f"{address}/cut: ")


def test_answers_are_bounded_in_size_and_time(server, monkeypatch):
    address, asked, _ = server
    monkeypatch.setattr(fetch, "LARGEST", 1 << 20)
    monkeypatch.setattr(fetch, "SECONDS", 0.3)
    monkeypatch.setattr(fetch, "TRIES", 2)
    [told] = ask(f"{address}/huge")
    assert told.endswith("more than 1048576 bytes") and asked["/huge"] == 1
    [told] = ask(f"{address}/slow")
    assert "imeout" in told and asked["/slow"] == 2
    assert not list(fetch.cache().rglob("*.*"))  # nothing half-written


def test_nothing_is_asked_for_that_was_not_allowed(server):
    address, asked, _ = server
    before = sum(asked.values())
    for url, why in {
        f"{address}/photo/x": "--fetch does not name localhost",
        "https://example.com/a.jpg": "--fetch does not name example.com",
        "file:///etc/passwd": "file:// is not fetched",
        "ftp://images.test/a.jpg": "ftp:// is not fetched",
        "http://images.test@example.com/a.jpg": "names a user",
        "http://[::1/a.jpg": "Invalid IPv6 URL",
        "http:///a.jpg": "--fetch does not name its host",
    }.items():
        [told] = ask(url, hosts=("images.test",))
        assert why in told, url
    assert sum(asked.values()) == before


def test_addresses_of_a_private_network_are_never_asked(server):
    """By number, by a name that points there, and by redirect."""
    address, asked, _ = server
    port = address.rpartition(":")[2]
    before = sum(asked.values())
    hosts = ("localhost", "127.0.0.1", "10.0.0.7", "169.254.169.254", "::1", "::ffff:127.0.0.1", "0x7f.1", "2130706433")
    for url in (
        f"{address}/photo/p",
        f"http://127.0.0.1:{port}/photo/p",
        "http://10.0.0.7/a.jpg",
        "http://169.254.169.254/latest/meta-data",
        f"http://[::1]:{port}/photo/p",
        f"http://[::ffff:127.0.0.1]:{port}/photo/p",
        f"http://0x7f.1:{port}/photo/p",
        f"http://2130706433:{port}/photo/p",
    ):
        [told] = ask(url, hosts=hosts, public=fetch.is_public)
        assert "no address of the public internet" in told or "is not a canonical IPv4 address" in told, told
    assert sum(asked.values()) == before


def test_redirects_are_held_to_the_same(server):
    address, asked, _ = server
    port = address.rpartition(":")[2]
    assert ask(f"{address}/to/1?url=/photo/redirected") == [PHOTO]
    [told] = ask(f"{address}/to/2?url=http://127.0.0.1:{port}/photo/secret")
    assert "--fetch does not name 127.0.0.1" in told
    [told] = ask(f"{address}/to/3?url=file:///etc/passwd")
    assert "file:// is not fetched" in told
    public_name_only = lambda address: address not in ("127.0.0.2",)  # noqa: E731
    [told] = ask(
        f"{address}/to/4?url=http://127.0.0.2:{port}/photo/secret",
        hosts=("localhost", "127.0.0.2"),
        public=public_name_only,
    )
    assert "127.0.0.2 is no address of the public internet" in told
    [told] = ask(f"{address}/round")
    assert "more than 5 redirects" in told
    assert not asked["/photo/secret"]


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.216.34", True),
        ("2606:2800:220:1::1", True),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("100.64.0.1", False),  # carrier-grade NAT
        ("127.0.0.1", False),
        ("169.254.169.254", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("::1", False),
        ("fe80::1%eth0", False),
        ("fd00::1", False),
        ("::ffff:10.0.0.1", False),
        ("2002:0a00:0001::1", False),  # 6to4 of 10.0.0.1
        ("64:ff9b::0a00:0001", False),  # NAT64 of 10.0.0.1
        ("::127.0.0.1", False),
        ("64:ff9b:1::7f00:1", False),
        ("fec0::1", False),
        ("::ffff:0:7f00:1", False),
        ("3fff::1", False),
        ("2001:0:4136:e378:8000:63bf:3fff:fdd2", False),  # Teredo
    ],
)
def test_public_addresses(address, public):
    assert fetch.is_public(address) == public


def test_allowed_hosts():
    assert fetch.is_allowed("a.example.com", ["*.example.com"]) and fetch.is_allowed(
        "A.b.Example.com.", ["*.example.com"]
    )
    assert not fetch.is_allowed("example.com", ["*.example.com"]) and not fetch.is_allowed(
        "badexample.com", ["*.example.com"]
    )
    assert fetch.is_allowed("example.com", ["example.com"]) and not fetch.is_allowed("a.example.com", ["example.com"])
    assert not fetch.is_allowed("", ["*."]) and not fetch.is_allowed("a", [])


def test_a_catalogue_of_urls(server, tmp_path, monkeypatch):
    """The whole way; loopback counts as public here, which nothing but a test can ask for."""
    address, asked, _ = server
    lines = [{"product_id": str(n), "title": f"thing {n}", "images": [f"{address}/photo/c{n}"]} for n in range(8)]
    lines.append({"product_id": "gone", "title": "thing", "images": [f"{address}/gone"]})
    lines.append({"product_id": "elsewhere", "title": "thing", "images": ["https://example.com/a.jpg"]})
    (tmp_path / "products.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(UserError, match=r"10 image not fetched\), such as products.jsonl 1: a URL; --fetch HOST lets"):
        prepared_from(tmp_path / "products.jsonl", tmp_path / "none")
    monkeypatch.setattr(fetch, "fetch", functools.partial(fetch.fetch, public=lambda address: True))
    options = dataclasses.replace(prepare.Options.of(config_lib.Config()), hosts=("localhost",))
    for output in ("p", "q"):
        pool = lambda: ThreadPoolExecutor(2)  # noqa: E731
        found = prepare.prepare(tmp_path / "products.jsonl", tmp_path / output, options, pool, 2)
        assert {product.id for product in found.products} == {str(n) for n in range(8)}
        assert all(product.images == (PHOTO,) for product in found.products)
        assert [entry["id"] for entry in quarantine(found)] == ["gone", "elsewhere"]
        assert found.quarantined == {"image not fetched": 2}
    assert all(asked[f"/photo/c{n}"] == 1 for n in range(8))
