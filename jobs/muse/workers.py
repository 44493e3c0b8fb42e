"""Pictures through their requests, many at a time: in this process, or in async actors of a Ray Data pipeline.

Row numbers go in and counts come out; pictures are read where they are sent from, and everything that must last goes
through the one ledger, which in a cluster is an actor on the machine that has the disk.
"""

import asyncio
import logging
import math
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pixellm.errors import PixelLMError
from pixellm.jobs.muse.asker import Asker, AskPlan
from pixellm.jobs.muse.ledger import Ledger, Message, Reply, open_ledger

#: Rows that an actor takes at a time, and how Ray Data cuts them into batches; it awaits four of a task's at once.
_BLOCK_ROWS, _BATCH_ROWS = 64, 16
_BLOCKS_PER_DATASET = 1024
_ACTOR_CPUS = 0.25

#: Called with the number of pictures that were gone through.
OnDone = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class LedgerPlace:
    """What `open_ledger` needs."""

    folder: Path
    run: str
    budget_nusd: int | None
    stale_s: float = 600.0

    def open(self) -> AbstractContextManager[Ledger]:
        """The ledger, for this process alone."""
        return open_ledger(self.folder, self.run, self.budget_nusd, stale_s=self.stale_s)


def ask_in_this_process(plan: AskPlan, place: LedgerPlace, rows: Sequence[int], on_done: OnDone) -> None:
    """Goes through the rows here, without Ray.

    Raises:
        PixelLMError: the service cannot be used, or the ledger or the shards fail.
    """
    with place.open() as ledger:

        async def send(messages: Sequence[Message]) -> list[Reply]:
            return await asyncio.to_thread(ledger.apply, messages)

        async def run() -> None:
            async with Asker(plan, send) as asker:
                waiting = iter(rows)
                tasks = [asyncio.create_task(_go_through(asker, waiting, on_done)) for _ in range(asker.max_pictures)]
                try:
                    await asyncio.gather(*tasks)
                finally:
                    for task in tasks:
                        task.cancel()
                    await asyncio.gather(*tasks, return_exceptions=True)

        asyncio.run(run())


async def _go_through(asker: Asker, waiting: Iterator[int], on_done: OnDone) -> None:
    for row in waiting:
        await asker.about(row)
        on_done(1)


def ask_in_actors(plan: AskPlan, place: LedgerPlace, rows: Sequence[int], on_done: OnDone, *, actors: int) -> None:
    """Goes through the rows in async actors of a Ray Data pipeline, on the cluster that this process is connected to.

    Args:
        plan: its concurrency and rate are those of all actors together.
        place: the ledger's folder, on this machine.
        rows: numbers of the rows.
        on_done: called as blocks of rows come back.
        actors: how many.

    Raises:
        PixelLMError: as `ask_in_this_process`.
    """
    import ray.data  # slow

    logging.getLogger("ray.data").setLevel(logging.ERROR)  # it announces every dataset on the terminal
    with _ledger_actor(place) as ledger:
        actors = min(actors, plan.concurrency)
        share = _share_of(plan, actors)
        per_block = max(1, min(_BLOCK_ROWS, math.ceil(len(rows) / actors)))
        for first in range(0, len(rows), per_block * _BLOCKS_PER_DATASET):
            part = rows[first : first + per_block * _BLOCKS_PER_DATASET]
            blocks = [
                pa.table({"row": pa.array(part[start : start + per_block], pa.int64())})
                for start in range(0, len(part), per_block)
            ]
            at_a_time = math.ceil(share.max_pictures / per_block) + 1
            dataset = ray.data.from_arrow(blocks).map_batches(
                _AskActor,
                fn_constructor_args=(share, ledger),
                batch_size=min(_BATCH_ROWS, per_block),
                compute=ray.data.ActorPoolStrategy(
                    size=actors, max_concurrent_calls_per_actor=at_a_time, max_tasks_in_flight_per_actor=at_a_time
                ),
                num_cpus=_ACTOR_CPUS,
            )
            dataset.context.enable_progress_bars = False
            for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
                _raise_first_error(batch)
                on_done(batch.num_rows)


def _share_of(plan: AskPlan, actors: int) -> AskPlan:
    """What one of several actors may do, so that together they keep the plan's concurrency and rate."""
    rate = plan.service.requests_per_minute
    service = replace(plan.service, requests_per_minute=rate / actors if rate else None)
    return replace(plan, concurrency=plan.concurrency // actors, service=service)


def _raise_first_error(batch: pa.Table) -> None:
    for content in batch["error"].to_pylist():
        if content:
            raise pickle.loads(content)


class _AskActor:
    """One async actor: an asker that its batches share."""

    def __init__(self, plan: AskPlan, ledger: Any) -> None:
        self._plan, self._ledger = plan, ledger
        self._opening: asyncio.Task[Asker] | None = None

    async def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Goes through the rows of a batch; an error of ours travels in the first row's place."""
        if self._opening is None:
            self._opening = asyncio.create_task(self._open())
        error = b""
        try:
            asker = await self._opening
            await asyncio.gather(*(asker.about(int(row)) for row in batch["row"]))
        except PixelLMError as problem:
            error = pickle.dumps(getattr(problem, "cause", problem))  # Ray wraps what the ledger's actor raised
        errors = [error] + [b""] * (len(batch["row"]) - 1)
        return {"row": batch["row"], "error": np.array(errors, dtype=object)}

    async def _open(self) -> Asker:
        async def send(messages: Sequence[Message]) -> list[Reply]:
            replies: list[Reply] = await self._ledger.apply.remote(messages)
            return replies

        return await Asker(self._plan, send).__aenter__()  # ends with the actor's process


@contextmanager
def _ledger_actor(place: LedgerPlace) -> Iterator[Any]:
    """The ledger as an actor on this machine; closed when the context ends."""
    import ray  # slow
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(num_cpus=0, scheduling_strategy=here)(_LedgerActor).remote(place)
    try:
        ray.get(actor.check.remote())
        yield actor
        ray.get(actor.close.remote())
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, PixelLMError):
            raise error.cause from None
        raise
    finally:
        ray.kill(actor)


class _LedgerActor:
    """Holds the ledger open; messages are applied in the order in which they come."""

    def __init__(self, place: LedgerPlace) -> None:
        self._place = place
        self._stack = ExitStack()

    def check(self) -> None:
        """Opens the ledger, so that its error reaches the caller as what it is."""
        self._ledger = self._stack.enter_context(self._place.open())

    def apply(self, messages: Sequence[Message]) -> list[Reply]:
        """See `Ledger.apply`."""
        return self._ledger.apply(messages)

    def close(self) -> None:
        """Closes the ledger and gives its lock back."""
        self._stack.close()
