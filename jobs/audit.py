"""`pixellm data audit`: what may be wrong with shards, as a report and, on request, shards without it."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pixellm.errors import ConfigError
from pixellm.platform import storage
from pixellm.platform.data.audit import HIDDEN_SHARE, BenchmarkPictures, Check, Finding, SeenQuestions, audit_row
from pixellm.platform.data.schema import Row
from pixellm.platform.data.shards import ShardedDataset, open_shards, write_shards
from pixellm.platform.data.sources.base import Progress

#: Findings listed per check and dataset; beyond it only the count grows.
MAX_LISTED = 200
_LISTED_IN_TEXT = 4


@dataclass(frozen=True, slots=True)
class AuditedDataset:
    """What was found in one dataset.

    Attributes:
        name: of the dataset.
        uri: of its shards.
        digest: of its content.
        rows: pictures looked at.
        rows_kept: pictures of the cleaned shards.
        counts: findings by check.
        listed: what was found, by check, the first `MAX_LISTED`.
        cleaned_uri: of the shards without the findings; None if none were written.
        cleaned_digest: likewise.
    """

    name: str
    uri: str
    digest: str
    rows: int
    rows_kept: int
    counts: dict[str, int]
    listed: dict[str, list[str]] = field(default_factory=dict)
    cleaned_uri: str | None = None
    cleaned_digest: str | None = None


@dataclass(frozen=True, slots=True)
class AuditReport:
    """What an audit found; `benchmark_pictures` is how many pictures leaks were looked for among."""

    datasets: tuple[AuditedDataset, ...]
    checks: tuple[str, ...]
    benchmark_pictures: int

    def to_json_dict(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return asdict(self)

    def to_text(self) -> str:
        """A table for a terminal, and the first findings of each kind in words."""
        width = max(len("dataset"), *(len(dataset.name) for dataset in self.datasets))
        lines = ["  ".join([f"{'dataset':{width}}", f"{'pictures':>9}", *(f"{c:>17}" for c in self.checks)])]
        for one in self.datasets:
            counts = [f"{one.counts[check]:>17}" for check in self.checks]
            lines.append("  ".join([f"{one.name:{width}}", f"{one.rows:>9}", *counts]))
        for one in self.datasets:
            for check, found in one.listed.items():
                lines += [f"{one.name} {check}: {text}" for text in found[:_LISTED_IN_TEXT]]
                more = one.counts[check] - _LISTED_IN_TEXT
                lines += [f"{one.name} {check}: … and {more} more (--json lists them)"] if more > 0 else []
        if Check.LEAK in self.checks and not self.benchmark_pictures:
            lines.append("leaks were not looked for: name the benchmark's shards with --against")
        for one in self.datasets:
            if one.cleaned_digest is not None:
                lines.append(
                    f"{one.cleaned_uri}: {one.rows_kept} of {one.rows} pictures (digest {one.cleaned_digest[:12]})"
                )
        return "\n".join(lines)


def audit(
    uris: Sequence[str | Path],
    *,
    against: Sequence[str | Path] = (),
    checks: Sequence[Check] = tuple(Check),
    drop: str | Path | None = None,
    hidden_share: float = HIDDEN_SHARE,
    progress: Progress | None = None,
) -> AuditReport:
    """Looks for what may be wrong with shards; streams, with memory for the benchmarks' hashes and the questions seen.

    Args:
        uris: shards to look at (and to clean).
        against: benchmark shards that none of their pictures may be in.
        checks: what to look for.
        drop: a folder (or URI): each dataset is written to `DROP/NAME` without what was found.
        hidden_share: of a target's pixels under others, from which on it is hidden, 0..1.
        progress: called with (pictures looked at, pictures in all).

    Raises:
        ConfigError: two datasets would be written to the same place.
        DataError: shards are missing or damaged, or nothing of a dataset would be left.
    """
    datasets = [open_shards(uri) for uri in uris]
    names = [dataset.info.name for dataset in datasets]
    if drop is not None and len(set(names)) != len(names):
        raise ConfigError(f"got datasets of the same name ({', '.join(names)}); clean them one by one")
    benchmarks = BenchmarkPictures(
        (one.info.name, row) for one in map(open_shards, against) for row in one.scan(with_images=True)
    )
    total = sum(map(len, datasets))
    audited: list[AuditedDataset] = []
    for dataset in datasets:
        before = sum(one.rows for one in audited)
        scan = _Scan(dataset, frozenset(checks), benchmarks, hidden_share, progress, before, total)
        audited.append(scan.run(drop))
    return AuditReport(tuple(audited), tuple(str(check) for check in checks), len(benchmarks))


def named_checks(names: Sequence[str]) -> tuple[Check, ...]:
    """Checks by name; all of them for no name.

    Raises:
        ConfigError: there is no such check.
    """
    known = [str(check) for check in Check]
    for name in names:
        if name not in known:
            raise ConfigError(f"there is no check {name!r}; known: {', '.join(known)}")
    return tuple(Check(name) for name in names) or tuple(Check)


class _Scan:
    """One pass over a dataset that collects findings while it gives the cleaned rows."""

    def __init__(
        self,
        dataset: ShardedDataset,
        checks: frozenset[Check],
        benchmarks: BenchmarkPictures,
        hidden_share: float,
        progress: Progress | None,
        done_before: int,
        total: int,
    ) -> None:
        self._dataset, self._checks, self._benchmarks, self._hidden_share = dataset, checks, benchmarks, hidden_share
        self._progress, self._done, self._total = progress, done_before, total
        self._seen = SeenQuestions()
        self._counts: Counter[str] = Counter({str(check): 0 for check in checks})
        self._listed: dict[str, list[str]] = {}
        self._kept = 0

    def run(self, drop: str | Path | None) -> AuditedDataset:
        name, cleaned_uri, cleaned_digest = self._dataset.info.name, None, None
        if drop is None:
            for _ in self._clean_rows():
                pass
        else:
            cleaned_uri = storage.join(drop, name)
            notes = {"made_from": self._dataset.digest, "dropped": self._counts}
            cleaned_digest = write_shards(self._clean_rows(), cleaned_uri, name=name, notes=notes).digest
        return AuditedDataset(
            name=name,
            uri=str(self._dataset.uri),
            digest=self._dataset.digest,
            rows=len(self._dataset),
            rows_kept=self._kept,
            counts=dict(self._counts),
            listed=self._listed,
            cleaned_uri=cleaned_uri,
            cleaned_digest=cleaned_digest,
        )

    def _clean_rows(self) -> Iterator[Row]:
        for row in self._dataset.scan(with_images=True):
            findings, cleaned = audit_row(
                row, self._checks, benchmarks=self._benchmarks, seen=self._seen, hidden_share=self._hidden_share
            )
            for finding in findings:
                self._note(finding)
            self._done += 1
            if self._progress is not None:
                self._progress(self._done, self._total)
            if cleaned is not None:
                self._kept += 1
                yield cleaned

    def _note(self, finding: Finding) -> None:
        self._counts[finding.check] += 1
        listed = self._listed.setdefault(str(finding.check), [])
        if len(listed) < MAX_LISTED:
            listed.append(f"picture {finding.image_id} {finding.detail}")
