"""Mapillary Vistas (v2.0 or v1.2) as pixel maps: each class of a street scene is one target."""

from collections.abc import Iterator
from dataclasses import dataclass

from pixellm.errors import DataError
from pixellm.platform import storage
from pixellm.platform.data.schema import Row
from pixellm.platform.data.sources.base import Entry, Ledger, PictureSource, read_json_object
from pixellm.platform.data.sources.semantic import label_map_entries, label_map_row

_LICENSE = "CC BY-NC-SA 4.0 https://creativecommons.org/licenses/by-nc-sa/4.0/"
_NO_VALUE = -1


@dataclass(frozen=True, slots=True)
class MapillarySource(PictureSource):
    """A class's pixel value is its place in the configuration's list; classes that are not evaluated are left out."""

    name: str = "mapillary"
    layout: str = (
        "SPLIT/images/ with config_v2.0.json and SPLIT/v2.0/labels/ (or config_v1.2.json / config.json and "
        "SPLIT/v1.2/labels/ / SPLIT/labels/), SPLIT being training or validation, as Mapillary Vistas unpacks"
    )
    split: str = "training"

    def entries(self, input_uri: str, ledger: Ledger) -> Iterator[Entry]:
        """Yields an entry per picture of the split; see `PictureSource.entries`."""
        config, labels = self._find_version(input_uri)
        classes = read_json_object(config, ("labels",))["labels"]
        names = {
            value: str(entry["readable"]).lower()
            for value, entry in enumerate(classes)
            if isinstance(entry, dict) and "readable" in entry and entry.get("evaluate", True)
        }
        pictures = storage.join(input_uri, self.split, "images")
        yield from label_map_entries(pictures, labels, names, ledger, self.layout, {}, _LICENSE)

    def row(self, entry: Entry, ledger: Ledger) -> Row | None:
        """The picture with a target per class; see `PictureSource.row`."""
        return label_map_row(entry, self.name, _NO_VALUE, ledger)

    def _find_version(self, input_uri: str) -> tuple[str, str]:
        for config, labels in (
            ("config_v2.0.json", ("v2.0", "labels")),
            ("config_v1.2.json", ("v1.2", "labels")),
            ("config.json", ("labels",)),
        ):
            if storage.exists(storage.join(input_uri, config)):
                return storage.join(input_uri, config), storage.join(input_uri, self.split, *labels)
        raise DataError(f"{input_uri} has no config_v2.0.json; --in wants {self.layout}")
