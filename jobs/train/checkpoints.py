"""Checkpoints on disk: written under a temporary name, verified, renamed; damaged ones are named and passed over.

    checkpoints/step-000200/
        meta.json                             what this is, and the SHA-256 of every other file
        weights.safetensors                   the model's weights (rank 0)
        optimizer-00000-of-00002.safetensors  masters and moments, one file per rank
        random-00000-of-00002.safetensors     torch's random state, one file per rank

Only a folder called `step-…` with a `meta.json` whose digests all agree is a checkpoint. The folder must be reachable
under the same path by all workers (one machine, or a shared file system).
"""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pixellm.errors import CheckpointError

SCHEMA_VERSION = 1
META_FILE = "meta.json"
WEIGHTS_FILE = "weights.safetensors"
_STEP_NAME = re.compile(r"step-(\d{6,})")
_WRITING_PREFIX = ".writing-"
_CHUNK_BYTES = 4 * 2**20

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FileRecord:
    """One file of a checkpoint."""

    name: str
    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class CheckpointMeta:
    """What `meta.json` says.

    Attributes:
        step: optimiser steps done.
        position: samples of the global order consumed; the next run starts here.
        world_size: ranks that wrote it.
        files: every other file of the folder.
        config: the resolved settings of the run.
        code_version: of the code that wrote it.
        metrics: of the validation after this step; empty where there was none.
        plateau: state of the search for a plateau, see `validation.Plateau`.
        schema_version: of this layout.
    """

    step: int
    position: int
    world_size: int
    files: tuple[FileRecord, ...] = ()
    config: dict[str, Any] = field(default_factory=dict)
    code_version: str = ""
    metrics: dict[str, float] = field(default_factory=dict)
    plateau: dict[str, Any] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint."""

    path: Path
    meta: CheckpointMeta

    @property
    def weights_path(self) -> Path:
        """The model's weights."""
        return self.path / WEIGHTS_FILE

    @property
    def optimizer_paths(self) -> list[Path]:
        """One optimiser shard per rank that wrote it, in rank order."""
        return sorted(self.path / record.name for record in self.meta.files if record.name.startswith("optimizer-"))


def random_file(rank: int, world_size: int) -> str:
    """Name of the file with one rank's random state."""
    return f"random-{rank:05d}-of-{world_size:05d}.safetensors"


def optimizer_file(rank: int, world_size: int) -> str:
    """Name of one rank's optimiser shard."""
    return f"optimizer-{rank:05d}-of-{world_size:05d}.safetensors"


def describe_file(path: Path) -> FileRecord:
    """Reads a file back from disk and records its size and SHA-256."""
    digest = hashlib.sha256()
    num_bytes = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            num_bytes += len(chunk)
    return FileRecord(path.name, num_bytes, digest.hexdigest())


