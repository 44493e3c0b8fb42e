"""Numbered blocks of work through workers that each open their model once: in this process, or in a pool of actors.

A block is a fixed piece of the input. So what comes of it does not depend on the number of actors, a block that is done
is not done again, and one whose actor died is done anew. Evaluation and batch prediction both stand on this.
"""

import logging
import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import pyarrow as pa

from pixellm.errors import PixelLMError

_BLOCKS_PER_DATASET = 1024


class NumberedBlock(Protocol):
    """A piece of the input; picklable and small, since all of them are held at once."""

    @property
    def number(self) -> int:
        """Its place, from 0."""
        ...


class BlockWorker(Protocol):
    """What does blocks, one at a time."""

    def work(self, block: Any) -> bytes:
        """Does a block; what it returns travels to the driver."""
        ...

    def close(self) -> None:
        """Lets go of threads and memory."""
        ...


#: Makes a worker; picklable (cloudpickle), called once in each process.
OpenWorker = Callable[[], BlockWorker]


@dataclass(frozen=True)
class Pool:
    """Where blocks are done.

    Attributes:
        actors: most actors of the pool, which grows and shrinks with what there is to do; 0: in this process.
        num_cpus: logical CPUs of an actor.
        num_gpus: GPUs of an actor.
    """

    actors: int = 0
    num_cpus: float = 1.0
    num_gpus: float = 0.0


def run_blocks(
    blocks: Sequence[NumberedBlock], open_worker: OpenWorker, pool: Pool | None = None
) -> Iterator[tuple[int, bytes]]:
    """Does the blocks; yields the number and the result of each once, from a pool in any order.

    Args:
        blocks: what to do.
        open_worker: makes a worker.
        pool: None: in this process, without Ray; else this process is connected to a cluster.

    Raises:
        PixelLMError: what a worker ran into.
    """
    if not blocks:
        return iter(())  # no model is loaded for nothing
    return _run_here(blocks, open_worker) if not (pool and pool.actors) else _run_in_actors(blocks, open_worker, pool)


def _run_here(blocks: Sequence[NumberedBlock], open_worker: OpenWorker) -> Iterator[tuple[int, bytes]]:
    worker = open_worker()
    try:
        for block in blocks:
            yield block.number, worker.work(block)
    finally:
        worker.close()


def _run_in_actors(blocks: Sequence[NumberedBlock], open_worker: OpenWorker, pool: Pool) -> Iterator[tuple[int, bytes]]:
    import ray.data  # slow

    logging.getLogger("ray.data").setLevel(logging.ERROR)  # it announces every dataset on the terminal
    for first in range(0, len(blocks), _BLOCKS_PER_DATASET):
        part = blocks[first : first + _BLOCKS_PER_DATASET]
        most = min(pool.actors, len(part))
        packed = [pa.table({"block": pa.array([pickle.dumps(block)], pa.binary())}) for block in part]
        dataset = ray.data.from_arrow(packed).map_batches(
            _Actor,
            fn_constructor_args=(open_worker,),
            batch_size=1,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=most, initial_size=most),
            num_cpus=pool.num_cpus,
            num_gpus=pool.num_gpus or None,
        )
        dataset.context.enable_progress_bars = False
        for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1):
            for number, content, error in zip(*(batch[name].to_pylist() for name in batch.column_names), strict=True):
                if error:
                    raise pickle.loads(error)
                yield number, content


class _Actor:
    """One actor: a worker that is opened with the first block, so that what it refuses travels as our own error."""

    def __init__(self, open_worker: OpenWorker) -> None:
        self._open = open_worker
        self._worker: BlockWorker | None = None

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Does the blocks of a batch; an error of ours travels in the block's place."""
        numbers, contents, errors = [], [], []
        for packed in batch["block"].to_pylist():
            block = pickle.loads(packed)
            content, error = b"", b""
            try:
                if self._worker is None:
                    self._worker = self._open()
                content = self._worker.work(block)
            except PixelLMError as problem:
                error = pickle.dumps(problem)
            numbers.append(block.number)
            contents.append(content)
            errors.append(error)
        return pa.table(
            {
                "number": pa.array(numbers, pa.int64()),
                "content": pa.array(contents, pa.large_binary()),
                "error": pa.array(errors, pa.binary()),
            }
        )
