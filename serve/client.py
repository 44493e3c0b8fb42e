"""`PixelLMClient`: ask a running service from Python; `AsyncPixelLMClient` is the same for asyncio.

    with PixelLMClient("http://127.0.0.1:8000") as client:
        result = client.segment("photo.jpg", "Segment the cat and the laptop.")
        for target in result.targets:
            print(target.phrase, target.score, target.mask.shape)

A service that is busy says when to come back; the clients wait and ask again by themselves.
"""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import httpx

from pixellm.errors import ConfigError, RequestTimeoutError, ServingError
from pixellm.serve.client_results import (
    ImageLike,
    RemoteResult,
    RemoteTarget,
    RemoteText,
    StreamReader,
    chat_messages,
    encoded_image,
    failure_from,
    read_body,
    read_completion,
    read_segment,
    wait_before_retry_s,
)

__all__ = ["AsyncPixelLMClient", "PixelLMClient", "RemoteResult", "RemoteTarget", "RemoteText"]

RemoteEvent = RemoteText | RemoteTarget | RemoteResult

_POLL_S = 0.2


class _Requests:
    """How the calls look on the wire, shared by both clients."""

    def __init__(self, base_url: str, api_key: str | None, timeout_s: float, max_retries: int) -> None:
        self.base_url = base_url.rstrip("/")
        try:
            url = httpx.URL(base_url)
        except httpx.InvalidURL as error:
            raise ConfigError(f"{base_url!r} is no address ({error}); wanted e.g. http://127.0.0.1:8000") from None
        if url.scheme not in ("http", "https") or not url.host:
            raise ConfigError(f"{base_url!r} is not the address of a service; wanted e.g. http://127.0.0.1:8000")
        self.headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        # a proxy that the environment names cannot reach this machine's own loopback address
        self.may_use_proxy = url.host not in ("127.0.0.1", "localhost", "::1")
        self.timeout_s = timeout_s
        self.max_retries = max_retries

    def segment(self, image: ImageLike, prompt: str, options: Mapping[str, Any]) -> dict[str, Any]:
        fields = {"prompt": prompt, **{name: str(value) for name, value in options.items() if value is not None}}
        return {"url": "/v1/segment", "data": fields, "files": {"image": ("picture", encoded_image(image))}}

    def chat(
        self,
        image: ImageLike,
        prompt: str,
        history: Sequence[tuple[str, str]],
        options: Mapping[str, Any],
        *,
        stream: bool,
    ) -> dict[str, Any]:
        body: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
        body["messages"] = chat_messages(encoded_image(image), prompt, history)
        if stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        return {"url": "/v1/chat/completions", "json": body}

    def wait_s(self, outcome: httpx.Response | httpx.TransportError, attempt: int) -> float:
        """How long to wait before the next try; raises when there is to be none."""
        response = outcome if isinstance(outcome, httpx.Response) else None
        wait_s = wait_before_retry_s(response, attempt, self.max_retries, random.random())
        if isinstance(outcome, httpx.TransportError):
            if wait_s is None or isinstance(outcome, httpx.TimeoutException):
                raise self.unreachable(outcome) from None
        elif wait_s is None:
            raise failure_from(outcome)
        return wait_s or 0.0

    def unreachable(self, error: httpx.TransportError) -> ServingError:
        if isinstance(error, httpx.TimeoutException):
            return RequestTimeoutError(f"{self.base_url} did not answer within {self.timeout_s:g} s (timeout_s)")
        return ServingError(f"cannot reach {self.base_url}: {error}; is `pixellm serve` running there?")


