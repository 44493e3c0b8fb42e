"""One mask, three spellings over HTTP: COCO RLE (as it comes from the engine), 1-bit PNG, polygons. All are exact.

Polygons run along pixel edges, so that filling them gives the mask back, pixel for pixel. Rings follow the even-odd
rule: outer rings run clockwise, holes counter-clockwise (a reader that unions all rings, like COCO's, fills the holes).
"""

import base64
import io
from typing import Any, Literal

import numpy as np
from PIL import Image

from pixellm.platform.masks import BoolMask, rle_decode
from pixellm.serve.protocol import Rle

MaskFormat = Literal["rle", "png", "polygon"]

_Vertex = tuple[int, int]


def render_mask(rle: Rle, mask_format: MaskFormat) -> Any:
    """A mask as it is sent in an answer.

    Args:
        rle: compressed COCO RLE of the mask [H, W].
        mask_format: "rle" | "png" | "polygon".

    Returns:
        `{"size": [H, W], "counts": str}`, or a `data:image/png;base64,…` URL of a 1-bit PNG (white = inside), or a list
        of rings `[x0, y0, x1, y1, …]` in pixel-edge coordinates (0 ≤ x ≤ W, 0 ≤ y ≤ H).
    """
    if mask_format == "rle":
        return rle
    mask_HW = rle_decode(rle)
    return mask_to_png_url(mask_HW) if mask_format == "png" else mask_to_rings(mask_HW)


def mask_to_png_url(mask_HW: BoolMask) -> str:
    """A 1-bit PNG of a mask [H, W] bool as a data URL; white is inside."""
    buffer = io.BytesIO()
    Image.fromarray(mask_HW).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def mask_to_rings(mask_HW: BoolMask) -> list[list[int]]:
    """The outlines of a mask [H, W] bool along pixel edges, with corners only.

    Returns:
        Rings `[x0, y0, x1, y1, …]`; even-odd filling of all of them gives the mask. Pixels that touch only diagonally
        belong to different rings.
    """
    outgoing: dict[_Vertex, list[_Vertex]] = {}
    for start, end in _boundary_segments(mask_HW):
        outgoing.setdefault(start, []).append(end)
    rings: list[list[int]] = []
    visited: set[tuple[_Vertex, _Vertex]] = set()
    for start, ends in outgoing.items():
        for end in ends:
            ring: list[int] = []
            segment = (start, end)
            while segment not in visited:
                visited.add(segment)
                ring.extend(segment[0])
                segment = (segment[1], _next_vertex(segment, outgoing[segment[1]]))
            if ring:
                rings.append(ring)
    return rings


def _boundary_segments(mask_HW: BoolMask) -> list[tuple[_Vertex, _Vertex]]:
    """Maximal straight pieces of the outline, directed so that the inside lies to the right."""
    inside = np.pad(mask_HW, 1)
    core = inside[1:-1, 1:-1]
    segments: list[tuple[_Vertex, _Vertex]] = []
    for y, x0, x1 in _runs(core & ~inside[:-2, 1:-1]):
        segments.append(((x0, y), (x1, y)))
    for y, x0, x1 in _runs(core & ~inside[2:, 1:-1]):
        segments.append(((x1, y + 1), (x0, y + 1)))
    for x, y0, y1 in _runs((core & ~inside[1:-1, 2:]).T):
        segments.append(((x + 1, y0), (x + 1, y1)))
    for x, y0, y1 in _runs((core & ~inside[1:-1, :-2]).T):
        segments.append(((x, y1), (x, y0)))
    return segments


def _runs(grid: BoolMask) -> list[tuple[int, int, int]]:
    """Runs of True in each row: (row, first column, column after the last)."""
    steps = np.diff(np.pad(grid, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    rows, starts = np.nonzero(steps == 1)
    ends = np.nonzero(steps == -1)[1]
    return list(zip(rows.tolist(), starts.tolist(), ends.tolist(), strict=True))


def _next_vertex(segment: tuple[_Vertex, _Vertex], candidates: list[_Vertex]) -> _Vertex:
    """Where the outline goes on; where two pixels touch diagonally, the right turn stays on the same pixel."""
    if len(candidates) == 1:
        return candidates[0]
    (x0, y0), (x1, y1) = segment
    turn_x, turn_y = -(y1 - y0), x1 - x0
    towards = [(end[0] - x1) * turn_x + (end[1] - y1) * turn_y for end in candidates]
    return candidates[int(np.argmax(towards))]
