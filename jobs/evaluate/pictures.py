"""Pictures of evaluated samples: the truth, the prediction, and where they differ."""

import base64
import io
from collections.abc import Mapping
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from pixellm.platform.masks import rle_decode
from pixellm.platform.overlay import overlay_colors, paint_masks

#: Colours of the difference, apart for all usual kinds of colour vision: found, missed, invented.
FOUND, MISSED, INVENTED = (33, 130, 222), (244, 162, 30), (200, 40, 140)
_TINT = 0.6


def sample_panels(sample: Mapping[str, Any], image: bytes, *, max_side: int = 360) -> tuple[str, str, str]:
    """Truth, prediction and difference as JPEG data URLs.

    A predicted mask has the colour of the target that it was matched to.

    Args:
        sample: a record of `SAMPLE_SCHEMA`.
        image: the encoded picture.
        max_side: no side is longer, pixels.
    """
    photo = ImageOps.exif_transpose(Image.open(io.BytesIO(image))).convert("RGB")
    photo.thumbnail((max_side, max_side))
    picture = np.asarray(photo)
    truths = [_resized(mask, picture.shape[:2]) for mask in sample["true_masks"]]
    masks = [_resized(mask, picture.shape[:2]) for mask in sample["masks"]]
    colors = overlay_colors(len(truths) + len(masks))
    match = {p: t for t, p in zip(sample["pair_truth"], sample["pair_prediction"], strict=True) if t >= 0 and p >= 0}
    own = [colors[match[k]] if k in match else colors[len(truths) + k] for k in range(len(masks))]
    return (
        _data_url(paint_masks(picture, truths, colors[: len(truths)])),
        _data_url(paint_masks(picture, masks, own)),
        _data_url(_difference(picture, truths, masks)),
    )


def _difference(
    picture: npt.NDArray[np.uint8], truths: list[npt.NDArray[np.bool_]], masks: list[npt.NDArray[np.bool_]]
) -> npt.NDArray[np.uint8]:
    grey = np.repeat(picture.mean(axis=2, keepdims=True), 3, axis=2) * 0.55 + 255 * 0.4
    empty = np.zeros(picture.shape[:2], dtype=bool)
    truth = np.logical_or.reduce([empty, *truths])
    mask = np.logical_or.reduce([empty, *masks])
    for where, color in ((truth & mask, FOUND), (truth & ~mask, MISSED), (mask & ~truth, INVENTED)):
        grey[where] = (1 - _TINT) * grey[where] + _TINT * np.asarray(color)
    return grey.round().clip(0, 255).astype(np.uint8)


def _resized(mask: Mapping[str, Any], size: tuple[int, ...]) -> npt.NDArray[np.bool_]:
    full = rle_decode(mask).astype(np.uint8)
    return np.asarray(cv2.resize(full, (size[1], size[0]), interpolation=cv2.INTER_NEAREST)).astype(bool)


def _data_url(picture: npt.NDArray[np.uint8]) -> str:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
