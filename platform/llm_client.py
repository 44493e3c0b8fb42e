"""Answers of a language model that are bought once: retries, a spending limit and a cache on disk over `ChatService`.

The cache is keyed by everything that decides an answer: address, revision of the model and the whole request. An
answer is on disk before it is handed out, so a repeated run sends nothing. Only what the service answered is kept; a
failed attempt is not.
"""

import asyncio
import hashlib
import json
import sqlite3
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from pixellm.errors import JudgeError, LanguageModelError
from pixellm.platform.llm_service import (
    AttemptError,
    ChatAnswer,
    ChatService,
    FailureStreak,
    ServiceSettings,
    back_off_s,
)

#: Text is taken for one token per two bytes, which is more than any usual tokenizer needs.
_BYTES_PER_TOKEN = 2
_USD_PER_MILLION = 1e-6


@dataclass(frozen=True, slots=True)
class Spending:
    """What may be spent, and what a token costs where the service does not say it itself.

    Attributes:
        limit_usd: no request is sent that could lead beyond it; None: no limit.
        prompt_usd: per million tokens of a request.
        completion_usd: per million tokens of an answer.
    """

    limit_usd: float | None = None
    prompt_usd: float = 0.5
    completion_usd: float = 1.5

    def cost_usd(self, prompt_tokens: int, completion_tokens: int) -> float:
        """Price of one request."""
        return _USD_PER_MILLION * (prompt_tokens * self.prompt_usd + completion_tokens * self.completion_usd)


class OutOfBudgetError(Exception):
    """The next request could cost more than is left."""


class NoAnswerError(Exception):
    """The service gave no answer after all attempts; the message says why."""


class LanguageModelClient:
    """Asks one endpoint; an asynchronous context manager.

    Args:
        service: the endpoint; offline, its address still is part of the key.
        cache_file: SQLite file; made when absent.
        revision: of the model behind the endpoint, part of the key (a name such as "gpt-4o" may change its meaning).
        spending: limit and prices.
        concurrency: requests under way at a time.
        is_offline: a request that is not in the cache is an error.

    Attributes:
        counts: `cached`, `asked`, `attempts_failed`.
        spent_usd: for the answers of this client; what a failed attempt may have been billed counts too.
    """

    def __init__(
        self,
        service: ServiceSettings,
        cache_file: Path,
        *,
        revision: str = "",
        spending: Spending | None = None,
        concurrency: int = 16,
        is_offline: bool = False,
    ) -> None:
        self.counts: Counter[str] = Counter()
        self.spent_usd = 0.0
        self._reserved_usd = 0.0
        self._settings, self._revision, self._is_offline = service, revision, is_offline
        self._spending = spending or Spending()
        self._places = asyncio.Semaphore(concurrency)
        self._service = ChatService(service, concurrency)
        self._cache_file = cache_file
        self._streak = FailureStreak(service.base_url)
        self._under_way: dict[str, asyncio.Lock] = {}

    async def __aenter__(self) -> Self:
        self._cache_file.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._cache = sqlite3.connect(self._cache_file, timeout=30.0)
            self._cache.execute("PRAGMA journal_mode=WAL")
            self._cache.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, answer TEXT NOT NULL)")
        except sqlite3.Error as error:
            raise LanguageModelError(
                f"cannot open the cache of answers {self._cache_file}: {error}; choose another file"
            ) from None
        await self._service.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._service.__aexit__(kind, error, trace)
        self._cache.close()

    def key(self, body: bytes) -> str:
        """Name of a request in the cache (hex)."""
        place = json.dumps([self._settings.base_url, self._revision]).encode()
        return hashlib.sha256(place + b"\0" + body).hexdigest()

    async def ask(self, body: bytes, *, max_tokens: int) -> ChatAnswer:
        """The answer to a request, from the cache or from the service.

        Args:
            body: of a `ChatRequest`.
            max_tokens: longest answer that it allows, for the spending limit.

        Raises:
            JudgeError: offline, and the cache does not hold it.
            OutOfBudgetError: it could cost more than is left.
            NoAnswerError: no attempt succeeded.
            LanguageModelError: the endpoint cannot be used, or is down.
        """
        key = self.key(body)
        lock = self._under_way.setdefault(key, asyncio.Lock())  # the same request twice at a time is sent once
        try:
            async with lock:
                if (found := self._look_up(key)) is not None:
                    self.counts["cached"] += 1
                    return found
                if self._is_offline:
                    raise JudgeError(
                        f"the cache {self._cache_file} does not hold a request (key {key[:12]}); run once without "
                        "--judge-offline, with the same model, revision and answers"
                    )
                async with self._places:
                    answer = await self._buy(body, max_tokens)
                self._store(key, answer)
                return answer
        finally:
            self._under_way.pop(key, None)

    async def _buy(self, body: bytes, max_tokens: int) -> ChatAnswer:
        most_usd = self._spending.cost_usd(len(body) // _BYTES_PER_TOKEN, max_tokens)
        failure = ""
        for attempt in range(self._settings.attempts):
            if attempt:
                await asyncio.sleep(back_off_s(attempt - 1, self._settings.back_off_s))
            await self._service.wait_for_turn()
            limit = self._spending.limit_usd
            if limit is not None and self.spent_usd + self._reserved_usd + most_usd > limit:
                raise OutOfBudgetError(f"{self.spent_usd:.4f} of {limit:g} USD are spent")
            self._reserved_usd += most_usd
            try:
                answer = await self._service.attempt(body)
            except AttemptError as error:
                failure = str(error)
                self.counts["attempts_failed"] += 1
                self.spent_usd += most_usd * error.may_be_billed
                if not error.can_retry:
                    break
            else:
                self._streak.end()
                self.counts["asked"] += 1
                self.spent_usd += self._price(answer, most_usd)
                return answer
            finally:
                self._reserved_usd -= most_usd
        self._streak.grow(failure)
        raise NoAnswerError(failure)

    def _price(self, answer: ChatAnswer, most_usd: float) -> float:
        if answer.cost_usd is not None:
            return answer.cost_usd
        if answer.prompt_tokens is None or answer.completion_tokens is None:
            return most_usd
        return self._spending.cost_usd(answer.prompt_tokens, answer.completion_tokens)

    def _look_up(self, key: str) -> ChatAnswer | None:
        found = self._cache.execute("SELECT answer FROM answers WHERE key = ?", (key,)).fetchone()
        return None if found is None else ChatAnswer(**json.loads(found[0]))

    def _store(self, key: str, answer: ChatAnswer) -> None:
        with self._cache:
            self._cache.execute("INSERT OR REPLACE INTO answers VALUES (?, ?)", (key, json.dumps(asdict(answer))))
