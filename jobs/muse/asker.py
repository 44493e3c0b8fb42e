"""One worker's way to the service: pictures wait for their turn, requests are paid for, answers are on disk first.

A request holds one of the `concurrency` places while the service has it. It counts as under way until its answer is in
the ledger; what a kill can make a later run repeat is what is under way then, at most `AskPlan.max_under_way`.
"""

import asyncio
import math
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from pixellm.errors import LanguageModelError
from pixellm.jobs.muse.asking import AskOptions, Request, ask_about
from pixellm.jobs.muse.ledger import Answer, Finish, Granted, Over, Release, Settle, Want
from pixellm.jobs.muse.ledger_link import LedgerLink, Send
from pixellm.jobs.muse.outcomes import Outcome
from pixellm.jobs.muse.pictures import SentPicture, prepare_picture
from pixellm.platform.data.schema import Row
from pixellm.platform.data.shards import ShardedDataset
from pixellm.platform.llm_client import NoAnswerError, OutOfBudgetError
from pixellm.platform.llm_service import (
    AttemptError,
    ChatAnswer,
    ChatRequest,
    ChatService,
    FailureStreak,
    ServiceSettings,
    back_off_s,
    chat_request,
)

#: Nano-dollars per token of a price of one dollar per million tokens.
_NUSD_PER_TOKEN = 1000
#: Text is taken for one token per two bytes, which is more than any usual tokenizer needs.
_BYTES_PER_TOKEN = 2


@dataclass(frozen=True, slots=True)
class Prices:
    """What a token costs, USD per million; the defaults are GPT-4o's list price.

    Attributes:
        prompt: of a request's tokens.
        completion: of an answer's tokens.
        image_tokens: what a picture is reckoned at before the service has said what it counts.
    """

    prompt: float = 2.5
    completion: float = 10.0
    image_tokens: int = 1600

    def cost_nusd(self, prompt_tokens: int, completion_tokens: int) -> int:
        """Price of a request, rounded up to whole nano-dollars."""
        return math.ceil(_NUSD_PER_TOKEN * (prompt_tokens * self.prompt + completion_tokens * self.completion))


@dataclass(frozen=True, slots=True)
class AskPlan:
    """All that a worker needs; picklable.

    Attributes:
        source: shards with the pictures.
        options: what is asked.
        service: where.
        prices: what it costs, where the service does not say itself.
        concurrency: requests under way at a time.
    """

    source: ShardedDataset
    options: AskOptions
    service: ServiceSettings
    prices: Prices = field(default_factory=Prices)
    concurrency: int = 64

    @property
    def max_under_way(self) -> int:
        """Requests at a time that are not on disk: those that the service has, and answers that are being written."""
        return self.concurrency + self.concurrency // 4

    @property
    def max_pictures(self) -> int:
        """Pictures in work at a time: some are being read or stored while others wait for the service."""
        return self.max_under_way + self.concurrency // 2 + 2


class Asker:
    """Goes through pictures; a context manager.

    Args:
        plan: what to ask, and where.
        send: carries messages to the ledger.
    """

    def __init__(self, plan: AskPlan, send: Send) -> None:
        self._plan = plan
        self.max_pictures = plan.max_pictures
        self._pictures = asyncio.Semaphore(plan.max_pictures)
        self._places = asyncio.Semaphore(plan.concurrency)
        self._under_way = asyncio.Semaphore(plan.max_under_way)
        self._link = LedgerLink(send)
        self._service = ChatService(plan.service, plan.concurrency)
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="muse-read")
        self._stack = AsyncExitStack()
        self._holder = uuid.uuid4().hex
        self._is_over = False
        self._streak = FailureStreak(plan.service.base_url)

    async def __aenter__(self) -> Self:
        await self._stack.enter_async_context(self._link)
        await self._stack.enter_async_context(self._service)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()
        self._reader.shutdown(wait=False)

    async def about(self, number: int) -> Outcome | None:
        """Goes through one picture and stores its outcome.

        Returns:
            The outcome; None where there was no money to ask at all.

        Raises:
            LanguageModelError: the service cannot be used, or is down.
        """
        async with self._pictures:
            if self._is_over:
                return None
            loop = asyncio.get_running_loop()
            row, picture = await loop.run_in_executor(self._reader, self._read, number)
            try:
                outcome = await ask_about(row, picture, self._plan.options, self._ask)
            except OutOfBudgetError:
                self._is_over = True
                return None
            await self._link.tell(Finish(number, outcome.to_json(), outcome.is_final))
            return outcome

    def _read(self, number: int) -> tuple[Row, SentPicture]:
        row = self._plan.source.read_row(number)
        return row, prepare_picture(row.image, self._plan.options.longest_side)

    async def _ask(self, request: Request) -> Answer:
        sent = chat_request(
            request.model,
            request.messages,
            schema_name=request.schema_name,
            schema=request.schema,
            max_tokens=request.max_tokens,
        )
        reserve_nusd = self._most_nusd(sent, request)
        failure = ""
        for attempt in range(self._plan.service.attempts):
            if attempt:
                await asyncio.sleep(back_off_s(attempt - 1, self._plan.service.back_off_s))
            reply = await self._link.want(Want(sent.key, request.kind, reserve_nusd, self._holder))
            if isinstance(reply, Over):
                raise OutOfBudgetError("the budget does not allow another request")
            if isinstance(reply, Answer):
                return reply
            assert isinstance(reply, Granted)
            try:
                answer = await self._attempt(sent, reserve_nusd)
            except AttemptError as error:
                failure = str(error)
                if not error.can_retry:
                    break
            else:
                self._streak.end()
                return answer
        self._streak.grow(failure)
        raise NoAnswerError(failure)

    async def _attempt(self, sent: ChatRequest, reserve_nusd: int) -> Answer:
        """One attempt in one of the places; the ledger knows of its end, whatever it is, before anything follows."""
        async with self._under_way:
            try:
                async with self._places:
                    await self._service.wait_for_turn()
                    found = await self._service.attempt(sent.body)
            except (AttemptError, LanguageModelError) as error:
                may_be_billed = isinstance(error, AttemptError) and error.may_be_billed
                await self._link.tell(Release(sent.key, may_be_billed))
                raise
            answer = self._priced(found, reserve_nusd)
            await self._link.tell(Settle(sent.key, answer))
            return answer

    def _most_nusd(self, sent: ChatRequest, request: Request) -> int:
        """More than the request can cost, as far as that can be known before."""
        tokens = sent.text_bytes // _BYTES_PER_TOKEN + sent.num_pictures * self._plan.prices.image_tokens
        return self._plan.prices.cost_nusd(tokens, request.max_tokens)

    def _priced(self, found: ChatAnswer, reserve_nusd: int) -> Answer:
        if found.cost_usd is not None:
            cost = math.ceil(found.cost_usd * 10**9)
        elif found.prompt_tokens is None or found.completion_tokens is None:
            cost = reserve_nusd
        else:
            cost = self._plan.prices.cost_nusd(found.prompt_tokens, found.completion_tokens)
        tokens = (found.prompt_tokens or 0, found.completion_tokens or 0)
        return Answer(found.text, found.is_refused, found.is_cut, *tokens, cost)
