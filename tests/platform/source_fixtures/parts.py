"""paco_lvis and pascal_part: their formats, with parts cut out of the packaged photographs' genuine masks."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pycocotools import mask as coco_mask
from scipy.io import savemat

from tests.platform.source_fixtures import SourceFixture
from tests.platform.source_fixtures.coco import DEMO

IMAGE_ID = 229997


def genuine_masks() -> list[npt.NDArray[np.uint8]]:
    """The picture's masks, H×W 0/1, in the order of the file."""
    content = json.loads((DEMO / "instances.json").read_text())
    (image,) = (entry for entry in content["images"] if entry["id"] == IMAGE_ID)
    return [
        coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(entry["segmentation"], image["height"], image["width"])))
        for entry in content["annotations"]
        if entry["image_id"] == IMAGE_ID
    ]


def upper_half(mask: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    rows = np.flatnonzero(mask.any(axis=1))
    part = mask.copy()
    part[(rows[0] + rows[-1]) // 2 :] = 0
    return part


def _annotation(number: int, mask: npt.NDArray[np.uint8], category_id: int, **fields: Any) -> dict[str, Any]:
    rle = coco_mask.encode(np.asfortranarray(mask))
    box = [float(value) for value in coco_mask.toBbox(rle)]
    segmentation = {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode()}
    return {"id": number, "image_id": IMAGE_ID, "category_id": category_id, "bbox": box, "area": int(mask.sum()),
            "segmentation": segmentation, "obj_ann_id": 1, **fields}  # fmt: skip


def build_paco(folder: Path) -> None:
    whole = genuine_masks()[0]
    lower = whole - upper_half(whole)
    height, width = whole.shape
    image = {"id": IMAGE_ID, "file_name": f"val2017/{IMAGE_ID:012d}.jpg", "height": height, "width": width,
             "license": 1, "neg_category_ids": [9], "not_exhaustive_category_ids": [4]}  # fmt: skip
    content = {
        "images": [image],
        "annotations": [
            _annotation(1, upper_half(whole), 1, attribute_ids=[0, 3], dom_color_ids=[0]),
            _annotation(2, lower, 1, attribute_ids=[1, 3, 2], dom_color_ids=[1]),
            _annotation(3, upper_half(lower), 2, attribute_ids=[], dom_color_ids=[]),
            _annotation(4, lower, 4, attribute_ids=[], dom_color_ids=[]),
            _annotation(5, np.zeros_like(whole), 2),
        ],
        "categories": [
            {"id": 1, "name": "trash_can", "supercategory": "OBJECT"},
            {"id": 2, "name": "trash_can:inner_body", "supercategory": "OBJECT"},
            {"id": 4, "name": "pan_(for_cooking)", "supercategory": "OBJECT"},
        ],
        "part_categories": [{"id": 1, "name": "inner_body", "supercategory": "PART"}],
        "attributes": [
            {"id": 0, "name": "light_blue", "supercategory": "ATTR"},
            {"id": 1, "name": "black", "supercategory": "ATTR"},
            {"id": 2, "name": "other(material)", "supercategory": "ATTR"},
            {"id": 3, "name": "plastic", "supercategory": "ATTR"},
        ],
        "licenses": [{"id": 1, "name": "CC BY", "url": "http://example.org/by"}],
    }
    (folder / "annotations").mkdir()
    (folder / "annotations" / "paco_lvis_v1_val.json").write_text(json.dumps(content))
    (folder / "val2017").mkdir()
    shutil.copy(DEMO / "images" / f"{IMAGE_ID:012d}.jpg", folder / "val2017")


def build_pascal(folder: Path) -> None:
    whole = genuine_masks()[0]
    part = upper_half(whole)
    parts = np.array(
        [("head", part), ("lfleg", whole - part), ("tail", np.zeros_like(whole))],
        dtype=[("part_name", object), ("mask", object)],
    )
    fields = [(name, object) for name in ("class", "class_ind", "mask", "parts")]
    objects = np.array([("motorbike", 14, whole, parts)], dtype=fields)
    (folder / "Annotations_Part").mkdir()
    anno = {"imname": "2008_000001", "objects": objects}
    savemat(folder / "Annotations_Part" / "2008_000001.mat", {"anno": anno}, do_compression=True)
    mat = (folder / "Annotations_Part" / "2008_000001.mat").read_bytes()
    (folder / "Annotations_Part" / "2008_000001.mat").write_bytes(b"MATLAB 5.0 MAT-file".ljust(116) + mat[116:])
    (folder / "Annotations_Part" / "2008_000002.mat").write_bytes(b"no MATLAB file")
    (folder / "VOCdevkit" / "VOC2010" / "JPEGImages").mkdir(parents=True)
    for name in ("2008_000001", "2008_000002"):
        shutil.copy(
            DEMO / "images" / f"{IMAGE_ID:012d}.jpg", folder / "VOCdevkit" / "VOC2010" / "JPEGImages" / f"{name}.jpg"
        )


FIXTURES = (
    SourceFixture("paco_lvis", build_paco, rows=1, targets=3, skipped={"degenerate mask": 1}),
    SourceFixture(
        "pascal_part",
        build_pascal,
        rows=1,
        targets=3,
        skipped={"degenerate mask": 1, "annotation file is not PASCAL-Part's": 1},
    ),
)
