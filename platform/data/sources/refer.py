"""The refCOCO series: expressions that people wrote for single instances (REFER), and gRefCOCO, whose expressions may
mean several instances or none. One reader for `refcoco`, `refcoco+`, `refcocog`, `refclef` and `grefcoco`.
"""

from collections import Counter, defaultdict
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pycocotools import mask as coco_mask

from pixellm.errors import DataError
from pixellm.platform import storage
from pixellm.platform.data.phrases import definite
from pixellm.platform.data.plain_pickle import load_plain_pickle
from pixellm.platform.data.schema import SEG_MARKER, Row, RowDialogue, Target
from pixellm.platform.data.sources.base import (
    Entry,
    Ledger,
    Picture,
    PictureSource,
    read_json_object,
    read_mask,
)
from pixellm.platform.data.sources.coco_format import category_names, coco_pictures, read_entry
from pixellm.platform.masks import MaskFault, mask_area, try_segmentation_to_rle

#: Where the picture folders of the official downloads are; the first that exists is taken.
PICTURE_FOLDERS = ("images/mscoco/images/train2014", "images/saiapr_tc-12", "train2014", "saiapr_tc-12", "images")


@dataclass(frozen=True, slots=True)
class ReferSource(PictureSource):
    """One dataset of the series, one split of it.

    Attributes:
        name: as on the command line, which is also its folder's name in REFER's layout.
        split: which pictures ("train", "val", "testA", …, as the file says).
        split_by: whose splits ("unc", "umd", "google", "berkeley"): the part of the file's name in brackets.
    """

    name: str
    layout: str
    split: str = "train"
    split_by: str = "unc"

    @property
    def _expressions_file(self) -> str:
        return f"grefs({self.split_by}).json" if self.name == "grefcoco" else f"refs({self.split_by}).p"

    def entries(self, input_uri: str, ledger: Ledger) -> Iterator[Entry]:
        """Yields an entry per picture of the split that has an expression, by ascending id."""
        folder, pictures = self._find_folders(input_uri)
        by_image = self._read_expressions(folder, ledger)
        content = read_json_object(storage.join(folder, "instances.json"), ("images", "annotations", "categories"))
        wanted_ids = {ann_id for refs in by_image.values() for ref in refs for ann_id in ref["ann_ids"]}
        content["images"] = [image for image in content["images"] if _is_wanted(image, by_image)]
        content["annotations"] = [entry for entry in content["annotations"] if _is_wanted(entry, wanted_ids)]
        for found in coco_pictures(content, category_names(content["categories"]), ledger):
            file_name = str(found.image["file_name"])
            yield found.entry(file_name, storage.join(pictures, file_name), refs=by_image.pop(found.image["id"]))
        for image_id, refs in by_image.items():
            for ref in refs:
                ledger.skip("expressions of an unlisted picture", f"ref {ref['id']}", f"image_id {image_id}")

    def row(self, entry: Entry, ledger: Ledger) -> Row | None:
        """The picture with its instances and a "referring" dialogue per expression."""
        facts = entry.facts
        picture = read_entry(entry, ledger)
        if picture is None:
            return None
        targets = _targets(facts["annotations"], picture, entry.label, ledger)
        dialogues = _dialogues(facts["refs"], list(targets), entry.label, ledger)
        if not dialogues:
            ledger.leave_out("picture keeps no expression", entry.label)
            return None
        told = _with_expressions(list(targets.values()), dialogues)
        return picture.row(str(facts["id"]), self.name, facts["license"], told, dialogues)

    def _find_folders(self, input_uri: str) -> tuple[str, str]:
        """The folders of the annotations and of the pictures."""
        if not storage.is_dir(input_uri):
            raise DataError(f"there is no folder {input_uri}; --in wants {self.layout}")
        nested = storage.join(input_uri, self.name)
        folder = nested if storage.is_dir(nested) else input_uri
        present = storage.list_names(folder)
        for part in (self._expressions_file, "instances.json"):
            if part not in present:
                others = ", ".join(name for name in present if "refs(" in name)
                hint = f" (there is {others}: see --split-by)" if others and part != "instances.json" else ""
                raise DataError(f"{storage.join(folder, part)} is missing{hint}; --in wants {self.layout}")
        for pictures in PICTURE_FOLDERS:
            if storage.is_dir(storage.join(input_uri, pictures)):
                return folder, storage.join(input_uri, pictures)
        raise DataError(f"{input_uri}: the picture folder is missing; --in wants {self.layout}")

    def _read_expressions(self, folder: str, ledger: Ledger) -> dict[Any, list[dict[str, Any]]]:
        """The split's expressions by image id: `id`, `ann_ids` (none: nothing in the picture fits), `sentences`."""
        uri = storage.join(folder, self._expressions_file)
        refs = storage.read_json(uri) if uri.endswith(".json") else load_plain_pickle(storage.read_bytes(uri), uri)
        if not isinstance(refs, list) or not all(isinstance(ref, dict) for ref in refs):
            raise DataError(f"{uri} is no list of expressions; --in wants {self.layout}")
        splits = sorted({str(ref.get("split")) for ref in refs})
        if self.split not in splits:
            raise DataError(f"{uri} has no split {self.split!r}; give --split {' or '.join(splits)}")
        by_image: dict[Any, list[dict[str, Any]]] = defaultdict(list)
        seen: set[Any] = set()
        for number, ref in enumerate(ref for ref in refs if str(ref.get("split")) == self.split):
            plain = _plain_ref(ref)
            if plain is None:
                ledger.skip("expression entry is malformed", f"entry {number} of split {self.split}")
            elif plain["id"] in seen:
                ledger.skip("duplicate ref id", f"ref {plain['id']}")
            else:
                seen.add(plain["id"])
                by_image[plain.pop("image_id")].append(plain)
        return by_image


