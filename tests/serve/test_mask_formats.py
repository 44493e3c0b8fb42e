"""The three spellings of a mask, each read back by a decoder that is not ours."""

import base64
import io

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from pycocotools import mask as coco

from pixellm.serve.mask_formats import mask_to_rings, render_mask
from pixellm.serve.protocol import Rle

masks = arrays(np.bool_, st.tuples(st.integers(1, 17), st.integers(1, 13)))


def rle_of(mask_HW: np.ndarray) -> Rle:
    packed = coco.encode(np.asfortranarray(mask_HW.astype(np.uint8)))
    return {"size": [int(side) for side in packed["size"]], "counts": packed["counts"].decode()}


@settings(max_examples=60, deadline=None)
@given(masks)
def test_polygons_filled_by_the_even_odd_rule_give_the_mask_back(mask_HW: np.ndarray) -> None:
    height, width = mask_HW.shape
    filled = np.zeros(mask_HW.shape, dtype=bool)
    for ring in render_mask(rle_of(mask_HW), "polygon"):
        drawn = coco.decode(coco.frPyObjects([[float(value) for value in ring]], height, width))
        filled ^= drawn[:, :, 0].astype(bool)
    np.testing.assert_array_equal(filled, mask_HW)


@settings(max_examples=30, deadline=None)
@given(masks)
def test_a_png_mask_is_one_bit_deep_and_white_inside(mask_HW: np.ndarray) -> None:
    url = render_mask(rle_of(mask_HW), "png")
    header, payload = url.split(",")
    assert header == "data:image/png;base64"
    raw = base64.b64decode(payload)
    assert raw[24] == 1  # bit depth in the PNG's header
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(raw)).convert("L")) == 255, mask_HW)


def test_rle_passes_as_pycocotools_reads_it() -> None:
    mask_HW = np.zeros((5, 7), dtype=bool)
    mask_HW[1:4, 2:6] = True
    rle = render_mask(rle_of(mask_HW), "rle")
    np.testing.assert_array_equal(coco.decode({"size": rle["size"], "counts": rle["counts"].encode()}), mask_HW)


def test_a_rectangle_is_four_corners_and_a_hole_is_a_ring_the_other_way_round() -> None:
    mask_HW = np.zeros((6, 8), dtype=bool)
    mask_HW[1:5, 2:7] = True
    assert mask_to_rings(mask_HW) == [[2, 1, 7, 1, 7, 5, 2, 5]]
    mask_HW[2, 3] = False
    outer, hole = mask_to_rings(mask_HW)
    assert signed_area(outer) == 20
    assert signed_area(hole) == -1


def signed_area(ring: list[int]) -> float:
    x, y = np.array(ring[0::2]), np.array(ring[1::2])
    return float(np.sum(x * np.roll(y, -1) - np.roll(x, -1) * y) / 2)
