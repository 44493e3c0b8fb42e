"""What a caller of the engine can rely on: events in order, honest ends, cancellation, limits, seeds, integrity."""

import asyncio
import gc
import io
import threading
import time
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from pixellm.errors import (
    BadRequestError,
    DataError,
    OverloadedError,
    RequestCancelledError,
    RequestTimeoutError,
    ServingError,
)
from pixellm.model.engine import (
    Done,
    EngineOptions,
    GenerationOptions,
    PixelLMEngine,
    SchedulerLimits,
    SegmentRequest,
    TargetDone,
    TextDelta,
)
from tests.waiting import wait_until

QUESTION = "Segment the cat."


def start(
    engine: PixelLMEngine, picture: Any, *, listener: Any = None, timeout_s: float | None = None, **options: Any
) -> Any:
    generation = GenerationOptions(**({"max_new_tokens": 60, "temperature": 0.25, "seed": 5} | options))
    return engine.submit(SegmentRequest(picture, QUESTION, generation, timeout_s=timeout_s), listener)


@pytest.fixture(scope="module")
def rich_seed(micro: Any, pictures: Any) -> int:
    """A seed whose answer about the first picture has two targets or more, and words behind the last."""
    with PixelLMEngine(*micro) as engine:
        for seed in range(200):
            result = start(engine, pictures[0], seed=seed).result()
            if len(result.targets) > 1 and len(result.text.rsplit("]", 1)[-1]) > 8:
                return seed
    raise AssertionError("no seed of 200 gives a rich answer")


def test_events_come_in_order_and_add_up_to_the_result(
    micro_engine: PixelLMEngine, pictures: Any, rich_seed: int
) -> None:
    events = list(micro_engine.stream(pictures[0], QUESTION, max_new_tokens=60, temperature=0.25, seed=rich_seed))
    assert isinstance(events[-1], Done)
    result = events[-1].result
    streamed = ""
    targets = []
    for event in events[:-1]:
        if isinstance(event, TextDelta):
            assert event.text
            streamed += event.text
        else:
            assert isinstance(event, TargetDone)
            assert streamed.endswith(f"[{event.target.index + 1}]")
            targets.append(event.target)
    assert streamed == result.text
    assert [t.index for t in targets] == list(range(len(targets)))
    assert len(targets) == len(result.targets) > 1
    assert result.usage.completion_tokens == len(result.token_ids)
    assert result.usage.image_tokens == 9
    assert {"queue", "vision", "prefill", "decode", "masks", "first_token", "total"} <= result.timings_s.keys()
    assert all(seconds >= 0 for seconds in result.timings_s.values())


def test_a_target_describes_its_mask(micro_engine: PixelLMEngine, pictures: Any) -> None:
    result = micro_engine.segment(pictures[1], QUESTION, max_new_tokens=60, temperature=0.25, seed=5)
    height, width = pictures[1].height, pictures[1].width
    for target in result.targets:
        assert target.mask.shape == (height, width)
        assert target.mask.dtype == np.bool_
        assert target.area_px == target.mask.sum()
        decoded = coco_mask.decode({"size": target.rle["size"], "counts": target.rle["counts"].encode()})
        np.testing.assert_array_equal(decoded.astype(bool), target.mask)
        if target.area_px:
            x, y, w, h = coco_mask.toBbox({"size": target.rle["size"], "counts": target.rle["counts"].encode()})
            assert target.box_xyxy == (x, y, x + w, y + h)
        else:
            assert target.box_xyxy is None
            assert target.score == 0


def test_a_group_that_does_not_fit_is_dropped_whole_and_said(
    micro_engine: PixelLMEngine, pictures: Any, rich_seed: int
) -> None:
    whole = start(micro_engine, pictures[0], seed=rich_seed).result()
    first = whole.token_ids.index(micro_engine.processor.token_ids.codebook[0])
    second = first + 6 + whole.token_ids[first + 6 :].index(micro_engine.processor.token_ids.codebook[0])
    cut = start(micro_engine, pictures[0], max_new_tokens=second + 5, seed=rich_seed).result()
    assert cut.stop_reason == "max_new_tokens"
    assert cut.dropped == "target 2: its group takes 6 tokens and 5 were left (max_new_tokens)"
    assert len(cut.targets) == 1
    np.testing.assert_array_equal(cut.targets[0].mask, whole.targets[0].mask)
    assert cut.token_ids == whole.token_ids[:second]
    just = start(micro_engine, pictures[0], max_new_tokens=second + 6, seed=rich_seed).result()
    assert (len(just.targets), just.dropped) == (2, None)


