"""Masks between polygons, COCO run-length codes and boolean arrays, with the checks that foreign annotations need.

A mask at rest is COCO's compressed RLE (`{"size": [height, width], "counts": bytes}`), readable by pycocotools as it
is. A mask in work is a boolean array H×W at its picture's own size, rows first.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt
from pycocotools import mask as coco_mask

from pixellm.errors import DataError

BoolMask = npt.NDArray[np.bool_]
Box = tuple[float, float, float, float]

#: Annotators' polygons touch the border and leave it by a rounding; beyond this many pixels they are wrong.
BORDER_TOLERANCE_PX = 1.0


class Rle(TypedDict):
    """COCO's compressed run-length code: `size` is [height, width], `counts` the column-major runs, packed."""

    size: list[int]
    counts: bytes


class MaskFaultKind(StrEnum):
    """Why an annotation's segmentation cannot be used; the value is the reason a report counts it under."""

    OUTSIDE = "mask outside its picture"
    DEGENERATE = "degenerate mask"
    MALFORMED = "malformed mask"


@dataclass(frozen=True, slots=True)
class MaskFault:
    """A segmentation that cannot be used: the kind for counting, the detail for the message."""

    kind: MaskFaultKind
    detail: str


def rle_encode(mask_HW: npt.NDArray[Any]) -> Rle:
    """Packs a mask (bool or 0/1, H×W) into COCO's compressed RLE."""
    packed = coco_mask.encode(np.asfortranarray(mask_HW.astype(np.uint8, copy=False)))
    return {"size": [int(side) for side in packed["size"]], "counts": bytes(packed["counts"])}


def rle_decode(rle: Mapping[str, Any]) -> BoolMask:
    """Unpacks a compressed RLE (counts as bytes or text) into a bool mask H×W.

    Raises:
        DataError: the runs do not fill the picture that `size` names.
    """
    height, width = (int(side) for side in rle["size"])
    counts = _as_bytes(rle["counts"])
    runs = _packed_runs(counts)
    if runs is None or int(runs.sum()) != height * width:
        raise DataError(f"a run-length code does not fill its {height}×{width} picture; prepare the data again")
    return np.asarray(coco_mask.decode({"size": [height, width], "counts": counts}), dtype=np.uint8).view(np.bool_)


def mask_area(rle: Rle) -> int:
    """Number of pixels of the mask, without unpacking it."""
    return int(coco_mask.area(rle))


def mask_box(rle: Rle) -> Box | None:
    """Tight box (x0, y0, x1, y1) in pixels, x1 and y1 exclusive; None for an empty mask."""
    if mask_area(rle) == 0:
        return None
    x, y, width, height = (float(value) for value in coco_mask.toBbox(rle))
    return (x, y, x + width, y + height)


def mask_iou(first_HW: npt.NDArray[np.bool_], second_HW: npt.NDArray[np.bool_]) -> float:
    """Intersection over union of two masks of the same size, 0..1; two empty masks agree (1.0)."""
    union = int(np.count_nonzero(first_HW | second_HW))
    return int(np.count_nonzero(first_HW & second_HW)) / union if union else 1.0


def polygons_to_mask(polygons: Sequence[Sequence[float]], height: int, width: int) -> BoolMask:
    """Fills polygons ([x0, y0, x1, y1, …] in pixels, one list each) as pycocotools does; their union as H×W bool.

    Raises:
        DataError: a polygon leaves the picture by more than a pixel, is malformed, or nothing is left to fill.
    """
    return rle_decode(segmentation_to_rle(list(polygons), height, width))


def segmentation_to_rle(segmentation: object, height: int, width: int) -> Rle:
    """Brings a COCO segmentation (polygon lists, compressed or uncompressed RLE) to compressed RLE.

    Args:
        segmentation: the annotation's `segmentation` value as JSON gives it.
        height: of the picture, pixels.
        width: of the picture, pixels.

    Raises:
        DataError: what `try_segmentation_to_rle` reports as a fault.
    """
    result = try_segmentation_to_rle(segmentation, height, width)
    if isinstance(result, MaskFault):
        raise DataError(f"{result.kind.value}: {result.detail}")
    return result


def try_segmentation_to_rle(segmentation: object, height: int, width: int) -> Rle | MaskFault:
    """Like `segmentation_to_rle`, but a fault is returned so that a preparation can count it and go on."""
    if isinstance(segmentation, Mapping):
        result = _from_rle(segmentation, height, width)
    elif isinstance(segmentation, Sequence) and not isinstance(segmentation, str | bytes):
        result = _from_polygons(segmentation, height, width)
    else:
        kind = type(segmentation).__name__
        return MaskFault(MaskFaultKind.MALFORMED, f"got a {kind}, wanted a list of polygons or a run-length code")
    if not isinstance(result, MaskFault) and mask_area(result) == 0:
        return MaskFault(MaskFaultKind.DEGENERATE, "it covers no pixel")
    return result


