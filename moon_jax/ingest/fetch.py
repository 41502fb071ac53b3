"""Images by URL, from hosts that the user named and from nowhere else.

A URL is asked for only if its host is allowed, over http or https, and only at addresses of the public internet: each
connection asks a resolver that gives no others, so neither a name that points inwards nor one that changes between
check and use (DNS rebinding) gets through; redirects are followed by hand, and every hop is held to the same. Answers
are bounded in time and in size, tried again where that may help, and kept by URL in a cache that later runs share.
"""

from __future__ import annotations

import asyncio
import collections
import hashlib
import io
import ipaddress
import os
import random
import socket
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from urllib.parse import urljoin, urlsplit

from PIL import Image

from moon_jax.data.images import FORMATS
from moon_jax.errors import UserError
from moon_jax.ingest.parse import BadRecord

try:
    import aiohttp
    from aiohttp.abc import AbstractResolver, ResolveResult
    from aiohttp.resolver import ThreadedResolver
except ImportError:
    raise UserError("--fetch: images by URL want aiohttp; pip install -e '.[fetch]'") from None

SECONDS = 30.0
"""For one try, from connecting to the last byte."""

LARGEST = 32 << 20
"""Bytes of an image."""

TRIES, WAIT = 4, 0.5
"""Tries, and the seconds before the second one; each wait is twice the last, and up to half longer by chance."""

REDIRECTS = 5

AGAIN = {408, 425, 429, 500, 502, 503, 504}
"""What a server says that may answer later."""

LONGEST_WAIT = 60.0
"""Seconds; a server that asks for more patience (Retry-After) is given up."""


UNICAST = ipaddress.ip_network("2000::/3")
"""The public internet's part of IPv6."""

CARRIERS = [ipaddress.ip_network(network) for network in ("2001::/32", "2002::/16", "3fff::/20")]
"""Teredo and 6to4, whose addresses carry others, and one for documentation."""


def is_public(address: str) -> bool:
    """Whether this is an address of the public internet: not private, loopback, link-local, reserved or multicast, nor
    an IPv6 address that carries such a one.
    """
    ip = ipaddress.ip_address(address.partition("%")[0])
    if ip.version == 6 and ip.ipv4_mapped:
        ip = ip.ipv4_mapped
    if ip.version == 6 and (ip not in UNICAST or any(ip in network for network in CARRIERS)):
        return False
    return ip.is_global and not ip.is_multicast


def is_allowed(host: str, hosts: Sequence[str]) -> bool:
    """Whether a host is one of `hosts`, or a subdomain of one that is written *.example.com."""
    host = host.rstrip(".").casefold()
    for allowed in hosts:
        allowed = allowed.rstrip(".").casefold()
        if host == allowed or (allowed.startswith("*.") and host.endswith(allowed[1:])):
            return True
    return False


class PublicResolver(AbstractResolver):
    """Gives the public addresses of a name, and fails where it has others: what is inside is not asked."""

    def __init__(self, public: Callable[[str], bool]):
        self.inner, self.public = ThreadedResolver(), public

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        found = await self.inner.resolve(host, port, family)
        for result in found:
            if not self.public(result["host"]):
                raise Refused(f"{host} is at {result['host']}, no address of the public internet")
        return found

    async def close(self) -> None:
        await self.inner.close()


class Refused(Exception):
    """Will not be asked for, now or later."""


class Passing(Exception):
    """May go well at another time."""

    def __init__(self, told: str, wait: float = 0.0):
        super().__init__(told)
        self.wait = wait


def cache() -> Path:
    """The folder of what was fetched: $MOON_JAX_CACHE, else moon_jax in the user's cache folder."""
    given = os.environ.get("MOON_JAX_CACHE")
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(given) if given else Path(home) / "moon_jax" / "fetched"


def path_of(url: str) -> Path:
    """Where a URL's answer is kept."""
    name = hashlib.sha256(url.encode("utf-8", "surrogatepass")).hexdigest()
    return cache() / name[:2] / name


def fetch(
    urls: Iterable[str], hosts: Sequence[str], connections: int = 8, public: Callable[[str], bool] = is_public
) -> dict[str, Path | BadRecord]:
    """Fetches what is not in the cache.

    Args:
        hosts: that may be asked.
        connections: to one host at a time.
        public: whether an address may be asked.

    Returns:
        For each URL the file of its answer, or why there is none.
    """
    return asyncio.run(_fetch(list(urls), hosts, connections, public))


