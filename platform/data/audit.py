"""What may be wrong with prepared data, found row by row: pictures of a benchmark, hidden targets, empty or repeated
questions. `audit_row` says what it found and gives the row without it.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import StrEnum

import numpy as np
from pycocotools import mask as coco_mask

from pixellm.platform.data.picture_hash import (
    SAME_ID_BITS,
    SAME_PICTURE_BITS,
    has_detail,
    hash_distances,
    picture_hash,
)
from pixellm.platform.data.schema import SEG_MARKER, Row, RowDialogue, Target

#: A target with at least this share of its pixels under others counts as hidden.
HIDDEN_SHARE = 0.95


class Check(StrEnum):
    """What is looked for; the value is its name on the command line and in reports."""

    LEAK = "leak"
    HIDDEN = "hidden-target"
    EMPTY = "empty-answer"
    REPEATED = "repeated-question"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing found: by which check, in which picture, and in words what."""

    check: Check
    image_id: str
    detail: str


class BenchmarkPictures:
    """The pictures of benchmark sets, to be recognised among training pictures by content, looks, or id and looks.

    It holds 16 bytes, a digest and an id for each; the pictures themselves are read once.
    """

    def __init__(self, rows: Iterable[tuple[str, Row]]) -> None:
        """Args: rows: (name of the benchmark, row with its picture)."""
        hashes: list[np.ndarray] = []
        self._names: list[str] = []
        self._by_digest: dict[bytes, int] = {}
        self._by_id: dict[str, list[int]] = {}
        for number, (benchmark, row) in enumerate(rows):
            hashes.append(picture_hash(row.image))
            self._names.append(f"{row.image_id} of {benchmark}")
            self._by_digest.setdefault(hashlib.sha256(row.image).digest(), number)
            self._by_id.setdefault(row.image_id, []).append(number)
        self._hashes = np.stack(hashes) if hashes else np.zeros((0, 2), dtype=np.uint64)

    def __len__(self) -> int:
        return len(self._names)

    def find(self, row: Row) -> str | None:
        """In words, where the row's picture is in a benchmark; None if it is in none."""
        same = self._by_digest.get(hashlib.sha256(row.image).digest())
        if same is not None:
            return f"is picture {self._names[same]}, byte for byte"
        if not len(self):
            return None
        own = picture_hash(row.image)
        distances = hash_distances(own, self._hashes)
        for number in self._by_id.get(row.image_id, ()):
            if distances[number] <= SAME_ID_BITS:
                return f"has the id and the looks of picture {self._names[number]} ({distances[number]} bits differ)"
        nearest = int(distances.argmin())
        if distances[nearest] <= SAME_PICTURE_BITS and has_detail(own):
            return f"looks like picture {self._names[nearest]} ({distances[nearest]} bits differ)"
        return None


class SeenQuestions:
    """Remembers questions by picture over the rows of a dataset (8 bytes each)."""

    def __init__(self) -> None:
        self._seen: set[bytes] = set()

    def is_new(self, image_id: str, dialogue: RowDialogue) -> bool:
        """Whether this was not asked of this picture before; wording counts, case and spaces do not."""
        words = " ".join(dialogue.question.casefold().split())
        key = hashlib.blake2b(f"{image_id}\0{dialogue.kind}\0{words}".encode(), digest_size=8).digest()
        is_new = key not in self._seen
        self._seen.add(key)
        return is_new


