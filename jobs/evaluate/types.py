"""An answer to a question of an evaluation, and what gives answers; light to import (no torch)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from pixellm.jobs.evaluate.questions import Question
from pixellm.platform.masks import Rle


@dataclass(frozen=True)
class Answer:
    """An answer to one question.

    Attributes:
        text: words with `[k]` where target k − 1 belongs.
        phrases: name of each target.
        masks: bool H×W at the picture's own size.
        is_ordered: mask k is meant for true target k.
        rles: the same masks packed, where the model gives them so; None: they are packed when they are kept.
    """

    text: str
    phrases: tuple[str, ...]
    masks: tuple[npt.NDArray[np.bool_], ...]
    is_ordered: bool
    rles: tuple[Rle, ...] | None = None


class Answerer(Protocol):
    """Answers a batch of questions, in their order."""

    def answer(self, questions: Sequence[Question]) -> list[Answer]:
        """One answer per question."""
        ...

    def close(self) -> None:
        """Lets go of threads and memory."""
        ...
