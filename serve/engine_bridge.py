"""From the protocol to the engine and back, inside a replica: the one serving module that imports torch."""

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import suppress
from typing import cast

import torch
from PIL import Image

from pixellm.errors import BadRequestError, DataError, ModelLoadError, PixelLMError, ServingError
from pixellm.model.engine import (
    Done,
    EngineOptions,
    GenerationOptions,
    PixelLMEngine,
    SegmentationResult,
    SegmentRequest,
    StreamEvent,
    TargetDone,
    TargetMask,
    TextDelta,
)
from pixellm.model.engine.golden_example import check_golden_example
from pixellm.platform import registry
from pixellm.platform.settings import ServeSettings, TrackingSettings
from pixellm.serve.model_card import ModelCard
from pixellm.serve.protocol import (
    Answer,
    EngineReport,
    Event,
    Question,
    Refusal,
    Rle,
    Started,
    TargetPart,
    TextPart,
)
from pixellm.serve.stall_watch import StallWatch

_LENGTH_REASONS = ("max_new_tokens", "max_targets", "context_full")
_FIRST_QUESTION = "What is in this picture?"


class EngineBridge:
    """One loaded engine that answers questions, many at a time.

    Args:
        card: which version to load.
        settings: batch size, threads, limits.
        tracking: the registry that `card.reference` is looked up in.

    Raises:
        ModelLoadError: the model does not load, or does not answer its golden example as stored.
    """

    def __init__(self, card: ModelCard, settings: ServeSettings, tracking: TrackingSettings) -> None:
        started_s = time.monotonic()
        torch.set_num_threads(settings.threads_per_replica)
        device = "cuda" if settings.replica_gpus > 0 and torch.cuda.is_available() else "cpu"
        self._engine = _load(card, settings, tracking, device)
        self._version = card.version
        self._timeout_s = settings.request_timeout_s
        self._max_targets = settings.max_targets
        self._stall_watch = StallWatch(settings.stall_timeout_s)
        self._name = uuid.uuid4().hex[:8]
        self._load_s = time.monotonic() - started_s

    async def answer(self, question: Question) -> Answer | Refusal:
        """The whole answer, or why not."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[SegmentationResult] = loop.create_future()

        def listen(event: StreamEvent | PixelLMError) -> None:
            if isinstance(event, (Done, PixelLMError)):
                with suppress(RuntimeError):  # the event loop may have closed with the replica
                    loop.call_soon_threadsafe(_settle, done, event)

        try:
            handle = await asyncio.to_thread(self._engine.submit, self._request(question), listen)
            try:
                return self._answer(await done)
            finally:
                handle.cancel()
        except (BadRequestError, DataError) as error:
            return _refusal(error)

    async def stream(self, question: Question) -> AsyncGenerator[list[Event], None]:
        """The answer in batches of events; see `EngineReplica.stream`."""
        loop = asyncio.get_running_loop()
        arrived: asyncio.Queue[StreamEvent | PixelLMError] = asyncio.Queue()

        def listen(event: StreamEvent | PixelLMError) -> None:
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(arrived.put_nowait, event)

        try:
            handle = await asyncio.to_thread(self._engine.submit, self._request(question), listen)
            try:
                batch: list[Event] = [Started(self._version)]
                while True:
                    batch.append(self._event(await arrived.get()))
                    while not arrived.empty():
                        batch.append(self._event(arrived.get_nowait()))
                    yield batch
                    if isinstance(batch[-1], Answer):
                        return
                    batch = []
            finally:
                handle.cancel()
        except (BadRequestError, DataError) as error:
            yield [_refusal(error)]

    def check_health(self) -> None:
        """Judges the engine's progress.

        Raises:
            ServingError: the engine has had questions to answer and made no step for `stall_timeout_s`.
        """
        stats = self._engine.stats()
        is_busy = stats.running + stats.waiting > 0
        stalled_s = self._stall_watch.observe(stats.counters, is_busy=is_busy, now_s=time.monotonic())
        if stalled_s is not None:
            raise ServingError(
                f"the engine has been stuck for {stalled_s:.0f} s with {stats.running} questions running"
            )

    def close(self) -> None:
        """Ends the engine's threads."""
        self._engine.close()

    def _request(self, question: Question) -> SegmentRequest:
        options = GenerationOptions(
            max_new_tokens=question.max_new_tokens,
            threshold=question.threshold,
            temperature=question.temperature,
            top_p=question.top_p,
            seed=question.seed,
            stop=question.stop,
            max_targets=self._max_targets,
        )
        return SegmentRequest(
            question.image_bytes,
            question.prompt,
            options,
            question.history,
            client=question.caller,
            timeout_s=self._timeout_s,
        )

    def _event(self, event: StreamEvent | PixelLMError) -> Event:
        if isinstance(event, PixelLMError):
            raise event
        if isinstance(event, TextDelta):
            return TextPart(event.text)
        if isinstance(event, TargetDone):
            return _target(event.target)
        return self._answer(event.result)

    def _answer(self, result: SegmentationResult) -> Answer:
        usage = result.usage
        return Answer(
            model_version=self._version,
            text=result.text,
            targets=tuple(_target(target) for target in result.targets),
            usage={
                "prompt_tokens": usage.prompt_tokens,
                "completion_tokens": usage.completion_tokens,
                "image_tokens": usage.image_tokens,
            },
            timings_s={phase: round(seconds, 6) for phase, seconds in result.timings_s.items()},
            finish_reason="length" if result.stop_reason in _LENGTH_REASONS else "stop",
            dropped=result.dropped,
            engine=self._report(),
        )

    def _report(self) -> EngineReport:
        stats = self._engine.stats()
        return EngineReport(
            replica=self._name,
            running=stats.running,
            waiting=stats.waiting,
            picture_hits=stats.picture_hits,
            picture_misses=stats.picture_misses,
            picture_cache_bytes=stats.picture_cache_bytes,
            load_s=self._load_s,
        )


def _target(target: TargetMask) -> TargetPart:
    return TargetPart(
        index=target.index,
        phrase=target.phrase,
        score=float(target.score),
        box=target.box_xyxy,
        area=int(target.area_px),
        rle=cast(Rle, target.rle),
    )


def _settle(done: "asyncio.Future[SegmentationResult]", event: Done | PixelLMError) -> None:
    if done.done():
        return
    if isinstance(event, PixelLMError):
        done.set_exception(event)
    else:
        done.set_result(event.result)


def _refusal(error: PixelLMError) -> Refusal:
    if isinstance(error, BadRequestError):
        return Refusal(str(error), error.status_code, error.param, error.code)
    return Refusal(str(error), code="invalid_input")


def _load(card: ModelCard, settings: ServeSettings, tracking: TrackingSettings, device: str) -> PixelLMEngine:
    """Loads the engine and asks its golden example, or where there is none one small question.

    A model whose weights did not load, or cannot answer, is never put into service.
    """
    try:
        folder = registry.resolve(card.reference, tracking)
        engine = PixelLMEngine.from_pretrained(
            folder, device=device, max_batch_size=settings.max_batch_size, options=EngineOptions(dtype=settings.dtype)
        )
        if not check_golden_example(folder, engine).found:
            engine.segment(Image.new("RGB", (64, 48), (120, 130, 140)), _FIRST_QUESTION, max_new_tokens=8)
    except PixelLMError:
        raise
    except Exception as error:  # a process boundary: Serve prints this in the traceback of the failed start
        message = " ".join(str(error).split())
        raise ModelLoadError(f"{card.requested} does not load: {type(error).__name__}: {message}") from error
    return engine