def refer_sources() -> tuple[ReferSource, ...]:
    """The series, each with the splits that papers report."""
    return (
        ReferSource("refcoco", _layout("refcoco", "refs(unc).p")),
        ReferSource("refcoco+", _layout("refcoco+", "refs(unc).p")),
        ReferSource("refcocog", _layout("refcocog", "refs(umd).p"), split_by="umd"),
        ReferSource("refclef", _layout("refclef", "refs(unc).p", "images/saiapr_tc-12/")),
        ReferSource("grefcoco", _layout("grefcoco", "grefs(unc).json")),
    )


def _layout(name: str, expressions: str, pictures: str = "images/mscoco/images/train2014/") -> str:
    return f"{name}/{expressions} and {name}/instances.json, beside {pictures} (or train2014/, or images/)"


def _plain_ref(ref: Mapping[str, Any]) -> dict[str, Any] | None:
    """What is needed of an entry, in a form that JSON holds; None if it lacks some of it."""
    ann_ids = ref.get("ann_id")
    ann_ids = ann_ids if isinstance(ann_ids, list) else [ann_ids]
    ann_ids = [] if ref.get("no_target") or ann_ids == [-1] else ann_ids
    sentences = ref.get("sentences")
    ids_are_whole = all(isinstance(value, int) for value in (ref.get("ref_id"), ref.get("image_id"), *ann_ids))
    if not ids_are_whole or not isinstance(sentences, list):
        return None
    texts = [_field(sentence, "sent") or _field(sentence, "raw") or "" for sentence in sentences]
    plain = [" ".join(str(text).split()) for text in texts]
    return {"id": ref["ref_id"], "image_id": ref["image_id"], "ann_ids": ann_ids, "sentences": plain}


def _targets(
    annotations: Sequence[Mapping[str, Any]], picture: Picture, label: str, ledger: Ledger
) -> dict[int, Target]:
    """Targets by annotation id; what an expression means is a target even if it is marked as a crowd."""
    targets: dict[int, Target] = {}
    for annotation in annotations:
        name = f"{label} annotation {annotation['id']}"
        mask_and_box = read_mask(_with_one_code(annotation, picture), picture, name, ledger)
        if mask_and_box is not None:
            mask, box = mask_and_box
            category = annotation["category"]
            targets[annotation["id"]] = Target(str(annotation["id"]), category, category, box, mask, mask_area(mask))
    return targets


def _with_one_code(annotation: Mapping[str, Any], picture: Picture) -> Mapping[str, Any]:
    """refCLEF lists run-length codes where COCO has one: their union; what is faulty is left for the check."""
    listed = annotation.get("segmentation")
    if not isinstance(listed, list) or not listed or not all(isinstance(code, dict) for code in listed):
        return annotation
    codes = [try_segmentation_to_rle(code, picture.height, picture.width) for code in listed]
    sound = [code for code in codes if not isinstance(code, MaskFault)]
    first_fault = next((listed[index] for index, code in enumerate(codes) if isinstance(code, MaskFault)), None)
    return {**annotation, "segmentation": first_fault or coco_mask.merge(sound)}


def _dialogues(
    refs: Sequence[Mapping[str, Any]], ann_ids: Sequence[int], label: str, ledger: Ledger
) -> tuple[RowDialogue, ...]:
    index_of = {ann_id: index for index, ann_id in enumerate(ann_ids)}
    dialogues: dict[tuple[str, tuple[int, ...]], RowDialogue] = {}
    for ref in refs:
        name = f"{label} ref {ref['id']}"
        if any(ann_id not in index_of for ann_id in ref["ann_ids"]):
            ledger.skip("expressions without a usable mask", name, f"annotations {ref['ann_ids']}")
            continue
        indices = tuple(dict.fromkeys(index_of[ann_id] for ann_id in ref["ann_ids"]))
        if not ref["sentences"]:
            ledger.skip("entry without an expression", name)
        for text in ref["sentences"]:
            key = (text.casefold(), indices)
            if not text or SEG_MARKER in text:
                ledger.skip("expression is empty or holds a target marker", name)
            elif key in dialogues:
                ledger.leave_out("expression given twice for the same targets", name)
            else:
                dialogues[key] = RowDialogue("referring", text, "", indices, (text,) * len(indices))
    return tuple(dialogues.values())


def _with_expressions(targets: list[Target], dialogues: Sequence[RowDialogue]) -> tuple[Target, ...]:
    """Gives each target, as its phrase, its first expression that means no other target of the picture."""
    meant = Counter(dialogue.question.casefold() for dialogue in dialogues)
    phrases: dict[int, str] = {}
    for dialogue in dialogues:
        if len(dialogue.target_ids) == 1 and meant[dialogue.question.casefold()] == 1:
            phrases.setdefault(dialogue.target_ids[0], definite(dialogue.question))
    return tuple(
        Target(t.target_id, t.category, phrases.get(i, t.category), t.box, t.mask, t.area)
        for i, t in enumerate(targets)
    )


def _is_wanted(entry: object, ids: Container[Any]) -> bool:
    """Whether an entry has one of the ids; a malformed one is wanted too, so that it is counted."""
    entry_id = _field(entry, "id")
    return not isinstance(entry_id, int | str) or entry_id in ids


def _field(entry: object, key: str) -> Any:
    return entry.get(key) if isinstance(entry, dict) else None
