"""train / val / test-few / test-many, by picture and seeded: no picture is in two of them.

The paper divides 246k pairs into 239k, 2.8k and 4.3k, and the test split by whether a question has "less or more than
three" targets (Sec. 4.1), which leaves three itself open. Here few is up to three and many is four and more. A picture
of the test split whose questions are of both kinds goes where most of them belong; the others are left out and counted.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from pixellm.jobs.muse.selection import seeded_key

#: Targets of an answer in test-few, at most.
FEW_TARGETS = 3
#: With fewer pictures than this there is no picture to spare: everything is train.
_MIN_PICTURES = 8


class Split(StrEnum):
    """The name of a split, of its folder and of its shards."""

    TRAIN = "train"
    VAL = "val"
    TEST_FEW = "test-few"
    TEST_MANY = "test-many"


@dataclass(frozen=True, slots=True)
class SplitShares:
    """Shares of the pictures; the paper's by default (2.8k and 4.3k of 246k pairs)."""

    val: float = 2.8 / 246
    test: float = 4.3 / 246


def assign_splits(target_counts: Mapping[str, Sequence[int]], seed: int, shares: SplitShares) -> dict[str, Split]:
    """The split of each picture, a pure function of the pictures, their questions' target counts, and the seed.

    The pictures stand in a seeded order and each split takes the first that it may have, so that a set that grows
    moves few pictures. val and both halves of test get at least one picture where there are pictures of the kind.

    Args:
        target_counts: image id → number of targets of each of its questions.
        seed: decides the order.
        shares: shares of the pictures for val and test.
    """
    drawn = sorted(target_counts, key=lambda name: (seeded_key(seed, "split", name), name))
    splits = dict.fromkeys(drawn, Split.TRAIN)
    if len(drawn) < _MIN_PICTURES:
        return splits
    kinds: dict[Split, list[str]] = {Split.TEST_FEW: [], Split.TEST_MANY: []}
    for name in drawn:
        kinds[half_of_test(target_counts[name])].append(name)
    for kind, names in kinds.items():
        splits.update(dict.fromkeys(names[: _share(len(names), shares.test)], kind))
    rest = [name for name in drawn if splits[name] is Split.TRAIN]
    splits.update(dict.fromkeys(rest[: _share(len(drawn), shares.val)], Split.VAL))
    return splits


def half_of_test(counts: Sequence[int]) -> Split:
    """The half of the test split where most of a picture's questions belong; many where it is a tie."""
    few = sum(count <= FEW_TARGETS for count in counts)
    return Split.TEST_FEW if 2 * few > len(counts) else Split.TEST_MANY


def fits(split: Split, num_targets: int) -> bool:
    """Whether a question with this many targets may stand in a split."""
    if split is Split.TEST_FEW:
        return num_targets <= FEW_TARGETS
    return split is not Split.TEST_MANY or num_targets > FEW_TARGETS


def _share(count: int, share: float) -> int:
    """A share of a count, at least one where any is wanted, and never all of several."""
    if not count or share <= 0:
        return 0
    return max(1, min(round(count * share), count - 1))
