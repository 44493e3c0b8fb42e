"""What each route of the HTTP API does, given a `Backend` that answers questions."""

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing

from fastapi import Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST

from pixellm.errors import BadRequestError, OverloadedError, ServingError
from pixellm.platform.settings import ServeSettings
from pixellm.serve.backend import Backend
from pixellm.serve.chat import ChunkWriter, completion, sse
from pixellm.serve.failures import failure_of
from pixellm.serve.mask_formats import MaskFormat, render_mask
from pixellm.serve.metrics import ServiceMetrics
from pixellm.serve.model_card import ModelCard
from pixellm.serve.protocol import Answer, Event, Started, TargetPart, TextPart
from pixellm.serve.request_bodies import Asked, RequestReader
from pixellm.serve.schemas import ChatBody, SegmentAnswer, Target

_LOG = logging.getLogger(__name__)


class Routes:
    """The routes' functions, with what they share."""

    def __init__(self, backend: Backend, settings: ServeSettings, card: ModelCard, metrics: ServiceMetrics) -> None:
        self._backend = backend
        self._min_replicas = settings.min_replicas
        self._card = card
        self._metrics = metrics
        self._read = RequestReader(settings, card)

    async def segment(self, request: Request) -> Response:
        """Words and a mask for each thing they name, in one answer."""
        asked = await self._read.segment(request)
        answer = await self._backend.answer(asked.question)
        self._count(answer)
        body = SegmentAnswer(
            id=f"seg-{uuid.uuid4().hex}",
            model=self._card.id,
            text=answer.text,
            targets=await _rendered(answer.targets, asked.options.mask_format),
            usage=dict(answer.usage),
            timings=dict(answer.timings_s),
            finish_reason="length" if answer.finish_reason == "length" else "stop",
            dropped=answer.dropped,
        )
        return Response(body.model_dump_json(), media_type="application/json", headers=_version(answer.model_version))

    async def chat(self, request: Request) -> Response:
        """OpenAI's chat completions about a picture; `stream: true` sends words and masks as they come."""
        start = time.perf_counter()
        asked = await self._read.chat(request)
        request_id = f"chatcmpl-{uuid.uuid4().hex}"
        if isinstance(asked.options, ChatBody) and asked.options.stream:
            return await self._chat_stream(asked, asked.options, request_id, start)
        answer = await self._backend.answer(asked.question)
        self._count(answer)
        targets = await _rendered(answer.targets, asked.options.mask_format)
        body = completion(request_id, self._card.id, answer, targets)
        return JSONResponse(body, headers=_version(answer.model_version))

    async def _chat_stream(self, asked: Asked, options: ChatBody, request_id: str, start: float) -> Response:
        """Opens the stream only once a replica has taken the question: a refusal still gets its HTTP status."""
        events = self._backend.stream(asked.question)
        started = await anext(events)
        if not isinstance(started, Started):
            raise ServingError("the replica's stream did not begin with its version")
        writer = ChunkWriter(request_id, self._card.id, options)
        return StreamingResponse(
            self._chunks(events, writer, options.mask_format, start),
            media_type="text/event-stream",
            headers={**_version(started.model_version), "Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )

    async def _chunks(
        self, events: AsyncGenerator[Event, None], writer: ChunkWriter, mask_format: MaskFormat, start: float
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
                        self._count(event)
                        yield writer.closing(event)
        except Exception as error:  # the response has begun: the error can only travel inside it
            _status, body, _headers = failure_of(error)
            if not isinstance(error, ServingError):
                _LOG.error("a stream failed", exc_info=error)
            yield sse(body)

    async def models(self) -> Response:
        """The served model with its version and registry lineage, as OpenAI lists models."""
        return JSONResponse({"object": "list", "data": [self._card.to_json_dict()]})

    async def model(self, model_id: str) -> Response:
        """One served model."""
        if not self._card.answers_to(model_id):
            raise BadRequestError(
                f"the model {model_id[:100]!r} is not served here; this server has {self._card.id!r}",
                status_code=404,
                param="model",
                code="model_not_found",
            )
        return JSONResponse(self._card.to_json_dict())

    async def healthz(self) -> Response:
        """Alive: this process answers."""
        return JSONResponse({"status": "ok"})

    async def readyz(self) -> Response:
        """Ready: an engine runs, or may be started on demand (`min_replicas: 0`)."""
        num_replicas = await self._backend.num_ready_replicas()
        if num_replicas == 0 and self._min_replicas > 0:
            raise OverloadedError("no engine replica is running yet", retry_after_s=2)
        return JSONResponse({"status": "ready", "replicas": num_replicas, "model": self._card.to_json_dict()})

    async def metrics_text(self) -> Response:
        """Prometheus text."""
        return Response(self._metrics.exposition(), media_type=CONTENT_TYPE_LATEST)

    def _count(self, answer: Answer) -> None:
        usage = answer.usage
        self._metrics.count_answer(
            len(answer.targets), usage.get("prompt_tokens", 0), usage.get("completion_tokens", 0)
        )


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
