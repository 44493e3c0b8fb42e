"""What runs beside a request, and every cache, changes nothing: ids equal, masks equal, logits within 1e-4.

The reference (`engine_reference.py`) runs the whole prompt and answer again for every token, without any cache, one
request at a time.
"""

import random
import time
from typing import Any

import numpy as np
import pytest
import torch
from engine_reference import answer_alone
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pixellm.errors import RequestCancelledError
from pixellm.model.config import IMAGE_TOKEN_ID
from pixellm.model.engine import EngineOptions, GenerationOptions, PixelLMEngine, SchedulerLimits, SegmentRequest

QUESTIONS = [
    "Segment the cat.",
    "Where is the dog in this picture, and what does it do there?",
    "What can be used to cut the cake? Please respond with segmentation masks.",
    "Segment the cat and the laptop, then tell me which of them is nearer to the window on the left.",
]


@pytest.fixture(scope="module")
def alone(micro: Any, pictures: Any) -> dict[tuple[int, int], Any]:
    """The slow answers to every question about every picture, with 40 tokens each."""
    model, processor = micro
    return {
        (p, q): answer_alone(model, processor, picture, question, 40)
        for p, picture in enumerate(pictures)
        for q, question in enumerate(QUESTIONS)
    }


def check_equal(result: Any, expected: tuple[list[int], torch.Tensor], max_new_tokens: int = 40) -> None:
    ids, mask_logits = expected
    if max_new_tokens < 40 and len(ids) > max_new_tokens:
        ids = ids[: len(result.token_ids)]
        assert max_new_tokens - 6 < len(ids) <= max_new_tokens
    assert list(result.token_ids) == ids
    for target in result.targets:
        np.testing.assert_allclose(target.mask_logits, mask_logits[target.index], atol=1e-4, rtol=1e-4)
        decided = mask_logits[target.index].abs().numpy() > 1e-4  # a logit of 1e-7 may fall on either side of zero
        np.testing.assert_array_equal(target.mask[decided], (mask_logits[target.index] > 0).numpy()[decided])


def test_the_reference_answers_hold_many_groups_words_and_lengths(alone: Any) -> None:
    lengths = {len(ids) for ids, _ in alone.values()}
    assert len(lengths) > 3
    assert sum(len(masks) for _, masks in alone.values()) >= 15


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32 - 1))
def test_random_batches_with_joins_leaves_and_cancels_answer_as_if_alone(
    micro: Any, pictures: Any, alone: Any, seed: int
) -> None:
    rng = random.Random(seed)
    limits = SchedulerLimits(
        max_batch_size=rng.randint(1, 5),
        max_step_tokens=rng.choice([8, 40, 1000]),
        min_prefill_tokens=rng.choice([1, 7, 64]),
        max_admissions=rng.randint(1, 4),
    )
    options = EngineOptions(
        limits=limits,
        picture_cache_bytes=rng.choice([0, 50_000, 2**26]),
        reuse_prompt_prefix=rng.random() < 0.7,
        max_batch_targets=rng.randint(1, 8),
    )
    with PixelLMEngine(*micro, options=options) as engine:
        handles = []
        for _ in range(rng.randint(3, 12)):
            place = rng.randrange(len(pictures)), rng.randrange(len(QUESTIONS))
            count = rng.choice([5, 13, 40])
            generation = GenerationOptions(max_new_tokens=count, keep_logits=True)
            handle = engine.submit(SegmentRequest(pictures[place[0]], QUESTIONS[place[1]], generation))
            handles.append((handle, place, count, rng.random() < 0.25))
            time.sleep(rng.choice([0, 0, 0.003, 0.01]))
            for other, _, _, is_unwanted in handles:
                if is_unwanted and rng.random() < 0.5:
                    other.cancel()
        for handle, place, count, is_unwanted in handles:
            try:
                check_equal(handle.result(60), alone[place], count)
            except RequestCancelledError:
                assert is_unwanted
        assert engine.stats().running == engine.stats().waiting == 0


@pytest.mark.parametrize(("tokens_per_scale", "num_scales"), [(1, 1), (1, 2), (4, 3)])
def test_groups_of_every_size_answer_as_if_alone(
    micro_factory: Any, pictures: Any, tokens_per_scale: int, num_scales: int
) -> None:
    model, processor = micro_factory(tokens_per_scale=tokens_per_scale, num_scales=num_scales)
    requests = [
        SegmentRequest(picture, QUESTIONS[0], GenerationOptions(max_new_tokens=40, keep_logits=True))
        for picture in pictures[:3]
    ]
    with PixelLMEngine(model, processor) as engine:
        results = engine.segment_batch(requests)
    assert sum(len(result.targets) for result in results) > 0
    for result, request in zip(results, requests, strict=True):
        check_equal(result, answer_alone(model, processor, request.image, request.prompt, 40))


def test_a_second_question_about_a_picture_reuses_its_vision_pass_and_prompt_prefix(
    micro: Any, pictures: Any, alone: Any
) -> None:
    model, processor = micro
    with PixelLMEngine(model, processor) as engine:
        first = engine.segment(pictures[1], QUESTIONS[0], max_new_tokens=40)
        forwarded: list[int] = []
        original = model.language_forward

        def counting(embeds: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            forwarded.append(embeds.shape[1])
            return original(embeds, *args, **kwargs)

        engine._loop._runner._model = _Counting(model, counting)
        again = engine.submit(
            SegmentRequest(pictures[1], QUESTIONS[2], GenerationOptions(40, keep_logits=True))
        ).result()
        stats = engine.stats()
    assert first.usage.image_tokens == 9
    assert (stats.picture_hits, stats.picture_misses) == (1, 1)
    prompt = processor.encode_prompt(QUESTIONS[2])
    shared = len(prompt) - prompt[::-1].index(IMAGE_TOKEN_ID)
    assert forwarded[0] == len(prompt) - shared
    check_equal(again, alone[1, 2])


class _Counting:
    """The model, with its language forward replaced."""

    def __init__(self, model: Any, language_forward: Any) -> None:
        self._model, self.language_forward = model, language_forward

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)
