"""A mask as polygons that fill to exactly the same pixels, for formats that know nothing else (the released MUSE JSON).

The polygons run along the pixels' edges. pycocotools fills such a polygon exactly, and fills by parity, so that a
hole can be a loop of the same polygon, reached and left over the same bridge.
"""

from collections import defaultdict
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from pycocotools import mask as coco_mask

from pixellm.platform.masks import BoolMask, Rle, mask_box, rle_decode

_Point = tuple[int, int]


def rle_to_polygons(rle: Rle) -> list[list[float]] | None:
    """Polygons ([x0, y0, x1, y1, …], pixels) whose union is the mask.

    Returns:
        One polygon per outline where the mask has no hole, else one in all. None if pycocotools would not fill them to
        exactly the same mask (then only the run-length code says what it is).
    """
    box = mask_box(rle)
    if box is None:
        return None
    x0, y0, x1, y1 = (int(side) for side in box)
    loops = [[(x + x0, y + y0) for x, y in loop] for loop in _loops(rle_decode(rle)[y0:y1, x0:x1])]
    has_hole = any(_signed_area(loop) < 0 for loop in loops)
    rings = [_bridged(loops)] if has_hole else loops
    polygons = [[float(value) for point in ring for value in point] for ring in rings]
    height, width = rle["size"]
    filled = coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))
    return polygons if bytes(filled["counts"]) == bytes(rle["counts"]) else None


def _loops(mask_HW: BoolMask) -> Iterator[list[_Point]]:
    """The outlines as closed loops of corners (x, y), the mask to the right of the way (y points down)."""
    padded = np.pad(mask_HW, 1).astype(np.int8)
    across = _runs(np.diff(padded, axis=0)[:, 1:-1])
    down = _runs(-np.diff(padded, axis=1)[1:-1].T)
    horizontal = {((x0, y), (x1, y)) for y, x0, x1 in across}
    vertical: dict[_Point, list[_Point]] = defaultdict(list)
    for x, y0, y1 in down:
        vertical[x, y0].append((x, y1))
    starts: dict[_Point, list[_Point]] = defaultdict(list)
    for start, end in sorted(horizontal):
        starts[start].append(end)
    for first in list(starts):
        while starts[first]:
            loop, point = [], first
            while starts[point]:
                corner = starts[point].pop()
                loop += [point, corner]
                point = vertical[corner].pop()
            yield loop


def _runs(steps: npt.NDArray[np.int8]) -> Iterator[tuple[int, int, int]]:
    """Straight stretches of outline: (line, from, to) for each run of equal steps; −1 is walked backwards."""
    padded = np.pad(steps, ((0, 0), (1, 1)))
    lines, places = np.nonzero(np.diff(padded, axis=1))
    for line, place, following in zip(lines[:-1].tolist(), places[:-1].tolist(), places[1:].tolist(), strict=True):
        step = padded[line, place + 1]
        if step:
            yield (line, place, following) if step > 0 else (line, following, place)


def _signed_area(loop: list[_Point]) -> int:
    """Twice the enclosed area; negative for the outline of a hole."""
    return sum(x0 * y1 - x1 * y0 for (x0, y0), (x1, y1) in zip(loop, [*loop[1:], loop[0]], strict=True))


def _bridged(loops: list[list[_Point]]) -> list[_Point]:
    """All loops in one way; each bridge is walked there and back, which fills nothing."""
    home = loops[0][0]
    way = [*loops[0], home]
    for loop in loops[1:]:
        way += [*loop, loop[0], home]
    return way
