"""Copies of the checkpoints in a store (`train.checkpoint_uri`), made by a thread while training goes on.

A checkpoint is there as soon as its `meta.json` is, which goes up last. A store that fails is asked again after pauses
that double; when it goes on failing the copy is given up and named, and training is not disturbed. A machine that holds
no checkpoint of the run takes the newest whole one from the store.
"""

import logging
import os
import queue
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pixellm.errors import CheckpointError, PixelLMError
from pixellm.jobs.train.checkpoints import META_FILE, CheckpointFolder, read_checkpoint
from pixellm.jobs.train.events import UploadEvent
from pixellm.platform import storage

MAX_ATTEMPTS = 6
FIRST_PAUSE_S = 0.5
_STEP_NAME = re.compile(r"step-(\d{6,})")

_log = logging.getLogger(__name__)


class Uploader:
    """Copies checkpoints of one run, the newest when it is behind. For rank 0.

    Args:
        uri: of the run's checkpoints in the store.
        folder: of the run's checkpoints here.
        report: receives an event per copy, from the thread.
        pause_s: before the second attempt; doubles with each.
    """

    def __init__(
        self, uri: str, folder: CheckpointFolder, report: Callable[[UploadEvent], None], pause_s: float
    ) -> None:
        self._uri, self._folder, self._report, self._pause_s = uri, folder, report, pause_s
        self._waiting: queue.Queue[int | None] = queue.Queue()
        self._kept: frozenset[int] = frozenset()
        self._lock = threading.Lock()
        self._busy: set[int] = set()
        self._thread = threading.Thread(target=self._work, name="checkpoint-upload", daemon=True)
        self._thread.start()

    @property
    def busy(self) -> frozenset[int]:
        """Steps whose folders are needed here still."""
        with self._lock:
            return frozenset(self._busy)

    def submit(self, step: int, kept: frozenset[int]) -> None:
        """Asks for a copy of a step's checkpoint; one that waits for its turn is left out in favour of this one.

        Args:
            step: whose checkpoint is whole.
            kept: steps that the store keeps beside it once it is there.
        """
        with self._lock:
            self._kept = kept | {step}
            while not self._waiting.empty():
                if (older := self._waiting.get()) is not None:
                    self._busy.discard(older)
            self._busy.add(step)
            self._waiting.put(step)

    def close(self) -> None:
        """Waits for the copies that were asked for."""
        self._waiting.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (step := self._waiting.get()) is not None:
            started, attempts, problem = time.perf_counter(), 0, ""
            for attempts in range(1, MAX_ATTEMPTS + 1):
                problem = _try_copy(self._folder.path_of(step), storage.join(self._uri, f"step-{step:06d}"))
                if not problem:
                    self._prune_store()
                    break
                _log.warning("checkpoint %d was not copied (attempt %d): %s", step, attempts, problem)
                time.sleep(self._pause_s * 2 ** (attempts - 1))
            with self._lock:
                self._busy.discard(step)
            seconds = time.perf_counter() - started
            self._report(UploadEvent(step, self._uri, seconds, attempts, problem or None))

    def _prune_store(self) -> None:
        """Takes those checkpoints out of the store that are not meant to stay."""
        try:
            for name in filter(_STEP_NAME.fullmatch, storage.list_names(self._uri)):
                if int(name.removeprefix("step-")) in self._kept:
                    continue
                filesystem, path = storage.open_filesystem(storage.join(self._uri, name))
                if storage.exists(storage.join(self._uri, name, META_FILE)):
                    filesystem.delete_file(f"{path}/{META_FILE}")
                filesystem.delete_dir(path)
        except Exception as error:  # stores raise errors of their own kinds; what stays there does no harm
            _log.warning("old checkpoints stay in %s: %s", self._uri, error)


def fetch_newest(uri: str, folder: CheckpointFolder) -> list[str]:
    """Brings the newest whole checkpoint of a store here.

    Args:
        uri: of the run's checkpoints in the store.
        folder: of the run's checkpoints here, holding none.

    Returns:
        One sentence for each newer one that is damaged.

    Raises:
        CheckpointError: the store cannot be read.
    """
    problems: list[str] = []
    try:
        names = storage.list_names(uri)
        for name in sorted(filter(_STEP_NAME.fullmatch, names), reverse=True):
            files = storage.list_names(storage.join(uri, name))
            if META_FILE not in files:
                continue  # its upload was interrupted
            writing = folder.start(int(name.removeprefix("step-")))
            for file in files:
                (writing / file).write_bytes(storage.read_bytes(storage.join(uri, name, file)))
            try:
                read_checkpoint(writing)
            except CheckpointError as error:
                problems.append(f"{uri}: {error}")
                folder.remove_unfinished()
                continue
            writing.rename(folder.path_of(int(name.removeprefix("step-"))))
            return problems
    except (OSError, PixelLMError) as error:
        raise CheckpointError(f"the checkpoints in {uri} cannot be read: {error}; check train.checkpoint_uri") from None
    return problems


def _try_copy(source: Path, uri: str) -> str:
    """Copies one checkpoint; returns what went wrong, or an empty string."""
    try:
        with storage.atomic_write_dir(uri, commit_file=META_FILE) as staging:
            for path in source.iterdir():
                _link_or_copy(path, staging / path.name)
    except Exception as error:  # stores raise errors of their own kinds; every one is worth another attempt
        return f"{type(error).__name__}: {error}".splitlines()[0][:300]
    return ""


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


@contextmanager
def closing_uploads(
    uri: str | None, folder: CheckpointFolder, report: Callable[[UploadEvent], None]
) -> Iterator[Uploader | None]:
    """The uploader of a run, where there is a store; waits for the last copy at the end."""
    if uri is None:
        yield None
        return
    uploader = Uploader(uri, folder, report, FIRST_PAUSE_S)
    try:
        yield uploader
    finally:
        uploader.close()
