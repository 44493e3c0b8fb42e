"""From any picture file to RGB pixels on the model's square canvas, and back from canvas to the picture's own size.

The arithmetic is the released one (reference.md, "Image path"): longest side S with `int(x·scale + 0.5)`, PIL's
bilinear filter with antialiasing, zero padding right and bottom. What is ours is that a picture arrives as a person
sees it (EXIF rotation, transparency over white, 16 bits scaled to 8) and that a hostile file costs no memory.
"""

import io
import math
import struct
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from pixellm.errors import DataError

DEFAULT_MAX_IMAGE_PIXELS = 64_000_000
_ROUNDING = 1e-5
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
# What Pillow's plugins raise on damaged files, besides OSError and its own UnidentifiedImageError (an OSError).
_DECODE_ERRORS: tuple[type[Exception], ...] = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    LookupError,
    TypeError,
    OverflowError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


@dataclass(frozen=True)
class PreparedImage:
    """A picture on the model's canvas, not yet normalised, so that few bytes travel.

    Attributes:
        pixels: uint8 [S, S, 3] RGB, the picture at top left, zeros right and below.
        valid_hw: rows and columns of the canvas that hold the picture.
        original_hw: the picture's own rows and columns, as a person sees it.
    """

    pixels: np.ndarray
    valid_hw: tuple[int, int]
    original_hw: tuple[int, int]


def open_rgb(image: Image.Image | bytes, *, max_pixels: int = DEFAULT_MAX_IMAGE_PIXELS) -> Image.Image:
    """Opens a picture as a person sees it: upright, RGB with 8 bits, first frame, transparency over white.

    Args:
        image: encoded bytes, or a PIL picture (left unchanged).
        max_pixels: larger pictures are refused by their header, before any pixel is decoded.

    Returns:
        The given PIL picture itself where it is upright RGB already, else a new one.

    Raises:
        DataError: not a picture, truncated, or too large.
    """
    if not isinstance(image, Image.Image | bytes | bytearray | memoryview):
        raise DataError(f"got a {type(image).__name__} as a picture; pass encoded bytes or a PIL.Image")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            picture = (
                image if isinstance(image, Image.Image) else Image.open(io.BytesIO(image), formats=readable_formats())
            )
            _check_size(picture, max_pixels)
            picture.load()
            is_turned = picture.getexif().get(ExifTags.Base.Orientation, 1) != 1
            upright = ImageOps.exif_transpose(picture) if is_turned else picture  # it copies an upright one
        return _to_rgb(upright)
    except UnidentifiedImageError:
        raise DataError(
            f"these {len(image) if isinstance(image, bytes) else '?'} bytes are not a picture that can be read; "
            f"send one of {', '.join(readable_formats())}"
        ) from None
    except _DECODE_ERRORS as error:
        raise DataError(
            f"the picture cannot be decoded ({type(error).__name__}: {error}); the file is damaged or cut short: "
            "save it again as JPEG or PNG"
        ) from error


def readable_formats() -> tuple[str, ...]:
    """Formats that are accepted and that this Pillow was built with; none that runs code or another program."""
    Image.init()
    return tuple(kind for kind in _FORMATS if kind in Image.OPEN)


def prepare_image(
    image: Image.Image | bytes, image_size: int, *, max_pixels: int = DEFAULT_MAX_IMAGE_PIXELS
) -> PreparedImage:
    """Opens a picture and lays it on the square canvas of `image_size` pixels (see `open_rgb` for errors)."""
    return _on_canvas(open_rgb(image, max_pixels=max_pixels), image_size, _resize_as_released)


def prepare_training_image(
    image: Image.Image | bytes, image_size: int, *, max_pixels: int = DEFAULT_MAX_IMAGE_PIXELS
) -> PreparedImage:
    """Like `prepare_image` with torch's vectorised form of the same filter: a third of the time, and in about one of a
    thousand values one of 255 levels away. For training, which reads pictures by the million.
    """
    return _on_canvas(open_rgb(image, max_pixels=max_pixels), image_size, _resize_vectorised)


def _on_canvas(
    picture: Image.Image, image_size: int, resize: Callable[[Image.Image, int, int], np.ndarray]
) -> PreparedImage:
    height, width = picture.height, picture.width
    rows, columns = resized_hw(height, width, image_size)
    is_same = (rows, columns) == (height, width)
    pixels = np.zeros((image_size, image_size, 3), dtype=np.uint8)
    pixels[:rows, :columns] = np.asarray(picture) if is_same else resize(picture, rows, columns)
    return PreparedImage(pixels, (rows, columns), (height, width))


def _resize_as_released(picture: Image.Image, rows: int, columns: int) -> np.ndarray:
    return np.asarray(picture.resize((columns, rows), Image.Resampling.BILINEAR))


def _resize_vectorised(picture: Image.Image, rows: int, columns: int) -> np.ndarray:
    pixels_1CHW = torch.from_numpy(np.array(picture)[None]).permute(0, 3, 1, 2)  # in torch's terms: channels last
    resized = F.interpolate(pixels_1CHW, (rows, columns), mode="bilinear", antialias=True)
    return resized[0].permute(1, 2, 0).numpy()


