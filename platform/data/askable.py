"""What a row's targets can be asked for by: names that single them out, whole categories, referring expressions."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from pixellm.platform.data.dialogue import ComposeLimits, Group
from pixellm.platform.data.phrases import definite, is_described, plural
from pixellm.platform.data.schema import Row, RowDialogue


@dataclass(frozen=True, slots=True)
class Unit:
    """Something that can be asked for.

    Attributes:
        name: in a question, with its article.
        target_indices: what is meant: one target, or all of a category or an expression.
        each: names of the targets in an answer, one each.
        left_px: the left-most edge.
    """

    name: str
    target_indices: tuple[int, ...]
    each: tuple[str, ...]
    left_px: float


def askable_units(row: Row, group: Group, limits: ComposeLimits) -> list[Unit]:
    """Everything in the row that a question of this group can ask for, in a fixed order.

    "segmentation" and "semantic" ask by name. A category with several instances is asked for as a whole when all of
    them fit the limits and no crowd region hides more of them (described targets, as in MUSE, are a selection: their
    category is never taken for complete). Its instances are asked for one by one where their phrase is unique.
    "referring" asks by the row's expressions.
    """
    if group == "referring":
        return [_described_unit(row, dialogue) for dialogue in usable_dialogues(row, group, limits)]
    min_area = limits.min_target_share * row.height * row.width
    real = [index for index, target in enumerate(row.targets) if not target.is_ignore]
    big_enough = {index for index in real if row.targets[index].area >= min_area}
    crowded = {target.category for target in row.targets if target.is_ignore}
    phrase_counts = Counter(row.targets[index].phrase for index in real)
    units: list[Unit] = []
    for category in dict.fromkeys(row.targets[index].category for index in real):
        members = [index for index in real if row.targets[index].category == category]
        units += [
            _named_unit(row, index)
            for index in members
            if index in big_enough and phrase_counts[row.targets[index].phrase] == 1 and category not in crowded
        ]
        is_whole = (
            big_enough.issuperset(members)
            and category not in crowded
            and not any(is_described(row.targets[index].phrase) for index in members)
        )
        if is_whole and 1 < len(members) <= limits.max_targets:
            name = f"all the {_spoken_plural(category)}"
            units.append(Unit(name, tuple(members), _each_named(row, members), _left_px(row, members)))
    return units


def usable_dialogues(row: Row, kind: Group, limits: ComposeLimits) -> list[RowDialogue]:
    """The row's dialogues of a kind whose targets are not too many or too small; expressions also have a target.

    A conversation ends before its first turn that is not usable.
    """
    min_area = limits.min_target_share * row.height * row.width
    usable: list[RowDialogue] = []
    is_whole = True
    for dialogue in row.dialogues:
        is_usable = (
            dialogue.kind == kind
            and (kind == "referring") <= len(dialogue.target_ids) <= limits.max_targets
            and all(row.targets[index].area >= min_area for index in dialogue.target_ids)
        )
        is_whole = is_usable and (is_whole or dialogue.turn == 0)
        if is_whole:
            usable.append(dialogue)
    return usable


def known_absent(row: Row, vocabulary: Sequence[str]) -> list[str]:
    """Names of what the picture lacks: the row's own, else all of a vocabulary that its annotators went through."""
    own = [
        dialogue.question
        for dialogue in row.dialogues
        if dialogue.kind == "absent" or (dialogue.kind == "referring" and not dialogue.target_ids)
    ]
    if own:
        return own
    present = {target.category for target in row.targets}
    return [_spoken(category) for category in vocabulary if category not in present]


def _named_unit(row: Row, index: int) -> Unit:
    name = definite(_spoken(row.targets[index].phrase))
    return Unit(name, (index,), (name,), row.targets[index].box[0])


def _described_unit(row: Row, dialogue: RowDialogue) -> Unit:
    name = definite(" ".join(dialogue.question.split()).rstrip(".?!"))
    more = ("another one",) * (len(dialogue.target_ids) - 1)
    return Unit(name, dialogue.target_ids, (name, *more), _left_px(row, dialogue.target_ids))


def _each_named(row: Row, members: Sequence[int]) -> tuple[str, ...]:
    """Names for the members of a whole category: their own phrases if all differ, else counted ones."""
    phrases = [row.targets[index].phrase for index in members]
    if len(set(phrases)) == len(phrases):
        return tuple(definite(_spoken(phrase)) for phrase in phrases)
    category = _spoken(row.targets[members[0]].category)
    return (f"one {category}",) + (f"another {category}",) * (len(members) - 1)


def _left_px(row: Row, members: Sequence[int]) -> float:
    return min(row.targets[index].box[0] for index in members)


def _spoken(name: str) -> str:
    """A part's name as PACO writes it, "mug:handle", in words: "handle of the mug"; other names as they are."""
    whole, colon, part = name.partition(":")
    return f"{part} of the {whole}" if colon else name


def _spoken_plural(category: str) -> str:
    whole, colon, part = category.partition(":")
    return f"{plural(part)} of the {plural(whole)}" if colon else plural(category)
