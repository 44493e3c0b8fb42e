"""The way to a replica, with scripted handles: retries, refusals, deadlines, cancellation."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any, cast

import pytest
from ray.exceptions import ActorDiedError, RayTaskError
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle

from pixellm.errors import (
    BadRequestError,
    ModelLoadError,
    OverloadedError,
    RequestTimeoutError,
    ServingError,
)
from pixellm.platform.settings import ServeSettings
from pixellm.serve.backend import ReplicaBackend
from pixellm.serve.metrics import ServiceMetrics
from pixellm.serve.protocol import Answer, Event, Question, Refusal, Started, TextPart

QUESTION = Question(b"picture", "what?")
ANSWER = Answer("3", "a cat", (), {"prompt_tokens": 1})
NEVER = "never"
DIED = ActorDiedError()


class Response:
    """One call's response: a value, an exception, or for a stream a list of batches that may hold exceptions."""

    def __init__(self, outcome: Any) -> None:
        self._outcome = outcome
        self._batches = iter(outcome) if isinstance(outcome, list) else None
        self.is_cancelled = False

    def __await__(self) -> Any:
        return self._value(self._outcome).__await__()

    async def __anext__(self) -> Any:
        if self._batches is None:
            return await self._value(self._outcome)
        for batch in self._batches:
            return await self._value(batch)
        raise StopAsyncIteration

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    def cancel(self) -> None:
        """As Ray Serve's: on a call that has failed it raises the failure."""
        if isinstance(self._outcome, Exception):
            raise self._outcome
        self.is_cancelled = True

    @staticmethod
    async def _value(outcome: Any) -> Any:
        if isinstance(outcome, Exception):
            raise outcome
        if outcome == NEVER:
            await asyncio.sleep(60)
        return outcome


class Handle:
    """A deployment handle that plays outcomes in order."""

    deployment_name = "engine"

    def __init__(self, *outcomes: Any) -> None:
        self._outcomes = list(outcomes)
        self.responses: list[Response] = []

    def options(self, **_options: Any) -> "Handle":
        return self

    def remote(self, question: Question) -> Response:
        assert question is QUESTION
        self.responses.append(Response(self._outcomes.pop(0)))
        return self.responses[-1]


def backend_of(handle: Handle, **settings: Any) -> tuple[ReplicaBackend, Callable[[str], float]]:
    metrics = ServiceMetrics()
    fields = {"request_timeout_s": 5, "max_retries": 2} | settings
    backend = ReplicaBackend(cast(DeploymentHandle, handle), ServeSettings(**fields), metrics, "app")

    def count(name: str) -> float:
        return metrics.registry.get_sample_value(f"pixellm_{name}_total") or 0.0

    return backend, count


async def collect(backend: ReplicaBackend) -> list[Event]:
    return [event async for event in backend.stream(QUESTION)]


def test_a_question_whose_replica_dies_is_sent_again() -> None:
    handle = Handle(DIED, DIED, ANSWER)
    backend, count = backend_of(handle)
    assert asyncio.run(backend.answer(QUESTION)) == ANSWER
    assert (len(handle.responses), count("retries")) == (3, 2)


def test_a_question_that_kills_every_replica_is_given_up() -> None:
    handle = Handle(DIED, DIED, DIED)
    backend, _count = backend_of(handle)
    with pytest.raises(ServingError, match="3 times"):
        asyncio.run(backend.answer(QUESTION))


def test_a_stream_is_sent_again_until_something_of_it_has_come() -> None:
    handle = Handle([DIED], [[Started("3"), TextPart("a")], [TextPart(" cat"), ANSWER]])
    backend, _count = backend_of(handle)
    assert asyncio.run(collect(backend)) == [Started("3"), TextPart("a"), TextPart(" cat"), ANSWER]
    late = Handle([[Started("3"), TextPart("a")], DIED], [[ANSWER]])
    backend, _count = backend_of(late)
    with pytest.raises(ServingError, match="ask again"):
        asyncio.run(collect(backend))
    assert len(late.responses) == 1


@pytest.mark.parametrize(
    ("outcome", "expected"),
    [
        (Refusal("truncated", 400, "image", "invalid_input"), BadRequestError),
        (BackPressureError(64, 64), OverloadedError),
        (RayTaskError("f", "traceback", ModelLoadError("gone")), ModelLoadError),
        (OverloadedError("engine queue full"), OverloadedError),
    ],
)
def test_what_a_replica_says_reaches_the_routes_as_the_error_it_is(outcome: Any, expected: type[Exception]) -> None:
    with pytest.raises(expected):
        asyncio.run(backend_of(Handle(outcome))[0].answer(QUESTION))
    stream_outcome = [[outcome]] if isinstance(outcome, Refusal) else [outcome]
    with pytest.raises(expected):
        asyncio.run(collect(backend_of(Handle(stream_outcome))[0]))


def test_a_question_beyond_its_deadline_is_cancelled_on_the_replica() -> None:
    for handle, ask in ((Handle(NEVER), "answer"), (Handle([NEVER]), "stream")):
        backend, _count = backend_of(handle, request_timeout_s=0.05)
        with pytest.raises(RequestTimeoutError, match=r"0\.05 s"):
            asyncio.run(backend.answer(QUESTION) if ask == "answer" else collect(backend))  # type: ignore[arg-type]
        assert handle.responses[0].is_cancelled


def test_a_client_that_hangs_up_cancels_on_the_replica() -> None:
    async def hang_up(handle: Handle) -> float:
        backend, count = backend_of(handle)
        task = asyncio.ensure_future(backend.answer(QUESTION))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return count("cancelled")

    async def leave_a_stream(handle: Handle) -> float:
        backend, count = backend_of(handle)
        events = backend.stream(QUESTION)
        await anext(events)
        await events.aclose()
        return count("cancelled")

    unary, streaming = Handle(NEVER), Handle([[Started("3"), TextPart("a")], NEVER])
    assert asyncio.run(hang_up(unary)) == 1
    assert asyncio.run(leave_a_stream(streaming)) == 1
    assert unary.responses[0].is_cancelled
    assert streaming.responses[0].is_cancelled
