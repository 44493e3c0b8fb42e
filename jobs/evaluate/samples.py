"""One evaluated question at rest: what was asked, answered and scored, with all masks, as a row of Parquet."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pixellm.jobs.evaluate.metrics import score_merged, score_rles, without_ignored
from pixellm.jobs.evaluate.suites import Asked, Suite
from pixellm.jobs.evaluate.types import Answer
from pixellm.platform.data.schema import MASK_TYPE
from pixellm.platform.masks import Rle, rle_decode, rle_encode

_MARKER = re.compile(r"\s*\[(\d+)\]")
#: What stands in the text for a prediction that no target was matched to.
NOTHING = "no such object"

#: `pair_truth` and `pair_prediction` are indices, −1 where that side is left over; `ious`, `intersections` and `unions`
#: follow them. The `merged_*` columns compare the unions of all masks. Judge columns are null where none was asked.
SAMPLE_SCHEMA = pa.schema(
    [
        ("sample_id", pa.string()),
        ("image_id", pa.string()),
        ("row", pa.int64()),
        ("question_type", pa.string()),
        ("question", pa.string()),
        ("true_answer", pa.string()),
        ("true_phrases", pa.list_(pa.string())),
        ("answer", pa.string()),
        ("phrases", pa.list_(pa.string())),
        ("targets_asked", pa.int32()),
        ("targets_returned", pa.int32()),
        ("giou", pa.float64()),
        ("pair_truth", pa.list_(pa.int32())),
        ("pair_prediction", pa.list_(pa.int32())),
        ("ious", pa.list_(pa.float64())),
        ("intersections", pa.list_(pa.int64())),
        ("unions", pa.list_(pa.int64())),
        ("merged_iou", pa.float64()),
        ("merged_intersection", pa.int64()),
        ("merged_union", pa.int64()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("true_masks", pa.list_(MASK_TYPE)),
        ("masks", pa.list_(MASK_TYPE)),
        ("judge_text", pa.string()),
        ("judge_scores", pa.list_(pa.float64())),
        ("judge_words", pa.list_(pa.string())),
        ("judge_status", pa.string()),
    ]
)


def sample_row(asked: Asked, answer: Answer, suite: Suite) -> dict[str, Any]:
    """Scores an answer.

    Args:
        asked: the question.
        answer: masks at the picture's own size.
        suite: how masks are counted; `giou` and the pairs are those of one-to-one matching in any case.

    Returns:
        A record of `SAMPLE_SCHEMA`, not judged.
    """
    masks = [rle_encode(mask) for mask in answer.masks] if answer.rles is None else list(answer.rles)
    truths, predictions = list(asked.masks), masks
    kept = list(range(len(predictions)))
    if asked.ignore:
        truths, predictions, kept = _outside(asked, answer.masks)
    score = score_rles(truths, predictions, is_ordered=answer.is_ordered)
    merged = score_merged(truths, predictions)
    whole = merged.pairs[0] if len(merged.pairs) == 1 else None
    return {
        "sample_id": asked.sample_id,
        "image_id": asked.image_id,
        "row": asked.row,
        "question_type": asked.kind,
        "question": asked.prompt,
        "true_answer": asked.answer,
        "true_phrases": list(asked.phrases),
        "answer": answer.text,
        "phrases": list(answer.phrases),
        "targets_asked": score.num_asked,
        "targets_returned": score.num_returned,
        "giou": score.giou if suite.scoring == "matched" else merged.giou,
        "pair_truth": [-1 if pair.truth is None else pair.truth for pair in score.pairs],
        "pair_prediction": [-1 if pair.prediction is None else kept[pair.prediction] for pair in score.pairs],
        "ious": [pair.iou for pair in score.pairs],
        "intersections": [pair.intersection for pair in score.pairs],
        "unions": [pair.union for pair in score.pairs],
        "merged_iou": merged.giou,
        "merged_intersection": whole.intersection if whole else 0,
        "merged_union": whole.union if whole else 0,
        "height": asked.size[0],
        "width": asked.size[1],
        "true_masks": list(asked.masks),
        "masks": masks,
        "judge_text": None,
        "judge_scores": None,
        "judge_words": None,
        "judge_status": None,
    }


def judged_pairs(sample: Mapping[str, Any]) -> list[int]:
    """Places (indices of the pairs) that a judge is asked about: both sides are there and overlap.

    A pair without a common pixel is the matching's leftover; its product with any score is 0, and a description of
    something else in the text would mislead the judge about the rest.
    """
    return [place for place, iou in enumerate(sample["ious"]) if iou > 0 and sample["pair_prediction"][place] >= 0]


def text_for_judge(sample: Mapping[str, Any]) -> str:
    """The generated text with each mask's place taken by the true description of its match (paper Sec. 4.3, step 2).

    "Sit in the kayak [1]." becomes "Sit in the kayak [1] (a red kayak parked on the beach)."; the number stays so that
    a score can name it. A mask without a match gets `NOTHING`.
    """
    description = {
        sample["pair_prediction"][place]: sample["true_phrases"][sample["pair_truth"][place]]
        for place in judged_pairs(sample)
    }
    return _MARKER.sub(
        lambda match: f" [{match[1]}] ({description.get(int(match[1]) - 1, NOTHING)})", sample["answer"]
    ).strip()


def _outside(asked: Asked, masks: Sequence[npt.NDArray[np.bool_]]) -> tuple[list[Rle], list[Rle], list[int]]:
    """Both sides without the crowd regions, and which predictions were kept."""
    ignore = np.logical_or.reduce([rle_decode(mask) for mask in asked.ignore])
    truths, _ = without_ignored([rle_decode(mask) for mask in asked.masks], [], ignore)
    predictions: list[Rle] = []
    kept: list[int] = []
    for number, mask in enumerate(masks):
        _, outside = without_ignored([], [mask], ignore)
        if outside:
            predictions.append(rle_encode(outside[0]))
            kept.append(number)
    return [rle_encode(mask) for mask in truths], predictions, kept
