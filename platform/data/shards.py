"""Shards: a folder with `dataset.json` and `part-*.parquet`, written once and read by row number.

The same rows give byte-identical files, so the digest in `dataset.json` names the content. Row groups are small: a
reader of one random row touches one row group, and keeps the last few of them.
"""

import hashlib
import json
from bisect import bisect_right
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pixellm.errors import DataError
from pixellm.platform import storage
from pixellm.platform.data.schema import SCHEMA, SCHEMA_VERSION, Row, row_from_dict, rows_to_table

DATASET_FILE = "dataset.json"
ROW_GROUP_ROWS = 8
ROWS_PER_PART = 1024
_CACHED_ROW_GROUPS = 32
_OPEN_PARTS = 64
_TEXT_COLUMNS = ["image_id", "source", "height", "width", "license", "targets", "dialogues"]


@dataclass(frozen=True, slots=True)
class PartInfo:
    """One Parquet file: its name, rows, bytes and SHA-256 (hex)."""

    name: str
    rows: int
    num_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class DatasetInfo:
    """What `dataset.json` says: counts, licences, the files with their digests, and one digest over all of them."""

    name: str
    version: str
    schema_version: int
    digest: str
    counts: dict[str, int]
    licenses: dict[str, int]
    parts: tuple[PartInfo, ...]
    notes: dict[str, Any] = field(default_factory=dict)

    def to_json_dict(self) -> dict[str, Any]:
        """The content of `dataset.json`."""
        return asdict(self)


def write_shards(
    rows: Iterable[Row],
    uri: str | Path,
    *,
    name: str,
    version: str = "1",
    notes: Mapping[str, Any] | None = None,
    rows_per_part: int = ROWS_PER_PART,
) -> DatasetInfo:
    """Writes rows as shards in one atomic step, holding one row group of them in memory.

    Args:
        rows: consumed once, in the order they are stored in.
        uri: the folder; an older dataset there is replaced, anything else is left alone.
        name: of the dataset.
        version: of the dataset, free text.
        notes: further content for `dataset.json`; read when the rows are consumed, so it may be filled meanwhile.
        rows_per_part: rows of one Parquet file.

    Raises:
        DataError: there is not a single row, or `uri` holds something that is no dataset.
    """
    tally = Tally()
    waiting = iter(rows)
    parts: list[PartInfo] = []
    with storage.atomic_write_dir(uri, commit_file=DATASET_FILE) as folder:
        while part := write_part(islice(waiting, rows_per_part), folder / part_name(len(parts)), tally):
            parts.append(part)
        return write_description(folder, parts, tally, name=name, version=version, notes=notes, shown_uri=uri)


@dataclass(slots=True)
class Tally:
    """Running totals over written rows: what they hold, and their licences."""

    counts: Counter[str] = field(default_factory=Counter)
    licenses: Counter[str] = field(default_factory=Counter)

    def add(self, row: Row) -> None:
        """Counts one row."""
        self.counts["rows"] += 1
        self.counts["targets"] += sum(not target.is_ignore for target in row.targets)
        self.counts["ignore_regions"] += sum(target.is_ignore for target in row.targets)
        self.counts.update(f"{dialogue.kind}_dialogues" for dialogue in row.dialogues)
        self.licenses[row.license] += 1

    def merge(self, other: "Tally") -> None:
        """Adds another's totals."""
        self.counts.update(other.counts)
        self.licenses.update(other.licenses)


def part_name(number: int) -> str:
    """File name of a part."""
    return f"part-{number:05d}.parquet"


