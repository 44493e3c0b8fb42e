"""`PixelLMEngine`: answers questions about pictures with words and masks, many at a time.

One vision pass per picture, a key/value cache with a row per request, and a group of codebook tokens committed in one
forward as soon as its first token is chosen. Requests join and leave a running batch at every step; an answer does not
depend on what runs beside it.
"""

import asyncio
import contextlib
import functools
import itertools
import weakref
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from PIL import Image

from pixellm.errors import DataError, PixelLMError
from pixellm.model.answers import AnswerReader
from pixellm.model.config import IMAGE_TOKEN_ID
from pixellm.model.conversation import Turn, history_turns
from pixellm.model.engine.answer_state import AnswerState
from pixellm.model.engine.handle import Listener, RequestHandle, Stopwatch
from pixellm.model.engine.kv_cache import SlotCache
from pixellm.model.engine.loop import LiveRequest, LoopCounters, StepLoop
from pixellm.model.engine.mask_worker import MaskWorker
from pixellm.model.engine.options import EngineOptions, load_model
from pixellm.model.engine.picture_cache import PictureCache, picture_digest
from pixellm.model.engine.runner import Row, Runner
from pixellm.model.engine.sampling import RowSampler, banned_tokens
from pixellm.model.engine.types import (
    Done,
    GenerationOptions,
    SegmentationResult,
    SegmentRequest,
    StreamEvent,
)
from pixellm.model.images import PreparedImage
from pixellm.model.processing import PixelLMProcessor


@dataclass(frozen=True)
class EngineStats:
    """A snapshot of an engine.

    Attributes:
        waiting: requests without a slot.
        running: requests in a slot.
        counters: steps, forwards, tokens and targets since the start.
        picture_hits: questions whose picture had been looked at before.
        picture_misses: vision passes.
        picture_cache_bytes: memory of remembered pictures.
    """

    waiting: int
    running: int
    counters: LoopCounters
    picture_hits: int
    picture_misses: int
    picture_cache_bytes: int


