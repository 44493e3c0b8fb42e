"""Figures over evaluated questions: sums per question, ratios of sums, intervals by resampling pictures, breakdowns.

Every figure is a ratio of two sums over questions (mean IoU over places, intersections over unions, hits over targets
…), so a part of the questions, a bootstrap resample and a shard of an evaluation all are the same few sums added up.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pycocotools.mask as coco_mask

from pixellm.jobs.evaluate.suites import Scoring

HIT_IOU = 0.5
#: A judge's best score; scores are divided by it, so that a perfect answer comes to 100 (docs/evaluation.md).
BEST_SCORE = 10.0

#: Figure → (numerator, denominator), sums over questions; the judged figures are there where a judge was asked.
RATIOS: dict[str, tuple[str, str]] = {
    "giou": ("iou", "places"),
    "ciou": ("intersection", "union"),
    "giou_merged": ("merged_iou", "questions"),
    "ciou_merged": ("merged_intersection", "merged_union"),
    "precision": ("hits", "returned"),
    "recall": ("hits", "asked"),
    "pq": ("hit_iou", "pq_places"),
    "sq": ("hit_iou", "hits"),
    "rq": ("hits", "pq_places"),
    "count_accuracy": ("exact_counts", "questions"),
    "mean_targets_asked": ("asked", "questions"),
    "mean_targets_returned": ("returned", "questions"),
    "no_target_accuracy": ("right_absent", "absent"),
    "judged_giou": ("judged_iou", "judged_places"),
    "judged_ciou": ("judged_intersection", "judged_union"),
    "judge_score": ("judge_points", "judge_scores"),
}
_SUMS = sorted({name for pair in RATIOS.values() for name in pair})
_BLOCK = 100

#: Shares of the picture's pixels that end the classes of target area.
AREA_EDGES = (0.01, 0.05, 0.2)
AREA_NAMES = ("below 1 %", "1 to 5 %", "5 to 20 %", "above 20 %")


@dataclass(frozen=True)
class Figure:
    """A figure with its 95 % interval; NaN where there is nothing to divide by."""

    value: float
    low: float
    high: float


def question_sums(sample: Mapping[str, Any]) -> dict[str, float]:
    """What one question adds to each sum."""
    ious, asked, returned = sample["ious"], sample["targets_asked"], sample["targets_returned"]
    hits = [iou for iou, t, p in _places(sample) if iou > HIT_IOU and t >= 0 and p >= 0]
    sums = dict.fromkeys(_SUMS, 0.0)
    sums |= {
        "questions": 1.0,
        "iou": float(sum(ious)) if ious else 1.0,
        "places": float(len(ious) or 1),
        "intersection": float(sum(sample["intersections"])),
        "union": float(sum(sample["unions"])),
        "merged_iou": sample["merged_iou"],
        "merged_intersection": float(sample["merged_intersection"]),
        "merged_union": float(sample["merged_union"]),
        "asked": float(asked),
        "returned": float(returned),
        "hits": float(len(hits)),
        "hit_iou": float(sum(hits)),
        "pq_places": (asked + returned) / 2,
        "exact_counts": float(asked == returned),
        "absent": float(not asked),
        "right_absent": float(not asked and not returned),
    }
    scores = sample.get("judge_scores")
    if scores is not None:
        shares = [score / BEST_SCORE for score in scores]
        given = [score for score in scores if score > 0]
        sums |= {
            "judged_iou": sum(s * iou for s, iou in zip(shares, ious, strict=True)) if ious else 1.0,
            "judged_places": sums["places"],
            "judged_intersection": sum(s * i for s, i in zip(shares, sample["intersections"], strict=True)),
            "judged_union": sums["union"],
            "judge_points": float(sum(given)),
            "judge_scores": float(len(given)),
        }
    return sums


class Summary:
    """Sums of many questions; a few numbers each stay in memory.

    Args:
        scoring: which gIoU and cIoU are the suite's own.
        seed: of the resampling.
        resamples: of the pictures.
    """

    def __init__(self, scoring: Scoring = "matched", *, seed: int = 0, resamples: int = 1000) -> None:
        self._scoring = scoring
        self._seed, self._resamples = seed, resamples
        self._rows: list[list[float]] = []
        self._pictures: list[str] = []
        self._groups: dict[str, list[str]] = {"targets": [], "question": []}
        self._areas: list[tuple[str, str, float]] = []

    def add(self, sample: Mapping[str, Any]) -> None:
        """Counts one question."""
        sums = question_sums(sample)
        self._rows.append([sums[name] for name in _SUMS])
        self._pictures.append(sample["image_id"])
        asked = sample["targets_asked"]
        self._groups["targets"].append(str(asked) if asked < 6 else "6 or more")
        self._groups["question"].append(sample["question_type"])
        pixels = sample["height"] * sample["width"]
        areas = coco_mask.area(list(sample["true_masks"])) if sample["true_masks"] else []
        for iou, truth, _ in _places(sample):
            if truth >= 0:
                group = AREA_NAMES[int(np.searchsorted(AREA_EDGES, areas[truth] / pixels, side="right"))]
                self._areas.append((group, sample["image_id"], iou))

    def __len__(self) -> int:
        return len(self._rows)

    def figures(self, keep: npt.NDArray[np.bool_] | None = None) -> dict[str, Figure]:
        """Every figure that has a denominator, over all questions or those that `keep` names."""
        sums = np.asarray(self._rows, dtype=np.float64).reshape(-1, len(_SUMS))
        pictures = np.asarray(self._pictures)
        if keep is not None:
            sums, pictures = sums[keep], pictures[keep]
        names = [name for name, (_, below) in RATIOS.items() if len(sums) and sums[:, _SUMS.index(below)].sum()]
        pairs = [(_SUMS.index(RATIOS[name][0]), _SUMS.index(RATIOS[name][1])) for name in names]
        found = ratio_figures(sums, pictures, pairs, seed=self._seed, resamples=self._resamples)
        figures = dict(zip(names, found, strict=True))
        if self._scoring == "merged":
            figures |= {name: figures[f"{name}_merged"] for name in ("giou", "ciou") if f"{name}_merged" in figures}
        return figures

    def breakdowns(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Figures by number of targets, few or many, question type; mean IoU and recall by the target's area."""
        result: dict[str, dict[str, dict[str, Any]]] = {}
        for title, values in self._groups.items():
            labels = np.asarray(values)
            result[title] = {}
            for label in sorted(set(values)):
                keep = labels == label
                result[title][label] = {"questions": int(keep.sum()), "figures": self.figures(keep)}
        asked = np.asarray([row[_SUMS.index("asked")] for row in self._rows])
        result["few or many"] = {
            name: {"questions": int(keep.sum()), "figures": self.figures(keep)}
            for name, keep in (("up to 3 targets", (asked > 0) & (asked <= 3)), ("more than 3", asked > 3))
            if keep.any()
        }
        result["area"] = {name: self._area(name) for name in AREA_NAMES if any(a[0] == name for a in self._areas)}
        return result

    def _area(self, name: str) -> dict[str, Any]:
        own = [(picture, iou) for group, picture, iou in self._areas if group == name]
        values = np.asarray([[iou, float(iou > HIT_IOU), 1.0] for _, iou in own])
        pictures = np.asarray([picture for picture, _ in own])
        iou, recall = ratio_figures(values, pictures, [(0, 2), (1, 2)], seed=self._seed, resamples=self._resamples)
        return {"targets": len(own), "figures": {"giou": iou, "recall": recall}}


