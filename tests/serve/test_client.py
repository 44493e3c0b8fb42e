"""The Python client against scripted HTTP, and against the real routes."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from fake_backend import ScriptedBackend, ServedApi, target_part
from pictures import picture_bytes
from PIL import Image

from pixellm import PixelLMClient
from pixellm.errors import BadRequestError, DataError, OverloadedError, RequestTimeoutError, ServingError
from pixellm.serve import client as client_module
from pixellm.serve.client import AsyncPixelLMClient, RemoteResult, RemoteTarget, RemoteText

ANSWER = {"id": "seg-1", "model": "m", "text": "hi", "targets": [], "usage": {}, "timings": {}, "finish_reason": "stop"}
Reply = httpx.Response | Exception


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long the client waited, without waiting."""
    waited: list[float] = []

    async def asleep(seconds: float) -> None:
        waited.append(seconds)

    monkeypatch.setattr(client_module.time, "sleep", waited.append)
    monkeypatch.setattr(client_module.asyncio, "sleep", asleep)
    return waited


def replies(*outcomes: Reply) -> Callable[[httpx.Request], httpx.Response]:
    queue = list(outcomes)

    def answer(request: httpx.Request) -> httpx.Response:
        outcome = queue.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    return answer


def busy(retry_after: str | None) -> httpx.Response:
    headers = {"Retry-After": retry_after} if retry_after else {}
    return httpx.Response(503, json={"error": {"message": "queue full"}}, headers=headers)


def ask(*outcomes: Reply, **client: Any) -> RemoteResult:
    with PixelLMClient("http://test", transport=httpx.MockTransport(replies(*outcomes)), **client) as asking:
        return asking.segment(picture_bytes(), "what?")


def ask_async(*outcomes: Reply, **client: Any) -> RemoteResult:
    async def exchange() -> RemoteResult:
        transport = httpx.MockTransport(replies(*outcomes))
        async with AsyncPixelLMClient("http://test", transport=transport, **client) as asking:
            return await asking.segment(picture_bytes(), "what?")

    return asyncio.run(exchange())


@pytest.mark.parametrize("asks", [ask, ask_async])
def test_a_busy_service_is_asked_again_not_before_it_says(asks: Any, waits: list[float]) -> None:
    result = asks(busy("3"), busy(None), httpx.ConnectError("refused"), httpx.Response(200, json=ANSWER))
    assert result.text == "hi"
    assert 3 <= waits[0] <= 4
    assert 0 < waits[1] < 3
    assert len(waits) == 3


@pytest.mark.parametrize("asks", [ask, ask_async])
def test_patience_ends_after_max_retries(asks: Any, waits: list[float]) -> None:
    with pytest.raises(OverloadedError, match="queue full") as given_up:
        asks(busy("1"), busy("2"), busy("9"), max_retries=2)
    assert given_up.value.retry_after_s == 9
    assert len(waits) == 2
    with pytest.raises(ServingError, match="pixellm serve"):
        asks(httpx.ConnectError("refused"), max_retries=0)


@pytest.mark.parametrize("asks", [ask, ask_async])
def test_a_refusal_is_not_asked_again_and_keeps_what_was_wrong(asks: Any, waits: list[float]) -> None:
    body = {"error": {"message": "no", "type": "invalid_request_error", "param": "threshold", "code": "invalid_value"}}
    with pytest.raises(BadRequestError) as refused:
        asks(httpx.Response(422, json=body))
    assert (refused.value.status_code, refused.value.param, refused.value.code) == (422, "threshold", "invalid_value")
    with pytest.raises(RequestTimeoutError):
        asks(httpx.ReadTimeout("slow"))
    with pytest.raises(ServingError, match=r"502.*nginx"):
        asks(httpx.Response(502, text="<html>nginx</html>"))
    assert waits == []
    died = httpx.Response(500, text="The actor died")  # Ray Serve's proxy, when the ingress dies under a question
    assert asks(died, httpx.Response(200, json=ANSWER)).text == "hi"
    assert len(waits) == 1


def test_a_picture_file_that_is_not_there_is_named() -> None:
    with PixelLMClient() as client, pytest.raises(DataError, match=r"nothing\.jpg"):
        client.segment("nothing.jpg", "what?")


def mask() -> np.ndarray:
    mask_HW = np.zeros((6, 8), dtype=bool)
    mask_HW[2:5, 1:4] = True
    return mask_HW


def test_every_call_against_the_real_routes(tmp_path: Path) -> None:
    backend = ScriptedBackend(targets=[target_part(0, "a thing", mask())])
    path = tmp_path / "a.png"
    path.write_bytes(picture_bytes())
    with ServedApi(backend) as api, PixelLMClient(api.url) as client:
        client.wait_ready(10)
        assert client.models()[0]["version"] == "7"
        for image in (path, str(path), path.read_bytes(), Image.open(path)):
            result = client.segment(image, "what?", threshold=0.25, max_tokens=5, seed=1)
        assert backend.questions[-1].threshold == 0.25
        assert (result.text, result.model_version) == ("Here is a thing [1].", "7-replica")
        np.testing.assert_array_equal(result.targets[0].mask, mask())
        assert result.targets[0].box_xyxy == (1, 2, 4, 5)
        history = [("first?", "yes [1]")]
        talked = client.chat(path, "and then?", history=history, max_tokens=7)
        assert (talked.text, talked.targets[0].area_px) == (result.text, 9)
        assert talked.usage == result.usage
        assert backend.questions[-1].history == (("first?", "yes [1]"),)
        events = list(client.chat_stream(path, "and then?", history=history))
        assert [event.text for event in events if isinstance(event, RemoteText)] == list(backend.words)
        assert isinstance(events[5], RemoteTarget)
        last = events[-1]
        assert isinstance(last, RemoteResult)
        assert (last.text, last.usage, last.finish_reason) == (result.text, result.usage, "stop")
        assert last.timings_s == {"total": 0.25}

    async def exchange() -> list[Any]:
        async with AsyncPixelLMClient(api.url) as asking:
            said = [event async for event in asking.chat_stream(path, "q")]
            return [(await asking.models())[0]["id"], (await asking.chat(path, "q")).text, said[-1].text]

    with ServedApi(backend) as api:
        assert asyncio.run(exchange()) == ["scripted", result.text, result.text]


def test_a_stream_that_breaks_off_raises_what_the_server_said() -> None:
    with ServedApi(ScriptedBackend(breaks_after=2)) as api, PixelLMClient(api.url) as client:
        events = client.chat_stream(picture_bytes(), "q")
        assert next(events) == RemoteText("Here ")
        with pytest.raises(ServingError, match="server failed"):
            list(events)


def test_waiting_for_a_service_that_never_comes_ends_in_time() -> None:
    with PixelLMClient("http://127.0.0.1:9") as client, pytest.raises(ServingError, match="was not ready within"):
        client.wait_ready(0.3)


def test_a_picture_in_a_chat_is_declared_as_what_it_is() -> None:
    seen: list[dict[str, Any]] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(json.loads(request.content))
        return httpx.Response(400, json={"error": {"message": "stop here"}})

    with PixelLMClient("http://test", transport=httpx.MockTransport(answer)) as client:
        for kind in ("PNG", "JPEG", "WEBP"):
            with pytest.raises(BadRequestError):
                client.chat(picture_bytes(kind=kind), "q")
    urls = [body["messages"][0]["content"][0]["image_url"]["url"] for body in seen]
    assert [url.partition(";")[0] for url in urls] == ["data:image/png", "data:image/jpeg", "data:image/webp"]
