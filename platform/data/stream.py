"""The order, executed: samples read, composed and encoded ahead of the consumer, in exactly the order's sequence.

`stream_batches` lets Ray Data run the work on the cluster's CPUs and is built inside each rank: a dataset handed to a
trainer is split by blocks, so its global batches would depend on the number of ranks. `iterate_batches` does the same
in this process, for evaluation and for proving that both give one sequence.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from pixellm.errors import ConfigError
from pixellm.platform.data.compose import Dialogue, QuestionSource
from pixellm.platform.data.order import Draw, Order
from pixellm.platform.data.schema import Row

Example = TypeVar("Example")

#: Turns a row, the dialogue composed about it and its draw into what the consumer wants.
Encode = Callable[[Row, Dialogue, Draw], Example]


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
    order: Order
    encode: Encode[Example]

    def read(self, position: int) -> Example:
        """The encoded sample at a position of the global order."""
        draw = self.order.sample_at(position)
        row, dialogue = self.sources[draw.source].sample(draw)
        return self.encode(row, dialogue, draw)


def stream_batches(
    sources: Sequence[QuestionSource],
    order: Order,
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
    from pixellm.platform.data.ray_blocks import stream_blocks  # Ray Data is slow to import

    blocks = _SampleBlocks(SampleReader(sources, order, encode), part, block_size)
    samples = stream_blocks(blocks.make, len(blocks), task_cpus=task_cpus, max_tasks=max_tasks)
    batch: list[Example] = []
    for sample in samples:
        batch.append(sample)
        if len(batch) == part.batch_size:
            yield batch
            batch = []


def iterate_batches(
    sources: Sequence[QuestionSource],
    order: Order,
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


@dataclass(frozen=True, slots=True)
class _SampleBlocks(Generic[Example]):
    """One rank's samples in blocks: block k holds its local samples [k·size, (k+1)·size)."""

    reader: SampleReader[Example]
    part: RankSlice
    size: int

    def __len__(self) -> int:
        return -(-len(self.part) // self.size)

    def make(self, number: int) -> list[Example]:
        local_indices = range(number * self.size, min((number + 1) * self.size, len(self.part)))
        return [self.reader.read(self.part.position(index)) for index in local_indices]
