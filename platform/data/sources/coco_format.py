"""What every dataset in COCO's JSON format shares: pictures with their annotations, and targets from annotations."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any

from pixellm.platform.data.phrases import position_phrases
from pixellm.platform.data.schema import Target
from pixellm.platform.data.sources.base import Entry, Ledger, Picture, license_names, read_mask, read_picture
from pixellm.platform.masks import mask_area

_FIELDS = ("id", "segmentation", "bbox", "iscrowd")


@dataclass(frozen=True, slots=True)
class CocoPicture:
    """A listed picture with its annotations.

    Attributes:
        image: its entry under `images`.
        license: name and URL, or "unknown".
        annotations: those of listed categories, in the file's order: `id`, `segmentation`, `bbox`, `iscrowd`, the
            further fields asked for, and the category's name under `category`.
    """

    image: dict[str, Any]
    license: str
    annotations: list[dict[str, Any]]

    def entry(self, label: str, uri: str, **facts: Any) -> Entry:
        """The picture's entry: what `read_entry` and `coco_targets` need; further facts add to it or replace."""
        own = {"id": self.image["id"], "license": self.license, "annotations": self.annotations}
        size = {side: self.image.get(side) for side in ("height", "width")}
        return Entry(label, (uri,), own | size | facts)


def read_entry(entry: Entry, ledger: Ledger) -> Picture | None:
    """Reads the picture of an entry that `CocoPicture` made; see `read_picture`."""
    return read_picture(entry.files[0], entry.facts["height"], entry.facts["width"], entry.label, ledger)


def coco_pictures(
    content: Mapping[str, Any],
    categories: Mapping[Any, str],
    ledger: Ledger,
    *,
    image_fields: tuple[str, ...] = ("id", "file_name"),
    annotation_fields: tuple[str, ...] = (),
) -> Iterator[CocoPicture]:
    """Joins `images` and `annotations`, by ascending image id; what is listed twice or nowhere goes to the ledger.

    Args:
        content: of the annotation file; `images` and `annotations` are lists.
        categories: names by category id.
        ledger: gets the faults, and the number of pictures as its total.
        image_fields: without which an entry under `images` is of no use.
        annotation_fields: further fields of annotations to keep.
    """
    licenses = license_names(content.get("licenses"))
    images = _unique(content["images"], "image", image_fields, ledger)
    annotations = _unique(content["annotations"], "annotation", ("id", "image_id"), ledger)
    by_image = _by_image(annotations.values(), images, ledger)
    ledger.total = len(images)
    for image_id in sorted(images, key=_id_order):
        image = images[image_id]
        kept: list[dict[str, Any]] = []
        for annotation in by_image.pop(image_id, ()):
            category = categories.get(annotation.get("category_id"))
            if category is None:
                name = f"{image.get('file_name', image_id)} annotation {annotation['id']}"
                ledger.skip("annotation of an unlisted category", name, f"category_id {annotation.get('category_id')}")
                continue
            fields = {key: annotation[key] for key in (*_FIELDS, *annotation_fields) if key in annotation}
            kept.append({**fields, "category": category})
        yield CocoPicture(image, licenses.get(image.get("license"), "unknown"), kept)


def category_names(categories: Iterable[Any]) -> dict[Any, str]:
    """COCO's `categories` as id → name."""
    return {
        entry["id"]: str(entry["name"])
        for entry in categories
        if isinstance(entry, dict) and {"id", "name"} <= entry.keys()
    }


def coco_targets(
    annotations: Iterable[Mapping[str, Any]], picture: Picture, label: str, ledger: Ledger
) -> list[Target]:
    """Targets from annotations as `CocoPicture` holds them; a crowd region becomes an ignore region."""
    targets: list[Target] = []
    for annotation in annotations:
        mask_and_box = read_mask(annotation, picture, f"{label} annotation {annotation['id']}", ledger)
        if mask_and_box is None:
            continue
        mask, box = mask_and_box
        category = annotation["category"]
        is_ignore = bool(annotation.get("iscrowd"))
        targets.append(Target(str(annotation["id"]), category, category, box, mask, mask_area(mask), is_ignore))
    return targets


def with_position_phrases(targets: Sequence[Target], picture: Picture) -> tuple[Target, ...]:
    """Tells instances of one category apart by position, where no crowd region makes position ambiguous."""
    told = list(targets)
    crowded = {target.category for target in told if target.is_ignore}
    for category in {target.category for target in told} - crowded:
        indices = [index for index, target in enumerate(told) if target.category == category]
        boxes = [told[index].box for index in indices]
        phrases = position_phrases(category, boxes, picture.height, picture.width)
        for index, phrase in zip(indices, phrases, strict=True):
            told[index] = replace(told[index], phrase=phrase)
    return tuple(told)


def is_inside(file_name: str) -> bool:
    """Whether a relative file name stays in its folder: an annotation file may not name any file of the machine."""
    path = PurePosixPath(file_name)
    return not path.is_absolute() and ".." not in path.parts and "\\" not in file_name and bool(path.parts)


def _unique(entries: Sequence[Any], kind: str, needed: tuple[str, ...], ledger: Ledger) -> dict[Any, dict[str, Any]]:
    unique: dict[Any, dict[str, Any]] = {}
    for position, entry in enumerate(entries):
        if not isinstance(entry, dict) or any(not isinstance(entry.get(key), int | str) for key in needed):
            ledger.skip(f"{kind} entry lacks {' or '.join(needed)}", f"{kind} number {position}")
        elif entry["id"] in unique:
            ledger.skip(f"duplicate {kind} id", f"{kind} {entry['id']}")
        elif "file_name" in entry and not is_inside(str(entry["file_name"])):
            ledger.skip("file name leaves the picture folder", f"{kind} {entry['id']}", str(entry["file_name"]))
        else:
            unique[entry["id"]] = entry
    return unique


def _by_image(
    annotations: Iterable[dict[str, Any]], images: Mapping[Any, Any], ledger: Ledger
) -> dict[Any, list[dict[str, Any]]]:
    by_image: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for annotation in annotations:
        if annotation["image_id"] in images:
            by_image[annotation["image_id"]].append(annotation)
        else:
            detail = f"image_id {annotation['image_id']}"
            ledger.skip("annotation of an unlisted picture", f"annotation {annotation['id']}", detail)
    return by_image


def _id_order(image_id: int | str) -> tuple[int, int, str]:
    return (0, image_id, "") if isinstance(image_id, int) else (1, 0, image_id)
