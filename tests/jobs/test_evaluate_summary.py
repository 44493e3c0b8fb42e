"""Figures on run-length codes against brute force over pixels; invariants; intervals against their formula."""

import itertools
import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from pixellm.jobs.evaluate.metrics import SegmentationMeter, rle_overlaps, score_merged, score_question, score_rles
from pixellm.jobs.evaluate.samples import sample_row
from pixellm.jobs.evaluate.suites import Asked, find_suite
from pixellm.jobs.evaluate.summary import Summary, ratio_figures, summarize
from pixellm.jobs.evaluate.types import Answer
from pixellm.platform.data.shards import open_shards
from pixellm.platform.masks import rle_decode, rle_encode

Mask = npt.NDArray[np.bool_]


def some_masks(rng: np.random.Generator, count: int, size: tuple[int, int] = (9, 11)) -> list[Mask]:
    """Random masks, empty and full ones among them."""
    return [rng.random(size) < rng.choice([0.0, 0.1, 0.5, 0.9, 1.0]) for _ in range(count)]


def brute_iou(first: Mask, second: Mask) -> float:
    """Pixel by pixel."""
    pairs = list(zip(first.ravel().tolist(), second.ravel().tolist(), strict=True))
    union = sum(a or b for a, b in pairs)
    return sum(a and b for a, b in pairs) / union if union else 1.0


def some_sample(rng: np.random.Generator, number: int) -> dict[str, Any]:
    """A scored sample of random masks."""
    truths, masks = some_masks(rng, int(rng.integers(0, 5))), some_masks(rng, int(rng.integers(0, 5)))
    phrases = tuple(f"thing {k}" for k in range(len(truths)))
    kind = ("list", "reasoning: how", "none")[number % 3]
    rles = tuple(rle_encode(mask) for mask in truths)
    asked = Asked(f"x/{number}#0", number, f"x/{number // 2}", kind, "q", "a", phrases, rles, (), (9, 11))
    answer = Answer("a", ("",) * len(masks), tuple(masks), is_ordered=False)
    return sample_row(asked, answer, find_suite("muse"))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 6), st.integers(0, 6))
def test_run_length_codes_score_as_pixels_do(seed: int, asked: int, given: int) -> None:
    rng = np.random.default_rng(seed)
    truths, predictions = some_masks(rng, asked), some_masks(rng, given)
    codes = [[rle_encode(mask) for mask in masks] for masks in (truths, predictions)]
    both, either = rle_overlaps(*codes)
    for (t, truth), (p, prediction) in itertools.product(enumerate(truths), enumerate(predictions)):
        assert (both[t, p], either[t, p]) == ((truth & prediction).sum(), (truth | prediction).sum())
    by_code, by_pixel = score_rles(*codes), score_question(truths, predictions)
    assert sorted(by_code.ious) == pytest.approx(sorted(by_pixel.ious))
    merged = score_merged(*codes)
    empty = np.zeros((9, 11), dtype=bool)
    whole = [np.logical_or.reduce([empty, *masks]) for masks in (truths, predictions)]
    expected = brute_iou(*whole) if truths and predictions else float(not truths and not predictions)
    assert merged.giou == pytest.approx(expected)


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(5, 6), st.integers(5, 6))
def test_no_pairing_of_six_targets_is_better(seed: int, asked: int, given: int) -> None:
    rng = np.random.default_rng(seed)
    truths, predictions = ([rng.random((6, 7)) < rng.uniform(0.1, 0.8) for _ in range(n)] for n in (asked, given))
    table = np.array([[brute_iou(t, p) for p in predictions] for t in truths])
    table = table if asked <= given else table.T
    places = itertools.permutations(range(table.shape[1]), table.shape[0])
    best = max(sum(table[row, column] for row, column in enumerate(chosen)) for chosen in places)
    codes = [[rle_encode(mask) for mask in masks] for masks in (truths, predictions)]
    assert sum(score_rles(*codes).ious) == pytest.approx(best)


