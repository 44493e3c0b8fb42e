"""Pictures as they arrive: data URLs and uploads, checked before anything decodes them.

Only the header is read here (size, format); pixels are decoded by the replica. A picture beyond the pixel limit
therefore costs no memory, however small its file is.
"""

import base64
import binascii
import io
import struct
import warnings
import zlib

from PIL import Image, UnidentifiedImageError

from pixellm.errors import BadRequestError

_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
_BROKEN = (OSError, ValueError, SyntaxError, TypeError, LookupError, EOFError, OverflowError, struct.error, zlib.error)


def is_remote(reference: str) -> bool:
    """Whether a request's image field is an http(s) URL."""
    return reference[:16].lstrip().lower().startswith(("http:", "https:"))


def image_from_reference(reference: str, *, param: str) -> bytes:
    """The encoded picture that a request's image field means.

    Args:
        reference: `data:image/…;base64,…`.
        param: the request's field, for the error object.

    Returns:
        The encoded bytes, not yet checked (`check_image`).

    Raises:
        BadRequestError: 400 for URLs of other schemes, broken base64 or text that is no URL; 415 for a data URL that
            is not of an image.
    """
    scheme, separator, rest = reference.partition(":")
    scheme = scheme.strip().lower()
    if scheme != "data" or not separator:
        raise BadRequestError(
            f"{param} is not a data URL (got {reference[:32]!r}…); wanted data:image/jpeg;base64,…",
            param=param,
            code="invalid_image_url",
        )
    header, comma, payload = rest.partition(",")
    media_type, *parameters = [part.strip().lower() for part in header.split(";")]
    if not media_type.startswith("image/"):
        raise BadRequestError(
            f"{param} is a data URL of {media_type or 'text/plain'!r}, wanted an image/… type",
            status_code=415,
            param=param,
            code="unsupported_media_type",
        )
    if not comma or "base64" not in parameters:
        raise BadRequestError(f"{param}: the data URL is not base64-encoded", param=param, code="invalid_image_url")
    try:
        return base64.b64decode(payload, validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadRequestError(
            f"{param}: the data URL's base64 is broken: {error}", param=param, code="invalid_image_url"
        ) from None


def readable_formats() -> tuple[str, ...]:
    """Formats that are accepted and that this Pillow can read; none that runs code or another program."""
    Image.init()
    return tuple(kind for kind in _FORMATS if kind in Image.OPEN)


def check_image(image_bytes: bytes, *, max_pixels: int, param: str) -> tuple[int, int]:
    """Reads a picture's header and refuses what must not be decoded.

    Args:
        image_bytes: encoded picture.
        max_pixels: width × height allowed.
        param: the request's field, for the error object.

    Returns:
        (width, height) as stored, before EXIF rotation.

    Raises:
        BadRequestError: 400 when empty or broken, 415 when of no supported format, 413 when above `max_pixels`.
    """
    if not image_bytes:
        raise BadRequestError(f"{param} is empty; wanted a picture's bytes", param=param, code="invalid_image")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(image_bytes), formats=readable_formats()) as image:
                width, height = image.size
    except UnidentifiedImageError:
        raise BadRequestError(
            f"{param} is not a picture that can be read; supported are {', '.join(readable_formats())}",
            status_code=415,
            param=param,
            code="unsupported_image_format",
        ) from None
    except Image.DecompressionBombError:
        width, height = 0, 0
    except _BROKEN as error:
        raise BadRequestError(f"{param} is a broken picture: {error}", param=param, code="invalid_image") from None
    if width * height > max_pixels or not width or not height:
        size = f"{width} x {height} pixels" if width else "far too many pixels"
        raise BadRequestError(
            f"{param} has {size}; at most {max_pixels:,} pixels are accepted (serve.max_image_pixels). Send it smaller",
            status_code=413,
            param=param,
            code="image_too_large",
        )
    return width, height