async def _fetch(
    urls: list[str], hosts: Sequence[str], connections: int, public: Callable[[str], bool]
) -> dict[str, Path | BadRecord]:
    connector = aiohttp.TCPConnector(
        limit=0, limit_per_host=connections, resolver=PublicResolver(public), use_dns_cache=False
    )
    timeout = aiohttp.ClientTimeout(total=SECONDS)
    # No cookies, no proxies of the environment, no passwords of ~/.netrc.
    # Nothing is unpacked: a few bytes could become gigabytes.
    async with aiohttp.ClientSession(
        connector=connector,
        timeout=timeout,
        cookie_jar=aiohttp.DummyCookieJar(),
        trust_env=False,
        auto_decompress=False,
        headers={"Accept": "image/*", "Accept-Encoding": "identity"},
    ) as session:
        # URLs wait here, not as open requests, whose time would run.
        rooms = collections.defaultdict(lambda: asyncio.Semaphore(connections))

        async def one(url: str) -> Path | BadRecord:
            path = path_of(url)
            if path.is_file():
                return path
            async with rooms[url.partition("://")[2].partition("/")[0]]:
                try:
                    return _keep(path, await _tried(session, url, hosts, public))
                except (Refused, Passing) as error:
                    return BadRecord("image not fetched", f"{url[:200]}: {error}")

        return dict(zip(urls, await asyncio.gather(*map(one, urls)), strict=True))


def _keep(path: Path, content: bytes) -> Path:
    """
    Raises:
        Refused: it is no image.
    """
    try:
        Image.open(io.BytesIO(content), formats=FORMATS)
    except Exception:  # Pillow's are of nearly any kind
        raise Refused("the answer is no image") from None
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(content)
    temporary.replace(path)
    return path


async def _tried(
    session: aiohttp.ClientSession, url: str, hosts: Sequence[str], public: Callable[[str], bool]
) -> bytes:
    for attempt in range(TRIES):
        try:
            return await _asked(session, url, hosts, public)
        except Passing as error:
            if attempt == TRIES - 1 or error.wait > LONGEST_WAIT:
                raise
            wait = WAIT * 2**attempt * random.uniform(1, 1.5)
            await asyncio.sleep(max(error.wait, wait))
    raise AssertionError("the last try returns or raises")


async def _asked(
    session: aiohttp.ClientSession, url: str, hosts: Sequence[str], public: Callable[[str], bool]
) -> bytes:
    for _ in range(REDIRECTS + 1):
        _check(url, hosts, public)
        try:
            async with session.get(url, allow_redirects=False) as answer:
                if answer.status in (301, 302, 303, 307, 308) and answer.headers.get("Location"):
                    url = urljoin(url, answer.headers["Location"])
                    continue
                if answer.status in AGAIN:
                    raise Passing(f"the server answers {answer.status}", _patience(answer.headers.get("Retry-After")))
                if answer.status != 200:
                    raise Refused(f"the server answers {answer.status}")
                return await _body(answer)
        except aiohttp.ClientConnectorError as error:
            if isinstance(error.__cause__, Refused):
                raise error.__cause__ from None
            raise Passing(_said(error)) from None
        except (aiohttp.InvalidURL, ValueError) as error:
            raise Refused(_said(error)) from None
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise Passing(_said(error)) from None
    raise Refused(f"more than {REDIRECTS} redirects")


def _check(url: str, hosts: Sequence[str], public: Callable[[str], bool]) -> None:
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
    except ValueError as error:
        raise Refused(str(error)) from None
    if parts.scheme not in ("http", "https"):
        raise Refused(f"{parts.scheme}:// is not fetched, http:// and https:// are")
    if parts.username is not None or parts.password is not None:
        raise Refused("names a user")
    if not is_allowed(host, hosts):
        raise Refused(f"--fetch does not name {host[:100] or 'its host'}")
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return  # a name: the resolver is asked
    if not public(str(address)):
        raise Refused(f"{address} is no address of the public internet")


async def _body(answer: aiohttp.ClientResponse) -> bytes:
    if (answer.content_length or 0) > LARGEST:
        raise Refused(f"{answer.content_length} bytes, at most {LARGEST} are read")
    content = bytearray()
    async for part in answer.content.iter_chunked(1 << 16):
        content += part
        if len(content) > LARGEST:
            raise Refused(f"more than {LARGEST} bytes")
    return bytes(content)


def _patience(header: str | None) -> float:
    """Seconds of a Retry-After header; a date, which few send, counts as none."""
    return float(header) if header and header.isdigit() else 0.0


def _said(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
