"""Fixtures of the serving tests: pictures, a model that names targets, and one real service for the whole session."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path.append(str(Path(__file__).parent))  # for `from fake_backend import …`


@pytest.fixture(scope="session")
def photo_path(demo_data: Path) -> Path:
    return demo_data / "images" / "000000196393.jpg"


@pytest.fixture(scope="session")
def photo_masks(demo_data: Path, photo_path: Path) -> dict[str, np.ndarray]:
    """Genuine masks [480, 640] of the photograph, by category (the first of each)."""
    from pixellm.platform.masks import rle_decode, segmentation_to_rle

    annotations = json.loads((demo_data / "instances.json").read_text())
    names = {category["id"]: category["name"] for category in annotations["categories"]}
    image = next(entry for entry in annotations["images"] if entry["file_name"] == photo_path.name)
    masks: dict[str, np.ndarray] = {}
    for annotation in annotations["annotations"]:
        if annotation["image_id"] == image["id"] and not annotation["iscrowd"]:
            rle = segmentation_to_rle(annotation["segmentation"], image["height"], image["width"])
            masks.setdefault(names[annotation["category_id"]], rle_decode(rle))
    return masks


@pytest.fixture(scope="session")
def photo(photo_path: Path) -> Image.Image:
    return Image.open(photo_path).convert("RGB")


@pytest.fixture(scope="session")
def talking_model(photo: Image.Image, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model folder that knows four answers about `photo` (`ANSWERS` in talking_model.py) word by word."""
    from talking_model import ANSWERS, as_turns, save_talking_model

    folder = tmp_path_factory.mktemp("models") / "talking"
    return save_talking_model(folder, [(photo, as_turns(conversation)) for conversation in ANSWERS])
