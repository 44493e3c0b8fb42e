"""coco_stuff, ade20k and mapillary: label maps painted from the packaged photographs' genuine masks."""

import json
import shutil
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image
from pycocotools import mask as coco_mask

from tests.platform.source_fixtures import SourceFixture
from tests.platform.source_fixtures.coco import DEMO

IMAGE_IDS = (30213, 229997, 252219)


def label_map(image_id: int, background: int) -> npt.NDArray[np.uint8]:
    """H×W: where a mask is, its COCO category id (later ones on top); elsewhere `background`."""
    content = json.loads((DEMO / "instances.json").read_text())
    (image,) = (entry for entry in content["images"] if entry["id"] == image_id)
    labels = np.full((image["height"], image["width"]), background, dtype=np.uint8)
    for annotation in content["annotations"]:
        if annotation["image_id"] == image_id:
            polygons = coco_mask.frPyObjects(annotation["segmentation"], *labels.shape)
            labels[coco_mask.decode(coco_mask.merge(polygons)) > 0] = annotation["category_id"]
    return labels


def expected_areas(image_id: int) -> dict[str, int]:
    """Pixels by class name, counted in the map itself."""
    categories = json.loads((DEMO / "instances.json").read_text())["categories"]
    names = {entry["id"]: entry["name"] for entry in categories}
    values, counts = np.unique(label_map(image_id, 0), return_counts=True)
    return {names[int(value)]: int(count) for value, count in zip(values, counts, strict=True) if value}


def _write(pictures: Path, labels: Path, image_id: int, values: npt.NDArray[np.uint8]) -> None:
    for folder in (pictures, labels):
        folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(DEMO / "images" / f"{image_id:012d}.jpg", pictures)
    Image.fromarray(values).save(labels / f"{image_id:012d}.png")


def _names() -> dict[int, str]:
    return {entry["id"]: entry["name"] for entry in json.loads((DEMO / "instances.json").read_text())["categories"]}


def build_coco_stuff(folder: Path) -> None:
    names = _names()
    lines = ["0: unlabeled", *(f"{value}: {names.get(value, f'unused-{value}')}" for value in range(1, 183))]
    (folder / "labels.txt").write_text("\n".join(lines) + "\n")
    for image_id in IMAGE_IDS:
        values = label_map(image_id, 0) - 1  # 0 becomes 255: no class
        _write(folder / "images" / "val2017", folder / "annotations" / "val2017", image_id, values)
    with_hyphen = folder / "annotations" / "val2017" / f"{IMAGE_IDS[0]:012d}.png"
    values = np.array(Image.open(with_hyphen))
    values[0, :5] = 181
    Image.fromarray(values).save(with_hyphen)


def build_ade20k(folder: Path) -> None:
    names = _names()
    lines = [f"{value}\t0.1\t10\t1\t0\t{names.get(value, 'unused')}, other word" for value in range(1, 151)]
    (folder / "objectInfo150.txt").write_text("Idx\tRatio\tTrain\tVal\tStuff\tName\n" + "\n".join(lines) + "\n")
    for image_id in IMAGE_IDS:
        _write(folder / "images" / "training", folder / "annotations" / "training", image_id, label_map(image_id, 0))
    broken = folder / "annotations" / "training" / "ADE_broken.png"
    broken.write_bytes((folder / "annotations" / "training" / f"{IMAGE_IDS[0]:012d}.png").read_bytes()[:100])
    shutil.copy(DEMO / "images" / f"{IMAGE_IDS[0]:012d}.jpg", folder / "images" / "training" / "ADE_broken.jpg")
    shutil.copy(DEMO / "images" / f"{IMAGE_IDS[0]:012d}.jpg", folder / "images" / "training" / "ADE_unlabelled.jpg")


def build_mapillary(folder: Path) -> None:
    names = _names()
    labels = [
        {
            "name": f"object--{value}",
            "readable": names.get(value, "Unused").title(),
            "evaluate": True,
            "instances": True,
        }
        for value in range(124)
    ]
    labels[123] = {"name": "void--unlabeled", "readable": "Unlabeled", "evaluate": False, "instances": False}
    (folder / "config_v2.0.json").write_text(json.dumps({"labels": labels, "version": 2.0}))
    for image_id in IMAGE_IDS:
        root = folder / "training"
        _write(root / "images", root / "v2.0" / "labels", image_id, label_map(image_id, 123))


_TARGETS = sum(len(expected_areas(image_id)) for image_id in IMAGE_IDS)

FIXTURES = (
    SourceFixture("coco_stuff", build_coco_stuff, 3, _TARGETS, {"class without a usable name": 1}),
    SourceFixture("ade20k", build_ade20k, 3, _TARGETS, {"picture has no label map": 1, "label map does not decode": 1}),
    SourceFixture("mapillary", build_mapillary, 3, _TARGETS, {"class without a usable name": 3}),
)
