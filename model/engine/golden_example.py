"""A stored question with its answer, kept in a model folder: whoever loads the folder can check that it is that model.

Weights that were not loaded, or were loaded wrongly, still give words and masks; only a known answer tells.
"""

import base64
import difflib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pixellm.errors import ModelLoadError
from pixellm.model.engine.engine import PixelLMEngine
from pixellm.model.engine.types import SegmentationResult

FILE_NAME = "golden_example.json"

_MAX_NEW_TOKENS = 64
_LEAST_IOU = 0.9
_LEAST_IOU_OTHER_NUMBERS = 0.5
_LEAST_LIKENESS = 0.5


@dataclass(frozen=True)
class GoldenCheck:
    """What came of a check: whether the folder holds an example, and how near the answer was.

    Attributes:
        found: whether there is an example.
        least_iou: of a mask with its stored one, 0 to 1; 1 where there is none.
        same_text: whether the words are equal.
    """

    found: bool
    least_iou: float = 1.0
    same_text: bool = True


def write_golden_example(folder: str | Path, engine: PixelLMEngine, image_bytes: bytes, prompt: str) -> None:
    """Asks a question and keeps it with its answer in the model folder.

    Args:
        folder: model folder, as `from_pretrained` reads it.
        engine: that model.
        image_bytes: encoded picture; kept as it is, so a small one is better.
        prompt: the question.

    Raises:
        DataError: the picture or the prompt cannot be used.
    """
    result = engine.segment(image_bytes, prompt, max_new_tokens=_MAX_NEW_TOKENS)
    record = {
        "image": base64.b64encode(image_bytes).decode(),
        "prompt": prompt,
        "dtype": engine.options.dtype,
        "text": result.text,
        "masks": [target.rle for target in result.targets],
    }
    (Path(folder) / FILE_NAME).write_text(json.dumps(record), encoding="utf-8")


def check_golden_example(folder: str | Path, engine: PixelLMEngine) -> GoldenCheck:
    """Asks the stored question again and compares.

    With the numbers (dtype) that the example was made with, words must be equal and masks agree (IoU of at least 0.9:
    another machine rounds otherwise). With other numbers an answer may take another turn: half the words and half of
    each mask must agree.

    Raises:
        ModelLoadError: the answer is another one, or the file is damaged.
    """
    path = Path(folder) / FILE_NAME
    if not path.is_file():
        return GoldenCheck(found=False)
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        image_bytes, prompt = base64.b64decode(record["image"]), str(record["prompt"])
        text, rles, dtype = str(record["text"]), list(record["masks"]), record["dtype"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ModelLoadError(f"{path} is damaged; register the version again") from None
    result = engine.segment(image_bytes, prompt, max_new_tokens=_MAX_NEW_TOKENS)
    ious = [_iou(target.mask, rle) for target, rle in zip(result.targets, rles, strict=False)]
    check = GoldenCheck(True, min(ious, default=1.0), result.text == text)
    if not _is_same_model(check, result, text, len(rles), same_numbers=dtype == engine.options.dtype):
        raise ModelLoadError(
            f"the model does not answer its golden example: got {result.text[:80]!r} with "
            f"{len(result.targets)} masks (IoU {check.least_iou:.2f}), wanted {text[:80]!r} with {len(rles)}; its "
            "weights are not those it was registered with"
        )
    return check


def _is_same_model(
    check: GoldenCheck, result: SegmentationResult, text: str, num_masks: int, *, same_numbers: bool
) -> bool:
    if same_numbers:
        return check.same_text and len(result.targets) == num_masks and check.least_iou >= _LEAST_IOU
    likeness = difflib.SequenceMatcher(None, result.text.split(), text.split()).ratio()
    return likeness >= _LEAST_LIKENESS and check.least_iou >= _LEAST_IOU_OTHER_NUMBERS


def _iou(mask_HW: npt.NDArray[np.bool_], rle: dict[str, Any]) -> float:
    from pycocotools import mask as coco_mask

    other_HW = np.asarray(coco_mask.decode({"size": rle["size"], "counts": str(rle["counts"]).encode()}), dtype=bool)
    if other_HW.shape != mask_HW.shape:
        return 0.0
    union = int((mask_HW | other_HW).sum())
    return int((mask_HW & other_HW).sum()) / union if union else 1.0
