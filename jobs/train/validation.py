"""Held-out questions while training goes on: the true answers are given, masks and the loss of the words are scored.

Every rank answers its share on the model that trains, so nothing is written or loaded for it. Whether the metric has
reached its plateau is a pure function of its history, which the checkpoints carry.
"""

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from torch import Tensor

from pixellm.errors import ConfigError
from pixellm.jobs.evaluate.metrics import QuestionScore, SegmentationMeter, score_question
from pixellm.jobs.evaluate.questions import Question, check_suite, iterate_questions
from pixellm.jobs.train import ranks
from pixellm.jobs.train.checkpoints import better_when_higher
from pixellm.jobs.train.deepspeed_engine import TrainEngine
from pixellm.model.processing import PixelLMProcessor, TrainingExample
from pixellm.platform.data.compose import ComposeLimits
from pixellm.platform.overlay import draw_overlay
from pixellm.platform.settings import Settings, ValidationSettings


@dataclass(frozen=True)
class Plateau:
    """How a metric has developed.

    Attributes:
        best: its best score, higher being better; None before the first.
        best_step: where that was.
        stale: validations since then.
    """

    best: float | None = None
    best_step: int = 0
    stale: int = 0

    def after(self, step: int, metrics: Mapping[str, float], chosen: ValidationSettings) -> "Plateau":
        """The state with one more validation."""
        value = metrics[chosen.metric]
        score = better_when_higher(chosen.metric, value)
        least = -math.inf if self.best is None else self.best + chosen.min_improvement
        if math.isfinite(value) and score > least:
            return Plateau(score, step, 0)
        return replace(self, stale=self.stale + 1)

    def is_over(self, chosen: ValidationSettings) -> bool:
        """Whether the recipe ends training here."""
        return chosen.patience is not None and self.stale >= chosen.patience

    def to_json_dict(self) -> dict[str, Any]:
        """For a checkpoint's `meta.json`."""
        return asdict(self)


class Validator:
    """This rank's share of the held-out questions. All ranks call `run` at the same step.

    Raises:
        ConfigError: there are no held-out shards.
        DataError: they cannot give such questions.
    """

    def __init__(self, settings: Settings, processor: PixelLMProcessor, pictures_dir: Path) -> None:
        chosen, data = settings.train.validation, settings.data
        uri = chosen.uri or settings.evaluate.uri
        if uri is None:
            raise ConfigError("train.validation.every is set, but there is nothing to ask; set train.validation.uri")
        limits = ComposeLimits(
            max((source.max_targets or data.max_targets for source in data.sources), default=data.max_targets),
            1,
            data.min_target_share,
        )
        questions = list(iterate_questions(uri, check_suite(chosen.suite), limits, chosen.limit))
        self._processor = processor
        self._pictures_dir = pictures_dir
        self._num_pictures = chosen.num_pictures
        self._batches = share_of_rank(questions, settings.train.micro_batch_size, ranks.rank(), ranks.world_size())
        self._mask_size = data.mask_size

    def run(self, engine: TrainEngine, step: int) -> tuple[dict[str, float], str | None]:
        """Answers the questions.

        Returns:
            `giou`, `ciou` (0 to 1), `text_loss`, `num_questions`, the same on every rank; and the folder of the
            pictures that rank 0 drew.
        """
        scores: list[QuestionScore] = []
        text_loss = num_words = 0.0
        folder = self._pictures_dir / f"step-{step:06d}" if self._num_pictures and ranks.rank() == 0 else None
        for questions, num_own in self._batches:
            examples = [self._encode(question) for question in questions]
            output = engine.evaluate(self._processor.collate(examples))
            words = float(sum(int((example.labels >= 0).sum()) for example in examples[:num_own]))
            text_loss, num_words = text_loss + float(output.losses["text"]) * words, num_words + words
            for row in range(num_own):
                masks = self._masks(output.mask_logits[output.target_rows == row], examples[row])
                question = questions[row]
                scores.append(score_question(question.masks, masks, ignore=question.ignore, is_ordered=True))
                if folder is not None and len(scores) <= self._num_pictures:
                    _draw(question, masks, scores[-1], folder)
        meter = SegmentationMeter()
        for part in ranks.gather_objects(scores):
            for score in part:
                meter.add(score)
        total, count = ranks.sum_over_ranks([text_loss, num_words], engine.device)
        result = meter.result()
        metrics = {key: result[key] for key in ("giou", "ciou", "num_questions")}
        metrics["text_loss"] = total / count if count else math.nan
        return metrics, None if folder is None else str(folder)

    def _encode(self, question: Question) -> TrainingExample:
        turn = (question.prompt, question.answer, len(question.masks))
        return self._processor.encode_sample(
            question.image, [turn], question.masks, self._mask_size, sample_id=question.sample_id
        )

    def _masks(self, logits: Tensor, example: TrainingExample) -> list[Any]:
        (rows, columns), (height, width) = map(tuple, (example.valid_hw.tolist(), example.original_hw.tolist()))
        full = self._processor.post_process(logits.float().cpu(), (rows, columns), (height, width))
        return list((full > 0).numpy())


def share_of_rank(
    questions: Sequence[Question], batch_size: int, rank: int, world_size: int
) -> list[tuple[list[Question], int]]:
    """One rank's batches, equally many on every rank (ranks that shard parameters must run the same modules).

    Returns:
        Batches, and how many of each one's questions count; a rank that has none left asks the first one for nothing.
    """
    own = list(questions[rank::world_size])
    longest = -(-len(questions) // world_size)
    batches = [own[first : first + batch_size] for first in range(0, longest, batch_size)]
    return [(batch or [questions[0]], len(batch)) for batch in batches]


def _draw(question: Question, masks: Sequence[Any], score: QuestionScore, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    photo = ImageOps.exif_transpose(Image.open(io.BytesIO(question.image))).convert("RGB")
    note = f"gIoU {score.giou:.2f}"
    picture = draw_overlay(np.asarray(photo), masks, list(question.phrases), question=question.prompt, note=note)
    picture.save(folder / f"{question.sample_id.replace('/', '-').replace('#', '-')}.png")
