"""COCO instances (or anyone's data in that format), with captions as question–answer turns where there are any."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pixellm.errors import DataError
from pixellm.platform import storage
from pixellm.platform.data.schema import SEG_MARKER, Row, RowDialogue
from pixellm.platform.data.sources.base import Entry, Ledger, PictureSource, read_json_object
from pixellm.platform.data.sources.coco_format import (
    category_names,
    coco_pictures,
    coco_targets,
    read_entry,
    with_position_phrases,
)

#: What is asked about a picture whose answer is its caption.
CAPTION_QUESTIONS = (
    "What does this picture show?",
    "Can you describe this image in one sentence?",
    "What is going on in this photo?",
    "Please give a short description of the picture.",
    "What can be seen here?",
    "How would you caption this photograph?",
    "Tell me briefly what is in this image.",
    "What is this a picture of?",
)


@dataclass(frozen=True, slots=True)
class CocoSource(PictureSource):
    """`images/` + `instances.json` [+ `captions.json`], or the official `annotations/` and `val2017/` layout."""

    name: str = "coco"
    layout: str = (
        "images/ and instances.json (captions.json is optional); or, as downloaded, "
        "annotations/instances_SPLIT.json [annotations/captions_SPLIT.json] and SPLIT/"
    )

    def entries(self, input_uri: str, ledger: Ledger) -> Iterator[Entry]:
        """Yields an entry per listed picture, by ascending image id; see `PictureSource.entries`."""
        files = _find_files(input_uri, self.layout)
        content = read_json_object(files.instances, ("images", "annotations", "categories"))
        captions = _read_captions(files.captions) if files.captions else {}
        for picture in coco_pictures(content, category_names(content["categories"]), ledger):
            file_name = str(picture.image["file_name"])
            uri = storage.join(files.pictures, file_name)
            yield picture.entry(file_name, uri, captions=captions.get(picture.image["id"], []))

    def row(self, entry: Entry, ledger: Ledger) -> Row | None:
        """The picture, if it has a target or a caption; see `PictureSource.row`."""
        facts = entry.facts
        picture = read_entry(entry, ledger)
        if picture is None:
            return None
        targets = coco_targets(facts["annotations"], picture, entry.label, ledger)
        dialogues = caption_dialogues(facts["captions"], entry.label, ledger)
        if not targets and not dialogues:
            ledger.leave_out("picture has neither target nor caption", entry.label)
            return None
        told = with_position_phrases(targets, picture)
        return picture.row(str(facts["id"]), self.name, facts["license"], told, dialogues)


@dataclass(frozen=True, slots=True)
class _Files:
    instances: str
    captions: str | None
    pictures: str


def _find_files(input_uri: str, layout: str) -> _Files:
    if not storage.is_dir(input_uri):
        raise DataError(f"there is no folder {input_uri}; --in wants {layout}")
    instances, captions, pictures = (
        storage.join(input_uri, name) for name in ("instances.json", "captions.json", "images")
    )
    if not storage.exists(instances):
        annotations = storage.join(input_uri, "annotations")
        names = [name for name in storage.list_names(annotations) if name.startswith("instances_")]
        if len(names) != 1:
            found = f"annotations/ holds {', '.join(names)}" if names else "no instances.json"
            raise DataError(f"{input_uri}: {found}; --in wants {layout}, of one split")
        split = names[0].removeprefix("instances_").removesuffix(".json")
        instances = storage.join(annotations, names[0])
        captions = storage.join(annotations, f"captions_{split}.json")
        pictures = storage.join(input_uri, split)
    if not storage.is_dir(pictures):
        raise DataError(f"{input_uri}: the picture folder {pictures} is missing; --in wants {layout}")
    return _Files(instances, captions if storage.exists(captions) else None, pictures)


def _read_captions(uri: str) -> dict[Any, list[str]]:
    """COCO's captions by image id; a bare list of them is accepted too."""
    content = storage.read_json(uri)
    entries = content.get("annotations") if isinstance(content, dict) else content
    if not isinstance(entries, list):
        raise DataError(f"{uri} holds no list of captions; wanted COCO's captions file")
    captions: dict[Any, list[str]] = defaultdict(list)
    for position, entry in enumerate(entries):
        if not isinstance(entry, dict) or not isinstance(entry.get("caption"), str) or "image_id" not in entry:
            raise DataError(f"{uri}: entry {position} is no caption; wanted image_id and caption")
        captions[entry["image_id"]].append(" ".join(entry["caption"].split()))
    return captions


def caption_dialogues(captions: Sequence[str], label: str, ledger: Ledger) -> tuple[RowDialogue, ...]:
    """Captions as question–answer turns; a fault goes to the ledger."""
    dialogues: list[RowDialogue] = []
    for number, caption in enumerate(captions):
        if not caption or SEG_MARKER in caption:
            ledger.skip("caption is empty or holds a target marker", f"{label} caption {number}")
            continue
        question = CAPTION_QUESTIONS[number % len(CAPTION_QUESTIONS)]
        dialogues.append(RowDialogue(kind="vqa", question=question, answer=caption))
    return tuple(dialogues)
