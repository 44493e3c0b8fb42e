"""One chat request and what came of it: pauses, the two names of the token limit, answers that are none."""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from email.utils import formatdate
from typing import Any

import pytest
from aiohttp import web

from pixellm.errors import LanguageModelError
from pixellm.platform.llm_service import (
    AttemptError,
    ChatAnswer,
    ChatService,
    DataUrl,
    ServiceSettings,
    _retry_after_s,
    back_off_s,
    chat_request,
)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
SCHEMA = {"type": "object"}


def request_of(messages: Any = ()) -> Any:
    return chat_request("model", list(messages), schema_name="s", schema=SCHEMA, max_tokens=7)


def talk(handler: Handler, use: Callable[[ChatService], Awaitable[Any]], **settings: Any) -> Any:
    """Runs `use` on a service whose endpoint is `handler`."""

    async def run() -> Any:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", handler)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = site._server.sockets[0].getsockname()[1]  # type: ignore[union-attr]
        try:
            async with ChatService(ServiceSettings(f"http://127.0.0.1:{port}/v1/", **settings), 4) as service:
                return await use(service)
        finally:
            await runner.cleanup()

    return asyncio.run(run())


def completion(**message: Any) -> web.Response:
    return web.json_response({"choices": [{"message": {"role": "assistant", **message}, "finish_reason": "length"}]})


def test_a_picture_stands_in_the_body_whole_and_in_the_key_by_its_digest() -> None:
    url, other = DataUrl.of("image/png", b"\x00" * 3000), DataUrl.of("image/png", b"\x01" * 3000)

    def message(picture: DataUrl) -> dict[str, Any]:
        return {"role": "user", "content": [{"type": "image_url", "image_url": {"url": picture}}]}

    sent = request_of([message(url), message(other), message(url)])
    urls = [one["content"][0]["image_url"]["url"] for one in json.loads(sent.body)["messages"]]
    assert urls == [url.content.decode(), other.content.decode(), url.content.decode()]
    assert (sent.num_pictures, sent.text_bytes < 1000) == (3, True)
    assert sent.key != request_of([message(url), message(url), message(url)]).key
    assert sent == request_of([message(url), message(other), message(url)])


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"Retry-After": "2.5"}, 2.5),
        ({"retry-after-ms": "300", "Retry-After": "9"}, 0.3),
        ({"Retry-After": formatdate(time.time() - 50, usegmt=True)}, 0.0),
        ({"Retry-After": "soon"}, None),
        ({"Retry-After": "nan"}, None),
        ({}, None),
    ],
)
def test_retry_after_is_read_in_all_its_forms(headers: dict[str, str], seconds: float | None) -> None:
    assert _retry_after_s(headers) == (None if seconds is None else pytest.approx(seconds))
    ahead = _retry_after_s({"Retry-After": formatdate(time.time() + 40, usegmt=True)})
    assert ahead is not None
    assert 37 <= ahead <= 41


def test_back_off_doubles_to_a_ceiling_and_never_waits_longer() -> None:
    for attempt in range(40):
        assert 0 <= back_off_s(attempt, 0.5) <= min(30.0, 0.5 * 2**attempt)


def test_a_model_that_wants_the_newer_name_of_the_token_limit_gets_it() -> None:
    seen: list[dict[str, Any]] = []

    async def picky(request: web.Request) -> web.StreamResponse:
        seen.append(await request.json())
        if "max_tokens" in seen[-1]:
            text = "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."
            return web.json_response({"error": {"message": text, "code": "unsupported_parameter"}}, status=400)
        return completion(content="{}")

    async def use(service: ChatService) -> ChatAnswer:
        with pytest.raises(AttemptError) as caught:
            await service.attempt(request_of().body)
        assert caught.value.can_retry
        assert not caught.value.may_be_billed
        return await service.attempt(request_of().body)

    answer = talk(picky, use)
    assert [("max_completion_tokens" in body, body.get("max_tokens")) for body in seen] == [(False, 7), (True, None)]
    assert answer == ChatAnswer("{}", False, True, None, None, None)


@pytest.mark.parametrize(
    ("response", "may_be_billed", "can_retry"),
    [
        (lambda: web.Response(text="<html>"), True, True),
        (lambda: web.json_response({"choices": []}), True, True),
        (lambda: web.json_response({"error": {"message": "busy"}}, status=500), False, True),
        (lambda: web.json_response({"error": {"message": "picture is broken"}}, status=400), False, False),
    ],
)
def test_what_an_attempt_without_an_answer_means(
    response: Callable[[], web.Response], may_be_billed: bool, can_retry: bool
) -> None:
    async def handler(_request: web.Request) -> web.StreamResponse:
        return response()

    async def use(service: ChatService) -> AttemptError:
        with pytest.raises(AttemptError) as caught:
            await service.attempt(request_of().body)
        return caught.value

    error = talk(handler, use)
    assert (error.may_be_billed, error.can_retry) == (may_be_billed, can_retry)


def test_a_pause_holds_every_request_and_an_empty_account_ends_it_all() -> None:
    async def busy(_request: web.Request) -> web.StreamResponse:
        return web.json_response({"error": {"message": "slow down"}}, status=429, headers={"retry-after-ms": "150"})

    async def use(service: ChatService) -> float:
        with pytest.raises(AttemptError):
            await service.attempt(request_of().body)
        started = time.monotonic()
        await asyncio.gather(service.wait_for_turn(), service.wait_for_turn())
        return time.monotonic() - started

    assert talk(busy, use) >= 0.13

    async def empty(_request: web.Request) -> web.StreamResponse:
        error = {"message": "You exceeded your current quota", "code": "insufficient_quota"}
        return web.json_response({"error": error}, status=429)

    async def ask(service: ChatService) -> None:
        with pytest.raises(LanguageModelError, match="current quota"):
            await service.attempt(request_of().body)

    talk(empty, ask)


def test_a_slow_answer_is_a_cut_that_may_be_billed() -> None:
    async def slow(_request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(0.4)
        return completion(content="late")

    async def use(service: ChatService) -> AttemptError:
        with pytest.raises(AttemptError, match="cut off") as caught:
            await service.attempt(request_of().body)
        return caught.value

    error = talk(slow, use, timeout_s=0.1)
    assert error.may_be_billed
    assert error.can_retry
