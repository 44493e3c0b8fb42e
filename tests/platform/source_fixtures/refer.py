"""The refCOCO series in REFER's layout: pickles, instances.json and picture folders, from `tests/data/expressions.json`
and the packaged photographs. Counts are those of the JSON."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pycocotools import mask as coco_mask

from tests.platform.source_fixtures import SourceFixture
from tests.platform.source_fixtures.coco import DEMO

DATA = Path(__file__).resolve().parents[2] / "data"
PICTURES = "images/mscoco/images/train2014"


def coco_name(image_id: int) -> str:
    return f"COCO_train2014_{image_id:012d}.jpg"


def build_refer(name: str, split_by: str) -> Callable[[Path], None]:
    """What builds `NAME/refs(SPLIT_BY).p`, `NAME/instances.json` and the pictures in a folder."""

    def build(folder: Path) -> None:
        refs = make_refs(json.loads((DATA / "expressions.json").read_text()))
        (folder / name).mkdir(parents=True)
        with (folder / name / f"refs({split_by}).p").open("wb") as file:
            pickle.dump(refs, file, protocol=0)
        write_instances(folder / name / "instances.json", {ref["image_id"] for ref in refs})
        copy_pictures(folder / PICTURES, {ref["image_id"] for ref in refs})

    return build


def build_refclef(folder: Path) -> None:
    """Like the others, but with its own picture folder and lists of run-length codes as segmentations."""
    build_refer("refclef", "unc")(folder)
    (folder / PICTURES).rename(folder / "images" / "saiapr_tc-12")
    shutil.rmtree(folder / "images" / "mscoco")
    path = folder / "refclef" / "instances.json"
    content = json.loads(path.read_text())
    sizes = {image["id"]: (image["height"], image["width"]) for image in content["images"]}
    for annotation in content["annotations"]:
        codes = coco_mask.frPyObjects(annotation["segmentation"], *sizes[annotation["image_id"]])
        annotation["segmentation"] = [{**code, "counts": code["counts"].decode()} for code in codes]
    path.write_text(json.dumps(content))


def build_grefcoco(folder: Path) -> None:
    refs = make_refs(json.loads((DATA / "expressions_many.json").read_text()))
    for ref in refs:
        ref["no_target"] = ref["ann_id"] == [-1]
        ref["sentences"] = [{**sentence, "exist": not ref["no_target"]} for sentence in ref["sentences"]]
    (folder / "grefcoco").mkdir(parents=True)
    (folder / "grefcoco" / "grefs(unc).json").write_text(json.dumps(refs))
    write_instances(folder / "grefcoco" / "instances.json", {ref["image_id"] for ref in refs})
    copy_pictures(folder / PICTURES, {ref["image_id"] for ref in refs})


def make_refs(expressions: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Entries with every field of the published files."""
    refs, sent_id = [], 0
    for number, entry in enumerate(expressions):
        sentences = []
        for text in entry["sentences"]:
            sentences.append({"raw": text, "sent": text.lower(), "sent_id": sent_id, "tokens": text.lower().split()})
            sent_id += 1
        file_name = coco_name(entry["image_id"]).replace(".jpg", f"_{number}.jpg")
        ids = {"ref_id": number, "category_id": 1, "sent_ids": [sentence["sent_id"] for sentence in sentences]}
        refs.append({**entry, **ids, "file_name": file_name, "sentences": sentences})
    return refs


def write_instances(path: Path, image_ids: set[int]) -> None:
    content = json.loads((DEMO / "instances.json").read_text())
    images = [image for image in content["images"] if image["id"] in image_ids]
    content["images"] = [{**image, "file_name": coco_name(image["id"])} for image in images]
    content["annotations"] = [entry for entry in content["annotations"] if entry["image_id"] in image_ids]
    path.write_text(json.dumps(content))


def copy_pictures(folder: Path, image_ids: set[int]) -> None:
    folder.mkdir(parents=True)
    for image_id in image_ids:
        shutil.copy(DEMO / "images" / f"{image_id:012d}.jpg", folder / coco_name(image_id))


FIXTURES = (
    SourceFixture("refcoco", build_refer("refcoco", "unc"), rows=3, targets=11),
    SourceFixture(
        "refcoco", build_refer("refcoco", "unc"), rows=1, targets=4, options={"split": "testA"}, variant="testA"
    ),
    SourceFixture("refcoco+", build_refer("refcoco+", "unc"), rows=3, targets=11),
    SourceFixture("refcocog", build_refer("refcocog", "umd"), rows=3, targets=11),
    SourceFixture("refclef", build_refclef, rows=3, targets=11),
    SourceFixture("grefcoco", build_grefcoco, rows=1, targets=3),
)
