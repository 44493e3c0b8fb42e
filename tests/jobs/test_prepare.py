"""The preparation jobs: reports that add up, byte-identical shards, statistics from an independent count, pictures."""

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from pixellm.errors import DataError
from pixellm.jobs.prepare import prepare, prepare_demo, show, stats
from pixellm.platform.data.contact_sheet import paint_masks, palette
from pixellm.platform.data.shards import open_shards


@pytest.fixture(scope="module")
def demo_uris(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return prepare_demo(tmp_path_factory.mktemp("shards"))


def test_preparing_twice_gives_byte_identical_shards(demo_uris: dict[str, str], tmp_path: Path) -> None:
    again = prepare_demo(tmp_path)

    assert set(again) == {"segmentation", "vqa", "muse"}
    for group, uri in again.items():
        names = sorted(path.name for path in Path(uri).iterdir())
        assert names == sorted(path.name for path in Path(demo_uris[group]).iterdir())
        for name in names:
            assert (Path(uri) / name).read_bytes() == (Path(demo_uris[group]) / name).read_bytes()


def test_a_report_counts_what_was_kept_and_names_what_was_skipped(demo_data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    shutil.copytree(demo_data, folder)
    photo = folder / "images" / "000000030213.jpg"
    photo.write_bytes(photo.read_bytes()[:5000])
    seen: list[tuple[int, int | None]] = []

    report = prepare("coco", folder, tmp_path / "out", progress=lambda done, total: seen.append((done, total)))

    content = json.loads((folder / "instances.json").read_text())
    kept = [annotation for annotation in content["annotations"] if annotation["image_id"] != 30213]
    assert (report.rows, report.targets) == (31, len(kept))
    assert report.skipped == {"picture does not decode": 1}
    assert report.skipped_names == {"picture does not decode": ["000000030213.jpg"]}
    assert report.digest == open_shards(tmp_path / "out").digest
    assert "skipped 1: picture does not decode (000000030213.jpg)" in report.to_text()
    assert json.loads(json.dumps(report.to_json_dict()))["skipped"] == {"picture does not decode": 1}
    assert open_shards(tmp_path / "out").info.notes["skipped"] == {"picture does not decode": 1}
    assert seen == [(number, 32) for number in range(1, 33)]


def test_strict_stops_at_the_first_fault_and_writes_nothing(demo_data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    shutil.copytree(demo_data, folder)
    (folder / "images" / "000000030213.jpg").write_bytes(b"\xff\xd8\xff")

    with pytest.raises(DataError, match=r"000000030213\.jpg: picture does not decode"):
        prepare("coco", folder, tmp_path / "out", strict=True)

    assert not (tmp_path / "out").exists()


def test_nothing_kept_is_an_error_not_an_empty_dataset(demo_data: Path, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    shutil.copy(demo_data / "instances.json", tmp_path)

    with pytest.raises(DataError, match="no row was kept"):
        prepare("coco", tmp_path, tmp_path / "out")


def test_statistics_equal_a_count_of_the_raw_annotations(demo_data: Path, demo_uris: dict[str, str]) -> None:
    content = json.loads((demo_data / "instances.json").read_text())
    captions = json.loads((demo_data / "captions.json").read_text())
    muse = json.loads((demo_data / "muse.json").read_text())
    sizes = {image["id"]: (image["height"], image["width"]) for image in content["images"]}
    shares = []
    for annotation in content["annotations"]:
        polygons = coco_mask.frPyObjects(annotation["segmentation"], *sizes[annotation["image_id"]])
        shares.append(coco_mask.area(coco_mask.merge(polygons)) / np.prod(sizes[annotation["image_id"]]))
    per_image = Counter(Counter(annotation["image_id"] for annotation in content["annotations"]).values())

    coco = stats(demo_uris["segmentation"])
    written = stats(demo_uris["muse"])

    assert (coco.targets, coco.rows_by_source, coco.dialogues) == (len(shares), {"coco": 32}, {"vqa": len(captions)})
    assert coco.targets_per_row == dict(per_image)
    edges = [0, 0.001, 0.01, 0.05, 0.2, 1.01]
    assert list(coco.area_share.values()) == np.histogram(shares, edges)[0].tolist()
    assert written.targets_per_question == dict(Counter(len(a) for item in muse for a in item["answers"]))
    answers = [len(text.split()) for item in muse for text in item["text_answers"]]
    assert written.answer_words == (min(answers), np.median(answers), max(answers))
    assert sum(coco.licenses.values()) == 32
    assert "vqa: 90" in coco.to_text()
    json.dumps(written.to_json_dict())


def test_a_contact_sheet_shows_the_samples_with_their_masks_in_colour(
    demo_uris: dict[str, str], tmp_path: Path
) -> None:
    path = show([demo_uris["segmentation"], demo_uris["muse"]], tmp_path / "deep" / "sheet.png", n=5)
    again = show([demo_uris["segmentation"], demo_uris["muse"]], tmp_path / "again.png", n=5)
    sheet = np.asarray(Image.open(path))

    assert path.read_bytes() == again.read_bytes()
    assert sheet.shape[1] > 1500
    assert sheet.shape[0] > 800
    red = np.asarray(palette(1)[0])
    assert (sheet == red).all(axis=2).sum() > 500


def test_painting_tints_the_mask_outlines_it_and_leaves_the_rest() -> None:
    picture = np.full((12, 14, 3), 100, dtype=np.uint8)
    mask = np.zeros((12, 14), dtype=bool)
    mask[2:10, 3:12] = True

    painted = paint_masks(picture, [mask], [(200, 0, 0)])

    assert (painted[~mask] == 100).all()
    assert painted[5, 7].tolist() == [150, 50, 50]
    assert painted[2, 3].tolist() == painted[9, 11].tolist() == [200, 0, 0]
    assert (picture == 100).all()
