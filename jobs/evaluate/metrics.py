"""Metrics on sets of masks: bipartite matching on IoU, gIoU and cIoU (paper Sec. 4.3 and 5.1).

A question has any number of true targets and any number of predicted ones. They are matched so that the sum of IoUs is
largest; what is left over on either side counts as IoU 0. gIoU is the mean over all these places, cIoU the sum of all
intersections over the sum of all unions. A question without targets that gets no mask counts as one place with IoU 1.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from pycocotools import mask as coco_mask
from scipy.optimize import linear_sum_assignment

from pixellm.platform.masks import Rle

Masks = Sequence[npt.NDArray[np.bool_]]


@dataclass(frozen=True)
class MaskPair:
    """One place of a question. `truth` or `prediction` is None where the other side is left over.

    Attributes:
        truth: index of the true target.
        prediction: index of the predicted one.
        intersection: pixels of both.
        union: pixels of either.
    """

    truth: int | None
    prediction: int | None
    intersection: int
    union: int

    @property
    def iou(self) -> float:
        """Intersection over union; 1 where a matched pair is empty on both sides."""
        if self.union:
            return self.intersection / self.union
        return 1.0 if self.truth is not None and self.prediction is not None else 0.0


@dataclass(frozen=True)
class QuestionScore:
    """The places of one question, and how many targets were asked for and returned."""

    pairs: tuple[MaskPair, ...]
    num_asked: int
    num_returned: int

    @property
    def giou(self) -> float:
        """Mean IoU over the places; 1 for a question without targets that got none."""
        return sum(self.ious) / len(self.ious)

    @property
    def ious(self) -> tuple[float, ...]:
        """IoU of each place, true targets first."""
        return tuple(pair.iou for pair in self.pairs) or (1.0,)


def overlaps(truths: Masks, predictions: Masks) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Intersections and unions in pixels of every true with every predicted mask, both `[T, P]`."""
    if not len(truths) or not len(predictions):
        empty = np.zeros((len(truths), len(predictions)), dtype=np.int64)
        return empty, empty
    # float32 counts whole numbers exactly up to 2**24 pixels; beyond, float64.
    dtype: type[Any] = np.float32 if truths[0].size < 2**24 else np.float64
    truth_TN: npt.NDArray[Any] = np.stack([mask.ravel() for mask in truths]).astype(dtype)
    prediction_PN: npt.NDArray[Any] = np.stack([mask.ravel() for mask in predictions]).astype(dtype)
    both = (truth_TN @ prediction_PN.T).astype(np.int64)
    return both, _unions(both, _areas(truths), _areas(predictions))


