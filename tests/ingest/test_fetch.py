"""Downloads from a real server on loopback. Loopback is not a public address, so most tests override `public`."""

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
    """Address of a server, its request counts by path, and its peak number of simultaneous requests."""
    requests, now, most = Counter(), [0], [0]

    async def respond(request):
        requests[request.path] += 1
        now[0] += 1
        most[0] = max(most[0], now[0])
        try:
            name = request.path.strip("/")
            if name.startswith("photo"):
                await asyncio.sleep(0.02)
                return aiohttp_web.Response(body=PHOTO)
            if name == "twice":
                return (
                    aiohttp_web.Response(status=503) if requests[request.path] < 3 else aiohttp_web.Response(body=PHOTO)
                )
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
        app.router.add_get("/{any:.*}", respond)
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
        loop.run_until_complete(asyncio.sleep(0.1))  # lets cancelled handlers finish

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert ready.wait(30)
    yield f"http://localhost:{address[0]}", requests, most
    asyncio.run_coroutine_threadsafe(runners[0].cleanup(), loop).result(30)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(30)


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("MOON_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fetch, "WAIT", 0.01)


def get(*urls, hosts=("localhost",), public=lambda address: True, **options):
    found = fetch.fetch(urls, hosts, public=public, **options)
    assert list(found) == list(urls)
    return [found[url].detail if isinstance(found[url], BadRecord) else found[url].read_bytes() for url in urls]


def test_downloads_are_cached_and_never_repeated(server):
    address, requests, _ = server
    urls = [f"{address}/photo/{n}" for n in range(30)]
    assert get(*urls) == [PHOTO] * 30
    assert get(*urls) == [PHOTO] * 30
    assert all(requests[f"/photo/{n}"] == 1 for n in range(30))


def test_connections_per_host_are_limited(server):
    address, _, most = server
    most[0] = 0
    get(*(f"{address}/photo/few/{n}" for n in range(40)), connections=3)
    assert 2 <= most[0] <= 3


def test_transient_errors_are_retried(server):
    address, requests, _ = server
    assert get(f"{address}/twice") == [PHOTO] and requests["/twice"] == 3
    [message] = get(f"{address}/broken")
    assert "HTTP status 500" in message and requests["/broken"] == fetch.TRIES
    [message] = get(f"{address}/gone")
    assert "HTTP status 404" in message and requests["/gone"] == 1
    [message] = get(f"{address}/page")
    assert message.endswith("the response is not an image") and not fetch.path_of(f"{address}/page").exists()
    assert get(f"{address}/packed") == [PHOTO]  # stored as sent: nothing is decompressed
    [message] = get(f"{address}/patient")
    assert "HTTP status 429" in message and requests["/patient"] == 1  # Retry-After asks for a quarter of an hour
    [message] = get(f"{address}/cut")
    assert requests["/cut"] == fetch.TRIES and message.startswith(f"{address}/cut: ")


def test_responses_are_limited_in_size_and_time(server, monkeypatch):
    address, requests, _ = server
    monkeypatch.setattr(fetch, "LARGEST", 1 << 20)
    monkeypatch.setattr(fetch, "SECONDS", 0.3)
    monkeypatch.setattr(fetch, "TRIES", 2)
    [message] = get(f"{address}/huge")
    assert message.endswith("more than 1048576 bytes") and requests["/huge"] == 1
    [message] = get(f"{address}/slow")
    assert "imeout" in message and requests["/slow"] == 2
    assert not list(fetch.cache().rglob("*.*"))  # no partial files


def test_urls_that_are_not_allowed_are_never_requested(server):
    address, requests, _ = server
    before = sum(requests.values())
    for url, why in {
        f"{address}/photo/x": "--fetch does not allow localhost",
        "https://example.com/a.jpg": "--fetch does not allow example.com",
        "file:///etc/passwd": "file:// is not supported",
        "ftp://images.test/a.jpg": "ftp:// is not supported",
        "http://images.test@example.com/a.jpg": "the URL contains a user name or password",
        "http://[::1/a.jpg": "Invalid IPv6 URL",
        "http:///a.jpg": "--fetch does not allow an empty host",
    }.items():
        [message] = get(url, hosts=("images.test",))
        assert why in message, url
    assert sum(requests.values()) == before


def test_private_addresses_are_never_contacted(server):
    """Given by number in many notations, or by a name that resolves to one."""
    address, requests, _ = server
    port = address.rpartition(":")[2]
    before = sum(requests.values())
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
        [message] = get(url, hosts=hosts, public=fetch.is_public)
        assert "not a public address" in message or "is not a canonical IPv4 address" in message, message
    assert sum(requests.values()) == before


def test_redirects_are_checked_like_urls(server):
    address, requests, _ = server
    port = address.rpartition(":")[2]
    assert get(f"{address}/to/1?url=/photo/redirected") == [PHOTO]
    [message] = get(f"{address}/to/2?url=http://127.0.0.1:{port}/photo/secret")
    assert "--fetch does not allow 127.0.0.1" in message
    [message] = get(f"{address}/to/3?url=file:///etc/passwd")
    assert "file:// is not supported" in message
    public_name_only = lambda address: address not in ("127.0.0.2",)  # noqa: E731
    [message] = get(
        f"{address}/to/4?url=http://127.0.0.2:{port}/photo/secret",
        hosts=("localhost", "127.0.0.2"),
        public=public_name_only,
    )
    assert "127.0.0.2 is not a public address" in message
    [message] = get(f"{address}/round")
    assert "more than 5 redirects" in message
    assert not requests["/photo/secret"]


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
    """End to end. Loopback counts as public here, which only a test can arrange."""
    address, requests, _ = server
    lines = [{"product_id": str(n), "title": f"thing {n}", "images": [f"{address}/photo/c{n}"]} for n in range(8)]
    lines.append({"product_id": "gone", "title": "thing", "images": [f"{address}/gone"]})
    lines.append({"product_id": "elsewhere", "title": "thing", "images": ["https://example.com/a.jpg"]})
    (tmp_path / "products.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(
        UserError, match=r"10 image not fetched\), such as products.jsonl 1: a URL; --fetch HOST allows downloads"
    ):
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
    assert all(requests[f"/photo/c{n}"] == 1 for n in range(8))
