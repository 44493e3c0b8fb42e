"""Metrics on sets of masks against brute force and hand-computed cases."""

import itertools
import math

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pixellm.jobs.evaluate.metrics import SegmentationMeter, overlaps, score_question

Mask = npt.NDArray[np.bool_]


def _box(x0: int, y0: int, x1: int, y1: int, size: tuple[int, int] = (8, 10)) -> Mask:
    mask = np.zeros(size, dtype=bool)
    mask[y0:y1, x0:x1] = True
    return mask


def _masks(rng: np.random.Generator, count: int) -> list[Mask]:
    return [rng.random((6, 7)) < rng.uniform(0.0, 0.8) for _ in range(count)]


def _iou(first: Mask, second: Mask) -> float:
    union = int((first | second).sum())
    return int((first & second).sum()) / union if union else 1.0


def _best_total(truths: list[Mask], predictions: list[Mask]) -> float:
    """The largest sum of IoUs over all ways to pair the shorter side with the longer."""
    short, long = sorted([truths, predictions], key=len)
    return max(
        (
            sum(_iou(short[k], long[chosen[k]]) for k in range(len(short)))
            for chosen in itertools.permutations(range(len(long)), len(short))
        ),
        default=0.0,
    )


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 4), st.integers(0, 4))
def test_the_matching_is_the_best_of_all_pairings_and_the_rest_counts_as_zero(
    seed: int, asked: int, given: int
) -> None:
    rng = np.random.default_rng(seed)
    truths, predictions = _masks(rng, asked), _masks(rng, given)
    score = score_question(truths, predictions)
    places = max(asked, given)
    assert len(score.ious) == max(places, 1)
    assert sum(score.ious) == pytest.approx(_best_total(truths, predictions) if places else 1.0)
    assert (score.num_asked, score.num_returned) == (asked, given)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.integers(1, 4))
def test_overlaps_are_the_pixel_counts(seed: int, asked: int, given: int) -> None:
    rng = np.random.default_rng(seed)
    truths, predictions = _masks(rng, asked), _masks(rng, given)
    both, either = overlaps(truths, predictions)
    for t, truth in enumerate(truths):
        for p, prediction in enumerate(predictions):
            assert both[t, p] == (truth & prediction).sum()
            assert either[t, p] == (truth | prediction).sum()


def test_giou_is_a_mean_over_targets_and_ciou_a_ratio_of_sums() -> None:
    meter = SegmentationMeter()
    # one target of 4 pixels found exactly, one of 16 pixels found by half (8 of 16, nothing beyond)
    meter.add(score_question([_box(0, 0, 2, 2)], [_box(0, 0, 2, 2)]))
    meter.add(score_question([_box(0, 0, 4, 4)], [_box(0, 0, 4, 2)]))
    result = meter.result()
    assert result["giou"] == pytest.approx((1 + 0.5) / 2)
    assert result["ciou"] == pytest.approx((4 + 8) / (4 + 16))
    assert result["count_accuracy"] == 1


def test_a_missed_target_and_an_invented_one_each_count_as_a_place_with_zero() -> None:
    meter = SegmentationMeter()
    meter.add(score_question([_box(0, 0, 2, 2), _box(4, 4, 8, 8)], [_box(0, 0, 2, 2)]))
    meter.add(score_question([_box(0, 0, 2, 2)], [_box(0, 0, 2, 2), _box(5, 5, 7, 7)]))
    result = meter.result()
    assert result["giou"] == pytest.approx((1 + 0 + 1 + 0) / 4)
    assert result["ciou"] == pytest.approx((4 + 4) / (4 + 16 + 4 + 4))
    assert result["count_accuracy"] == 0
    assert (result["targets_asked"], result["targets_returned"]) == (3, 3)


def test_nothing_asked_and_nothing_returned_is_right() -> None:
    assert score_question([], []).giou == 1
    assert score_question([], [_box(0, 0, 1, 1)]).giou == 0


def test_two_empty_masks_agree_and_an_empty_prediction_of_a_target_is_zero() -> None:
    empty = _box(0, 0, 0, 0)
    assert score_question([empty], [empty]).giou == 1
    assert score_question([_box(0, 0, 2, 2)], [empty]).giou == 0


def test_in_order_nothing_is_matched() -> None:
    left, right = _box(0, 0, 3, 3), _box(5, 5, 8, 8)
    assert score_question([left, right], [right, left]).giou == 1
    assert score_question([left, right], [right, left], is_ordered=True).giou == 0


def test_a_crowd_counts_neither_for_nor_against() -> None:
    target, crowd = _box(0, 0, 2, 2), _box(5, 0, 10, 8)
    spilled = target | _box(5, 0, 6, 1)
    inside = _box(6, 2, 9, 6)
    score = score_question([target], [spilled, inside], ignore=crowd)
    assert score.ious == (1.0,)
    assert score.num_returned == 1
    mostly_outside = _box(2, 4, 6, 8)
    assert score_question([target], [target, mostly_outside], ignore=crowd).ious == (1.0, 0.0)


def test_a_meter_without_questions_knows_nothing() -> None:
    result = SegmentationMeter().result()
    assert math.isnan(result["giou"])
    assert math.isnan(result["ciou"])
    assert result["num_questions"] == 0
