"""Benchmark sets that are made of other sets, as pure functions of their rows and a seed.

Multi-referring (paper Sec. 5.2, Table 2): questions for 3 to 6 objects, made of expressions for single ones.
Splits (paper Sec. 4.2, Table 1): pictures apart, and the test questions once more by how many targets they have.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from pixellm.errors import ConfigError
from pixellm.platform.data.phrases import definite
from pixellm.platform.data.schema import SEG_MARKER, Row, RowDialogue

#: A question with at most so many targets is one for "few targets" (paper Sec. 4.2: "less or more than three").
FEW_TARGETS = 3


def pack_sizes(count: int, smallest: int, largest: int) -> list[int]:
    """Sizes of nearly equal groups, each from `smallest` to `largest`, that use as many of `count` things as can be.

    Returns:
        The sizes, the larger ones first; they add up to `count` unless no such groups do.
    """
    groups = -(-count // largest)
    if groups and count // groups < smallest:
        groups = count // smallest
    if not groups:
        return []
    used = min(count, groups * largest)
    return [used // groups + (number < used % groups) for number in range(groups)]


def multi_referring_row(row: Row, *, seed: int, min_targets: int = 3, max_targets: int = 6) -> Row | None:
    """The picture with questions for several of its targets instead of its single expressions.

    In each round every target is asked for at most once, by an expression that was not used before and means no other
    target of the picture: "Please segment the A, the B, the C." Rounds end when too few targets have one left.

    Args:
        row: with "referring" dialogues; those for several targets or for none are not used.
        seed: decides, together with the picture's id, the order of everything.
        min_targets: of a question.
        max_targets: likewise.

    Returns:
        The row with complete questions (kind "muse"), or None if not one can be asked.
    """
    rng = np.random.default_rng([seed, *hashlib.sha256(row.image_id.encode()).digest()[:8]])
    waiting = {
        index: [texts[place] for place in rng.permutation(len(texts))]
        for index, texts in sorted(_unambiguous_expressions(row).items())
    }
    dialogues: list[RowDialogue] = []
    while True:
        ready = [index for index, texts in waiting.items() if texts]
        sizes = pack_sizes(len(ready), min_targets, max_targets)
        if not sizes:
            break
        order = [ready[place] for place in rng.permutation(len(ready))]
        expressions = {index: waiting[index].pop() for index in order}
        for size in sizes:
            asked, order = order[:size], order[size:]
            dialogues.append(_list_question([(index, expressions[index]) for index in asked]))
    return replace(row, source=f"m{row.source}", dialogues=tuple(dialogues)) if dialogues else None


def assign_splits(image_ids: Iterable[str], shares: Mapping[str, float], seed: int) -> dict[str, str]:
    """Puts each picture into one split; the rest is "train".

    The order in which pictures are taken is that of a hash of seed and id: it does not depend on the order of the rows,
    and the exact share is met (to the nearest picture).

    Args:
        image_ids: of all rows; an id that comes twice is one picture.
        shares: of the pictures for each split besides "train", 0..1, together below 1.
        seed: another seed gives other splits.

    Raises:
        ConfigError: the shares leave nothing for training, or a split would be empty.
    """
    if any(share <= 0 for share in shares.values()) or sum(shares.values()) >= 1:
        raise ConfigError(f"got shares {dict(shares)}; wanted each above 0 and together below 1")
    ordered = sorted(set(image_ids), key=lambda image_id: hashlib.sha256(f"{seed}:{image_id}".encode()).digest())
    split_of = dict.fromkeys(ordered, "train")
    start = 0
    for split, share in shares.items():
        end = start + round(share * len(ordered))
        if end == start:
            raise ConfigError(
                f"{share:g} of {len(ordered)} pictures leaves the split {split} empty; give it a larger share"
            )
        split_of |= dict.fromkeys(ordered[start:end], split)
        start = end
    return split_of


def keep_questions(row: Row, *, min_targets: int = 1, max_targets: int | None = None) -> Row | None:
    """The row with only the questions for so many targets (both bounds included); None if it has none."""
    kept = tuple(
        dialogue
        for dialogue in row.dialogues
        if min_targets <= len(dialogue.target_ids) <= (max_targets or len(dialogue.target_ids))
    )
    return replace(row, dialogues=kept) if kept else None


def _unambiguous_expressions(row: Row) -> dict[int, list[str]]:
    """By target: the expressions that mean it alone and are not said of anything else in the picture."""
    meant: dict[str, set[tuple[int, ...]]] = defaultdict(set)
    referring = [dialogue for dialogue in row.dialogues if dialogue.kind == "referring"]
    for dialogue in referring:
        meant[dialogue.question.casefold()].add(dialogue.target_ids)
    expressions: dict[int, list[str]] = defaultdict(list)
    for dialogue in referring:
        is_single = len(dialogue.target_ids) == 1 and not row.targets[dialogue.target_ids[0]].is_ignore
        if is_single and len(meant[dialogue.question.casefold()]) == 1:
            expressions[dialogue.target_ids[0]].append(dialogue.question)
    return expressions


def _list_question(asked: Sequence[tuple[int, str]]) -> RowDialogue:
    """The paper's question: descriptors separated by commas, the answer's masks in the same order."""
    names = [definite(text.rstrip(" .,;")) for _, text in asked]
    answer = ", ".join(f"{name} {SEG_MARKER}" for name in names)
    return RowDialogue(
        kind="muse",
        question=f"Please segment {', '.join(names)}.",
        answer=f"{answer[:1].upper()}{answer[1:]}.",
        target_ids=tuple(index for index, _ in asked),
        phrases=tuple(text for _, text in asked),
    )
