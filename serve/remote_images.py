"""Pictures by http(s) URL: off unless the operator lists hosts, and never from a private address.

A name is resolved here, every address it has is judged, and the connection goes to the very address that was judged:
a name that resolves differently a moment later reaches nothing. Redirects are followed by hand, each judged anew.
"""

import asyncio
import ipaddress
import socket
from collections.abc import Callable, Sequence

import httpx

from pixellm.errors import BadRequestError

_MAX_REDIRECTS = 3
_NAT64 = ipaddress.ip_network("64:ff9b::/96")  # a gateway's way to any IPv4 address
_DEFAULT_PORTS = {"http": 80, "https": 443}


def is_public(address: str) -> bool:
    """Whether an IP address is one of the open internet: not loopback, private, link-local, multicast or reserved."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    mapped = getattr(ip, "ipv4_mapped", None) or getattr(ip, "sixtofour", None)
    if mapped is not None:
        ip = mapped
    if ip in _NAT64:
        return False
    return ip.is_global and not ip.is_multicast


class RemoteImages:
    """Fetches pictures under an allow-list.

    Args:
        hosts: names that may be fetched from: `pictures.example.org`, `*.example.org` (any name below), or with a port
            `host:8080`; without one the scheme's own port is meant. None at all: nothing is fetched.
        max_bytes: a longer picture is refused.
        timeout_s: for one picture, redirects included.
        may_connect: judges an address; a test's seam.
    """

    def __init__(
        self,
        hosts: Sequence[str],
        max_bytes: int,
        timeout_s: float,
        may_connect: Callable[[str], bool] = is_public,
    ) -> None:
        self._hosts = tuple(host.lower() for host in hosts)
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s
        self._may_connect = may_connect

    async def fetch(self, url: str, *, param: str) -> bytes:
        """The encoded picture behind a URL, not yet checked.

        Args:
            url: http or https.
            param: the request's field, for the error object.

        Raises:
            BadRequestError: 400 when URLs are off, the host is not listed, resolves to an address that is not public,
                does not answer in time or not with a picture's bytes; 413 when it is too long.
        """
        if not self._hosts:
            raise _refused(
                "this server does not fetch pictures from http(s) URLs; send the picture itself as a data URL "
                "(data:image/jpeg;base64,…) or as multipart/form-data",
                param,
            )
        try:
            async with asyncio.timeout(self._timeout_s):
                for _hop in range(_MAX_REDIRECTS + 1):
                    target = _parsed(url, param)
                    address = await self._judged_address(target, param)
                    outcome = await self._get(target, address, param)
                    if isinstance(outcome, bytes):
                        return outcome
                    url = str(target.join(outcome))
        except TimeoutError:
            raise _unreachable(f"it did not come within {self._timeout_s:g} s", param) from None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise _unreachable(type(error).__name__, param) from None
        raise _unreachable(f"more than {_MAX_REDIRECTS} redirects", param)

    async def _judged_address(self, target: httpx.URL, param: str) -> str:
        host = target.host.lower()
        port = target.port or _DEFAULT_PORTS[target.scheme]
        if not any(_matches(pattern, host, port, target.scheme) for pattern in self._hosts):
            raise _refused(
                f"pictures are not fetched from {host[:100]!r}; the operator's serve.image_url_hosts lists where from",
                param,
            )
        try:
            found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError):
            raise _unreachable("its host has no address", param) from None
        addresses = [str(entry[4][0]) for entry in found]
        if not addresses or not all(self._may_connect(address) for address in addresses):
            raise _refused(f"{host[:100]!r} is at an address that is not public", param)
        return addresses[0]

    async def _get(self, target: httpx.URL, address: str, param: str) -> bytes | str:
        """The body, or where a redirect points."""
        request_url = target.copy_with(host=address, fragment=None)
        headers = {"Host": target.netloc.decode(), "Accept": "image/*", "Accept-Encoding": "identity"}
        async with (
            httpx.AsyncClient(trust_env=False, timeout=self._timeout_s, follow_redirects=False) as client,
            client.stream("GET", request_url, headers=headers, extensions={"sni_hostname": target.host}) as response,
        ):
            if response.is_redirect:
                return response.headers.get("location", "")
            if response.status_code != 200:
                raise _unreachable(f"its server answered {response.status_code}", param)
            body = bytearray()
            async for chunk in response.aiter_raw():
                body += chunk
                if len(body) > self._max_bytes:
                    raise BadRequestError(
                        f"the picture at this URL is larger than {self._max_bytes:,} bytes (serve.max_body_bytes)",
                        status_code=413,
                        param=param,
                        code="image_too_large",
                    )
            return bytes(body)


def _parsed(url: str, param: str) -> httpx.URL:
    try:
        target = httpx.URL(url)
    except (httpx.InvalidURL, ValueError, TypeError):
        raise _refused("this is no URL that can be read", param, "invalid_image_url") from None
    if target.scheme not in _DEFAULT_PORTS or not target.host or target.userinfo:
        raise _refused("wanted http://HOST/… or https://HOST/…, without a user name", param, "invalid_image_url")
    return target


def _matches(pattern: str, host: str, port: int, scheme: str) -> bool:
    name, separator, wanted_port = pattern.rpartition(":")
    if not separator or not wanted_port.isdigit():
        name, wanted_port = pattern, str(_DEFAULT_PORTS[scheme])
    if str(port) != wanted_port:
        return False
    return host.endswith(name[1:]) and len(host) >= len(name) if name.startswith("*.") else host == name


def _refused(message: str, param: str, code: str = "image_url_not_allowed") -> BadRequestError:
    return BadRequestError(message, param=param, code=code)


def _unreachable(why: str, param: str) -> BadRequestError:
    return BadRequestError(f"the picture cannot be fetched: {why}", param=param, code="image_url_unreachable")
