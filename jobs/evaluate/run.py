"""The evaluation after training: questions from shards, answers, metrics, one Parquet row per question, pictures."""

import io
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageOps

from pixellm.errors import ConfigError
from pixellm.jobs.evaluate.answers import ForcedAnswers, GeneratedAnswers
from pixellm.jobs.evaluate.metrics import QuestionScore, SegmentationMeter, score_question
from pixellm.jobs.evaluate.questions import Question, check_suite, iterate_questions
from pixellm.jobs.evaluate.types import Answer, Answerer
from pixellm.platform.data.compose import ComposeLimits, Group
from pixellm.platform.overlay import draw_overlay
from pixellm.platform.settings import Settings

Mode = Literal["generated", "forced"]
METRICS_FILE, SAMPLES_FILE = "metrics.json", "samples.parquet"

_SCHEMA = pa.schema(
    [
        ("sample_id", pa.string()),
        ("suite", pa.string()),
        ("question", pa.string()),
        ("answer", pa.string()),
        ("phrases", pa.list_(pa.string())),
        ("targets_asked", pa.int32()),
        ("targets_returned", pa.int32()),
        ("giou", pa.float64()),
        ("ious", pa.list_(pa.float64())),
        ("intersections", pa.list_(pa.int64())),
        ("unions", pa.list_(pa.int64())),
    ]
)


@dataclass(frozen=True)
class EvaluateResult:
    """What an evaluation came to.

    Attributes:
        metrics: `giou`, `ciou`, `count_accuracy`, counts; with several suites also `giou_SUITE` for each.
        mode: "generated" or "forced".
        model: the reference that was evaluated.
        out_dir: folder of `metrics.json`, `samples.parquet` and `pictures/`.
        pictures: overlay files, one per picture drawn.
    """

    metrics: dict[str, float]
    mode: Mode
    model: str
    out_dir: str
    pictures: tuple[str, ...]

    def to_json_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self) | {"pictures": list(self.pictures)}

    def to_text(self) -> str:
        """The figures, and where the rest is."""
        metrics = self.metrics
        how = "answers generated" if self.mode == "generated" else "true answers given (teacher-forced)"
        asked, returned = metrics["targets_asked"], metrics["targets_returned"]
        return (
            f"gIoU {metrics['giou']:.4f}, cIoU {metrics['ciou']:.4f} over {metrics['num_questions']:.0f} questions, "
            f"{how}\n{returned:.0f} targets returned, {asked:.0f} asked for; the right number in "
            f"{100 * metrics['count_accuracy']:.1f} % of the answers\nsamples and pictures: {self.out_dir}"
        )


def evaluate_after_training(
    settings: Settings, model_dir: Path, out_dir: Path, *, mode: Mode | None = None, num_pictures: int = 6
) -> EvaluateResult:
    """The evaluation that gates promotion: `evaluate.uri`, else every training source whose questions have masks.

    Args:
        settings: of the run, its sources resolved; question limits are those of training.
        model_dir: the finished model (or any other, to compare with).
        out_dir: gets `metrics.json`, `samples.parquet` and `pictures/`.
        mode: None takes `evaluate.mode`.
        num_pictures: how many answers are drawn.

    Raises:
        ConfigError: there is nothing to evaluate on.
    """
    chosen, data = settings.evaluate, settings.data
    sources = [
        (source.uri, source.group, source.max_targets or data.max_targets)
        for source in data.sources
        if source.group != "vqa"
    ]
    own = [(chosen.uri, chosen.suite, data.max_targets)] if chosen.uri is not None else []
    places: list[tuple[str, Group, int]] = [*own] or list(dict.fromkeys(sources))
    if not places:
        raise ConfigError(
            "no training source has questions with masks; set evaluate.uri, or registry.register_final=false"
        )
    questions = chain.from_iterable(
        iterate_questions(uri, check_suite(suite), ComposeLimits(max_targets, 1, data.min_target_share), chosen.limit)
        for uri, suite, max_targets in places
    )
    device = "cuda" if settings.train.use_gpu else "cpu"
    answerer = open_answerer(model_dir, mode or chosen.mode, batch_size=chosen.batch_size, device=device)
    return _evaluate(questions, answerer, mode or chosen.mode, str(model_dir), out_dir, chosen.batch_size, num_pictures)


def open_answerer(model_dir: Path, mode: Mode, *, batch_size: int, device: str = "cpu") -> Answerer:
    """The model behind a folder, answering in this mode.

    Raises:
        ModelLoadError: the folder holds no whole model.
    """
    if mode == "generated":
        return GeneratedAnswers(model_dir, device=device, batch_size=batch_size)
    return ForcedAnswers(model_dir, device=device)


def _evaluate(
    questions: Iterable[Question],
    answerer: Answerer,
    mode: Mode,
    model: str,
    out_dir: Path,
    batch_size: int,
    num_pictures: int,
) -> EvaluateResult:
    meters: dict[str, SegmentationMeter] = {"": SegmentationMeter()}
    pictures: list[str] = []
    (out_dir / "pictures").mkdir(parents=True, exist_ok=True)
    with closing(answerer), pq.ParquetWriter(out_dir / SAMPLES_FILE, _SCHEMA) as writer:
        for batch in _batches(questions, batch_size):
            answers = answerer.answer(batch)
            scores = [_score(question, answer) for question, answer in zip(batch, answers, strict=True)]
            rows = []
            for question, answer, score in zip(batch, answers, scores, strict=True):
                for key in ("", question.suite):
                    meters.setdefault(key, SegmentationMeter()).add(score)
                rows.append(_row(question, answer, score))
                if len(pictures) < num_pictures:
                    pictures.append(_draw(question, answer, score, out_dir / "pictures"))
            writer.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA))
    metrics = meters.pop("").result()
    if len(meters) > 1:
        metrics |= {f"giou_{suite}": meter.result()["giou"] for suite, meter in meters.items()}
    result = EvaluateResult(metrics, mode, model, str(out_dir), tuple(pictures))
    (out_dir / METRICS_FILE).write_text(json.dumps(result.to_json_dict(), indent=1) + "\n", encoding="utf-8")
    return result


def _score(question: Question, answer: Answer) -> QuestionScore:
    return score_question(question.masks, answer.masks, ignore=question.ignore, is_ordered=answer.is_ordered)


def _row(question: Question, answer: Answer, score: QuestionScore) -> dict[str, Any]:
    return {
        "sample_id": question.sample_id,
        "suite": question.suite,
        "question": question.prompt,
        "answer": answer.text,
        "phrases": list(answer.phrases),
        "targets_asked": score.num_asked,
        "targets_returned": score.num_returned,
        "giou": score.giou,
        "ious": list(score.ious),
        "intersections": [pair.intersection for pair in score.pairs],
        "unions": [pair.union for pair in score.pairs],
    }


def _draw(question: Question, answer: Answer, score: QuestionScore, folder: Path) -> str:
    photo = ImageOps.exif_transpose(Image.open(io.BytesIO(question.image))).convert("RGB")
    names = [phrase or f"target {number}" for number, phrase in enumerate(answer.phrases, 1)]
    picture = draw_overlay(
        np.asarray(photo), answer.masks, names, question=question.prompt, note=f"gIoU {score.giou:.2f}"
    )
    path = folder / f"{question.sample_id.replace('/', '-').replace('#', '-')}-{question.suite}.png"
    picture.save(path)
    return str(path)


def _batches(questions: Iterable[Question], size: int) -> Iterator[Sequence[Question]]:
    iterator = iter(questions)
    while batch := list(islice(iterator, size)):
        yield batch