def box_overshoot_px(box: Sequence[float], height: int, width: int) -> float:
    """By how many pixels a box (x0, y0, x1, y1) leaves the picture; 0 inside."""
    x0, y0, x1, y1 = box
    return max(0.0, -x0, -y0, x1 - width, y1 - height)


def _from_polygons(polygons: Sequence[Any], height: int, width: int) -> Rle | MaskFault:
    clipped: list[list[float]] = []
    for polygon in polygons:
        points = _points(polygon)
        if points is None:
            return MaskFault(MaskFaultKind.MALFORMED, "a polygon is not a flat list of x, y pairs")
        x, y = points[0::2], points[1::2]
        beyond = box_overshoot_px((x.min(), y.min(), x.max(), y.max()), height, width) if len(x) else 0.0
        if beyond > BORDER_TOLERANCE_PX:
            return MaskFault(
                MaskFaultKind.OUTSIDE, f"a polygon leaves the {width}×{height} picture by {beyond:.1f} pixels"
            )
        if len(x) >= 3:
            flat = np.stack([x.clip(0, width), y.clip(0, height)], axis=1).ravel()
            clipped.append([float(value) for value in flat])
    if not clipped:
        return MaskFault(MaskFaultKind.DEGENERATE, "no polygon has three points")
    merged = coco_mask.merge(coco_mask.frPyObjects(clipped, height, width))
    return {"size": [height, width], "counts": bytes(merged["counts"])}


def _points(polygon: object) -> npt.NDArray[np.float64] | None:
    if not isinstance(polygon, Sequence) or isinstance(polygon, str | bytes) or len(polygon) % 2:
        return None
    if not all(isinstance(value, int | float) and math.isfinite(value) for value in polygon):
        return None
    return np.asarray(polygon, dtype=np.float64)


def _from_rle(rle: Mapping[str, Any], height: int, width: int) -> Rle | MaskFault:
    size, counts = rle.get("size"), rle.get("counts")
    if not isinstance(size, Sequence) or list(size) != [height, width]:
        return MaskFault(
            MaskFaultKind.OUTSIDE, f"its run-length code is for size {size}, the picture has [{height}, {width}]"
        )
    runs = _packed_runs(_as_bytes(counts)) if isinstance(counts, str | bytes) else _listed_runs(counts)
    if runs is None:
        return MaskFault(MaskFaultKind.MALFORMED, "its run-length code cannot be read")
    covered = int(sum(runs))
    if covered != height * width:
        return MaskFault(MaskFaultKind.MALFORMED, f"its runs cover {covered} pixels, wanted {height * width}")
    if isinstance(counts, str | bytes):
        return {"size": [height, width], "counts": _as_bytes(counts)}
    packed = coco_mask.frPyObjects({"size": [height, width], "counts": list(runs)}, height, width)
    return {"size": [height, width], "counts": bytes(packed["counts"])}


def _as_bytes(counts: str | bytes) -> bytes:
    return counts.encode() if isinstance(counts, str) else bytes(counts)


def _listed_runs(counts: object) -> list[int] | None:
    if not isinstance(counts, Sequence) or not all(isinstance(run, int) and run >= 0 for run in counts):
        return None
    return list(counts)


def _packed_runs(counts: bytes) -> npt.NDArray[np.int64] | None:
    """Reads COCO's packed runs (5 bits a character, differences to the run before last); None if they are damaged.

    pycocotools trusts its input: runs that end early leave its output uninitialised. So nothing is decoded unread.
    """
    chunks = np.frombuffer(counts, dtype=np.uint8).astype(np.int64) - 48
    is_last = (chunks & 32) == 0
    if not len(chunks) or chunks.min() < 0 or chunks.max() > 63 or not is_last[-1]:
        return None
    ends = np.flatnonzero(is_last)
    starts = np.concatenate([[0], ends[:-1] + 1])
    if (ends - starts).max() > 6:
        return None
    shifts = 5 * (np.arange(len(chunks)) - np.repeat(starts, ends - starts + 1))
    runs = np.add.reduceat((chunks & 31) << shifts, starts)
    runs -= ((chunks[ends] & 16) != 0) * (1 << (5 * (ends - starts + 1)))
    runs[1::2] = np.cumsum(runs[1::2])
    runs[2::2] = np.cumsum(runs[2::2])
    return runs if runs.min() >= 0 else None
