"""The EXIF orientation of a JPEG: a picture whose annotations are of the stored pixels is made to show those.

Annotators' tools of the time ignored the tag. Only its value in the file changes; no pixel is encoded again.
"""

import struct

from PIL import ExifTags, Image

_UPRIGHT = 1
_FIRST_QUARTER_TURN = 5


def turns_quarter(picture: Image.Image) -> bool:
    """Whether a picture is displayed with its sides exchanged."""
    return int(picture.getexif().get(ExifTags.Base.Orientation, _UPRIGHT)) >= _FIRST_QUARTER_TURN


def without_turn(encoded: bytes) -> bytes | None:
    """A JPEG that is turned by a quarter with its orientation set to upright; None for any other picture."""
    place = _find_orientation(encoded)
    if place is None:
        return None
    offset, order = place
    if struct.unpack_from(f"{order}H", encoded, offset)[0] < _FIRST_QUARTER_TURN:
        return None
    return encoded[:offset] + struct.pack(f"{order}H", _UPRIGHT) + encoded[offset + 2 :]


def _find_orientation(encoded: bytes) -> tuple[int, str] | None:
    """Offset of the tag's 16-bit value in the file, and its byte order."""
    try:
        tiff = _find_tiff(encoded)
        if tiff is None:
            return None
        order = {b"II": "<", b"MM": ">"}[encoded[tiff : tiff + 2]]
        (directory,) = struct.unpack_from(f"{order}I", encoded, tiff + 4)
        (count,) = struct.unpack_from(f"{order}H", encoded, tiff + directory)
        for number in range(count):
            entry = tiff + directory + 2 + 12 * number
            tag, kind, values = struct.unpack_from(f"{order}HHI", encoded, entry)
            if (tag, kind, values) == (ExifTags.Base.Orientation, 3, 1):
                return entry + 8, order
    except (struct.error, KeyError):
        return None
    return None


def _find_tiff(encoded: bytes) -> int | None:
    """Offset of the EXIF segment's TIFF header."""
    if encoded[:2] != b"\xff\xd8":
        return None
    at = 2
    while at + 4 <= len(encoded) and encoded[at] == 0xFF and encoded[at + 1] not in (0xDA, 0xD9):
        (length,) = struct.unpack_from(">H", encoded, at + 2)
        if encoded[at + 1] == 0xE1 and encoded[at + 4 : at + 10] == b"Exif\0\0":
            return at + 10
        at += 2 + length
    return None