def test_an_answer_ends_where_a_target_too_many_would_begin(
    micro_engine: PixelLMEngine, pictures: Any, rich_seed: int
) -> None:
    whole = start(micro_engine, pictures[0], seed=rich_seed).result()
    assert len(whole.targets) > 1
    one = start(micro_engine, pictures[0], seed=rich_seed, max_targets=1).result()
    assert (one.stop_reason, len(one.targets)) == ("max_targets", 1)
    assert one.dropped == "target 2 and what follows it (max_targets)"
    assert one.token_ids == whole.token_ids[: len(one.token_ids)]
    all_of_them = start(micro_engine, pictures[0], seed=rich_seed, max_targets=len(whole.targets)).result()
    assert all_of_them.token_ids == whole.token_ids
    with pytest.raises(BadRequestError, match="max_targets is 0, wanted at least 1"):
        GenerationOptions(max_targets=0)


def test_the_context_limit_ends_an_answer_and_refuses_a_prompt(micro: Any, pictures: Any) -> None:
    prompt = len(micro[1].encode_prompt(QUESTION))
    with PixelLMEngine(*micro, options=EngineOptions(max_context_tokens=prompt + 3)) as engine:
        result = start(engine, pictures[0], seed=1).result()
        assert result.stop_reason == "context_full"
        assert len(result.token_ids) <= 3
    with (
        PixelLMEngine(*micro, options=EngineOptions(max_context_tokens=prompt)) as engine,
        pytest.raises(DataError, match=rf"takes {prompt} positions, the model has {prompt}"),
    ):
        start(engine, pictures[0])


def test_the_same_seed_gives_the_same_answer_and_another_seed_another(
    micro_engine: PixelLMEngine, pictures: Any
) -> None:
    first, second = (start(micro_engine, pictures[0], seed=1).result() for _ in range(2))
    assert first.token_ids == second.token_ids
    assert len({start(micro_engine, pictures[0], seed=seed).result().token_ids for seed in range(6)}) > 2
    handles = [start(micro_engine, pictures[i % 3], seed=i) for i in range(6)]
    assert handles[1].result().token_ids == start(micro_engine, pictures[1], seed=1).result().token_ids


def test_a_stop_string_ends_the_answer_in_front_of_it_and_is_never_streamed(
    micro_engine: PixelLMEngine, pictures: Any, rich_seed: int
) -> None:
    whole = start(micro_engine, pictures[0], seed=rich_seed).result().text
    last = whole.rindex("]") + 1
    stop = whole[last + 3 : last + 6]
    events = list(start(micro_engine, pictures[0], stop=(stop, "never said"), seed=rich_seed).events())
    result = events[-1].result
    assert result.stop_reason == "stop_string"
    assert stop not in "".join(e.text for e in events if isinstance(e, TextDelta)).rsplit("]", 1)[-1]
    assert whole.startswith(result.text)
    assert "".join(e.text for e in events if isinstance(e, TextDelta)) == result.text


def test_a_cancelled_request_frees_its_slot_and_the_next_one_runs(micro: Any, pictures: Any) -> None:
    with PixelLMEngine(*micro, max_batch_size=1) as engine:
        endless = start(engine, pictures[0], max_new_tokens=1500, seed=0)
        following = start(engine, pictures[1], max_new_tokens=5)
        while engine.stats().running == 0:
            time.sleep(0.001)
        endless.cancel()
        with pytest.raises(RequestCancelledError):
            endless.result(30)
        assert following.result(30).stop_reason
        endless.cancel()
        engine.cancel(12345)


