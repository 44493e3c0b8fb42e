"""Pictures as other people's networks want them, without their image processors (which need torchvision)."""

import json
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALVES = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))

Statistics = tuple[tuple[float, float, float], tuple[float, float, float]]


def pixel_values(picture: Image.Image, size: tuple[int, int], statistics: Statistics) -> Tensor:
    """An RGB picture squeezed to `size` (rows, columns) and normalised: fp32 [1, 3, rows, columns]."""
    levels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255
    resized = F.interpolate(levels, size, mode="bilinear", antialias=True)
    mean, std = (torch.tensor(values)[:, None, None] for values in statistics)
    return (resized - mean) / std


def centre_square(picture: Image.Image, side: int, statistics: Statistics) -> Tensor:
    """The shorter side made `side`, the middle kept: fp32 [1, 3, side, side], as CLIP wants it."""
    scale = side / min(picture.size)
    width, height = (max(side, round(length * scale)) for length in picture.size)
    resized = picture.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - side) // 2, (height - side) // 2
    return pixel_values(resized.crop((left, top, left + side, top + side)), (side, side), statistics)


def size_within(picture: Image.Image, shortest: int, longest: int) -> tuple[int, int]:
    """Rows and columns with the shorter side `shortest`, unless the longer one would pass `longest`."""
    width, height = picture.size
    scale = min(shortest / min(width, height), longest / max(width, height))
    return max(1, round(height * scale)), max(1, round(width * scale))


def masks_at_size(logits_MHW: Tensor, size: tuple[int, int]) -> list[npt.NDArray[np.bool_]]:
    """Logits brought to `size` (rows, columns) bilinearly: bool masks where they are above 0."""
    if not len(logits_MHW):
        return []
    resized = F.interpolate(logits_MHW[:, None].float(), size, mode="bilinear", align_corners=False)[:, 0]
    return list((resized > 0).cpu().numpy())


def stored_size(folder: str | PathLike[str]) -> dict[str, Any]:
    """`size` of a folder's `preprocessor_config.json`; empty where it has none."""
    path = Path(folder) / "preprocessor_config.json"
    size = json.loads(path.read_text(encoding="utf-8")).get("size", {}) if path.is_file() else {}
    return size if isinstance(size, dict) else {"height": size, "width": size, "shortest_edge": size}
