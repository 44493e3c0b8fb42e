"""Three hundred requests that nobody should send, straight at the application: each is refused in OpenAI's form."""

import asyncio
import base64
import io
import json
import random
import resource
import struct
import zlib
from collections import Counter
from typing import Any

import httpx
import pytest
from fake_backend import FixedModels, ScriptedBackend
from pictures import data_url, picture_bytes
from PIL import Image

from pixellm.platform.settings import ServeSettings
from pixellm.serve.ingress import build_api
from pixellm.serve.metrics import ServiceMetrics

SETTINGS = ServeSettings(max_new_tokens=64, max_body_bytes=400_000, max_image_pixels=1_000_000, max_prompt_chars=2000)
GOOD = {"image": data_url(picture_bytes(9, 7)), "prompt": "Segment it."}
JSON = {"content-type": "application/json"}
NUM_REQUESTS = 300
ALLOWED = {400, 401, 404, 405, 413, 415, 422}

Request = tuple[str, str, dict[str, Any]]


def post(body: Any, path: str = "/v1/segment") -> Request:
    return ("POST", path, {"content": json.dumps(body).encode(), "headers": JSON})


def chat_with(url: Any, text: Any = "what?") -> Request:
    parts = [{"type": "text", "text": text}, {"type": "image_url", "image_url": {"url": url}}]
    return post({"messages": [{"role": "user", "content": parts}]}, "/v1/chat/completions")


