"""One chat request to an OpenAI-compatible endpoint, and what came of it, in the kinds that a caller must tell apart.

Whether an attempt may have been billed, whether another one can help, and whether any further request can: a job that
pays for answers decides by these three.
"""

import asyncio
import base64
import hashlib
import json
import math
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from types import TracebackType
from typing import Any, Self

import aiohttp

from pixellm.errors import LanguageModelError

_DETAIL_CHARS = 200
_MAX_PAUSE_S = 120.0
_MAX_BACK_OFF_S = 30.0
#: Without a single answer between them, so many requests in a row mean that the service is down.
_FAILURES_IN_A_ROW = 20


@dataclass(frozen=True, slots=True)
class ServiceSettings:
    """The endpoint and how it is used.

    Attributes:
        base_url: as OpenAI's SDK takes it, e.g. "https://api.openai.com/v1".
        api_key: sent as bearer token; None sends none.
        timeout_s: limit of one attempt.
        attempts: per request, at least 1.
        requests_per_minute: attempts sent at most; None: as the service allows.
        back_off_s: longest wait after the first failed attempt; it doubles with each further one.
    """

    base_url: str
    api_key: str | None = field(default=None, repr=False)
    timeout_s: float = 120.0
    attempts: int = 8
    requests_per_minute: float | None = None
    back_off_s: float = 0.5


@dataclass(frozen=True, slots=True)
class ChatAnswer:
    """An answer that is to be paid.

    Attributes:
        text: the message; empty where there is none.
        is_refused: the model or a filter of the service declined.
        is_cut: it ran into the token limit.
        prompt_tokens: None where the service does not say.
        completion_tokens: likewise.
        cost_usd: where the service says it itself (`usage.cost`).
    """

    text: str
    is_refused: bool
    is_cut: bool
    prompt_tokens: int | None
    completion_tokens: int | None
    cost_usd: float | None


@dataclass(frozen=True, slots=True)
class DataUrl:
    """A picture for a message's `image_url`: large, so a request neither scans nor hashes it again.

    Attributes:
        content: the URL, ASCII.
        digest: SHA-256 of the picture (hex), which stands for it in a request's key.
    """

    content: bytes
    digest: str

    @staticmethod
    def of(media_type: str, picture: bytes) -> "DataUrl":
        """The URL of an encoded picture."""
        content = b"data:" + media_type.encode() + b";base64," + base64.b64encode(picture)
        return DataUrl(content, hashlib.sha256(picture).hexdigest())

    @property
    def stand_in(self) -> str:
        """What stands in its place until the request is put together."""
        return f"@@data-url-{self.digest}@@"


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """A request as it is sent.

    Attributes:
        body: JSON.
        key: names the request: equal keys, equal bodies.
        text_bytes: length of the body without its pictures.
        num_pictures: pictures in it.
    """

    body: bytes
    key: str
    text_bytes: int
    num_pictures: int


class AttemptError(Exception):
    """An attempt without an answer.

    Attributes:
        may_be_billed: the service may have done the work (a time-out, a cut connection, an answer that is none).
        can_retry: another attempt may succeed.
    """

    def __init__(self, message: str, *, may_be_billed: bool = False, can_retry: bool = True) -> None:
        super().__init__(message)
        self.may_be_billed = may_be_billed
        self.can_retry = can_retry


class FailureStreak:
    """Requests that got no answer since the last that did; a long streak ends a job that could only go on failing."""

    def __init__(self, base_url: str) -> None:
        self._base_url = base_url
        self._length = 0

    def end(self) -> None:
        """An answer came."""
        self._length = 0

    def grow(self, failure: str) -> None:
        """A request was given up because of `failure`.

        Raises:
            LanguageModelError: so many in a row that the service must be down.
        """
        self._length += 1
        if self._length >= _FAILURES_IN_A_ROW:
            raise LanguageModelError(
                f"{self._base_url} has not answered {self._length} requests in a row, the last with: {failure}; "
                "the same command goes on from here when it does"
            )