def resized_hw(height: int, width: int, image_size: int) -> tuple[int, int]:
    """Rows and columns after the longest side has become `image_size`; never below one pixel."""
    scale = image_size / max(height, width)
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def mask_on_canvas(mask: np.ndarray, mask_size: int) -> np.ndarray:
    """Resizes a mask of the picture's own size once, straight to the padded mask canvas.

    Args:
        mask: bool or uint8 [H, W], non-zero inside.
        mask_size: m, side of the canvas, which covers the same square as the pixel canvas.

    Returns:
        uint8 [m, m] of 0 and 1: cells that the mask covers by at least half, or the best covered one where no cell
        is, so that a small target never vanishes.
    """
    covered = _coverage(mask, mask_size) if mask_size <= max(mask.shape) else _magnified(mask, mask_size)
    canvas = (covered >= 0.5 - _ROUNDING).astype(np.uint8)
    if not canvas.any() and covered.any():
        canvas[np.unravel_index(int(covered.argmax()), covered.shape)] = 1
    return canvas


def _coverage(mask: np.ndarray, mask_size: int) -> np.ndarray:
    """How much of each cell the mask covers, [m, m] in 0..1, from sums over the part of the picture that holds it."""
    if not mask.flags.c_contiguous and mask.flags.f_contiguous:
        return _coverage(mask.T, mask_size).T
    inside = (mask if mask.dtype == np.bool_ else mask != 0).view(np.uint8)
    left, top, width, height = cv2.boundingRect(inside)
    covered = np.zeros((mask_size, mask_size))
    if not width:
        return covered
    cell = max(mask.shape) / mask_size
    rows = slice(int(top / cell), min(mask_size, math.ceil((top + height) / cell)))
    columns = slice(int(left / cell), min(mask_size, math.ceil((left + width) / cell)))
    sums = cv2.integral(inside[top : top + height, left : left + width])
    sums = _at_edges(sums, np.arange(rows.start, rows.stop + 1) * cell - top)
    sums = _at_edges(sums.T, np.arange(columns.start, columns.stop + 1) * cell - left).T
    covered[rows, columns] = np.diff(np.diff(sums, axis=0), axis=1) / cell**2
    return covered


def _at_edges(sums: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Rows of a table of running sums at edges between its rows; sums grow linearly from one row to the next."""
    edges = edges.clip(0, len(sums) - 1)
    lower = np.minimum(edges.astype(np.intp), len(sums) - 2)
    rest = (edges - lower)[:, None]
    return sums[lower] * (1 - rest) + sums[lower + 1] * rest


def _magnified(mask: np.ndarray, mask_size: int) -> np.ndarray:
    side = max(mask.shape)
    square = np.zeros((side, side), dtype=np.float32)
    square[: mask.shape[0], : mask.shape[1]] = mask != 0
    return cv2.resize(square, (mask_size, mask_size), interpolation=cv2.INTER_LINEAR)


def logits_at_original_size(
    mask_logits_MHW: torch.Tensor, image_size: int, valid_hw: tuple[int, int], original_hw: tuple[int, int]
) -> torch.Tensor:
    """Brings mask logits from decoder resolution to the picture's own size, in fp32.

    Args:
        mask_logits_MHW: [M, h, w] over the padded canvas.
        image_size: S, side of the canvas in pixels.
        valid_hw: rows and columns of the canvas that hold the picture.
        original_hw: the picture's own rows and columns.

    Returns:
        [M, H, W]: bilinear to the canvas, cropped to the picture, bilinear to its own size.
    """
    if mask_logits_MHW.shape[0] == 0:
        return mask_logits_MHW.new_zeros((0, *original_hw), dtype=torch.float32)
    canvas = F.interpolate(mask_logits_MHW[None].float(), (image_size, image_size), mode="bilinear")
    cropped = canvas[..., : valid_hw[0], : valid_hw[1]]
    return F.interpolate(cropped, original_hw, mode="bilinear")[0]


def _check_size(picture: Image.Image, max_pixels: int) -> None:
    width, height = picture.size
    if width * height > max_pixels:
        raise DataError(
            f"the picture has {width}×{height} = {width * height / 1e6:.1f} million pixels, the limit is "
            f"{max_pixels / 1e6:.1f} million (max_image_pixels); scale it down"
        )
    if width < 1 or height < 1:
        raise DataError(f"the picture is {width}×{height} pixels; it needs at least one")


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode == "RGB":
        return picture
    if picture.mode.startswith(("I", "F")):
        return Image.fromarray(_to_8_bits(np.asarray(picture))).convert("RGB")
    if picture.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in picture.info:
        layered = picture.convert("RGBA")
        white = Image.new("RGBA", layered.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layered).convert("RGB")
    return picture.convert("RGB")


def _to_8_bits(values_HW: np.ndarray) -> np.ndarray:
    """Scales one channel of integers (16 bits) or floats to 0..255; values that fit 8 bits stay as they are."""
    values = np.nan_to_num(values_HW.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    if np.issubdtype(values_HW.dtype, np.floating):
        top = 1.0 if values.max() <= 1.0 else max(255.0, float(values.max()))
    else:
        top = 65535.0 if values_HW.dtype.itemsize == 2 or values.max() > 255 else 255.0
        top = max(top, float(values.max()))
    return np.clip(np.rint(values / top * 255.0), 0, 255).astype(np.uint8)