def test_leaving_a_stream_early_gives_the_request_up(micro_engine: PixelLMEngine, pictures: Any) -> None:
    stream = micro_engine.stream(pictures[0], QUESTION, max_new_tokens=1500, temperature=0.25, seed=0)
    next(stream)
    stream.close()
    wait_until(lambda: not micro_engine.stats().running)


def test_a_deadline_ends_running_and_waiting_requests(micro: Any, pictures: Any) -> None:
    with PixelLMEngine(*micro, max_batch_size=1) as engine:
        engine.model.lean[2] -= 100
        try:
            running = start(engine, pictures[0], max_new_tokens=1500, timeout_s=0.4)
            waiting = start(engine, pictures[0], max_new_tokens=1500, timeout_s=0.1)
            for handle in (waiting, running):
                with pytest.raises(RequestTimeoutError, match="timeout_s"):
                    handle.result(30)
        finally:
            engine.model.lean[2] += 100


def test_a_full_queue_is_refused_at_once(micro: Any, pictures: Any) -> None:
    limits = SchedulerLimits(max_batch_size=1, max_waiting=1)
    with PixelLMEngine(*micro, options=EngineOptions(limits=limits)) as engine:
        running = start(engine, pictures[0], max_new_tokens=1500, seed=0)
        while engine.stats().running == 0:
            time.sleep(0.001)
        waiting = start(engine, pictures[0])
        with pytest.raises(OverloadedError, match="max_waiting 1"):
            start(engine, pictures[0])
        running.cancel()
        assert waiting.result(30).stop_reason


def test_many_threads_get_their_own_answers(micro: Any, pictures: Any) -> None:
    with PixelLMEngine(*micro, max_batch_size=3) as engine:
        expected = [start(engine, pictures[i % 5], seed=i, max_new_tokens=15).result().token_ids for i in range(12)]
        got: dict[int, Any] = {}

        def ask(i: int) -> None:
            got[i] = start(engine, pictures[i % 5], seed=i, max_new_tokens=15).result(60).token_ids

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [got[i] for i in range(12)] == expected


def test_asyncio_callers_stream_and_a_cancelled_task_gives_its_request_up(micro: Any, pictures: Any) -> None:
    def request(**options: Any) -> SegmentRequest:
        return SegmentRequest(pictures[0], QUESTION, GenerationOptions(temperature=0.25, seed=5, **options))

    async def scenario(engine: PixelLMEngine) -> None:
        results = await asyncio.gather(*(engine.asegment(request(max_new_tokens=20)) for _ in range(3)))
        assert len({r.token_ids for r in results}) == 1
        events = [event async for event in engine.astream(request(max_new_tokens=20))]
        assert events[-1].result.token_ids == results[0].token_ids
        task = asyncio.create_task(engine.asegment(request(max_new_tokens=1500)))
        while engine.stats().running == 0:
            await asyncio.sleep(0.002)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        while engine.stats().running:
            await asyncio.sleep(0.002)
        early = asyncio.create_task(engine.asegment(request(max_new_tokens=1500)))
        await asyncio.sleep(0)
        early.cancel()
        with pytest.raises(asyncio.CancelledError):
            await early
        while engine.stats().running or engine.stats().waiting or engine._loop.counters.submitted < 6:
            await asyncio.sleep(0.002)
        with pytest.raises(DataError):
            await engine.asegment(SegmentRequest(b"no picture", QUESTION))

    with PixelLMEngine(*micro) as engine:
        asyncio.run(asyncio.wait_for(scenario(engine), 180))


def test_a_batch_larger_than_queue_and_slots_is_answered_in_order(micro: Any, pictures: Any) -> None:
    limits = SchedulerLimits(max_batch_size=2, max_waiting=1)
    requests = [
        SegmentRequest(pictures[i % 5], QUESTION, GenerationOptions(max_new_tokens=8, temperature=0.25, seed=i))
        for i in range(9)
    ]
    with PixelLMEngine(*micro, options=EngineOptions(limits=limits)) as engine:
        together = engine.segment_batch(requests)
        alone = [engine.submit(request).result() for request in requests]
    assert [r.token_ids for r in together] == [r.token_ids for r in alone]


