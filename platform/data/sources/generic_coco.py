"""Anyone's own data in COCO's format, with an optional file of questions about it."""

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pixellm.errors import DataError
from pixellm.platform import storage
from pixellm.platform.data.schema import SEG_MARKER, Row, RowDialogue, Target
from pixellm.platform.data.sources.base import Entry, Ledger, PictureSource, read_json_object
from pixellm.platform.data.sources.coco_format import (
    category_names,
    coco_pictures,
    coco_targets,
    read_entry,
    with_position_phrases,
)

_ANNOTATION_FILES = ("annotations.json", "instances.json", "_annotations.coco.json")
_QUESTION_FILES = ("questions.jsonl", "questions.json")


@dataclass(frozen=True, slots=True)
class GenericCocoSource(PictureSource):
    """Pictures lie under images/ or beside the annotation file. A question is an object with `image` (its file name),
    `question`, `answer`, and, for each `{seg}` in the answer, an annotation's id in `targets` and optionally a
    description in `phrases`.
    """

    name: str = "generic_coco"
    layout: str = (
        "annotations.json (or instances.json, or _annotations.coco.json) in COCO's format, pictures in images/ or "
        "beside it [questions.jsonl or questions.json]"
    )

    def entries(self, input_uri: str, ledger: Ledger) -> Iterator[Entry]:
        """Yields an entry per listed picture, by ascending image id; see `PictureSource.entries`."""
        present = set(storage.list_names(input_uri))
        annotations = next((name for name in _ANNOTATION_FILES if name in present), None)
        if annotations is None:
            raise DataError(f"{input_uri} has no {' or '.join(_ANNOTATION_FILES)}; --in wants {self.layout}")
        content = read_json_object(storage.join(input_uri, annotations), ("images", "annotations", "categories"))
        questions_file = next((name for name in _QUESTION_FILES if name in present), None)
        questions = _read_questions(storage.join(input_uri, questions_file)) if questions_file else {}
        pictures = storage.join(input_uri, "images") if "images" in present else input_uri
        for found in coco_pictures(content, category_names(content["categories"]), ledger):
            file_name = str(found.image["file_name"])
            yield found.entry(file_name, storage.join(pictures, file_name), questions=questions.pop(file_name, []))
        for file_name in questions:
            ledger.skip("question about an unlisted picture", file_name)

    def row(self, entry: Entry, ledger: Ledger) -> Row | None:
        """The picture, if it has a target or a question; see `PictureSource.row`."""
        facts = entry.facts
        picture = read_entry(entry, ledger)
        if picture is None:
            return None
        targets = coco_targets(facts["annotations"], picture, entry.label, ledger)
        dialogues = [
            _dialogue(question, targets, f"{entry.label} question {number}", ledger)
            for number, question in enumerate(facts["questions"])
        ]
        kept = tuple(dialogue for dialogue in dialogues if dialogue is not None)
        if not targets and not kept:
            ledger.leave_out("picture has neither target nor question", entry.label)
            return None
        return picture.row(str(facts["id"]), self.name, facts["license"], with_position_phrases(targets, picture), kept)


def _dialogue(question: Mapping[str, Any], targets: Sequence[Target], name: str, ledger: Ledger) -> RowDialogue | None:
    words, answer = (" ".join(str(question.get(key) or "").split()) for key in ("question", "answer"))
    if not words or not answer or SEG_MARKER in words:
        ledger.skip("question or answer is empty, or the question holds a target marker", name)
        return None
    ids = question.get("targets") or []
    index_of = {target.target_id: index for index, target in enumerate(targets) if not target.is_ignore}
    if not isinstance(ids, list) or answer.count(SEG_MARKER) != len(ids):
        ledger.skip("answer's markers do not match its targets", name)
        return None
    if any(str(target_id) not in index_of for target_id in ids):
        ledger.skip("question needs a target that the picture does not have", name)
        return None
    indices = tuple(index_of[str(target_id)] for target_id in ids)
    phrases = question.get("phrases")
    if not isinstance(phrases, list) or len(phrases) != len(ids):
        phrases = [targets[index].category for index in indices]
    return RowDialogue("muse" if ids else "vqa", words, answer, indices, tuple(str(phrase) for phrase in phrases))


def _read_questions(uri: str) -> dict[str, list[dict[str, Any]]]:
    """Questions by picture file name.

    Raises:
        DataError: the file is not JSON, or an entry names no picture.
    """
    if uri.endswith(".jsonl"):
        lines = storage.read_bytes(uri).decode("utf-8", "replace").splitlines()
        entries: Any = [_json_line(uri, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    else:
        entries = storage.read_json(uri)
    if not isinstance(entries, list):
        raise DataError(f"{uri} holds no list of questions; wanted objects with image, question, answer, targets")
    by_image: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for number, entry in enumerate(entries, 1):
        if not isinstance(entry, dict) or not isinstance(entry.get("image"), str):
            raise DataError(f"{uri}: entry {number} names no picture; wanted image, question, answer, targets")
        by_image[entry["image"]].append(entry)
    return by_image


def _json_line(uri: str, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise DataError(f"{uri}: line {number} is not JSON ({error}); wanted one object per line") from None
