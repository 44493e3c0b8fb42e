"""reasonseg: questions over genuine polygons of packaged photographs, as published; one has an ignored part."""

import json
import shutil
from pathlib import Path
from typing import Any

from tests.platform.source_fixtures import SourceFixture
from tests.platform.source_fixtures.coco import DEMO

#: The umbrella's lower part, which a person hides.
IGNORED = [[565.0, 120.0], [640.0, 120.0], [640.0, 160.0], [565.0, 160.0]]


def points(annotation_id: int) -> list[list[list[float]]]:
    """The genuine polygons of an instance, each as [[x, y], …]."""
    annotations = json.loads((DEMO / "instances.json").read_text())["annotations"]
    (polygons,) = (entry["segmentation"] for entry in annotations if entry["id"] == annotation_id)
    return [[[polygon[at], polygon[at + 1]] for at in range(0, len(polygon), 2)] for polygon in polygons]


def shape(label: str, corners: Any) -> dict[str, Any]:
    return {"label": label, "labels": [label], "shape_type": "polygon", "image_name": "", "points": corners,
            "group_id": None, "group_ids": [None], "flags": {}}  # fmt: skip


def add(folder: Path, split: str, image_id: int, annotation: dict[str, Any], encoding: str = "utf-8") -> None:
    (folder / split).mkdir(parents=True, exist_ok=True)
    shutil.copy(DEMO / "images" / f"{image_id:012d}.jpg", folder / split / f"{image_id}.jpg")
    text = json.dumps(annotation, ensure_ascii=False)
    (folder / split / f"{image_id}.json").write_bytes(text.encode(encoding))


def build(folder: Path) -> None:
    umbrella = [*(shape("target", corners) for corners in points(1424143)), shape("ignore", IGNORED)]
    texts = ["What protects a vendor’s goods from sun and rain?", "Which object would you open in a shower?"]
    add(folder, "train", 252219, {"text": texts, "is_sentence": True, "shapes": umbrella}, encoding="cp1252")
    bear = [shape("target", corners) for corners in points(586905)]
    add(folder, "train", 229997, {"text": ["the animal to keep away from"], "is_sentence": False, "shapes": bear})
    add(folder, "val", 458756, {"text": ["What holds the fruit?"], "is_sentence": True,
                                "shapes": [shape("target", corners) for corners in points(712616)]})  # fmt: skip


FIXTURES = (
    SourceFixture("reasonseg", build, rows=2, targets=2),
    SourceFixture("reasonseg", build, rows=1, targets=1, options={"split": "val"}, variant="val"),
)
