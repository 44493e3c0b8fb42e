"""Questions and answers composed from a row while streaming, by a generator that the position in the order seeds.

Templates and limits can change without rewriting shards. `QuestionSource` is one source of a mixture: shards, the kind
of question asked of them, and the rows that can give one.
"""

from collections.abc import Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pixellm.errors import DataError
from pixellm.platform.data.askable import Unit, askable_units, known_absent, usable_dialogues
from pixellm.platform.data.dialogue import ComposeLimits, Dialogue, Group, QuestionPlan, Turn
from pixellm.platform.data.order import Draw
from pixellm.platform.data.phrases import definite
from pixellm.platform.data.schema import SEG_MARKER, Row, RowDialogue
from pixellm.platform.data.shards import ShardedDataset, open_shards
from pixellm.platform.data.templates import (
    ABSENT_ANSWERS,
    CLASS_QUESTIONS,
    CLASSES_QUESTIONS,
    MULTI_ANSWERS,
    MULTI_QUESTIONS,
    REFERRING_QUESTIONS,
    REFERRINGS_QUESTIONS,
    SINGLE_ANSWERS,
    SINGLE_QUESTIONS,
)
from pixellm.platform.data.usable import UsableRows, find_usable_rows
from pixellm.platform.data.variation import vary

__all__ = ["ComposeLimits", "Dialogue", "Group", "QuestionSource", "Turn", "can_compose", "compose"]

#: Questions for one thing and for several, of the groups whose questions are composed.
_QUESTIONS: dict[Group, tuple[Sequence[str], Sequence[str]]] = {
    "segmentation": (SINGLE_QUESTIONS, MULTI_QUESTIONS),
    "semantic": (CLASS_QUESTIONS, CLASSES_QUESTIONS),
    "referring": (REFERRING_QUESTIONS, REFERRINGS_QUESTIONS),
}


def compose(
    row: Row, group: Group, rng: np.random.Generator, limits: ComposeLimits, vocabulary: Sequence[str] = ()
) -> Dialogue:
    """Composes a dialogue about a row.

    Args:
        row: the picture's targets and written dialogues (its `image` is not looked at).
        group: "segmentation" asks for targets by name with our templates, "semantic" for classes and parts as wholes,
            "referring" by the row's expressions; "vqa" and "muse" take the row's own dialogues.
        rng: decides everything that is free; the same state gives the same dialogue.
        limits: how many questions and targets, and how small they may be.
        vocabulary: categories that the row's annotators looked for; those it lacks can be asked for in vain.

    Raises:
        DataError: the row cannot give this kind of dialogue (`can_compose` says so beforehand).
    """
    plan = QuestionPlan.draw(rng, limits)
    if group in _QUESTIONS:
        turns = _composed_turns(row, group, plan, rng, limits, vocabulary)
    else:
        turns = _written_turns(usable_dialogues(row, group, limits), len(plan.wanted), rng)
    if not turns:
        raise DataError(f"{row.source} {row.image_id} cannot give a {group} question within {limits}")
    if limits.variation:
        turns = [
            turn._replace(question=vary(turn.question, rng)) if rng.random() < limits.variation else turn
            for turn in turns
        ]
    return Dialogue(group, tuple(turns))


def can_compose(row: Row, group: Group, limits: ComposeLimits) -> bool:
    """Whether `compose` can make a dialogue of this kind from the row."""
    return bool(askable_units(row, group, limits) if group in _QUESTIONS else usable_dialogues(row, group, limits))


class QuestionSource:
    """One source of a mixture: the rows of some shards that can give one kind of question.

    Picklable, so that tasks elsewhere read and compose the same samples.

    Args:
        dataset: the shards.
        group: kind of question.
        limits: what a dialogue may hold.
        usable: the rows that can give one, with what foretells its length.
    """

    def __init__(self, dataset: ShardedDataset, group: Group, limits: ComposeLimits, usable: UsableRows) -> None:
        self.dataset = dataset
        self.group = group
        self.limits = limits
        self.usable = usable

    @staticmethod
    def open(uri: str | Path, group: Group, limits: ComposeLimits) -> "QuestionSource":
        """Opens shards and finds the rows that can give such a question (pictures and masks are not read for it).

        Raises:
            DataError: there are no shards, or not one of their rows can give such a question.
        """
        dataset = open_shards(uri)
        usable = find_usable_rows(dataset, group, limits)
        if not len(usable):
            raise DataError(
                f"none of the {len(dataset)} rows at {uri} can give a {group} question within {limits}; "
                "choose another group for these shards or wider data.max_targets / data.min_target_share"
            )
        return QuestionSource(dataset, group, limits, usable)

    @property
    def rows(self) -> npt.NDArray[np.int32]:
        """Numbers of the usable rows, ascending."""
        return self.usable.rows

    def __len__(self) -> int:
        return len(self.usable)

    def __reduce__(self) -> tuple[Any, ...]:
        return (QuestionSource, (self.dataset, self.group, self.limits, self.usable))

    def sample(self, draw: Draw) -> tuple[Row, Dialogue]:
        """Reads and composes the sample of a draw of this source."""
        row = self.dataset.read_row(int(self.rows[draw.index]))
        return row, compose(row, self.group, draw.rng(), self.limits, self.usable.vocabulary)

    def text_length(self, draw: Draw) -> float:
        """About how long the text of a draw will be, in characters, without reading its row."""
        rng = draw.rng()
        plan = QuestionPlan.draw(rng, self.limits)
        if self.group in _QUESTIONS:
            return self.usable.composed_length(draw.index, plan)
        lengths = self.usable.written_lengths(draw.index)
        return float(lengths[_chosen(self.usable.written_turns(draw.index), len(plan.wanted), rng)].sum())