def rle_overlaps(
    truths: Sequence[Rle], predictions: Sequence[Rle]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """As `overlaps`, of run-length codes: the cost follows the runs, not the pixels.

    pycocotools gives I / U as a double; with both areas known, the whole number I = IoU·(A + B) / (1 + IoU) comes back
    exactly by rounding (areas are far below 2**50).
    """
    if not len(truths) or not len(predictions):
        empty = np.zeros((len(truths), len(predictions)), dtype=np.int64)
        return empty, empty
    iou_TP = np.asarray(coco_mask.iou(list(truths), list(predictions), [0] * len(predictions)), dtype=np.float64)
    areas_T, areas_P = _rle_areas(truths), _rle_areas(predictions)
    both = np.rint(iou_TP * (areas_T[:, None] + areas_P[None, :]) / (1.0 + iou_TP)).astype(np.int64)
    return both, _unions(both, areas_T, areas_P)


def score_question(
    truths: Masks, predictions: Masks, *, ignore: npt.NDArray[np.bool_] | None = None, is_ordered: bool = False
) -> QuestionScore:
    """Scores the answer to one question.

    Args:
        truths: bool H×W, the targets that were asked for.
        predictions: bool H×W of the same size, in any order.
        ignore: bool H×W; pixels that count neither for nor against. A prediction that lies there by more than half is
            left out.
        is_ordered: prediction k is meant for target k (teacher-forced); nothing is matched.
    """
    if ignore is not None:
        truths, predictions = without_ignored(truths, predictions, ignore)
    both, either = overlaps(truths, predictions)
    return _score(both, either, _areas(truths), _areas(predictions), is_ordered=is_ordered)


def score_rles(truths: Sequence[Rle], predictions: Sequence[Rle], *, is_ordered: bool = False) -> QuestionScore:
    """As `score_question`, of run-length codes of the same size."""
    both, either = rle_overlaps(truths, predictions)
    return _score(both, either, _rle_areas(truths), _rle_areas(predictions), is_ordered=is_ordered)


def score_merged(truths: Sequence[Rle], predictions: Sequence[Rle]) -> QuestionScore:
    """One place for all targets together: the union of the truths against the union of the predictions.

    This is how single referring and reasoning benchmarks count (paper Sec. 5.2: "we follow previous methods"), and how
    the paper treats models with one mask per answer on MUSE (Sec. 5.3).
    """
    if not truths and not predictions:
        return QuestionScore((), 0, 0)
    merged = [_merge(masks) for masks in (truths, predictions)]
    whole = score_rles(*merged)
    return QuestionScore(whole.pairs, len(truths), len(predictions))


def _merge(masks: Sequence[Rle]) -> list[Rle]:
    return [coco_mask.merge(list(masks))] if masks else []


def _score(
    both: npt.NDArray[np.int64],
    either: npt.NDArray[np.int64],
    areas_T: npt.NDArray[np.int64],
    areas_P: npt.NDArray[np.int64],
    *,
    is_ordered: bool,
) -> QuestionScore:
    num_truths, num_predictions = len(areas_T), len(areas_P)
    if is_ordered:
        rows = columns = np.arange(min(num_truths, num_predictions))
    else:
        ious = np.where(either > 0, both / np.maximum(either, 1), 1.0)
        rows, columns = linear_sum_assignment(-ious)
    matched = {int(row): int(column) for row, column in zip(rows, columns, strict=True)}
    pairs = [
        MaskPair(truth, matched[truth], int(both[truth, matched[truth]]), int(either[truth, matched[truth]]))
        if truth in matched
        else MaskPair(truth, None, 0, int(areas_T[truth]))
        for truth in range(num_truths)
    ]
    taken = set(matched.values())
    pairs += [
        MaskPair(None, column, 0, int(areas_P[column])) for column in range(num_predictions) if column not in taken
    ]
    return QuestionScore(tuple(pairs), num_truths, num_predictions)


def _unions(
    both: npt.NDArray[np.int64], areas_T: npt.NDArray[np.int64], areas_P: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    return areas_T[:, None] + areas_P[None, :] - both


def _areas(masks: Masks) -> npt.NDArray[np.int64]:
    return np.array([np.count_nonzero(mask) for mask in masks], dtype=np.int64)


def _rle_areas(masks: Sequence[Rle]) -> npt.NDArray[np.int64]:
    return np.asarray(coco_mask.area(list(masks)), dtype=np.int64) if masks else np.zeros(0, dtype=np.int64)


@dataclass
class SegmentationMeter:
    """Adds up the scores of many questions; memory does not grow with their number."""

    num_questions: int = 0
    num_asked: int = 0
    num_returned: int = 0
    num_exact_counts: int = 0
    _num_places: int = 0
    _iou_sum: float = 0.0
    _intersection: int = 0
    _union: int = 0

    def add(self, score: QuestionScore) -> None:
        """Counts one question."""
        self.num_questions += 1
        self.num_asked += score.num_asked
        self.num_returned += score.num_returned
        self.num_exact_counts += score.num_asked == score.num_returned
        self._num_places += len(score.ious)
        self._iou_sum += sum(score.ious)
        self._intersection += sum(pair.intersection for pair in score.pairs)
        self._union += sum(pair.union for pair in score.pairs)

    def result(self) -> dict[str, float]:
        """`giou`, `ciou` (0 to 1), `count_accuracy` (share of questions with the right number of targets), counts."""
        return {
            "giou": self._iou_sum / self._num_places if self._num_places else math.nan,
            "ciou": self._intersection / self._union if self._union else math.nan,
            "count_accuracy": self.num_exact_counts / self.num_questions if self.num_questions else math.nan,
            "num_questions": float(self.num_questions),
            "targets_asked": float(self.num_asked),
            "targets_returned": float(self.num_returned),
        }


def without_ignored(
    truths: Masks, predictions: Masks, ignore: npt.NDArray[np.bool_]
) -> tuple[list[npt.NDArray[np.bool_]], list[npt.NDArray[np.bool_]]]:
    """Both sides without the pixels of `ignore`; predictions that lie there by more than half are left out."""
    kept = [
        mask & ~ignore
        for mask in predictions
        if 2 * np.count_nonzero(mask & ignore) <= np.count_nonzero(mask) or not mask.any()
    ]
    return [mask & ~ignore for mask in truths], kept