def sync_file(path: Path) -> None:
    """Forces a file, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class CheckpointFolder:
    """The checkpoints of one run. Every method is for one process (rank 0) unless it only reads."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def start(self, step: int) -> Path:
        """Makes the empty folder that the ranks of this step write into; leftovers of earlier attempts go."""
        writing = self.root / f"{_WRITING_PREFIX}step-{step:06d}"
        self.remove_unfinished()
        writing.mkdir(parents=True)
        return writing

    def commit(self, writing: Path, meta: CheckpointMeta) -> Checkpoint:
        """Writes `meta.json` and gives the folder its name, in one step.

        Args:
            writing: from `start`, holding every file that `meta.files` describes.
            meta: its `files` were described by reading them back.

        Raises:
            CheckpointError: a described file is absent or has another size.
        """
        for record in meta.files:
            path = writing / record.name
            if not path.is_file() or path.stat().st_size != record.num_bytes:
                raise CheckpointError(f"{path} was not written whole; the checkpoint of step {meta.step} is left out")
            sync_file(path)
        meta_path = writing / META_FILE
        meta_path.write_text(json.dumps(asdict(meta), indent=1) + "\n", encoding="utf-8")
        sync_file(meta_path)
        sync_file(writing)
        final = self.root / f"step-{meta.step:06d}"
        if final.exists():  # a run that went back behind this step, past a checkpoint that was damaged
            shutil.rmtree(final)
        writing.rename(final)
        sync_file(self.root)
        return Checkpoint(final, meta)

    def steps(self) -> list[int]:
        """Steps of the folders that look like checkpoints, ascending; none is verified."""
        if not self.root.is_dir():
            return []
        found = (_STEP_NAME.fullmatch(entry.name) for entry in self.root.iterdir() if entry.is_dir())
        return sorted(int(match[1]) for match in found if match)

    def path_of(self, step: int) -> Path:
        """The folder of a step's checkpoint."""
        return self.root / f"step-{step:06d}"

    def latest_valid(self) -> tuple[Checkpoint | None, list[str]]:
        """The newest checkpoint that verifies, and one sentence for each newer one that does not.

        Raises:
            CheckpointError: there are checkpoints, but not one of them verifies.
        """
        problems: list[str] = []
        for step in reversed(self.steps()):
            try:
                return read_checkpoint(self.path_of(step)), problems
            except CheckpointError as error:
                problems.append(str(error))
        if problems:
            raise CheckpointError(
                f"none of the checkpoints in {self.root} can be used: {'; '.join(problems)}; start anew with --fresh"
            )
        return None, []

    def score(self, step: int, metric: str) -> float | None:
        """A checkpoint's validation metric, higher being better (a loss is negated); None where it has none."""
        try:
            value = _read_meta(self.path_of(step)).metrics.get(metric)
        except CheckpointError:
            return None
        return None if value is None else better_when_higher(metric, value)

    def best_step(self, metric: str) -> int | None:
        """The step with the best validation metric, the newest of equal ones; None where no checkpoint has one."""
        scores = {step: score for step in self.steps() if (score := self.score(step, metric)) is not None}
        return max(scores, key=lambda step: (scores[step], step)) if scores else None

    def prune(
        self, keep_last: int, *, keep_best: int = 0, metric: str = "giou", busy: Collection[int] = frozenset()
    ) -> frozenset[int]:
        """Removes checkpoints but the newest, the best, and those in use. A folder loses its `meta.json` first.

        Args:
            keep_last: how many of the newest stay.
            keep_best: how many of the best stay.
            metric: by which they are compared.
            busy: steps that are being read, and go another time.

        Returns:
            The steps that are meant to stay.
        """
        steps = self.steps()
        scores = {step: self.score(step, metric) for step in steps} if keep_best else dict.fromkeys(steps)
        removed = steps_to_remove(scores, keep_last, keep_best)
        for step in removed:
            if step in busy:
                continue
            path = self.path_of(step)
            (path / META_FILE).unlink(missing_ok=True)
            shutil.rmtree(path, ignore_errors=True)
        return frozenset(steps) - frozenset(removed)

    def remove_unfinished(self) -> None:
        """Removes what interrupted writes have left."""
        if self.root.is_dir():
            for entry in self.root.iterdir():
                if entry.name.startswith(_WRITING_PREFIX):
                    shutil.rmtree(entry, ignore_errors=True)


def steps_to_remove(scores: Mapping[int, float | None], keep_last: int, keep_best: int) -> list[int]:
    """Which checkpoints go.

    Args:
        scores: step → validation score, higher being better, None where there is none.
        keep_last: how many of the newest stay, at least 1.
        keep_best: how many of the best stay; of equal ones the newer.
    """
    steps = sorted(scores)
    scored = sorted((score, step) for step, score in scores.items() if score is not None)
    kept = set(steps[-keep_last:]) | {step for _, step in scored[len(scored) - keep_best :]}
    return [step for step in steps if step not in kept]


def better_when_higher(metric: str, value: float) -> float:
    """A validation metric as a score: a loss is negated."""
    return -value if metric.endswith("loss") else value


def read_checkpoint(path: Path) -> Checkpoint:
    """Reads and verifies a checkpoint: every file is there with its size and digest.

    Raises:
        CheckpointError: naming the checkpoint and the first thing that is wrong with it.
    """
    meta = _read_meta(path)
    for record in meta.files:
        file = path / record.name
        if not file.is_file():
            raise CheckpointError(f"{path.name} is incomplete: {record.name} is missing")
        found = describe_file(file)
        if found.num_bytes != record.num_bytes:
            raise CheckpointError(
                f"{path.name} is damaged: {record.name} has {found.num_bytes} bytes, wanted {record.num_bytes}"
            )
        if found.sha256 != record.sha256:
            raise CheckpointError(f"{path.name} is damaged: the content of {record.name} does not match its digest")
    return Checkpoint(path, meta)


def _read_meta(path: Path) -> CheckpointMeta:
    try:
        content = json.loads((path / META_FILE).read_text(encoding="utf-8"))
        version = content["schema_version"]
        if version != SCHEMA_VERSION:
            raise CheckpointError(f"{path.name} has layout {version}, this code reads {SCHEMA_VERSION}")
        return CheckpointMeta(**(content | {"files": _records(content["files"])}))
    except OSError:
        raise CheckpointError(f"{path.name} is incomplete: it has no {META_FILE}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path.name} is damaged: {META_FILE} cannot be read ({error})") from None


def _records(files: Iterable[Mapping[str, Any]]) -> tuple[FileRecord, ...]:
    return tuple(FileRecord(**record) for record in files)
