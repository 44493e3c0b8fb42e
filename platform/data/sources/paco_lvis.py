"""PACO-LVIS: objects of 75 kinds with their parts, and the colours, patterns and materials of both."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any

from pixellm.platform.data.schema import Row, Target
from pixellm.platform.data.sources.base import Entry, Ledger, PictureSource, read_json_object
from pixellm.platform.data.sources.coco_format import (
    category_names,
    coco_pictures,
    coco_targets,
    read_entry,
    with_position_phrases,
)
from pixellm.platform.data.sources.lvis import (
    check_pictures,
    find_annotations,
    find_picture,
    ignore_incomplete,
    listed_names,
    plain_name,
)


@dataclass(frozen=True, slots=True)
class PacoLvisSource(PictureSource):
    """A part ("mug:handle") is the category "handle of the mug". An instance is named by an attribute ("red mug") where
    it alone of its category has it, else by position. Categories that a picture does not have annotated completely
    become ignore regions.
    """

    name: str = "paco_lvis"
    layout: str = "paco_lvis_v1_SPLIT.json (one, or --split), and COCO 2017's train2017/ and val2017/"
    split: str | None = None

    def entries(self, input_uri: str, ledger: Ledger) -> Iterator[Entry]:
        """Yields an entry per listed picture, by ascending image id; see `PictureSource.entries`."""
        uri = find_annotations(input_uri, "paco_lvis_", self.split, self.layout)
        content = read_json_object(uri, ("images", "annotations", "categories", "attributes"))
        names = {key: part_name(name) for key, name in category_names(content["categories"]).items()}
        attributes = {
            key: name.replace("_", " ")
            for key, name in category_names(content["attributes"]).items()
            if not name.startswith("other(")
        }
        check_pictures(input_uri, self.layout)
        for found in coco_pictures(content, names, ledger, annotation_fields=("attribute_ids", "dom_color_ids")):
            file_name = str(found.image["file_name"])
            yield found.entry(
                PurePosixPath(file_name).name,
                find_picture(input_uri, file_name),
                annotations=[_with_attributes(annotation, attributes) for annotation in found.annotations],
                incomplete=listed_names(found.image.get("not_exhaustive_category_ids"), names),
            )

    def row(self, entry: Entry, ledger: Ledger) -> Row | None:
        """The picture, if it has a target; see `PictureSource.row`."""
        facts = entry.facts
        picture = read_entry(entry, ledger)
        if picture is None:
            return None
        targets = coco_targets(facts["annotations"], picture, entry.label, ledger)
        targets = ignore_incomplete(targets, facts["incomplete"], entry.label, ledger)
        if not targets:
            ledger.leave_out("picture has no target", entry.label)
            return None
        words = {str(annotation["id"]): annotation["attributes"] for annotation in facts["annotations"]}
        told = _by_attribute(with_position_phrases(targets, picture), words)
        return picture.row(str(facts["id"]), self.name, facts["license"], told)


def part_name(name: str) -> str:
    """ "trash_can:inner_body" as "inner body of the trash can", "mug" as it is."""
    whole, colon, part = name.partition(":")
    return f"{plain_name(part.lstrip('_'))} of the {plain_name(whole)}" if colon else plain_name(name)


def _with_attributes(annotation: Mapping[str, Any], attributes: Mapping[Any, str]) -> dict[str, Any]:
    kept = {key: value for key, value in annotation.items() if key not in ("attribute_ids", "dom_color_ids")}
    ids = [*(annotation.get("dom_color_ids") or []), *(annotation.get("attribute_ids") or [])]
    return {**kept, "attributes": list(dict.fromkeys(listed_names(ids, attributes)))}


def _by_attribute(targets: tuple[Target, ...], words: Mapping[str, list[str]]) -> tuple[Target, ...]:
    """Names an instance by its first attribute that no other instance of its category has.

    Only where all of them have attributes: nothing is known about the others.
    """
    told = list(targets)
    crowded = {target.category for target in told if target.is_ignore}
    for category in {target.category for target in told} - crowded:
        indices = [index for index, target in enumerate(told) if target.category == category]
        own = [words.get(told[index].target_id, []) for index in indices]
        if len(indices) < 2 or not all(own):
            continue
        counts = Counter(word for listed in own for word in listed)
        for index, listed in zip(indices, own, strict=True):
            unique = next((word for word in listed if counts[word] == 1), None)
            if unique is not None:
                told[index] = replace(told[index], phrase=f"{unique} {category}")
    return tuple(told)