def png_of(width: int, height: int, body: bytes) -> bytes:
    """A PNG that announces a size and carries some compressed bytes."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND", b"")


def broken_pictures(rng: random.Random) -> list[bytes]:
    bomb = png_of(50_000, 50_000, bytes(100_000))
    many_frames = io.BytesIO()
    frames = [Image.new("P", (1200, 1200), number) for number in range(4)]
    frames[0].save(many_frames, "GIF", save_all=True, append_images=frames[1:])
    pictures = [b"", b"\0" * 50, b"GIF89a", b"\xff\xd8\xff", b"RIFF\0\0\0\0WEBPVP8 ", b"BM", b"II*\0", bomb]
    pictures += [png_of(0, 0, b""), png_of(2**31 - 1, 2**31 - 1, b""), many_frames.getvalue(), b"%PDF-1.7", b"<svg/>"]
    pictures += [b"8BPS\0\x01" + bytes(40), b"%!PS-Adobe-3.0 EPSF\n%%BoundingBox: 0 0 9 9\n", b"\x89PNG\r\n\x1a\n"]
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"):
        whole = picture_bytes(40, 30, kind)
        pictures.append(whole[: rng.randrange(1, 12)])
        pictures.append(bytes(byte ^ 0xFF for byte in whole))
    return pictures


def wrong_values(rng: random.Random) -> list[dict[str, Any]]:
    strange = [
        None,
        [],
        {},
        True,
        -1,
        1e400,
        float("nan"),
        "",
        "\0",
        "x" * 3000,
        [[[]]],
        {"$ref": "#"},
        2**80,
        -(2**70),
    ]
    fields = (
        "prompt",
        "threshold",
        "max_tokens",
        "temperature",
        "top_p",
        "seed",
        "stop",
        "mask_format",
        "model",
        "image",
    )
    fine = {("stop", "''"), ("stop", "None"), ("seed", "None"), ("max_tokens", "None"), ("model", "None")}
    fine |= {("stop", repr(value)) for value in ("\0", "x" * 3000, [])} | {("temperature", "True")}
    fine |= {("prompt", "'\\x00'"), ("seed", "-1"), ("seed", "True"), ("max_tokens", "True"), ("top_p", "True")}
    pairs = [(name, value) for name in fields for value in strange if (name, repr(value)) not in fine]
    rng.shuffle(pairs)
    return [GOOD | {name: value} for name, value in pairs]


def urls() -> list[str]:
    hosts = (
        "127.0.0.1",
        "localhost",
        "[::1]",
        "169.254.169.254",
        "10.0.0.1",
        "0x7f000001",
        "2130706433",
        "0",
        "[::ffff:7f00:1]",
    )
    found = [f"http://{host}/latest/meta-data" for host in hosts]
    found += [
        "file:///etc/passwd",
        "FILE://localhost/etc/passwd",
        "ftp://h/x",
        "gopher://h:70/x",
        "//h/x",
        "../../etc/passwd",
    ]
    found += [
        "/etc/passwd",
        "http:",
        "https://",
        "http://user:pw@h/",
        "http://h\r\nX: y/",
        "javascript:alert(1)",
        "data:",
        "data:,",
    ]
    found += [
        "data:image/png;base64,",
        "data:image/png;base64,=",
        "data:text/html;base64,PGI+",
        "data:image/png,%89PNG",
    ]
    found += [
        "data:image/svg+xml;base64,PHN2Zy8+",
        "blob:http://h/1",
        "\0",
        "http://[",
        "http://\ud800/",
        "s3://bucket/key",
    ]
    return found


def bodies(rng: random.Random) -> list[bytes]:
    whole = json.dumps(GOOD).encode()
    cut = [whole[: rng.randrange(len(whole))] for _ in range(15)]
    deep = [b"[" * 100_000, b'{"a":' * 50_000, b'{"image":' + b"[" * 2000]
    odd = [
        b"",
        b"null",
        b"1",
        b'"x"',
        b"[]",
        b"{}",
        b"\xff\xfe{}",
        b"{]",
        b"NaN",
        b"'a'",
        b'{"image":1,"image":2}',
        b"\0",
    ]
    mangled = []
    for _ in range(25):
        raw = bytearray(whole)
        for _flip in range(3):
            raw[rng.randrange(12)] = rng.randrange(256)
        mangled.append(bytes(raw))
    return cut + deep + odd + mangled


def conversations() -> list[Request]:
    image = {"type": "image_url", "image_url": {"url": GOOD["image"]}}
    text = {"type": "text", "text": "hi"}
    wrong: list[Any] = [
        None, [], "hi", [None], [{}], [{"role": "user"}], [{"role": "root", "content": "x"}],
        [{"role": "user", "content": "no picture"}], [{"role": "user", "content": [image]}],
        [{"role": "user", "content": [image, image, text]}], [{"role": "assistant", "content": "x"}],
        [{"role": "assistant", "content": [image]}], [{"role": "system", "content": [image, text]}],
        [{"role": "user", "content": [{"type": "image_url"}]}], [{"role": "user", "content": [{"type": "video"}]}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}], [{"role": "user", "content": 5}],
        [{"role": "user", "content": [image, text]}, {"role": "assistant", "content": "bye"}],
        [{"role": "user", "content": [image, {"type": "text", "text": "x" * 2001}]}],
    ]  # fmt: skip
    return [post({"messages": messages}, "/v1/chat/completions") for messages in wrong]


def paths() -> list[Request]:
    tricks = [
        "/v1/../etc/passwd",
        "/page/..%2f..%2fetc%2fpasswd",
        "/page/%00",
        "/page/.%2e/replica.py",
        "/%2e%2e/%2e%2e/etc",
    ]
    tricks += [
        "/v1/models/..%2f..%2fetc",
        "/v1/models/%00",
        "/v1/models/" + "x" * 2000,
        "/page//etc/passwd",
        "/v1/segment/x",
    ]
    tricks += [
        "/.git/config",
        "/static/..\\..\\x",
        "/page/page.js/..%5c",
        "/docs",
        "/v1/files",
        "/v2/segment",
        "/;/",
        "/page/",
    ]
    wrong_verbs = [("GET", "/v1/segment"), ("DELETE", "/v1/models"), ("PUT", "/"), ("PATCH", "/metrics")]
    return [("GET", path, {}) for path in tricks] + [(verb, path, {}) for verb, path in wrong_verbs]


def forms(rng: random.Random) -> list[Request]:
    found: list[Request] = []
    for content in broken_pictures(rng):
        found.append(("POST", "/v1/segment", {"files": {"image": ("../../x.png", content)}, "data": {"prompt": "p"}}))
    multipart = {"content-type": "multipart/form-data; boundary=b"}
    for raw in (
        b"",
        b"--b",
        b"--b\r\n\r\n",
        b"--b\r\nContent-Disposition: form-data; name=image\r\n\r\nx\r\n--b--",
        b"\0" * 99,
    ):
        found.append(("POST", "/v1/segment", {"content": raw, "headers": multipart}))
    many = {f"field{number}": "x" for number in range(60)}
    found.append(("POST", "/v1/segment", {"files": {"image": picture_bytes()}, "data": {"prompt": "p"} | many}))
    for kind in (
        "text/plain",
        "application/xml",
        "application/x-www-form-urlencoded",
        "",
        "application/json+x",
        "multipart/mixed",
    ):
        found.append(("POST", "/v1/segment", {"content": b"image=x", "headers": {"content-type": kind}}))
    for length in ("-1", "9" * 5000, "1e9", "99999999"):
        found.append(("POST", "/v1/segment", {"content": b"{}", "headers": JSON | {"content-length": length}}))
    return found


def all_requests() -> list[Request]:
    rng = random.Random(8)
    requests = [("POST", "/v1/segment", {"content": body, "headers": JSON}) for body in bodies(rng)]
    requests += [post(GOOD | {"image": data_url(content)}) for content in broken_pictures(rng)]
    requests += [post(GOOD | {"image": url}) for url in urls()] + [chat_with(url) for url in urls()[::2]]
    requests += [chat_with(value) for value in (None, 5, [], {}, True)]
    requests += conversations() + paths() + forms(rng)
    requests += [post(GOOD | {"image": base64.b64encode(bytes(400_000)).decode()})]
    requests += [post(GOOD | {f"extra{number}": number}) for number in range(3)]
    return requests + [post(body) for body in wrong_values(rng)]


def test_three_hundred_malformed_requests_are_refused_each_with_an_openai_error() -> None:
    requests = all_requests()
    assert len(requests) >= NUM_REQUESTS
    backend = ScriptedBackend()
    app = build_api(FixedModels(backend), SETTINGS, ServiceMetrics())

    async def exchange() -> list[tuple[Request, httpx.Response]]:
        transport = httpx.ASGITransport(app, raise_app_exceptions=True)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return [(request, await client.request(*request[:2], **request[2])) for request in requests]

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    answers = asyncio.run(exchange())
    growth_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    wrong = []
    for request, response in answers:
        body = response.json() if "json" in response.headers.get("content-type", "") else {}
        error = body.get("error") if isinstance(body, dict) else None
        is_error_object = isinstance(error, dict) and set(error) == {"message", "type", "param", "code"}
        if response.status_code not in ALLOWED or not is_error_object or error["type"] != "invalid_request_error":
            wrong.append((str(request)[:200], response.status_code, response.text[:100]))
        elif len(response.text) > 2000 or "Traceback" in response.text:
            wrong.append((str(request)[:200], response.status_code, "says too much"))
    assert not wrong
    assert not backend.questions  # nothing of it reached an engine
    assert len(Counter(response.status_code for _, response in answers)) >= 5
    assert growth_kib < 100_000  # no picture was decoded: one bomb alone would take 7.5 GB


@pytest.mark.parametrize(
    "control", ["</s>", "<image>", "[SEG0]", "<im_start>", "<|endoftext|>", "[INST]", "USER: x ASSISTANT:", "\u202e\0"]
)
def test_control_tokens_reach_the_engine_as_the_words_they_are(control: str) -> None:
    backend = ScriptedBackend()
    app = build_api(FixedModels(backend), SETTINGS, ServiceMetrics())

    async def exchange() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            return await client.post("/v1/segment", json=GOOD | {"prompt": control})

    assert asyncio.run(exchange()).status_code == 200
    assert backend.questions[0].prompt == control
