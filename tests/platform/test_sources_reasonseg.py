"""The reasonseg source: polygons painted over one another, measured by pycocotools; phrases and whole questions."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from pixellm.errors import DataError
from pixellm.platform.data.schema import Row
from pixellm.platform.data.sources import get_source, with_options
from pixellm.platform.data.sources.base import Ledger
from pixellm.platform.masks import rle_decode
from tests.platform.source_fixtures.reasonseg import IGNORED, add, build, points, shape


def read(folder: Path, *, strict: bool = False, split: str = "train") -> tuple[list[Row], Ledger]:
    ledger = Ledger(strict=strict, skip_bad_masks=True)
    return list(with_options(get_source("reasonseg"), {"split": split}).rows(str(folder), ledger)), ledger


def filled(corners: list[list[float]], height: int, width: int) -> np.ndarray:
    code = coco_mask.frPyObjects([[value for point in corners for value in point]], height, width)
    return coco_mask.decode(code)[..., 0].astype(bool)


def test_an_ignored_part_is_cut_out_of_the_target_and_kept_as_an_ignore_region(tmp_path: Path) -> None:
    build(tmp_path)
    rows, ledger = read(tmp_path, strict=True)

    assert not ledger.counts
    bear, umbrella = rows
    assert (bear.image_id, umbrella.image_id) == ("229997", "252219")
    (whole,) = points(1424143)
    canopy, hidden = filled(whole, umbrella.height, umbrella.width), filled(IGNORED, umbrella.height, umbrella.width)
    assert (canopy & hidden).sum() > 500
    layers = sorted([(canopy, False), (hidden, True)], key=lambda layer: -layer[0].sum())
    (first, _), (second, second_is_ignored) = layers
    expected = {second_is_ignored: second, not second_is_ignored: first & ~second}
    assert [target.is_ignore for target in umbrella.targets] == [False, True]
    for target in umbrella.targets:
        assert np.array_equal(rle_decode(target.mask), expected[target.is_ignore])
        assert target.area == expected[target.is_ignore].sum()


def test_whole_questions_and_phrases_are_told_apart_in_either_encoding(tmp_path: Path) -> None:
    build(tmp_path)
    bear, umbrella = read(tmp_path)[0]

    assert [(d.kind, d.question, d.answer, d.target_ids) for d in umbrella.dialogues] == [
        ("muse", "What protects a vendor’s goods from sun and rain?", "It is {seg}.", (0,)),
        ("muse", "Which object would you open in a shower?", "It is {seg}.", (0,)),
    ]
    assert [(d.kind, d.question, d.answer, d.target_ids) for d in bear.dialogues] == [
        ("referring", "the animal to keep away from", "", (0,))
    ]


def annotation(*shapes: Any, text: Any = ("the bear",)) -> dict[str, Any]:
    return {"text": list(text), "is_sentence": False, "shapes": list(shapes)}


BOX = [[10, 10], [60, 10], [60, 60], [10, 60]]
SMALL = [[20, 20], [30, 20], [30, 30], [20, 30]]


@pytest.mark.parametrize(
    ("faulty", "reasons"),
    [
        (annotation(shape("target", [[600, 10], [900, 10], [900, 60]])),
         {"mask outside its picture": 1, "picture lost a polygon": 1}),
        (annotation(shape("target", "x")), {"malformed mask": 1, "picture lost a polygon": 1}),
        (annotation(shape("thing", BOX)), {"shape is neither target nor ignore": 1, "picture lost a polygon": 1}),
        (annotation(7), {"shape is neither target nor ignore": 1, "picture lost a polygon": 1}),
        (annotation(shape("ignore", BOX)), {"nothing of the target can be seen": 1}),
        (annotation(shape("target", SMALL[:2])), {"degenerate mask": 1, "nothing of the target can be seen": 1}),
        (annotation(shape("target", BOX), text=[" "]),
         {"question is empty or holds a target marker": 1, "picture keeps no question": 1}),
        ({"text": ["x"]}, {"annotation lacks text or shapes": 1}),
    ],
)  # fmt: skip
def test_a_faulty_picture_is_skipped_under_its_reasons_or_raised(
    tmp_path: Path, faulty: dict[str, Any], reasons: dict[str, int]
) -> None:
    add(tmp_path, "train", 229997, faulty)
    add(tmp_path, "train", 252219, annotation(shape("target", BOX)))

    rows, ledger = read(tmp_path)

    assert [row.image_id for row in rows] == ["252219"]
    assert dict(ledger.counts) == reasons
    with pytest.raises(DataError, match=next(iter(reasons))):
        read(tmp_path, strict=True)


def test_flags_are_passed_over_degenerate_polygons_counted_and_smaller_polygons_win(tmp_path: Path) -> None:
    shapes = [shape("target", SMALL), shape("ignore", BOX), shape("flag", BOX), shape("target", SMALL[:2])]
    add(tmp_path, "train", 229997, annotation(*shapes, text=["a", "A", "b"]))
    (row,), ledger = read(tmp_path)

    small, box = filled(SMALL, row.height, row.width), filled(BOX, row.height, row.width)
    assert [target.area for target in row.targets] == [small.sum(), (box & ~small).sum()]
    assert [dialogue.question for dialogue in row.dialogues] == ["a", "b"]
    assert dict(ledger.counts) == {"degenerate mask": 1, "question given twice": 1}


def test_missing_parts_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no folder"):
        read(tmp_path / "absent")
    build(tmp_path)
    with pytest.raises(DataError, match="test is missing, there is train, val; give --split"):
        read(tmp_path, split="test")
    (tmp_path / "test").mkdir()
    with pytest.raises(DataError, match="holds no JSON"):
        read(tmp_path, split="test")
    (tmp_path / "train" / "229997.json").write_text("<html>")
    (tmp_path / "train" / "252219.json").unlink()
    rows, ledger = read(tmp_path)
    assert not rows
    assert dict(ledger.counts) == {"picture without an annotation": 1, "annotation is not JSON": 1}
    assert json.loads((tmp_path / "val" / "458756.json").read_text())["is_sentence"]
