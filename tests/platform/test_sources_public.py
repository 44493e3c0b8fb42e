"""The semantic, LVIS, part and own-data sources: areas, names and faults against an independent reading."""

import json
from pathlib import Path

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from pixellm.errors import DataError
from pixellm.platform.data.schema import Row
from pixellm.platform.data.sources import get_source, with_options
from pixellm.platform.data.sources.base import Ledger
from pixellm.platform.data.sources.pascal_part import part_words
from pixellm.platform.masks import rle_decode
from tests.platform.data_builders import CocoFolder
from tests.platform.source_fixtures import generic_coco, lvis, parts, semantic


def read(source: str, folder: Path, **options: str) -> tuple[list[Row], Ledger]:
    ledger = Ledger(skip_bad_masks=True)
    return list(with_options(get_source(source), options).rows(str(folder), ledger)), ledger


@pytest.mark.parametrize(
    ("source", "build"),
    [
        ("coco_stuff", semantic.build_coco_stuff),
        ("ade20k", semantic.build_ade20k),
        ("mapillary", semantic.build_mapillary),
    ],
)
def test_each_class_of_a_label_map_is_one_target_with_exactly_its_pixels(source: str, build, tmp_path: Path) -> None:
    build(tmp_path)
    rows, _ = read(source, tmp_path)

    for row, image_id in zip(rows, semantic.IMAGE_IDS, strict=True):
        expected = semantic.expected_areas(image_id)
        assert row.image_id == str(image_id)
        assert {target.category: target.area for target in row.targets} == expected
        for target in row.targets:
            decoded = coco_mask.decode(target.mask)
            assert int(decoded.sum()) == target.area
            ys, xs = np.nonzero(decoded)
            assert target.box == (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)


def test_several_splits_are_not_mixed_unasked_and_missing_parts_are_named(tmp_path: Path) -> None:
    semantic.build_ade20k(tmp_path)
    (tmp_path / "annotations" / "validation").mkdir()

    with pytest.raises(DataError, match="holds training, validation: choose one with --split"):
        read("ade20k", tmp_path)
    with pytest.raises(DataError, match="has no folder test"):
        read("ade20k", tmp_path, split="test")
    with pytest.raises(DataError, match=r"images/validation is missing"):
        read("ade20k", tmp_path, split="validation")
    (tmp_path / "objectInfo150.txt").unlink()
    with pytest.raises(DataError, match=r"objectInfo150\.txt is missing; --in wants"):
        read("ade20k", tmp_path, split="training")
    for source, missing in (
        ("coco_stuff", "labels.txt"),
        ("mapillary", "config_v2.0.json"),
        ("lvis", "lvis_"),
        ("paco_lvis", "paco_lvis_"),
        ("pascal_part", "Annotations_Part/"),
        ("generic_coco", "annotations.json"),
    ):
        with pytest.raises(DataError, match=missing.replace(".", r"\.")):
            read(source, tmp_path, **({"split": "training"} if source == "coco_stuff" else {}))


@pytest.mark.parametrize("build", [lvis.build_v05, lvis.build_v1], ids=["v0.5", "v1"])
def test_lvis_masks_equal_pycocotools_and_incomplete_categories_are_ignore_regions(build, tmp_path: Path) -> None:
    build(tmp_path)
    rows, ledger = read("lvis", tmp_path)
    content = lvis.content()
    names = {entry["id"]: entry["name"] for entry in content["categories"]}
    images = {entry["id"]: entry for entry in content["images"]}
    targets = {target.target_id: target for row in rows for target in row.targets}

    assert len(targets) == len(content["annotations"])
    for annotation in content["annotations"]:
        image = images[annotation["image_id"]]
        rles = coco_mask.frPyObjects(annotation["segmentation"], image["height"], image["width"])
        target = targets[str(annotation["id"])]
        assert target.area == coco_mask.area(coco_mask.merge(rles))
        assert target.category == names[annotation["category_id"]].split("_(")[0].replace("_", " ")
        assert target.is_ignore == (annotation["category_id"] in image["not_exhaustive_category_ids"])
    assert sum(ledger.notes.values()) == lvis.expected_targets()[1] > 0
    for row in rows:
        absent = {names[key].split("_(")[0].replace("_", " ") for key in images[int(row.image_id)]["neg_category_ids"]}
        assert {dialogue.question for dialogue in row.dialogues} == absent
        assert {dialogue.kind for dialogue in row.dialogues} <= {"absent"}


