"""Pictures as they arrive: what is accepted, and with which status the rest is refused."""

import struct
import zlib

import pytest
from pictures import data_url, picture_bytes

from pixellm.errors import BadRequestError
from pixellm.serve.images import check_image, image_from_reference


def png_that_claims(width: int, height: int) -> bytes:
    """A few dozen bytes that announce width × height pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    return (
        b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk)) + b"\0\0\0\x64IDAT"
    )


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_common_formats_pass_with_their_size(kind: str) -> None:
    image_bytes = image_from_reference(data_url(picture_bytes(9, 5, kind), f"image/{kind.lower()}"), param="image")
    assert check_image(image_bytes, max_pixels=45, param="image") == (9, 5)


@pytest.mark.parametrize(
    ("reference", "status", "code"),
    [
        ("file:///etc/passwd", 400, "invalid_image_url"),
        ("../../etc/passwd", 400, "invalid_image_url"),
        ("", 400, "invalid_image_url"),
        ("data:text/html;base64,AAAA", 415, "unsupported_media_type"),
        ("data:image/png,plain", 400, "invalid_image_url"),
        ("data:image/png;base64", 400, "invalid_image_url"),
        ("data:image/png;base64,@@@@", 400, "invalid_image_url"),
        ("data:image/png;base64,AAA", 400, "invalid_image_url"),
    ],
)
def test_references_that_are_no_picture_are_refused(reference: str, status: int, code: str) -> None:
    with pytest.raises(BadRequestError) as refused:
        image_from_reference(reference, param="image")
    assert (refused.value.status_code, refused.value.code, refused.value.param) == (status, code, "image")


@pytest.mark.parametrize(
    ("image_bytes", "status", "code"),
    [
        (b"", 400, "invalid_image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", 415, "unsupported_image_format"),
        (b"\x00" * 100, 415, "unsupported_image_format"),
        (picture_bytes(101, 100), 413, "image_too_large"),
        (png_that_claims(60_000, 60_000), 413, "image_too_large"),
    ],
)
def test_bytes_that_must_not_be_decoded_are_refused_by_their_header(image_bytes: bytes, status: int, code: str) -> None:
    with pytest.raises(BadRequestError) as refused:
        check_image(image_bytes, max_pixels=10_000, param="image")
    assert (refused.value.status_code, refused.value.code) == (status, code)