class PixelLMEngine:
    """Answers questions about pictures. Safe to use from any thread; close it, or use it in a `with` block.

    Attributes:
        model: the network, in evaluation mode.
        processor: its processor.
        options: how the engine runs.
    """

    def __init__(
        self,
        model: Any,
        processor: PixelLMProcessor,
        *,
        max_batch_size: int | None = None,
        options: EngineOptions | None = None,
    ) -> None:
        """Takes a loaded model and starts its threads.

        Args:
            model: the network: a `MultimodalBackbone` with `config`, `device`, `dtype` and `get_input_embeddings`.
            processor: must be the one that belongs to it.
            max_batch_size: most requests that are generated together; overrides the options' limit.
            options: how the engine runs; dtype, attention and quantization are those the model was loaded with.

        Raises:
            ModelLoadError: tokenizer and model do not belong together.
        """
        processor.check_matches(model.config)
        options = options or EngineOptions()
        if max_batch_size is not None:
            options = replace(options, limits=replace(options.limits, max_batch_size=max_batch_size))
        self.model, self.processor, self.options = model.eval(), processor, options
        self._max_context = _max_context(model.config, options)
        self._next_id = itertools.count()
        ids, device = processor.token_ids, torch.device(model.device)
        self._pictures = PictureCache(options.picture_cache_bytes)
        num_slots = options.limits.max_batch_size
        runner = Runner(
            model,
            model.get_input_embeddings(),
            SlotCache(num_slots, self._max_context, device),
            self._pictures,
            mask_form=_mask_form(model.config),
            reuse_prefix=options.reuse_prompt_prefix,
            compile_decode=options.compile_decode,
        )
        banned = banned_tokens(model.config.text_config.vocab_size, ids.codebook, (ids.im_start, ids.im_end))
        self._masks = MaskWorker(model, options.max_batch_targets)
        pixels = functools.partial(_pixel_values, processor, model.dtype)
        self._loop = StepLoop(runner, self._masks, options.limits, banned_V=banned.to(device), pixels=pixels)
        # The threads hold no reference to the engine: one that is forgotten, or left open at exit, ends them.
        self._finalizer = weakref.finalize(self, _end_threads, self._loop, self._masks)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        device: str = "cpu",
        max_batch_size: int | None = None,
        options: EngineOptions | None = None,
    ) -> "PixelLMEngine":
        """Loads a model folder.

        Args:
            path: written by `save_pretrained` of model and processor.
            device: "cpu", "cuda", "cuda:1", …
            max_batch_size: most requests that are generated together (8 unless the options say otherwise).
            options: how the engine runs.

        Raises:
            ModelLoadError: weights or tokenizer are missing, damaged or of another model.
            ConfigError: an option that this machine cannot run.
        """
        options = options or EngineOptions()
        processor = PixelLMProcessor.from_pretrained(path)
        return cls(load_model(path, device, options), processor, max_batch_size=max_batch_size, options=options)

    def segment(
        self,
        image: Image.Image | bytes,
        prompt: str,
        *,
        max_new_tokens: int = 256,
        threshold: float = 0.5,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop: Sequence[str] = (),
        history: Sequence[tuple[str, str]] = (),
    ) -> SegmentationResult:
        """Answers one question; see `GenerationOptions` for the options and `SegmentRequest` for the history.

        Raises:
            DataError: the picture or the prompt cannot be used.
            BadRequestError: an option is out of range.
        """
        options = GenerationOptions(max_new_tokens, threshold, temperature, top_p, seed, tuple(stop))
        return self.submit(SegmentRequest(image, prompt, options, tuple(history))).result()

    def segment_batch(self, requests: Sequence[SegmentRequest]) -> list[SegmentationResult]:
        """Answers several questions together; results are in the order of the requests.

        However many there are, no more than fit are under way at once.

        Raises:
            PixelLMError: the first request that failed; the others are given up.
        """
        limits = self.options.limits
        handles: list[RequestHandle] = []
        results: list[SegmentationResult] = []
        try:
            for request in requests:
                if len(handles) - len(results) >= limits.max_batch_size + limits.max_waiting:
                    results.append(handles[len(results)].result())
                handles.append(self.submit(request))
            results += [handle.result() for handle in handles[len(results) :]]
        finally:
            for handle in handles:
                handle.cancel()
        return results

    def stream(
        self,
        image: Image.Image | bytes,
        prompt: str,
        *,
        max_new_tokens: int = 256,
        threshold: float = 0.5,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop: Sequence[str] = (),
        history: Sequence[tuple[str, str]] = (),
    ) -> Iterator[StreamEvent]:
        """Answers one question as it is generated: `TextDelta` and `TargetDone` in order, then `Done`.

        Closing the iterator early gives the request up.
        """
        options = GenerationOptions(max_new_tokens, threshold, temperature, top_p, seed, tuple(stop))
        handle = self.submit(SegmentRequest(image, prompt, options, tuple(history)))
        try:
            yield from handle.events()
        finally:
            handle.cancel()

    def submit(self, request: SegmentRequest, listener: Listener | None = None) -> RequestHandle:
        """Takes a request in and returns at once after preparing its picture and prompt in the calling thread.

        Args:
            request: what to answer.
            listener: called with every event, or the error, from the engine's threads; must return at once.

        Raises:
            DataError: the picture or the prompt cannot be used.
            OverloadedError: too many requests wait already.
        """
        watch = Stopwatch()
        picture = self.processor.prepare_image(request.image)
        prompt_ids = self.processor.encode_prompt([*history_turns(request.history), Turn(request.prompt)])
        return self._submit(request, picture, prompt_ids, watch, listener)

    def submit_prepared(
        self, picture: PreparedImage, prompt_ids: Sequence[int], options: GenerationOptions | None = None
    ) -> RequestHandle:
        """Takes a request whose picture and prompt ids are given as they are, for tests and golden numbers."""
        request = SegmentRequest(b"", "", options or GenerationOptions())
        return self._submit(request, picture, list(prompt_ids), Stopwatch(), None)

    async def asubmit(self, request: SegmentRequest, listener: Listener | None = None) -> RequestHandle:
        """`submit` for asyncio: prepares the picture on another thread.

        Cancelling the task while it prepares gives the request up as soon as it is in.
        """
        submitting = asyncio.ensure_future(asyncio.to_thread(self.submit, request, listener))
        try:
            return await asyncio.shield(submitting)
        except asyncio.CancelledError:
            submitting.add_done_callback(_give_up)
            raise

    async def asegment(self, request: SegmentRequest) -> SegmentationResult:
        """Answers one request from asyncio; cancelling the task gives the request up."""
        result: SegmentationResult | None = None
        async for event in self.astream(request):
            if isinstance(event, Done):
                result = event.result
        assert result is not None
        return result

    async def astream(self, request: SegmentRequest) -> AsyncIterator[StreamEvent]:
        """`stream` for asyncio: events as they come; leaving early gives the request up."""
        event_loop = asyncio.get_running_loop()
        events: asyncio.Queue[StreamEvent | PixelLMError] = asyncio.Queue()

        def listener(event: StreamEvent | PixelLMError) -> None:
            with contextlib.suppress(RuntimeError):  # the event loop may have closed
                event_loop.call_soon_threadsafe(events.put_nowait, event)

        handle = await self.asubmit(request, listener)
        try:
            while True:
                event = await events.get()
                if isinstance(event, PixelLMError):
                    raise event
                yield event
                if isinstance(event, Done):
                    return
        finally:
            handle.cancel()

    def cancel(self, request_id: int) -> None:
        """Gives a request up; its slot is free at the next step."""
        self._loop.cancel(request_id)

    def stats(self) -> EngineStats:
        """A snapshot of queues, counters and the picture cache."""
        return EngineStats(
            waiting=self._loop.num_waiting,
            running=self._loop.num_running,
            counters=replace(self._loop.counters),
            picture_hits=self._pictures.num_hits,
            picture_misses=self._pictures.num_misses,
            picture_cache_bytes=self._pictures.num_bytes,
        )

    def close(self) -> None:
        """Ends the engine's threads; requests under way fail. Closing twice is harmless."""
        self._finalizer()

    def __enter__(self) -> "PixelLMEngine":
        """Returns the engine, to be closed at the end of the block."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Closes the engine."""
        self.close()

    def _submit(
        self,
        request: SegmentRequest,
        picture: PreparedImage,
        prompt_ids: list[int],
        watch: Stopwatch,
        listener: Listener | None,
    ) -> RequestHandle:
        options, processor = request.options, self.processor
        left = self._max_context - len(prompt_ids)
        if left < 1:
            raise DataError(
                f"the prompt takes {len(prompt_ids)} positions, the model has {self._max_context} for prompt and "
                "answer together (max_context_tokens); shorten it"
            )
        handle = RequestHandle(next(self._next_id), self.cancel, listener)
        answer = AnswerState(
            AnswerReader(processor.tokenizer, request.prompt),
            options,
            processor.token_ids.codebook,
            processor.tokenizer.eos_token_id,
            min(options.max_new_tokens, left),
        )
        num_picture = prompt_ids.count(IMAGE_TOKEN_ID)
        num_words = prompt_ids.index(IMAGE_TOKEN_ID) if num_picture else len(prompt_ids)
        live = LiveRequest(
            handle=handle,
            picture=picture,
            row=Row(prompt_ids, picture_digest(picture), num_words, num_picture),
            answer=answer,
            sampler=RowSampler(options),
            client=request.client,
            deadline=None if request.timeout_s is None else watch.started_at + request.timeout_s,
            watch=watch,
        )
        watch.lap("prepare")
        self._loop.submit(live)
        return handle


def _pixel_values(
    processor: PixelLMProcessor, dtype: torch.dtype, pixels: torch.Tensor, valid_hw: torch.Tensor
) -> torch.Tensor:
    return processor.normalise(pixels, valid_hw).to(dtype)


def _give_up(submitted: "asyncio.Future[RequestHandle]") -> None:
    if not submitted.cancelled() and submitted.exception() is None:
        submitted.result().cancel()


def _end_threads(loop: StepLoop, masks: MaskWorker) -> None:
    loop.close()
    masks.close()


def _max_context(config: Any, options: EngineOptions) -> int:
    own = int(config.text_config.max_position_embeddings)
    return own if options.max_context_tokens is None else min(own, options.max_context_tokens)


def _mask_form(config: Any) -> str:
    """How attention masks must look for the language model's attention kernels."""
    implementation = getattr(config.text_config, "_attn_implementation", None) or "sdpa"
    forms = {"sdpa": "bool", "eager": "additive", "flash_attention_2": "keys"}
    return forms[implementation]
