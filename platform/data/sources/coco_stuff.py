"""COCO-Stuff's pixel maps: 80 things and 91 kinds of stuff, each class of a picture one target."""

from collections.abc import Iterator
from dataclasses import dataclass

from pixellm.errors import DataError
from pixellm.platform import storage
from pixellm.platform.data.schema import Row
from pixellm.platform.data.sources.base import Entry, Ledger, PictureSource, licenses_by_file
from pixellm.platform.data.sources.semantic import find_split, label_map_entries, label_map_row

_UNLABELLED = 255


@dataclass(frozen=True, slots=True)
class CocoStuffSource(PictureSource):
    """The maps store class id − 1. Names with a "-" ("wall-brick") are finer kinds that no one asks for by such a name:
    left out, as the released implementation does.
    """

    name: str = "coco_stuff"
    layout: str = (
        "images/SPLIT/ (train2017.zip, val2017.zip), annotations/SPLIT/ (stuffthingmaps_trainval2017.zip) and "
        "labels.txt [annotations/instances_SPLIT.json for licences]"
    )
    split: str | None = None

    def entries(self, input_uri: str, ledger: Ledger) -> Iterator[Entry]:
        """Yields an entry per picture of the split; see `PictureSource.entries`."""
        annotations = storage.join(input_uri, "annotations")
        split = find_split(annotations, self.split, self.layout)
        names = {
            value: name
            for value, name in _read_names(storage.join(input_uri, "labels.txt"), self.layout).items()
            if "-" not in name
        }
        pictures, labels = storage.join(input_uri, "images", split), storage.join(annotations, split)
        licenses = licenses_by_file(storage.join(annotations, f"instances_{split}.json"))
        yield from label_map_entries(pictures, labels, names, ledger, self.layout, licenses, "unknown")

    def row(self, entry: Entry, ledger: Ledger) -> Row | None:
        """The picture with a target per class; see `PictureSource.row`."""
        return label_map_row(entry, self.name, _UNLABELLED, ledger)


def _read_names(uri: str, layout: str) -> dict[int, str]:
    """`labels.txt` ("1: person", first "0: unlabeled") as pixel value → name."""
    if not storage.exists(uri):
        raise DataError(f"{uri} is missing; --in wants {layout}")
    names: dict[int, str] = {}
    for line in storage.read_bytes(uri).decode("utf-8", "replace").splitlines():
        number, colon, name = line.partition(":")
        if line.strip() and not (colon and number.strip().isdigit() and name.strip()):
            raise DataError(f"{uri}: {line[:60]!r} is no class; wanted lines as '1: person'")
        if line.strip() and int(number) > 0:
            names[int(number) - 1] = name.strip()
    return names
