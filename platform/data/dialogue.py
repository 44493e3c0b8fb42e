"""What a composed dialogue is, what it may hold, and what of it is decided before its row is looked at."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

Group = Literal["segmentation", "semantic", "referring", "vqa", "muse"]


@dataclass(frozen=True, slots=True)
class ComposeLimits:
    """What a composed dialogue may hold.

    Attributes:
        max_targets: targets of one question, at most.
        max_questions: question turns of one dialogue, at most.
        min_target_share: targets below this share of the picture's pixels are not asked for, 0..1. A written dialogue
            that needs such a target is not used.
        negative_share: of the composed questions, how many ask for something that the picture is known to lack, 0..1
            (where something is known).
        variation: how likely a question's wording is changed a little (case, politeness, a slip of the keyboard), 0..1.
        min_questions: question turns of one dialogue, at least, where the picture gives so many.
    """

    max_targets: int = 3
    max_questions: int = 1
    min_target_share: float = 0.0
    negative_share: float = 0.0
    variation: float = 0.0
    min_questions: int = 1


class Turn(NamedTuple):
    """A question and its answer; the k-th `{seg}` of the answer stands for `Row.targets[target_indices[k]]`."""

    question: str
    answer: str
    target_indices: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Dialogue:
    """What is asked of one picture in one sample. `kind` is the group it was composed for."""

    kind: Group
    turns: tuple[Turn, ...]

    @property
    def target_indices(self) -> tuple[int, ...]:
        """Indices into `Row.targets` over all turns, in the order of the `{seg}` markers."""
        return tuple(index for turn in self.turns for index in turn.target_indices)


class QuestionPlan(NamedTuple):
    """How many targets each question asks for, at most; 0 asks for something absent.

    It is drawn before anything else, so that the length of a dialogue can be foretold without composing it.
    """

    wanted: tuple[int, ...]
    min_questions: int = 1

    @staticmethod
    def draw(rng: np.random.Generator, limits: ComposeLimits) -> "QuestionPlan":
        """Takes the first numbers of a sample's generator."""
        num_questions = int(rng.integers(limits.min_questions, limits.max_questions + 1))
        wanted = [int(number) for number in rng.integers(1, limits.max_targets + 1, size=num_questions)]
        if limits.negative_share:
            absent = rng.random(num_questions) < limits.negative_share
            wanted = [0 if is_absent else number for number, is_absent in zip(wanted, absent, strict=True)]
        return QuestionPlan(tuple(wanted), limits.min_questions)

    def kept_after(self, question: int) -> int:
        """How many questions after this one must still find something to ask for."""
        return max(0, self.min_questions - 1 - question)