def write_part(rows: Iterable[Row], uri: str | Path, tally: Tally) -> PartInfo | None:
    """Writes rows as one Parquet file, in one step, holding one row group of them in memory.

    Args:
        rows: consumed once, in the order they are stored in.
        uri: of the file.
        tally: counts them.

    Returns:
        The file's description; None, and no file, where there is no row.
    """
    batches = _batches(iter(rows), ROW_GROUP_ROWS)
    batch = next(batches, None)
    if batch is None:
        return None
    written = 0
    with storage.atomic_write_file(uri) as path:
        with _open_writer(path) as writer:
            while batch is not None:
                writer.write_table(rows_to_table(batch), row_group_size=ROW_GROUP_ROWS)
                written += len(batch)
                for row in batch:
                    tally.add(row)
                batch = next(batches, None)
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return PartInfo(str(uri).rpartition("/")[2], written, path.stat().st_size, digest)


def write_description(
    folder_uri: str | Path,
    parts: Sequence[PartInfo],
    tally: Tally,
    *,
    name: str,
    version: str = "1",
    notes: Mapping[str, Any] | None = None,
    shown_uri: str | Path | None = None,
) -> DatasetInfo:
    """Writes `dataset.json` beside its parts.

    Args:
        folder_uri: where the parts are.
        parts: in order.
        tally: over their rows.
        name: of the dataset.
        version: of the dataset, free text.
        notes: further content.
        shown_uri: how an error names the place.

    Raises:
        DataError: there is no part.
    """
    if not parts:
        raise DataError(
            f"nothing to write to {shown_uri or folder_uri}: no row was kept; see the reasons in the report"
        )
    info = DatasetInfo(
        name=name,
        version=version,
        schema_version=SCHEMA_VERSION,
        digest=_digest_of(parts),
        counts=dict(sorted(tally.counts.items())),
        licenses=dict(sorted(tally.licenses.items())),
        parts=tuple(parts),
        notes=json.loads(json.dumps(notes or {})),
    )
    text = json.dumps(info.to_json_dict(), indent=1, ensure_ascii=False)
    with storage.atomic_write_file(storage.join(folder_uri, DATASET_FILE)) as path:
        path.write_text(text + "\n", encoding="utf-8")
    return info


def open_shards(uri: str | Path) -> "ShardedDataset":
    """Opens shards for reading; only `dataset.json` is read now.

    Raises:
        DataError: there is no dataset, its description is damaged, or a newer version wrote it.
    """
    description = storage.join(uri, DATASET_FILE)
    if not storage.exists(description):
        raise DataError(f"there are no shards at {uri} (no {DATASET_FILE}); make them with `pixellm data prepare`")
    content = storage.read_json(description)
    try:
        parts = tuple(PartInfo(**part) for part in content["parts"])
        info = DatasetInfo(**{**content, "parts": parts})
    except (TypeError, KeyError) as error:
        raise DataError(f"{description} is no description of shards ({error}); prepare the data again") from None
    if info.schema_version != SCHEMA_VERSION:
        raise DataError(
            f"{uri} has schema version {info.schema_version}, this pixellm reads {SCHEMA_VERSION}; prepare it again"
        )
    return ShardedDataset(str(uri), info)


