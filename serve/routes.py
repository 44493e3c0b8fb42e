"""What each route of the HTTP API does, given a `Backend` that answers questions."""

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, replace

from fastapi import Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST

from pixellm.errors import BadRequestError, OverloadedError, PixelLMError, ServingError
from pixellm.platform.settings import ServeSettings
from pixellm.serve.backend import Backend
from pixellm.serve.chat import ChunkWriter, completion, sse
from pixellm.serve.failures import failure_of
from pixellm.serve.feedback import FeedbackStore
from pixellm.serve.mask_formats import MaskFormat, render_mask
from pixellm.serve.metrics import ServiceMetrics
from pixellm.serve.model_card import ModelCard
from pixellm.serve.protocol import Answer, Event, Started, TargetPart, TextPart
from pixellm.serve.remote_images import RemoteImages
from pixellm.serve.request_bodies import Asked, RequestReader
from pixellm.serve.roster_view import Models
from pixellm.serve.schemas import ChatBody, SegmentAnswer, Target
from pixellm.serve.tracing import Tracing
from pixellm.serve.wire import exchange_of

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Chosen:
    """A question on its way: as it is asked, of which version, and how."""

    asked: Asked
    card: ModelCard
    backend: Backend


class Routes:
    """The routes' functions, with what they share."""

    def __init__(
        self,
        models: Models,
        settings: ServeSettings,
        metrics: ServiceMetrics,
        tracing: Tracing,
        feedback: FeedbackStore | None,
    ) -> None:
        self._models = models
        self._settings = settings
        self._metrics = metrics
        self._tracing = tracing
        self._feedback = feedback
        self._feedback_turn = asyncio.Lock()
        remote = RemoteImages(settings.image_url_hosts, settings.max_body_bytes, settings.image_url_timeout_s)
        self._read = RequestReader(settings, models, remote)

    async def segment(self, request: Request) -> Response:
        """Words and a mask for each thing they name, in one answer."""
        chosen = self._choose(request, await self._read.segment(request))
        answer = await self._answer(request, chosen)
        body = SegmentAnswer(
            id=f"seg-{uuid.uuid4().hex}",
            model=chosen.card.id,
            text=answer.text,
            targets=await _rendered(answer.targets, chosen.asked.options.mask_format),
            usage=dict(answer.usage),
            timings=dict(answer.timings_s),
            finish_reason="length" if answer.finish_reason == "length" else "stop",
            dropped=answer.dropped,
        )
        return Response(body.model_dump_json(), media_type="application/json", headers=_version(answer.model_version))

    async def chat(self, request: Request) -> Response:
        """OpenAI's chat completions about a picture; `stream: true` sends words and masks as they come."""
        start = time.perf_counter()
        chosen = self._choose(request, await self._read.chat(request))
        options = chosen.asked.options
        answer_id = f"chatcmpl-{uuid.uuid4().hex}"
        if isinstance(options, ChatBody) and options.stream:
            return await self._chat_stream(request, chosen, options, answer_id, start)
        answer = await self._answer(request, chosen)
        targets = await _rendered(answer.targets, options.mask_format)
        body = completion(answer_id, chosen.card.id, answer, targets)
        return JSONResponse(body, headers=_version(answer.model_version))

    def _choose(self, request: Request, asked: Asked) -> _Chosen:
        """Which version answers: always the same one for one key, or without keys for one picture."""
        exchange = exchange_of(request.scope)
        caller = exchange.caller
        question = replace(asked.question, caller=caller.name)
        state = self._models.roster.choose(asked.options.model, caller.name if caller.key else question.picture_digest)
        if state.card is None:
            raise OverloadedError("no model is in service yet", retry_after_s=2)
        if self._settings.log_prompts:
            exchange.facts["prompt"] = question.prompt
        return _Chosen(replace(asked, question=question), state.card, self._models.backend(state.app_name))

    async def _answer(self, request: Request, chosen: _Chosen) -> Answer:
        with self._failures_counted(chosen.card):
            answer = await chosen.backend.answer(chosen.asked.question)
        self._count(request, chosen.card, answer)
        return answer

    async def _chat_stream(
        self, request: Request, chosen: _Chosen, options: ChatBody, answer_id: str, start: float
    ) -> Response:
        """Opens the stream only once a replica has taken the question: a refusal still gets its HTTP status."""
        events = chosen.backend.stream(chosen.asked.question)
        with self._failures_counted(chosen.card):
            started = await anext(events)
        if not isinstance(started, Started):
            raise ServingError("the replica's stream did not begin with its version")
        writer = ChunkWriter(answer_id, chosen.card.id, options)
        return StreamingResponse(
            self._chunks(request, chosen.card, events, writer, options.mask_format, start),
            media_type="text/event-stream",
            headers={**_version(started.model_version), "Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )

    async def _chunks(
        self,
        request: Request,
        card: ModelCard,
        events: AsyncGenerator[Event, None],
        writer: ChunkWriter,
        mask_format: MaskFormat,
        start: float,
    ) -> AsyncIterator[bytes]:
        is_first_text = True
        yield writer.opening()
        try:
            async with aclosing(events) as open_events:
                async for event in open_events:
                    if isinstance(event, TextPart):
                        if is_first_text:
                            self._metrics.first_token_s.observe(time.perf_counter() - start)
                            is_first_text = False
                        yield writer.text(event.text)
                    elif isinstance(event, TargetPart):
                        yield writer.target((await _rendered([event], mask_format))[0])
                    elif isinstance(event, Answer):
                        self._count(request, card, event)
                        yield writer.closing(event)
        except Exception as error:  # the response has begun: the error can only travel inside it
            self._metrics.failures.labels(card.id, card.version, type(error).__name__).inc()
            _status, body, _headers = failure_of(error)
            if not isinstance(error, ServingError):
                _LOG.error("a stream failed", exc_info=error)
            yield sse(body)

    async def feedback(self, request: Request) -> Response:
        """Verdicts about an answer, kept where the operator said."""
        if self._feedback is None:
            raise BadRequestError(
                "this service keeps no feedback; its operator can set serve.feedback_dir",
                status_code=404,
                code="feedback_off",
            )
        body, image_bytes = await self._read.feedback(request)
        async with self._feedback_turn:
            num_masks = await asyncio.to_thread(
                self._feedback.keep, body, image_bytes, exchange_of(request.scope).caller.name
            )
        for target in body.targets:
            self._metrics.feedback.labels(target.verdict).inc()
        return JSONResponse({"answer_id": body.answer_id, "kept_masks": num_masks}, status_code=201)

    async def models(self) -> Response:
        """The served versions with their registry lineage, as OpenAI lists models."""
        data = [card.to_json_dict() for card in self._models.roster.cards()]
        return JSONResponse({"object": "list", "data": data, "features": {"feedback": self._feedback is not None}})

    async def model(self, model_id: str) -> Response:
        """One served model; of several versions the one that takes most of the traffic."""
        found = self._models.roster.find(model_id)
        card = max(found, key=lambda state: state.track.share).card
        return JSONResponse(None if card is None else card.to_json_dict())

    async def healthz(self) -> Response:
        """Alive: this process answers."""
        return JSONResponse({"status": "ok"})

    async def readyz(self) -> Response:
        """Ready: an engine runs, or may be started on demand (`min_replicas: 0`)."""
        roster = self._models.roster
        state = max(roster.find(None), key=lambda state: state.track.share)
        num_replicas = await self._models.backend(state.app_name).num_ready_replicas()
        if state.card is None or (num_replicas == 0 and self._settings.min_replicas > 0):
            raise OverloadedError("no engine replica is running yet", retry_after_s=2)
        body = {
            "status": "ready",
            "replicas": num_replicas,
            "model": state.card.to_json_dict(),
            "tracks": [state.to_json_dict() for state in roster.tracks],
        }
        return JSONResponse(body)

    async def metrics_text(self) -> Response:
        """Prometheus text."""
        return Response(self._metrics.exposition(), media_type=CONTENT_TYPE_LATEST)

    def _count(self, request: Request, card: ModelCard, answer: Answer) -> None:
        self._metrics.count_answer(card.id, answer)
        self._tracing.phases(answer.timings_s)
        exchange_of(request.scope).facts.update(
            model=card.id,
            targets=len(answer.targets),
            completion_tokens=answer.usage.get("completion_tokens", 0),
            finish_reason=answer.finish_reason,
        )

    @contextmanager
    def _failures_counted(self, card: ModelCard) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            kind = type(error).__name__ if isinstance(error, PixelLMError) else "crash"
            self._metrics.failures.labels(card.id, card.version, kind).inc()
            raise


async def _rendered(targets: Sequence[TargetPart], mask_format: MaskFormat) -> list[Target]:
    """Targets as they are sent; PNGs and polygons are made in a thread, since a large mask takes milliseconds."""
    if mask_format == "rle" or not targets:
        return [_render(target, mask_format) for target in targets]
    return await asyncio.to_thread(lambda: [_render(target, mask_format) for target in targets])


def _render(target: TargetPart, mask_format: MaskFormat) -> Target:
    return Target(
        index=target.index,
        phrase=target.phrase,
        score=round(target.score, 4),
        box=None if target.box is None else list(target.box),
        area=target.area,
        mask=render_mask(target.rle, mask_format),
    )


def _version(model_version: str) -> dict[str, str]:
    return {"X-Model-Version": model_version}
