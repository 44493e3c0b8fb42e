"""The step loop: one thread that asks the scheduler for a plan, runs it, and tells the requests what became final.

Everything that touches the network or the cache happens on this thread, except masks (`mask_worker`). Callers only put
requests into an inbox or mark them as cancelled.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from pixellm.errors import OverloadedError, PixelLMError, RequestCancelledError, RequestTimeoutError, ServingError
from pixellm.model.engine.answer_state import AnswerState
from pixellm.model.engine.handle import RequestHandle, Stopwatch
from pixellm.model.engine.mask_worker import MaskJob, MaskWorker
from pixellm.model.engine.runner import Row, Runner
from pixellm.model.engine.sampling import RowSampler, sample_tokens
from pixellm.model.engine.scheduler import (
    RunningRequest,
    SchedulerLimits,
    SchedulerState,
    WaitingRequest,
    next_deadline,
    plan_step,
)
from pixellm.model.engine.types import SegmentationResult, TargetMask, Usage
from pixellm.model.images import PreparedImage

_LOGGER = logging.getLogger(__name__)


@dataclass
class LiveRequest:
    """A request from submission to its last token.

    Attributes:
        handle: the caller's side.
        picture: prepared.
        row: its place in the cache.
        answer: the words.
        sampler: how its tokens are chosen.
        client: for fairness.
        deadline: on the monotonic clock, or None.
        watch: seconds by phase.
        pending: chosen ids that have not been run: one token, or a group.
    """

    handle: RequestHandle
    picture: PreparedImage
    row: Row
    answer: AnswerState
    sampler: RowSampler
    client: str = ""
    deadline: float | None = None
    watch: Stopwatch = field(default_factory=Stopwatch)
    pending: list[int] = field(default_factory=list)

    @property
    def request_id(self) -> int:
        """Unique within the engine."""
        return self.handle.request_id


@dataclass
class LoopCounters:
    """What the loop has done since it started.

    Attributes:
        submitted: requests taken in.
        steps: plans executed.
        token_forwards: forwards of one token per row.
        group_forwards: forwards of whole groups.
        prefill_forwards: forwards of a chunk of a prompt.
        tokens: generated, groups written out.
        targets: finished groups.
    """

    submitted: int = 0
    steps: int = 0
    token_forwards: int = 0
    group_forwards: int = 0
    prefill_forwards: int = 0
    tokens: int = 0
    targets: int = 0


class StepLoop:
    """Runs requests until closed."""

    def __init__(
        self,
        runner: Runner,
        masks: MaskWorker,
        limits: SchedulerLimits,
        *,
        banned_V: torch.Tensor,
        pixels: Callable[..., torch.Tensor],
    ) -> None:
        """Starts the thread.

        Args:
            runner: executes forwards.
            masks: decodes masks.
            limits: bound each step.
            banned_V: bool [V], tokens that are never sampled.
            pixels: turns uint8 pictures into the network's input.
        """
        self.counters = LoopCounters()
        self._runner = runner
        self._masks = masks
        self._limits = limits
        self._banned = banned_V
        self._pixels = pixels
        self._waiting: dict[int, LiveRequest] = {}
        self._running: dict[int, LiveRequest] = {}
        self._cancelled: set[int] = set()
        self._is_closing = False
        self._wake = threading.Condition()  # its lock is re-entrant
        self._thread = threading.Thread(target=self._run, name="pixellm-steps", daemon=True)
        self._thread.start()

    @property
    def num_waiting(self) -> int:
        """Requests without a slot."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Requests in a slot."""
        return len(self._running)

    def submit(self, request: LiveRequest) -> None:
        """Takes a request in.

        Raises:
            OverloadedError: `max_waiting` requests wait already.
            ServingError: the engine is closed.
        """
        with self._wake:
            if self._is_closing:
                raise ServingError("the engine is closed; make a new one")
            num_known, limits = len(self._running) + len(self._waiting), self._limits
            if num_known >= limits.max_batch_size + limits.max_waiting:
                raise OverloadedError(
                    f"{num_known} requests run or wait already (max_batch_size {limits.max_batch_size}, max_waiting "
                    f"{limits.max_waiting}); try again"
                )
            self._waiting[request.request_id] = request
            self.counters.submitted += 1
            self._wake.notify()

    def cancel(self, request_id: int) -> None:
        """Marks a request; it leaves at the next step. Harmless where it is unknown or done."""
        with self._wake:
            if request_id in self._waiting or request_id in self._running:
                self._cancelled.add(request_id)
                self._wake.notify()

    def close(self) -> None:
        """Ends the loop after the step under way; requests fail. Safe from any thread."""
        with self._wake:
            self._is_closing = True
            self._wake.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    @torch.inference_mode()
    def _run(self) -> None:
        while True:
            with self._wake:
                if self._is_closing:
                    break
                state = self._state()
                plan = plan_step(state, self._limits, time.monotonic())
                if plan.is_idle:
                    deadline = next_deadline(state)
                    self._wake.wait(None if deadline is None else max(deadline - time.monotonic(), 0.001))
                    continue
                self._leave(plan.drop, plan.expire)
                admitted = [self._waiting.pop(i) for i in plan.admit]
                self._running |= {request.request_id: request for request in admitted}
            try:
                self._step(admitted, plan.prefill, [self._running[i] for i in plan.decode])
            except PixelLMError as error:
                self._fail_all(error)
            except Exception as error:  # thread boundary: the requests must hear of it
                _LOGGER.exception("a step of the engine failed")
                self._fail_all(ServingError(f"the engine failed ({type(error).__name__}: {error}); try again"))
        self._fail_all(ServingError("the engine was closed before the answer was ready"))

    def _state(self) -> SchedulerState:
        self._cancelled &= self._waiting.keys() | self._running.keys()
        return SchedulerState(
            waiting=tuple(
                WaitingRequest(r.request_id, r.watch.started_at, r.client, r.deadline) for r in self._waiting.values()
            ),
            running=tuple(
                RunningRequest(r.request_id, r.row.prompt_left, max(len(r.pending), 1), r.client, r.deadline)
                for r in self._running.values()
            ),
            cancelled=frozenset(self._cancelled),
        )

    def _step(
        self, admitted: Sequence[LiveRequest], prefill: Sequence[tuple[int, int]], decode: Sequence[LiveRequest]
    ) -> None:
        self.counters.steps += 1
        for request_id, count in prefill:
            request = self._running[request_id]
            self._runner.prefill(request.row, count)
            self.counters.prefill_forwards += 1
            if request.row.prompt_left == 0:
                request.watch.lap("prefill")
        self._decode_tokens([r for r in decode if len(r.pending) == 1 and not self._is_group(r)])
        self._decode_groups([r for r in decode if self._is_group(r)])
        self._choose([r for r in self._running.values() if r.row.last_hidden_D is not None])
        self._join(admitted)

    def _join(self, admitted: Sequence[LiveRequest]) -> None:
        if not admitted:
            return
        for request in admitted:
            request.watch.lap("queue")
        self._runner.look_at([r.row for r in admitted], [r.picture for r in admitted], self._pixels)
        for request in admitted:
            self._runner.admit(request.row)
            request.watch.lap("vision")

    def _decode_tokens(self, requests: Sequence[LiveRequest]) -> None:
        if not requests:
            return
        advancing = {r.request_id for r in requests}
        others = [r.row for r in self._running.values() if r.request_id not in advancing and r.row.row >= 0]
        self._runner.decode_tokens([r.row for r in requests], [r.pending[0] for r in requests], others)
        self.counters.token_forwards += 1

    def _decode_groups(self, requests: Sequence[LiveRequest]) -> None:
        if not requests:
            return
        states = self._runner.decode_group([r.row for r in requests], requests[0].answer.codebook)
        self.counters.group_forwards += 1
        self.counters.targets += len(requests)
        for request, hidden_JD in zip(requests, states, strict=True):
            index = request.answer.num_targets
            request.handle.add_text(request.answer.add_group())
            request.handle.reserve_target(index)
            self._masks.submit(_mask_job(request, hidden_JD, index))
            if request.answer.stop_reason is not None:
                self._finish(request)

    def _choose(self, requests: Sequence[LiveRequest]) -> None:
        """Samples the next token of each request and takes it as far as no forward is needed."""
        requests = [r for r in requests if r.request_id in self._running]
        if not requests:
            return
        logits_BV = self._runner.logits([r.row for r in requests])
        tokens = sample_tokens(logits_BV, self._banned, [r.sampler for r in requests])
        for request, token in zip(requests, tokens, strict=True):
            answer = request.answer
            request.pending = answer.choose(token)
            self.counters.tokens += len(request.pending)
            request.watch.mark("first_token")
            if request.pending and not self._is_group(request):
                request.handle.add_text(answer.add_word(token))
            if answer.stop_reason is not None:
                self._finish(request)

    @staticmethod
    def _is_group(request: LiveRequest) -> bool:
        return bool(request.pending) and request.pending[0] == request.answer.codebook[0]

    def _finish(self, request: LiveRequest) -> None:
        request.handle.add_text(request.answer.finish())
        request.watch.lap("decode")
        self._forget(request)
        request.handle.finish(lambda targets: _result(request, targets))

    def _leave(self, cancelled: Sequence[int], expired: Sequence[int]) -> None:
        for request_id in cancelled:
            self._drop(request_id, RequestCancelledError(f"request {request_id} was cancelled"))
        for request_id in expired:
            self._drop(
                request_id, RequestTimeoutError(f"request {request_id} was not answered within its timeout_s; raise it")
            )

    def _drop(self, request_id: int, error: PixelLMError) -> None:
        request = self._waiting.pop(request_id, None) or self._running[request_id]
        self._forget(request)
        request.handle.fail(error)

    def _forget(self, request: LiveRequest) -> None:
        self._runner.release(request.row)
        self._running.pop(request.request_id, None)
        self._cancelled.discard(request.request_id)
        if not self._waiting:
            self._runner.compact([r.row for r in self._running.values() if r.row.row >= 0])

    def _fail_all(self, error: PixelLMError) -> None:
        with self._wake:
            requests = [*self._running.values(), *(self._waiting.values() if self._is_closing else ())]
            for request in requests:
                self._waiting.pop(request.request_id, None)
                self._forget(request)
                request.handle.fail(error)


def _mask_job(request: LiveRequest, hidden_JD: torch.Tensor, index: int) -> MaskJob:
    handle, watch = request.handle, request.watch

    def done(outcome: TargetMask | PixelLMError, seconds: float) -> None:
        watch.seconds["masks"] = watch.seconds.get("masks", 0.0) + seconds
        watch.mark("first_mask")
        if isinstance(outcome, PixelLMError):
            handle.fail(outcome)
        else:
            handle.resolve_target(outcome)

    assert request.row.features is not None
    return MaskJob(
        hidden_JD=hidden_JD,
        features=request.row.features,
        picture=request.picture,
        options=request.answer.options,
        index=index,
        phrase=request.answer.phrase(),
        done=done,
    )


def _result(request: LiveRequest, targets: tuple[TargetMask, ...]) -> SegmentationResult:
    answer, watch = request.answer, request.watch
    watch.mark("total")
    usage = Usage(len(request.row.prompt_ids), len(answer.token_ids), request.row.num_picture)
    return SegmentationResult(
        text=answer.text,
        targets=targets,
        usage=usage,
        timings_s=dict(watch.seconds),
        dropped=answer.dropped,
        stop_reason=answer.stop_reason or "eos",
        token_ids=tuple(answer.token_ids),
    )
