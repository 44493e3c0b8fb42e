"""Shards that hold a question for every suite, and answerers whose figures are known by hand."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from pixellm.jobs.evaluate.blocks import AnswerPlan
from pixellm.jobs.evaluate.questions import Question
from pixellm.jobs.evaluate.types import Answer, Answerer
from pixellm.platform.data.schema import Row, RowDialogue, Target
from pixellm.platform.data.shards import open_shards, write_shards
from pixellm.platform.masks import mask_box, rle_decode, rle_encode

#: 20 rows × 40 columns each: 800 pixels.
BOXES = ((0, 0), (0, 50), (30, 0), (30, 50))
SIZE = (60, 100)
NAMES = ("red kayak", "double-bladed paddle", "straw hat", "dog")


def box_mask(top: int, left: int, height: int = 20, width: int = 40) -> npt.NDArray[np.bool_]:
    """A filled rectangle in a picture of `SIZE`."""
    mask = np.zeros(SIZE, dtype=bool)
    mask[top : top + height, left : left + width] = True
    return mask


def write_case(uri: Path, pictures: int = 6, *, seed: int = 0) -> str:
    """Pictures with four targets each; per picture a question for two of them, and one expression."""
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(pictures):
        sink = io.BytesIO()
        Image.fromarray(rng.integers(0, 255, (*SIZE, 3), dtype=np.uint8)).save(sink, "JPEG")
        targets = []
        for place, (box, name) in enumerate(zip(BOXES, NAMES, strict=True)):
            rle = rle_encode(box_mask(*box))
            targets.append(Target(str(place), name, f"the {name}", mask_box(rle) or (0, 0, 0, 0), rle, 800))
        pair = (number % 4, (number + 1) % 4)
        phrases = tuple(NAMES[index] for index in pair)
        dialogues = (
            RowDialogue(
                "muse",
                "How can I cross the lake?",
                f"Take {phrases[0]} {{seg}} and {phrases[1]} {{seg}}.",
                pair,
                phrases,
            ),
            RowDialogue("referring", "both things on the left", "", pair, phrases),
        )
        row = Row(f"{number:03d}", "case", sink.getvalue(), *SIZE, "CC0", tuple(targets), dialogues)
        rows.append(row)
    write_shards(rows, uri, name="case")
    return str(uri)


@dataclass(frozen=True)
class KnownAnswers:
    """Opens answerers that know the truth. `share` of a question's targets are answered, rounded down; with `log` each
    batch leaves a line in that file, and with `die` in the log's folder the first process to see it removes it and ends
    at once."""

    share: float = 1.0
    log: Path | None = None

    def __call__(self, plan: AnswerPlan) -> Answerer:
        """The answerer of a plan."""
        return _Known(self, plan)


class _Known:
    def __init__(self, known: KnownAnswers, plan: AnswerPlan) -> None:
        self._known = known
        self._rows = {f"{row.source}/{row.image_id}": row for row in open_shards(plan.dataset.uri).scan()}

    def answer(self, questions: Sequence[Question]) -> list[Answer]:
        """The first targets of each question, in reverse order."""
        self._keep_log(questions)
        return [self._one(question) for question in questions]

    def close(self) -> None:
        """Nothing to let go of."""

    def _one(self, question: Question) -> Answer:
        row = self._rows[question.sample_id.partition("#")[0]]
        by_phrase = {name: rle_decode(target.mask) for name, target in zip(NAMES, row.targets, strict=True)}
        names = [phrase.removeprefix("the ") for phrase in question.phrases]
        names = names[: int(self._known.share * len(names))][::-1]
        text = " and ".join(f"{name} [{number}]" for number, name in enumerate(names, 1))
        return Answer(text, tuple(names), tuple(by_phrase[name] for name in names), is_ordered=False)

    def _keep_log(self, questions: Sequence[Question]) -> None:
        if self._known.log is None:
            return
        import os
        import signal

        die = self._known.log.parent / "die"
        with self._known.log.open("a") as log:
            log.write(f"{os.getpid()} {questions[0].sample_id}\n")
            lines = self._known.log.read_text().count("\n")
        if lines >= 3 and die.exists():
            die.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
