"""The ingress's one way to an engine: deadline, retry when a replica dies, cancellation, errors that say something.

Questions are idempotent (no state changes on a replica), so one that was in flight on a replica that died is sent
again. A stream is sent again only while nothing of it has reached the client.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, suppress
from typing import Any, Protocol

from ray.exceptions import RayActorError, RayError, RayTaskError, TaskCancelledError, WorkerCrashedError
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    RayServeException,
    RequestCancelledError,
)
from ray.serve.handle import DeploymentHandle

from pixellm.errors import BadRequestError, OverloadedError, PixelLMError, RequestTimeoutError, ServingError
from pixellm.platform.settings import ServeSettings
from pixellm.serve.metrics import ServiceMetrics
from pixellm.serve.protocol import Answer, Event, Question, Refusal

_LOG = logging.getLogger(__name__)

_REPLICA_DIED = (RayActorError, WorkerCrashedError)
_RETRY_PAUSE_S = 0.1


class Backend(Protocol):
    """What the routes ask for answers."""

    async def answer(self, question: Question) -> Answer:
        """The whole answer."""
        ...

    def stream(self, question: Question) -> AsyncGenerator[Event, None]:
        """The answer as it comes; `Started` first, `Answer` last."""
        ...

    async def num_ready_replicas(self) -> int:
        """How many engines can take a question now."""
        ...


class ReplicaBackend:
    """Answers through a Ray Serve deployment of `EngineReplica`.

    Args:
        handle: of the engine deployment.
        settings: deadline, retries.
        metrics: counts retries, refusals and cancellations.
        app_name: Serve application that the deployment belongs to, for its status.
    """

    def __init__(
        self, handle: DeploymentHandle, settings: ServeSettings, metrics: ServiceMetrics, app_name: str
    ) -> None:
        self._unary = handle.options(method_name="answer")
        self._streaming = handle.options(method_name="stream", stream=True)
        self._deployment = handle.deployment_name
        self._settings = settings
        self._metrics = metrics
        self._app_name = app_name
        self._typical_s = 1.0

    async def answer(self, question: Question) -> Answer:
        """The whole answer.

        Raises:
            BadRequestError: the replica refused the question.
            OverloadedError: the queue is full.
            RequestTimeoutError: no answer within `request_timeout_s`.
            ServingError: replicas died `max_retries + 1` times under it.
        """
        with self._metrics.open_questions.track_inprogress():
            return await self._answer(question)

    async def _answer(self, question: Question) -> Answer:
        loop = asyncio.get_running_loop()
        start = loop.time()
        deadline = start + self._settings.request_timeout_s
        attempt = 0
        while True:
            response = self._unary.remote(question)
            try:
                async with asyncio.timeout_at(deadline):
                    outcome = await response
            except _REPLICA_DIED as error:
                await self._before_retry(attempt, error, deadline)
                attempt += 1
                continue
            except (TimeoutError, asyncio.CancelledError) as error:
                raise self._given_up(response, error) from None
            except Exception as error:
                raise self._translated(error) from None
            self._typical_s += 0.1 * (loop.time() - start - self._typical_s)
            return _unless_refused(outcome)

    async def stream(self, question: Question) -> AsyncGenerator[Event, None]:
        """The answer as it comes: `Started` first, then words and masks, `Answer` last.

        Raises:
            As `answer`; also ServingError when the replica died after the first event.
        """
        deadline = asyncio.get_running_loop().time() + self._settings.request_timeout_s
        with self._metrics.open_questions.track_inprogress():
            response, events = await self._opened(question, deadline)
            async with aclosing(self._events(response, events, deadline)) as all_events:
                async for event in all_events:
                    yield event

    async def _events(self, response: Any, events: Sequence[Event], deadline: float) -> AsyncGenerator[Event, None]:
        try:
            while True:
                for event in events:
                    yield _unless_refused(event)
                async with asyncio.timeout_at(deadline):
                    events = await anext(response)
        except StopAsyncIteration:
            return
        except (TimeoutError, asyncio.CancelledError, GeneratorExit) as error:
            raise self._given_up(response, error) from None
        except _REPLICA_DIED as error:
            _LOG.warning("a replica died while it streamed an answer: %s", error)
            raise ServingError("the replica that answered died; ask again") from None
        except Exception as error:
            raise self._translated(error) from None

    async def _opened(self, question: Question, deadline: float) -> tuple[Any, Sequence[Event]]:
        """A stream of which the first events are there; until then a dead replica costs the client nothing."""
        attempt = 0
        while True:
            response = self._streaming.remote(question)
            try:
                async with asyncio.timeout_at(deadline):
                    return response, await anext(response)
            except _REPLICA_DIED as error:
                await self._before_retry(attempt, error, deadline)
                attempt += 1
            except (TimeoutError, asyncio.CancelledError) as error:
                raise self._given_up(response, error) from None
            except Exception as error:
                raise self._translated(error) from None

    async def num_ready_replicas(self) -> int:
        """How many engines run, as the Serve controller sees them."""
        return await asyncio.to_thread(_running_replicas, self._app_name, self._deployment)

    async def _before_retry(self, attempt: int, error: Exception, deadline: float) -> None:
        if attempt >= self._settings.max_retries:
            raise ServingError(
                f"the replica died under this question {attempt + 1} times; the question or the machine is at fault"
            ) from None
        self._metrics.retries.inc()
        _LOG.warning("a replica died under a question; sending it again: %s", str(error).split("\n", 1)[0])
        pause_s = _RETRY_PAUSE_S * 2**attempt
        if asyncio.get_running_loop().time() + pause_s >= deadline:
            raise self._timed_out() from None
        await asyncio.sleep(pause_s)

    def _given_up(self, response: Any, error: BaseException) -> BaseException:
        """Cancels on the replica what nobody waits for any more; returns what to raise."""
        with suppress(RayError, RayServeException):  # `cancel` raises what the call ended with meanwhile
            response.cancel()
        if isinstance(error, TimeoutError):
            return self._timed_out()
        self._metrics.cancelled.inc()
        return error

    def _translated(self, error: Exception) -> Exception:
        """A Ray error as what it means to the client; errors of our own pass."""
        if isinstance(error, RayTaskError) and isinstance(error.cause, Exception):
            error = error.cause
        if isinstance(error, PixelLMError):
            return error
        if isinstance(error, BackPressureError):
            self._metrics.refused.inc()
            return OverloadedError(
                f"the queue is full ({self._settings.max_queued_requests} questions wait); try again later",
                retry_after_s=self._typical_s,
            )
        if isinstance(error, DeploymentUnavailableError):
            return OverloadedError("no engine is running; the operator's `serve status` says why", retry_after_s=10)
        if isinstance(error, (RequestCancelledError, TaskCancelledError)):
            return OverloadedError("the question was given up by the server; ask again", retry_after_s=1)
        return error

    def _timed_out(self) -> RequestTimeoutError:
        return RequestTimeoutError(
            f"no answer within {self._settings.request_timeout_s:g} s (serve.request_timeout_s), queueing included"
        )


def _unless_refused(outcome: Any) -> Any:
    if isinstance(outcome, Refusal):
        raise BadRequestError(outcome.message, status_code=outcome.status_code, param=outcome.param, code=outcome.code)
    return outcome


def _running_replicas(app_name: str, deployment: str) -> int:
    from ray import serve  # slow; the module's other users never need the controller

    application = serve.status().applications.get(app_name)
    if application is None or deployment not in application.deployments:
        return 0
    states: dict[Any, int] = application.deployments[deployment].replica_states
    return sum(count for state, count in states.items() if str(getattr(state, "value", state)) == "RUNNING")
