"""Downloads images by URL, only from hosts that the user named.

A URL is requested only over http or https, only if its host is allowed, and only at addresses of the public internet.
Every connection uses a resolver that returns public addresses only, so neither a name that points inside the network
nor one that changes between check and use (DNS rebinding) gets through. Redirects are followed explicitly, and each
hop is checked the same way. Responses are limited in time and size, retried after transient errors, and cached by URL
for later runs.
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
    raise UserError("--fetch: needs aiohttp; pip install -e '.[fetch]'") from None

SECONDS = 30.0
"""Limit of one attempt in seconds, from connecting to the last byte."""

LARGEST = 32 << 20
"""Limit of one image, in bytes."""

TRIES, WAIT = 4, 0.5
"""Attempts, and the seconds before the second one. Each wait doubles, plus up to 50% random jitter."""

REDIRECTS = 5

RETRY_STATUSES = {408, 425, 429, 500, 502, 503, 504}
"""HTTP status codes that are worth a retry."""

LONGEST_WAIT = 60.0
"""Seconds. If Retry-After asks for a longer wait, the URL is given up."""

UNICAST = ipaddress.ip_network("2000::/3")
"""Global unicast: the public part of IPv6."""

EXCLUDED = [ipaddress.ip_network(network) for network in ("2001::/32", "2002::/16", "3fff::/20")]
"""Teredo and 6to4, which embed other addresses, and a range reserved for documentation."""


def is_public(address: str) -> bool:
    """Whether an address is on the public internet: not private, loopback, link-local, reserved or multicast, nor an
    IPv6 address that embeds one of these.
    """
    ip = ipaddress.ip_address(address.partition("%")[0])
    if ip.version == 6 and ip.ipv4_mapped:
        ip = ip.ipv4_mapped
    if ip.version == 6 and (ip not in UNICAST or any(ip in network for network in EXCLUDED)):
        return False
    return ip.is_global and not ip.is_multicast


def is_allowed(host: str, hosts: Sequence[str]) -> bool:
    """Whether a host is in `hosts`, or is a subdomain of an entry written as *.example.com."""
    host = host.rstrip(".").casefold()
    for allowed in hosts:
        allowed = allowed.rstrip(".").casefold()
        if host == allowed or (allowed.startswith("*.") and host.endswith(allowed[1:])):
            return True
    return False


class PublicResolver(AbstractResolver):
    """Resolves a name to its public addresses; fails if any address is not public, so no private host is contacted."""

    def __init__(self, public: Callable[[str], bool]):
        self.inner, self.public = ThreadedResolver(), public

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        found = await self.inner.resolve(host, port, family)
        for result in found:
            if not self.public(result["host"]):
                raise Refused(f"{host} resolves to {result['host']}, which is not a public address")
        return found

    async def close(self) -> None:
        await self.inner.close()


class Refused(Exception):
    """A failure that a retry will not fix."""


class Transient(Exception):
    """A failure that a retry may fix."""

    def __init__(self, message: str, wait: float = 0.0):
        super().__init__(message)
        self.wait = wait


def cache() -> Path:
    """The folder of downloaded images: $MOON_JAX_CACHE, or else moon_jax/fetched in the user's cache folder."""
    override = os.environ.get("MOON_JAX_CACHE")
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(override) if override else Path(home) / "moon_jax" / "fetched"


def path_of(url: str) -> Path:
    """The cache path of a URL's response."""
    name = hashlib.sha256(url.encode("utf-8", "surrogatepass")).hexdigest()
    return cache() / name[:2] / name


def fetch(
    urls: Iterable[str], hosts: Sequence[str], connections: int = 8, public: Callable[[str], bool] = is_public
) -> dict[str, Path | BadRecord]:
    """Downloads the URLs that are not in the cache.

    Args:
        hosts: the allowed hosts.
        connections: the maximum number of simultaneous connections to one host.
        public: whether an address may be contacted.

    Returns:
        For each URL the path of the cached response, or the reason for its absence.
    """
    return asyncio.run(_fetch(list(urls), hosts, connections, public))