def ratio_figures(
    sums_QS: npt.NDArray[np.float64],
    clusters_Q: npt.NDArray[Any],
    pairs: Sequence[tuple[int, int]],
    *,
    seed: int = 0,
    resamples: int = 1000,
) -> list[Figure]:
    """Ratios of column sums with 95 % percentile intervals; whole clusters (pictures) are drawn with replacement.

    Args:
        sums_QS: one row per question.
        clusters_Q: the question's picture.
        pairs: (numerator, denominator) columns.
        seed: the same seed, questions and order of questions give the same intervals.
        resamples: how many.
    """
    if not len(pairs):
        return []
    _, member = np.unique(clusters_Q, return_inverse=True)
    per_cluster = np.zeros((int(member.max()) + 1, sums_QS.shape[1]))
    np.add.at(per_cluster, member, sums_QS)
    above, below = (list(columns) for columns in zip(*pairs, strict=True))
    totals = np.array([math.fsum(column) for column in per_cluster.T])
    values = totals[above] / totals[below]
    drawn = resampled_totals(per_cluster, seed=seed, resamples=resamples)
    with np.errstate(invalid="ignore", divide="ignore"):
        ratios = np.where(drawn[:, below] > 0, drawn[:, above] / drawn[:, below], np.nan)
    low, high = np.nanpercentile(ratios, [2.5, 97.5], axis=0)
    return [Figure(float(v), float(a), float(b)) for v, a, b in zip(values, low, high, strict=True)]


def resampled_totals(per_cluster_CS: npt.NDArray[np.float64], *, seed: int, resamples: int) -> npt.NDArray[np.float64]:
    """Column sums of `resamples` draws of as many clusters as there are, with replacement: `[resamples, S]`."""
    rng = np.random.default_rng(seed)
    count = len(per_cluster_CS)
    parts: list[npt.NDArray[np.float64]] = []
    for start in range(0, resamples, _BLOCK):
        size = min(_BLOCK, resamples - start)
        weights = rng.multinomial(count, np.full(count, 1.0 / count), size=size)
        parts.append(weights.astype(np.float64) @ per_cluster_CS)
    return np.concatenate(parts)


def summarize(samples: Iterable[Mapping[str, Any]], scoring: Scoring = "matched", *, seed: int = 0) -> Summary:
    """A summary of all samples."""
    summary = Summary(scoring, seed=seed)
    for sample in samples:
        summary.add(sample)
    return summary


def _places(sample: Mapping[str, Any]) -> list[tuple[float, int, int]]:
    return list(zip(sample["ious"], sample["pair_truth"], sample["pair_prediction"], strict=True))
