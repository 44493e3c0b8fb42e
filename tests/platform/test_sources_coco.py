"""The coco source: genuine data read independently (pycocotools, raw JSON), and every fault counted or raised."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps
from pycocotools import mask as coco_mask

from pixellm.errors import ConfigError, DataError
from pixellm.platform.data.schema import Row
from pixellm.platform.data.sources import get_source, source_names
from pixellm.platform.data.sources.base import Ledger
from pixellm.platform.masks import rle_decode
from tests.platform.data_builders import CocoFolder


def read(folder: Path, *, strict: bool = False, skip_bad_masks: bool = False) -> tuple[list[Row], Ledger]:
    ledger = Ledger(strict=strict, skip_bad_masks=skip_bad_masks)
    return list(get_source("coco").rows(str(folder), ledger)), ledger


def test_every_genuine_mask_box_category_caption_and_licence_arrives(demo_data: Path) -> None:
    content = json.loads((demo_data / "instances.json").read_text())
    captions = json.loads((demo_data / "captions.json").read_text())
    names = {category["id"]: category["name"] for category in content["categories"]}
    rows, ledger = read(demo_data, strict=True)
    by_id = {int(row.image_id): row for row in rows}

    assert set(by_id) == {image["id"] for image in content["images"]}
    assert not ledger.counts
    for image in content["images"]:
        row = by_id[image["id"]]
        assert (row.height, row.width) == (image["height"], image["width"])
        assert row.image == (demo_data / "images" / image["file_name"]).read_bytes()
        assert ("Attribution-ShareAlike" in row.license) == (image["license"] == 5)
        expected = [" ".join(c["caption"].split()) for c in captions if c["image_id"] == image["id"]]
        assert [dialogue.answer for dialogue in row.dialogues] == expected
    targets = {target.target_id: (row, target) for row in rows for target in row.targets}
    assert len(targets) == len(content["annotations"])
    for annotation in content["annotations"]:
        row, target = targets[str(annotation["id"])]
        polygons = coco_mask.frPyObjects(annotation["segmentation"], row.height, row.width)
        assert np.array_equal(rle_decode(target.mask), coco_mask.decode(coco_mask.merge(polygons)).astype(bool))
        x, y, w, h = annotation["bbox"]
        assert target.box == pytest.approx((x, y, x + w, y + h), abs=1e-3)
        assert target.category == names[annotation["category_id"]]
        assert target.area == coco_mask.area(coco_mask.merge(polygons))


def test_phrases_tell_instances_of_one_category_apart_by_where_they_are(demo_data: Path) -> None:
    rows, _ = read(demo_data)
    told_apart = 0

    for row in rows:
        for target in row.targets:
            same = [other for other in row.targets if other.category == target.category]
            centre_x = [(other.box[0] + other.box[2]) / 2 for other in same]
            mine = (target.box[0] + target.box[2]) / 2
            assert target.phrase.endswith(target.category)
            if target.phrase.startswith("left"):
                assert mine == min(centre_x)
            if target.phrase.startswith("right"):
                assert mine == max(centre_x)
            told_apart += target.phrase != target.category
            assert sum(o.phrase == target.phrase for o in same) == 1 or target.phrase == target.category
    assert told_apart > 50


def test_crowd_regions_become_ignore_regions_and_make_position_words_unsafe(tmp_path: Path) -> None:
    coco = CocoFolder(tmp_path / "in")
    coco.add_image(1)
    coco.add_box(10, 1, 2, 2, 10, 10)
    coco.add_box(11, 1, 40, 2, 10, 10)
    coco.add_box(12, 1, 0, 0, 1, 1, iscrowd=1, segmentation={"size": [40, 60], "counts": [1200, 400, 800]})
    (row,), _ = read(coco.write(), strict=True)

    assert [target.is_ignore for target in row.targets] == [False, False, True]
    assert row.targets[2].area == 400
    assert {target.phrase for target in row.targets} == {"cat"}


def test_a_truncated_picture_is_named_counted_and_skipped_or_raised(demo_data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    shutil.copytree(demo_data, folder)
    photo = folder / "images" / "000000030213.jpg"
    photo.write_bytes(photo.read_bytes()[:-2000])

    rows, ledger = read(folder)

    assert len(rows) == 31
    assert ledger.counts == {"picture does not decode": 1}
    assert ledger.names == {"picture does not decode": ["000000030213.jpg"]}
    with pytest.raises(DataError, match=r"000000030213\.jpg: picture does not decode .*truncated"):
        read(folder, strict=True)


@pytest.mark.parametrize(
    "fields",
    [
        {"segmentation": [[50, 5, 75, 5, 75, 15, 50, 15]]},
        {"bbox": [50, 5, 25, 10], "segmentation": [[50, 5, 59, 5, 59, 15, 50, 15]]},
        {"segmentation": {"size": [60, 40], "counts": [1200, 400, 800]}},
    ],
    ids=["polygon", "box", "rle of another size"],
)
def test_a_mask_outside_its_picture_is_an_error_unless_such_masks_are_to_be_skipped(
    tmp_path: Path, fields: dict
) -> None:
    coco = CocoFolder(tmp_path / "in")
    coco.add_image(1)
    coco.add_box(10, 1, 2, 2, 10, 10)
    coco.add_box(11, 1, 50, 5, 5, 5, **fields)
    folder = coco.write()

    (row,), ledger = read(folder, skip_bad_masks=True)

    assert [target.target_id for target in row.targets] == ["10"]
    assert ledger.names == {"mask outside its picture": ["000000000001.jpg annotation 11"]}
    with pytest.raises(DataError, match=r"000000000001\.jpg annotation 11: mask outside its picture"):
        read(folder)


def test_each_other_fault_is_counted_under_its_own_reason(tmp_path: Path) -> None:
    coco = CocoFolder(tmp_path / "in")
    for image_id in (1, 2, 3, 4):
        coco.add_image(image_id)
    coco.add_image(5, height=50)
    coco.images[-1]["height"] = 40
    coco.images.append(dict(coco.images[0]))
    coco.images.append({"id": 9})
    coco.add_box(10, 1, 2, 2, 10, 10)
    coco.add_box(10, 1, 3, 3, 10, 10)
    coco.add_box(11, 77, 2, 2, 10, 10)
    coco.add_box(12, 1, 2, 2, 10, 10, category_id=99)
    coco.add_box(13, 1, 2, 2, 10, 10, segmentation=[])
    coco.add_box(14, 1, 2, 2, 10, 10, segmentation=5)
    coco.add_box(15, 2, 2, 2, 10, 10)
    coco.add_box(16, 2, 2, 2, 10, 10, bbox=[1, 2])
    coco.add_box(17, 4, 2, 2, 10, 10)
    coco.captions = [{"image_id": 3, "caption": "  A cat.\n"}, {"image_id": 3, "caption": "The {seg}"}]
    folder = coco.write()
    (folder / "images" / "000000000004.jpg").unlink()

    rows, ledger = read(folder)

    assert [row.image_id for row in rows] == ["1", "2", "3"]
    assert [dialogue.answer for dialogue in rows[2].dialogues] == ["A cat."]
    assert dict(ledger.counts) == {
        "duplicate image id": 1,
        "image entry lacks id or file_name": 1,
        "duplicate annotation id": 1,
        "annotation of an unlisted picture": 1,
        "annotation of an unlisted category": 1,
        "degenerate mask": 1,
        "malformed mask": 1,
        "box is not [x, y, width, height]": 1,
        "picture is missing": 1,
        "picture has another size than its annotation says": 1,
        "caption is empty or holds a target marker": 1,
    }


def test_a_picture_without_target_and_caption_is_left_out_even_in_strict_mode(tmp_path: Path) -> None:
    coco = CocoFolder(tmp_path / "in")
    coco.add_image(1)
    coco.add_image(2)
    coco.add_box(10, 1, 2, 2, 10, 10)

    rows, ledger = read(coco.write(), strict=True)

    assert [row.image_id for row in rows] == ["1"]
    assert ledger.names == {"picture has neither target nor caption": ["000000000002.jpg"]}


def test_a_picture_turned_by_its_exif_is_taken_as_a_person_sees_it(tmp_path: Path) -> None:
    coco = CocoFolder(tmp_path / "in")
    coco.add_image(1, height=40, width=60)
    coco.add_box(10, 1, 2, 45, 10, 10)
    exif = Image.Exif()
    exif[0x0112] = 6
    path = coco.folder / "images" / "000000000001.jpg"
    Image.open(path).save(path, exif=exif)
    coco.images[0].update(height=60, width=40)

    (row,), _ = read(coco.write(), strict=True)

    assert (row.height, row.width) == (60, 40)


def test_a_picture_annotated_before_its_exif_turn_is_kept_with_its_pixels_as_stored_and_noted(tmp_path: Path) -> None:
    coco = CocoFolder(tmp_path / "in")
    coco.add_image(1, height=40, width=60)
    coco.add_box(10, 1, 45, 2, 10, 10)
    path = coco.folder / "images" / "000000000001.jpg"
    exif = Image.Exif()
    exif[0x010F], exif[0x0112] = "a camera", 8
    Image.open(path).save(path, exif=exif)
    stored = np.asarray(Image.open(path))

    (row,), ledger = read(coco.write(), strict=True)
    shown = ImageOps.exif_transpose(Image.open(io.BytesIO(row.image)))

    assert (row.height, row.width) == (40, 60)
    assert np.array_equal(np.asarray(shown), stored)
    assert len(row.image) == path.stat().st_size
    assert ledger.notes == {"EXIF turn taken off: the annotations are of the stored pixels": 1}


@pytest.mark.parametrize("layout", ["plain", "official"])
def test_the_official_download_layout_is_read_like_the_plain_one(tmp_path: Path, demo_data: Path, layout: str) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    shutil.copytree(demo_data / "images", folder / ("images" if layout == "plain" else "val2017"))
    captions = json.dumps({"annotations": json.loads((demo_data / "captions.json").read_text())})
    annotations = folder if layout == "plain" else folder / "annotations"
    annotations.mkdir(exist_ok=True)
    suffix = "" if layout == "plain" else "_val2017"
    shutil.copy(demo_data / "instances.json", annotations / f"instances{suffix}.json")
    (annotations / f"captions{suffix}.json").write_text(captions)

    assert read(folder)[0] == read(demo_data)[0]


def test_missing_parts_and_files_of_another_form_are_named(tmp_path: Path) -> None:
    def message(folder: Path) -> str:
        with pytest.raises(DataError) as caught:
            read(folder)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "there is no folder" in message(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    assert "no instances.json; --in wants images/ and instances.json" in message(tmp_path / "empty")
    (tmp_path / "empty" / "instances.json").write_text("{}")
    assert "images is missing" in message(tmp_path / "empty")
    (tmp_path / "empty" / "images").mkdir()
    assert "has no list 'images', 'annotations', 'categories'" in message(tmp_path / "empty")
    (tmp_path / "empty" / "instances.json").write_text("[1]")
    assert "holds a JSON list" in message(tmp_path / "empty")
    (tmp_path / "empty" / "instances.json").write_text("<html>")
    assert "instances.json is not JSON: Expecting value at line 1 column 1" in message(tmp_path / "empty")


def test_an_unknown_source_names_the_nearest() -> None:
    assert {"coco", "muse"} <= set(source_names())
    with pytest.raises(ConfigError, match="no source 'cocoo'; did you mean 'coco'"):
        get_source("cocoo")
