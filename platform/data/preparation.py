"""From a source to shards, part by part: planned once, made anywhere in parallel, finished parts never made again.

Part k of the shards holds the kept rows of entries [k·n, (k+1)·n) of the source, so that each part is a function of its
entries and their files. A part that is finished leaves its description in the work folder, under a key over exactly
that: the next attempt, after a kill or an error, takes it as it is, unless its entries or files have changed since.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from pixellm import __version__
from pixellm.errors import DataError
from pixellm.platform import storage
from pixellm.platform.data.schema import SCHEMA_VERSION, Row
from pixellm.platform.data.shards import (
    DATASET_FILE,
    ROW_GROUP_ROWS,
    ROWS_PER_PART,
    DatasetInfo,
    PartInfo,
    Tally,
    part_name,
    write_description,
    write_part,
)
from pixellm.platform.data.sources.base import Entry, Ledger, LedgerState, PictureSource
from pixellm.platform.work_folder import WorkFolder, open_work_folder

#: Runs `make(0)` … `make(n − 1)` somewhere and gives their values in order.
RunBlocks = Callable[[Callable[[int], list[Any]], int], Iterator[Any]]


@dataclass(frozen=True, slots=True)
class PreparationFlags:
    """How strictly faults are taken; see `Ledger`."""

    strict: bool = False
    skip_bad_masks: bool = False

    def ledger(self) -> Ledger:
        """An empty ledger that takes faults this way."""
        return Ledger(strict=self.strict, skip_bad_masks=self.skip_bad_masks)


@dataclass(frozen=True, slots=True)
class Plan:
    """What reading the annotations gave: the number of parts and pictures, and the faults found on the way."""

    num_parts: int
    num_pictures: int
    ledger: LedgerState


@dataclass(frozen=True, slots=True)
class PartReport:
    """What making a part gave.

    Attributes:
        key: over the part's entries, their files' sizes and times of change, and what else decides its bytes.
        pictures: entries looked at.
        info: of the file; None where no row was kept.
        counts: of what the rows hold.
        licenses: pictures by licence.
        ledger: what was left out.
        was_there: whether an earlier attempt had made it.
    """

    key: str
    pictures: int
    info: PartInfo | None
    counts: dict[str, int]
    licenses: dict[str, int]
    ledger: LedgerState
    was_there: bool = False

    def to_json(self) -> bytes:
        """The report as JSON text."""
        return json.dumps(asdict(self), ensure_ascii=False).encode()

    @staticmethod
    def from_json(content: bytes) -> "PartReport | None":
        """The report of that text; None if it is damaged, as after a kill."""
        try:
            values = json.loads(content)
            info = PartInfo(**values["info"]) if values["info"] else None
            return PartReport(**{**values, "info": info, "ledger": LedgerState(**values["ledger"])})
        except (ValueError, TypeError, KeyError):
            return None


@dataclass(frozen=True, slots=True)
class PlanMaker:
    """Reads a source's annotations and writes each part's entries into the work folder. Picklable."""

    source: PictureSource
    input_uri: str
    folder: WorkFolder
    flags: PreparationFlags
    entries_per_part: int

    def make(self, number: int) -> list[Plan]:
        """Makes the one plan (number 0), holding one part's entries in memory besides what the source holds."""
        del number
        ledger = self.flags.ledger()
        entries = self.source.entries(self.input_uri, ledger)
        num_parts = num_pictures = 0
        while chunk := list(islice(entries, self.entries_per_part)):
            content = json.dumps([asdict(entry) for entry in chunk], ensure_ascii=False).encode()
            storage.write_bytes(_plan_uri(self.folder, num_parts), content)
            num_parts += 1
            num_pictures += len(chunk)
        return [Plan(num_parts, num_pictures, ledger.state())]