def audit_row(
    row: Row,
    checks: frozenset[Check],
    *,
    benchmarks: BenchmarkPictures | None,
    seen: SeenQuestions,
    hidden_share: float = HIDDEN_SHARE,
) -> tuple[list[Finding], Row | None]:
    """Looks at one row.

    Args:
        row: with its picture (needed for leaks only).
        checks: what to look for.
        benchmarks: for leaks.
        seen: for repeated questions; remembers this row's.
        hidden_share: of a target's pixels under others, from which on it is hidden, 0..1.

    Returns:
        The findings, and the row without what they are about: a hidden target becomes an ignore region, a question goes
        with what follows it in its conversation. None where the whole row goes.
    """
    if Check.LEAK in checks and benchmarks is not None:
        where = benchmarks.find(row)
        if where is not None:
            return [Finding(Check.LEAK, row.image_id, where)], None
    findings: list[Finding] = []
    hidden = hidden_targets(row.targets, hidden_share) if Check.HIDDEN in checks else {}
    for index, share in hidden.items():
        name = f"{row.targets[index].phrase} ({row.targets[index].target_id})"
        findings.append(Finding(Check.HIDDEN, row.image_id, f"{name}: {share:.0%} of it lies under others"))
    kept: list[RowDialogue] = []
    for conversation in _conversations(row.dialogues):
        for dialogue in conversation:
            finding = _question_finding(row, dialogue, checks, seen)
            if finding is not None:
                findings.append(finding)
                break
            if not hidden.keys().isdisjoint(dialogue.target_ids):
                break
            kept.append(dialogue)
    if not findings:
        return [], row
    targets = tuple(replace(t, is_ignore=t.is_ignore or index in hidden) for index, t in enumerate(row.targets))
    has_something = bool(kept) or any(not target.is_ignore for target in targets)
    return findings, replace(row, targets=targets, dialogues=tuple(kept)) if has_something else None


def hidden_targets(targets: tuple[Target, ...], hidden_share: float) -> dict[int, float]:
    """Targets of which at least `hidden_share` lies under smaller ones, with that share, by index.

    Where masks overlap, the smaller thing is the one in front (a cup on a table whose mask goes on beneath it); of two
    equal masks the second counts as hidden. Parts ("car:wheel") hide nothing: they are the thing itself.
    """
    hidden: dict[int, float] = {}
    for index, target in enumerate(targets):
        if target.is_ignore or not target.area:
            continue
        smaller = [
            other.mask
            for place, other in enumerate(targets)
            if (other.area, place) < (target.area, index)
            and not other.is_ignore
            and ":" not in other.category
            and _boxes_meet(target, other)
        ]
        if smaller:
            both = coco_mask.merge([target.mask, coco_mask.merge(smaller)], intersect=True)
            share = float(coco_mask.area(both)) / target.area
            if share >= hidden_share:
                hidden[index] = share
    return hidden


def _question_finding(row: Row, dialogue: RowDialogue, checks: frozenset[Check], seen: SeenQuestions) -> Finding | None:
    words = f"“{dialogue.question}”"
    if Check.EMPTY in checks:
        fault = _answer_fault(row, dialogue)
        if fault is not None:
            return Finding(Check.EMPTY, row.image_id, f"{words}: {fault}")
    is_first = dialogue.turn == 0
    if Check.REPEATED in checks and is_first and not seen.is_new(row.image_id, dialogue):
        return Finding(Check.REPEATED, row.image_id, f"{words} was asked of this picture before")
    return None


def _answer_fault(row: Row, dialogue: RowDialogue) -> str | None:
    """What the answer lacks; expressions and absent categories have none by design."""
    if not dialogue.question.strip():
        return "there is no question"
    if any(not row.targets[index].area for index in dialogue.target_ids):
        return "a target of the answer covers no pixel"
    if dialogue.kind in ("referring", "absent"):
        return None
    if not dialogue.answer.replace(SEG_MARKER, "").strip(" .,;:") and not dialogue.target_ids:
        return "there is no answer"
    markers = dialogue.answer.count(SEG_MARKER)
    if markers != len(dialogue.target_ids):
        return f"{markers} markers for {len(dialogue.target_ids)} targets"
    return None


def _conversations(dialogues: tuple[RowDialogue, ...]) -> list[list[RowDialogue]]:
    conversations: list[list[RowDialogue]] = []
    for dialogue in dialogues:
        if dialogue.turn == 0 or not conversations:
            conversations.append([])
        conversations[-1].append(dialogue)
    return conversations


def _boxes_meet(one: Target, other: Target) -> bool:
    ax0, ay0, ax1, ay1 = one.box
    bx0, by0, bx1, by1 = other.box
    return ax0 < bx1 and bx0 < ax1 and ay0 < by1 and by0 < ay1
