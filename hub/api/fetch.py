"""Fetches images from public addresses, never from the server's own network.

A name is resolved once, all its addresses are checked, and the connection goes to one of those that were checked: a
name that changes its address in between (DNS rebinding) gains nothing. Each redirect is checked in the same way.
"""

import ipaddress
import socket
import ssl
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import anyio
import httpx

from bifocal.hub.api.admission import Held
from bifocal.hub.api.errors import ApiError, try_again
from bifocal.hub.api.inputs import Input, too_large
from bifocal.hub.api.settings import MAX_IMAGE_SIZE, MAX_IMAGE_URLS

_MAX_REDIRECTS = 3
_AT_ONCE = 16  # images of all requests
_AT_ONCE_PER_REQUEST = 4
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")  # its last four bytes are an IPv4 address
_NOT_PUBLIC = (
    ipaddress.IPv4Network("192.0.0.0/24"),  # of protocols; some of it counts as global
    ipaddress.IPv4Network("168.63.129.16/32"),  # services of Azure for its own virtual machines
)
_REDIRECTS = (301, 302, 303, 307, 308)


def is_public(address: str) -> bool:
    """Return whether an IP address is on the public Internet.

    IPv6 addresses that lead to an IPv4 address (mapped, 6to4, Teredo, NAT64) are public if that one is, too.
    """
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo or (None, None))[1]
        if ip in _NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
        if ip.is_site_local:
            return False
    elif any(ip in network for network in _NOT_PUBLIC):
        return False
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


async def resolve(host: str, port: int) -> list[str]:
    """Return the IP addresses of a name.

    Raises:
        OSError: if there are none.
    """
    found = await anyio.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(address[4][0]) for address in found]


@dataclass
class ImageFetcher:
    """Fetches the images of requests.

    Args:
        seconds: time for one image, from the first look-up to the last byte.
        request_seconds: time for all images of a request.
        max_size: bytes of an image.
        ports: ports that are fetched from.
        resolve: returns the IP addresses of a host and port.
        is_public: whether an IP address may be connected to.
    """

    seconds: float = 10.0
    request_seconds: float = 60.0
    max_size: int = MAX_IMAGE_SIZE
    ports: Sequence[int] = (80, 443)
    resolve: Callable[[str, int], Awaitable[list[str]]] = resolve
    is_public: Callable[[str], bool] = is_public
    _limiter: Any = field(default=None, init=False)
    _tls: Any = field(default=None, init=False)

    async def fetch_all(self, inputs: Sequence[Input], held: Held) -> None:
        """Fetch images, several at once, into the inputs.

        Args:
            inputs: those that have an address.
            held: counts the bytes.

        Raises:
            ApiError: if there are too many, or one cannot be fetched; those that are still on their way are given up.
        """
        if len(inputs) > MAX_IMAGE_URLS:
            raise ApiError(
                413, f"The request has {len(inputs):,} addresses of images, more than {MAX_IMAGE_URLS}. Send fewer, or "
                "the images themselves.", inputs[MAX_IMAGE_URLS].param,
            )  # fmt: skip
        if self._limiter is None:  # within the event loop
            self._limiter, self._tls = anyio.CapacityLimiter(_AT_ONCE), ssl.create_default_context()
        own_limiter = anyio.CapacityLimiter(_AT_ONCE_PER_REQUEST)
        errors: list[ApiError] = []
        waited = 0.0  # for images of other requests, in all slots of this one

        async def fetch(item: Input) -> None:
            nonlocal waited
            try:
                async with own_limiter:
                    since = time.monotonic()
                    try:
                        await self._limiter.acquire()
                    finally:
                        waited += time.monotonic() - since
                    try:
                        item.image = await self.fetch(item.url or "", item.param)
                    finally:
                        self._limiter.release()
                held.add(len(item.image))
            except ApiError as error:
                errors.append(error)
                group.cancel_scope.cancel()

        with anyio.move_on_after(self.request_seconds) as scope:
            async with anyio.create_task_group() as group:
                for item in inputs:
                    group.start_soon(fetch, item)
        if errors:
            raise errors[0]
        if scope.cancelled_caught:
            if waited > min(len(inputs), _AT_ONCE_PER_REQUEST) * self.request_seconds / 2:
                raise try_again("The server is busy: it fetches images of other requests. Send this one again later.")
            raise ApiError(400, f"The images took more than {self.request_seconds:g} seconds to fetch. Send fewer.")

    async def fetch(self, url: str, param: str) -> bytes:
        """Return the bytes of an image.

        Raises:
            ApiError: if its address is not public, or it cannot be fetched within the limits of size and time.
        """
        try:
            with anyio.fail_after(self.seconds):
                for _ in range(_MAX_REDIRECTS + 1):
                    content, url = await self._request(url, param)
                    if content is not None:
                        return content
        except TimeoutError as error:
            raise ApiError(400, f"'{param}' took more than {self.seconds:g} seconds to fetch.", param) from error
        except (httpx.HTTPError, httpx.InvalidURL, OSError, UnicodeError, ValueError) as error:
            raise ApiError(400, f"'{param}' cannot be fetched. Check its address, or send the image.", param) from error
        raise ApiError(400, f"'{param}' is redirected more than {_MAX_REDIRECTS} times.", param)

    async def _request(self, url: str, param: str) -> tuple[bytes | None, str]:
        """Return the bytes at an address, or None and the address that it redirects to."""
        parsed = httpx.URL(url)
        host, port = parsed.host, parsed.port or (443 if parsed.scheme == "https" else 80)
        refused = ApiError(400, f"'{param}' is not at a public address (http or https). Send the image itself.", param)
        if parsed.scheme not in ("http", "https") or not host or port not in self.ports:
            raise refused
        addresses = await self.resolve(parsed.raw_host.decode("ascii").strip("[]"), port)
        if not addresses or not all(map(self.is_public, addresses)):
            raise refused
        for address in addresses:
            try:
                return await self._get(parsed, address, param)
            except httpx.ConnectError:  # the machine may not reach all of them, such as IPv6
                if address == addresses[-1]:
                    raise
        raise AssertionError("there is a last address")

    async def _get(self, url: httpx.URL, address: str, param: str) -> tuple[bytes | None, str]:
        # The name goes into the header and the check of the certificate, the address into the connection. No
        # connection is kept: two names may share an address, but not a certificate.
        host = url.raw_host.decode("ascii")
        headers = {"Host": url.netloc.decode("ascii"), "Accept-Encoding": "identity", "Accept": "image/*,*/*"}
        target = url.copy_with(host=address, userinfo=b"", fragment=None)
        client = httpx.AsyncClient(verify=self._tls or True, trust_env=False)
        async with (
            client,
            client.stream("GET", target, headers=headers, extensions={"sni_hostname": host}) as response,
        ):
            if response.status_code in _REDIRECTS and "location" in response.headers:
                return None, str(url.join(response.headers["location"]))
            if response.status_code != 200:
                raise ApiError(400, f"'{param}' cannot be fetched: its server answers {response.status_code}.", param)
            content = bytearray()
            async for part in response.aiter_raw():
                content += part
                if len(content) > self.max_size:
                    raise too_large(param)
            return bytes(content), str(url)
