"""PASCAL-Part: objects of PASCAL VOC 2010 with their parts, from the official MATLAB files."""

import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from scipy.io import loadmat
from scipy.io.matlab import MatReadError

from pixellm.errors import DataError
from pixellm.platform import storage
from pixellm.platform.data.schema import Row, Target
from pixellm.platform.data.sources.base import Entry, Ledger, Picture, PictureSource, read_picture
from pixellm.platform.data.sources.coco_format import with_position_phrases
from pixellm.platform.masks import mask_box, rle_encode

_LICENSE = "PASCAL VOC 2010 (Flickr terms) http://host.robots.ox.ac.uk/pascal/VOC/voc2010/"
_MAT_ERRORS = (OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError, EOFError, MatReadError)
_CLASSES = {
    "aeroplane": "airplane",
    "motorbike": "motorcycle",
    "pottedplant": "potted plant",
    "tvmonitor": "tv monitor",
}
_WORDS = {
    "pa": "paw", "ho": "hoof", "lleg": "lower leg", "uleg": "upper leg", "larm": "lower arm", "uarm": "upper arm",
    "ebrow": "eyebrow", "liplate": "license plate", "frontside": "front side", "leftside": "left side",
    "rightside": "right side", "backside": "back side", "roofside": "roof",
}  # fmt: skip
_SIDES = {"l": "left", "r": "right", "f": "front", "b": "back"}
_PAIRED = "eye|ear|horn|wing|leg|foot|hand|ebrow|uarm|larm|uleg|lleg|fleg|fpa|bleg|bpa|fuleg|flleg|buleg|blleg|fho|bho"


@dataclass(frozen=True, slots=True)
class PascalPartSource(PictureSource):
    """Each object and each of its parts is a target; a part ("lfleg" of a dog) is "left front leg of the dog"."""

    name: str = "pascal_part"
    layout: str = (
        "Annotations_Part/ (trainval.tar.gz of PASCAL-Part) and JPEGImages/ or VOCdevkit/VOC2010/JPEGImages/ "
        "(VOCtrainval_03-May-2010.tar)"
    )

    def entries(self, input_uri: str, ledger: Ledger) -> Iterator[Entry]:
        """Yields an entry per annotation file, by name; see `PictureSource.entries`."""
        annotations = storage.join(input_uri, "Annotations_Part")
        folders = [storage.join(input_uri, name) for name in ("JPEGImages", "VOCdevkit/VOC2010/JPEGImages")]
        pictures = next((uri for uri in folders if storage.is_dir(uri)), None)
        if not storage.is_dir(annotations) or pictures is None:
            missing = "JPEGImages/" if storage.is_dir(annotations) else "Annotations_Part/"
            raise DataError(f"{input_uri} has no {missing}; --in wants {self.layout}")
        names = [name for name in storage.list_names(annotations) if name.endswith(".mat")]
        ledger.total = len(names)
        for name in names:
            stem = PurePosixPath(name).stem
            yield Entry(f"{stem}.jpg", (storage.join(pictures, f"{stem}.jpg"), storage.join(annotations, name)), {})

    def row(self, entry: Entry, ledger: Ledger) -> Row | None:
        """The picture, if it has a target; see `PictureSource.row`."""
        picture = read_picture(entry.files[0], None, None, entry.label, ledger)
        if picture is None:
            return None
        try:
            named = list(_masks(storage.read_bytes(entry.files[1])))
        except _MAT_ERRORS as error:
            ledger.skip("annotation file is not PASCAL-Part's", entry.label, str(error))
            return None
        targets = [
            target
            for number, (name, mask) in enumerate(named)
            if (target := _target(number, name, mask, picture, entry.label, ledger)) is not None
        ]
        if not targets:
            ledger.leave_out("picture has no target", entry.label)
            return None
        told = with_position_phrases(targets, picture)
        return picture.row(PurePosixPath(entry.label).stem, self.name, _LICENSE, told)


def part_words(part: str) -> str:
    """PASCAL-Part's short names in words: "lfleg" → "left front leg", "wheel_2" → "wheel"."""
    name = re.sub(r"_?\d+$", "", part)
    sides: list[str] = []
    if re.fullmatch(f"[lr](?:{_PAIRED})", name):
        sides, name = [_SIDES[name[0]]], name[1:]
    if re.fullmatch("[fb](?:leg|pa|ho|uleg|lleg|wheel|liplate)", name):
        sides, name = [*sides, _SIDES[name[0]]], name[1:]
    if re.fullmatch("[lr]?(?:left|right)mirror", name):
        return f"{name.removesuffix('mirror')} mirror"
    if re.fullmatch("[hc](?:front|left|right|back|roof)side", name):
        whole = "head" if name[0] == "h" else "coach"
        return f"{_WORDS[name[1:]]} of the {whole}"
    return " ".join([*sides, _WORDS.get(name, name)])


def _masks(content: bytes) -> Iterator[tuple[str, Any]]:
    """(name, mask H×W) of each object, followed by its parts."""
    anno = loadmat(io.BytesIO(content), squeeze_me=True, struct_as_record=False)["anno"]
    for thing in np.atleast_1d(anno.objects):
        whole = _CLASSES.get(str(getattr(thing, "class")), str(getattr(thing, "class")))
        yield whole, thing.mask
        for part in np.atleast_1d(thing.parts):
            yield f"{part_words(str(part.part_name))} of the {whole}", part.mask


def _target(number: int, name: str, mask: Any, picture: Picture, label: str, ledger: Ledger) -> Target | None:
    mask_HW = np.asarray(mask)
    where = f"{label} {name} (mask {number})"
    if mask_HW.shape != (picture.height, picture.width):
        detail = f"shape {mask_HW.shape}, the picture is {picture.height}×{picture.width}"
        ledger.refuse_mask("mask outside its picture", where, detail)
        return None
    rle = rle_encode(mask_HW > 0)
    box = mask_box(rle)
    if box is None:
        ledger.skip("degenerate mask", where, "it covers no pixel")
        return None
    return Target(str(number), name, name, box, rle, int(np.count_nonzero(mask_HW)))
