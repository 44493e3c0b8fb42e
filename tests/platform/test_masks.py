"""Masks: agreement with pycocotools, and what foreign annotations may not do."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from pixellm.errors import DataError
from pixellm.platform import masks

SMALL_MASKS = st.tuples(st.integers(1, 23), st.integers(1, 17), st.floats(0, 1), st.integers(0, 2**32 - 1)).map(
    lambda args: np.random.default_rng(args[3]).random(args[:2]) < args[2]
)


@given(SMALL_MASKS)
@settings(max_examples=150, deadline=None)
def test_rle_round_trip_keeps_every_pixel_and_pycocotools_reads_it(mask: np.ndarray) -> None:
    rle = masks.rle_encode(mask)

    assert np.array_equal(masks.rle_decode(rle), mask)
    assert np.array_equal(coco_mask.decode(rle).astype(bool), mask)
    assert masks.mask_area(rle) == mask.sum()


@given(SMALL_MASKS)
@settings(max_examples=80, deadline=None)
def test_listed_runs_and_packed_runs_of_one_mask_give_the_same_code(mask: np.ndarray) -> None:
    column_major = mask.T.ravel()
    edges = np.flatnonzero(np.diff(column_major.astype(int))) + 1
    runs = np.diff([0, *edges, column_major.size]).tolist()
    runs = [0, *runs] if column_major[0] else runs
    if not mask.any():
        with pytest.raises(DataError, match="covers no pixel"):
            masks.segmentation_to_rle({"size": list(mask.shape), "counts": runs}, *mask.shape)
        return

    listed = masks.segmentation_to_rle({"size": list(mask.shape), "counts": runs}, *mask.shape)
    as_text = {"size": list(mask.shape), "counts": masks.rle_encode(mask)["counts"].decode()}

    assert listed == masks.rle_encode(mask) == masks.segmentation_to_rle(as_text, *mask.shape)


def test_genuine_polygons_fill_as_pycocotools_fills_them(demo_data: Path) -> None:
    content = json.loads((demo_data / "instances.json").read_text())
    sizes = {image["id"]: (image["height"], image["width"]) for image in content["images"]}

    for annotation in content["annotations"]:
        height, width = sizes[annotation["image_id"]]
        expected = coco_mask.decode(coco_mask.frPyObjects(annotation["segmentation"], height, width)).max(axis=2)
        filled = masks.polygons_to_mask(annotation["segmentation"], height, width)
        assert np.array_equal(filled, expected.astype(bool)), annotation["id"]


def test_the_box_is_tight_with_exclusive_ends() -> None:
    mask = np.zeros((7, 11), dtype=bool)
    mask[2:5, 3:9] = True

    assert masks.mask_box(masks.rle_encode(mask)) == (3, 2, 9, 5)
    assert masks.mask_box(masks.rle_encode(np.zeros((7, 11), dtype=bool))) is None


@given(SMALL_MASKS, st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_iou_is_pycocotools_iou(mask: np.ndarray, seed: int) -> None:
    other = np.random.default_rng(seed).random(mask.shape) < 0.5
    rles = [masks.rle_encode(mask), masks.rle_encode(other)]
    expected = coco_mask.iou([rles[0]], [rles[1]], [0])[0, 0] if (mask | other).any() else 1.0

    assert masks.mask_iou(mask, other) == pytest.approx(expected)


def test_a_polygon_beyond_the_border_is_refused_and_one_touching_it_is_clipped() -> None:
    touching = [[-0.6, 0, 10.7, 0, 10.7, 8, -0.6, 8]]
    outside = [[2, 2, 13, 2, 13, 6, 2, 6]]

    assert masks.polygons_to_mask(touching, 8, 10).all()
    with pytest.raises(DataError, match=r"outside its picture.*10×8.*3\.0 pixels"):
        masks.segmentation_to_rle(outside, 8, 10)


@pytest.mark.parametrize(
    ("segmentation", "reason"),
    [
        ([[1, 1, 5, 5]], "degenerate"),
        ([], "degenerate"),
        ([[1, 1, 5, 5, 2]], "malformed"),
        ([[1, 1, "a", 5, 2, 3]], "malformed"),
        ([[1, 1, float("nan"), 5, 2, 3]], "malformed"),
        ([7], "malformed"),
        ("text", "malformed"),
        (None, "malformed"),
        ({"size": [8, 10], "counts": [80]}, "degenerate"),
        ({"size": [8, 10], "counts": [10, 10]}, "malformed"),
        ({"size": [8, 10], "counts": [90, -10]}, "malformed"),
        ({"size": [8, 10], "counts": "0"}, "malformed"),
        ({"size": [8, 10], "counts": b"\xff\xff"}, "malformed"),
        ({"size": [8, 10], "counts": b"oooooooooooo0"}, "malformed"),
        ({"size": [8, 10]}, "malformed"),
        ({"size": [10, 8], "counts": [40, 40]}, "outside"),
        ({"counts": [40, 40]}, "outside"),
    ],
)
def test_an_unusable_segmentation_is_named_by_its_kind(segmentation: object, reason: str) -> None:
    fault = masks.try_segmentation_to_rle(segmentation, 8, 10)

    assert isinstance(fault, masks.MaskFault)
    assert reason in fault.kind.value


@given(st.binary(max_size=40))
@settings(max_examples=300, deadline=None)
def test_any_bytes_as_runs_decode_fully_or_are_refused(counts: bytes) -> None:
    try:
        mask = masks.rle_decode({"size": [6, 5], "counts": counts})
    except DataError:
        return
    assert masks.mask_area({"size": [6, 5], "counts": counts}) == mask.sum()
    assert set(np.unique(mask.view(np.uint8))) <= {0, 1}
