"""ReasonSeg (published with LISA): one target per picture, asked for by questions that need reasoning or by phrases.

Its polygons are painted over one another, the largest first, as LISA does: a smaller "ignore" polygon cuts a hole into
a "target" that was painted before. What is left of the ignore polygons is kept as an ignore region.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pixellm.errors import DataError
from pixellm.platform import storage
from pixellm.platform.data.schema import SEG_MARKER, Row, RowDialogue, Target
from pixellm.platform.data.sources.base import Entry, Ledger, Picture, PictureSource, read_picture
from pixellm.platform.data.sources.picture_ids import picture_id
from pixellm.platform.masks import (
    BoolMask,
    MaskFault,
    MaskFaultKind,
    mask_area,
    mask_box,
    rle_decode,
    rle_encode,
    try_segmentation_to_rle,
)

#: What stands where the annotation has no words for the target.
TARGET_NAME = "target"
#: The whole answer to a question of which only the mask is known.
ANSWER = f"It is {SEG_MARKER}."


@dataclass(frozen=True, slots=True)
class ReasonSegSource(PictureSource):
    """`train/`, `val/` or `test/` with a JPEG and a JSON of the same name for each picture."""

    name: str = "reasonseg"
    layout: str = "train/, val/ or test/, each holding X.jpg and X.json side by side"
    split: str = "train"

    def entries(self, input_uri: str, ledger: Ledger) -> Iterator[Entry]:
        """Yields an entry per JSON of the split, by name."""
        if not storage.is_dir(input_uri):
            raise DataError(f"there is no folder {input_uri}; --in wants {self.layout}")
        folder = storage.join(input_uri, self.split)
        if not storage.is_dir(folder):
            there = ", ".join(name for name in storage.list_names(input_uri) if "." not in name) or "no folder"
            raise DataError(f"{folder} is missing, there is {there}; give --split, or as --in {self.layout}")
        names = storage.list_names(folder)
        stems = [name.removesuffix(".json") for name in names if name.endswith(".json")]
        if not stems:
            raise DataError(f"{folder} holds no JSON; --in wants {self.layout}")
        for name in names:
            if name.endswith(".jpg") and f"{name.removesuffix('.jpg')}.json" not in names:
                ledger.skip("picture without an annotation", name)
        ledger.total = len(stems)
        for stem in stems:
            files = (storage.join(folder, f"{stem}.jpg"), storage.join(folder, f"{stem}.json"))
            yield Entry(f"{stem}.jpg", files, {})

    def row(self, entry: Entry, ledger: Ledger) -> Row | None:
        """The picture with its target, an ignore region where there is one, and a dialogue per wording."""
        picture = read_picture(entry.files[0], None, None, entry.label, ledger)
        annotation = None if picture is None else _read_annotation(entry, ledger)
        if picture is None or annotation is None:
            return None
        painted = _paint(annotation["shapes"], picture, entry.label, ledger)
        if painted is None:
            return None
        dialogues = _dialogues(annotation, entry.label, ledger)
        if not dialogues:
            ledger.leave_out("picture keeps no question", entry.label)
            return None
        target_HW, ignored_HW = painted
        targets = [_target("0", target_HW, is_ignore=False)]
        if ignored_HW.any():
            targets.append(_target("1", ignored_HW, is_ignore=True))
        return picture.row(picture_id(entry.label), self.name, "unknown", targets, dialogues)


def _read_annotation(entry: Entry, ledger: Ledger) -> dict[str, Any] | None:
    """The JSON, in UTF-8 or, as some of the published files are, in Windows' encoding."""
    content = storage.read_bytes(entry.files[1])
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        text = content.decode("cp1252", errors="replace")
    try:
        annotation = json.loads(text)
    except json.JSONDecodeError as error:
        ledger.skip("annotation is not JSON", entry.label, str(error))
        return None
    if not isinstance(annotation, dict) or not all(isinstance(annotation.get(key), list) for key in ("text", "shapes")):
        ledger.skip("annotation lacks text or shapes", entry.label)
        return None
    return annotation


def _paint(shapes: Sequence[Any], picture: Picture, label: str, ledger: Ledger) -> tuple[BoolMask, BoolMask] | None:
    """The target's and the ignored pixels (H×W each); None if a polygon is faulty or nothing of the target is left."""
    layers: list[tuple[str, BoolMask]] = []
    for number, shape in enumerate(shapes):
        name, points, kind = f"{label} shape {number}", None, None
        if isinstance(shape, dict):
            points, kind = shape.get("points"), shape.get("label")
        if kind == "flag":
            continue
        rle = try_segmentation_to_rle([_flat(points)], picture.height, picture.width)
        if kind not in ("target", "ignore"):
            ledger.skip("shape is neither target nor ignore", name, str(kind))
        elif isinstance(rle, MaskFault):
            note = ledger.refuse_mask if rle.kind is MaskFaultKind.OUTSIDE else ledger.skip
            note(rle.kind.value, name, rle.detail)
            if rle.kind is MaskFaultKind.DEGENERATE:
                continue
        else:
            layers.append((kind, rle_decode(rle)))
            continue
        ledger.leave_out("picture lost a polygon", label)
        return None
    target_HW, ignored_HW = np.zeros((2, picture.height, picture.width), dtype=bool)
    for kind, mask_HW in sorted(layers, key=lambda layer: -int(layer[1].sum())):
        target_HW[mask_HW], ignored_HW[mask_HW] = kind == "target", kind == "ignore"
    if not target_HW.any():
        ledger.skip("nothing of the target can be seen", label)
        return None
    return target_HW, ignored_HW


def _flat(points: Any) -> Any:
    """[[x, y], …] as [x, y, …]; anything else as it is, for the check."""
    is_list = isinstance(points, list) and all(isinstance(point, list) and len(point) == 2 for point in points)
    return [value for point in points for value in point] if is_list else points


def _target(target_id: str, mask_HW: BoolMask, *, is_ignore: bool) -> Target:
    rle = rle_encode(mask_HW)
    box = mask_box(rle) or (0.0, 0.0, 0.0, 0.0)
    return Target(target_id, TARGET_NAME, TARGET_NAME, box, rle, mask_area(rle), is_ignore)


def _dialogues(annotation: dict[str, Any], label: str, ledger: Ledger) -> tuple[RowDialogue, ...]:
    """A sentence is a whole question ("muse"); a phrase describes the target and is put into a question later."""
    dialogues: dict[str, RowDialogue] = {}
    for number, wording in enumerate(annotation["text"]):
        text = " ".join(str(wording).split())
        if not text or SEG_MARKER in text:
            ledger.skip("question is empty or holds a target marker", f"{label} text {number}")
        elif text.casefold() in dialogues:
            ledger.leave_out("question given twice", f"{label} text {number}")
        elif annotation.get("is_sentence"):
            dialogues[text.casefold()] = RowDialogue("muse", text, ANSWER, (0,), (TARGET_NAME,))
        else:
            dialogues[text.casefold()] = RowDialogue("referring", text, "", (0,), (text,))
    return tuple(dialogues.values())
