"""What a source is, and the ledger in which a preparation writes down what it kept and what it left out, and why.

So that a preparation runs in parallel and restarts where it stopped, a source works in two steps: `entries` reads the
annotations once and gives each picture its share of them; `row` reads one picture, anywhere.
"""

import io
import struct
import zlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from pixellm.errors import DataError
from pixellm.platform import storage
from pixellm.platform.data.schema import Row, RowDialogue, Target
from pixellm.platform.data.sources.exif import turns_quarter, without_turn
from pixellm.platform.masks import (
    BORDER_TOLERANCE_PX,
    Box,
    MaskFault,
    MaskFaultKind,
    Rle,
    box_overshoot_px,
    mask_box,
    try_segmentation_to_rle,
)

#: Names listed per reason; beyond it only the count grows.
MAX_LISTED_NAMES = 200
_NAMES_IN_TEXT = 5

#: What Pillow's plugins raise on damaged files, besides OSError (which its own UnidentifiedImageError is).
DECODE_ERRORS: tuple[type[Exception], ...] = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    LookupError,
    TypeError,
    OverflowError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)

Progress = Callable[[int, int | None], None]


@dataclass(frozen=True, slots=True)
class PrepareReport:
    """What a preparation did.

    Attributes:
        source: name of the source.
        uri: where the shards are.
        digest: of the shards.
        rows: pictures kept.
        targets: targets kept (without ignore regions).
        ignore_regions: crowd regions kept as ignore regions.
        dialogues: kept dialogues by kind.
        skipped: how many things were left out, by reason.
        skipped_names: which ones, by reason, the first `MAX_LISTED_NAMES`.
        licenses: pictures by licence.
        noted: how many things were kept otherwise than their files say, by remark.
        noted_names: which ones, likewise.
        parts_found: parts of the shards that an interrupted attempt had finished.
    """

    source: str
    uri: str
    digest: str
    rows: int
    targets: int
    ignore_regions: int
    dialogues: dict[str, int]
    skipped: dict[str, int] = field(default_factory=dict)
    skipped_names: dict[str, list[str]] = field(default_factory=dict)
    licenses: dict[str, int] = field(default_factory=dict)
    noted: dict[str, int] = field(default_factory=dict)
    noted_names: dict[str, list[str]] = field(default_factory=dict)
    parts_found: int = 0

    def to_json_dict(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return asdict(self)

    def to_text(self) -> str:
        """The report as lines for a terminal; of the skipped things, the first few are named."""
        dialogues = ", ".join(f"{count} {kind} dialogues" for kind, count in self.dialogues.items()) or "no dialogues"
        lines = [
            f"{self.source}: kept {self.rows} pictures, {self.targets} targets, {self.ignore_regions} ignore regions, "
            f"{dialogues}"
        ]
        lines += [_listed("skipped", self.skipped, self.skipped_names, reason) for reason in self.skipped]
        lines += [_listed("noted", self.noted, self.noted_names, remark) for remark in self.noted]
        if self.skipped:
            lines.append("mend these and prepare again to have them; with --strict the first fault is an error")
        if self.parts_found:
            lines.append(f"{self.parts_found} parts were there from an interrupted attempt")
        return "\n".join([*lines, f"written to {self.uri} (digest {self.digest[:12]})"])


@dataclass(frozen=True, slots=True)
class LedgerState:
    """A ledger's content as plain JSON values, to be merged into another ledger.

    Attributes:
        counts: what was left out, by reason.
        names: which, by reason.
        notes: what was kept but differs from what the files say, by remark.
        note_names: which, by remark.
        faults: how many of `counts` a strict preparation would have raised.
        refused: how many of them are masks outside their picture.
    """

    counts: dict[str, int]
    names: dict[str, list[str]]
    notes: dict[str, int]
    note_names: dict[str, list[str]]
    faults: int
    refused: int


class Ledger:
    """Counts what a source leaves out. In strict mode the first fault ends the preparation instead.

    A mask outside its picture ends it in any mode, unless `skip_bad_masks`: it says that annotations and photographs do
    not belong together (another resolution, another file), and skipping would quietly lose everything.

    Attributes:
        total: how many pictures the source will look at, once it knows (for progress displays).
        counts: things left out, by reason.
        names: which ones, by reason, the first `MAX_LISTED_NAMES`.
        notes: things kept otherwise than their files say, by remark.
        note_names: likewise.
    """

    def __init__(self, *, strict: bool = False, skip_bad_masks: bool = False, progress: Progress | None = None) -> None:
        self.strict = strict
        self.skip_bad_masks = skip_bad_masks
        self.total: int | None = None
        self.counts: Counter[str] = Counter()
        self.names: dict[str, list[str]] = {}
        self.notes: Counter[str] = Counter()
        self.note_names: dict[str, list[str]] = {}
        self._faults = 0
        self._refused = 0
        self._progress = progress
        self._looked_at = 0

    def skip(self, reason: str, name: str, detail: str = "") -> None:
        """Writes down a fault in the data: counted and named, or, in strict mode, raised.

        Raises:
            DataError: in strict mode.
        """
        if self.strict:
            explanation = f" ({detail})" if detail else ""
            raise DataError(f"{name}: {reason}{explanation}; mend it, or prepare without --strict to skip it")
        self._faults += 1
        self.leave_out(reason, name)

    def refuse_mask(self, reason: str, name: str, detail: str = "") -> None:
        """Raises for a mask outside its picture, or writes it down where bad masks are to be skipped.

        Raises:
            DataError: unless `skip_bad_masks`, or in strict mode.
        """
        if not self.skip_bad_masks or self.strict:
            explanation = f" ({detail})" if detail else ""
            raise DataError(
                f"{name}: {reason}{explanation}; do these annotations belong to these photographs? Mend it, or prepare "
                "with --skip-bad-masks to leave such masks out"
            )
        self._faults += 1
        self._refused += 1
        self.leave_out(reason, name)

    def leave_out(self, reason: str, name: str) -> None:
        """Writes down something that is no fault but has no place in the shards; never raises."""
        _write_down(reason, [name], 1, self.counts, self.names)

    def note(self, remark: str, name: str) -> None:
        """Writes down something that is kept, but otherwise than its files say; never raises."""
        _write_down(remark, [name], 1, self.notes, self.note_names)

    def looked_at_one(self) -> None:
        """One more picture was considered, kept or not."""
        self.looked_at(1)

    def looked_at(self, count: int) -> None:
        """That many more pictures were considered."""
        self._looked_at += count
        if self._progress is not None:
            self._progress(self._looked_at, self.total)

    def state(self) -> LedgerState:
        """What is written down here."""
        return LedgerState(
            dict(self.counts), self.names, dict(self.notes), self.note_names, self._faults, self._refused
        )

    def merge(self, state: LedgerState) -> None:
        """Writes down what another ledger holds, after what is here."""
        for reason, count in state.counts.items():
            _write_down(reason, state.names[reason], count, self.counts, self.names)
        for remark, count in state.notes.items():
            _write_down(remark, state.note_names[remark], count, self.notes, self.note_names)
        self._faults += state.faults
        self._refused += state.refused


@dataclass(frozen=True, slots=True)
class Entry:
    """One picture of a dataset and its share of the annotations.

    Attributes:
        label: how the ledger names it.
        files: URIs of the files that `row` reads; when one of them changes, the picture is prepared again.
        facts: what else `row` needs; only what JSON can hold (no tuples, no bytes, keys of text).
    """

    label: str
    files: tuple[str, ...]
    facts: Mapping[str, Any]


class PictureSource(ABC):
    """A public dataset in its published layout (or one that is generated). Picklable; a frozen dataclass whose other
    fields are its options.

    Attributes:
        name: as on the command line.
        layout: what is expected in the input folder, for help texts and errors.
    """

    name: str
    layout: str

    @abstractmethod
    def entries(self, input_uri: str, ledger: Ledger) -> Iterator[Entry]:
        """Yields an entry per picture in a fixed order, opening none; sets `ledger.total` before the first.

        Raises:
            DataError: a part of the layout is missing or not in its format; in strict mode, any fault.
        """

    @abstractmethod
    def row(self, entry: Entry, ledger: Ledger) -> Row | None:
        """The row of an entry: a function of the entry and its files alone. None: left out, as the ledger says.

        Raises:
            DataError: in strict mode, any fault; a mask outside its picture unless such masks are skipped.
        """

    def rows(self, input_uri: str, ledger: Ledger) -> Iterator[Row]:
        """Yields the rows in order, one by one, in this process; what is left out goes to the ledger.

        Raises:
            DataError: see `entries` and `row`.
        """
        for entry in self.entries(input_uri, ledger):
            ledger.looked_at_one()
            row = self.row(entry, ledger)
            if row is not None:
                yield row


@dataclass(frozen=True, slots=True)
class Picture:
    """An encoded picture that is known to decode; sizes in pixels as displayed (EXIF orientation applied)."""

    encoded: bytes
    height: int
    width: int

    def row(
        self,
        image_id: str,
        source: str,
        license_name: str,
        targets: Iterable[Target] = (),
        dialogues: Iterable[RowDialogue] = (),
    ) -> Row:
        """The picture's row."""
        return Row(
            image_id, source, self.encoded, self.height, self.width, license_name, tuple(targets), tuple(dialogues)
        )


def read_picture(uri: str, height: int | None, width: int | None, name: str, ledger: Ledger) -> Picture | None:
    """Reads a picture and decodes it to the end; a fault goes to the ledger and gives None.

    A picture that its EXIF turns by a quarter is taken as a person sees it, unless the annotations' size says that they
    are of the stored pixels: then the turn is taken off, and noted.

    Args:
        uri: of the file.
        height: what the annotations say, pixels; None: not stated.
        width: likewise.
        name: how the ledger names it.
        ledger: where faults go.
    """
    if not storage.exists(uri):
        ledger.skip("picture is missing", name, f"no file {uri}")
        return None
    encoded = storage.read_bytes(uri)
    try:
        true_height, true_width = _decode_to_the_end(encoded)
    except DECODE_ERRORS as error:
        ledger.skip("picture does not decode", name, str(error))
        return None
    wanted = (height or true_height, width or true_width)
    if wanted == (true_width, true_height) != (true_height, true_width):
        upright = without_turn(encoded)  # None where the picture is not turned
        if upright is not None:
            ledger.note("EXIF turn taken off: the annotations are of the stored pixels", name)
            return Picture(upright, true_width, true_height)
    if wanted != (true_height, true_width):
        detail = f"annotated as {height}×{width}, the picture is {true_height}×{true_width} as displayed"
        ledger.skip("picture has another size than its annotation says", name, detail)
        return None
    return Picture(encoded, true_height, true_width)


def _decode_to_the_end(encoded: bytes) -> tuple[int, int]:
    """Decodes at the coarsest scale (cheap, yet every byte is read) and returns the displayed (height, width)."""
    with Image.open(io.BytesIO(encoded)) as picture:
        width, height = picture.size
        turned = turns_quarter(picture)
        picture.draft("L", (max(1, width // 8), max(1, height // 8)))
        picture.load()
    return (width, height) if turned else (height, width)


def read_mask(annotation: Mapping[str, Any], picture: Picture, name: str, ledger: Ledger) -> tuple[Rle, Box] | None:
    """An annotation's mask and its box (x0, y0, x1, y1); a fault goes to the ledger and gives None."""
    rle = try_segmentation_to_rle(annotation.get("segmentation"), picture.height, picture.width)
    if isinstance(rle, MaskFault):
        note = ledger.refuse_mask if rle.kind is MaskFaultKind.OUTSIDE else ledger.skip
        note(rle.kind.value, name, rle.detail)
        return None
    box = annotation.get("bbox")
    if box is None:
        return rle, mask_box(rle) or (0.0, 0.0, 0.0, 0.0)
    try:
        x, y, box_width, box_height = (float(value) for value in box)
    except (TypeError, ValueError):
        ledger.skip("box is not [x, y, width, height]", name, str(box))
        return None
    corners = _as_float32((x, y, x + box_width, y + box_height))
    if box_overshoot_px(corners, picture.height, picture.width) > BORDER_TOLERANCE_PX:
        ledger.refuse_mask(MaskFaultKind.OUTSIDE.value, name, f"its box {list(box)} leaves the picture")
        return None
    return rle, corners


def read_json_object(uri: str, wanted_keys: tuple[str, ...]) -> dict[str, Any]:
    """A JSON file that must hold an object with lists under the wanted keys.

    Raises:
        DataError: it is absent, not JSON, or of another form.
    """
    content = storage.read_json(uri)
    if not isinstance(content, dict):
        raise DataError(f"{uri} holds a JSON {type(content).__name__}, wanted an object with {', '.join(wanted_keys)}")
    missing = [key for key in wanted_keys if not isinstance(content.get(key), list)]
    if missing:
        raise DataError(f"{uri} has no list {', '.join(map(repr, missing))}; is it the right annotation file?")
    return content


def license_names(licenses: object) -> dict[Any, str]:
    """COCO's `licenses` list as id → "name url"."""
    if not isinstance(licenses, list):
        return {}
    entries = [entry for entry in licenses if isinstance(entry, dict)]
    return {entry.get("id"): f"{entry.get('name', '')} {entry.get('url', '')}".strip() for entry in entries}


def licenses_by_file(uri: str) -> dict[str, str]:
    """Licences by file name from a COCO-format file that lists the pictures; empty where there is none."""
    if not storage.exists(uri):
        return {}
    content = storage.read_json(uri)
    if not isinstance(content, dict) or not isinstance(content.get("images"), list):
        return {}
    names = license_names(content.get("licenses"))
    images = [image for image in content["images"] if isinstance(image, dict)]
    return {str(image.get("file_name")): names.get(image.get("license"), "unknown") for image in images}


def _listed(verb: str, counts: Mapping[str, int], names: Mapping[str, list[str]], reason: str) -> str:
    more = ", …" if counts[reason] > _NAMES_IN_TEXT else ""
    return f"{verb} {counts[reason]}: {reason} ({', '.join(names[reason][:_NAMES_IN_TEXT])}{more})"


def _write_down(
    reason: str, new_names: list[str], count: int, counts: Counter[str], names: dict[str, list[str]]
) -> None:
    counts[reason] += count
    listed = names.setdefault(reason, [])
    listed += new_names[: MAX_LISTED_NAMES - len(listed)]


def _as_float32(box: Box) -> Box:
    """The nearest values that the shards can hold, so that a row equals itself after storing."""
    x0, y0, x1, y1 = (float(np.float32(value)) for value in box)
    return (x0, y0, x1, y1)
