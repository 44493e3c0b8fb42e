"""What people say about answers, kept as COCO-format parts that a training set can be prepared from.

`FOLDER/part-TIME-PID-N/` holds `images/`, `instances.json` (masks that were right or corrected, the phrase as category)
and `feedback.jsonl` (every verdict with question, words and the version that answered). `pixellm data prepare coco --in
PART` reads a part as it is. Each ingress replica writes parts of its own, so that nothing has to be locked.
"""

import hashlib
import io
import json
import os
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from pixellm.errors import BadRequestError, ConfigError
from pixellm.platform.masks import MaskFault, Rle, mask_area, mask_box, rle_encode, try_segmentation_to_rle
from pixellm.serve.images import image_from_reference

_ANSWERS_PER_PART = 500
_SIDEWAYS = (5, 6, 7, 8)
_ORIENTATION = 0x0112


class TargetVerdict(BaseModel):
    """What somebody says about one target. `mask` is the one meant: as answered, or as corrected."""

    model_config = ConfigDict(extra="forbid")

    index: int = Field(ge=0, le=10_000)
    verdict: Literal["right", "wrong", "corrected"]
    phrase: str = Field("", max_length=500)
    mask: dict[str, Any] | list[list[float]] | str | None = Field(
        None, description="RLE {size, counts}, polygons [[x0, y0, …], …], or a 1-bit PNG as a data URL"
    )


class FeedbackBody(BaseModel):
    """`POST /v1/feedback`: an answer's id, a verdict per target, and the picture it was about."""

    model_config = ConfigDict(extra="forbid")

    answer_id: str = Field(pattern=r"^(seg|chatcmpl)-[0-9a-f]{32}$")
    model: str | None = Field(None, max_length=512)
    model_version: str = Field(max_length=128, description="X-Model-Version of the answer")
    image: str = Field(description="the picture as a data URL")
    prompt: str = Field(min_length=1, max_length=8000)
    text: str = Field("", max_length=20_000, description="the answer's words")
    corrected_text: str | None = Field(None, max_length=20_000)
    targets: list[TargetVerdict] = Field(default_factory=list, max_length=200)


class FeedbackStore:
    """Writes parts below a folder.

    Args:
        folder: where; made when absent.
        answers_per_part: a new part begins after so many (a part's file is written anew with each).

    Raises:
        ConfigError: the folder cannot be made.
    """

    def __init__(self, folder: str | Path, answers_per_part: int = _ANSWERS_PER_PART) -> None:
        self._folder = Path(folder).expanduser()
        self._answers_per_part = answers_per_part
        self._name = f"{int(time.time())}-{os.getpid()}"
        self._num_parts = 0
        self._num_answers = 0
        self._part = self._folder
        self._content: dict[str, list[dict[str, Any]]] = {}
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"cannot make serve.feedback_dir {folder}: {error.strerror}") from None

    def keep(self, body: FeedbackBody, image_bytes: bytes, caller: str) -> int:
        """Writes one feedback; blocking, for one thread at a time.

        Args:
            body: checked by its schema.
            image_bytes: the picture, its header checked.
            caller: who says so.

        Returns:
            How many masks of it can be trained on.

        Raises:
            BadRequestError: 422, a mask does not fit the picture.
        """
        with Image.open(io.BytesIO(image_bytes)) as picture:
            width, height = picture.size
            suffix = (picture.format or "bin").lower()
            if picture.getexif().get(_ORIENTATION, 1) in _SIDEWAYS:
                width, height = height, width
        masks = [_mask(verdict, number, height, width) for number, verdict in enumerate(body.targets)]
        self._open_part()
        name = f"{hashlib.blake2b(image_bytes, digest_size=16).hexdigest()}.{suffix}"
        _write_atomically(self._part / "images" / name, image_bytes)
        useful = [(verdict, rle) for verdict, rle in zip(body.targets, masks, strict=True) if rle is not None]
        if useful:
            self._add(name, height, width, useful, body)
        record = body.model_dump(exclude={"image"}) | {"image": name, "caller": caller, "time": time.time()}
        with (self._part / "feedback.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        _write_atomically(self._part / "instances.json", json.dumps(self._content).encode())
        self._num_answers += 1
        return len(useful)

    def _open_part(self) -> None:
        if self._content and self._num_answers < self._answers_per_part:
            return
        self._part = self._folder / f"part-{self._name}-{self._num_parts:04d}"
        (self._part / "images").mkdir(parents=True)
        self._num_parts += 1
        self._num_answers = 0
        self._content = {"images": [], "annotations": [], "categories": []}

    def _add(
        self, name: str, height: int, width: int, useful: list[tuple[TargetVerdict, Rle]], body: FeedbackBody
    ) -> None:
        images, annotations = self._content["images"], self._content["annotations"]
        image_id = len(images) + 1
        images.append({"id": image_id, "file_name": name, "height": height, "width": width})
        for verdict, rle in useful:
            x0, y0, x1, y1 = mask_box(rle) or (0.0, 0.0, 0.0, 0.0)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": self._category(verdict.phrase.strip() or "thing"),
                    "segmentation": {"size": rle["size"], "counts": rle["counts"].decode()},
                    "area": mask_area(rle),
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "iscrowd": 0,
                    "verdict": verdict.verdict,
                    "model_version": body.model_version,
                    "answer_id": body.answer_id,
                }
            )

    def _category(self, phrase: str) -> int:
        categories = self._content["categories"]
        for category in categories:
            if category["name"] == phrase:
                return int(category["id"])
        categories.append({"id": len(categories) + 1, "name": phrase})
        return len(categories)


def _mask(verdict: TargetVerdict, number: int, height: int, width: int) -> Rle | None:
    """The mask that a verdict stands for; None where there is nothing to learn from."""
    param = f"targets.{number}.mask"
    if verdict.verdict == "wrong":
        return None
    if verdict.mask is None:
        raise _unfit(f"a target that is {verdict.verdict} needs its mask", param)
    if isinstance(verdict.mask, str):
        return _mask_of_png(image_from_reference(verdict.mask, param=param), height, width, param)
    rle = try_segmentation_to_rle(verdict.mask, height, width)
    if isinstance(rle, MaskFault):
        raise _unfit(f"{rle.kind.value}: {rle.detail}", param)
    return rle


def _mask_of_png(encoded: bytes, height: int, width: int, param: str) -> Rle:
    try:
        with Image.open(io.BytesIO(encoded), formats=["PNG"]) as picture:
            if picture.size != (width, height):
                raise _unfit(f"the mask has {picture.size} pixels, the picture {(width, height)}", param)
            mask_HW = np.asarray(picture.convert("L")) > 127
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        raise _unfit("the mask is no PNG that can be read", param) from None
    if not mask_HW.any():
        raise _unfit("the mask is empty", param)
    return rle_encode(mask_HW)


def _unfit(message: str, param: str) -> BadRequestError:
    return BadRequestError(f"{param}: {message}", status_code=422, param=param, code="invalid_value")


def _write_atomically(path: Path, content: bytes) -> None:
    scratch = path.with_name(f".{path.name}.new")
    scratch.write_bytes(content)
    scratch.replace(path)