def test_genuine_masks_overlap_as_pycocotools_says(demo_shards: dict[str, str]) -> None:
    pairs = 0
    for row in itertools.islice(open_shards(demo_shards["segmentation"]).scan(), 12):
        codes = [target.mask for target in row.targets if not target.is_ignore][:5]
        shifted = [rle_encode(np.roll(rle_decode(code), 7, axis=1)) for code in codes]
        both, either = rle_overlaps(codes, shifted)
        for t, p in itertools.product(range(len(codes)), range(len(codes))):
            assert both[t, p] == coco_mask.area(coco_mask.merge([codes[t], shifted[p]], intersect=True))
            assert either[t, p] == coco_mask.area(coco_mask.merge([codes[t], shifted[p]]))
            pairs += 1
    assert pairs > 30


def test_order_of_predictions_of_samples_and_shards_change_nothing() -> None:
    rng = np.random.default_rng(0)
    samples = [some_sample(rng, number) for number in range(30)]
    whole = summarize(samples).figures()
    turned = summarize([samples[place] for place in rng.permutation(30)]).figures()
    assert {name: figure.value for name, figure in turned.items()} == pytest.approx(
        {name: figure.value for name, figure in whole.items()}
    )
    sharded = Summary()
    for part in (samples[:11], samples[11:12], samples[12:]):
        for sample in part:
            sharded.add(sample)
    assert sharded.figures() == whole
    truths = [rle_encode(mask) for mask in some_masks(rng, 4)]
    predictions = [rle_encode(mask) for mask in some_masks(rng, 5)]
    forwards, backwards = score_rles(truths, predictions), score_rles(truths[::-1], predictions[::-1])
    assert sorted(forwards.ious) == pytest.approx(sorted(backwards.ious))


def test_the_figures_are_those_of_the_meter_and_of_their_definition() -> None:
    rng = np.random.default_rng(1)
    samples = [some_sample(rng, number) for number in range(40)]
    meter = SegmentationMeter()
    hits = asked = returned = 0
    quality = 0.0
    for sample in samples:
        truths, masks = ([rle_decode(rle) for rle in sample[name]] for name in ("true_masks", "masks"))
        meter.add(score_question(truths, masks))
        found = [iou for iou in sample["ious"] if iou > 0.5 and sample["ious"]]
        hits, quality = hits + len(found), quality + sum(found)
        asked, returned = asked + len(truths), returned + len(masks)
    figures = summarize(samples).figures()
    for name in ("giou", "ciou", "count_accuracy"):
        assert figures[name].value == pytest.approx(meter.result()[name])
    assert figures["recall"].value == pytest.approx(hits / asked)
    assert figures["precision"].value == pytest.approx(hits / returned)
    assert figures["pq"].value == pytest.approx(quality / (hits + 0.5 * (asked - hits) + 0.5 * (returned - hits)))
    assert figures["mean_targets_returned"].value == pytest.approx(returned / 40)
    breakdowns = summarize(samples).breakdowns()
    assert sum(group["questions"] for group in breakdowns["targets"].values()) == 40
    assert sum(group["targets"] for group in breakdowns["area"].values()) == asked


def test_intervals_are_seeded_and_as_wide_as_the_standard_error_says() -> None:
    rng = np.random.default_rng(2)
    values = rng.normal(0.5, 0.1, 400)
    sums, own = np.stack([values, np.ones(400)], axis=1), np.arange(400)
    (figure,) = ratio_figures(sums, own, [(0, 1)], seed=3)
    assert ratio_figures(sums, own, [(0, 1)], seed=3) == [figure]
    assert ratio_figures(sums, own, [(0, 1)], seed=4) != [figure]
    error = 1.96 * values.std() / math.sqrt(400)
    assert figure.high - figure.low == pytest.approx(2 * error, rel=0.1)
    assert figure.low < figure.value < figure.high
    # the same 400 questions about 100 pictures, four equal ones each: twice as wide
    repeated = np.repeat(sums[:100], 4, axis=0)
    (clustered,) = ratio_figures(repeated, np.repeat(np.arange(100), 4), [(0, 1)], seed=3)
    (alone,) = ratio_figures(repeated, own, [(0, 1)], seed=3)
    assert (clustered.high - clustered.low) / (alone.high - alone.low) == pytest.approx(2, rel=0.15)