class ShardedDataset:
    """Shards by row number. Picklable (files are opened where they are read) and cheap to copy.

    Attributes:
        uri: the folder.
        info: the content of `dataset.json`.
    """

    def __init__(self, uri: str, info: DatasetInfo) -> None:
        self.uri = uri
        self.info = info
        self._starts = [0]
        for part in info.parts:
            self._starts.append(self._starts[-1] + part.rows)
        self._files: OrderedDict[int, pq.ParquetFile] = OrderedDict()
        self._groups: OrderedDict[tuple[int, int], pa.Table] = OrderedDict()

    def __len__(self) -> int:
        return self._starts[-1]

    def __reduce__(self) -> tuple[Any, ...]:
        return (ShardedDataset, (self.uri, self.info))

    @property
    def digest(self) -> str:
        """Digest of the content (hex)."""
        return self.info.digest

    def read_row(self, index: int) -> Row:
        """The row at `index` (0 ≤ index < len).

        Raises:
            DataError: the index is out of range, or a part is missing or damaged.
        """
        if not 0 <= index < len(self):
            raise DataError(f"{self.uri} has {len(self)} rows, asked for row {index}")
        part = bisect_right(self._starts, index) - 1
        group, offset = divmod(index - self._starts[part], ROW_GROUP_ROWS)
        return row_from_dict(self._row_group(part, group).slice(offset, 1).to_pylist()[0])

    def scan(self, *, with_images: bool = False) -> Iterator[Row]:
        """All rows in order, one row group in memory; without pictures (`image` is empty) unless asked for."""
        columns = SCHEMA.names if with_images else _TEXT_COLUMNS
        for part in range(len(self.info.parts)):
            file = self._file(part)
            for group in range(file.num_row_groups):
                for record in self._read(part, group, columns).to_pylist():
                    yield row_from_dict(record)

    def column_tables(self, columns: list[str]) -> Iterator[pa.Table]:
        """Each part in turn as a table of some columns ("targets.list.element.area" for one field), all its rows."""
        for part in range(len(self.info.parts)):
            try:
                yield self._file(part).read(columns=columns, use_threads=False)
            except (OSError, pa.ArrowException) as error:
                raise self._damaged(part, error) from None

    def verify(self) -> None:
        """Reads every part and compares it with its digest.

        Raises:
            DataError: a part is missing or differs; it is named.
        """
        for part in self.info.parts:
            if hashlib.sha256(storage.read_bytes(storage.join(self.uri, part.name))).hexdigest() != part.sha256:
                raise DataError(f"{self.uri}/{part.name} is not what {DATASET_FILE} describes; prepare the data again")

    def _row_group(self, part: int, group: int) -> pa.Table:
        table = self._groups.get((part, group))
        if table is None:
            table = self._groups[part, group] = self._read(part, group, SCHEMA.names)
            if len(self._groups) > _CACHED_ROW_GROUPS:
                self._groups.popitem(last=False)
        self._groups.move_to_end((part, group))
        return table

    def _read(self, part: int, group: int, columns: list[str]) -> pa.Table:
        try:
            return self._file(part).read_row_group(group, columns=columns, use_threads=False)
        except (OSError, pa.ArrowException) as error:
            raise self._damaged(part, error) from None

    def _file(self, part: int) -> pq.ParquetFile:
        file = self._files.get(part)
        if file is None:
            filesystem, base = storage.open_filesystem(self.uri)
            try:
                file = pq.ParquetFile(filesystem.open_input_file(f"{base}/{self.info.parts[part].name}"))
            except (OSError, pa.ArrowException) as error:
                raise self._damaged(part, error) from None
            self._files[part] = file
            if len(self._files) > _OPEN_PARTS:
                self._files.popitem(last=False)
        self._files.move_to_end(part)
        return file

    def _damaged(self, part: int, error: Exception) -> DataError:
        return DataError(f"cannot read {self.uri}/{self.info.parts[part].name}: {error}; prepare the data again")


def _open_writer(path: Path) -> pq.ParquetWriter:
    """Pictures are stored as they are (they are compressed already), everything else with zstd."""
    compression = {name: "none" if name == "image" else "zstd" for name in _leaf_columns(SCHEMA)}
    return pq.ParquetWriter(path, SCHEMA, compression=compression, use_dictionary=["source", "license"])


def _leaf_columns(schema: pa.Schema) -> list[str]:
    empty = pa.BufferOutputStream()
    pq.write_table(schema.empty_table(), empty)
    columns = pq.ParquetFile(pa.BufferReader(empty.getvalue())).schema
    return [columns.column(index).path for index in range(len(columns))]


def _batches(rows: Iterator[Row], size: int) -> Iterator[list[Row]]:
    batch: list[Row] = []
    for row in rows:
        batch.append(row)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _digest_of(parts: Iterable[PartInfo]) -> str:
    lines = "".join(f"{part.name} {part.sha256}\n" for part in parts)
    return hashlib.sha256(lines.encode()).hexdigest()
