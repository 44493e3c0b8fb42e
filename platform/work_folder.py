"""A folder that is filled over several attempts and appears in one step.

What an interrupted attempt (an error, a kill -9, a lost machine) has finished stays in a hidden folder beside its
place, and the next attempt finds it there. On a local disk it is published by a rename. In an object store its files
are moved to their place one by one, last the file without which readers take the folder for absent.
"""

import fcntl
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pixellm.errors import DataError
from pixellm.platform import storage

_STORE_FOLDER = ".preparing"


@dataclass(frozen=True, slots=True)
class WorkFolder:
    """Where an unfinished folder grows.

    Attributes:
        uri: of the folder that it will become.
        content: URI of the folder whose files will be published.
        progress: URI of a folder for what only the work itself needs.
        commit_file: published last.
    """

    uri: str
    content: str
    progress: str
    commit_file: str

    def publish(self, names: Sequence[str]) -> None:
        """Makes exactly the named files of `content` the content of `uri`, and removes the work folder.

        Args:
            names: files in `content`; `commit_file` must be one of them.
        """
        target, content = storage.local_path(self.uri), storage.local_path(self.content)
        if target is None or content is None:
            self._publish_to_store(names)
            return
        for path in content.iterdir():
            if path.name not in names:
                path.unlink()
        storage.swap_in(content, target)
        shutil.rmtree(content.parent)

    def _publish_to_store(self, names: Sequence[str]) -> None:
        filesystem, base = storage.open_filesystem(self.uri)
        _, content = storage.open_filesystem(self.content)
        old = [name for name in storage.list_names(self.uri) if name != _STORE_FOLDER]
        for name in sorted(old, key=lambda name: name != self.commit_file):
            filesystem.delete_file(f"{base}/{name}")
        for name in sorted(names, key=lambda name: (name == self.commit_file, name)):
            filesystem.move(f"{content}/{name}", f"{base}/{name}")
        filesystem.delete_dir(f"{base}/{_STORE_FOLDER}")


@contextmanager
def open_work_folder(uri: str | Path, *, commit_file: str) -> Iterator[WorkFolder]:
    """Opens the work folder of a URI, with what an interrupted attempt left in it; one process at a time.

    Args:
        uri: the folder to make. An existing one is replaced if it is empty or holds `commit_file`.
        commit_file: name of the file without which readers take the folder for absent.

    Raises:
        DataError: `uri` holds something else, which is not ours to replace, or another process is making it.
    """
    names = [name for name in storage.list_names(uri) if name != _STORE_FOLDER]
    if (names and commit_file not in names) or (storage.exists(uri) and not storage.is_dir(uri)):
        raise DataError(f"{uri} exists and holds no {commit_file}: not replaced; choose another place or remove it")
    target = storage.local_path(uri)
    if target is None:
        base = storage.join(uri, _STORE_FOLDER)
        folder = WorkFolder(str(uri), storage.join(base, "content"), storage.join(base, "progress"), commit_file)
        _make_folders(folder)
        yield folder
        return
    base_path = target.parent / f".{target.name}.preparing"
    with _locked(base_path, uri):
        folder = WorkFolder(str(target), str(base_path / "content"), str(base_path / "progress"), commit_file)
        _make_folders(folder)
        try:
            yield folder
        finally:
            if base_path.exists() and not any((base_path / "content").iterdir()):
                shutil.rmtree(base_path)  # nothing finished that the next attempt could use


def _make_folders(folder: WorkFolder) -> None:
    for uri in (folder.content, folder.progress):
        filesystem, path = storage.open_filesystem(uri)
        filesystem.create_dir(path, recursive=True)


@contextmanager
def _locked(folder: Path, uri: str | Path) -> Iterator[None]:
    """Holds the folder's lock; the kernel gives it back however the process ends."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise DataError(f"another process is preparing {uri}; wait for it, or choose another --out") from None
        if not folder.exists() or os.stat(folder).st_ino != os.fstat(descriptor).st_ino:
            raise DataError(f"another process has just prepared {uri}; run again to replace it")
        yield
    finally:
        os.close(descriptor)
