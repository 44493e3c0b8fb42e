"""Reading and writing by URI, so that shards and inputs may lie on a disk or in an object store.

A URI is a local path, `file://…`, or what pyarrow (s3, gs, abfs, hdfs) or fsspec (anything installed) can open.
Directories are published atomically: a reader sees the old content, the new content, or nothing, never a half.
"""

import json
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.fs as pafs

from pixellm.errors import DataError

_COPY_CHUNK_BYTES = 8 * 2**20


def open_filesystem(uri: str | Path) -> tuple[pafs.FileSystem, str]:
    """The filesystem that holds a URI, and the path inside it.

    Raises:
        DataError: nothing installed can open URIs of this scheme.
    """
    text = str(uri)
    if "://" not in text:
        return pafs.LocalFileSystem(), str(Path(text).expanduser().absolute())
    try:
        filesystem, path = pafs.FileSystem.from_uri(text)
    except pa.ArrowException:
        return _open_with_fsspec(text)
    except OSError as error:  # hdfs:// without its library, a store that cannot be reached
        raise DataError(f"cannot open {text}: {str(error).splitlines()[0]}") from None
    return filesystem, path


def _open_with_fsspec(uri: str) -> tuple[pafs.FileSystem, str]:
    try:
        filesystem, path = fsspec.core.url_to_fs(uri)
    except (ValueError, ImportError) as error:
        raise DataError(f"cannot open {uri}: {error}; use a path, file://, s3://, gs:// or abfs://") from None
    return pafs.PyFileSystem(pafs.FSSpecHandler(filesystem)), path


def local_path(uri: str | Path) -> Path | None:
    """The path of a URI on this machine's disk; None for other stores."""
    filesystem, path = open_filesystem(uri)
    return Path(path) if isinstance(filesystem, pafs.LocalFileSystem) else None


def absolute(uri: str | Path) -> str:
    """A URI that means the same in every process: a worker's working directory is another one.

    Nothing is asked of a store (Arrow looks an S3 bucket's region up).
    """
    text = str(uri)
    return text if "://" in text and not text.startswith("file://") else str(local_path(text) or text)


def join(uri: str | Path, *names: str) -> str:
    """The URI of something below a URI."""
    return "/".join([str(uri).rstrip("/"), *names])


def exists(uri: str | Path) -> bool:
    """Whether a file or folder is there."""
    filesystem, path = open_filesystem(uri)
    return bool(filesystem.get_file_info(path).type != pafs.FileType.NotFound)


def is_dir(uri: str | Path) -> bool:
    """Whether a folder is there."""
    filesystem, path = open_filesystem(uri)
    return bool(filesystem.get_file_info(path).type == pafs.FileType.Directory)


def list_names(uri: str | Path) -> list[str]:
    """Names directly inside a folder, sorted; empty where there is no such folder."""
    if not is_dir(uri):
        return []
    filesystem, path = open_filesystem(uri)
    return sorted(info.base_name for info in filesystem.get_file_info(pafs.FileSelector(path)))


def read_bytes(uri: str | Path) -> bytes:
    """The whole content of a file.

    Raises:
        DataError: there is no such file, or it cannot be read.
    """
    filesystem, path = open_filesystem(uri)
    try:
        with filesystem.open_input_file(path) as file:
            return bytes(file.read())
    except FileNotFoundError:
        raise DataError(f"there is no file {uri}; check the path") from None
    except OSError as error:
        raise DataError(f"cannot read {uri}: {error}") from None


def write_bytes(uri: str | Path, content: bytes) -> None:
    """Writes a file, and the folders above it. On a local disk it appears whole or not at all.

    Raises:
        DataError: it cannot be written.
    """
    filesystem, path = open_filesystem(uri)
    is_local = isinstance(filesystem, pafs.LocalFileSystem)
    written = f"{path}.{uuid.uuid4().hex[:8]}.tmp" if is_local else path
    try:
        filesystem.create_dir(path.rpartition("/")[0], recursive=True)
        with filesystem.open_output_stream(written) as sink:
            sink.write(content)
        if is_local:
            filesystem.move(written, path)
    except OSError as error:
        raise DataError(f"cannot write {uri}: {error}; check the path and its permissions") from None


