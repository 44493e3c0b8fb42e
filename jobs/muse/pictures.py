"""A picture as it is sent: within the asked size, upright, as a data URL."""

import io
from dataclasses import dataclass

from PIL import ExifTags, Image, ImageOps

from pixellm.platform.llm_service import DataUrl
from pixellm.platform.masks import Box

_SENT_AS_IT_IS = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp"}


@dataclass(frozen=True, slots=True)
class SentPicture:
    """A picture for a request: its data URL and its (height, width) in pixels."""

    url: DataUrl
    size: tuple[int, int]


def prepare_picture(encoded: bytes, longest_side: int) -> SentPicture:
    """Makes a picture ready to be sent; one that is small and upright keeps its bytes.

    Args:
        encoded: a picture file that is known to decode.
        longest_side: pixels; a larger picture is made smaller, as a JPEG of quality 90.
    """
    with Image.open(io.BytesIO(encoded)) as picture:
        media_type = _SENT_AS_IT_IS.get(picture.format or "")
        is_upright = picture.getexif().get(ExifTags.Base.Orientation, 1) == 1
        if media_type and is_upright and max(picture.size) <= longest_side:
            return SentPicture(DataUrl.of(media_type, encoded), (picture.height, picture.width))
        picture.draft("RGB", (longest_side, longest_side))
        upright = ImageOps.exif_transpose(picture).convert("RGB")
    upright.thumbnail((longest_side, longest_side), Image.Resampling.BICUBIC)
    sink = io.BytesIO()
    upright.save(sink, "JPEG", quality=90)
    return SentPicture(DataUrl.of("image/jpeg", sink.getvalue()), (upright.height, upright.width))


def scale_box(box: Box, from_size: tuple[int, int], to_size: tuple[int, int]) -> Box:
    """A box (x0, y0, x1, y1) of a picture of one (height, width) in pixels of another size of the same picture."""
    down, across = to_size[0] / from_size[0], to_size[1] / from_size[1]
    x0, y0, x1, y1 = box
    return (x0 * across, y0 * down, x1 * across, y1 * down)