def _composed_turns(
    row: Row,
    group: Group,
    plan: QuestionPlan,
    rng: np.random.Generator,
    limits: ComposeLimits,
    vocabulary: Sequence[str],
) -> list[Turn]:
    """Asks for random units, those of one question from left to right, each target at most once in the dialogue."""
    units = askable_units(row, group, limits)
    if not units:
        return []
    waiting = [units[index] for index in rng.permutation(len(units))]
    absent = known_absent(row, vocabulary) if 0 in plan.wanted else []
    asked: set[int] = set()
    turns: list[Turn] = []
    for question, wanted in enumerate(plan.wanted):
        if not wanted and absent:
            turns.append(_absent_turn(absent.pop(int(rng.integers(len(absent)))), group, rng))
            continue
        chosen: list[Unit] = []
        kept = plan.kept_after(question)
        if kept:
            kept = min(kept, _num_askable(waiting, asked) - 1)
        for unit in waiting:
            room = wanted - sum(len(other.target_indices) for other in chosen)
            fits = len(unit.target_indices) <= room or (not chosen and len(unit.target_indices) <= limits.max_targets)
            if not fits or not asked.isdisjoint(unit.target_indices):
                continue
            if kept <= 0 or _num_askable(waiting, asked.union(unit.target_indices)) >= kept:
                chosen.append(unit)
                asked.update(unit.target_indices)
        if chosen:
            turns.append(_asked_turn(sorted(chosen, key=lambda unit: unit.left_px), group, rng))
    return turns


def _num_askable(units: Sequence[Unit], asked: Set[int]) -> int:
    """How many questions the units give that share no target with each other or with what was asked."""
    taken, count = set(asked), 0
    for unit in sorted(units, key=lambda unit: len(unit.target_indices)):
        if taken.isdisjoint(unit.target_indices):
            taken.update(unit.target_indices)
            count += 1
    return count


def _asked_turn(units: list[Unit], group: Group, rng: np.random.Generator) -> Turn:
    indices = tuple(index for unit in units for index in unit.target_indices)
    names = [name for unit in units for name in unit.each]
    for_one, for_several = _QUESTIONS[group]
    question = _pick(for_one if len(units) == 1 else for_several, rng)
    question = question.replace("{objects}", _listed([unit.name for unit in units]))
    if len(indices) == 1:
        return Turn(question, _named(_pick(SINGLE_ANSWERS, rng), names[0]), indices)
    listed = _listed([f"{name} {SEG_MARKER}" for name in names])
    answer = _pick(MULTI_ANSWERS, rng)
    answer = answer.replace("{listed}", listed).replace("{Listed}", _capitalised(listed))
    return Turn(question, answer, indices)


def _absent_turn(name: str, group: Group, rng: np.random.Generator) -> Turn:
    question = _pick(_QUESTIONS[group][0], rng).replace("{objects}", definite(name))
    return Turn(question, _named(_pick(ABSENT_ANSWERS, rng), definite(name)), ())


def _written_turns(dialogues: list[RowDialogue], count: int, rng: np.random.Generator) -> list[Turn]:
    turns = np.asarray([dialogue.turn for dialogue in dialogues], dtype=np.int16)
    chosen = [dialogues[index] for index in _chosen(turns, count, rng)]
    return [Turn(dialogue.question, dialogue.answer, dialogue.target_ids) for dialogue in chosen]


def _chosen(turns: npt.NDArray[np.int16], count: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """Which of a row's dialogues are taken: conversations in random order, each from its start, `count` turns in all.

    Args:
        turns: place of each dialogue in its conversation.
        count: of dialogues, at most.
        rng: gives the order.
    """
    conversations = np.split(np.arange(len(turns)), np.flatnonzero(turns == 0)[1:])
    order = rng.permutation(len(conversations))
    return np.concatenate([conversations[index] for index in order])[:count]


def _pick(templates: Sequence[str], rng: np.random.Generator) -> str:
    return templates[int(rng.integers(len(templates)))]


def _named(template: str, name: str) -> str:
    return template.replace("{named}", name).replace("{Named}", _capitalised(name))


def _listed(names: Sequence[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _capitalised(text: str) -> str:
    return text[:1].upper() + text[1:]