def remove_dir(uri: str | Path, *, commit_file: str) -> None:
    """Removes a folder that `atomic_write_dir` wrote; does nothing where there is none.

    Raises:
        DataError: the folder holds no `commit_file`, so it is not ours to remove.
    """
    names = list_names(uri)
    if not names:
        return
    if commit_file not in names:
        raise DataError(f"{uri} holds no {commit_file}: not removed; choose another place or remove it")
    filesystem, path = open_filesystem(uri)
    filesystem.delete_file(f"{path}/{commit_file}")
    filesystem.delete_dir(path)


def read_json(uri: str | Path) -> Any:
    """The parsed content of a JSON file.

    Raises:
        DataError: the file is absent or is not JSON (the place of the fault is named).
    """
    content = read_bytes(uri)
    try:
        return json.loads(content)
    except UnicodeDecodeError:
        raise DataError(f"{uri} is not JSON: it is not UTF-8 text; give the annotation file itself") from None
    except json.JSONDecodeError as error:
        raise DataError(
            f"{uri} is not JSON: {error.msg} at line {error.lineno} column {error.colno}; "
            "download or export the annotation file again"
        ) from None
    except RecursionError:
        raise DataError(f"{uri} is not usable JSON: it is nested too deeply") from None


@contextmanager
def atomic_write_dir(uri: str | Path, *, commit_file: str) -> Iterator[Path]:
    """Yields an empty local folder to fill; on success it becomes the content of `uri` in one step.

    On a local disk the folder is written beside its place and renamed. In an object store the files are uploaded and
    `commit_file`, whose presence makes the folder valid, goes up last. After an exception nothing has changed.

    Args:
        uri: the folder to write. An existing one is replaced if it is empty or holds `commit_file`.
        commit_file: name of the file without which readers take the folder for absent.

    Raises:
        DataError: `uri` holds something else, which is not ours to replace.
    """
    names = list_names(uri)
    if (names and commit_file not in names) or (not names and exists(uri) and not is_dir(uri)):
        raise DataError(f"{uri} exists and holds no {commit_file}: not replaced; choose another place or remove it")
    target = local_path(uri)
    if target is None:
        with tempfile.TemporaryDirectory(prefix="pixellm-") as staging:
            yield Path(staging)
            _upload(Path(staging), uri, commit_file)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    staging_dir = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
    try:
        yield staging_dir
        staging_dir.chmod(0o755)
        swap_in(staging_dir, target)
    finally:
        shutil.rmtree(staging_dir, ignore_errors=True)


@contextmanager
def atomic_write_file(uri: str | Path) -> Iterator[Path]:
    """Yields a local path to write; on success the file becomes `uri` in one step, after an exception nothing has.

    Several processes may write the same URI at a time: one of their files stands there in the end, whole.
    """
    target = local_path(uri)
    if target is None:
        with tempfile.TemporaryDirectory(prefix="pixellm-") as staging:
            yield Path(staging) / "file"
            _upload_file(Path(staging) / "file", uri)
        return
    staged = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield staged
        staged.replace(target)
    finally:
        staged.unlink(missing_ok=True)


def file_stamps(uris: Sequence[str]) -> list[str]:
    """For each file its size and time of change as text; "absent" where there is none."""
    stamps: list[str] = []
    for uri in uris:
        filesystem, path = open_filesystem(uri)
        info = filesystem.get_file_info(path)
        is_file = info.type == pafs.FileType.File
        stamps.append(f"{info.size} {info.mtime_ns}" if is_file else "absent")
    return stamps


def swap_in(staging_dir: Path, target: Path) -> None:
    """Renames a folder to its place; an older one there is removed."""
    if not target.exists():
        staging_dir.rename(target)
        return
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", suffix=".old", dir=target.parent) as old:
        target.rename(Path(old) / target.name)
        staging_dir.rename(target)


def _upload(folder: Path, uri: str | Path, commit_file: str) -> None:
    filesystem, base = open_filesystem(uri)
    if commit_file in list_names(uri):
        filesystem.delete_file(f"{base}/{commit_file}")
    filesystem.create_dir(base, recursive=True)
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    for name in sorted(files, key=lambda name: name == Path(commit_file)):
        if name.parent != Path():
            filesystem.create_dir(f"{base}/{name.parent.as_posix()}", recursive=True)
        _upload_file(folder / name, join(uri, name.as_posix()))


def _upload_file(path: Path, uri: str | Path) -> None:
    filesystem, remote = open_filesystem(uri)
    with path.open("rb") as source, filesystem.open_output_stream(remote) as sink:
        shutil.copyfileobj(source, sink, _COPY_CHUNK_BYTES)
