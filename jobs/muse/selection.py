"""Which pictures are asked about, and which of their instances the generator is shown.

The paper gives the generator "all the instance category names and corresponding bounding box coordinates" (Sec. 4.2)
and says no more. The policy here: an instance is offered when it is large enough to be seen; a picture is asked about
when it offers enough instances of enough categories; which ones, where only some are wanted, a seed decides.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from pixellm.platform.data.schema import Row
from pixellm.platform.masks import Box

#: Why a picture is not asked about.
TOO_FEW_INSTANCES = "too few instances"
TOO_LITTLE_VARIETY = "too few categories"
DUPLICATE_PICTURE = "duplicate picture"


@dataclass(frozen=True, slots=True)
class SelectionPolicy:
    """What makes a picture worth asking about.

    Attributes:
        min_instances: offered instances that a picture needs.
        min_categories: different categories among them.
        min_area_share: an instance below this share of the picture's pixels is not offered.
        max_instances: instances offered at most; largest first, turn by turn over the categories.
    """

    min_instances: int = 3
    min_categories: int = 2
    min_area_share: float = 0.001
    max_instances: int = 40


@dataclass(frozen=True, slots=True)
class Instance:
    """An instance as the generator knows it.

    Attributes:
        number: its id in the request, from 1.
        target_index: its place in `Row.targets`.
        name: its category in plain words.
        box: x0, y0, x1, y1 in pixels of the picture.
    """

    number: int
    target_index: int
    name: str
    box: Box


@dataclass(frozen=True, slots=True)
class Selection:
    """The numbers of the rows to ask about, ascending, and how many pictures were passed over for which reason."""

    rows: tuple[int, ...]
    looked_at: int
    passed_over: dict[str, int]


def offered_instances(row: Row, policy: SelectionPolicy) -> tuple[Instance, ...]:
    """The instances of a picture that the generator may choose from, numbered in the row's order.

    Crowd regions, specks and a second copy of the same mask are left out. Where too many are left, each category gives
    its largest in turn, so that many small instances of one category crowd nothing else out.
    """
    least = policy.min_area_share * row.height * row.width
    by_name: dict[str, list[int]] = defaultdict(list)
    seen: set[bytes] = set()
    for index, target in enumerate(row.targets):
        if target.is_ignore or target.area < least or target.area == 0 or target.mask["counts"] in seen:
            continue
        seen.add(target.mask["counts"])
        by_name[plain_name(target.category)].append(index)
    for members in by_name.values():
        members.sort(key=lambda index: (-row.targets[index].area, index))
    chosen = sorted(list(_in_turns(by_name))[: policy.max_instances])
    return tuple(
        Instance(number, index, plain_name(row.targets[index].category), row.targets[index].box)
        for number, index in enumerate(chosen, start=1)
    )


def reason_to_pass_over(row: Row, policy: SelectionPolicy) -> str | None:
    """Why a picture is not asked about; None for one that is."""
    instances = offered_instances(row, policy)
    if len(instances) < policy.min_instances:
        return TOO_FEW_INSTANCES
    if len({instance.name for instance in instances}) < policy.min_categories:
        return TOO_LITTLE_VARIETY
    return None


def select(rows: Iterable[Row], policy: SelectionPolicy, seed: int, limit: int | None = None) -> Selection:
    """Chooses pictures in one pass; the choice depends on the rows, the policy and the seed alone.

    Args:
        rows: in the shards' order, pictures not needed.
        policy: what makes a picture worth asking about.
        seed: decides which ones where `limit` leaves some out.
        limit: pictures at most. A smaller limit's choice is a part of a larger one's.
    """
    keys: dict[str, tuple[int, int]] = {}
    passed_over: Counter[str] = Counter()
    looked_at = 0
    for number, row in enumerate(rows):
        looked_at += 1
        reason = DUPLICATE_PICTURE if row.image_id in keys else reason_to_pass_over(row, policy)
        if reason:
            passed_over[reason] += 1
            continue
        keys[row.image_id] = (seeded_key(seed, "select", row.image_id), number)
    drawn = sorted(keys.values())
    if limit is not None and len(drawn) > limit:
        passed_over["beyond the limit"] = len(drawn) - limit
        drawn = drawn[:limit]
    return Selection(tuple(sorted(number for _, number in drawn)), looked_at, dict(sorted(passed_over.items())))


def seeded_key(seed: int, purpose: str, name: str) -> int:
    """A number of 64 bits that orders names at random, the same for the same seed and purpose on every machine."""
    return int.from_bytes(hashlib.sha256(f"{seed}\0{purpose}\0{name}".encode()).digest()[:8], "big")


def plain_name(category: str) -> str:
    """A category in plain words: "bath_mat" → "bath mat", "bun_(bread)" → "bun"."""
    words = category.replace("_", " ").partition("(")[0].split()
    return " ".join(words) or category.strip() or "object"


def _in_turns(by_name: dict[str, list[int]]) -> Iterator[int]:
    for rank in range(max((len(members) for members in by_name.values()), default=0)):
        yield from (members[rank] for members in by_name.values() if rank < len(members))