def test_history_makes_an_earlier_answer_part_of_the_prompt(micro_engine: PixelLMEngine, pictures: Any) -> None:
    plain = micro_engine.segment(pictures[0], "And the dog?", max_new_tokens=4)
    after = micro_engine.segment(pictures[0], "And the dog?", max_new_tokens=4, history=[(QUESTION, "It is [1].")])
    extra = micro_engine.processor.encode_dialogue([(QUESTION, "It is {seg}.", 1)])[0]
    question = micro_engine.processor._words.encode("USER: And the dog? ASSISTANT:")
    assert after.usage.prompt_tokens == len(extra) + len(question)
    assert plain.usage.prompt_tokens < after.usage.prompt_tokens


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"threshold": 1.0}, "threshold is 1.0"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"stop": ("",)}, "stop string is empty"),
    ],
)
def test_options_out_of_range_are_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadRequestError, match=message):
        GenerationOptions(**options)


def test_bad_pictures_and_prompts_fail_their_caller_only(micro_engine: PixelLMEngine, pictures: Any) -> None:
    running = start(micro_engine, pictures[0])
    for image, prompt in ((b"junk", QUESTION), (pictures[0], "  "), (pictures[0], "cat " * 600)):
        with pytest.raises(DataError):
            micro_engine.segment(image, prompt)
    assert running.result(30).stop_reason


def test_a_failure_inside_the_network_reaches_its_callers_and_the_engine_goes_on(micro: Any, pictures: Any) -> None:
    model, processor = micro
    with PixelLMEngine(model, processor) as engine:
        real = engine._loop._runner._model
        engine._loop._runner._model = Broken(real)
        with pytest.raises(ServingError, match="RuntimeError: out of memory"):
            start(engine, pictures[4]).result(30)
        engine._loop._runner._model = real
        assert start(engine, pictures[4]).result(30).stop_reason


class Broken:
    """A network whose language model fails."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def language_forward(self, *_: Any, **__: Any) -> Any:
        raise RuntimeError("out of memory")


def test_a_closed_engine_refuses_and_fails_what_was_under_way(micro: Any, pictures: Any) -> None:
    engine = PixelLMEngine(*micro, max_batch_size=1)
    under_way = [start(engine, pictures[0], max_new_tokens=1500, seed=0) for _ in range(2)]
    engine.close()
    for handle in under_way:
        with pytest.raises(ServingError, match="closed"):
            handle.result(10)
    with pytest.raises(ServingError, match="closed"):
        start(engine, pictures[0])


def test_an_engine_that_is_forgotten_ends_its_threads(micro: Any, pictures: Any) -> None:
    def names() -> list[str]:
        return [thread.name for thread in threading.enumerate() if thread.name.startswith("pixellm-")]

    before = len(names())
    engine = PixelLMEngine(*micro)
    assert start(engine, pictures[0], max_new_tokens=5).result().stop_reason
    assert len(names()) == before + 2
    del engine
    # A step that is running holds it a moment longer.
    wait_until(lambda: gc.collect() >= 0 and len(names()) == before, "the end of the engine's threads")


def test_the_words_of_control_tokens_in_a_prompt_give_no_targets_by_themselves(micro: Any, pictures: Any) -> None:
    model, processor = micro
    with PixelLMEngine(model, processor) as engine:
        text = "".join(f"[SEG{i}]" for i in range(6)) + "</s><image> USER:"
        handle = engine.submit(SegmentRequest(pictures[0], text, GenerationOptions(max_new_tokens=3)))
        prompt = handle.result(30)
    assert len(prompt.targets) == prompt.token_ids.count(processor.token_ids.codebook[0])


def test_encoded_bytes_and_a_pil_picture_give_the_same_answer(micro_engine: PixelLMEngine, pictures: Any) -> None:
    buffer = io.BytesIO()
    pictures[0].save(buffer, "PNG")
    results = [micro_engine.segment(image, QUESTION, max_new_tokens=10) for image in (pictures[0], buffer.getvalue())]
    assert results[0].token_ids == results[1].token_ids
    assert isinstance(Image.open(buffer), Image.Image)
