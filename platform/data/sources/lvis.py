"""LVIS v0.5 and v1: instances of 1,200 categories on COCO's pictures, with what is known to be absent."""

from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any

from pixellm.errors import DataError
from pixellm.platform import storage
from pixellm.platform.data.schema import Row, RowDialogue, Target
from pixellm.platform.data.sources.base import Entry, Ledger, PictureSource, read_json_object
from pixellm.platform.data.sources.coco_format import (
    category_names,
    coco_pictures,
    coco_targets,
    is_inside,
    read_entry,
    with_position_phrases,
)


@dataclass(frozen=True, slots=True)
class LvisSource(PictureSource):
    """Instances of categories that a picture does not have annotated completely become ignore regions: asked for by
    name, others than the annotated ones would be right too. Categories known to be absent become "absent" dialogues.
    """

    name: str = "lvis"
    layout: str = (
        "lvis_v1_SPLIT.json or lvis_v0.5_SPLIT.json (one, or --split), and COCO 2017's train2017/ and val2017/"
    )
    split: str | None = None

    def entries(self, input_uri: str, ledger: Ledger) -> Iterator[Entry]:
        """Yields an entry per listed picture, by ascending image id; see `PictureSource.entries`."""
        content = read_json_object(
            find_annotations(input_uri, "lvis_", self.split, self.layout), ("images", "annotations", "categories")
        )
        names = {key: plain_name(name) for key, name in category_names(content["categories"]).items()}
        check_pictures(input_uri, self.layout)
        for found in coco_pictures(content, names, ledger, image_fields=("id",)):
            file_name = picture_name(found.image)
            if file_name is None:
                ledger.skip(
                    "image entry names no picture", f"image {found.image['id']}", "wanted coco_url or file_name"
                )
                continue
            yield found.entry(
                PurePosixPath(file_name).name,
                find_picture(input_uri, file_name),
                absent=listed_names(found.image.get("neg_category_ids"), names),
                incomplete=listed_names(found.image.get("not_exhaustive_category_ids"), names),
            )

    def row(self, entry: Entry, ledger: Ledger) -> Row | None:
        """The picture, if it has a target; see `PictureSource.row`."""
        facts = entry.facts
        picture = read_entry(entry, ledger)
        if picture is None:
            return None
        targets = coco_targets(facts["annotations"], picture, entry.label, ledger)
        incomplete = set(facts["incomplete"])
        targets = ignore_incomplete(targets, incomplete, entry.label, ledger)
        if not targets:
            ledger.leave_out("picture has no target", entry.label)
            return None
        told = with_position_phrases(targets, picture)
        absent = absent_dialogues(facts["absent"], {target.category for target in targets} | incomplete)
        return picture.row(str(facts["id"]), self.name, facts["license"], told, absent)


def ignore_incomplete(
    targets: Iterable[Target], incomplete: Container[str], label: str, ledger: Ledger
) -> list[Target]:
    """Targets of categories that the picture has not annotated to the last one become ignore regions, and are noted."""
    kept: list[Target] = []
    for target in targets:
        if target.category in incomplete and not target.is_ignore:
            name = f"{label} annotation {target.target_id}"
            ledger.note("category is not annotated completely: an ignore region", name)
            target = replace(target, is_ignore=True)
        kept.append(target)
    return kept


def absent_dialogues(names: Iterable[str], present: Container[str]) -> tuple[RowDialogue, ...]:
    """A dialogue for each absent category; one that shares its name with a present one ("bow") is passed over."""
    return tuple(RowDialogue("absent", name, "") for name in dict.fromkeys(names) if name not in present)


def find_annotations(input_uri: str, prefix: str, split: str | None, layout: str) -> str:
    """The one annotation file whose name starts with the prefix (and ends with the split), here or in annotations/.

    Raises:
        DataError: there is none, or several.
    """
    if not storage.is_dir(input_uri):
        raise DataError(f"there is no folder {input_uri}; --in wants {layout}")
    for folder in (input_uri, storage.join(input_uri, "annotations")):
        names = [name for name in storage.list_names(folder) if name.startswith(prefix) and name.endswith(".json")]
        names = [name for name in names if split is None or name.removesuffix(".json").endswith(f"_{split}")]
        if len(names) == 1:
            return storage.join(folder, names[0])
        if names:
            raise DataError(f"{folder} holds {', '.join(names)}: choose one with --split; --in wants {layout}")
    wanted = f"{prefix}…_{split}.json" if split else f"{prefix}….json"
    raise DataError(f"{input_uri} has no {wanted}; --in wants {layout}")


def check_pictures(input_uri: str, layout: str) -> None:
    """Refuses a folder without any of COCO's picture folders.

    Raises:
        DataError: neither train2017/ nor val2017/ nor images/ is there.
    """
    if not any(storage.is_dir(storage.join(input_uri, name)) for name in ("train2017", "val2017", "images")):
        raise DataError(f"{input_uri} has neither train2017/ nor val2017/; --in wants {layout}")


def picture_name(image: Mapping[str, Any]) -> str | None:
    """FOLDER/FILE of a picture: v1 has it in `coco_url` only, v0.5 names files as COCO 2014 did."""
    url = image.get("coco_url")
    if isinstance(url, str) and len(PurePosixPath(url).parts) > 2:
        return "/".join(PurePosixPath(url).parts[-2:])
    name = image.get("file_name")
    return name.rpartition("_")[2] if isinstance(name, str) and name and is_inside(name) else None


def find_picture(input_uri: str, file_name: str) -> str:
    """URI of a picture: as named, else in train2017/, val2017/ or images/ (which may be absent)."""
    base = PurePosixPath(file_name).name
    wanted = storage.join(input_uri, file_name)
    others = [storage.join(input_uri, folder, base) for folder in ("train2017", "val2017", "images")]
    return next((uri for uri in (wanted, *others) if storage.exists(uri)), wanted)


def plain_name(name: str) -> str:
    """ "bow_(weapon)" as people say it: "bow"; underscores are spaces."""
    return name.partition("_(")[0].partition(" (")[0].replace("_", " ").strip()


def listed_names(ids: object, names: Mapping[Any, str]) -> list[str]:
    """Names of a list of category ids, unknown ones left out."""
    return [names[key] for key in ids if isinstance(key, int) and key in names] if isinstance(ids, list) else []
