"""Whether a generated dataset is what it should be, told without a line of the code that generated it.

Read are the released JSON and the original COCO annotations; masks are compared pixel by pixel.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

SPLITS = ("train", "val", "test-few", "test-many")


def invalid_pairs(out: Path, instances_file: Path) -> list[str]:
    """What is wrong with the released JSON under `out`, told from the original COCO annotations alone."""
    content = json.loads(instances_file.read_text())
    names = {category["id"]: category["name"] for category in content["categories"]}
    images = {image["file_name"]: image for image in content["images"]}
    truth = {annotation["id"]: annotation for annotation in content["annotations"]}
    problems: list[str] = []
    home: dict[str, str] = {}
    for split in SPLITS:
        folder = out / "released" / split
        for entry in json.loads((folder / "muse.json").read_text()) if folder.exists() else []:
            name = entry["file_name"]
            if home.setdefault(name, split) != split:
                problems.append(f"{name} in {split} and {home[name]}")
            image = images[name]
            if (entry["height"], entry["width"]) != (image["height"], image["width"]):
                problems.append(f"{name}: size")
            if not len(entry["questions"]) == len(entry["answers"]) == len(entry["text_answers"]) >= 1:
                problems.append(f"{name}: lengths")
            for question, parts, text in zip(entry["questions"], entry["answers"], entry["text_answers"], strict=True):
                label = f"{split} {name} {question!r}"
                ids = [part["id"] for part in parts]
                if text.count("{seg}") != len(parts) or len(parts) < 2 or len(set(ids)) != len(ids):
                    problems.append(f"{label}: markers")
                if re.search(r"\{seg\}|\[\d|ignore all previous", question + text.replace("{seg}", ""), re.IGNORECASE):
                    problems.append(f"{label}: text")
                if (split == "test-few" and len(parts) > 3) or (split == "test-many" and len(parts) <= 3):
                    problems.append(f"{label}: {len(parts)} targets")
                for part in parts:
                    wanted = truth.get(part["id"])
                    if wanted is None or wanted["image_id"] != image["id"] or wanted["iscrowd"]:
                        problems.append(f"{label}: {part['id']} is no instance of it")
                    elif names[wanted["category_id"]] != part["category_name"] or not part["rephrased_name"].strip():
                        problems.append(f"{label}: {part['id']} is called {part['category_name']}")
                    elif not np.array_equal(*(_mask(one["segmentation"], image) for one in (part, wanted))):
                        problems.append(f"{label}: mask of {part['id']}")
    return problems


def _mask(segmentation: Any, image: dict[str, Any]) -> np.ndarray:
    codes = coco_mask.frPyObjects(segmentation, image["height"], image["width"])
    return np.asarray(coco_mask.decode(coco_mask.merge(codes) if isinstance(codes, list) else codes))


def fingerprint(out: Path) -> dict[str, str]:
    """SHA-256 of every file of the dataset; the work folder and the report's amounts are no part of it."""
    return {
        str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(out.rglob("*"))
        if path.is_file() and "work" not in path.parts and path.name != "report.json"
    }


def adds_up(report: Mapping[str, Any]) -> bool:
    """Whether the report's counts do: pairs asked = kept + dropped, pictures = selected + passed over."""
    kept = sum(split["pairs"] for split in report["splits"].values())
    pictures, pairs = report["pictures"], report["pairs"]
    return bool(
        pairs["kept"] == kept
        and pairs["asked"] == kept + sum(report["dropped"].values())
        and pictures["looked_at"] == pictures["selected"] + sum(report["passed_over"].values())
        and pictures["selected"] == pictures["asked"] + pictures["remaining"]
    )