class PixelLMClient:
    """Asks a running service.

    Args:
        base_url: of the service.
        api_key: sent as a bearer token; None where the service needs none.
        timeout_s: for one try.
        max_retries: tries after the first, when the service is busy (429, 503), cannot be reached, or its ingress dies.
        transport: replaces the network, for tests.
    """

    def __init__(
        self,
        base_url: str = "http://127.0.0.1:8000",
        *,
        api_key: str | None = None,
        timeout_s: float = 120.0,
        max_retries: int = 4,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._requests = _Requests(base_url, api_key, timeout_s, max_retries)
        self._http = httpx.Client(
            base_url=self._requests.base_url,
            headers=self._requests.headers,
            timeout=timeout_s,
            transport=transport,
            trust_env=self._requests.may_use_proxy,
        )

    def segment(
        self,
        image: ImageLike,
        prompt: str,
        *,
        threshold: float = 0.5,
        max_tokens: int | None = None,
        temperature: float = 0.0,
        seed: int | None = None,
    ) -> RemoteResult:
        """Asks one question about one picture.

        Args:
            image: path, encoded bytes, or PIL picture.
            prompt: the question.
            threshold: probability above which a pixel belongs to a mask.
            max_tokens: length limit of the answer; None takes the server's.
            temperature: 0 takes the likeliest token.
            seed: makes sampling repeatable.

        Raises:
            DataError: the file cannot be read.
            BadRequestError: the service refuses the request; `status_code`, `param` and `code` say why.
            OverloadedError: still busy after `max_retries`.
            RequestTimeoutError, ServingError: no answer, or the service failed.
        """
        options = {"threshold": threshold, "max_tokens": max_tokens, "temperature": temperature, "seed": seed}
        return read_segment(self._send("POST", self._requests.segment(image, prompt, options)))

    def chat(
        self, image: ImageLike, prompt: str, *, history: Sequence[tuple[str, str]] = (), **options: Any
    ) -> RemoteResult:
        """Asks a question in a conversation about a picture.

        Args:
            image: path, encoded bytes, or PIL picture.
            prompt: the question.
            history: earlier (question, answer text) pairs about the same picture, oldest first.
            options: `threshold`, `max_tokens`, `temperature`, `top_p`, `seed`, `stop`.

        Raises:
            PixelLMError: as `segment`.
        """
        return read_completion(self._send("POST", self._requests.chat(image, prompt, history, options, stream=False)))

    def chat_stream(
        self, image: ImageLike, prompt: str, *, history: Sequence[tuple[str, str]] = (), **options: Any
    ) -> Iterator[RemoteEvent]:
        """`chat`, as it comes: `RemoteText` and `RemoteTarget` in order, `RemoteResult` last. Leaving early cancels.

        Raises:
            PixelLMError: as `segment`; an answer that breaks off is not asked again.
        """
        request = self._requests.chat(image, prompt, history, options, stream=True)
        response = self._send("POST", request, stream=True)
        try:
            reader = StreamReader(response.headers.get("X-Model-Version", ""))
            for line in response.iter_lines():
                yield from reader.feed(line)
        except httpx.TransportError as error:
            raise self._requests.unreachable(error) from None
        finally:
            response.close()

    def models(self) -> list[dict[str, Any]]:
        """The served models with version and registry lineage."""
        data: list[dict[str, Any]] = read_body(self._send("GET", {"url": "/v1/models"}))["data"]
        return data

    def wait_ready(self, timeout_s: float = 60.0) -> None:
        """Returns when the service can answer.

        Raises:
            ServingError: not within `timeout_s`.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            problem = "it is not up"
            try:
                response = self._http.get("/readyz", timeout=min(5.0, timeout_s))
                if response.status_code == 200:
                    return
                problem = f"/readyz answers {response.status_code}"
            except httpx.TransportError as error:
                problem = str(error)
            if time.monotonic() > deadline:
                raise ServingError(f"{self._requests.base_url} was not ready within {timeout_s:g} s: {problem}")
            time.sleep(_POLL_S)

    def close(self) -> None:
        """Closes the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        """Returns the client, to be closed at the end of the block."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes the connections."""
        self.close()

    def _send(self, method: str, request: Mapping[str, Any], *, stream: bool = False) -> httpx.Response:
        attempt = 0
        while True:
            try:
                response = self._http.send(self._http.build_request(method, **request), stream=stream)
            except httpx.TransportError as error:
                wait_s = self._requests.wait_s(error, attempt)
            else:
                if response.is_success:
                    return response
                response.read()
                wait_s = self._requests.wait_s(response, attempt)
            time.sleep(wait_s)
            attempt += 1


class AsyncPixelLMClient:
    """`PixelLMClient` for asyncio; arguments, results and errors are the same."""

    def __init__(
        self,
        base_url: str = "http://127.0.0.1:8000",
        *,
        api_key: str | None = None,
        timeout_s: float = 120.0,
        max_retries: int = 4,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._requests = _Requests(base_url, api_key, timeout_s, max_retries)
        self._http = httpx.AsyncClient(
            base_url=self._requests.base_url,
            headers=self._requests.headers,
            timeout=timeout_s,
            transport=transport,
            trust_env=self._requests.may_use_proxy,
        )

    async def segment(
        self,
        image: ImageLike,
        prompt: str,
        *,
        threshold: float = 0.5,
        max_tokens: int | None = None,
        temperature: float = 0.0,
        seed: int | None = None,
    ) -> RemoteResult:
        """As `PixelLMClient.segment`."""
        options = {"threshold": threshold, "max_tokens": max_tokens, "temperature": temperature, "seed": seed}
        return read_segment(await self._send("POST", self._requests.segment(image, prompt, options)))

    async def chat(
        self, image: ImageLike, prompt: str, *, history: Sequence[tuple[str, str]] = (), **options: Any
    ) -> RemoteResult:
        """As `PixelLMClient.chat`."""
        request = self._requests.chat(image, prompt, history, options, stream=False)
        return read_completion(await self._send("POST", request))

    async def chat_stream(
        self, image: ImageLike, prompt: str, *, history: Sequence[tuple[str, str]] = (), **options: Any
    ) -> AsyncIterator[RemoteEvent]:
        """As `PixelLMClient.chat_stream`."""
        request = self._requests.chat(image, prompt, history, options, stream=True)
        response = await self._send("POST", request, stream=True)
        try:
            reader = StreamReader(response.headers.get("X-Model-Version", ""))
            async for line in response.aiter_lines():
                for event in reader.feed(line):
                    yield event
        except httpx.TransportError as error:
            raise self._requests.unreachable(error) from None
        finally:
            await response.aclose()

    async def models(self) -> list[dict[str, Any]]:
        """As `PixelLMClient.models`."""
        data: list[dict[str, Any]] = read_body(await self._send("GET", {"url": "/v1/models"}))["data"]
        return data

    async def close(self) -> None:
        """Closes the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        """Returns the client, to be closed at the end of the block."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes the connections."""
        await self.close()

    async def _send(self, method: str, request: Mapping[str, Any], *, stream: bool = False) -> httpx.Response:
        attempt = 0
        while True:
            try:
                response = await self._http.send(self._http.build_request(method, **request), stream=stream)
            except httpx.TransportError as error:
                wait_s = self._requests.wait_s(error, attempt)
            else:
                if response.is_success:
                    return response
                await response.aread()
                wait_s = self._requests.wait_s(response, attempt)
            await asyncio.sleep(wait_s)
            attempt += 1