def test_paco_parts_are_named_with_their_object_and_instances_by_an_attribute_that_only_they_have(
    tmp_path: Path,
) -> None:
    parts.build_paco(tmp_path)
    (row,), _ = read("paco_lvis", tmp_path)
    whole = parts.genuine_masks()[0]
    upper = parts.upper_half(whole)

    assert [(target.category, target.phrase, target.is_ignore) for target in row.targets] == [
        ("trash can", "light blue trash can", False),
        ("trash can", "black trash can", False),
        ("inner body of the trash can", "inner body of the trash can", False),
        ("pan", "pan", True),
    ]
    assert [target.area for target in row.targets[:2]] == [int(upper.sum()), int((whole - upper).sum())]
    assert np.array_equal(rle_decode(row.targets[0].mask), upper > 0)


def test_pascal_parts_are_read_from_matlab_files_with_their_short_names_in_words(tmp_path: Path) -> None:
    parts.build_pascal(tmp_path)
    (row,), ledger = read("pascal_part", tmp_path)
    whole = parts.genuine_masks()[0]

    assert [target.category for target in row.targets] == [
        "motorcycle",
        "head of the motorcycle",
        "left front leg of the motorcycle",
    ]
    assert np.array_equal(rle_decode(row.targets[0].mask), whole > 0)
    assert sum(target.area for target in row.targets[1:]) == int(whole.sum())
    assert ledger.names["annotation file is not PASCAL-Part's"] == ["2008_000002.jpg"]


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ("rear", "right ear"),
        ("lleg", "left leg"),
        ("llleg", "left lower leg"),
        ("rbpa", "right back paw"),
        ("lfho", "left front hoof"),
        ("wheel_2", "wheel"),
        ("bliplate", "back license plate"),
        ("hfrontside", "front side of the head"),
        ("beak", "beak"),
        ("leftmirror", "left mirror"),
    ],
)
def test_short_part_names_become_words(part: str, words: str) -> None:
    assert part_words(part) == words


def test_genuine_crowd_regions_keep_their_pixels_as_ignore_regions(tmp_path: Path) -> None:
    generic_coco.build_crowds(tmp_path)
    rows, _ = read("generic_coco", tmp_path)
    content = json.loads(generic_coco.CROWDS.read_text())
    targets = {target.target_id: target for row in rows for target in row.targets}

    for annotation in content["annotations"]:
        target = targets[str(annotation["id"])]
        assert target.is_ignore == bool(annotation["iscrowd"])
        if annotation["iscrowd"]:
            assert target.area == sum(annotation["segmentation"]["counts"][1::2])


def test_own_questions_point_at_annotations_and_own_files_stay_in_their_folder(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    generic_coco.build_with_questions(tmp_path / "a")
    rows, _ = read("generic_coco", tmp_path / "a")
    first = json.loads((tmp_path / "a" / "_annotations.coco.json").read_text())["annotations"][0]
    (row,) = (row for row in rows if row.image_id == str(first["image_id"]))

    assert [(dialogue.kind, dialogue.answer) for dialogue in row.dialogues] == [
        ("muse", "Here {seg}."),
        ("vqa", "A photograph."),
    ]
    assert row.targets[row.dialogues[0].target_ids[0]].target_id == str(first["id"])

    coco = CocoFolder(tmp_path / "b")
    coco.add_image(1)
    coco.add_image(2, file_name="../../secret.jpg")
    coco.add_image(3, file_name="/etc/secret.jpg")
    coco.add_box(10, 1, 2, 2, 10, 10)
    kept, ledger = read("generic_coco", coco.write())
    assert [row.image_id for row in kept] == ["1"]
    assert ledger.counts == {"file name leaves the picture folder": 2}
    (tmp_path / "b" / "questions.jsonl").write_text('{"image": \n')
    with pytest.raises(DataError, match=r"questions\.jsonl: line 1 is not JSON"):
        read("generic_coco", tmp_path / "b")