async def _fetch(
    urls: list[str], hosts: Sequence[str], connections: int, public: Callable[[str], bool]
) -> dict[str, Path | BadRecord]:
    connector = aiohttp.TCPConnector(
        limit=0, limit_per_host=connections, resolver=PublicResolver(public), use_dns_cache=False
    )
    timeout = aiohttp.ClientTimeout(total=SECONDS)
    # No cookies, no proxies from the environment, no passwords from ~/.netrc.
    # Nothing is decompressed: a few bytes could become gigabytes.
    async with aiohttp.ClientSession(
        connector=connector,
        timeout=timeout,
        cookie_jar=aiohttp.DummyCookieJar(),
        trust_env=False,
        auto_decompress=False,
        headers={"Accept": "image/*", "Accept-Encoding": "identity"},
    ) as session:
        # URLs wait here and not as open requests, which would time out.
        slots = collections.defaultdict(lambda: asyncio.Semaphore(connections))

        async def one(url: str) -> Path | BadRecord:
            path = path_of(url)
            if path.is_file():
                return path
            async with slots[url.partition("://")[2].partition("/")[0]]:
                try:
                    return _store(path, await _get_with_retries(session, url, hosts, public))
                except (Refused, Transient) as error:
                    return BadRecord("image not fetched", f"{url[:200]}: {error}")

        return dict(zip(urls, await asyncio.gather(*map(one, urls)), strict=True))


def _store(path: Path, content: bytes) -> Path:
    """Writes a response into the cache.

    Raises:
        Refused: it is not an image.
    """
    try:
        Image.open(io.BytesIO(content), formats=FORMATS)
    except Exception:  # Pillow raises nearly any type
        raise Refused("the response is not an image") from None
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(content)
    temporary.replace(path)
    return path


async def _get_with_retries(
    session: aiohttp.ClientSession, url: str, hosts: Sequence[str], public: Callable[[str], bool]
) -> bytes:
    for attempt in range(TRIES):
        try:
            return await _get(session, url, hosts, public)
        except Transient as error:
            if attempt == TRIES - 1 or error.wait > LONGEST_WAIT:
                raise
            wait = WAIT * 2**attempt * random.uniform(1, 1.5)
            await asyncio.sleep(max(error.wait, wait))
    raise AssertionError("the last attempt returns or raises")


async def _get(session: aiohttp.ClientSession, url: str, hosts: Sequence[str], public: Callable[[str], bool]) -> bytes:
    for _ in range(REDIRECTS + 1):
        _check(url, hosts, public)
        try:
            async with session.get(url, allow_redirects=False) as response:
                if response.status in (301, 302, 303, 307, 308) and response.headers.get("Location"):
                    url = urljoin(url, response.headers["Location"])
                    continue
                if response.status in RETRY_STATUSES:
                    raise Transient(f"HTTP status {response.status}", _retry_after(response.headers.get("Retry-After")))
                if response.status != 200:
                    raise Refused(f"HTTP status {response.status}")
                return await _body(response)
        except aiohttp.ClientConnectorError as error:
            if isinstance(error.__cause__, Refused):
                raise error.__cause__ from None
            raise Transient(_summary(error)) from None
        except (aiohttp.InvalidURL, ValueError) as error:
            raise Refused(_summary(error)) from None
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise Transient(_summary(error)) from None
    raise Refused(f"more than {REDIRECTS} redirects")


def _check(url: str, hosts: Sequence[str], public: Callable[[str], bool]) -> None:
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
    except ValueError as error:
        raise Refused(str(error)) from None
    if parts.scheme not in ("http", "https"):
        raise Refused(f"{parts.scheme}:// is not supported; use http:// or https://")
    if parts.username is not None or parts.password is not None:
        raise Refused("the URL contains a user name or password")
    if not is_allowed(host, hosts):
        raise Refused(f"--fetch does not allow {host[:100] or 'an empty host'}")
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return  # a name: the resolver checks its addresses
    if not public(str(address)):
        raise Refused(f"{address} is not a public address")


async def _body(response: aiohttp.ClientResponse) -> bytes:
    if (response.content_length or 0) > LARGEST:
        raise Refused(f"{response.content_length} bytes; the limit is {LARGEST}")
    content = bytearray()
    async for part in response.content.iter_chunked(1 << 16):
        content += part
        if len(content) > LARGEST:
            raise Refused(f"more than {LARGEST} bytes")
    return bytes(content)


def _retry_after(header: str | None) -> float:
    """Seconds of a Retry-After header. A date, which few servers send, counts as 0."""
    return float(header) if header and header.isdigit() else 0.0


def _summary(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
