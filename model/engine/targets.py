"""From mask logits at decoder resolution to what a caller gets: mask, score, box, area and run lengths."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from pycocotools import mask as coco_mask

from pixellm.model.engine.types import GenerationOptions, TargetMask
from pixellm.model.images import PreparedImage, logits_at_original_size

_MAX_ELEMENTS_AT_ONCE = 16_000_000
"""Pixels × targets that are resized together; bounds memory for many targets on a large picture."""


def finish_targets(
    mask_logits_MHW: torch.Tensor,
    picture: PreparedImage,
    *,
    options: GenerationOptions,
    first_index: int,
    phrases: Sequence[str],
) -> list[TargetMask]:
    """Brings M targets of one picture to its own size and describes them.

    Args:
        mask_logits_MHW: fp32 [M, h, w] on the padded canvas.
        picture: where they belong.
        options: the threshold, and whether logits are handed out.
        first_index: index of the first target.
        phrases: M of them.

    Returns:
        M targets in order. Memory beyond the result does not grow with M.
    """
    height, width = picture.original_hw
    chunk = max(1, _MAX_ELEMENTS_AT_ONCE // (height * width))
    targets: list[TargetMask] = []
    for start in range(0, len(mask_logits_MHW), chunk):
        logits = logits_at_original_size(
            mask_logits_MHW[start : start + chunk], len(picture.pixels), picture.valid_hw, picture.original_hw
        )
        masks = logits > math.log(options.threshold / (1.0 - options.threshold))
        areas = masks.flatten(1).sum(1)
        scores = (logits.sigmoid() * masks).flatten(1).sum(1) / areas.clamp_min(1)
        for i, (mask, area, score) in enumerate(zip(masks.cpu().numpy(), areas.tolist(), scores.tolist(), strict=True)):
            place = start + i
            targets.append(
                TargetMask(
                    index=first_index + place,
                    phrase=phrases[place],
                    mask=mask,
                    score=float(score),
                    box_xyxy=mask_box(mask),
                    area_px=int(area),
                    rle=encode_rle(mask),
                    mask_logits=logits[i].cpu().numpy() if options.keep_logits else None,
                )
            )
    return targets


def mask_box(mask_HW: np.ndarray) -> tuple[float, float, float, float] | None:
    """Smallest box around a mask as (x0, y0, x1, y1) in pixels, right and bottom exclusive; None where it is empty."""
    rows = np.flatnonzero(mask_HW.any(axis=1))
    if not len(rows):
        return None
    columns = np.flatnonzero(mask_HW.any(axis=0))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


def encode_rle(mask_HW: np.ndarray) -> dict[str, object]:
    """COCO's compressed run lengths of a mask, with `counts` as text."""
    encoded = coco_mask.encode(np.asfortranarray(mask_HW, dtype=np.uint8))
    return {"size": [int(side) for side in encoded["size"]], "counts": encoded["counts"].decode("ascii")}
