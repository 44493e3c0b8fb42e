"""What the semantic sets share: a one-channel PNG whose pixel values are classes; each class present is one target."""

import io
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath

import numpy as np
import numpy.typing as npt
from PIL import Image

from pixellm.errors import DataError
from pixellm.platform import storage
from pixellm.platform.data.schema import Row, Target
from pixellm.platform.data.sources.base import DECODE_ERRORS, Entry, Ledger, Picture, read_picture
from pixellm.platform.masks import mask_box, rle_encode


def find_split(folder_uri: str, split: str | None, layout: str) -> str:
    """The split to read: the one asked for, or the only folder there.

    Raises:
        DataError: it is not there, or there are several to choose from.
    """
    names = [name for name in storage.list_names(folder_uri) if storage.is_dir(storage.join(folder_uri, name))]
    if split is not None and split not in names:
        raise DataError(
            f"{folder_uri} has no folder {split} (it has {', '.join(names) or 'none'}); --in wants {layout}"
        )
    if split is None and len(names) != 1:
        found = f"holds {', '.join(names)}: choose one with --split" if names else "is missing or has no split"
        raise DataError(f"{folder_uri} {found}; --in wants {layout}")
    return split or names[0]


def label_map_entries(
    pictures_uri: str,
    labels_uri: str,
    names: Mapping[int, str],
    ledger: Ledger,
    layout: str,
    licenses: Mapping[str, str],
    default_license: str,
) -> Iterator[Entry]:
    """Yields an entry per picture that has a label map, by name; one without its counterpart goes to the ledger.

    Args:
        pictures_uri: folder of `NAME.jpg`.
        labels_uri: folder of `NAME.png`.
        names: of the classes that become targets, by pixel value.
        ledger: gets the faults.
        layout: for errors.
        licenses: by picture file name.
        default_license: of the others.

    Raises:
        DataError: one of the folders is missing.
    """
    for uri in (pictures_uri, labels_uri):
        if not storage.is_dir(uri):
            raise DataError(f"the folder {uri} is missing; --in wants {layout}")
    pictures = {PurePosixPath(name).stem: name for name in storage.list_names(pictures_uri) if name.endswith(".jpg")}
    labels = {PurePosixPath(name).stem: name for name in storage.list_names(labels_uri) if name.endswith(".png")}
    ledger.total = len(pictures.keys() & labels.keys())
    for stem in sorted(pictures.keys() | labels.keys()):
        if stem not in labels:
            ledger.skip("picture has no label map", pictures[stem])
        elif stem not in pictures:
            ledger.skip("picture is missing", labels[stem], f"no {stem}.jpg in {pictures_uri}")
        else:
            files = (storage.join(pictures_uri, pictures[stem]), storage.join(labels_uri, labels[stem]))
            license_name = licenses.get(pictures[stem], default_license)
            classes = {str(value): name for value, name in names.items()}
            yield Entry(pictures[stem], files, {"classes": classes, "license": license_name})


def label_map_row(entry: Entry, source: str, unlabelled: int, ledger: Ledger) -> Row | None:
    """The picture with a target per class in its label map.

    Args:
        entry: as `label_map_entries` gives it.
        source: name of the source.
        unlabelled: the pixel value that means no class.
        ledger: gets the faults.
    """
    picture = read_picture(entry.files[0], None, None, entry.label, ledger)
    if picture is None:
        return None
    labels_HW = _read_labels(entry, picture, ledger)
    if labels_HW is None:
        return None
    targets: list[Target] = []
    for value in np.unique(labels_HW).tolist():
        if value == unlabelled:
            continue
        name = entry.facts["classes"].get(str(value))
        if name is None:
            ledger.leave_out("class without a usable name", f"{entry.label} value {value}")
            continue
        mask_HW = labels_HW == value
        mask = rle_encode(mask_HW)
        box = mask_box(mask) or (0.0, 0.0, 0.0, 0.0)
        targets.append(Target(str(value), name, name, box, mask, int(np.count_nonzero(mask_HW))))
    if not targets:
        ledger.leave_out("picture has no target", entry.label)
        return None
    stem = PurePosixPath(entry.label).stem
    image_id = str(int(stem)) if stem.isascii() and stem.isdigit() else stem
    return picture.row(image_id, source, entry.facts["license"], targets)


def _read_labels(entry: Entry, picture: Picture, ledger: Ledger) -> npt.NDArray[np.integer] | None:
    try:
        with Image.open(io.BytesIO(storage.read_bytes(entry.files[1]))) as image:
            labels = np.asarray(image)
    except DECODE_ERRORS as error:
        ledger.skip("label map does not decode", entry.label, str(error))
        return None
    if labels.ndim != 2 or not np.issubdtype(labels.dtype, np.integer):
        ledger.skip("label map is not a one-channel PNG of classes", entry.label, f"shape {labels.shape}")
        return None
    if labels.shape != (picture.height, picture.width):
        detail = f"{labels.shape[0]}×{labels.shape[1]}, the picture is {picture.height}×{picture.width}"
        ledger.skip("label map has another size than its picture", entry.label, detail)
        return None
    return labels
