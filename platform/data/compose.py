"""Questions and answers composed from a row while streaming, by a generator that the position in the order seeds.

Templates and limits can change without rewriting shards. `QuestionSource` is one source of a mixture: shards, the kind
of question asked of them, and the rows that can give one.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from pixellm.errors import DataError
from pixellm.platform.data.order import Draw
from pixellm.platform.data.phrases import definite, is_described, plural
from pixellm.platform.data.schema import SEG_MARKER, Row, RowDialogue
from pixellm.platform.data.shards import ShardedDataset, open_shards
from pixellm.platform.data.templates import MULTI_ANSWERS, MULTI_QUESTIONS, SINGLE_ANSWERS, SINGLE_QUESTIONS

Group = Literal["segmentation", "vqa", "muse"]


@dataclass(frozen=True, slots=True)
class ComposeLimits:
    """What a composed dialogue may hold.

    Attributes:
        max_targets: targets of one question, at most.
        max_questions: question turns of one dialogue, at most.
        min_target_share: targets below this share of the picture's pixels are not asked for, 0..1. A written dialogue
            that needs such a target is not used.
    """

    max_targets: int = 3
    max_questions: int = 1
    min_target_share: float = 0.0


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


@dataclass(frozen=True, slots=True)
class _Unit:
    """Something that can be asked for by name: one target, or all of a category. `left_px` is its left-most edge."""

    name: str
    target_indices: tuple[int, ...]
    each: tuple[str, ...]
    left_px: float


def compose(row: Row, group: Group, rng: np.random.Generator, limits: ComposeLimits) -> Dialogue:
    """Composes a dialogue about a row.

    Args:
        row: the picture's targets and written dialogues (its `image` is not looked at).
        group: "segmentation" asks for targets by name with our templates; "vqa" and "muse" take the row's own
            dialogues.
        rng: decides everything that is free; the same state gives the same dialogue.
        limits: how many questions and targets, and how small they may be.

    Raises:
        DataError: the row cannot give this kind of dialogue (`can_compose` says so beforehand).
    """
    if group == "segmentation":
        turns = _segmentation_turns(_askable_units(row, limits), rng, limits)
    else:
        turns = _written_turns(_usable_dialogues(row, group, limits), rng, limits)
    if not turns:
        raise DataError(f"{row.source} {row.image_id} cannot give a {group} question within {limits}")
    return Dialogue(group, tuple(turns))


def can_compose(row: Row, group: Group, limits: ComposeLimits) -> bool:
    """Whether `compose` can make a dialogue of this kind from the row."""
    return bool(_askable_units(row, limits) if group == "segmentation" else _usable_dialogues(row, group, limits))


class QuestionSource:
    """One source of a mixture: the rows of some shards that can give one kind of question.

    Picklable, so that tasks elsewhere read and compose the same samples.

    Args:
        dataset: the shards.
        group: kind of question.
        limits: what a dialogue may hold.
        rows: numbers of the usable rows, ascending.
    """

    def __init__(
        self, dataset: ShardedDataset, group: Group, limits: ComposeLimits, rows: npt.NDArray[np.int32]
    ) -> None:
        self.dataset = dataset
        self.group = group
        self.limits = limits
        self.rows = rows

    @staticmethod
    def open(uri: str | Path, group: Group, limits: ComposeLimits) -> "QuestionSource":
        """Opens shards and finds the rows that can give such a question (pictures are not read for it).

        Raises:
            DataError: there are no shards, or not one of their rows can give such a question.
        """
        dataset = open_shards(uri)
        usable = [number for number, row in enumerate(dataset.scan()) if can_compose(row, group, limits)]
        if not usable:
            raise DataError(
                f"none of the {len(dataset)} rows at {uri} can give a {group} question within {limits}; "
                "choose another group for these shards or wider data.max_targets / data.min_target_share"
            )
        return QuestionSource(dataset, group, limits, np.asarray(usable, dtype=np.int32))

    def __len__(self) -> int:
        return len(self.rows)

    def __reduce__(self) -> tuple[Any, ...]:
        return (QuestionSource, (self.dataset, self.group, self.limits, self.rows))

    def sample(self, draw: Draw) -> tuple[Row, Dialogue]:
        """Reads and composes the sample of a draw of this source."""
        row = self.dataset.read_row(int(self.rows[draw.index]))
        return row, compose(row, self.group, draw.rng(), self.limits)


def _askable_units(row: Row, limits: ComposeLimits) -> list[_Unit]:
    """Everything in the row that a name singles out, in a fixed order.

    A category with several instances is asked for as a whole when all of them fit the limits and no crowd region
    hides more of them (described targets, as in MUSE, are a selection: their category is never taken for complete).
    Its instances are asked for one by one where their phrase is unique.
    """
    min_area = limits.min_target_share * row.height * row.width
    real = [index for index, target in enumerate(row.targets) if not target.is_ignore]
    big_enough = {index for index in real if row.targets[index].area >= min_area}
    crowded = {target.category for target in row.targets if target.is_ignore}
    phrase_counts = Counter(row.targets[index].phrase for index in real)
    units: list[_Unit] = []
    for category in dict.fromkeys(row.targets[index].category for index in real):
        members = [index for index in real if row.targets[index].category == category]
        units += [
            _Unit(
                definite(row.targets[index].phrase),
                (index,),
                (definite(row.targets[index].phrase),),
                row.targets[index].box[0],
            )
            for index in members
            if index in big_enough and phrase_counts[row.targets[index].phrase] == 1 and category not in crowded
        ]
        is_whole = (
            big_enough.issuperset(members)
            and category not in crowded
            and not any(is_described(row.targets[index].phrase) for index in members)
        )
        if is_whole and 1 < len(members) <= limits.max_targets:
            left_px = min(row.targets[index].box[0] for index in members)
            units.append(_Unit(f"all the {plural(category)}", tuple(members), _each_named(row, members), left_px))
    return units


def _each_named(row: Row, members: Sequence[int]) -> tuple[str, ...]:
    """Names for the members of a whole category: their own phrases if all differ, else counted ones."""
    phrases = [row.targets[index].phrase for index in members]
    if len(set(phrases)) == len(phrases):
        return tuple(definite(phrase) for phrase in phrases)
    category = row.targets[members[0]].category
    return (f"one {category}",) + (f"another {category}",) * (len(members) - 1)


def _usable_dialogues(row: Row, group: Group, limits: ComposeLimits) -> list[RowDialogue]:
    min_area = limits.min_target_share * row.height * row.width
    return [
        dialogue
        for dialogue in row.dialogues
        if dialogue.kind == group
        and len(dialogue.target_ids) <= limits.max_targets
        and all(row.targets[index].area >= min_area for index in dialogue.target_ids)
    ]


def _segmentation_turns(units: list[_Unit], rng: np.random.Generator, limits: ComposeLimits) -> list[Turn]:
    """Asks for random units, those of one question from left to right, each target at most once in the dialogue."""
    waiting = [units[index] for index in rng.permutation(len(units))]
    asked: set[int] = set()
    turns: list[Turn] = []
    for _ in range(int(rng.integers(1, limits.max_questions + 1))):
        wanted = int(rng.integers(1, limits.max_targets + 1))
        chosen: list[_Unit] = []
        for unit in waiting:
            room = wanted - sum(len(other.target_indices) for other in chosen)
            fits = len(unit.target_indices) <= room or (not chosen and len(unit.target_indices) <= limits.max_targets)
            if fits and asked.isdisjoint(unit.target_indices):
                chosen.append(unit)
                asked.update(unit.target_indices)
        if chosen:
            turns.append(_segmentation_turn(sorted(chosen, key=lambda unit: unit.left_px), rng))
    return turns


def _segmentation_turn(units: list[_Unit], rng: np.random.Generator) -> Turn:
    indices = tuple(index for unit in units for index in unit.target_indices)
    names = [name for unit in units for name in unit.each]
    objects = _listed([unit.name for unit in units])
    question = _pick(SINGLE_QUESTIONS if len(units) == 1 else MULTI_QUESTIONS, rng).replace("{objects}", objects)
    if len(indices) == 1:
        answer = _pick(SINGLE_ANSWERS, rng)
        answer = answer.replace("{named}", names[0]).replace("{Named}", _capitalised(names[0]))
    else:
        listed = _listed([f"{name} {SEG_MARKER}" for name in names])
        answer = _pick(MULTI_ANSWERS, rng)
        answer = answer.replace("{listed}", listed).replace("{Listed}", _capitalised(listed))
    return Turn(question, answer, indices)


def _written_turns(dialogues: list[RowDialogue], rng: np.random.Generator, limits: ComposeLimits) -> list[Turn]:
    count = min(len(dialogues), int(rng.integers(1, limits.max_questions + 1)))
    chosen = [dialogues[index] for index in rng.permutation(len(dialogues))[:count]]
    return [Turn(dialogue.question, dialogue.answer, dialogue.target_ids) for dialogue in chosen]


def _pick(templates: Sequence[str], rng: np.random.Generator) -> str:
    return templates[int(rng.integers(len(templates)))]


def _listed(names: Sequence[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _capitalised(text: str) -> str:
    return text[:1].upper() + text[1:]