@dataclass(frozen=True, slots=True)
class PartMaker:
    """Makes parts from the entries in the work folder. Picklable as long as nobody watches its pictures."""

    source: PictureSource
    folder: WorkFolder
    flags: PreparationFlags
    on_picture: Callable[[], None] | None = field(default=None, compare=False)

    def make(self, number: int) -> list[PartReport]:
        """Makes a part, unless it is there already."""
        planned = storage.read_bytes(_plan_uri(self.folder, number))
        entries = [Entry(**values) for values in json.loads(planned)]
        key = self._key(planned, entries)
        report = self._finished(number, key)
        if report is not None:
            return [report]
        ledger, tally = self.flags.ledger(), Tally()
        info = write_part(self._rows(entries, ledger), self._content_uri(number), tally)
        report = PartReport(key, len(entries), info, dict(tally.counts), dict(tally.licenses), ledger.state())
        storage.write_bytes(_report_uri(self.folder, number), report.to_json())
        return [report]

    def _rows(self, entries: list[Entry], ledger: Ledger) -> Iterator[Row]:
        for entry in entries:
            row = self.source.row(entry, ledger)
            if self.on_picture is not None:
                self.on_picture()
            if row is not None:
                yield row

    def _finished(self, number: int, key: str) -> PartReport | None:
        """The report of an earlier attempt that made the same part and would make it under these flags too."""
        uri = _report_uri(self.folder, number)
        report = PartReport.from_json(storage.read_bytes(uri)) if storage.exists(uri) else None
        if report is None or report.key != key:
            return None
        if (self.flags.strict and report.ledger.faults) or (not self.flags.skip_bad_masks and report.ledger.refused):
            return None
        if report.info is not None:
            (stamp,) = storage.file_stamps([self._content_uri(number)])
            if stamp.partition(" ")[0] != str(report.info.num_bytes):
                return None
        if self.on_picture is not None:
            for _ in range(report.pictures):
                self.on_picture()
        return PartReport(**{**_fields(report), "was_there": True})

    def _key(self, planned: bytes, entries: list[Entry]) -> str:
        stamps = storage.file_stamps([uri for entry in entries for uri in entry.files])
        about = [__version__, SCHEMA_VERSION, ROW_GROUP_ROWS, self.source.name, repr(self.source), stamps]
        return hashlib.sha256(planned + json.dumps(about).encode()).hexdigest()

    def _content_uri(self, number: int) -> str:
        return storage.join(self.folder.content, part_name(number))


@dataclass(frozen=True, slots=True)
class Prepared:
    """Finished shards: their description, and how many parts an earlier attempt had made."""

    info: DatasetInfo
    parts_found: int


def prepare_shards(
    source: PictureSource,
    input_uri: str,
    out_uri: str | Path,
    ledger: Ledger,
    run: RunBlocks,
    *,
    notes: Mapping[str, Any],
    watch_pictures: bool = False,
    entries_per_part: int = ROWS_PER_PART,
) -> Prepared:
    """Makes the shards of a source; what an interrupted attempt at the same place has finished is taken over.

    This process holds the descriptions of the parts, never their rows.

    Args:
        source: what to prepare.
        input_uri: its input folder.
        out_uri: where the shards go; older ones there are replaced in one step when all is done.
        ledger: gets what was left out, in order, and the progress; its flags are those of every part.
        run: where plan and parts are made.
        notes: further content of `dataset.json`; what was skipped is added.
        watch_pictures: whether each picture counts in the ledger's progress, instead of each part; only where `run`
            stays in this process.
        entries_per_part: pictures of one part.

    Raises:
        DataError: see `Source.rows`; not a row was kept; the place is not ours to replace or in use.
    """
    flags = PreparationFlags(ledger.strict, ledger.skip_bad_masks)
    with open_work_folder(out_uri, commit_file=DATASET_FILE) as folder:
        (plan,) = run(PlanMaker(source, input_uri, folder, flags, entries_per_part).make, 1)
        _check_shared(folder, plan)
        ledger.total = plan.num_pictures
        ledger.merge(plan.ledger)
        maker = PartMaker(source, folder, flags, ledger.looked_at_one if watch_pictures else None)
        tally, found = Tally(), 0
        parts: list[PartInfo] = []
        for report in run(maker.make, plan.num_parts):
            tally.merge(Tally(Counter(report.counts), Counter(report.licenses)))
            ledger.merge(report.ledger)
            if not watch_pictures:
                ledger.looked_at(report.pictures)
            parts += [report.info] if report.info else []
            found += report.was_there
        info = write_description(
            folder.content,
            parts,
            tally,
            name=source.name,
            notes={**notes, "skipped": ledger.counts, "noted": ledger.notes},
            shown_uri=out_uri,
        )
        folder.publish([*(part.name for part in parts), DATASET_FILE])
    return Prepared(info, found)


def run_here(make: Callable[[int], list[Any]], num_blocks: int) -> Iterator[Any]:
    """Makes blocks one after the other in this process."""
    for number in range(num_blocks):
        yield from make(number)


def run_on_ray(make: Callable[[int], list[Any]], num_blocks: int) -> Iterator[Any]:
    """Makes blocks as Ray Data tasks on the cluster that this process is connected to, one CPU each."""
    from pixellm.platform.data.ray_blocks import stream_blocks  # Ray Data is slow to import

    return stream_blocks(make, num_blocks, task_cpus=1.0, max_tasks=None)


def _check_shared(folder: WorkFolder, plan: Plan) -> None:
    if plan.num_parts and not storage.exists(_plan_uri(folder, plan.num_parts - 1)):
        raise DataError(
            f"the cluster's machines write {folder.uri} elsewhere than here; give --in and --out as URIs "
            "(s3://…) or folders that all machines share"
        )


def _plan_uri(folder: WorkFolder, number: int) -> str:
    return storage.join(folder.progress, f"plan-{number:05d}.json")


def _report_uri(folder: WorkFolder, number: int) -> str:
    return storage.join(folder.progress, f"report-{number:05d}.json")


def _fields(report: PartReport) -> dict[str, Any]:
    return {name: getattr(report, name) for name in PartReport.__slots__}
