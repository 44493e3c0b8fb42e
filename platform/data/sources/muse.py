"""MUSE in its released JSON: reasoning questions whose answers name several targets, each with its own mask."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from pixellm.errors import DataError
from pixellm.platform import storage
from pixellm.platform.data.schema import SEG_MARKER, Row, RowDialogue, Target
from pixellm.platform.data.sources.base import (
    Entry,
    Ledger,
    Picture,
    PictureSource,
    licenses_by_file,
    read_mask,
    read_picture,
)
from pixellm.platform.masks import mask_area


@dataclass(frozen=True, slots=True)
class MuseSource(PictureSource):
    """`muse.json` + `images/`; licences come from an `instances.json` beside them, where there is one."""

    name: str = "muse"
    layout: str = "images/ and muse.json (the released form: a list of pictures with questions and answers)"

    def entries(self, input_uri: str, ledger: Ledger) -> Iterator[Entry]:
        """Yields an entry per picture in the file's order; see `PictureSource.entries`."""
        entries = _read_entries(input_uri, self.layout)
        licenses = licenses_by_file(storage.join(input_uri, "instances.json"))
        ledger.total = len(entries)
        seen: set[str] = set()
        for number, entry in enumerate(entries):
            file_name = _file_name(entry)
            if file_name is None:
                ledger.skip("entry names no picture", f"entry {number}", "wanted file_name or coco_url")
                continue
            if file_name in seen:
                ledger.skip("duplicate picture", file_name)
                continue
            seen.add(file_name)
            facts = {"entry": entry, "license": licenses.get(file_name, "unknown")}
            yield Entry(file_name, (storage.join(input_uri, "images", file_name),), facts)

    def row(self, entry: Entry, ledger: Ledger) -> Row | None:
        """The picture with its questions, if one is kept; see `PictureSource.row`."""
        facts = entry.facts["entry"]
        picture = read_picture(entry.files[0], facts.get("height"), facts.get("width"), entry.label, ledger)
        if picture is None:
            return None
        targets, dialogues = _Collected.of(facts, picture, entry.label, ledger)
        if not dialogues:
            ledger.leave_out("picture keeps no question", entry.label)
            return None
        return picture.row(_image_id(entry.label), self.name, entry.facts["license"], targets, dialogues)


class _Collected:
    """The targets of one picture, each stored once however many answers name it."""

    def __init__(self, picture: Picture, label: str, ledger: Ledger) -> None:
        self._picture, self._label, self._ledger = picture, label, ledger
        self._index_of: dict[tuple[bytes, str], int] = {}
        self._targets: list[Target] = []

    @staticmethod
    def of(
        entry: Mapping[str, Any], picture: Picture, label: str, ledger: Ledger
    ) -> tuple[tuple[Target, ...], tuple[RowDialogue, ...]]:
        collected = _Collected(picture, label, ledger)
        questions, answers = _as_list(entry.get("questions")), _as_list(entry.get("answers"))
        texts = _as_list(entry.get("text_answers")) or [None] * len(questions)
        if not len(questions) == len(answers) == len(texts):
            detail = f"{len(questions)} questions, {len(answers)} answers, {len(texts)} text answers"
            ledger.skip("questions and answers do not pair up", label, detail)
            return (), ()
        dialogues = [
            collected._dialogue(question, _as_list(answer), text, f"{label} question {number}")
            for number, (question, answer, text) in enumerate(zip(questions, answers, texts, strict=True))
        ]
        return tuple(collected._targets), tuple(dialogue for dialogue in dialogues if dialogue is not None)

    def _dialogue(self, question: object, answer: Sequence[Any], text: object, name: str) -> RowDialogue | None:
        if not isinstance(question, str) or not question.strip() or SEG_MARKER in question:
            self._ledger.skip("question is empty or holds a target marker", name)
            return None
        if not answer or not all(isinstance(part, dict) for part in answer):
            self._ledger.skip("answer names no target", name)
            return None
        phrases = tuple(_phrase(part) for part in answer)
        words = _answer_text(text, phrases)
        if words.count(SEG_MARKER) != len(answer):
            detail = f"{words.count(SEG_MARKER)} markers, {len(answer)} targets"
            self._ledger.skip("answer's markers do not match its targets", name, detail)
            return None
        masks = [
            read_mask(part, self._picture, f"{name} target {index}", self._ledger) for index, part in enumerate(answer)
        ]
        if any(mask is None for mask in masks):
            self._ledger.leave_out("question lost a target", name)
            return None
        indices = tuple(
            self._target_index(part, phrase, *mask)
            for part, phrase, mask in zip(answer, phrases, masks, strict=True)
            if mask is not None
        )
        return RowDialogue("muse", " ".join(question.split()), words, indices, phrases)

    def _target_index(self, part: Mapping[str, Any], phrase: str, mask: Any, box: Any) -> int:
        category = str(part.get("category_name") or phrase)
        key = (mask["counts"], category)
        if key not in self._index_of:
            index = self._index_of[key] = len(self._targets)
            target_id = str(part.get("id", index))
            self._targets.append(Target(target_id, category, phrase, box, mask, mask_area(mask)))
        return self._index_of[key]


def _read_entries(input_uri: str, layout: str) -> list[dict[str, Any]]:
    if not storage.is_dir(input_uri):
        raise DataError(f"there is no folder {input_uri}; --in wants {layout}")
    uri = storage.join(input_uri, "muse.json")
    for part in (uri, storage.join(input_uri, "images")):
        if not storage.exists(part):
            raise DataError(f"{part} is missing; --in wants {layout}")
    entries = storage.read_json(uri)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise DataError(f"{uri} is not a list of objects; --in wants {layout}")
    return entries


def _file_name(entry: Mapping[str, Any]) -> str | None:
    """The picture's file name; the released file has it only as the last part of `coco_url` for most entries."""
    for key in ("file_name", "coco_url"):
        value = entry.get(key)
        if isinstance(value, str) and PurePosixPath(value).name:
            return PurePosixPath(value).name
    return None


def _image_id(file_name: str) -> str:
    """COCO's numeric id where the file name is one, so that the same picture has the same id in every source."""
    stem = PurePosixPath(file_name).stem
    return str(int(stem)) if stem.isascii() and stem.isdigit() else stem


def _phrase(part: Mapping[str, Any]) -> str:
    return " ".join(str(part.get("rephrased_name") or part.get("category_name") or "target").split())


def _answer_text(text: object, phrases: Sequence[str]) -> str:
    """The written answer, or, where there is none, one that lists the descriptions."""
    if isinstance(text, str) and text.strip():
        return " ".join(text.split())
    listed = ", ".join(f"{phrase} {SEG_MARKER}" for phrase in phrases)
    return f"{listed[:1].upper()}{listed[1:]}."


def _as_list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []
