"""The order, executed: samples read, composed and encoded ahead of the consumer, in exactly the order's sequence.

`stream_batches` lets Ray Data run the work on the cluster's CPUs and is built inside each rank: a dataset handed to a
trainer is split by blocks, so its global batches would depend on the number of ranks. `iterate_batches` does the same
in this process, for evaluation and for proving that both give one sequence.

A block of encoded samples travels as one pickled value: that costs one copy and no per-column work, and a sample may
be any picklable object.
"""

import hashlib
import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Generic, TypeVar

from pixellm.errors import ConfigError, PixelLMError
from pixellm.platform.data.compose import Dialogue, QuestionSource
from pixellm.platform.data.order import Draw, MixtureOrder
from pixellm.platform.data.schema import Row

Example = TypeVar("Example")

#: Turns a row, the dialogue composed about it and its draw into what the consumer wants.
Encode = Callable[[Row, Dialogue, Draw], Example]

_BLOCK_COLUMN = "examples"
_MAX_STORED_BYTES = 512 * 2**20


@dataclass(frozen=True, slots=True)
class RankSlice:
    """Which positions one rank consumes: its contiguous part of every global batch.

    Global batch s is the positions start + [s·G, (s+1)·G); rank r of W takes the r-th of its W equal parts.

    Args:
        global_batch_size: G, samples of one global batch over all ranks.
        rank: r, 0 ≤ r < W.
        world_size: W; it divides G.
        start_position: of the first global batch.
        num_positions: over all ranks; a multiple of G.

    Raises:
        ConfigError: G does not divide evenly, or a number is out of range.
    """

    global_batch_size: int
    rank: int
    world_size: int
    start_position: int
    num_positions: int

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size or self.start_position < 0 or self.num_positions < 0:
            raise ConfigError(f"no such slice of the order: {self}")
        if self.global_batch_size % self.world_size or self.global_batch_size < 1:
            raise ConfigError(
                f"a global batch of {self.global_batch_size} cannot be shared equally by {self.world_size} ranks; "
                "choose train.micro_batch_size and train.grad_accumulation so that it can"
            )
        if self.num_positions % self.global_batch_size:
            raise ConfigError(
                f"{self.num_positions} positions are no whole number of global batches of {self.global_batch_size}"
            )

    @property
    def batch_size(self) -> int:
        """Samples of one batch on this rank."""
        return self.global_batch_size // self.world_size

    def __len__(self) -> int:
        return self.num_positions // self.world_size

    def position(self, local_index: int) -> int:
        """Global position of this rank's sample number `local_index`."""
        step, offset = divmod(local_index, self.batch_size)
        return self.start_position + step * self.global_batch_size + self.rank * self.batch_size + offset


@dataclass(frozen=True, slots=True)
class SampleReader(Generic[Example]):
    """Gives the encoded sample of any position. Picklable as long as `encode` is."""

    sources: Sequence[QuestionSource]
    order: MixtureOrder
    encode: Encode[Example]

    def read(self, position: int) -> Example:
        """The encoded sample at a position of the global order."""
        draw = self.order.sample_at(position)
        row, dialogue = self.sources[draw.source].sample(draw)
        return self.encode(row, dialogue, draw)


def stream_batches(
    sources: Sequence[QuestionSource],
    order: MixtureOrder,
    encode: Encode[Example],
    *,
    global_batch_size: int,
    rank: int,
    world_size: int,
    start_position: int,
    num_positions: int,
    block_size: int = 16,
    task_cpus: float = 0.5,
    max_tasks: int | None = None,
) -> Iterator[list[Example]]:
    """Streams this rank's part of each global batch through Ray Data; to be called in the rank's own process.

    Args:
        sources: of the mixture, in the order's numbering.
        order: says what comes at each position.
        encode: applied in the reading tasks; must be picklable (cloudpickle).
        global_batch_size: samples of one step over all ranks.
        rank: of this process.
        world_size: ranks in all; any number gives the same global sequence.
        start_position: where to start; any position costs the same.
        num_positions: how many positions to consume over all ranks, a multiple of `global_batch_size`.
        block_size: samples that one reading task prepares.
        task_cpus: logical CPUs of a reading task.
        max_tasks: reading tasks of this rank at a time; None: as many as the cluster has room for.

    Yields:
        Lists of global_batch_size // world_size encoded samples, in order.

    Raises:
        ConfigError: see `RankSlice`.
        PixelLMError: whatever reading, composing or encoding raised.
    """
    part = RankSlice(global_batch_size, rank, world_size, start_position, num_positions)
    if not len(part):
        return
    dataset = _block_dataset(SampleReader(sources, order, encode), part, block_size, task_cpus, max_tasks)
    waiting: list[Example] = []
    for block in _blocks(dataset):
        waiting += block
        while len(waiting) >= part.batch_size:
            yield waiting[: part.batch_size]
            del waiting[: part.batch_size]


