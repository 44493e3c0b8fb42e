"""Numbered blocks of picklable values, computed by Ray Data tasks ahead of the consumer and given out in order.

A block travels pickled, so it may hold anything; its large arrays travel beside the pickle, written once into Ray's
object store and read there without a copy (they arrive read-only). One task makes one block, reading and computing in
the same task. An error of our own travels in its block's place, so that the consumer meets it as what it is.
"""

import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa
import ray
import ray.data
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from pixellm.errors import PixelLMError
from pixellm.platform.data.pacing import PacedLoop

#: Makes the values of a block from its number.
MakeBlock = Callable[[int], list[Any]]

#: From this size on an array is worth a value of its own.
_LARGE_BYTES = 64 * 2**10

#: How much finished work may wait for a slow consumer.
_MAX_STORED_BYTES = 512 * 2**20

#: Ray Data describes every block of a dataset before it starts; so that a long run starts as fast as a short one and
#: needs no more memory, it goes through several datasets.
_BLOCKS_PER_DATASET = 1024


def stream_blocks(make_block: MakeBlock, num_blocks: int, *, task_cpus: float, max_tasks: int | None) -> Iterator[Any]:
    """Yields the values of blocks 0 … num_blocks − 1, in order.

    Args:
        make_block: picklable (cloudpickle); unpickled once in each worker process.
        num_blocks: how many.
        task_cpus: logical CPUs of the task that makes a block.
        max_tasks: tasks at a time; None: as many as the cluster has room for.

    Raises:
        PixelLMError: what `make_block` raised, when its block's turn comes.
    """
    maker_ref = ray.put(make_block)
    for first in range(0, num_blocks, _BLOCKS_PER_DATASET):
        numbers = range(first, min(first + _BLOCKS_PER_DATASET, num_blocks))
        for packed in _packed_blocks(_NumberedBlocks(maker_ref, numbers), len(numbers), task_cpus, max_tasks):
            block = pickle.loads(packed[0], buffers=packed[1:])
            if isinstance(block, PixelLMError):
                raise block
            yield from block


def _packed_blocks(
    source: "_NumberedBlocks", num_blocks: int, task_cpus: float, max_tasks: int | None
) -> Iterator[list[pa.Buffer]]:
    dataset = ray.data.read_datasource(
        source, override_num_blocks=num_blocks, num_cpus=task_cpus, concurrency=max_tasks
    )
    dataset.context.execution_options.preserve_order = True
    dataset.context.execution_options.resource_limits = ray.data.ExecutionResources(
        object_store_memory=_MAX_STORED_BYTES
    )
    dataset.context.enable_progress_bars = False
    dataset.context.custom_execution_callback_classes = [PacedLoop]
    for table in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1):
        yield [value.as_buffer() for value in table["block"]]


class _NumberedBlocks(Datasource):
    """A source with one read task per block number."""

    def __init__(self, maker_ref: Any, numbers: range) -> None:
        super().__init__()
        self._maker_ref = maker_ref
        self._numbers = numbers

    def get_name(self) -> str:
        """The operator's name in Ray's displays."""
        return "NumberedBlocks"

    def estimate_inmemory_data_size(self) -> int | None:
        """Unknown before a block is made."""
        return None

    def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ReadTask]:
        """One task per block, whatever number Ray Data proposes."""
        del parallelism
        metadata = BlockMetadata(num_rows=1, size_bytes=None, input_files=None, exec_stats=None)
        return [ReadTask(_MakeNumbered(self._maker_ref, number), metadata, schema=_SCHEMA) for number in self._numbers]


_SCHEMA = pa.schema([("block", pa.large_binary())])


class _MakeNumbered:
    """Makes one block in a worker process."""

    def __init__(self, maker_ref: Any, number: int) -> None:
        self._maker_ref = maker_ref
        self._number = number

    def __call__(self) -> list[pa.Table]:
        try:
            block: Any = _maker_of(self._maker_ref)(self._number)
        except PixelLMError as error:
            block = error
        return [_packed(block)]


def _packed(block: Any) -> pa.Table:
    """A table of one column: the pickle, then each large buffer that it refers to, none of them copied."""
    beside: list[pa.Buffer] = []

    def stays_inside(buffer: pickle.PickleBuffer) -> bool:
        raw = buffer.raw()
        if raw.nbytes >= _LARGE_BYTES:
            beside.append(pa.py_buffer(raw))
        return raw.nbytes < _LARGE_BYTES

    pickled = pa.py_buffer(pickle.dumps(block, protocol=5, buffer_callback=stays_inside))
    values = [_one_value(buffer) for buffer in (pickled, *beside)]
    return pa.table({"block": pa.chunked_array(values, pa.large_binary())}, schema=_SCHEMA)


def _one_value(buffer: pa.Buffer) -> pa.Array:
    ends = pa.array([0, buffer.size], pa.int64()).buffers()[1]
    return pa.LargeBinaryArray.from_buffers(pa.large_binary(), 1, [None, ends, buffer])


#: The makers that this worker process has unpickled, newest last: tokenizers and open files live as long as they do.
_MAKERS: dict[Any, MakeBlock] = {}
_MAX_MAKERS = 4


def _maker_of(ref: Any) -> MakeBlock:
    if ref not in _MAKERS:
        if len(_MAKERS) >= _MAX_MAKERS:
            del _MAKERS[next(iter(_MAKERS))]
        _MAKERS[ref] = ray.get(ref)
    return _MAKERS[ref]
