"""ADE20K's scene-parsing benchmark (ADEChallengeData2016): 150 classes as pixel maps, each of a picture one target."""

from collections.abc import Iterator
from dataclasses import dataclass

from pixellm.errors import DataError
from pixellm.platform import storage
from pixellm.platform.data.schema import Row
from pixellm.platform.data.sources.base import Entry, Ledger, PictureSource
from pixellm.platform.data.sources.semantic import find_split, label_map_entries, label_map_row

_UNLABELLED = 0
_LICENSE = "ADE20K terms of use https://ade20k.csail.mit.edu/terms/"


@dataclass(frozen=True, slots=True)
class Ade20kSource(PictureSource):
    """Value 0 is no class; 1 … 150 are named by objectInfo150.txt, of whose synonyms the first is taken."""

    name: str = "ade20k"
    layout: str = "images/SPLIT/, annotations/SPLIT/ and objectInfo150.txt, as in ADEChallengeData2016.zip"
    split: str | None = None

    def entries(self, input_uri: str, ledger: Ledger) -> Iterator[Entry]:
        """Yields an entry per picture of the split; see `PictureSource.entries`."""
        annotations = storage.join(input_uri, "annotations")
        split = find_split(annotations, self.split, self.layout)
        names = _read_names(storage.join(input_uri, "objectInfo150.txt"), self.layout)
        pictures, labels = storage.join(input_uri, "images", split), storage.join(annotations, split)
        yield from label_map_entries(pictures, labels, names, ledger, self.layout, {}, _LICENSE)

    def row(self, entry: Entry, ledger: Ledger) -> Row | None:
        """The picture with a target per class; see `PictureSource.row`."""
        return label_map_row(entry, self.name, _UNLABELLED, ledger)


def _read_names(uri: str, layout: str) -> dict[int, str]:
    """`objectInfo150.txt` (tabs; first column Idx, last Name) as pixel value → name."""
    if not storage.exists(uri):
        raise DataError(f"{uri} is missing; --in wants {layout}")
    lines = storage.read_bytes(uri).decode("utf-8", "replace").splitlines()[1:]
    rows = [line.split("\t") for line in lines if line.strip()]
    if not rows or not all(len(row) > 1 and row[0].strip().isdigit() for row in rows):
        raise DataError(f"{uri} is not ADE20K's table of classes; wanted columns Idx … Name, separated by tabs")
    return {int(row[0]): row[-1].partition(",")[0].strip() for row in rows}