def iterate_batches(
    sources: Sequence[QuestionSource],
    order: MixtureOrder,
    encode: Encode[Example],
    *,
    global_batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    start_position: int = 0,
    num_positions: int,
) -> Iterator[list[Example]]:
    """The same batches as `stream_batches`, made one by one in this process without Ray."""
    part = RankSlice(global_batch_size, rank, world_size, start_position, num_positions)
    reader = SampleReader(sources, order, encode)
    for first in range(0, len(part), part.batch_size):
        yield [reader.read(part.position(index)) for index in range(first, first + part.batch_size)]


def _block_dataset(
    reader: SampleReader[Any], part: RankSlice, block_size: int, task_cpus: float, max_tasks: int | None
) -> Any:
    """A Ray dataset with one row per block of samples, the block's number, turned into the block's samples."""
    import ray  # slow to import; only who streams needs it
    from ray import cloudpickle

    num_blocks = -(-len(part) // block_size)
    packed = cloudpickle.dumps(reader)
    digest = hashlib.sha256(packed).hexdigest()

    def read_blocks(table: Any) -> Any:
        import pyarrow as pa

        worker_reader = _unpack_reader(digest, _Packed(packed))
        blocks = []
        for number in table["id"].to_pylist():
            indices = range(number * block_size, min((number + 1) * block_size, len(part)))
            examples = [worker_reader.read(part.position(index)) for index in indices]
            blocks.append(pickle.dumps(examples, protocol=5))
        return pa.table({_BLOCK_COLUMN: pa.array(blocks, pa.large_binary())})

    dataset = ray.data.range(num_blocks, override_num_blocks=num_blocks)
    dataset.context.execution_options.preserve_order = True
    dataset.context.execution_options.resource_limits = ray.data.ExecutionResources(
        object_store_memory=_MAX_STORED_BYTES
    )
    dataset.context.enable_progress_bars = False
    return dataset.map_batches(
        read_blocks, batch_size=1, batch_format="pyarrow", num_cpus=task_cpus, concurrency=max_tasks
    )


def _blocks(dataset: Any) -> Iterator[list[Any]]:
    import ray

    try:
        for table in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2):
            for block in table[_BLOCK_COLUMN]:
                yield pickle.loads(block.as_buffer())
    except ray.exceptions.RayError as error:
        ours = _cause_of_ours(error)
        if ours is None:
            raise
        raise ours from error


def _cause_of_ours(error: BaseException | None) -> PixelLMError | None:
    """The error of our own that a task failed with, out of the wrappers that it arrived in."""
    while error is not None:
        if isinstance(error, PixelLMError):
            return error
        error = getattr(error, "cause", None) or error.__cause__
    return None


class _Packed:
    """Bytes that all compare equal, so that a cache looks at the digest beside them only."""

    def __init__(self, content: bytes) -> None:
        self.content = content

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Packed)

    def __hash__(self) -> int:
        return 0


@lru_cache(maxsize=4)
def _unpack_reader(digest: str, packed: _Packed) -> SampleReader[Any]:
    """The reader of a stream, once per worker process: its tokenizer and open files live as long as the process."""
    del digest  # the cache's key
    return pickle.loads(packed.content)  # type: ignore[no-any-return]
