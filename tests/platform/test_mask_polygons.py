"""Polygons of a mask fill to exactly that mask, as pycocotools fills them."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pycocotools import mask as coco_mask

from pixellm.platform.mask_polygons import rle_to_polygons
from pixellm.platform.masks import rle_decode, rle_encode, segmentation_to_rle


def filled(polygons: list[list[float]], height: int, width: int) -> np.ndarray:
    return np.asarray(coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))), dtype=bool)


@settings(max_examples=120, deadline=None)
@given(st.tuples(st.integers(1, 9), st.integers(1, 11)).flatmap(lambda shape: arrays(bool, shape)))
def test_any_mask_with_holes_islands_and_corners_comes_back_exactly(mask_HW: np.ndarray) -> None:
    polygons = rle_to_polygons(rle_encode(mask_HW))
    if not mask_HW.any():
        assert polygons is None
        return
    assert polygons is not None
    assert np.array_equal(filled(polygons, *mask_HW.shape), mask_HW)


def test_a_ring_is_one_polygon_and_two_islands_are_two() -> None:
    ring = np.ones((5, 7), bool)
    ring[2, 2:4] = False
    islands = np.zeros((5, 7), bool)
    islands[0, 0] = islands[3:, 4:] = True
    assert len(rle_to_polygons(rle_encode(ring)) or []) == 1
    assert rle_to_polygons(rle_encode(islands)) == [
        [0.0, 0.0, 1.0, 0.0, 1.0, 1.0, 0.0, 1.0],
        [4.0, 3.0, 7.0, 3.0, 7.0, 5.0, 4.0, 5.0],
    ]


@pytest.mark.parametrize("number", [0, 57, 101])
def test_genuine_masks_come_back_exactly(demo_data: Path, number: int) -> None:
    content = json.loads((demo_data / "instances.json").read_text())
    sizes = {image["id"]: (image["height"], image["width"]) for image in content["images"]}
    annotation = [one for one in content["annotations"] if not one["iscrowd"]][number]
    height, width = sizes[annotation["image_id"]]
    rle = segmentation_to_rle(annotation["segmentation"], height, width)
    polygons = rle_to_polygons(rle)
    assert polygons is not None
    assert np.array_equal(filled(polygons, height, width), rle_decode(rle))
