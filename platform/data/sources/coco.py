"""COCO instances (or anyone's data in that format), with captions as question–answer turns where there are any."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pixellm.errors import DataError
from pixellm.platform import storage
from pixellm.platform.data.phrases import position_phrases
from pixellm.platform.data.schema import SEG_MARKER, Row, RowDialogue, Target
from pixellm.platform.data.sources.base import (
    Ledger,
    Picture,
    license_names,
    read_json_object,
    read_mask,
    read_picture,
)
from pixellm.platform.masks import mask_area

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
class CocoSource:
    """`images/` + `instances.json` [+ `captions.json`], or the official `annotations/` and `val2017/` layout."""

    name: str = "coco"
    layout: str = (
        "images/ and instances.json (captions.json is optional); or, as downloaded, "
        "annotations/instances_SPLIT.json [annotations/captions_SPLIT.json] and SPLIT/"
    )

    def rows(self, input_uri: str, ledger: Ledger) -> Iterator[Row]:
        """Yields a row per picture that has a target or a caption, by ascending image id; see `Source.rows`."""
        files = _find_files(input_uri, self.layout)
        content = read_json_object(files.instances, ("images", "annotations", "categories"))
        categories = {entry["id"]: str(entry["name"]) for entry in content["categories"] if "id" in entry}
        licenses = license_names(content.get("licenses"))
        images = _unique(content["images"], "image", ("id", "file_name"), ledger)
        by_image = _by_image(_unique(content["annotations"], "annotation", ("id", "image_id"), ledger), images, ledger)
        captions = _read_captions(files.captions) if files.captions else {}
        ledger.total = len(images)
        for image_id in sorted(images, key=_id_order):
            image = images[image_id]
            ledger.looked_at_one()
            label = str(image["file_name"])
            uri = storage.join(files.pictures, label)
            picture = read_picture(uri, image.get("height"), image.get("width"), label, ledger)
            if picture is None:
                continue
            targets = _targets(by_image.get(image_id, ()), categories, picture, label, ledger)
            dialogues = _caption_dialogues(captions.get(image_id, ()), label, ledger)
            if not targets and not dialogues:
                ledger.leave_out("picture has neither target nor caption", label)
                continue
            yield Row(
                image_id=str(image_id),
                source=self.name,
                image=picture.encoded,
                height=picture.height,
                width=picture.width,
                license=licenses.get(image.get("license"), "unknown"),
                targets=targets,
                dialogues=dialogues,
            )


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


def _unique(entries: Sequence[Any], kind: str, needed: tuple[str, ...], ledger: Ledger) -> dict[Any, dict[str, Any]]:
    unique: dict[Any, dict[str, Any]] = {}
    for position, entry in enumerate(entries):
        if not isinstance(entry, dict) or any(not isinstance(entry.get(key), int | str) for key in needed):
            ledger.skip(f"{kind} entry lacks {' or '.join(needed)}", f"{kind} number {position}")
        elif entry["id"] in unique:
            ledger.skip(f"duplicate {kind} id", f"{kind} {entry['id']}")
        else:
            unique[entry["id"]] = entry
    return unique


def _by_image(
    annotations: Mapping[Any, dict[str, Any]], images: Mapping[Any, Any], ledger: Ledger
) -> dict[Any, list[dict[str, Any]]]:
    by_image: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for annotation in annotations.values():
        if annotation["image_id"] in images:
            by_image[annotation["image_id"]].append(annotation)
        else:
            detail = f"image_id {annotation['image_id']}"
            ledger.skip("annotation of an unlisted picture", f"annotation {annotation['id']}", detail)
    return by_image


def _targets(
    annotations: Sequence[dict[str, Any]],
    categories: Mapping[Any, str],
    picture: Picture,
    label: str,
    ledger: Ledger,
) -> tuple[Target, ...]:
    targets: list[Target] = []
    for annotation in annotations:
        name = f"{label} annotation {annotation['id']}"
        category = categories.get(annotation.get("category_id"))
        if category is None:
            ledger.skip("annotation of an unlisted category", name, f"category_id {annotation.get('category_id')}")
            continue
        mask_and_box = read_mask(annotation, picture, name, ledger)
        if mask_and_box is None:
            continue
        mask, box = mask_and_box
        targets.append(
            Target(
                target_id=str(annotation["id"]),
                category=category,
                phrase=category,
                box=box,
                mask=mask,
                area=mask_area(mask),
                is_ignore=bool(annotation.get("iscrowd")),
            )
        )
    return _with_phrases(targets, picture)


def _with_phrases(targets: list[Target], picture: Picture) -> tuple[Target, ...]:
    """Tells instances of one category apart by position, where no crowd region makes position ambiguous."""
    crowded = {target.category for target in targets if target.is_ignore}
    for category in {target.category for target in targets} - crowded:
        indices = [index for index, target in enumerate(targets) if target.category == category]
        boxes = [targets[index].box for index in indices]
        phrases = position_phrases(category, boxes, picture.height, picture.width)
        for index, phrase in zip(indices, phrases, strict=True):
            targets[index] = replace(targets[index], phrase=phrase)
    return tuple(targets)


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


def _caption_dialogues(captions: Sequence[str], label: str, ledger: Ledger) -> tuple[RowDialogue, ...]:
    dialogues: list[RowDialogue] = []
    for number, caption in enumerate(captions):
        if not caption or SEG_MARKER in caption:
            ledger.skip("caption is empty or holds a target marker", f"{label} caption {number}")
            continue
        question = CAPTION_QUESTIONS[number % len(CAPTION_QUESTIONS)]
        dialogues.append(RowDialogue(kind="vqa", question=question, answer=caption))
    return tuple(dialogues)


def _id_order(image_id: int | str) -> tuple[int, int, str]:
    return (0, image_id, "") if isinstance(image_id, int) else (1, 0, image_id)
