"""The pictures of a batch prediction: those of shards, or the files below a folder, in an order that never changes.

A folder is listed once, when the job is begun; the list is kept beside the answers, so that block k means the same
pictures to every attempt and every actor. Shards are a list already.
"""

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from time import sleep
from typing import Protocol

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from pixellm.errors import DataError
from pixellm.platform import storage
from pixellm.platform.data.shards import DATASET_FILE, ShardedDataset, open_shards

LIST_FILE = "inputs.parquet"
SUFFIXES = (".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
_LIST_SCHEMA = pa.schema([("input", pa.string())])
_PAUSES_S = (0.5, 2.0)


@dataclass(frozen=True)
class Picture:
    """One input.

    Attributes:
        number: its place in the order, from 0.
        name: path below the folder, or SOURCE/IMAGE_ID of a row of shards.
        load: reads its encoded bytes, from any thread; a DataError where it cannot be read.
    """

    number: int
    name: str
    load: Callable[[], bytes]


class Inputs(Protocol):
    """Pictures by block; each process opens its own."""

    def __len__(self) -> int:
        """How many pictures there are."""
        ...

    def block(self, number: int) -> list[Picture]:
        """The pictures of a block, in order, their bytes not read yet."""
        ...


def pin_inputs(input_uri: str, out_uri: str, block_size: int, *, is_begun: bool) -> str:
    """Fixes which pictures a job is about, until there is an answer about one of them.

    Args:
        input_uri: shards, or a folder with picture files at any depth.
        out_uri: of the job; gets the list of a folder's files.
        block_size: pictures of a block.
        is_begun: whether there are answers: then the list is kept as it is.

    Returns:
        What tells other shards from these; of a folder its URI, since its list is kept.

    Raises:
        DataError: there is no such place, or no picture in it.
    """
    if storage.exists(storage.join(input_uri, DATASET_FILE)):
        return open_shards(input_uri).digest
    if is_begun and storage.exists(storage.join(out_uri, LIST_FILE)):
        return input_uri
    if not storage.is_dir(input_uri):
        raise DataError(f"there is no folder {input_uri}; wanted shards or a folder of pictures")
    names = sorted(_walk(input_uri))
    if not names:
        raise DataError(f"{input_uri} holds no picture; looked for {', '.join(SUFFIXES)} at any depth")
    sink = io.BytesIO()
    pq.write_table(pa.table({"input": names}, _LIST_SCHEMA), sink, row_group_size=block_size, compression="zstd")
    storage.write_bytes(storage.join(out_uri, LIST_FILE), sink.getvalue())
    return input_uri


def open_inputs(input_uri: str, out_uri: str, block_size: int) -> Inputs:
    """The pictures that `pin_inputs` fixed."""
    if storage.exists(storage.join(input_uri, DATASET_FILE)):
        return _Rows(open_shards(input_uri), block_size)
    return _Files(input_uri, storage.join(out_uri, LIST_FILE))


class _Rows:
    """Rows of shards."""

    def __init__(self, dataset: ShardedDataset, block_size: int) -> None:
        self._dataset, self._block_size = dataset, block_size

    def __len__(self) -> int:
        return len(self._dataset)

    def block(self, number: int) -> list[Picture]:
        """Consecutive rows, read at once: shards that are damaged are an error, not the fault of a picture."""
        first = number * self._block_size
        places = range(first, min(first + self._block_size, len(self)))
        rows = ((place, self._dataset.read_row(place)) for place in places)
        return [Picture(place, f"{row.source}/{row.image_id}", partial(bytes, row.image)) for place, row in rows]


class _Files:
    """Files below a folder; a block is a row group of the list."""

    def __init__(self, input_uri: str, list_uri: str) -> None:
        self._uri = input_uri
        filesystem, path = storage.open_filesystem(list_uri)
        try:
            self._list = pq.ParquetFile(filesystem.open_input_file(path))
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"cannot read {list_uri}: {error}; choose another --out, or remove it") from None
        self._block_size = self._list.metadata.row_group(0).num_rows

    def __len__(self) -> int:
        return int(self._list.metadata.num_rows)

    def block(self, number: int) -> list[Picture]:
        """Consecutive files of the list."""
        names: list[str] = self._list.read_row_group(number, use_threads=False)["input"].to_pylist()
        first = number * self._block_size
        return [
            Picture(place, name, partial(_read_patiently, storage.join(self._uri, name)))
            for place, name in enumerate(names, first)
        ]


def _read_patiently(uri: str) -> bytes:
    """A store that hiccups is asked again, since what is quarantined stays so; a file that is gone is not."""
    for pause_s in _PAUSES_S:
        try:
            return storage.read_bytes(uri)
        except DataError:
            if not storage.exists(uri):
                raise
        sleep(pause_s)
    return storage.read_bytes(uri)


def _walk(uri: str) -> Iterator[str]:
    """Paths of pictures below a folder, one folder's listing in memory; hidden files and folders are left out."""
    filesystem, base = storage.open_filesystem(uri)
    folders = [base.rstrip("/")]
    while folders:
        for info in filesystem.get_file_info(pafs.FileSelector(folders.pop())):
            if info.base_name.startswith("."):
                continue
            if info.type == pafs.FileType.Directory:
                folders.append(info.path.rstrip("/"))
            elif info.base_name.lower().endswith(SUFFIXES):
                yield info.path.removeprefix(base.rstrip("/") + "/")