class ChatService:
    """An asynchronous client of one endpoint; a context manager. All its requests share one pause and one rate.

    Args:
        settings: the endpoint.
        max_connections: requests under way at most.
    """

    def __init__(self, settings: ServiceSettings, max_connections: int) -> None:
        self.settings = settings
        self._url = settings.base_url.rstrip("/") + "/chat/completions"
        self._max_connections = max_connections
        self._session: aiohttp.ClientSession | None = None
        self._paused_until = 0.0
        self._next_start = 0.0
        self._uses_new_limit_name = False

    async def __aenter__(self) -> Self:
        headers = {"Content-Type": "application/json"}
        if self.settings.api_key:
            headers["Authorization"] = f"Bearer {self.settings.api_key}"
        self._session = aiohttp.ClientSession(
            headers=headers,
            timeout=aiohttp.ClientTimeout(total=self.settings.timeout_s),
            connector=aiohttp.TCPConnector(limit=self._max_connections),
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.close()

    async def wait_for_turn(self) -> None:
        """Waits until the service's pause (Retry-After) is over and the rate allows another attempt."""
        while (left_s := self._paused_until - time.monotonic()) > 0:
            await asyncio.sleep(left_s * random.uniform(1.0, 1.1))
        if self.settings.requests_per_minute:
            now = time.monotonic()
            start = max(now, self._next_start)
            self._next_start = start + 60.0 / self.settings.requests_per_minute
            await asyncio.sleep(start - now)

    async def attempt(self, body: bytes) -> ChatAnswer:
        """Sends a request once.

        Args:
            body: of a `ChatRequest`.

        Raises:
            AttemptError: there is no answer.
            LanguageModelError: there never will be one: the key or the model is wrong, or the account is empty.
        """
        assert self._session is not None, "used outside its context"
        sent = body.replace(b'"max_tokens"', b'"max_completion_tokens"', 1) if self._uses_new_limit_name else body
        try:
            async with self._session.post(self._url, data=sent) as response:
                content = await response.read()
        except aiohttp.ClientConnectorError as error:
            raise AttemptError(f"no connection: {error}") from None
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            detail = str(error) or type(error).__name__
            raise AttemptError(f"cut off: {detail}"[:_DETAIL_CHARS], may_be_billed=True) from None
        if response.status != 200:
            raise self._failure(response.status, response.headers, content)
        return _read_answer(content)

    def _failure(self, status: int, headers: Mapping[str, str], content: bytes) -> Exception:
        message, code = _read_error(content)
        text = f"HTTP {status}: {message}"
        if status in (401, 403, 404) or code == "insufficient_quota":
            return LanguageModelError(
                f"{self._url} answers {text}; check --base-url, --model and the key (OPENAI_API_KEY)"
            )
        if status == 400 and "max_completion_tokens" in message and not self._uses_new_limit_name:
            self._uses_new_limit_name = True
            return AttemptError(text)
        retry_after_s = _retry_after_s(headers)
        if status in (429, 503) or retry_after_s is not None:
            pause_s = min(_MAX_PAUSE_S, retry_after_s if retry_after_s is not None else self.settings.back_off_s)
            self._paused_until = max(self._paused_until, time.monotonic() + pause_s)
            return AttemptError(text)
        return AttemptError(text, can_retry=status in (408, 409, 425, 429) or status >= 500)


def back_off_s(attempt: int, first_s: float) -> float:
    """Seconds to wait after attempt 0, 1, …: exponential from `first_s` with full jitter, as AWS describes it."""
    return random.uniform(0.0, min(_MAX_BACK_OFF_S, first_s * 2.0**attempt))


def chat_request(
    model: str,
    messages: Any,
    *,
    schema_name: str,
    schema: Mapping[str, Any],
    max_tokens: int,
    options: Mapping[str, Any] | None = None,
) -> ChatRequest:
    """A request for structured output; its messages may hold a `DataUrl` wherever a picture's URL belongs.

    `options` are further fields of the body, e.g. `temperature` and `seed`.
    """
    urls: list[DataUrl] = []

    def stand_in(value: object) -> str:
        if not isinstance(value, DataUrl):
            raise TypeError(f"{type(value).__name__} is no part of a request")
        urls.append(value)
        return value.stand_in

    content = {
        "model": model,
        "max_tokens": max_tokens,
        "messages": messages,
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": schema_name, "strict": True, "schema": schema},
        },
        **(options or {}),
    }
    body = json.dumps(content, ensure_ascii=False, separators=(",", ":"), default=stand_in).encode("utf-8", "replace")
    key, text_bytes = hashlib.sha256(body).hexdigest(), len(body)
    for url in urls:
        body = body.replace(url.stand_in.encode(), url.content, 1)
    return ChatRequest(body, key, text_bytes, len(urls))


def _read_answer(content: bytes) -> ChatAnswer:
    try:
        body = json.loads(content)
        choice = body["choices"][0]
        message = choice["message"]
        text, refusal, reason = message.get("content"), message.get("refusal"), choice.get("finish_reason")
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
        raise AttemptError("the answer is no chat completion", may_be_billed=True) from None
    usage = body.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    return ChatAnswer(
        text=text if isinstance(text, str) else "",
        is_refused=bool(refusal) or reason == "content_filter" or not isinstance(text, str),
        is_cut=reason == "length",
        prompt_tokens=_count(usage.get("prompt_tokens")),
        completion_tokens=_count(usage.get("completion_tokens")),
        cost_usd=_amount(usage.get("cost")),
    )


def _read_error(content: bytes) -> tuple[str, str]:
    try:
        error = json.loads(content)["error"]
        return str(error["message"])[:_DETAIL_CHARS], str(error.get("code"))
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
        return content[:_DETAIL_CHARS].decode("utf-8", "replace").strip() or "no reason given", ""


def _retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Seconds from `retry-after-ms` or `Retry-After` (a number or a date); None without either."""
    for name, unit_s in (("retry-after-ms", 0.001), ("Retry-After", 1.0)):
        value = headers.get(name, "")
        try:
            seconds = float(value) * unit_s
        except ValueError:
            seconds = _seconds_until(value)
        if math.isfinite(seconds):
            return max(0.0, seconds)
    return None


def _seconds_until(http_date: str) -> float:
    try:
        return parsedate_to_datetime(http_date).timestamp() - time.time()
    except ValueError:
        return math.nan


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _amount(value: object) -> float | None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value) or value < 0:
        return None
    return float(value)
