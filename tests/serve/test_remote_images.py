"""Pictures by URL: only from listed hosts, never from private addresses, judged again after each redirect."""

import asyncio
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from pictures import picture_bytes

from pixellm.errors import BadRequestError
from pixellm.serve.remote_images import RemoteImages, is_public

PICTURE = picture_bytes(9, 5)


class _Site(BaseHTTPRequestHandler):
    """A picture, redirects to good and bad places, an endless body."""

    def do_GET(self) -> None:
        port = self.server.server_address[1]
        redirects = {
            "/to-picture": f"http://127.0.0.1:{port}/picture",
            "/to-elsewhere": "http://169.254.169.254/latest/meta-data",
            "/to-file": "file:///etc/passwd",
            "/round": f"http://127.0.0.1:{port}/round",
        }
        if self.path in redirects:
            self.send_response(302)
            self.send_header("Location", redirects[self.path])
            self.end_headers()
            return
        self.send_response(200 if self.path in ("/picture", "/endless") else 404)
        self.end_headers()
        if self.path == "/picture":
            self.wfile.write(PICTURE)
        try:
            while self.path == "/endless":
                self.wfile.write(bytes(10_000))
        except OSError:
            pass

    def log_message(self, *_arguments: object) -> None:
        """Says nothing."""


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Site)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_address[1]
    server.shutdown()
    server.server_close()


def fetch(remote: RemoteImages, url: str) -> bytes:
    return asyncio.run(remote.fetch(url, param="image"))


def test_a_listed_host_gives_its_picture_also_behind_a_redirect(port: int) -> None:
    remote = RemoteImages([f"127.0.0.1:{port}"], 50_000, 5, may_connect=lambda address: address == "127.0.0.1")
    assert fetch(remote, f"http://127.0.0.1:{port}/picture") == PICTURE
    assert fetch(remote, f"HTTP://127.0.0.1:{port}/to-picture#x") == PICTURE
    for path, code in (
        ("/to-elsewhere", "image_url_not_allowed"),
        ("/to-file", "invalid_image_url"),
        ("/round", "image_url_unreachable"),
        ("/absent", "image_url_unreachable"),
        ("/endless", "image_too_large"),
    ):
        with pytest.raises(BadRequestError) as refused:
            fetch(remote, f"http://127.0.0.1:{port}{path}")
        assert refused.value.code == code, path


def test_a_listed_name_at_a_private_address_is_not_connected_to(port: int) -> None:
    remote = RemoteImages([f"localhost:{port}", f"127.0.0.1:{port}", "*.internal"], 50_000, 5)
    for url in (f"http://localhost:{port}/picture", f"http://127.0.0.1:{port}/picture"):
        with pytest.raises(BadRequestError, match="not public"):
            fetch(remote, url)


@pytest.mark.parametrize(
    "url",
    [
        "http://example.org/a.png",
        "http://evil-example.com/a.png",
        "http://example.com.evil.org/a.png",
        "http://example.com:8080/a.png",
        "http://user@example.com/a.png",
        "http://127.0.0.1/a.png",
        "http:///a.png",
        "http://[::1]/",
    ],
)
def test_what_is_not_listed_is_refused_before_any_name_is_looked_up(url: str) -> None:
    with pytest.raises(BadRequestError) as refused:
        fetch(RemoteImages(["example.com", "*.example.com"], 1000, 5), url)
    assert refused.value.code in ("image_url_not_allowed", "invalid_image_url")
    with pytest.raises(BadRequestError, match="does not fetch"):
        fetch(RemoteImages([], 1000, 5), url)


PRIVATE = """127.0.0.1 10.1.2.3 172.16.0.1 192.168.0.1 169.254.169.254 100.64.0.1 0.0.0.0 224.0.0.1 ::1 fe80::1%eth0
fc00::1 ::ffff:127.0.0.1 ::ffff:10.0.0.1 2002:7f00:1:: 64:ff9b::7f00:1 ::"""


@pytest.mark.parametrize("address", PRIVATE.split())
def test_addresses_that_are_not_of_the_open_internet(address: str) -> None:
    assert not is_public(address)


def test_addresses_of_the_open_internet() -> None:
    assert is_public("93.184.216.34")
    assert is_public("2606:2800:220:1:248:1893:25c8:1946")
