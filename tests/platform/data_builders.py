"""Small rows and COCO-format folders that the data tests share."""

import io
import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pixellm.platform import masks
from pixellm.platform.data.schema import Row, RowDialogue, Target


def jpeg(height: int, width: int, seed: int = 0) -> bytes:
    """An encoded picture of noise (so that cutting its tail shows)."""
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def target(
    category: str, box: tuple[int, int, int, int], *, height: int = 40, width: int = 60, **fields: Any
) -> Target:
    """A rectangular target (x0, y0, x1, y1)."""
    mask = np.zeros((height, width), dtype=bool)
    mask[box[1] : box[3], box[0] : box[2]] = True
    values = {"target_id": f"{category}-{box[0]}-{box[1]}", "phrase": category, **fields}
    corners = (float(box[0]), float(box[1]), float(box[2]), float(box[3]))
    return Target(category=category, box=corners, mask=masks.rle_encode(mask), area=int(mask.sum()), **values)


def row(image_id: str, targets: Sequence[Target] = (), dialogues: Sequence[RowDialogue] = (), **fields: Any) -> Row:
    """A row over a 40×60 picture."""
    values = {"source": "test", "image": jpeg(40, 60, zlib.crc32(image_id.encode()) % 1000), "license": "CC0", **fields}
    return Row(image_id=image_id, height=40, width=60, targets=tuple(targets), dialogues=tuple(dialogues), **values)


def vqa(answer: str) -> RowDialogue:
    """A written question without targets."""
    return RowDialogue("vqa", "What does this picture show?", answer)


class CocoFolder:
    """A folder in COCO's format that a test fills, damages and writes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.images: list[dict[str, Any]] = []
        self.annotations: list[dict[str, Any]] = []
        self.captions: list[dict[str, Any]] = []
        (folder / "images").mkdir(parents=True)

    def add_image(self, image_id: int, height: int = 40, width: int = 60, **fields: Any) -> None:
        entry = {"id": image_id, "file_name": f"{image_id:012d}.jpg", "height": height, "width": width, "license": 4}
        self.images.append({**entry, **fields})
        (self.folder / "images" / f"{image_id:012d}.jpg").write_bytes(jpeg(height, width, image_id))

    def add_box(self, annotation_id: int, image_id: int, x: float, y: float, w: float, h: float, **fields: Any) -> None:
        entry = {
            "id": annotation_id,
            "image_id": image_id,
            "category_id": 1,
            "bbox": [x, y, w, h],
            "iscrowd": 0,
            "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
        }
        self.annotations.append({**entry, **fields})

    def write(self) -> Path:
        content = {
            "images": self.images,
            "annotations": self.annotations,
            "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
            "licenses": [{"id": 4, "name": "Attribution License", "url": "http://example.org/by"}],
        }
        (self.folder / "instances.json").write_text(json.dumps(content))
        if self.captions:
            (self.folder / "captions.json").write_text(json.dumps({"annotations": self.captions}))
        return self.folder
