"""Fixtures of the serving tests: pictures, a model that names targets, and one real service for the whole session."""

import io
import json
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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


def png_bytes(width: int = 8, height: int = 6, **save: Any) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (200, 40, 40)).save(buffer, "PNG", **save)
    return buffer.getvalue()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def chromium_path() -> str:
    for name in ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"):
        path = shutil.which(name)
        if path:
            return path
    pytest.fail("no Chromium on this machine: install Debian's package `chromium` (apt-get install -y chromium)")
