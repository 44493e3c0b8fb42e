"""How coroutines talk to the ledger: messages that wait are sent together, and one batch is under way at a time.

Under load this is one synced transaction (and one call of a Ray actor) for dozens of messages; when little happens it
is one for each, sent at once or 10 ms after the one before. Nothing goes on before the ledger has answered.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from types import TracebackType
from typing import Self

from pixellm.jobs.muse.ledger import Answer, Granted, Message, Over, Reply, Wait, Want

#: Carries messages to the ledger and brings the replies back, in order.
Send = Callable[[Sequence[Message]], Awaitable[list[Reply]]]

_MAX_BATCH = 256
_ASK_AGAIN_S = 0.1
_PAUSE_S = 0.01  # after a batch, so that the next one under load is larger: fewer transactions and calls


class LedgerLink:
    """A context manager around the task that sends.

    Args:
        send: carries a batch; an error of it reaches everyone whose message was in the batch.
    """

    def __init__(self, send: Send) -> None:
        self._send = send
        self._queue: asyncio.Queue[tuple[Message, asyncio.Future[Reply]]] = asyncio.Queue()
        self._pump: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._pump = asyncio.create_task(self._run())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pump is not None:
            self._pump.cancel()

    async def tell(self, message: Message) -> Reply:
        """Sends one message and returns the ledger's reply."""
        reply: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._queue.put_nowait((message, reply))
        return await reply

    async def want(self, want: Want) -> Answer | Granted | Over:
        """Asks for permission, again and again while the ledger says to wait."""
        while True:
            reply = await self.tell(want)
            if isinstance(reply, Answer | Granted | Over):
                return reply
            assert isinstance(reply, Wait)
            await asyncio.sleep(_ASK_AGAIN_S)

    async def _run(self) -> None:
        while True:
            batch = [await self._queue.get()]
            while len(batch) < _MAX_BATCH and not self._queue.empty():
                batch.append(self._queue.get_nowait())
            try:
                replies = await self._send([message for message, _ in batch])
            except Exception as error:  # the boundary to another thread or process: whoever waits must hear of it
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)
                continue
            for (_, future), reply in zip(batch, replies, strict=True):
                if not future.done():
                    future.set_result(reply)
            await asyncio.sleep(_PAUSE_S)
