"""The released MUSE JSON: a folder that the `muse` source reads to the very rows that the shards hold.

A picture is an entry with its questions; an answer is a list of objects with polygons, box, class and rephrased name;
`text_answers` has `{seg}` where each object's mask belongs. Pictures are written beside it, and their licences.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

from pixellm.platform import storage
from pixellm.platform.data.schema import Row, RowDialogue, Target
from pixellm.platform.mask_polygons import rle_to_polygons
from pixellm.platform.masks import Box, Rle

MUSE_FILE = "muse.json"
_SUFFIXES = ((b"\x89PNG", ".png"), (b"RIFF", ".webp"))


def write_released(rows: Iterable[Row], uri: str | Path) -> None:
    """Writes `muse.json`, `images/` and `instances.json` (licences only) in one atomic step, a row in memory at a time.

    Raises:
        DataError: `uri` holds something else.
    """
    with storage.atomic_write_dir(uri, commit_file=MUSE_FILE) as folder:
        pictures = folder / "images"
        pictures.mkdir()
        licenses: dict[str, int] = {}
        images: list[dict[str, Any]] = []
        with (folder / MUSE_FILE).open("w", encoding="utf-8") as sink:
            for number, row in enumerate(rows):
                entry = released_entry(row)
                (pictures / entry["file_name"]).write_bytes(row.image)
                license_id = licenses.setdefault(row.license, len(licenses) + 1)
                images.append({"file_name": entry["file_name"], "license": license_id})
                _write_entry(sink, entry, is_first=number == 0)
            sink.write("\n]\n" if images else "[]\n")
        named = [{"id": number, "name": name, "url": ""} for name, number in licenses.items()]
        content = {"licenses": named, "images": images}
        (folder / "instances.json").write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")


def released_entry(row: Row) -> dict[str, Any]:
    """One picture with its questions in the released form."""
    dialogues = [dialogue for dialogue in row.dialogues if dialogue.kind == "muse"]
    drawn: dict[int, Any] = {}
    return {
        "file_name": file_name(row.image_id, row.image),
        "height": row.height,
        "width": row.width,
        "ann_list": [_as_number(target.target_id) for target in row.targets],
        "questions": [dialogue.question for dialogue in dialogues],
        "answers": [list(_objects(row, dialogue, drawn)) for dialogue in dialogues],
        "text_answers": [dialogue.answer for dialogue in dialogues],
    }


def file_name(image_id: str, encoded: bytes) -> str:
    """COCO's file name for a COCO id, else the id itself, made safe for any store."""
    suffix = next((suffix for magic, suffix in _SUFFIXES if encoded.startswith(magic)), ".jpg")
    if image_id.isascii() and image_id.isdigit() and str(int(image_id)) == image_id:
        return f"{int(image_id):012d}{suffix}"
    safe = re.sub(r"[^\w.-]", "_", image_id, flags=re.ASCII)[:80].strip(".")
    if safe != image_id or safe.isdigit():
        safe = f"{safe}-{hashlib.sha256(image_id.encode()).hexdigest()[:12]}"
    return safe + suffix


def _objects(row: Row, dialogue: RowDialogue, drawn: dict[int, Any]) -> Iterator[dict[str, Any]]:
    for index, phrase in zip(dialogue.target_ids, dialogue.phrases, strict=True):
        target = row.targets[index]
        if index not in drawn:
            drawn[index] = _segmentation(target)
        yield {
            "id": _as_number(target.target_id),
            "segmentation": drawn[index],
            "bbox": _corner_and_sides(target.box),
            "area": target.area,
            "category_name": target.category,
            "rephrased_name": phrase,
        }


def _segmentation(target: Target) -> list[list[float]] | dict[str, Any]:
    polygons = rle_to_polygons(target.mask)
    return polygons if polygons is not None else _as_text(target.mask)


def _as_number(target_id: str) -> int | str:
    return (
        int(target_id)
        if target_id.isascii() and target_id.isdigit() and str(int(target_id)) == target_id
        else target_id
    )


def _as_text(rle: Rle) -> dict[str, Any]:
    return {"size": rle["size"], "counts": rle["counts"].decode("ascii")}


def _corner_and_sides(box: Box) -> list[float]:
    x0, y0, x1, y1 = box
    return [x0, y0, x1 - x0, y1 - y0]


def _write_entry(sink: TextIO, entry: dict[str, Any], *, is_first: bool) -> None:
    sink.write(("[\n" if is_first else ",\n") + json.dumps(entry, ensure_ascii=False))
